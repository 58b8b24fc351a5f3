"""What a network's matrices read: the mean of x x^T over their inputs on calibration text, a layer at a time."""

from __future__ import annotations

import functools
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from edgekit.errors import ToolError

_LAYER = re.compile(r"(.+?\.\d+)\.")


def with_hessians(
    network: Any, tokens: Tensor, linears: Mapping[str, nn.Linear], *, changes: bool
) -> Iterator[tuple[str, nn.Linear, Tensor]]:
    """Yield every matrix with the mean of x x^T over its inputs, a layer at a time, the head last.

    Args:
        network: A causal language model of transformers.
        tokens: (windows, tokens) int64.
        linears: Modules of it by their names: any of its layers', and the head.
        changes: The caller may change a matrix when it has it; the layers after see what it gives then.
    """
    head = network.get_output_embeddings()
    inside = {name: module for name, module in linears.items() if module is not head}
    for layer, run in _walk_layers(network, tokens, _sorted_layers(inside)):
        mine = {name: module for name, module in inside.items() if name.startswith(f"{layer}.")}
        with _watched([*mine.values()]) as hessians:
            run()
        for name, module in mine.items():
            yield name, module, hessians[module]
        if changes:
            run()
    for name, module in linears.items():
        if module is head:
            yield name, module, _head_hessian(network, tokens)


def _sorted_layers(names: Iterable[str]) -> list[str]:
    """Names of the layers that hold the modules, in their order."""
    layers = {found[1] for name in names if (found := _LAYER.match(name))}
    return sorted(layers, key=lambda name: int(name.rpartition(".")[2]))


@contextmanager
def _watched(modules: list[nn.Linear]) -> Iterator[dict[nn.Linear, Tensor]]:
    """Within the block, sum x x^T over the inputs of linear layers; after it, their means by module."""
    sums: dict[nn.Linear, Tensor] = {}
    counts: dict[nn.Linear, int] = {}
    last: list[Tensor] = [torch.empty(0)] * 2

    def watch(module: nn.Linear, inputs: tuple[Any, ...]) -> None:
        if inputs[0] is not last[0]:  # queries, keys and values have one input
            x = inputs[0].reshape(-1, inputs[0].shape[-1])
            last[:] = [inputs[0], x.T @ x]
        sums[module] = sums[module] + last[1] if module in sums else last[1]
        counts[module] = counts.get(module, 0) + inputs[0].shape[:-1].numel()

    hooks = [module.register_forward_pre_hook(watch) for module in modules]
    try:
        yield sums
    finally:
        for hook in hooks:
            hook.remove()
    for module, count in counts.items():
        sums[module] = sums[module] / count


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
