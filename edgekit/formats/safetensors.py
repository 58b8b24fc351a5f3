"""The headers of safetensors checkpoints, read as what they are: bytes from a stranger.

Format: safetensors 0.8 (eight bytes of length, a JSON header, tensor data without holes). Of a checkpoint only the
header is read, with the standard library alone; pickled weights are refused, because loading them runs code. Files as
small as a companion's are read and written whole, as numpy arrays.
"""

from __future__ import annotations

import json
import math
import os
import shlex
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, NoReturn, TypeGuard

from edgekit.errors import InputError, suggest

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt

MAX_HEADER_BYTES = 100_000_000
"""The limit of the format itself; also applied to an index."""

DTYPE_BITS: Mapping[str, int] = MappingProxyType(
    {
        "BOOL": 8,
        "U8": 8,
        "I8": 8,
        "U16": 16,
        "I16": 16,
        "U32": 32,
        "I32": 32,
        "U64": 64,
        "I64": 64,
        "F4": 4,
        "F6_E2M3": 6,
        "F6_E3M2": 6,
        "F8_E4M3": 8,
        "F8_E4M3FNUZ": 8,
        "F8_E5M2": 8,
        "F8_E5M2FNUZ": 8,
        "F8_E8M0": 8,
        "F16": 16,
        "BF16": 16,
        "F32": 32,
        "F64": 64,
        "C64": 64,
    }
)
"""Bits of one element of every dtype that safetensors 0.8 knows."""

_SINGLE_FILE = "model.safetensors"
_INDEX_FILE = "model.safetensors.index.json"
_PICKLES = ("pytorch_model*.bin", "*.pt", "*.pth", "*.ckpt")


@dataclass(frozen=True)
class TensorInfo:
    """One tensor: `shape` outermost first, `offset` from the start of `file` (a plain name in its directory)."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    offset: int
    nbytes: int
    file: str

    @property
    def elements(self) -> int:
        """Values that the tensor holds."""
        return math.prod(self.shape)


def read_header(path: Path) -> dict[str, TensorInfo]:
    """Read and check the header of one .safetensors file; the file is not trusted.

    Returns tensors by name, in the order of their data. Raises InputError for anything that is not a complete,
    well-formed file: the data of its tensors must fill it exactly.
    """
    try:
        if not path.is_file():
            raise InputError("a safetensors file", f"no regular file at {path}", f"ls -l {_quoted(path.parent)}")
        with path.open("rb") as file:
            file_bytes = os.fstat(file.fileno()).st_size
            prefix = file.read(8)
            if prefix == b"version ":
                raise InputError(f"a safetensors file at {path}", "a Git LFS pointer", "git lfs pull")
            if len(prefix) < 8:
                raise _truncated(path, file_bytes, 8 - len(prefix))
            header_bytes = int.from_bytes(prefix, "little")
            if header_bytes > MAX_HEADER_BYTES:
                raise _malformed(path, f"a header of at most {MAX_HEADER_BYTES} bytes", f"{header_bytes} bytes")
            if 8 + header_bytes > file_bytes:
                raise _truncated(path, file_bytes, 8 + header_bytes - file_bytes)
            header = _json_object(path, file.read(header_bytes))
    except OSError as error:
        raise _unreadable(path, error) from error
    metadata = header.pop("__metadata__", None)
    if metadata is not None and not _is_string_map(metadata):
        raise _malformed(path, "__metadata__ as a map of strings", "another value")
    data_offset = 8 + header_bytes
    tensors = sorted(
        (_tensor(path, data_offset, name, entry) for name, entry in header.items()),
        key=lambda tensor: (tensor.offset, tensor.nbytes),
    )
    end = data_offset
    for tensor in tensors:
        if tensor.offset != end:
            raise _malformed(
                path,
                "tensors that follow each other without gap or overlap",
                f"{tensor.name!r} at byte {tensor.offset} of the file, expected at {end}",
            )
        end += tensor.nbytes
    if end > file_bytes:
        raise _truncated(path, file_bytes, end - file_bytes)
    if end < file_bytes:
        raise _malformed(path, "no bytes after the last tensor", f"{file_bytes - end} bytes")
    return {tensor.name: tensor for tensor in tensors}


def read_checkpoint(directory: Path) -> dict[str, TensorInfo]:
    """Read the headers of a checkpoint: `model.safetensors`, or the shards that its index names.

    Returns tensors by name. Raises InputError for a directory without safetensors weights (pickled weights are
    refused), an index that points outside the directory, shards that are missing (all at once), tensors that the
    index promises and the shards lack, and a tensor that is in two shards.
    """
    single, index = directory / _SINGLE_FILE, directory / _INDEX_FILE
    try:
        if not directory.is_dir():
            raise InputError(
                "a checkpoint directory", f"no directory at {directory}", f"ls -l {_quoted(directory.parent)}"
            )
        # transformers looks for the single file first, and so do we
        if single.is_file():
            return read_header(single)
        if index.is_file():
            return _read_shards(directory, _weight_map(index))
        _refuse_without_weights(directory)
    except OSError as error:
        raise _unreadable(directory, error) from error


def read_arrays(path: Path, max_bytes: int) -> dict[str, npt.NDArray[np.float32]]:
    """Read every tensor of a small file as float32, by name; the file is not trusted.

    Raises InputError as `read_header` does, and for a file of more than `max_bytes`, a dtype other than F16 and F32,
    and values that are not finite.
    """
    import numpy as np

    dtypes = {"F16": "<f2", "F32": "<f4"}
    header = read_header(path)
    if (file_bytes := path.stat().st_size) > max_bytes:
        raise _malformed(path, f"at most {max_bytes} bytes", str(file_bytes))
    if wrong := [info for info in header.values() if info.dtype not in dtypes]:
        raise _malformed(path, "tensors of F16 or F32", f"{wrong[0].dtype} for tensor {wrong[0].name[:200]!r}")
    data = path.read_bytes()
    arrays = {}
    for name, info in header.items():
        flat = np.frombuffer(data, dtypes[info.dtype], info.elements, info.offset).astype(np.float32)
        if not np.isfinite(flat).all():
            raise _malformed(path, "finite values", f"others in tensor {name[:200]!r}")
        arrays[name] = flat.reshape(info.shape)
    return arrays


def write_arrays(path: Path, arrays: Mapping[str, npt.NDArray[np.floating[Any]]]) -> None:
    """Write float16 arrays as F16 and others as F32, in the given order: equal arrays give equal bytes."""
    import numpy as np

    header, parts, end = {}, [], 0
    for name, array in arrays.items():
        dtype, stored = ("F16", "<f2") if array.dtype == np.float16 else ("F32", "<f4")
        part = np.ascontiguousarray(array, stored).tobytes()
        header[name] = {"dtype": dtype, "shape": list(array.shape), "data_offsets": [end, end + len(part)]}
        parts.append(part)
        end += len(part)
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)  # so that the data is aligned
    path.write_bytes(len(text).to_bytes(8, "little") + text + b"".join(parts))


def _read_shards(directory: Path, weight_map: Mapping[str, str]) -> dict[str, TensorInfo]:
    index = directory / _INDEX_FILE
    shards = sorted(set(weight_map.values()))
    if missing := [shard for shard in shards if not (directory / shard).is_file()]:
        raise InputError(
            f"the {len(shards)} shards that {index} names",
            f"{len(missing)} missing: {', '.join(missing)}",
            f"hf download ORG/NAME {shlex.join(missing)} --local-dir {_quoted(directory)}",
        )
    tensors: dict[str, TensorInfo] = {}
    for shard in shards:
        for name, tensor in read_header(directory / shard).items():
            if name in tensors:
                raise _malformed(
                    directory / shard, "every tensor in one shard", f"{name!r} also in {tensors[name].file}"
                )
            tensors[name] = tensor
    absent = [name for name, shard in weight_map.items() if name not in tensors or tensors[name].file != shard]
    if absent:
        shown = ", ".join(f"{name!r} ({weight_map[name]})" for name in absent[:5])
        raise _malformed(
            index, "the tensors of the index in the shards it names", f"{len(absent)} that are not there: {shown}"
        )
    return tensors


def _weight_map(index: Path) -> dict[str, str]:
    """Shard by tensor. A shard is a name, never a path; the file itself may be a link, as in the hub's cache."""
    with index.open("rb") as file:
        data = file.read(MAX_HEADER_BYTES + 1)
    if len(data) > MAX_HEADER_BYTES:
        raise _malformed(index, f"an index of at most {MAX_HEADER_BYTES} bytes", "more")
    weight_map = _json_object(index, data).get("weight_map")
    if not _is_string_map(weight_map) or not weight_map:
        raise _malformed(index, "a weight_map from tensor to shard", "none, an empty one, or one of other values")
    for shard in set(weight_map.values()):
        plain = shard.endswith(".safetensors") and shard.isprintable() and not {"/", "\\", ":"} & set(shard)
        if not plain or shard.startswith("."):
            raise InputError(
                f"shards in {index} that are plain names of .safetensors files in its directory",
                f"{shard[:200]!r}",
                "do not use this checkpoint: fetch it again from a publisher you trust",
            )
    return weight_map


def _tensor(path: Path, data_offset: int, name: str, entry: Any) -> TensorInfo:
    def bad(wanted: str, found: str) -> InputError:
        return _malformed(path, wanted, f"{found} for tensor {name[:200]!r}")

    if not name.isprintable():
        raise _malformed(path, "tensor names of printable characters", f"{name[:200]!r}")
    if not isinstance(entry, dict) or entry.keys() != {"dtype", "shape", "data_offsets"}:
        raise bad("exactly dtype, shape and data_offsets", "something else")
    dtype, shape, offsets = entry["dtype"], entry["shape"], entry["data_offsets"]
    if not isinstance(dtype, str) or dtype not in DTYPE_BITS:
        hint = suggest(dtype, DTYPE_BITS) if isinstance(dtype, str) and len(dtype) < 20 else ""
        raise bad("a dtype of safetensors 0.8", f"{str(dtype)[:20]!r}{hint}")
    if not _is_sizes(shape) or not _is_sizes(offsets) or len(offsets) != 2:
        raise bad("a shape and two data_offsets of integers from 0 to 2^63 - 1", "other values")
    start, end = offsets
    bits = _product(shape) * DTYPE_BITS[dtype]
    if bits != (end - start) * 8:
        raise bad("data_offsets that span the bits of shape and dtype", f"{(end - start) * 8} bits instead of {bits}")
    return TensorInfo(name, dtype, tuple(shape), data_offset + start, end - start, path.name)


def _product(shape: list[int]) -> int:
    """Elements of a shape; stops growing at 2^64, so that a hostile list of sizes costs no big-integer time."""
    if 0 in shape:
        return 0
    elements = 1
    for size in shape:
        elements = min(elements * size, 1 << 64)
    return elements


def _json_object(path: Path, data: bytes) -> dict[str, Any]:
    def pairs(items: list[tuple[str, Any]]) -> dict[str, Any]:
        result = dict(items)
        if len(result) != len(items):
            raise ValueError("a key twice in one object")
        return result

    def constant(name: str) -> NoReturn:
        raise ValueError(f"{name}, which is not JSON")

    try:
        result = json.loads(data.decode(), object_pairs_hook=pairs, parse_constant=constant)
    except (ValueError, RecursionError) as error:
        raise _malformed(path, "strict JSON", f"{str(error)[:200]}") from error
    if not isinstance(result, dict):
        raise _malformed(path, "a JSON object", f"a JSON {type(result).__name__}")
    return result


def _is_string_map(value: Any) -> TypeGuard[dict[str, str]]:
    return isinstance(value, dict) and all(isinstance(item, str) for item in value.values())


def _is_sizes(value: Any) -> bool:
    return isinstance(value, list) and all(type(item) is int and 0 <= item < 1 << 63 for item in value)


def _refuse_without_weights(directory: Path) -> NoReturn:
    pickles = sorted({file.name for pattern in _PICKLES for file in directory.glob(pattern)})
    if pickles:
        convert = (
            'python -c "import sys; from transformers import AutoModelForCausalLM as M; '
            "M.from_pretrained(sys.argv[1], dtype='auto').save_pretrained(sys.argv[1])\""
        )
        raise InputError(
            f"safetensors weights in {directory}",
            f"only pickled weights, which can run code when loaded: {', '.join(pickles[:5])}",
            "take the publisher's safetensors revision, or convert, in a sandbox and only if you trust the files: "
            f"{convert} {_quoted(directory)}",
        )
    others = sorted(file.name for file in directory.glob("*.safetensors"))
    raise InputError(
        f"{_SINGLE_FILE} or {_INDEX_FILE} in {directory}",
        f"only {', '.join(others[:5])}" if others else "no weights",
        "name the directory that holds the model, or a hub id (org/name), which is downloaded",
    )


def _truncated(path: Path, file_bytes: int, missing: int) -> InputError:
    return InputError(
        f"a whole safetensors file at {path}",
        f"{file_bytes} bytes: {missing} bytes are missing",
        f"download the file again and compare its size with the publisher's: ls -l {_quoted(path)}",
    )


def _malformed(path: Path, wanted: str, found: str) -> InputError:
    return InputError(
        f"{wanted} in {path}",
        found,
        f"download the file again and compare its digest with the publisher's: sha256sum {_quoted(path)}",
    )


def _unreadable(path: Path, error: OSError) -> InputError:
    return InputError("a readable file", f"{path}: {error.strerror}", f"ls -l {_quoted(path)}")


def _quoted(path: Path) -> str:
    return shlex.quote(str(path))
