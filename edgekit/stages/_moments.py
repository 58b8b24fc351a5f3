"""What a network's matrices read: the mean of x x^T over their inputs on calibration text, a layer at a time; and
rounding those that read the same."""

from __future__ import annotations

import functools
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from edgekit.errors import ToolError
from edgekit.grids import Grid
from edgekit.grids.solver import Metric, Rounded, round_matrix, usual_damping

_LAYER = re.compile(r"(.+?\.\d+)\.")


@dataclass(frozen=True)
class Moments:
    """The second moments of the inputs of matrices."""

    hessian: Tensor
    """(in, in), the mean of x x^T."""
    tokens: int
    """Inputs that it is the mean of."""

    def metric(self, damping: float | None = None) -> Metric:
        """To round in; without a damping, with that which so many tokens ask for."""
        return Metric(self.hessian, usual_damping(len(self.hessian), self.tokens) if damping is None else damping)


Group = tuple[dict[str, nn.Linear], Moments]
"""Matrices that read the same inputs, by their names, and the moments of these."""
Prepare = Callable[[str, Sequence[Group]], Sequence[Group]]
"""Changes a layer, named, without changing what it gives, and returns its groups as they are then."""


def with_moments(network: Any, tokens: Tensor, linears: Mapping[str, nn.Linear]) -> Iterator[Group]:
    """Yield matrices that read the same inputs, with the moments of these: a layer at a time, the head last.

    Args:
        network: A causal language model of transformers.
        tokens: (windows, tokens) int64.
        linears: Modules of it by their names: any of its layers', and the head.
    """
    inside, head = _parts(network, linears)
    for layer, run in _walk_layers(network, tokens, _sorted_layers(inside)):
        yield from _moments_of({name: m for name, m in inside.items() if name.startswith(f"{layer}.")}, run)
    for name, module in head.items():
        yield {name: module}, Moments(_head_hessian(network, tokens), tokens.numel())


def round_network(
    network: Any,
    tokens: Tensor,
    grids: Mapping[str, Grid],
    *,
    damping: float | None = None,
    act_order: bool = False,
    prepare: Prepare | None = None,
    kept: Path | None = None,
) -> Iterator[dict[str, Rounded]]:
    """Round matrices and leave them rounded, a layer at a time: the layers after see what it gives then.

    Args:
        network: A causal language model of transformers in float32.
        tokens: (windows, tokens) int64 of calibration text.
        grids: By the names of linear layers: any of the network's layers', and the head.
        damping: As of `Metric`; None for what the number of tokens asks for.
        act_order: Blocks are of inputs with like activations, not of neighbours; `Rounded.order` then says which.
        prepare: What is done to a layer before it is rounded.
        kept: A directory for what is rounded already: an attempt after one that was cut off goes on behind it.
    """
    linears = {name: network.get_submodule(name) for name in grids}
    inside, head = _parts(network, linears)
    files, layers = _Kept(kept), _sorted_layers(inside)
    for layer, run in _walk_layers(network, tokens, layers):
        mine = {name: module for name, module in inside.items() if name.startswith(f"{layer}.")}
        done = files.load(layer, mine)
        if done is not None:
            for name, rounded in done.items():
                mine[name].weight.data = rounded.matrix
            yield done
        else:
            done = {}
            groups = list(_moments_of(mine, run))
            for modules, moments in prepare(layer, groups) if prepare else groups:
                found = _round_group(modules, moments, grids, damping, act_order)
                done |= found
                yield found
            files.save(layer, done)
        if head or layer != layers[-1]:
            run()
    for name, module in head.items():
        moments = Moments(_head_hessian(network, tokens), tokens.numel())
        yield _round_group({name: module}, moments, grids, damping, act_order)


def _round_group(
    modules: Mapping[str, nn.Linear],
    moments: Moments,
    grids: Mapping[str, Grid],
    damping: float | None,
    act_order: bool,
) -> dict[str, Rounded]:
    """Round matrices that read the same inputs, those of one grid at once, and leave them rounded."""
    metric = moments.metric(damping)
    by_grid: dict[str, list[str]] = {}
    for name in modules:
        by_grid.setdefault(grids[name].name, []).append(name)
    found: dict[str, Rounded] = {}
    for names in by_grid.values():
        weights = [modules[name].weight.data for name in names]
        rounded = round_matrix(torch.cat(weights), metric, grids[names[0]], act_order=act_order)
        found |= zip(names, rounded.split([len(weight) for weight in weights]), strict=True)
    for name, rounded in found.items():
        modules[name].weight.data = rounded.matrix
    return found


@contextmanager
def fast_matmul() -> Iterator[None]:
    """Let oneDNN multiply matrices on a CPU, by bfloat16 where it has units for that: enough to calibrate with.

    PyTorch's own choice is half as fast on AMD's processors.
    """
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("medium")
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before)


class _Kept:
    """Rounded matrices on disk, a file for each layer that is done; nothing at all without a directory."""

    def __init__(self, directory: Path | None) -> None:
        self._directory = directory

    def load(self, layer: str, modules: Mapping[str, nn.Linear]) -> dict[str, Rounded] | None:
        """What was kept of a layer; None where that is nothing, or not whole."""
        from safetensors import SafetensorError
        from safetensors.torch import load_file

        if self._directory is None or not (file := self._directory / f"{layer}.safetensors").is_file():
            return None
        try:
            stored = load_file(file)
            parts = {name: {part: stored[f"{name}/{part}"] for part in _PARTS} for name in modules}
        except (SafetensorError, OSError, KeyError):
            return None
        orders = {name: stored.get(f"{name}/order") for name in modules}
        return {name: Rounded(**parts[name], order=orders[name]) for name in modules}

    def save(self, layer: str, done: Mapping[str, Rounded]) -> None:
        """Keep a layer, whole or not at all."""
        from safetensors.torch import save_file

        if self._directory is None:
            return
        self._directory.mkdir(parents=True, exist_ok=True)
        stored = {f"{name}/{part}": getattr(rounded, part) for name, rounded in done.items() for part in _PARTS}
        stored |= {f"{name}/order": rounded.order for name, rounded in done.items() if rounded.order is not None}
        file = self._directory / f"{layer}.safetensors"
        part = file.with_suffix(".part")
        # matrices of one input share their order, which a file may not
        save_file({name: tensor.cpu().clone().contiguous() for name, tensor in stored.items()}, part)
        part.replace(file)


_PARTS = ("codes", "scales", "matrix", "losses")


def _parts(network: Any, linears: Mapping[str, nn.Linear]) -> tuple[dict[str, nn.Linear], dict[str, nn.Linear]]:
    """The modules within layers, and the head."""
    head = network.get_output_embeddings()
    inside = {name: module for name, module in linears.items() if module is not head}
    return inside, {name: module for name, module in linears.items() if module is head}


def _moments_of(modules: Mapping[str, nn.Linear], run: Callable[[], None]) -> Iterator[Group]:
    """Run a layer and yield its modules with their moments."""
    names = {module: name for name, module in modules.items()}
    with _watched([*names]) as groups:
        run()
    for members, moments in groups:
        yield {names[module]: module for module in members}, moments


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
    with fast_matmul():
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
