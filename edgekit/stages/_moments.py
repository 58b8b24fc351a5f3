"""What a network's matrices read: the mean of x x^T over their inputs on calibration text, a layer at a time; and
rounding those that read the same."""

from __future__ import annotations

import functools
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from edgekit.errors import ToolError
from edgekit.grids import Grid
from edgekit.grids.solver import Rounded, round_matrix, usual_damping

_LAYER = re.compile(r"(.+?\.\d+)\.")


@dataclass(frozen=True)
class Moments:
    """The second moments of the inputs of matrices."""

    hessian: Tensor
    """(in, in), the mean of x x^T."""
    tokens: int
    """Inputs that it is the mean of."""


def with_moments(
    network: Any, tokens: Tensor, linears: Mapping[str, nn.Linear], *, changes: bool
) -> Iterator[tuple[dict[str, nn.Linear], Moments]]:
    """Yield matrices that read the same inputs, with the moments of these: a layer at a time, the head last.

    Args:
        network: A causal language model of transformers.
        tokens: (windows, tokens) int64.
        linears: Modules of it by their names: any of its layers', and the head.
        changes: The caller may change matrices when it has them; the layers after see what they give then.
    """
    head = network.get_output_embeddings()
    inside = {name: module for name, module in linears.items() if module is not head}
    for layer, run in _walk_layers(network, tokens, _sorted_layers(inside)):
        names = {module: name for name, module in inside.items() if name.startswith(f"{layer}.")}
        with _watched([*names]) as groups:
            run()
        for modules, moments in groups:
            yield {names[module]: module for module in modules}, moments
        if changes:
            run()
    for name, module in linears.items():
        if module is head:
            yield {name: module}, Moments(_head_hessian(network, tokens), tokens.numel())


def round_group(
    modules: Mapping[str, nn.Linear], moments: Moments, grids: Mapping[str, Grid], damping: float | None = None
) -> dict[str, Rounded]:
    """Round matrices that read the same inputs, those of one grid at once, and leave them rounded.

    Args:
        modules: By their names.
        moments: Of their inputs.
        grids: By the names of modules.
        damping: As of `round_matrix`; None for what the number of tokens asks for.
    """
    hessian = moments.hessian
    if damping is None:
        damping = usual_damping(len(hessian), moments.tokens)
    by_grid: dict[str, list[str]] = {}
    for name in modules:
        by_grid.setdefault(grids[name].name, []).append(name)
    found: dict[str, Rounded] = {}
    for names in by_grid.values():
        weights = [modules[name].weight.data for name in names]
        rounded = round_matrix(torch.cat(weights), hessian, grids[names[0]], damping=damping)
        found |= zip(names, rounded.split([len(weight) for weight in weights]), strict=True)
    for name, rounded in found.items():
        modules[name].weight.data = rounded.matrix
    return found


def _sorted_layers(names: Iterable[str]) -> list[str]:
    """Names of the layers that hold the modules, in their order."""
    layers = {found[1] for name in names if (found := _LAYER.match(name))}
    return sorted(layers, key=lambda name: int(name.rpartition(".")[2]))


@contextmanager
def _watched(modules: list[nn.Linear]) -> Iterator[list[tuple[list[nn.Linear], Moments]]]:
    """Within the block, sum x x^T over the inputs of linear layers; after it, who had the same, and the means."""
    sums: dict[nn.Linear, Tensor] = {}
    counts: dict[nn.Linear, int] = {}
    leaders: dict[nn.Linear, nn.Linear] = {}
    """Of each module, the first that had its inputs."""
    last: list[Any] = [None, None]

    def watch(module: nn.Linear, inputs: tuple[Any, ...]) -> None:
        # queries, keys and values have one input
        if inputs[0] is last[0] and leaders.setdefault(module, last[1]) is last[1]:
            return
        last[:] = [inputs[0], leaders.setdefault(module, module)]
        x = inputs[0].reshape(-1, inputs[0].shape[-1])
        if module not in sums:
            sums[module], counts[module] = torch.zeros(x.shape[1], x.shape[1], device=x.device), 0
        sums[module].addmm_(x.T, x)
        counts[module] += len(x)

    groups: list[tuple[list[nn.Linear], Moments]] = []
    hooks = [module.register_forward_pre_hook(watch) for module in modules]
    try:
        yield groups
    finally:
        for hook in hooks:
            hook.remove()
    for leader, total in sums.items():
        members = [module for module in modules if leaders.get(module) is leader]
        groups.append((members, Moments(total / counts[leader], counts[leader])))


def _walk_layers(network: Any, tokens: Tensor, layers: list[str]) -> Iterator[tuple[str, Callable[[], None]]]:
    """Yield each layer and a function that runs it over all windows; what it gave last goes into the next layer.

    Activations of one layer are held, (windows, tokens, hidden) in float32. Raises ToolError where the layers of the
    network do not follow each other.
    """
    modules = [network.get_submodule(name) for name in layers]
    first: list[Tensor] = []
    others: dict[int, dict[str, Any]] = {}

    def note(index: int) -> Callable[..., None]:
        def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            if index == 0:
                first.append(args[0] if args else kwargs["hidden_states"])
            others[index] = {key: value for key, value in kwargs.items() if key != "hidden_states"}

        return hook

    class Entered(Exception):
        """The first layer was reached."""

    def stop(module: nn.Module, args: tuple[Any, ...]) -> None:
        raise Entered

    hooks = [module.register_forward_pre_hook(note(i), with_kwargs=True) for i, module in enumerate(modules)]
    try:
        # once through all layers: masks and positions are the same for every window
        network(tokens[:1], use_cache=False, logits_to_keep=1)
        hooks.append(modules[0].register_forward_pre_hook(stop))
        for window in tokens[1:]:
            try:
                network(window[None], use_cache=False, logits_to_keep=1)
            except Entered:
                continue
    finally:
        for hook in hooks:
            hook.remove()
    if len(others) != len(modules):
        raise ToolError("layers that follow each other", f"{len(others)} of {len(modules)} ran", "choose gguf-q4")
    states = first
    for index, (name, module) in enumerate(zip(layers, modules, strict=True)):
        given: list[Tensor] = []

        run = functools.partial(_run_layer, module, others[index], states, given)
        yield name, run
        states = given


def _run_layer(module: nn.Module, others: dict[str, Any], states: list[Tensor], given: list[Tensor]) -> None:
    outputs = [module(state, **others) for state in states]
    given[:] = [output if isinstance(output, Tensor) else output[0] for output in outputs]


def _head_hessian(network: Any, tokens: Tensor) -> Tensor:
    """The mean of x x^T over the final states, which the head reads."""
    total: Tensor | float = 0.0
    for window in tokens:
        states = network.base_model(window[None], use_cache=False).last_hidden_state[0]
        total = total + states.T @ states
    assert isinstance(total, Tensor)
    return total / tokens.numel()
