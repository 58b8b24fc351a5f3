from __future__ import annotations

import ctypes
import math
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from edgekit.errors import InputError
from edgekit.formats.gguf import GGML_TYPES
from edgekit.grids import NAMES, Grid, find_grid

torch = pytest.importorskip("torch")
from edgekit.grids.line import Line, Linear  # noqa: E402
from edgekit.grids.solver import Metric, expected_losses, proxy_loss, round_matrix  # noqa: E402

TYPES = {kind.name.upper(): (number, kind) for number, kind in GGML_TYPES.items()}
GROUPS = {"Q2_K": (16, 4, 4), "Q3_K": (16, 6), "Q4_K": (8, 6, 6), "Q5_K": (8, 6, 6), "Q6_K": (16, 8)}
"""Groups of a k-quant's block, and the bits of their scales and minima; without minima the scales are signed."""
BITS = {name: int(name[1]) for name in NAMES if name[0] == "Q"} | {"IQ4_NL": 4}


@pytest.fixture(scope="module")
def ggml() -> Ggml:
    llama_cpp = pytest.importorskip("llama_cpp")
    return Ggml(ctypes.CDLL(str(next((Path(llama_cpp.__file__).parent / "lib").glob("libggml-base.*")))))


class Ggml:
    """The reference: ggml's own functions."""

    def __init__(self, base: ctypes.CDLL) -> None:
        self.base = base
        base.ggml_row_size.restype = ctypes.c_size_t
        base.ggml_row_size.argtypes = [ctypes.c_int, ctypes.c_int64]
        base.ggml_quantize_chunk.restype = ctypes.c_size_t
        base.ggml_quantize_chunk.argtypes = [
            ctypes.c_int, *[ctypes.c_void_p] * 2, *[ctypes.c_int64] * 3, ctypes.c_void_p
        ]  # fmt: skip

    def read(self, name: str, packed: Any) -> Any:
        _, kind = TYPES[name]
        function = getattr(self.base, f"dequantize_row_{kind.name}")
        function.restype, function.argtypes = None, [ctypes.c_void_p, ctypes.c_void_p, ctypes.c_int64]
        packed = packed.contiguous()
        out = torch.full((len(packed), packed.shape[1] // kind.block_bytes * kind.block_elements), math.nan)
        function(packed.data_ptr(), out.data_ptr(), out.numel())
        return out

    def round(self, name: str, weights: Any, importance: Any) -> Any:
        """Round under an importance per column, and read it back."""
        number, kind = TYPES[name]
        weights, importance = weights.contiguous(), importance.contiguous()
        rows, columns = weights.shape
        packed = torch.empty(rows, columns // kind.block_elements * kind.block_bytes, dtype=torch.uint8)
        self.base.ggml_quantize_chunk(
            number, weights.data_ptr(), packed.data_ptr(), 0, rows, columns, importance.data_ptr()
        )
        return self.read(name, packed)


def generator(seed: int = 0) -> Any:
    return torch.Generator().manual_seed(seed)


def gaussian(rows: int, columns: int, seed: int = 0) -> Any:
    return torch.randn(rows, columns, generator=generator(seed)) * 0.05


def heavy_tailed(rows: int, columns: int, seed: int = 0) -> Any:
    """Student's t with 3 degrees of freedom."""
    normal = torch.randn(4, rows, columns, generator=generator(seed))
    return 0.02 * normal[0] / (normal[1:] ** 2).mean(0).sqrt()


def round_plainly(grid: Grid, weights: Any, importance: Any) -> tuple[Any, Any]:
    """Fit and snap every block by itself; return the values and the bytes."""
    values, packed = [], []
    for start in range(0, weights.shape[1], grid.block):
        here = slice(start, start + grid.block)
        scales = grid.fit(weights[:, here], importance[here])
        codes = grid.snap(weights[:, here], scales, 0)
        values.append(grid.values(codes, scales, 0))
        packed.append(grid.pack(codes, scales))
    return torch.cat(values, 1), torch.cat(packed, 1)


def random_scales(name: str, rows: int) -> Any:
    """Scales of every kind that the format can store."""
    halves = 2 if name in ("Q4_1", "Q5_1") or len(GROUPS.get(name, ())) == 3 else 1
    columns = [torch.randn(rows, halves, generator=generator(1)).half().float()]
    groups, *bits = GROUPS.get(name, (0,))
    for width in bits:
        low, high = (0, 2**width) if halves == 2 else (-(2 ** (width - 1)), 2 ** (width - 1))
        columns.append(torch.randint(low, high, (rows, groups), generator=generator(width)).float())
    return torch.cat(columns, 1)


def test_names_in_any_case() -> None:
    assert [find_grid(name.lower()).name for name in NAMES] == list(NAMES)
    with pytest.raises(InputError, match=r"did you mean 'Q4_K'"):
        find_grid("q4_k_x")


@pytest.mark.parametrize("name", NAMES)
def test_sizes_are_those_of_ggml(ggml: Ggml, name: str) -> None:
    grid, (number, kind) = find_grid(name), TYPES[name]
    assert (grid.block, grid.bytes_per_block) == (kind.block_elements, kind.block_bytes)
    assert grid.bytes_per_block * 3 == ggml.base.ggml_row_size(number, grid.block * 3)
    assert grid.block % grid.group == 0


@pytest.mark.parametrize("name", NAMES)
def test_ggml_reads_any_codes_and_scales_as_values_says(ggml: Ggml, name: str) -> None:
    grid, rows = find_grid(name), 300
    scales = random_scales(name, rows)
    codes = torch.randint(0, 2 ** BITS[name], (rows, grid.block), generator=generator(), dtype=torch.uint8)
    values = grid.values(codes, scales, 0)
    packed = grid.pack(codes, scales)
    assert packed.shape == (rows, grid.bytes_per_block)
    assert torch.equal(ggml.read(name, packed), values)
    assert torch.equal(torch.cat([grid.values(codes[:, j : j + 1], scales, j) for j in range(grid.block)], 1), values)


@pytest.mark.parametrize("name", NAMES)
def test_snap_finds_the_nearest_value(name: str) -> None:
    grid, rows = find_grid(name), 20
    scales = random_scales(name, rows)
    weights = torch.randn(rows, grid.block, generator=generator(3)) * scales[:, :1].abs() * 40
    codes = torch.cat([grid.snap(weights[:, j : j + 4], scales, j) for j in range(0, grid.block, 4)], 1)
    found = (grid.values(codes, scales, 0) - weights).abs()
    for code in range(name == "Q8_0", 2 ** BITS[name]):
        other = (grid.values(torch.full_like(codes, code), scales, 0) - weights).abs()
        assert (found <= other * (1 + 1e-5) + 1e-5).all()


def edge_blocks(block: int) -> dict[str, Any]:
    noise = gaussian(4, block)
    outlier, single = noise.clone(), torch.zeros(4, block)
    outlier[:, block // 3], single[:, block // 2] = 9, -0.3
    return {
        "zeros": torch.zeros(4, block),
        "one outlier": outlier,
        "one weight": single,
        "negative": -noise.abs() - 0.1,
        "positive": noise.abs() + 0.1,
        "constant": torch.full((4, block), 0.37),
        "tiny": noise * 2e-4,
        "below float16": noise * 1e-30,
        "huge": noise * 1e5,
        "beyond float16": noise * 1e12,
        "half zeros": torch.cat([noise[:, : block // 2], torch.zeros(4, block // 2)], 1),
    }


@pytest.mark.parametrize("name", NAMES)
def test_edge_blocks(ggml: Ggml, name: str) -> None:
    grid = find_grid(name)
    for case, weights in edge_blocks(grid.block).items():
        values, packed = round_plainly(grid, weights, torch.ones(grid.block))
        assert torch.equal(ggml.read(name, packed), values), case
        assert values.isfinite().all(), case
        if case == "beyond float16":
            continue  # ggml stores infinities
        error = ((weights - values).double() ** 2).sum()
        reference = ((weights - ggml.round(name, weights, torch.ones(grid.block))).double() ** 2).sum()
        # where the error is next to nothing, either may be luckier with float16
        assert error <= 1.03 * reference + 2e-5 * (weights.double() ** 2).sum(), case


@pytest.mark.parametrize("name", NAMES)
def test_the_fit_is_better_than_ggmls(ggml: Ggml, name: str) -> None:
    grid, columns = find_grid(name), 512
    skewed = 0.01 + 10 * torch.rand(columns, generator=generator(2)) ** 4
    ratios = []
    for weights in (gaussian(96, columns), heavy_tailed(96, columns)):
        for importance in (torch.ones(columns), skewed):
            values, packed = round_plainly(grid, weights, importance)
            assert torch.equal(ggml.read(name, packed), values)
            reference = ggml.round(name, weights, importance)
            errors, others = (((weights - v) ** 2 * importance).sum(1) for v in (values, reference))
            ratios.append(float(errors.sum() / others.sum()))
    print(name, *(f"{ratio:.3f}" for ratio in ratios))
    assert max(ratios) < 0.99
    assert ratios[1] < 0.93
    assert ratios[3] < 0.93


@pytest.mark.parametrize(("name", "low", "high"), [("Q4_0", -8, 7), ("Q5_0", -16, 15)])
def test_the_fit_is_near_the_best_of_all_scales(name: str, low: int, high: int) -> None:
    grid, weights = find_grid(name), gaussian(24, 32, seed=5)
    importance = 0.1 + torch.rand(24, 32, generator=generator(6))
    scales = torch.arange(2**16, dtype=torch.int32).to(torch.int16).view(torch.float16).float()
    largest = float(weights.abs().max())
    scales = scales[scales.isfinite() & (scales.abs() < largest) & (scales.abs() > 0.2 * largest / high)]
    best = []
    for row, w in zip(weights, importance, strict=True):
        levels = (row / scales[:, None]).round().clamp(low, high)
        best.append(float((w * (row - levels * scales[:, None]) ** 2).sum(1).min()))
    fitted = grid.fit(weights, importance)
    errors = (importance * (weights - grid.values(grid.snap(weights, fitted, 0), fitted, 0)) ** 2).sum(1)
    ratio = float(errors.sum()) / sum(best)
    print(name, f"{ratio:.4f} of the best scale's error")
    assert 1 - 1e-4 < ratio < 1.02


@pytest.mark.parametrize("name", NAMES)
def test_weights_on_the_grid_stay(name: str) -> None:
    grid = find_grid(name)
    weights, importance = gaussian(8, grid.block), torch.ones(grid.block)
    values, _ = round_plainly(grid, weights, importance)
    again, _ = round_plainly(grid, values, importance)
    assert ((again - values) ** 2).sum() < 0.1 * ((values - weights) ** 2).sum()


def correlated(columns: int, seed: int = 0) -> Any:
    """The second moment of activations with a few strong directions, and a few large columns."""
    mixed = torch.randn(columns, columns, generator=generator(seed))
    spectrum = torch.arange(1, columns + 1) ** -0.8
    activations = torch.randn(4 * columns, columns, generator=generator(seed + 1)) * spectrum @ mixed
    activations[:, :: columns // 5] *= 4
    return activations.T @ activations / len(activations)


@pytest.mark.parametrize("name", NAMES)
def test_error_feedback_is_better_than_rounding(ggml: Ggml, name: str) -> None:
    grid, columns = find_grid(name), 256
    weights, hessian = gaussian(64, columns), correlated(columns)
    rounded = round_matrix(weights, Metric(hessian, 0.03), grid)
    assert torch.equal(ggml.read(name, rounded.pack(grid)), rounded.matrix)
    assert rounded.pack(grid).shape == (64, columns // grid.block * grid.bytes_per_block)
    assert rounded.loss == pytest.approx(proxy_loss((weights - rounded.matrix).double(), hessian), rel=1e-3)
    plain, _ = round_plainly(grid, weights, hessian.diagonal())
    reference = ggml.round(name, weights, hessian.diagonal())
    ratios = [rounded.loss / proxy_loss(weights - other, hessian) for other in (plain, reference)]
    print(name, "loss against plain rounding {:.3f}, against ggml {:.3f}".format(*ratios))
    assert max(ratios) < 0.5


@pytest.mark.parametrize("name", ["Q4_0", "IQ4_NL", "Q2_K", "Q6_K"])
def test_sweeps_only_improve_and_results_repeat(name: str) -> None:
    weights, hessian = gaussian(32, 256), correlated(256)
    losses = [round_matrix(weights, Metric(hessian, 0), find_grid(name), sweeps=n).loss for n in range(4)]
    assert all(after <= before * (1 + 1e-6) for before, after in pairwise(losses))
    assert losses[3] < 0.98 * losses[0]
    first, second = (round_matrix(weights, Metric(hessian, 0.03), find_grid(name)) for _ in range(2))
    assert torch.equal(first.codes, second.codes)


@pytest.mark.parametrize("name", ["Q4_0", "Q5_1", "Q8_0", "IQ4_NL"])
def test_a_diagonal_hessian_is_plain_rounding(name: str) -> None:
    grid, weights = find_grid(name), heavy_tailed(16, 128)
    hessian = torch.diag(0.1 + torch.rand(128, generator=generator(4)))
    _, packed = round_plainly(grid, weights, hessian.diagonal())
    rounded = round_matrix(weights, Metric(hessian, 0), grid, sweeps=0)
    assert (rounded.pack(grid) == packed).float().mean() > 0.999  # sums in another order


@pytest.mark.parametrize("name", ["Q2_K", "Q3_K", "Q4_K", "Q5_K", "Q6_K"])
def test_a_diagonal_hessian_costs_a_k_quant_no_more_than_plain_rounding(name: str) -> None:
    grid, weights = find_grid(name), heavy_tailed(16, 512)
    hessian = torch.diag(0.1 + torch.rand(512, generator=generator(4)))
    plain, _ = round_plainly(grid, weights, hessian.diagonal())
    rounded = round_matrix(weights, Metric(hessian, 0), grid, sweeps=0)
    # a search for scales ends a little elsewhere on processors that sum in another order
    assert rounded.loss <= 1.001 * proxy_loss(weights - plain, hessian)


@dataclass(frozen=True)
class Uniform(Linear):
    """Multiples of a fixed step."""

    name = "uniform"
    block: int = 8
    group: int = 8
    bytes_per_block = 8
    step: float = 0.05

    def fit(self, weights: Any, importance: Any) -> Any:
        return torch.full((len(weights), 1), self.step)

    def refit(self, columns: Any, importance: Any, scales: Any, start: int) -> Any:
        return scales

    def line(self, scales: Any, start: int, count: int) -> Line:
        return Line(torch.as_tensor(scales).view(-1, 1), None, -100, 100, 100)

    def pack(self, codes: Any, scales: Any) -> Any:
        return codes


def gptq(weights: Any, hessian: Any, step: float) -> Any:
    """GPTQ as its paper derives it: after each column, one step of Gaussian elimination on the inverse Hessian."""
    left, inverse = weights.copy(), np.linalg.inv(hessian)
    rounded = np.zeros_like(left)
    for j in range(left.shape[1]):
        rounded[:, j] = np.round(left[:, j] / step) * step
        left -= np.outer((left[:, j] - rounded[:, j]) / inverse[j, j], inverse[j])
        inverse -= np.outer(inverse[:, j], inverse[j]) / inverse[j, j]
        inverse[j, j + 1 :] = inverse[j + 1 :, j] = 0
    return rounded


@pytest.mark.parametrize("group", [8, 2])
def test_a_fixed_grid_is_gptq(group: int) -> None:
    columns, damping = 64, 0.02
    grid, weights, hessian = Uniform(group=group), gaussian(40, columns) * 4, correlated(columns)
    size = torch.linspace(4, 1, columns) / hessian.diagonal().sqrt()
    hessian = hessian * size * size[:, None]  # the columns are in the order of work
    diagonal = hessian.double().diagonal()
    damped = hessian.double() + damping * (diagonal * diagonal.mean()).sqrt().diag()
    expected = gptq(weights.double().numpy(), damped.numpy(), float(torch.tensor(grid.step)))
    rounded = round_matrix(weights, Metric(hessian, damping), grid, sweeps=0)
    assert np.abs(rounded.matrix.numpy() - expected).max() < 1e-6
    assert (
        rounded.matrix - grid.values(grid.snap(weights, torch.tensor(grid.step), 0), grid.step, 0)
    ).abs().max() > 0.04


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("damping", [0.03, 1.0])
def test_expected_losses_are_those_of_the_first_pass(name: str, damping: float) -> None:
    wide = torch.logspace(-1, 1, 256)[:, None]  # rows that lose very differently
    grid, weights, hessian = find_grid(name), wide * gaussian(256, 512), correlated(512)
    metric = Metric(hessian, damping)
    found, expected = round_matrix(weights, metric, grid, sweeps=0).losses[:, 0], expected_losses(weights, metric, grid)
    ratios = expected / found
    # scales of a block are fitted before its columns make up for each other, which matters where steps are wide
    assert 0.7 < float(ratios.log().mean().exp()) < 1
    assert float(ratios.log().std()) < 0.2


def test_what_an_error_loses_leaves_damping_out() -> None:
    hessian, grid = correlated(96), find_grid("Q4_0")
    metric = Metric(hessian, 0.3)
    order = metric.ordered(grid)[0].numpy()
    plain = hessian.double().numpy()[order][:, order]
    damping = 0.3 * np.sqrt(plain.diagonal() * plain.diagonal().mean())
    factor = np.linalg.cholesky(np.linalg.inv(plain + np.diag(damping))).T
    expected = (factor @ plain @ factor.T).diagonal() / factor.diagonal() ** 2
    np.testing.assert_allclose(metric.weights(grid)[1].numpy()[order], expected, rtol=1e-3)


def test_expected_losses_of_a_diagonal_hessian_are_exact() -> None:
    weights, hessian = heavy_tailed(16, 128), torch.diag(0.1 + torch.rand(128, generator=generator(4)))
    metric, grid = Metric(hessian, 0), find_grid("Q4_1")
    found = round_matrix(weights, metric, grid, sweeps=0).losses[:, 0]
    torch.testing.assert_close(expected_losses(weights, metric, grid), found)


def test_columns_in_another_order_are_rounded_alike() -> None:
    grid, weights, hessian = Uniform(), gaussian(40, 64), correlated(64)
    order = torch.randperm(8, generator=generator(7))[:, None] * 8 + torch.randperm(8, generator=generator(8))
    order = order.flatten()
    rounded = round_matrix(weights, Metric(hessian, 0.03), grid)
    moved = round_matrix(weights[:, order], Metric(hessian[order][:, order], 0.03), grid)
    assert (moved.matrix - rounded.matrix[:, order]).abs().max() < 1e-6


def test_the_best_rounding_of_a_few_weights_is_approached() -> None:
    """Against all 3^8 ways to round each of 8 weights up, down or further: a bound from below."""
    grid, weights, hessian = Uniform(), gaussian(30, 8) * 2, correlated(8)
    ways = torch.cartesian_prod(*[torch.arange(-1, 2)] * 8) * grid.step
    nearest = grid.values(grid.snap(weights, torch.tensor(grid.step), 0), grid.step, 0)
    errors = (weights - nearest)[:, None] - ways
    best = float(((errors @ hessian) * errors).sum(2).amin(1).sum())
    loss = round_matrix(weights, Metric(hessian, 1e-6), grid).loss
    plain = proxy_loss(weights - nearest, hessian)
    print(f"loss {loss:.3g}, best of 3^8 {best:.3g}, nearest {plain:.3g}")
    assert best * (1 - 1e-4) <= loss < 0.5 * plain


def test_rows_are_rounded_alike_in_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    weights, hessian = gaussian(40, 256), correlated(256)
    whole = round_matrix(weights, Metric(hessian, 0.03), find_grid("Q4_K"))
    monkeypatch.setattr("edgekit.grids.solver._CHUNK", 7 * 256 + 1)
    parts = round_matrix(weights, Metric(hessian, 0.03), find_grid("Q4_K"))
    assert (whole.codes == parts.codes).float().mean() > 0.9  # a sum rounded otherwise may turn a code
    assert parts.loss == pytest.approx(whole.loss, rel=0.02)


def test_what_was_never_activated_is_rounded_to_the_nearest() -> None:
    grid, weights = find_grid("Q4_0"), gaussian(8, 64)
    values, _ = round_plainly(grid, weights, torch.ones(64))
    rounded = round_matrix(weights, Metric(torch.zeros(64, 64), 0.03), grid, sweeps=0)
    assert torch.equal(rounded.matrix, values)
    assert rounded.loss == 0
    hessian = correlated(64)
    hessian[40], hessian[:, 40] = 0, 0
    assert round_matrix(weights, Metric(hessian, 0.03), grid).matrix.isfinite().all()


def test_bad_matrices_are_refused() -> None:
    weights, hessian = gaussian(8, 288), correlated(288)
    with pytest.raises(InputError, match="multiple of 256"):
        round_matrix(weights, Metric(hessian, 0.03), find_grid("Q4_K"))
    grid = find_grid("Q4_0")
    with pytest.raises(InputError, match="positive definite"):
        round_matrix(weights, Metric(-hessian, 0.03), grid)
    with pytest.raises(InputError, match="finite activations"):
        round_matrix(weights, Metric(hessian * math.inf, 0.03), grid)
    weights[3, 5] = math.nan
    with pytest.raises(InputError, match="finite weights"):
        round_matrix(weights, Metric(hessian, 0.03), grid)
    with pytest.raises(ValueError, match="288 columns"):
        round_matrix(weights, Metric(hessian[:64, :64], 0.03), grid)
