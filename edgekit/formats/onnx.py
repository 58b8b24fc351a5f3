"""The tensors of an ONNX model, read as what they are: bytes from a stranger.

Format: protocol buffers as in onnx.proto3 of ONNX 1.23 (wire types and field numbers are stable across versions).
Only the standard library is used, so a device needs no `onnx`; weights are neither loaded nor copied.
"""

from __future__ import annotations

import math
import mmap
import shlex
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType

from edgekit.errors import InputError, suggest

TYPE_BITS: Mapping[str, int] = MappingProxyType(
    {
        "f32": 32, "u8": 8, "i8": 8, "u16": 16, "i16": 16, "i32": 32, "i64": 64, "bool": 8, "f16": 16, "f64": 64,
        "u32": 32, "u64": 64, "c64": 64, "c128": 128, "bf16": 16, "f8_e4m3": 8, "f8_e4m3fnuz": 8, "f8_e5m2": 8,
        "f8_e5m2fnuz": 8, "u4": 4, "i4": 4, "f4_e2m1": 4, "f8_e8m0": 8, "u2": 2, "i2": 2,
    }
)  # fmt: skip
"""Bits of one element of every type whose size is fixed, by the short name used here."""

_TYPES = dict(
    zip((1, 2, 3, 4, 5, 6, 7, 9, 10, 11, 12, 13, 14, 15, *range(16, 27)), TYPE_BITS, strict=True)
)  # enum TensorProto.DataType; 8 is string, 0 undefined
_EXTERNAL = 1  # enum TensorProto.DataLocation
_MAX_DEPTH = 64
_MAX_GRAPH_BYTES = 1 << 31  # the limit of protocol buffers

_VARINT, _FIXED64, _BYTES, _FIXED32 = 0, 1, 2, 5

# message -> {field number: message of the field}, for every way to a tensor
_WAYS: Mapping[str, Mapping[int, str]] = {
    "model": {7: "graph", 25: "function"},
    "graph": {1: "node", 5: "tensor", 15: "sparse"},
    "function": {7: "node"},
    "node": {5: "attribute"},
    "attribute": {5: "tensor", 6: "graph", 10: "tensor", 11: "graph", 22: "sparse", 23: "sparse"},
    "sparse": {1: "tensor", 2: "tensor"},
}


@dataclass(frozen=True)
class TensorInfo:
    """One constant of the graph: `shape` outermost first, and where its data lies."""

    name: str
    type: str
    shape: tuple[int, ...]
    nbytes: int
    file: str | None
    """Name of the file with its data, beside the model; None for data within the model itself."""
    offset: int


def read_tensors(path: Path) -> tuple[TensorInfo, ...]:
    """Read name, type, shape and place of every named constant of an ONNX model; the file is not trusted.

    Raises InputError for anything that is not a well-formed model, external data that is not a plain file name in
    the model's own directory, and data that is missing or lies outside its file.
    """
    try:
        if not path.is_file():
            raise InputError("an ONNX model", f"no regular file at {path}", f"ls -l {_quoted(path.parent)}")
        with path.open("rb") as stream:
            size = path.stat().st_size
            if not 0 < size < _MAX_GRAPH_BYTES:
                raise _malformed(path, "an ONNX model of at most 2 GiB beside its external data", f"{size} bytes")
            with mmap.mmap(stream.fileno(), 0, access=mmap.ACCESS_READ) as data:
                found = [_tensor(path, data, start, end) for start, end in _tensors(path, data)]
        sizes: dict[str, int] = {}
        for tensor in found:
            if tensor.file is not None:
                if tensor.file not in sizes:
                    sizes[tensor.file] = _external_size(path, tensor.file)
                if tensor.offset + tensor.nbytes > sizes[tensor.file]:
                    missing = tensor.offset + tensor.nbytes - sizes[tensor.file]
                    raise _malformed(
                        path.parent / tensor.file, f"all data of {tensor.name!r}", f"{missing} bytes are missing"
                    )
    except OSError as error:
        raise InputError(
            "a readable ONNX model", f"{error.filename or path}: {error.strerror}", "check the files"
        ) from None
    return tuple(tensor for tensor in found if tensor.name)


def _tensors(path: Path, data: mmap.mmap) -> Iterator[tuple[int, int]]:
    """Byte ranges of every TensorProto of the model, subgraphs and functions included."""
    pending = [("model", 0, len(data), 0)]
    graphs = 0
    while pending:
        message, start, end, depth = pending.pop()
        if depth > _MAX_DEPTH:
            raise _malformed(path, f"at most {_MAX_DEPTH} levels of subgraphs", "more")
        graphs += message == "graph"
        if message == "tensor":
            yield start, end
            continue
        ways = _WAYS[message]
        inner = [
            (ways[number], low, high, depth + 1)
            for number, kind, low, high in _fields(path, data, start, end)
            if kind == _BYTES and number in ways
        ]
        pending.extend(reversed(inner))
    if not graphs:
        raise _malformed(path, "a graph", "none")


def _fields(path: Path, data: mmap.mmap, start: int, end: int) -> Iterator[tuple[int, int, int, int]]:
    """(field number, wire type, start of value, end of value); a varint's value is its bytes."""
    at = start
    while at < end:
        tag, at = _varint(path, data, at, end)
        number, kind = tag >> 3, tag & 7
        if kind == _BYTES:
            length, at = _varint(path, data, at, end)
            stop = at + length
        elif kind == _VARINT:
            stop = _varint(path, data, at, end)[1]
        elif kind in (_FIXED64, _FIXED32):
            stop = at + (8 if kind == _FIXED64 else 4)
        else:
            raise _malformed(path, "an ONNX model (protocol buffers)", f"wire type {kind} at byte {at}")
        if stop > end or number == 0:
            raise _malformed(path, "an ONNX model (protocol buffers)", f"a field that ends outside at byte {at}")
        yield number, kind, at, stop
        at = stop


def _varint(path: Path, data: mmap.mmap, at: int, end: int) -> tuple[int, int]:
    value = 0
    for shift in range(0, 70, 7):
        if at >= end:
            break
        byte = data[at]
        at += 1
        value |= (byte & 0x7F) << shift
        if byte < 0x80:
            return value & ((1 << 64) - 1), at
    raise _malformed(path, "an ONNX model (protocol buffers)", f"a number without an end at byte {at}")


def _tensor(path: Path, data: mmap.mmap, start: int, end: int) -> TensorInfo:
    shape: list[int] = []
    identity, location, raw, name = 0, 0, None, ""
    external: dict[str, str] = {}
    for number, kind, low, high in _fields(path, data, start, end):
        if number == 1 and kind == _VARINT:
            shape.append(_varint(path, data, low, high)[0])
        elif number == 1 and kind == _BYTES:  # packed, as every writer does it
            while low < high:
                size, low = _varint(path, data, low, high)
                shape.append(size)
        elif number in (2, 14) and kind == _VARINT:
            value = _varint(path, data, low, high)[0]
            identity, location = (value, location) if number == 2 else (identity, value)
        elif number == 8 and kind == _BYTES:
            name = _text(path, data[low:high])
        elif number == 9 and kind == _BYTES:
            raw = high - low
        elif number == 13 and kind == _BYTES:
            pair = {n: data[a:b] for n, k, a, b in _fields(path, data, low, high) if k == _BYTES}
            external[_text(path, pair.get(1, b""))] = _text(path, pair.get(2, b""))
    kind_name = _TYPES.get(identity)
    if kind_name is None:
        raise _malformed(path, "tensors of numbers", f"type {identity} of tensor {name[:200]!r}")
    if any(size >= 1 << 63 for size in shape):
        raise _malformed(path, "sizes from 0 to 2^63 - 1", f"others for tensor {name[:200]!r}")
    nbytes = -(-math.prod(shape) * TYPE_BITS[kind_name] // 8)
    if location != _EXTERNAL:
        if raw is not None and raw != nbytes:
            raise _malformed(path, f"{nbytes} bytes of tensor {name[:200]!r}", f"{raw}")
        return TensorInfo(name, kind_name, tuple(shape), nbytes, None, 0)
    offset = _number(path, name, external.get("offset", "0"))
    length = _number(path, name, external.get("length", str(nbytes)))
    if length != nbytes:
        raise _malformed(path, f"{nbytes} bytes of tensor {name[:200]!r}", f"{length}")
    return TensorInfo(name, kind_name, tuple(shape), nbytes, _plain_name(path, external.get("location", "")), offset)


def _plain_name(path: Path, location: str) -> str:
    name = location.removeprefix("./")
    if not name or not name.isprintable() or name.startswith(".") or {"/", "\\", ":"} & set(name):
        raise InputError(
            f"external data of {path} in plain files beside it",
            f"{location[:200]!r}",
            "do not use this model: fetch it again from a publisher you trust",
        )
    return name


def _external_size(path: Path, name: str) -> int:
    file = path.parent / name
    if not file.is_file():
        others = [other.name for other in path.parent.iterdir()]
        raise InputError(f"the external data {name} of {path}", f"no such file{suggest(name, others)}", "copy it, too")
    return file.stat().st_size


def _number(path: Path, name: str, text: str) -> int:
    if not (text.isascii() and text.isdigit() and len(text) < 20):
        raise _malformed(path, f"a number of bytes for tensor {name[:200]!r}", f"{text[:40]!r}")
    return int(text)


def _text(path: Path, data: bytes) -> str:
    try:
        return data.decode()
    except UnicodeDecodeError:
        raise _malformed(path, "names in UTF-8", f"{data[:40]!r}") from None


def _malformed(path: Path, wanted: str, found: str) -> InputError:
    return InputError(f"{wanted} in {path}", found, "build or download the model again")


def _quoted(path: Path) -> str:
    return shlex.quote(str(path))
