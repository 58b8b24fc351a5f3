"""Rounding the matrices of a GGUF file with error feedback (`edgekit.grids.solver`), a layer of the model at a time.

llama.cpp's quantizer has chosen the types and written the file; the blocks of matrices are written over in place. A
layer sees the inputs that the rounded layers before it give, so that it also makes up for what they lost.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn

from edgekit.artifact import Artifact
from edgekit.formats import gguf
from edgekit.grids import NAMES, find_grid
from edgekit.model import gguf_names
from edgekit.stages._moments import Rounding, round_network

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
    kept: Path | None = None,
) -> list[str]:
    """Round every matrix of `target` whose type is a grid anew, from the weights of the network.

    Args:
        checkpoint: What the network was loaded from.
        network: A causal language model of transformers in float32; it is left with the rounded weights.
        windows: (windows, tokens) of calibration text.
        source: The model as GGUF, not quantized.
        target: The same, quantized. Its blocks are written over.
        progress: Called with matrices done and their number.
        kept: As of `round_network`.

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
    grids = {name: find_grid(quantized[place.tensor].type) for name, place in places.items()}
    with target.open("r+b") as file, torch.inference_mode():
        for group in round_network(network, tokens, Rounding(grids), kept=kept):
            for name, rounded in group.items():
                place = places[name]
                file.seek(quantized[place.tensor].offset)
                file.write(rounded.pack(grids[name])[place.rows].numpy().tobytes())
                done.append(place.tensor)
                progress(len(done), len(places))
    return done


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
    places: dict[bytes, list[int]] = {}
    for index, row in enumerate(own.view(torch.uint8)):
        places.setdefault(row.numpy().tobytes(), []).append(index)
    # equal rows, such as those of heads that are empty, may stand for each other
    same = [places.get(row.numpy().tobytes()) for row in stored.view(torch.uint8)]
    found = [indices.pop() if indices else -1 for indices in same]
    return None if -1 in found else torch.tensor(found)
