"""What a network's matrices read: the mean of x x^T over their inputs on calibration text, a layer at a time; and
rounding those that read the same."""

from __future__ import annotations

import contextlib
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map

from edgekit.errors import ToolError
from edgekit.grids import Grid
from edgekit.grids.solver import Metric, Rounded, round_matrix, usual_damping

_LAYER = re.compile(r"(.+?)\.\d+\.")


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
Prepare = Callable[[str, Sequence[Group]], None]
"""Changes the matrices of a layer, named, without changing what the layer gives."""


@dataclass(frozen=True)
class Rounding:
    """How matrices are rounded."""

    grids: Mapping[str, Grid]
    """By the names of linear layers: any of the network's layers', and the head."""
    damping: float | None = None
    """As of `Metric`; None for what the number of tokens asks for."""
    act_order: bool = False
    """Blocks are of inputs with like activations, not of neighbours; `Rounded.order` then says which."""

    def round(self, modules: Mapping[str, nn.Linear], moments: Moments) -> dict[str, Rounded]:
        """Round matrices that read the same inputs, those of one grid at once, and leave them rounded."""
        metric = moments.metric(self.damping)
        by_grid: dict[str, list[str]] = {}
        for name in modules:
            by_grid.setdefault(self.grids[name].name, []).append(name)
        found: dict[str, Rounded] = {}
        with _matmul("highest"):
            for names in by_grid.values():
                weights = [modules[name].weight.data for name in names]
                grid = self.grids[names[0]]
                rounded = round_matrix(torch.cat(weights), metric, grid, act_order=self.act_order)
                found |= zip(names, rounded.split([len(weight) for weight in weights]), strict=True)
        for name, rounded in found.items():
            modules[name].weight.data = rounded.matrix
        return {name: rounded.cpu() for name, rounded in found.items()}


def with_moments(network: Any, tokens: Tensor, linears: Mapping[str, nn.Linear]) -> Iterator[Group]:
    """Yield matrices that read the same inputs, with the moments of these: a layer at a time, the head last.

    Args:
        network: A causal language model of transformers.
        tokens: (windows, tokens) int64.
        linears: Modules of it by their names: any of its layers', and the head.
    """
    inside, head = _parts(network, linears)
    walk = _Walk(network, tokens, _layers(network, inside))
    for layer in walk:
        yield from layer.moments(inside)
    if head:
        with walk.end(head) as moments:
            yield head, moments


def round_network(
    network: Any,
    tokens: Tensor,
    rounding: Rounding,
    *,
    prepare: Prepare | None = None,
    kept: Path | None = None,
) -> Iterator[dict[str, Rounded]]:
    """Round matrices and leave them rounded; yields those of a layer at a time, the head last, on the CPU.

    A matrix is rounded when its layer is about to multiply with it, for the inputs that everything rounded before
    gives: a layer is run once, and makes up for what was lost before it.

    Args:
        network: A causal language model of transformers in float32.
        tokens: (windows, tokens) int64 of calibration text.
        rounding: Which matrices, and how.
        prepare: What is done to a layer before it is rounded.
        kept: A directory for what is rounded already: an attempt after one that was cut off goes on behind it.
    """
    inside, head = _parts(network, {name: network.get_submodule(name) for name in rounding.grids})
    files, walk = _Kept(kept), _Walk(network, tokens, _layers(network, inside))
    for layer in walk:
        mine = layer.linears(inside)
        if not mine:
            layer.run()
            continue
        done = files.load(layer.name, mine)
        if done is None:
            if prepare:
                prepare(layer.name, [*layer.moments(inside)])
            done = layer.round(inside, rounding)
            files.save(layer.name, done)
        else:
            for name, rounded in done.items():
                inside[name].weight.data = rounded.matrix.to(walk.device)
            layer.run()
        yield done
    if head:
        with walk.end(head) as moments:
            done = rounding.round(head, moments)
        yield done


def compute_device(nbytes: int) -> torch.device:
    """Where to compute with tensors of so many bytes: a CUDA device that has room for them, else the CPU."""
    if torch.cuda.is_available() and torch.cuda.mem_get_info()[0] > nbytes:
        return torch.device("cuda")
    return torch.device("cpu")


@contextmanager
def fast_matmul() -> Iterator[None]:
    """Let oneDNN multiply matrices on a CPU, by bfloat16 where it has units for that: enough to calibrate with.

    PyTorch's own choice is half as fast on AMD's processors.
    """
    with _matmul("medium"):
        yield


@contextmanager
def _matmul(precision: Literal["medium", "highest"]) -> Iterator[None]:
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision(precision)
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
        save_file({name: tensor.clone().contiguous() for name, tensor in stored.items()}, part)
        part.replace(file)


_PARTS = ("codes", "scales", "matrix", "losses")


def _parts(network: Any, linears: Mapping[str, nn.Linear]) -> tuple[dict[str, nn.Linear], dict[str, nn.Linear]]:
    """The modules within layers, and the head."""
    head = network.get_output_embeddings()
    inside = {name: module for name, module in linears.items() if module is not head}
    return inside, {name: module for name, module in linears.items() if module is head}


def _layers(network: Any, linears: Iterable[str]) -> list[str]:
    """Names of the network's layers, in their order: all of those among which the linear layers are.

    Raises ToolError where these are in several lists of layers.
    """
    lists = {found[1] for name in linears if (found := _LAYER.match(name))}
    if len(lists) > 1:
        raise ToolError("one list of layers", ", ".join(sorted(lists)), "choose gguf-q4")
    return [f"{name}.{key}" for name in lists for key, _ in network.get_submodule(name).named_children()]


class _Layer:
    """A layer and what goes into it."""

    def __init__(self, name: str, module: nn.Module, states: Tensor, others: Mapping[str, Any]) -> None:
        self.name = name
        self.given = states
        """What the last run gave: (windows, tokens, hidden)."""
        self.in_tuple = False
        """Whether it gives that as the first of several."""
        self._module, self._states, self._others = module, states, others

    def linears(self, among: Mapping[str, nn.Linear]) -> dict[str, nn.Linear]:
        """Those that are within the layer."""
        return {name: module for name, module in among.items() if name.startswith(f"{self.name}.")}

    def run(self, windows: int | None = None) -> None:
        """Run it over all windows, or the first of them."""
        with fast_matmul():
            output = self._module(self._states[:windows], **self._others)
        self.in_tuple = not isinstance(output, Tensor)
        self.given = output[0] if self.in_tuple else output

    def moments(self, among: Mapping[str, nn.Linear], windows: int | None = None) -> list[Group]:
        """Run it and return its matrices with their moments."""
        mine = self.linears(among)
        seen: dict[nn.Module, list[Moments]] = {}
        last: list[Any] = [None, None]

        def watch(module: nn.Module, inputs: tuple[Tensor, ...]) -> None:
            # queries, keys and values have one input
            if inputs[0] is not last[0]:
                last[:] = inputs[0], _moments(inputs[0])
            seen.setdefault(module, []).append(last[1])

        with _entering(mine.values(), watch):
            self.run(windows)
        groups: dict[tuple[int, ...], Group] = {}
        for name, module in mine.items():
            if found := seen.get(module):
                group = groups.setdefault(tuple(map(id, found)), ({}, _joined(found)))
                group[0][name] = module
        return [*groups.values()]

    def round(self, among: Mapping[str, nn.Linear], rounding: Rounding) -> dict[str, Rounded]:
        """Run it, its matrices rounded on the way."""
        mine, done = self.linears(among), dict[str, Rounded]()
        together = {module: group for group, _ in self.moments(among, windows=1) for module in group.values()}
        names = {module: name for name, module in mine.items()}

        def enter(module: nn.Module, inputs: tuple[Tensor, ...]) -> None:
            if names[module] not in done:
                group = together.get(module, {names[module]: module})
                done.update(rounding.round(group, _moments(inputs[0])))

        with _entering(mine.values(), enter):
            self.run()
        for name, module in mine.items():
            if name not in done:  # no token came to it: it is rounded to the nearest
                done |= rounding.round({name: module}, _moments(torch.zeros_like(module.weight.data[:1])))
        return {name: done[name] for name in mine}


class _Walk:
    """The layers of a network in turn, over all windows at once; only one of them is on the device.

    Raises ToolError where the layers of the network do not follow each other.
    """

    def __init__(self, network: Any, tokens: Tensor, names: Sequence[str]) -> None:
        self._network, self._tokens = network, tokens
        self._modules = {name: network.get_submodule(name) for name in names}
        self._in_tuple = False
        states, self._others = _enter(network, tokens, self._modules) if names else (torch.zeros(0), {})
        largest = max((sum(p.nbytes for p in module.parameters()) for module in self._modules.values()), default=0)
        # a layer with its moments and their factors, and activations, some times as much as goes in
        self.device = compute_device(6 * largest + 16 * states.nbytes)
        self._states = states.to(self.device)

    def __iter__(self) -> Iterator[_Layer]:
        for name, module in self._modules.items():
            others = tree_map(lambda x: x.to(self.device) if isinstance(x, Tensor) else x, self._others[name])
            layer = _Layer(name, module.to(self.device), self._states, others)
            yield layer
            module.to("cpu")
            self._states, self._in_tuple = layer.given, layer.in_tuple

    @contextmanager
    def end(self, head: Mapping[str, nn.Linear]) -> Iterator[Moments]:
        """Be behind the last layer, and give the moments of what the head reads."""
        states, skipped = self._states.cpu(), [*self._modules.values()]
        given = (states,) if self._in_tuple else states
        for module in skipped:
            module.forward = lambda *args, **kwargs: given
        try:
            with fast_matmul():
                found = self._network.base_model(self._tokens, use_cache=False).last_hidden_state
        finally:
            for module in skipped:
                del module.forward
        for module in head.values():
            module.to(self.device)
        yield _moments(found.to(self.device))
        for module in head.values():
            module.to("cpu")


def _enter(
    network: Any, tokens: Tensor, modules: Mapping[str, nn.Module]
) -> tuple[Tensor, dict[str, Mapping[str, Any]]]:
    """Return what goes into the first layer, (windows, tokens, hidden), and what each layer is given beside it.

    The latter, masks and positions, is the same for every window.
    """
    names = [*modules]
    first: list[Tensor] = []
    others: dict[str, Mapping[str, Any]] = {}

    class Entered(Exception):
        """The first layer was reached again."""

    def note(name: str) -> Callable[..., None]:
        def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            if name == names[0]:
                first.append(args[0] if args else kwargs["hidden_states"])
                if len(first) > 1:
                    raise Entered
            others[name] = {key: value for key, value in kwargs.items() if key != "hidden_states"}

        return hook

    hooks = [module.register_forward_pre_hook(note(name), with_kwargs=True) for name, module in modules.items()]
    try:
        # once through all layers, then to the first only
        for window in tokens:
            with contextlib.suppress(Entered):
                network(window[None], use_cache=False, logits_to_keep=1)
    finally:
        for hook in hooks:
            hook.remove()
    if len(others) != len(names):
        raise ToolError("layers that follow each other", f"{len(others)} of {len(names)} ran", "choose gguf-q4")
    return torch.cat(first), others


@contextmanager
def _entering(modules: Iterable[nn.Module], function: Callable[..., None]) -> Iterator[None]:
    """Within the block, call the function with a module and its inputs before the module runs."""
    hooks = [module.register_forward_pre_hook(function) for module in modules]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


def _moments(inputs: Tensor) -> Moments:
    x = inputs.reshape(-1, inputs.shape[-1])
    return Moments(x.T @ x / len(x), len(x))


def _joined(parts: Sequence[Moments]) -> Moments:
    """The moments of all that was seen in several runs."""
    if len(parts) == 1:
        return parts[0]
    tokens = sum(part.tokens for part in parts)
    total = torch.stack([part.hessian * (part.tokens / tokens) for part in parts]).sum(0)
    return Moments(total, tokens)
