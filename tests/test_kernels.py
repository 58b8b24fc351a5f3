"""What a weight of each type costs in decode, and how a probed machine tells it."""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any

import pytest

from edgekit.devices import probe
from edgekit.errors import ToolError
from edgekit.formats.gguf import read_header
from edgekit.grids import NAMES
from edgekit.measure import kernels
from edgekit.target import LOCAL, find_target


@pytest.mark.parametrize("name", NAMES)
def test_a_model_of_every_type_is_one_hole(name: str, tmp_path: Path) -> None:
    path = tmp_path / "model.gguf"
    kernels.write_model(path, name, 2)
    header = read_header(path)
    matrices = [tensor for tensor in header.tensors if len(tensor.shape) == 2]
    assert {tensor.type.upper() for tensor in matrices} == {name}
    assert len(matrices) == 2 + 2 * 7
    assert header.metadata["tokenizer.ggml.tokens"][:2] == ("<0>", "<1>")
    assert path.stat().st_blocks * 512 < 100_000 < path.stat().st_size


def test_the_types_are_those_that_have_a_grid() -> None:
    assert kernels.TYPES == NAMES


def test_llama_cpp_decodes_in_every_type(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kernels, "MOST_LAYERS", 1)
    costs = kernels.measure_weight_costs(1, turns=1)
    assert [*costs] == [*NAMES]
    assert costs["Q8_0"] == 1
    assert all(0.01 < cost < 100 for cost in costs.values())


def test_the_best_step_of_all_turns_counts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kernels, "MOST_LAYERS", 1)
    # the second turn is the better one of even types, the third of odd ones
    seconds = itertools.chain([5.0] * len(NAMES), itertools.cycle([2.0, 4.0]))
    monkeypatch.setattr(kernels, "_best_step_s", lambda engine: next(seconds))
    costs = kernels.measure_weight_costs(1)
    assert len(NAMES) % 2 == 1
    assert set(costs.values()) == {1.0}  # 2 s for every type, in one turn or the other
    steps = iter([*range(10, 10 + len(NAMES))])
    monkeypatch.setattr(kernels, "_best_step_s", lambda engine: next(steps))
    assert kernels.measure_weight_costs(1, turns=1) == {
        name: float(f"{(10 + place) / (10 + NAMES.index('Q8_0')):.3g}") for place, name in enumerate(NAMES)
    }


def fail(*_: Any) -> Any:
    raise ToolError("the package llama-cpp-python", "it is not installed", "pip install 'edgekit[gguf]'")


@pytest.mark.parametrize(
    ("measure", "share", "note"),
    [
        (lambda threads: {"Q8_0": 1.0, "Q4_K": 0.7}, 0.0, None),
        (lambda threads: {"Q8_0": 1.0, "Q4_K": 9.0}, 0.6, "other programs kept the machine busy"),
        (fail, 0.0, "it is not installed"),
    ],
    ids=["measured", "busy", "missing"],
)
def test_a_probed_machine_has_costs_or_says_why_not(
    monkeypatch: pytest.MonkeyPatch, measure: Any, share: float, note: str | None
) -> None:
    monkeypatch.setattr(kernels, "measure_weight_costs", measure)
    monkeypatch.setattr(probe._OthersLoad, "share", lambda self: share)
    target = probe.probe_machine().target
    if note is None:
        named = probe.name_target(probe.probe_machine(), "mine")
        assert named.compute.costs == {"Q8_0": 1.0, "Q4_K": 0.7}
        assert "llama.cpp's kernels" in str(named.compute.weight_costs)
        assert "measured on this machine" not in str(named.compute.weight_costs)
    else:
        assert target.compute.weight_costs is None
        assert target.notes[-1] == f"What a weight of each type costs in decode was not measured: {note}."
    assert find_target(LOCAL).compute.weight_costs is None
