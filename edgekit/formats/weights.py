"""The stored tensors of a model, whatever its container: what a bundle's weights weigh."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from edgekit.errors import InputError
from edgekit.formats import gguf, onnx, safetensors


class Weight(NamedTuple):
    """One stored tensor: its name, the container's own name of its type, its bytes in the file."""

    name: str
    type: str
    nbytes: int


def read_weights(path: Path) -> Sequence[Weight]:
    """Read the headers of a GGUF file, or of the ONNX model or safetensors checkpoint in a directory.

    Raises InputError when there is none, or a header is damaged.
    """
    if path.is_file():
        return [Weight(t.name, t.type, t.nbytes) for t in gguf.read_header(path).tensors]
    if models := sorted(path.glob("*.onnx")):
        return [Weight(t.name, t.type, t.nbytes) for model in models for t in onnx.read_tensors(model)]
    if any(path.glob("*.safetensors")):
        stored = safetensors.read_checkpoint(path)
        return [Weight(name, tensor.dtype, tensor.nbytes) for name, tensor in stored.items()]
    raise InputError("a GGUF, ONNX or safetensors model", f"none at {path}", "build the bundle again")
