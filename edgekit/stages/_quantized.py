"""What the stages share that quantize a checkpoint and leave it one: which tensors, how they are stored, the files."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import replace
from math import ceil
from pathlib import Path
from typing import Any, Literal

from edgekit.artifact import Artifact
from edgekit.errors import InputError, ToolError
from edgekit.formats.safetensors import read_checkpoint
from edgekit.model import ModelShape, elements, gguf_names
from edgekit.stage import CalibratedParams, Tensor
from edgekit.tools import copy_file

_MATRIX = re.compile(r"blk\.\d+\..+\.weight")
_INDEX = "model.safetensors.index.json"
AUTO_GROUP_SIZES = (128, 64, 32)


def is_matrix(tensor: Tensor) -> bool:
    """Whether it is a matrix of a layer, which is quantized: embedding, head and vectors are not."""
    return len(tensor.shape) == 2 and _MATRIX.fullmatch(tensor.name) is not None


def planned_tensors(model: Artifact) -> dict[str, Tensor]:
    """The tensors of a checkpoint on disk, by their names there, as `predict` sees them; no recomputed buffers."""
    stored = read_checkpoint(model.path)
    names = gguf_names(model.facts["architecture"], model.facts["layers"], list(stored))
    return {key: Tensor(name, stored[key].shape[::-1], "f16") for key, name in names.items() if name is not None}


def predict_tensors(tensors: Sequence[Tensor], type_name: str, matrix_bytes: Callable[[int, int], int]) -> list[Tensor]:
    """The tensors as stored: matrices of that type by `matrix_bytes(inputs, outputs)`, the rest in 16 bits."""
    stored = []
    for tensor in tensors:
        if tensor.name == "rope_freqs.weight":  # llama.cpp's own; a checkpoint states it in its config
            continue
        if is_matrix(tensor):
            stored.append(replace(tensor, type=type_name, stored_bytes=matrix_bytes(*tensor.shape)))
        else:
            stored.append(replace(tensor, type="f16", stored_bytes=2 * elements(tensor.shape)))
    return stored


def copy_side_files(model: Artifact, out: Path) -> None:
    """Copy everything but weights: tokenizer, chat template, generation settings, licence."""
    for name in model.manifest.files:
        if not name.endswith(".safetensors") and name != _INDEX:
            copy_file(model.path / name, out / name)


def write_config(out: Path, config: Mapping[str, Any], dtype: str, quantization: Mapping[str, Any]) -> None:
    """Write config.json: the source's, with what was done to the weights."""
    # transformers 4 knows the field by its old name
    field = "torch_dtype" if "torch_dtype" in config and "dtype" not in config else "dtype"
    write_json(out / "config.json", {**config, field: dtype, "quantization_config": quantization})


def write_json(path: Path, content: Mapping[str, Any]) -> None:
    """Write indented JSON with sorted keys: equal content gives equal bytes."""
    path.write_text(json.dumps(content, indent=2, sort_keys=True) + "\n")


def stored_dtype(config: Mapping[str, Any]) -> str | None:
    """The 16-bit type that a checkpoint says it is stored in, or None when it is another."""
    name = str(config.get("dtype") or config.get("torch_dtype")).removeprefix("torch.")
    return name if name in ("float16", "bfloat16") else None


def store_weights(
    source: Path,
    out: Path,
    dtype: str | None,
    *,
    drop: Collection[str] = (),
    convert: Callable[[str, Any], Mapping[str, Any]] = lambda name, tensor: {name: tensor},
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> str:
    """Write a checkpoint's tensors to `out` in the same shards, those of 32 and more bits in 16.

    Args:
        source: Directory with safetensors.
        out: Directory for them.
        dtype: `float16` or `bfloat16`; None takes float16, or bfloat16 where a value would overflow.
        drop: Names of tensors to leave out.
        convert: Gives the tensors to store for one that was read, already in 16 bits.
        progress: Called with tensors written and their number.

    Returns the type. Raises ToolError for a value that is not finite.
    """
    import torch
    from safetensors import safe_open
    from safetensors.torch import save_file

    shards: dict[str, list[str]] = {}
    for name, info in sorted(read_checkpoint(source).items()):
        if name not in drop:
            shards.setdefault(info.file, []).append(name)
    wide = (torch.float32, torch.float64)

    def read(shard: str, name: str) -> Any:
        with safe_open(source / shard, framework="pt") as file:
            return file.get_tensor(name)

    def overflows() -> bool:
        limit = torch.finfo(torch.float16).max
        tensors = (read(shard, name) for shard, names in shards.items() for name in names)
        return any(t.dtype in wide and t.numel() and float(t.abs().max()) > limit for t in tensors)

    chosen = dtype or ("bfloat16" if overflows() else "float16")
    total, done, weight_map, total_bytes = sum(map(len, shards.values())), 0, {}, 0
    for shard, names in sorted(shards.items()):
        stored: dict[str, Any] = {}
        for name in names:
            tensor = read(shard, name)
            if tensor.dtype in wide:
                tensor = tensor.to(getattr(torch, chosen))
            if tensor.is_floating_point() and not bool(torch.isfinite(tensor).all()):
                raise ToolError(f"finite weights in {chosen}", f"others in {name}", "use another method, or source")
            stored.update({key: value.contiguous() for key, value in convert(name, tensor).items()})
            done += 1
            progress(done, total)
        save_file(stored, out / shard, {"format": "pt"})
        (out / shard).chmod(0o644)  # safetensors keeps its files to the user
        weight_map.update(dict.fromkeys(stored, shard))
        total_bytes += sum(tensor.nbytes for tensor in stored.values())
    if len(shards) > 1:
        write_json(out / _INDEX, {"metadata": {"total_size": total_bytes}, "weight_map": weight_map})
    return chosen


def find_group_size(
    stage: str, tensors: Sequence[Tensor], wanted: int | Literal["auto"], known: Sequence[int], columns: int
) -> int:
    """Return inputs per group: `wanted`, or the largest of 128, 64 and 32 that divides the inputs of every matrix.

    Args:
        stage: Whose parameter it is, for the error.
        tensors: Planned tensors, those that stay as they are included.
        known: Group sizes of the format, -1 (one group per output) left out.
        columns: The format packs so many outputs together.

    Raises InputError, which names a matrix and the group sizes that would do.
    """
    matrices = [tensor for tensor in tensors if is_matrix(tensor)]
    for tensor in matrices:
        if tensor.shape[1] % columns:
            wanted_outputs = f"matrices whose outputs are a multiple of {columns}"
            raise InputError(f"{wanted_outputs}, for {stage}", f"{tensor.shape[1]} of {tensor.name}", "use gguf")
    divisors = [size for size in known if all(tensor.shape[0] % size == 0 for tensor in matrices)]
    if wanted == "auto":
        chosen = next((size for size in AUTO_GROUP_SIZES if size in divisors), None)
    else:
        chosen = wanted if wanted == -1 or wanted in divisors else None
    if chosen is not None:
        return chosen
    size = AUTO_GROUP_SIZES[-1] if wanted == "auto" else wanted
    odd = next(tensor for tensor in matrices if tensor.shape[0] % size)
    fitting = ", ".join(map(str, divisors)) or "none"
    raise InputError(
        f"a group size that divides the inputs of every matrix ({fitting})",
        f"{wanted} with {odd.shape[0]} inputs of {odd.name}",
        f"--set {stage}.group_size={divisors[0]}" if divisors else "use gguf, or another model",
    )


def packed_bytes(values: int, bits: int) -> int:
    """Bytes of values packed into 32-bit words."""
    return 4 * ceil(values * bits / 32)


def type_name(method: str, bits: int, group_size: int) -> str:
    """Name of the storage type of a matrix, e.g. `gptq-int4-g64`; without a group where each output is one."""
    return f"{method}-int{bits}" + (f"-g{group_size}" if group_size != -1 else "")


def rounding_host_bytes(shape: ModelShape, params: CalibratedParams) -> int:
    """Peak memory of the build host in bytes: the model in float32 and, in the same, the activations of a layer over
    all calibration tokens and the second moments of its inputs with their factors."""
    widest = max((tensor.shape[0] for tensor in shape.tensors if is_matrix(tensor)), default=0)
    activations = params.windows * params.window_tokens * (6 * shape.hidden + 3 * shape.feed_forward)
    return (1 << 30) + 4 * (shape.parameters + activations + 8 * widest**2)
