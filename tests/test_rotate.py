"""The rotation: the same function, in other weights; models that it does not fit are refused."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import numpy as np
import pytest
import tiny
from safetensors.numpy import load_file

from edgekit.artifact import Artifact
from edgekit.errors import InputError
from edgekit.model import ModelShape
from edgekit.stages import rotate
from edgekit.store import Store

ROTATED = """\
name: rotated
description: a rotation, then 16 bits
engine: llama_cpp
stages:
  - rotate: {}
  - convert: {type: f16}
  - gguf: {type: F16}
evaluation: {text: python-docs, windows: 4, window_tokens: 128}
gates:
  - {measure: kl_divergence_nats, max: 1.0e-4}
"""


@pytest.fixture(scope="module")
def recipe(tmp_path_factory: pytest.TempPathFactory) -> str:
    path = tmp_path_factory.mktemp("recipe") / "rotated.yaml"
    path.write_text(ROTATED)
    return str(path)


def rotated(store: Store, model: Path, recipe: str) -> tuple[Any, Artifact]:
    """The build, and the rotated checkpoint."""
    built = tiny.build_in(store, tiny.plan_of(model, recipe))
    record = store.lookup(next(step.key for step in built.steps if step.stage == "rotate"))
    assert record is not None
    return built, store.open(record.digest)


@pytest.mark.parametrize("kind", ["llama", "llama-biases", "mistral", "qwen3"])
def test_the_function_stays_and_the_weights_do_not(bundles: Any, tmp_path: Path, recipe: str, kind: str) -> None:
    from edgekit.stages.evaluate import read_evaluation

    model = tiny.write_checkpoint(tmp_path / kind, kind)
    built, turned = rotated(bundles.store, model, recipe)
    assert turned.facts["divergence_nats"] < 1e-4
    for what, artifact in built.evaluations:
        found = {m.name: m.value for m in read_evaluation(artifact, what)[0]}
        assert found["kl_divergence_nats"] < 1e-4
    before = load_file(model / "model.safetensors")
    after = load_file(turned.path / "model.safetensors")
    name = "model.layers.0.mlp.down_proj.weight"
    assert np.abs(before[name] - after[name]).mean() > 0.5 * np.abs(before[name]).mean()
    # an orthogonal turn keeps the lengths of what it turns
    lengths = [np.linalg.norm(one[name].astype(np.float64), axis=0) for one in (before, after)]
    np.testing.assert_allclose(*lengths, rtol=2e-3)
    assert (after["model.norm.weight"] == 1).all()


def test_a_tied_model_gets_a_head_of_its_own_and_the_plan_says_so(bundles: Any, tiny_tied: Path, recipe: str) -> None:
    plan = tiny.plan_of(tiny_tied, recipe)
    assert any("head becomes a matrix" in note for note in plan.fallbacks)
    built, turned = rotated(bundles.store, tiny_tied, recipe)
    config = json.loads((turned.path / "config.json").read_text())
    assert not config["tie_word_embeddings"]
    stored = load_file(turned.path / "model.safetensors")
    assert stored["lm_head.weight"].shape == stored["model.embed_tokens.weight"].shape
    size = (built.result.path / "model.gguf").stat().st_size
    assert abs(size - plan.weight_bytes) < 1 << 16
    elements = sum(tensor.size for tensor in stored.values())
    assert turned.facts["parameters"] == elements


def test_a_model_with_norms_after_its_layers_is_refused(bundles: Any, tmp_path: Path, recipe: str) -> None:
    model = tiny.write_checkpoint(tmp_path / "gemma", "gemma3_text")
    with pytest.raises(InputError, match="feedforward_layernorm"):
        rotated(bundles.store, model, recipe)


@pytest.mark.parametrize("kind", ["llama", "llama-biases", "qwen3"])
def test_values_alone_are_turned_at_no_cost(bundles: Any, tiny_tied: Path, tmp_path: Path, kind: str) -> None:
    path = tmp_path / "rotated.yaml"
    path.write_text(ROTATED.replace("rotate: {}", "rotate: {residual: false}"))
    model = tiny.write_checkpoint(tmp_path / "model", kind)
    _, turned = rotated(bundles.store, model, str(path))
    assert turned.facts["divergence_nats"] < 1e-4
    before, after = load_file(model / "model.safetensors"), load_file(turned.path / "model.safetensors")
    moved = {name.split(".")[-2] for name in before if not np.array_equal(before[name], after[name])}
    assert moved == {"v_proj", "o_proj"}
    assert turned.facts["parameters"] == sum(tensor.size for tensor in before.values())
    kept, tied = rotated(bundles.store, tiny_tied, str(path))
    assert json.loads((tied.path / "config.json").read_text())["tie_word_embeddings"]
    assert "output.weight" not in {tensor.name for tensor in tiny.plan_of(tiny_tied, str(path)).tensors}
    assert kept.evaluations


def test_the_plan_turns_the_stream_where_the_head_s_bytes_pay(tiny_hf: Path, tiny_tied: Path, tmp_path: Path) -> None:
    path = tmp_path / "rotated.yaml"
    path.write_text(ROTATED.replace("rotate: {}", "rotate: {residual: auto}"))

    def turns(model: Path) -> bool:
        step = next(step for step in tiny.plan_of(model, str(path)).steps if step.stage.name == "rotate")
        return bool(step.params.residual)

    assert turns(tiny_hf)
    assert not turns(tiny_tied)
    params = rotate.Params(residual="auto")
    small, large = (
        cast("ModelShape", SimpleNamespace(vocabulary=100, hidden=10, tensors=(), parameters=n * 1000))
        for n in (49, 50)
    )
    assert rotate.resolve(params, small, companion=False).residual is False
    assert rotate.resolve(params, large, companion=False).residual is True
    assert rotate.resolve(params, large, companion=True).residual is False
