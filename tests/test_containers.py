"""Integer grids, and their codes as tensors of GPTQ checkpoints and of MatMulNBits: GPTQModel and ONNX Runtime read
what the solver believed."""

from __future__ import annotations

import itertools
import os
from typing import Any

import numpy as np
import pytest
import torch

from edgekit.errors import InputError
from edgekit.grids import BITS, Grid, integer_grid
from edgekit.grids.containers import awq_tensors, gptq_tensors, onnx_tensors
from edgekit.grids.solver import Metric, proxy_loss, round_matrix

SHAPES = list(itertools.product(BITS, (True, False)))


def random(*shape: int, seed: int = 0) -> Any:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def rounded(bits: int, symmetric: bool, group: int = 32, outputs: int = 64, inputs: int = 128) -> tuple[Grid, Any, Any]:
    grid = integer_grid(bits, group, symmetric=symmetric)
    x = random(512, inputs, seed=1) @ random(inputs, inputs, seed=2) * torch.linspace(0.1, 2, inputs)
    hessian = x.T @ x / len(x)
    weights = random(outputs, inputs) * 0.05 + 0.02
    return grid, weights, round_matrix(weights, Metric(hessian, 0.03), grid)


@pytest.mark.parametrize(("bits", "symmetric"), SHAPES)
def test_gptqmodel_dequantizes_what_the_solver_believed(bits: int, symmetric: bool) -> None:
    os.environ.setdefault("GPTQMODEL_CPU_WORKERS", "2")
    linear = pytest.importorskip("gptqmodel.nn_modules.qlinear.torch")
    convert = pytest.importorskip("gptqmodel.utils.model").convert_gptq_v1_to_v2_format_module
    _, _, found = rounded(bits, symmetric)
    tensors = gptq_tensors(found, bits)
    outputs, inputs = found.codes.shape
    module = linear.TorchLinear(
        bits=bits, group_size=32, sym=symmetric, desc_act=False, in_features=inputs, out_features=outputs
    )
    for name, tensor in tensors.items():
        held = getattr(module, name)
        assert held.dtype == tensor.dtype
        assert held.shape == tensor.shape
        setattr(module, name, tensor.clone())
    convert(module, bits=bits, pack_dtype=torch.int32)
    module.post_init()
    read = module.dequantize_weight().T
    # GPTQModel multiplies in float16
    torch.testing.assert_close(read.float(), found.matrix, rtol=2e-3, atol=1e-6)


def test_gptqmodel_reads_awq_as_the_solver_believed() -> None:
    linear = pytest.importorskip("gptqmodel.nn_modules.qlinear.torch_awq")
    _, _, found = rounded(4, False)
    outputs, inputs = found.codes.shape
    module = linear.AwqTorchLinear(
        bits=4, group_size=32, sym=False, desc_act=False, in_features=inputs, out_features=outputs, bias=False,
        register_buffers=True,
    )  # fmt: skip
    for name, tensor in awq_tensors(found).items():
        held = getattr(module, name)
        assert (held.shape, held.dtype) == (tensor.shape, tensor.dtype)
        held.copy_(tensor)
    module.post_init()
    x = torch.eye(inputs)
    torch.testing.assert_close(module.eval()(x.half()).float().T, found.matrix, rtol=2e-3, atol=1e-4)


@pytest.mark.parametrize(("bits", "symmetric"), [shape for shape in SHAPES if shape[0] != 3])
@pytest.mark.parametrize("outputs", [64, 7])
def test_onnxruntime_multiplies_by_what_the_solver_believed(bits: int, symmetric: bool, outputs: int) -> None:
    onnx = pytest.importorskip("onnx")
    runtime = pytest.importorskip("onnxruntime")
    grid, _, found = rounded(bits, symmetric, outputs=outputs, inputs=96)
    tensors = onnx_tensors(found.codes, found.scales, bits)
    helper = onnx.helper
    names = ["A", *tensors]
    node = helper.make_node(
        "MatMulNBits", names, ["Y"], domain="com.microsoft", K=96, N=outputs, bits=bits, block_size=grid.block
    )
    value = helper.make_tensor_value_info
    graph = helper.make_graph(
        [node], "one", [value("A", onnx.TensorProto.FLOAT, ["rows", 96])],
        [value("Y", onnx.TensorProto.FLOAT, ["rows", outputs])],
        [onnx.numpy_helper.from_array(tensor.numpy(), name) for name, tensor in tensors.items()],
    )  # fmt: skip
    opsets = [helper.make_opsetid("", 21), helper.make_opsetid("com.microsoft", 1)]
    model = helper.make_model(graph, opset_imports=opsets, ir_version=10)
    session = runtime.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
    (read,) = session.run(None, {"A": np.eye(96, dtype=np.float32)})
    np.testing.assert_allclose(read.T, found.matrix.numpy(), rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize(("bits", "symmetric"), SHAPES)
def test_feedback_is_better_than_rounding_to_the_range(bits: int, symmetric: bool) -> None:
    grid, weights, found = rounded(bits, symmetric)
    x = random(512, 128, seed=1) @ random(128, 128, seed=2) * torch.linspace(0.1, 2, 128)
    hessian = x.T @ x / len(x)
    top = 2**bits - 1
    groups = weights.view(64, -1, 32)
    if symmetric:
        scale = groups.abs().amax(-1, keepdim=True) / (top / 2)
        plain = ((groups / scale).round() + (top + 1) // 2).clamp(0, top) - (top + 1) // 2
    else:
        low, high = groups.amin(-1, keepdim=True).clamp_max(0), groups.amax(-1, keepdim=True).clamp_min(0)
        scale = (high - low) / top
        zero = (-low / scale).round()
        plain = ((groups / scale).round() + zero).clamp(0, top) - zero
    assert found.loss < 0.5 * proxy_loss(weights - (plain * scale).view(64, -1), hessian)
    assert int(found.codes.max()) <= top
    assert grid.block == grid.group == 32


@pytest.mark.parametrize("bits", BITS)
def test_zeros_are_nearly_the_best_of_all(bits: int) -> None:
    """Every zero, and a fine row of scales, by brute force."""
    weights = random(40, 16, seed=3) * 0.05 + torch.linspace(-0.2, 0.2, 40)[:, None]
    even, top = torch.ones(16), 2**bits - 1
    grid = integer_grid(bits, 16, symmetric=False)
    scales = grid.fit(weights, even)
    assert torch.equal(scales[:, 0], scales[:, 0].half().float())
    assert torch.equal(scales[:, 1], scales[:, 1].round().clamp(1, top))
    found = (weights - grid.values(grid.snap(weights, scales, 0), scales, 0)).square().sum(1)
    best = torch.full((40,), torch.inf)
    zeros = range(1, top + 1) if bits < 8 else range(1, top + 1, 3)
    for zero, share in itertools.product(zeros, np.geomspace(0.2, 1.2, 60)):
        reach = max(zero, top - zero)
        scale = weights.abs().amax(1, keepdim=True) * float(share) * 2 / reach
        codes = ((weights / scale).round() + zero).clamp(0, top)
        best = torch.minimum(best, (weights - (codes - zero) * scale).square().sum(1))
    ratio = (found.sum() / best.sum()).item()
    print(f"{bits} bits: {ratio:.3f} of the best by brute force")
    # the more bits, the more often brute force finds scales that happen to meet 16 weights
    assert ratio < (1.25 if bits < 8 else 1.6)


def test_bits_that_no_container_holds_are_refused() -> None:
    with pytest.raises(InputError, match="5 bits"):
        integer_grid(5, 32)
