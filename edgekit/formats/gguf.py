"""The header of a GGUF file, read as what it is: bytes from a stranger.

Format: the GGUF specification (ggml, docs/gguf.md), versions 2 and 3, little endian. Every count and length is
checked against the bytes that are left before anything is allocated, and whatever is accepted here llama.cpp accepts
too. Tensor data is never read. Plain reads, no mmap: a file that shrinks meanwhile is an error, not a SIGBUS.
"""

from __future__ import annotations

import math
import os
import shlex
import struct
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import BinaryIO, NamedTuple

from edgekit.errors import InputError, ToolError, suggest

Scalar = str | int | float | bool
Value = Scalar | tuple[Scalar, ...]

MAX_HEADER_BYTES = 64 << 20
"""Far above real headers (a vocabulary of 262 144 pieces takes some 15 MB), low enough for a small device."""
MAX_ARRAY_ELEMENTS = 8 << 20
"""Elements of all arrays together: a byte in the file can become 36 bytes of Python objects."""
MAX_ENTRIES = 1 << 18
"""Tensors, and metadata pairs; the largest mixture of experts with unmerged experts has some 50 000 tensors."""
MAX_KEY_BYTES = 65_535
MAX_NAME_BYTES = 63
MAX_DIMENSIONS = 4
DEFAULT_ALIGNMENT = 32
_ALIGNMENT_KEY = "general.alignment"
_CONVERT_AGAIN = "convert the checkpoint again: edgekit build DIRECTORY --recipe gguf-q8"
_SMALLEST_PAIR_BYTES = 8 + 1 + 4 + 1
_SMALLEST_TENSOR_BYTES = 8 + 1 + 4 + 4 + 8

_UINT32, _INT32, _FLOAT32, _BOOL, _STRING, _ARRAY, _UINT64, _INT64 = 4, 5, 6, 7, 8, 9, 10, 11
_STRUCT_CODES = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "B", 10: "Q", 11: "q", 12: "d"}


class GgmlType(NamedTuple):
    """An element type: `block_elements` values are stored together in `block_bytes`."""

    name: str
    block_elements: int
    block_bytes: int


GGML_TYPES: Mapping[int, GgmlType] = MappingProxyType(
    {
        0: GgmlType("f32", 1, 4),
        1: GgmlType("f16", 1, 2),
        2: GgmlType("q4_0", 32, 18),
        3: GgmlType("q4_1", 32, 20),
        6: GgmlType("q5_0", 32, 22),
        7: GgmlType("q5_1", 32, 24),
        8: GgmlType("q8_0", 32, 34),
        9: GgmlType("q8_1", 32, 36),
        10: GgmlType("q2_K", 256, 84),
        11: GgmlType("q3_K", 256, 110),
        12: GgmlType("q4_K", 256, 144),
        13: GgmlType("q5_K", 256, 176),
        14: GgmlType("q6_K", 256, 210),
        15: GgmlType("q8_K", 256, 292),
        16: GgmlType("iq2_xxs", 256, 66),
        17: GgmlType("iq2_xs", 256, 74),
        18: GgmlType("iq3_xxs", 256, 98),
        19: GgmlType("iq1_s", 256, 50),
        20: GgmlType("iq4_nl", 32, 18),
        21: GgmlType("iq3_s", 256, 110),
        22: GgmlType("iq2_s", 256, 82),
        23: GgmlType("iq4_xs", 256, 136),
        24: GgmlType("i8", 1, 1),
        25: GgmlType("i16", 1, 2),
        26: GgmlType("i32", 1, 4),
        27: GgmlType("i64", 1, 8),
        28: GgmlType("f64", 1, 8),
        29: GgmlType("iq1_m", 256, 56),
        30: GgmlType("bf16", 1, 2),
        34: GgmlType("tq1_0", 256, 54),
        35: GgmlType("tq2_0", 256, 66),
        39: GgmlType("mxfp4", 32, 17),
        40: GgmlType("nvfp4", 64, 36),
        41: GgmlType("q1_0", 128, 18),
        42: GgmlType("q2_0", 64, 18),
    }
)
"""Every type a file may hold, by its id in `enum ggml_type` of ggml.h (llama-cpp-python 0.3.36); no removed ids."""

_IDS = {kind.name: number for number, kind in GGML_TYPES.items()}


@dataclass(frozen=True)
class TensorInfo:
    """One tensor of a file: `shape` innermost first, as GGUF stores it; `offset` from the start of the file."""

    name: str
    shape: tuple[int, ...]
    type: str
    offset: int
    nbytes: int

    @property
    def elements(self) -> int:
        """Values that the tensor holds."""
        return math.prod(self.shape)


@dataclass(frozen=True)
class Header:
    """All that a GGUF file says before its tensor data."""

    version: int
    metadata: Mapping[str, Value]
    tensors: tuple[TensorInfo, ...]
    alignment: int
    data_offset: int
    file_bytes: int

    @property
    def architecture(self) -> str:
        """`general.architecture`, e.g. `llama`. Raises InputError where the file does not say it."""
        name = self.metadata.get("general.architecture")
        if not isinstance(name, str) or not name:
            raise InputError(
                "a GGUF model that names its architecture",
                f"general.architecture = {repr(name)[:40]}"
                if name is not None
                else "no general.architecture in its metadata",
                _CONVERT_AGAIN,
            )
        return name

    @property
    def parameters(self) -> int:
        """Elements of all tensors in this file."""
        return sum(tensor.elements for tensor in self.tensors)

    @property
    def weight_bytes(self) -> int:
        """Bytes of all tensors in this file, without the padding between them."""
        return sum(tensor.nbytes for tensor in self.tensors)


def canonical_type(text: str) -> str:
    """The name of an element type as it is spelt here, whatever its case. Raises ValueError with the closest one."""
    known = {name.lower(): name for name in _IDS}
    if text.lower() not in known:
        raise ValueError(f"{text!r} is not a tensor type of GGUF{suggest(text, known.values())}")
    return known[text.lower()]


def tensor_bytes(type_name: str, shape: Sequence[int]) -> int:
    """Bytes of a tensor of a ggml type, `shape` innermost first. Raises InputError where ggml has no such tensor."""
    number = _IDS.get(type_name)
    if number is None:
        raise InputError(
            "a ggml type", f"{type_name!r}{suggest(type_name, _IDS)}", f"use one of: {', '.join(sorted(_IDS))}"
        )
    kind = GGML_TYPES[number]
    if fault := _shape_fault(kind, shape):
        raise InputError(f"a {type_name} tensor that ggml can hold", fault, "choose another type for this tensor")
    return _bytes_of(kind, shape)


def read_header(path: Path) -> Header:
    """Read and check the header of a GGUF file; the file is not trusted.

    Numbers come as int, float or bool, arrays as tuples. Names must be printable UTF-8; other strings may be any
    bytes (vocabularies hold pieces of characters), shown as `\\xNN` where they are not UTF-8.
    Raises InputError for anything that is not a complete, well-formed, little-endian GGUF v2 or v3 file.
    """
    try:
        if not path.is_file():
            folder = path if path.is_dir() else path.parent
            raise InputError("a GGUF file", f"no regular file at {path}", f"ls -l {_quoted(folder)}")
        with path.open("rb") as file:
            return _Reader(path, file, os.fstat(file.fileno()).st_size).header()
    except OSError as error:
        raise InputError("a readable GGUF file", f"{path}: {error.strerror}", f"ls -l {_quoted(path)}") from error


def write_skeleton(
    path: Path, metadata: Mapping[str, Value], tensors: Sequence[tuple[str, tuple[int, ...], str]]
) -> None:
    """Write a valid GGUF v3 file whose tensor data is one hole: tools that look only at shapes can read it.

    `tensors` are (name, shape innermost first, type name). Integers are stored as uint32 where they fit, floats as
    float32: what llama.cpp expects of hyperparameters; the elements of an array must be stored alike. Raises InputError
    for what `read_header` would refuse, ToolError where the file system cannot hold the file.
    """
    alignment = metadata.get(_ALIGNMENT_KEY, DEFAULT_ALIGNMENT)
    if type(alignment) is not int or not _is_alignment(alignment):
        raise _unwritable(f"{_ALIGNMENT_KEY} = {alignment!r}")
    parts = [b"GGUF", struct.pack("<IQQ", 3, len(tensors), len(metadata))]
    for key, value in metadata.items():
        if fault := _name_fault(key.encode(errors="surrogatepass"), MAX_KEY_BYTES):
            raise _unwritable(f"a metadata key with {fault}")
        parts += [_packed_string(key), _packed_value(value)]
    data_bytes = 0  # so far; also the offset of the next tensor
    seen: set[str] = set()
    for name, shape, type_name in tensors:
        fault = _name_fault(name.encode(errors="surrogatepass"), MAX_NAME_BYTES)
        if fault or name in seen:
            raise _unwritable(f"a tensor name with {fault}" if fault else f"two tensors {name!r}")
        seen.add(name)
        nbytes = tensor_bytes(type_name, shape)
        parts.append(_packed_string(name))
        parts.append(struct.pack(f"<I{len(shape)}QIQ", len(shape), *shape, _IDS[type_name], data_bytes))
        data_bytes += _padded(nbytes, alignment)
        if data_bytes >= 1 << 62:
            raise _unwritable(f"{data_bytes} bytes of tensors")
    header = b"".join(parts)
    try:
        with path.open("wb") as file:
            file.write(header)
            file.truncate(_padded(len(header), alignment) + data_bytes)
    except OSError as error:
        raise ToolError(
            f"a sparse file of {data_bytes} bytes at {path}", f"{error.strerror}", f"df -h {_quoted(path.parent)}"
        ) from error


class _Reader:
    """A forward-only view of the header that refuses to look past its end."""

    def __init__(self, path: Path, file: BinaryIO, file_bytes: int) -> None:
        self.path = path
        self.file = file
        self.file_bytes = file_bytes
        self.end = min(file_bytes, MAX_HEADER_BYTES)
        self.position = 0
        self.elements_left = MAX_ARRAY_ELEMENTS

    def header(self) -> Header:
        tensor_count, pair_count, version = self._preamble()
        metadata: dict[str, Value] = {}
        alignment = DEFAULT_ALIGNMENT
        for _ in range(pair_count):
            key = self._name("metadata key", MAX_KEY_BYTES)
            if key in metadata:
                raise self._malformed("metadata keys that differ", f"{key!r} twice")
            (kind,) = self._unpack("I")
            value = metadata[key] = self._value(key, kind)
            if key == _ALIGNMENT_KEY:
                if kind != _UINT32 or not isinstance(value, int) or not _is_alignment(value):
                    raise self._malformed("an alignment that is a power of two (uint32)", f"{key} = {repr(value)[:40]}")
                alignment = value
        names: dict[str, tuple[tuple[int, ...], GgmlType, int]] = {}
        for _ in range(tensor_count):
            name = self._name("tensor name", MAX_NAME_BYTES)
            if name in names:
                raise self._malformed("tensor names that differ", f"{name!r} twice")
            names[name] = self._tensor(name)
        data_offset = _padded(self.position, alignment) if names else self.position
        return Header(
            version, metadata, self._placed(names, data_offset, alignment), alignment, data_offset, self.file_bytes
        )

    def _preamble(self) -> tuple[int, int, int]:
        magic = self.file.read(4)
        if magic != b"GGUF":
            # "vers" opens a Git LFS pointer, left by a clone without LFS
            raise InputError(
                f"a GGUF file at {self.path}",
                "a Git LFS pointer" if magic == b"vers" else f"a file that begins with {magic!r}",
                "git lfs pull" if magic == b"vers" else f"file {_quoted(self.path)}",
            )
        self.position = 4
        (version,) = self._unpack("I")
        if version not in (2, 3):
            # read in the wrong order, a small version has its low bytes empty
            big_endian = version & 0xFFFF == 0 and version != 0
            raise InputError(
                f"a little-endian GGUF version 2 or 3 at {self.path}",
                "a big-endian file" if big_endian else f"version {version}",
                _CONVERT_AGAIN,
            )
        tensor_count, pair_count = self._unpack("QQ")
        self._expect(pair_count, _SMALLEST_PAIR_BYTES, "metadata pairs")
        self._expect(tensor_count, _SMALLEST_TENSOR_BYTES, "tensors")
        if max(tensor_count, pair_count) > MAX_ENTRIES:
            found = f"{tensor_count} tensors, {pair_count} pairs"
            raise self._malformed(f"at most {MAX_ENTRIES} tensors and metadata pairs", found)
        return tensor_count, pair_count, version

    def _value(self, key: str, kind: int) -> Value:
        if kind == _STRING:
            return self._strings(1)[0]
        if kind in _STRUCT_CODES:
            return self._numbers(key, kind, 1)[0]
        if kind != _ARRAY:
            raise self._malformed("a known metadata type", f"type {kind} for {key!r}")
        element_kind, count = self._unpack("IQ")
        if element_kind != _STRING and element_kind not in _STRUCT_CODES:
            what = "a nested array" if element_kind == _ARRAY else f"an array of type {element_kind}"
            raise self._malformed("an array of numbers or strings", f"{what} for {key!r}")
        self._expect(count, 8 if element_kind == _STRING else struct.calcsize(_STRUCT_CODES[element_kind]), "elements")
        if count > self.elements_left:
            raise self._malformed(f"at most {MAX_ARRAY_ELEMENTS} array elements in metadata", f"more, in {key!r}")
        self.elements_left -= count
        return self._strings(count) if element_kind == _STRING else self._numbers(key, element_kind, count)

    def _numbers(self, key: str, kind: int, count: int) -> tuple[Scalar, ...]:
        layout = struct.Struct(f"<{count}{_STRUCT_CODES[kind]}")
        numbers = layout.unpack(self._take(layout.size))
        if kind != _BOOL:
            return numbers
        if not set(numbers) <= {0, 1}:
            raise self._malformed("booleans stored as 0 or 1", f"{max(numbers)} in {key!r}")
        return tuple(map(bool, numbers))

    def _strings(self, count: int) -> tuple[str, ...]:
        # a vocabulary has 10^5 strings: this loop is the cost of reading a header
        read, unpack, end = self.file.read, struct.Struct("<Q").unpack, self.end
        position = self.position
        strings = []
        for _ in range(count):
            start = position + 8
            prefix = read(8) if start <= end else b""
            if len(prefix) != 8:
                raise self._too_short(start)
            (length,) = unpack(prefix)
            position = start + length
            data = read(length) if position <= end else None
            if data is None or len(data) != length:
                raise self._too_short(position)
            strings.append(data.decode(errors="backslashreplace"))
        self.position = position
        return tuple(strings)

    def _tensor(self, name: str) -> tuple[tuple[int, ...], GgmlType, int]:
        (dimensions,) = self._unpack("I")
        if dimensions > MAX_DIMENSIONS:
            raise self._malformed(f"at most {MAX_DIMENSIONS} dimensions", f"{dimensions} for tensor {name!r}")
        shape = self._unpack(f"{dimensions}Q")
        number, offset = self._unpack("IQ")
        kind = GGML_TYPES.get(number)
        if kind is None:
            raise InputError(
                f"tensor types of a current llama.cpp in {self.path}",
                f"ggml type {number} for tensor {name!r}",
                _CONVERT_AGAIN,
            )
        if fault := _shape_fault(kind, shape):
            raise self._malformed("a shape that ggml can hold", f"{fault} for tensor {name!r}")
        return shape, kind, offset

    def _placed(
        self, tensors: Mapping[str, tuple[tuple[int, ...], GgmlType, int]], data_offset: int, alignment: int
    ) -> tuple[TensorInfo, ...]:
        """Check that tensors follow each other, aligned and without gaps (llama.cpp wants exactly this)."""
        placed = []
        expected = 0
        for name, (shape, kind, offset) in tensors.items():
            if offset != expected:
                raise self._malformed(
                    "tensors that follow each other, aligned, in the order of the header",
                    f"{name!r} at byte {offset} of the data, expected at {expected}",
                )
            nbytes = _bytes_of(kind, shape)
            placed.append(TensorInfo(name, shape, kind.name, data_offset + offset, nbytes))
            expected += _padded(nbytes, alignment)
        needed = placed[-1].offset + placed[-1].nbytes if placed else 0
        if needed > self.file_bytes:
            raise self._truncated(f"the data of {len(placed)} tensors", needed)
        return tuple(placed)

    def _name(self, what: str, limit: int) -> str:
        (length,) = self._unpack("Q")
        if length > limit:
            raise self._malformed(f"a {what} of at most {limit} bytes", f"{length} bytes")
        data = self._take(length)
        if fault := _name_fault(data, limit):
            raise self._malformed(f"a {what} of printable UTF-8", fault)
        return data.decode()

    def _unpack(self, codes: str) -> tuple[int, ...]:
        layout = struct.Struct(f"<{codes}")
        return layout.unpack(self._take(layout.size))

    def _take(self, count: int) -> bytes:
        self.position += count
        data = self.file.read(count) if self.position <= self.end else b""
        if len(data) != count:
            raise self._too_short(self.position)
        return data

    def _expect(self, count: int, smallest_bytes: int, what: str) -> None:
        """Refuse a count before any loop or allocation if the rest of the header cannot hold it."""
        if count * smallest_bytes > self.end - self.position:
            raise self._malformed(
                "counts that the file can hold",
                f"{count} {what} of at least {smallest_bytes} bytes in the remaining {self.end - self.position} bytes",
            )

    def _too_short(self, needed: int) -> InputError:
        if needed > self.file_bytes:
            return self._truncated("the whole header", needed)
        if needed > MAX_HEADER_BYTES:
            return self._malformed(f"a header of at most {MAX_HEADER_BYTES} bytes", f"at least {needed} bytes")
        return self._malformed("all bytes of the header", "a file that became shorter while it was read")

    def _truncated(self, what: str, needed: int) -> InputError:
        return InputError(
            f"{what} in {self.path}",
            f"{self.file_bytes} bytes, at least {needed - self.file_bytes} too few",
            f"download the file again and compare its size with the publisher's: ls -l {_quoted(self.path)}",
        )

    def _malformed(self, wanted: str, found: str) -> InputError:
        return InputError(
            f"{wanted} in {self.path}",
            found,
            f"download the file again and compare its digest with the publisher's: sha256sum {_quoted(self.path)}",
        )


def _shape_fault(kind: GgmlType, shape: Sequence[int]) -> str | None:
    """Say what keeps ggml from holding this shape, or None."""
    if len(shape) > MAX_DIMENSIONS:
        return f"{len(shape)} dimensions (at most {MAX_DIMENSIONS})"
    elements = math.prod(shape)
    if any(size < 1 for size in shape):
        return f"an empty dimension in {tuple(shape)}"
    if elements >= 1 << 63 or _bytes_of(kind, shape) >= 1 << 63:
        return f"shape {tuple(shape)}, too large to address"
    row = shape[0] if shape else 1
    if row % kind.block_elements:
        return f"rows of {row} elements, not a multiple of the {kind.block_elements} in a block of {kind.name}"
    return None


def _bytes_of(kind: GgmlType, shape: Sequence[int]) -> int:
    return math.prod(shape) // kind.block_elements * kind.block_bytes


def _name_fault(data: bytes, limit: int) -> str | None:
    """Say what is wrong with a key or tensor name, or None. Unprintable names could command a terminal."""
    if not data or len(data) > limit:
        return f"{len(data)} bytes (1 to {limit} allowed)"
    try:
        printable = data.decode().isprintable()
    except UnicodeDecodeError:
        printable = False
    return None if printable else f"{data[:80]!r}"


def _is_alignment(value: int) -> bool:
    return 0 < value < 1 << 32 and value & (value - 1) == 0


def _padded(count: int, alignment: int) -> int:
    return -(-count // alignment) * alignment


def _packed_string(text: str) -> bytes:
    data = text.encode(errors="backslashreplace")
    return struct.pack("<Q", len(data)) + data


def _packed_value(value: Value) -> bytes:
    if isinstance(value, tuple):
        elements = [_packed_value(element) for element in value]
        kinds = {element[:4] for element in elements}
        if len(kinds) != 1 or kinds == {struct.pack("<I", _ARRAY)}:
            raise _unwritable(f"an array of {len(kinds)} types of elements")
        body = b"".join(element[4:] for element in elements)
        return struct.pack("<I", _ARRAY) + kinds.pop() + struct.pack("<Q", len(value)) + body
    if isinstance(value, bool):
        return struct.pack("<IB", _BOOL, value)
    if isinstance(value, str):
        return struct.pack("<I", _STRING) + _packed_string(value)
    for kind in (_FLOAT32,) if isinstance(value, float) else (_UINT32, _INT32, _UINT64, _INT64):
        try:
            return struct.pack(f"<I{_STRUCT_CODES[kind]}", kind, value)
        except (struct.error, OverflowError):
            continue
    raise _unwritable(f"the number {value}, too large to store")


def _unwritable(found: str) -> InputError:
    return InputError("tensors and metadata that GGUF can hold", found, "correct the model's configuration")


def _quoted(path: Path) -> str:
    return shlex.quote(str(path))
