"""Rounding the matrices of a GGUF file with error feedback (`edgekit.grids.solver`), a layer of the model at a time.

llama.cpp's quantizer has chosen the types and written the file; the blocks of matrices are written over in place. A
layer sees the inputs that the rounded layers before it give, so that it also makes up for what they lost.
"""

from __future__ import annotations

import functools
import re
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn

from edgekit.artifact import Artifact
from edgekit.errors import ToolError
from edgekit.formats import gguf
from edgekit.grids import NAMES, find_grid
from edgekit.grids.solver import round_matrix
from edgekit.model import gguf_names

_LAYER = re.compile(r"(.+?\.\d+)\.")
_STORED = {"f32": torch.float32, "f16": torch.float16, "bf16": torch.bfloat16}
_HEADS = ("output.weight", "token_embd.weight")
"""The head's matrix, under the name it has where it is not the embedding, and where it is."""


@dataclass(frozen=True)
class Place:
    """A matrix of the network and where the file has it."""

    module: nn.Linear
    tensor: str
    """Its name in the file."""
    rows: Tensor
    """Row of the module that each row of the file is: converters reorder those of queries and keys."""


def round_file(
    checkpoint: Artifact,
    network: Any,
    windows: npt.NDArray[np.int32],
    source: Path,
    target: Path,
    progress: Callable[[int, int], None],
) -> list[str]:
    """Round every matrix of `target` whose type is a grid anew, from the weights of the network.

    Args:
        checkpoint: What the network was loaded from.
        network: A causal language model of transformers in float32; it is left with the rounded weights.
        windows: (windows, tokens) of calibration text.
        source: The model as GGUF, not quantized.
        target: The same, quantized. Its blocks are written over.
        progress: Called with matrices done and their number.

    Returns the names of the tensors that were rounded.
    """
    quantized = {info.name: info for info in gguf.read_header(target).tensors}
    known = {name.lower() for name in NAMES}
    places = {
        name: place
        for name, place in find_places(checkpoint, network, source).items()
        if quantized[place.tensor].type.lower() in known
    }
    tokens = torch.from_numpy(windows.astype(np.int64))
    done: list[str] = []
    with target.open("r+b") as file:

        def finish(place: Place, hessian: Tensor) -> None:
            info = quantized[place.tensor]
            grid = find_grid(info.type)
            rounded = round_matrix(place.module.weight.data, hessian, grid)
            place.module.weight.data = rounded.matrix
            file.seek(info.offset)
            file.write(rounded.pack(grid)[place.rows].numpy().tobytes())
            done.append(place.tensor)
            progress(len(done), len(places))

        with torch.inference_mode():
            for place, hessian in with_hessians(network, tokens, places, changes=True):
                finish(place, hessian)
    return done


def with_hessians(
    network: Any, tokens: Tensor, places: Mapping[str, Place], *, changes: bool
) -> Iterator[tuple[Place, Tensor]]:
    """Yield every matrix with the mean of x x^T over its inputs, a layer at a time, the head last.

    With `changes` the caller may change a matrix when it has it: the layers after see what it gives then.
    """
    head = network.get_output_embeddings()
    inside = {name: place for name, place in places.items() if place.module is not head}
    for layer, run in walk_layers(network, tokens, sorted_layers(inside)):
        mine = [place for name, place in inside.items() if name.startswith(f"{layer}.")]
        with watched([place.module for place in mine]) as hessians:
            run()
        for place in mine:
            yield place, hessians[place.module]
        if changes:
            run()
    for place in places.values():
        if place.module is head:
            yield place, _head_hessian(network, tokens)


def find_places(checkpoint: Artifact, network: Any, source: Path) -> dict[str, Place]:
    """The linear layers whose matrices a file of the same weights holds, by their names in the network.

    A matrix that the converter changed in another way than by the order of its rows is left out.
    """
    stored = {info.name: info for info in gguf.read_header(source).tensors}
    linears = {name: module for name, module in network.named_modules() if isinstance(module, nn.Linear)}
    keys = [f"{name}.weight" for name in linears]
    names = gguf_names(checkpoint.facts["architecture"], checkpoint.facts["layers"], keys)
    head, places = network.get_output_embeddings(), {}
    for name, module in linears.items():
        called = names[f"{name}.weight"]
        wanted = _HEADS if module is head else (called,)
        found = next((stored[one] for one in wanted if one in stored), None)
        rows = None if found is None else _rows(module.weight.data, source, found)
        if found is not None and rows is not None:
            places[name] = Place(module, found.name, rows)
    return places


def _rows(weight: Tensor, path: Path, info: gguf.TensorInfo) -> Tensor | None:
    """The row of `weight` that each row of the stored matrix is; None where it is another matrix."""
    dtype = _STORED.get(info.type)
    if dtype is None or info.shape != tuple(weight.shape[::-1]):
        return None
    with path.open("rb") as file:
        file.seek(info.offset)
        stored = torch.frombuffer(bytearray(file.read(info.nbytes)), dtype=dtype).view(weight.shape)
    own = weight.to(dtype)
    if torch.equal(own, stored):
        return torch.arange(len(own))
    places = {row.numpy().tobytes(): i for i, row in enumerate(own.view(torch.uint8))}
    found = [places.get(row.numpy().tobytes(), -1) for row in stored.view(torch.uint8)]
    return torch.tensor(found) if sorted(found) == list(range(len(own))) else None


def sorted_layers(places: Mapping[str, Place]) -> list[str]:
    """Names of the layers that hold the matrices, in their order."""
    layers = {found[1] for name in places if (found := _LAYER.match(name))}
    return sorted(layers, key=lambda name: int(name.rpartition(".")[2]))


@contextmanager
def watched(modules: list[nn.Linear]) -> Iterator[dict[nn.Linear, Tensor]]:
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


def walk_layers(network: Any, tokens: Tensor, layers: list[str]) -> Iterator[tuple[str, Callable[[], None]]]:
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
