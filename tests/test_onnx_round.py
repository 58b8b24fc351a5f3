"""Matrices of an ONNX model rounded with feedback, in a byte budget: against torch, ONNX Runtime and the builder."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import tiny
import torch
from onnx_models import checkpoint_artifact, divergence, export, torch_logits

from edgekit.build import Built
from edgekit.engine import EngineOptions, Entry
from edgekit.engines.onnxruntime import open_model
from edgekit.errors import InputError
from edgekit.huggingface import load_model, open_checkpoint
from edgekit.stages import _onnx_round
from edgekit.stages._onnx_graph import DATA, HALF, MODEL, read_values, stored_bytes
from edgekit.stages.evaluate import read_evaluation
from edgekit.stages.onnx_round import TYPES
from edgekit.store import Store

TOKENS = [int(token) for token in np.random.default_rng(7).integers(3, tiny.VOCABULARY, 48)]


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Store:
    return Store(tmp_path_factory.mktemp("store"))


def built(store: Store, model: Path, *settings: str) -> Built:
    return tiny.build_in(store, tiny.plan_of(model, "onnx-best", *settings, target="generic-x86"))


def logits_of(path: Path) -> Any:
    with open_model(path, EngineOptions(context_tokens=64, threads=1)) as engine:
        sequence = engine.start()
        return engine.step([Entry(sequence, token) for token in TOKENS]).logits


def rounded(source: Path, place: Path, types: dict[str, str], **params: Any) -> tuple[Path, Any]:
    """Export a checkpoint, round every part named in `types` by what its node's name begins with, and all others as
    they are; returns the model and the network that was left."""
    checkpoint = checkpoint_artifact(source)
    # activations stay in float32, as in torch
    export(checkpoint, place / "builder", precision="int4", accuracy_level=1, **params)
    _, network = open_checkpoint(checkpoint)
    graph = _onnx_round.open_graph(place / "builder", checkpoint, network)
    wanted = {
        name: next((kind for start, kind in types.items() if name.startswith(start)), graph.types[name])
        for name in graph.parts
    }
    shutil.copytree(place / "builder", place / "out", ignore=shutil.ignore_patterns("model.onnx*"))
    windows = np.random.default_rng(0).integers(0, tiny.VOCABULARY, (16, 64)).astype(np.int32)
    before = graph.nbytes - sum(part.nbytes(graph.types[name]) for name, part in graph.parts.items())
    graph.round(wanted, windows, place / "out", lambda done, total: None)
    after = sum((place / "out" / name).stat().st_size for name in (MODEL, DATA))
    assert abs(after - before - sum(part.nbytes(wanted[name]) for name, part in graph.parts.items())) < 4096
    return place / "out", network


KINDS = {
    "as they are": {},
    "8 bits": {"/model/layers": "int8-g64", "/lm_head": "int8-g32"},
    "zero points": {"/model/layers.0": "int4-g64-zeros", "/model/layers.1": "int4-g32-zeros"},
    "a mix": {"/model/layers.0/mlp": "int8-g128-zeros", "/lm_head": "int4-g128", "/model/embed": "int8-g32"},
    "a table of 4 bits": {"/model/embed": "int4-g64"},
}


@pytest.mark.parametrize("kind", ["untied", "tied", "qwen3", "gemma2"])
@pytest.mark.parametrize("types", KINDS)
def test_the_runtime_computes_with_what_the_solver_left(kind: str, types: str, tmp_path: Path) -> None:
    more: dict[str, Any] = {"tied": True} if kind == "tied" else {} if kind == "untied" else {"kind": kind}
    source = tiny.write_checkpoint(tmp_path / "model", **more)
    path, network = rounded(source, tmp_path, KINDS[types])
    expected, found = torch_logits(network, TOKENS), logits_of(path)
    assert divergence(expected, found) < 1e-5
    # and that is not the source
    assert divergence(torch_logits(load_model(source), TOKENS), expected) > 1e-4
    assert not list(tmp_path.glob("out/tmp*"))


def test_feedback_loses_less_than_the_builder_in_the_same_types(tiny_hf: Path, tmp_path: Path) -> None:
    path, _ = rounded(tiny_hf, tmp_path, {})
    expected = torch_logits(load_model(tiny_hf), TOKENS)
    assert divergence(expected, logits_of(path)) < 0.8 * divergence(expected, logits_of(tmp_path / "builder"))


def test_stored_bytes_are_those_of_the_tensors(tiny_hf: Path, tmp_path: Path) -> None:
    path, _ = rounded(tiny_hf, tmp_path, {"/model/layers.0": "int8-g64-zeros", "/model/layers.1": "int4-g128"})
    graph = onnx.load(str(path / MODEL), load_external_data=False).graph
    constants = {tensor.name: tensor for tensor in graph.initializer}
    for node in graph.node:
        if node.op_type != "MatMulNBits":
            continue
        values = {one.name: one.i for one in node.attribute}
        kind = f"int{values['bits']}-g{values['block_size']}" + ("-zeros" if len(node.input) > 3 else "")
        assert kind == ("int8-g64-zeros" if ".0/" in node.name else "int4-g128" if ".1/" in node.name else "int4-g32")
        found = sum(read_values(constants[name], path).nbytes for name in node.input[1:])
        assert found == stored_bytes(kind, values["N"], values["K"], 4)
    assert stored_bytes(HALF, 3, 5, 4) == 30


@pytest.mark.parametrize("bits", [6.5, 8.0])
def test_files_use_their_budget_and_stay_within_it(store: Store, tiny_hf: Path, bits: float) -> None:
    done = built(store, tiny_hf, f"onnx_round.bits_per_weight={bits}")
    facts = done.result.facts
    used = sum((done.result.path / name).stat().st_size for name in (MODEL, DATA))
    assert 0.97 * facts["budget_bytes"] < used <= facts["budget_bytes"]
    assert facts["budget_bytes"] == int(done.checkpoint.facts["parameters"] * bits / 8)
    assert set(facts["types"]) <= {*TYPES, HALF}
    assert len(facts["types"]) > 2
    assert facts["curve"] == sorted(facts["curve"])
    measured = read_evaluation(dict(done.evaluations)["bundle"], "bundle")[0]
    found = next(m.value for m in measured if m.name == "kl_divergence_nats")
    assert found < 4 * facts["predicted_divergence_nats"]


def test_a_second_budget_measures_nothing_again(store: Store, tiny_hf: Path) -> None:
    built(store, tiny_hf, "onnx_round.bits_per_weight=7")
    again = built(store, tiny_hf, "onnx_round.budget_bytes=1300000")
    status = {step.stage: step.status for step in again.steps}
    assert (status["sensitivity"], status["onnx"], status["onnx_round"]) == ("cached", "cached", "executed")


def test_a_budget_below_the_smallest_types_is_refused_when_it_is_planned(tiny_hf: Path) -> None:
    with pytest.raises(InputError, match="a budget of at least"):
        tiny.plan_of(tiny_hf, "onnx-best", "onnx_round.bits_per_weight=2", target="generic-x86")


def test_another_checkpoint_is_refused(tiny_hf: Path, tmp_path: Path) -> None:
    export(checkpoint_artifact(tiny_hf), tmp_path / "builder", precision="int4")
    other = tiny.write_checkpoint(tmp_path / "other")
    model = load_model(other)
    with torch.no_grad():
        model.model.layers[1].mlp.up_proj.weight.mul_(-1)
    with pytest.raises(InputError, match=r"the checkpoint's matrices in the graph.*layers\.1/mlp/up_proj"):
        _onnx_round.open_graph(tmp_path / "builder", checkpoint_artifact(other), model)
