"""Feedback over a whole file, predicted losses and the byte budget: on tiny models, against torch and llama.cpp."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import gguf as reference
import numpy as np
import pytest
import tiny
import torch

from edgekit.build import Built
from edgekit.errors import InputError
from edgekit.formats import gguf
from edgekit.grids import find_grid
from edgekit.grids.solver import round_matrix
from edgekit.huggingface import open_checkpoint
from edgekit.stages import _feedback, _sensitivity
from edgekit.stages._moments import Rounding, round_network, with_moments
from edgekit.stages.evaluate import read_evaluation
from edgekit.stages.gguf import Params, quantize
from edgekit.store import Store


@pytest.fixture(scope="module")
def store(bundles: Any) -> Store:
    """The session's store, which has the converter."""
    found: Store = bundles.store
    return found


def built(store: Store, model: Path, *settings: str, recipe: str = "gguf-best") -> Built:
    return tiny.build_in(store, tiny.plan_of(model, recipe, *settings))


def divergence(done: Built) -> float:
    measured = read_evaluation(dict(done.evaluations)["bundle"], "bundle")[0]
    return next(m.value for m in measured if m.name == "kl_divergence_nats")


@pytest.mark.parametrize("kind", ["llama", "qwen3", "gemma3_text"])
def test_feedback_loses_less_in_the_same_bytes(store: Store, kind: str, tmp_path: Path) -> None:
    model = tiny.write_checkpoint(tmp_path / kind, kind)
    plain = built(store, model, "gguf.feedback=false", recipe="gguf-q4-0")
    done = built(store, model, recipe="gguf-q4-0")
    files = [one.result.path / "model.gguf" for one in (plain, done)]
    assert files[0].stat().st_size == files[1].stat().st_size
    assert done.result.facts["rounded_with_feedback"] >= 14  # seven matrices in two layers; the head may be no grid
    assert divergence(done) < 0.9 * divergence(plain)


def test_the_file_holds_what_the_network_was_left_with(store: Store, tiny_hf: Path, tmp_path: Path) -> None:
    """llama.cpp's converter reorders rows of queries and keys; every row comes back at its place, to the bit."""
    whole = built(store, tiny_hf, "gguf.type=F16", recipe="gguf-q8")
    source = whole.result.path / "model.gguf"
    target = tmp_path / "model.gguf"
    quantize(source, target, Params(type="Q4_K_M"), None)
    _, network = open_checkpoint(whole.checkpoint)
    windows = np.random.default_rng(0).integers(0, tiny.VOCABULARY, (2, 64)).astype(np.int32)
    done = _feedback.round_file(whole.checkpoint, network, windows, source, target, lambda i, n: None)
    stored = {tensor.name: tensor for tensor in reference.GGUFReader(target).tensors}
    places = _feedback.find_places(whole.checkpoint, open_checkpoint(whole.checkpoint)[1], source)
    assert sorted(done) == sorted(place.tensor for place in places.values())
    reordered = 0
    for name, place in places.items():
        tensor = stored[place.tensor]
        assert tensor.tensor_type.name in ("Q4_K", "Q5_K", "Q6_K", "Q5_0", "Q8_0")
        rounded = network.get_submodule(name).weight.data[place.rows].numpy()
        np.testing.assert_array_equal(reference.dequantize(tensor.data, tensor.tensor_type), rounded)
        reordered += not torch.equal(place.rows, torch.arange(len(place.rows)))
    assert reordered == 4


@pytest.mark.parametrize(("order", "found"), [((2, 3, 1, 0), True), ((0, 1, 2, 3), True), ((1, 1, 2, 3), False)])
def test_equal_rows_stand_for_each_other(order: tuple[int, ...], found: bool, tmp_path: Path) -> None:
    weight = torch.tensor([[1.0, 2.0], [0.0, 0.0], [0.0, 0.0], [3.0, 4.0]], dtype=torch.float16)
    path, stored = tmp_path / "data", weight[[*order]]
    path.write_bytes(stored.numpy().tobytes())
    rows = _feedback._rows(weight.float(), path, gguf.TensorInfo("w", (2, 4), "f16", 0, 16))
    assert (rows is not None) == found
    if rows is not None:
        assert torch.equal(weight[rows], stored)
        assert rows.sort().values.tolist() == [0, 1, 2, 3]


def test_a_matrix_is_rounded_for_what_all_before_it_give_when_they_are_rounded(
    store: Store, tiny_hf: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """So the finished network has just the moments that were seen on the way."""
    checkpoint = built(store, tiny_hf, "gguf.type=F16", recipe="gguf-q8").checkpoint
    _, network = open_checkpoint(checkpoint)
    tokens = torch.randint(0, tiny.VOCABULARY, (3, 32), generator=torch.Generator().manual_seed(0))
    seen: dict[str, torch.Tensor] = {}
    round_group = Rounding.round

    def watched(self: Rounding, modules: Any, moments: Any) -> Any:
        assert moments.tokens == tokens.numel()
        seen.update(dict.fromkeys(modules, moments.hessian))
        return round_group(self, modules, moments)

    monkeypatch.setattr(Rounding, "round", watched)
    linears = {name: one for name, one in network.named_modules() if isinstance(one, torch.nn.Linear)}
    with torch.inference_mode():
        before = {name: moments.hessian for group, moments in with_moments(network, tokens, linears) for name in group}
        found = [*round_network(network, tokens, Rounding(dict.fromkeys(linears, find_grid("Q4_0"))))]
        after = {name: moments.hessian for group, moments in with_moments(network, tokens, linears) for name in group}
    assert [len(group) for group in found] == [7, 7, 1]
    assert seen.keys() == linears.keys()
    for name, hessian in seen.items():
        torch.testing.assert_close(hessian, after[name], rtol=1e-4, atol=1e-5)
        moved = not name.startswith("model.layers.0.self_attn") or name.endswith("o_proj")
        assert torch.allclose(hessian, before[name], rtol=1e-3) != moved, name


def test_predicted_losses_are_those_of_the_logits(store: Store, tiny_hf: Path) -> None:
    """Rounding one matrix at a time: the divergence of all logits in float64 against the prediction."""
    whole = built(store, tiny_hf, "gguf.type=F16", recipe="gguf-q8")
    source, checkpoint = whole.result.path / "model.gguf", whole.checkpoint
    _, network = open_checkpoint(checkpoint)
    windows = np.random.default_rng(0).integers(0, tiny.VOCABULARY, (24, 128))
    losses = _sensitivity.measure(checkpoint, network, windows, source, ("Q4_0", "Q8_0"), lambda i, n, unit: None)
    tokens = torch.from_numpy(windows)

    def law() -> torch.Tensor:
        return network(tokens, use_cache=False).logits.double().log_softmax(-1)

    places = _feedback.find_places(checkpoint, network, source)
    predicted, found = [], []
    with torch.inference_mode():
        before = law()
        linears = {name: place.module for name, place in places.items()}
        groups = with_moments(network, tokens, linears)
        read = {module: moments for group, moments in groups for module in group.values()}
        for place in places.values():
            weight = place.module.weight.data.clone()
            rounded = round_matrix(weight, read[place.module].metric(), find_grid("Q4_0"), sweeps=0)
            place.module.weight.data = rounded.matrix
            found.append(float((before.exp() * (before - law())).sum(-1).mean()))
            place.module.weight.data = weight
            predicted.append(losses[place.tensor]["Q4_0"])
            assert losses[place.tensor]["Q8_0"] < 0.1 * losses[place.tensor]["Q4_0"]
    ratios = np.array(predicted) / np.array(found)
    assert ratios.min() > 0.5
    assert ratios.max() < 2
    assert np.corrcoef(np.log(predicted), np.log(found))[0, 1] > 0.9


@pytest.mark.parametrize("bits", [5.0, 6.5])
def test_a_file_uses_its_budget_and_stays_within_it(store: Store, tiny_hf: Path, bits: float) -> None:
    done = built(store, tiny_hf, f"gguf.bits_per_weight={bits}")
    path = done.result.path / "model.gguf"
    header = gguf.read_header(path)
    budget = int(header.parameters * bits / 8)
    assert 0.97 * budget < path.stat().st_size <= budget
    assert len({info.type for info in header.tensors}) > 2
    facts = done.result.facts
    assert facts["budget_bytes"] == budget
    assert facts["curve"] == sorted(facts["curve"])
    assert divergence(done) < 4 * facts["predicted_divergence_nats"]


def test_a_second_budget_measures_nothing_again(store: Store, tiny_hf: Path) -> None:
    built(store, tiny_hf, "gguf.bits_per_weight=6")
    again = built(store, tiny_hf, "gguf.budget_bytes=1100000")
    status = {step.stage: step.status for step in again.steps}
    assert status["sensitivity"] == "cached"
    assert status["gguf"] == "executed"


def test_a_plan_shows_the_curve_where_losses_are_known(
    store: Store, tiny_hf: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("EDGEKIT_CACHE", str(store.root))
    done = built(store, tiny_hf, "gguf.bits_per_weight=6")
    settings = [f"{name}.{part}" for name in ("sensitivity", "gguf") for part in ("windows=4", "window_tokens=128")]
    asked = ["plan", tiny_hf, "--target", "jetson", "--recipe", "gguf-best", "--set", "gguf.bits_per_weight=6"]
    asked += [part for one in (*settings, *tiny.SMALL) for part in ("--set", one)]
    plan = json.loads(tiny.edgekit(*asked, "--json").stdout)["targets"][0]
    assert plan["budget"] == {key: done.result.facts[key] for key in plan["budget"]}
    shown = tiny.edgekit(*asked).stdout
    assert "the budget" in shown
    assert "weights (within the budget)" in shown
    unknown = json.loads(tiny.edgekit(*asked, "--set", "sensitivity.windows=3", "--json").stdout)["targets"][0]
    assert unknown["budget"] is None


def test_a_budget_chooses_among_the_types_that_may_be(store: Store, tiny_hf: Path) -> None:
    free = built(store, tiny_hf, "gguf.bits_per_weight=6").result.facts
    bound = built(store, tiny_hf, "gguf.bits_per_weight=6", "gguf.types=[q4_0, q8_0]").result.facts
    assert set(bound["types"]) == {"q4_0", "q8_0"} < set(free["types"]) | {"q4_0"}
    assert bound["predicted_divergence_nats"] > free["predicted_divergence_nats"]
    with pytest.raises(InputError, match="no type to round to"):
        tiny.plan_of(tiny_hf, "gguf-best", "gguf.types=[q4_9]")


def test_a_budget_may_be_what_fits(tiny_hf: Path) -> None:
    plan = tiny.plan_of(tiny_hf, "gguf-best", "gguf.budget_bytes=fit")
    (budget,) = (step.params.budget_bytes for step in plan.steps if step.stage.name == "gguf")
    memory = plan.memory
    assert budget == memory.usable_bytes - (memory.required_bytes - memory.weight_bytes)
    assert memory.fits


def test_a_budget_below_the_smallest_types_is_refused_when_it_is_planned(tiny_hf: Path) -> None:
    result = tiny.edgekit(
        "plan", tiny_hf, "--target", "jetson", "--recipe", "gguf-best", "--set", "gguf.bits_per_weight=1"
    )
    assert result.code == 2
    assert "a budget of at least" in result.stderr


def test_a_budget_without_measured_losses_says_what_to_add(store: Store, tiny_hf: Path) -> None:
    with pytest.raises(InputError, match="sensitivity"):
        built(store, tiny_hf, "gguf.bits_per_weight=6", recipe="gguf-q4")
