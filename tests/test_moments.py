"""Walking a network's layers: what they read, rounding them in turn, and going on after a cut."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import tiny
import torch

from edgekit.grids import open_grid
from edgekit.grids.solver import Rounded
from edgekit.huggingface import load_model
from edgekit.stages import _moments
from edgekit.stages._moments import Rounding, round_network, with_moments

TOKENS = torch.randint(0, tiny.VOCABULARY, (6, 64), generator=torch.Generator().manual_seed(0))


def linears(network: Any) -> dict[str, torch.nn.Linear]:
    return {name: module for name, module in network.named_modules() if isinstance(module, torch.nn.Linear)}


def rounded(model: Path, kept: Path | None = None, layers: int | None = None, **options: Any) -> dict[str, Rounded]:
    """Round the network, or only so many layers before the attempt is cut off."""
    network, found = load_model(model), {}
    grids = dict.fromkeys(linears(network), open_grid("int4-g64"))
    with torch.inference_mode():
        walk = round_network(network, TOKENS, Rounding(grids, **options), kept=kept)
        for number, layer in enumerate(walk, 1):
            found |= layer
            if number == layers:
                walk.close()
                break
    return found


def test_matrices_of_one_input_come_together(tiny_hf: Path) -> None:
    network = load_model(tiny_hf)
    with torch.inference_mode():
        groups = [
            (sorted(n.rpartition(".")[2] for n in g), m) for g, m in with_moments(network, TOKENS, linears(network))
        ]
    layer = [["k_proj", "q_proj", "v_proj"], ["o_proj"], ["gate_proj", "up_proj"], ["down_proj"]]
    assert [names for names, _ in groups] == [*layer, *layer, ["lm_head"]]
    assert {moments.tokens for _, moments in groups} == {TOKENS.numel()}
    assert all(torch.linalg.eigvalsh(moments.hessian.double())[0] > -1e-6 for _, moments in groups)


@pytest.mark.parametrize("act_order", [False, True])
def test_an_attempt_goes_on_behind_what_was_kept(
    tiny_hf: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, act_order: bool
) -> None:
    whole = rounded(tiny_hf, act_order=act_order)
    kept = tmp_path / "kept"
    rounded(tiny_hf, kept, layers=1, act_order=act_order)
    assert [path.name for path in kept.iterdir()] == ["model.layers.0.safetensors"]
    looked: list[str] = []
    round_layer = _moments._Layer.round

    def watched(self: Any, among: Any, rounding: Any) -> Any:
        looked.append(self.name)
        return round_layer(self, among, rounding)

    monkeypatch.setattr(_moments._Layer, "round", watched)
    again = rounded(tiny_hf, kept, act_order=act_order)
    assert looked == ["model.layers.1"]
    assert again.keys() == whole.keys()
    for name, one in whole.items():
        assert torch.equal(again[name].codes, one.codes)
        assert torch.equal(again[name].matrix, one.matrix)
        assert (again[name].order is None) == (not act_order)


def test_what_was_kept_badly_is_made_again(tiny_hf: Path, tmp_path: Path) -> None:
    rounded(tiny_hf, tmp_path, layers=1)
    file = tmp_path / "model.layers.0.safetensors"
    file.write_bytes(file.read_bytes()[:1000])
    whole, again = rounded(tiny_hf), rounded(tiny_hf, tmp_path)
    assert all(torch.equal(again[name].codes, one.codes) for name, one in whole.items())


def test_a_finished_step_keeps_nothing(tiny_hf: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from edgekit.store import Store

    store, seen = Store(tmp_path / "store"), []
    save = _moments._Kept.save

    def watched(self: Any, layer: str, done: Any) -> None:
        save(self, layer, done)
        seen.extend(path.name for path in store.root.glob("tmp/*.kept/*"))

    monkeypatch.setattr(_moments._Kept, "save", watched)
    settings = ("gptq.windows=4", "gptq.window_tokens=64")
    tiny.build_in(store, tiny.plan_of(tiny_hf, "gptq-4bit", *settings, target="generic-x86"))
    assert seen[-1].startswith("model.layers.")
    assert list((store.root / "tmp").iterdir()) == []


def test_layers_without_a_matrix_to_round_are_walked_through(tiny_hf: Path) -> None:
    network = load_model(tiny_hf)
    chosen = {name: one for name, one in linears(network).items() if name.startswith("model.layers.1.mlp")}
    only_head = {"lm_head": network.lm_head}
    with torch.inference_mode():
        every = {name: m.hessian for group, m in with_moments(network, TOKENS, linears(network)) for name in group}
        for among in (chosen, only_head):
            found = {name: m.hessian for group, m in with_moments(network, TOKENS, among) for name in group}
            assert found.keys() == among.keys()
            for name, hessian in found.items():
                torch.testing.assert_close(hessian, every[name], rtol=1e-4, atol=1e-5)
        grids = dict.fromkeys(chosen, open_grid("int4-g64"))
        assert [sorted(done) for done in round_network(network, TOKENS, Rounding(grids))] == [sorted(chosen)]


def test_layers_that_give_a_tuple_are_walked_through(tiny_hf: Path) -> None:
    plain, wrapped = load_model(tiny_hf), load_model(tiny_hf)

    for layer in wrapped.model.layers:
        layer.forward = lambda *args, before=layer.forward, **kwargs: (before(*args, **kwargs), None)
    decode = wrapped.model.forward

    def forward(*args: Any, **kwargs: Any) -> Any:
        """As models do that take the first of what a layer gives."""
        first = [one.register_forward_hook(lambda module, inputs, output: output[0]) for one in wrapped.model.layers]
        try:
            return decode(*args, **kwargs)
        finally:
            for hook in first:
                hook.remove()

    wrapped.model.forward = forward
    with torch.inference_mode():
        moments = [
            {name: m.hessian for group, m in with_moments(one, TOKENS, linears(one)) for name in group}
            for one in (plain, wrapped)
        ]
    for name, hessian in moments[0].items():
        torch.testing.assert_close(hessian, moments[1][name], rtol=1e-4, atol=1e-5)
