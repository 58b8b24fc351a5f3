from __future__ import annotations

import json
import struct
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from edgekit.errors import InputError
from edgekit.formats.safetensors import DTYPE_BITS, MAX_HEADER_BYTES, TensorInfo, read_checkpoint, read_header

safetensors = pytest.importorskip("safetensors")
safetensors_numpy = pytest.importorskip("safetensors.numpy")

ARRAYS = {
    "b": np.arange(6, dtype=np.float32).reshape(2, 3),
    "a": np.arange(4, dtype=np.float16),
    "scalar": np.array(7, dtype=np.int64),
    "empty": np.zeros((0, 5), dtype=np.uint8),
    "flag": np.array([True, False, True]),
}


def entry(dtype: str = "U8", shape: Any = (4,), start: Any = 0, end: Any = 4) -> dict[str, Any]:
    return {"dtype": dtype, "shape": shape, "data_offsets": [start, end]}


def file_bytes(header: Any, data_bytes: int = 4) -> bytes:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(text)) + text + bytes(data_bytes)


@pytest.fixture(scope="module")
def scratch(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("safetensors") / "fuzzed.safetensors"


@pytest.fixture
def sharded(tmp_path: Path) -> Path:
    """A checkpoint of two shards, laid out as in the hub's cache: names that link to blobs elsewhere."""
    blobs, snapshot = tmp_path / "blobs", tmp_path / "snapshots" / "main"
    blobs.mkdir()
    snapshot.mkdir(parents=True)
    weight_map = {}
    for number, names in enumerate((["a", "b"], ["scalar", "empty", "flag"]), start=1):
        shard = f"model-{number:05}-of-00002.safetensors"
        safetensors_numpy.save_file({name: ARRAYS[name] for name in names}, blobs / f"{number}")
        (snapshot / shard).symlink_to(Path("..") / ".." / "blobs" / f"{number}")
        weight_map |= dict.fromkeys(names, shard)
    write_index(snapshot, weight_map)
    return snapshot


def write_index(directory: Path, weight_map: Any) -> None:
    index = {"metadata": {"total_size": 0}, "weight_map": weight_map}
    (directory / "model.safetensors.index.json").write_text(json.dumps(index))


def assert_holds(tensors: dict[str, TensorInfo], directory: Path, arrays: dict[str, np.ndarray[Any, Any]]) -> None:
    """Compare with the reference library and with the bytes at the offsets."""
    assert tensors.keys() == arrays.keys()
    for name, info in tensors.items():
        with safetensors.safe_open(directory / info.file, framework="np") as reference:
            part = reference.get_slice(name)
            assert (info.dtype, info.shape) == (part.get_dtype(), tuple(part.get_shape()))
        data = (directory / info.file).read_bytes()[info.offset : info.offset + info.nbytes]
        assert data == arrays[name].tobytes()
        assert info.elements == arrays[name].size
        assert info.name == name


def test_a_file_equals_the_reference_reader(tmp_path: Path) -> None:
    path = tmp_path / "x.safetensors"
    safetensors_numpy.save_file(ARRAYS, path, metadata={"format": "np"})
    assert_holds(read_header(path), tmp_path, ARRAYS)


def accepted_by_reference(data: bytes) -> bool:
    try:
        safetensors.deserialize(data)
    except safetensors.SafetensorError:
        return False
    return True


def test_the_dtypes_are_those_of_the_reference_library() -> None:
    with pytest.raises(safetensors.SafetensorError) as caught:
        safetensors.deserialize(file_bytes({"a": entry("no such dtype")}))
    assert set(DTYPE_BITS) == set(
        str(caught.value).split("expected one of ")[1].split(" at line")[0].strip("`").split("`, `")
    )
    for dtype, bits in DTYPE_BITS.items():
        assert accepted_by_reference(file_bytes({"a": entry(dtype, (8,), 0, bits)}, bits))


def test_a_checkpoint_of_one_file_is_read(tmp_path: Path) -> None:
    safetensors_numpy.save_file(ARRAYS, tmp_path / "model.safetensors")
    write_index(tmp_path, {"a": "model-00001-of-00001.safetensors"})
    assert_holds(read_checkpoint(tmp_path), tmp_path, ARRAYS)


def test_a_checkpoint_of_linked_shards_is_read(sharded: Path) -> None:
    assert_holds(read_checkpoint(sharded), sharded, ARRAYS)


GOOD = {"a": entry()}
BAD_FILES = {
    "empty": (b"", "0 bytes: 8 bytes are missing"),
    "short length": (b"\1\0\0", "5 bytes are missing"),
    "lfs": (b"version https://git-lfs.github.com/spec/v1\n", "Git LFS pointer"),
    "length beyond the format": (struct.pack("<Q", MAX_HEADER_BYTES + 1), f"{MAX_HEADER_BYTES + 1} bytes"),
    "length beyond the file": (struct.pack("<Q", 100) + b"{}", "98 bytes are missing"),
    "data cut": (file_bytes(GOOD, 1), "3 bytes are missing"),
    "data left over": (file_bytes(GOOD, 9), "5 bytes"),
    "no JSON": (file_bytes(b"{"), "Expecting property name"),
    "zero bytes after JSON": (file_bytes(json.dumps(GOOD).encode() + b"\0"), "Extra data"),
    "no UTF-8": (file_bytes(b'{"\xff": 1}'), "can't decode byte 0xff"),
    "no object": (file_bytes([GOOD]), "JSON list"),
    "NaN": (file_bytes(b'{"a": NaN}'), "NaN"),
    "deep": (file_bytes(b'{"a":' + b"[" * 200_000), "recursion"),
    "a huge number": (file_bytes(b'{"a":' + b"9" * 100_000 + b"}"), "integer string conversion"),
    "tensor twice": (file_bytes(b'{"a":%b,"a":%b}' % ((json.dumps(entry()).encode(),) * 2)), "a key twice"),
    "field twice": (file_bytes(b'{"a":{"dtype":"U8","dtype":"U8"}}'), "a key twice"),
    "metadata of numbers": (file_bytes({**GOOD, "__metadata__": {"a": 1}}), "another value"),
    "metadata list": (file_bytes({**GOOD, "__metadata__": ["a"]}), "another value"),
    "name commands a terminal": (file_bytes({"\x1b[2J": entry()}), "x1b"),
    "lone surrogate": (file_bytes({"\ud800": entry()}), "ud800"),
    "entry is a list": (file_bytes({"a": []}), "something else"),
    "entry without shape": (file_bytes({"a": {"dtype": "U8", "data_offsets": [0, 4]}}), "something else"),
    "entry with more": (file_bytes({"a": {**entry(), "file": "x"}}), "something else"),
    "unknown dtype": (file_bytes({"a": entry("FP16")}), "'FP16' (did you mean 'F16'?)"),
    "dtype is a number": (file_bytes({"a": {**entry(), "dtype": 8}}), "'8'"),
    "shape negative": (file_bytes({"a": entry(shape=[-4])}), "other values"),
    "shape of floats": (file_bytes({"a": entry(shape=[4.0])}), "other values"),
    "shape of booleans": (file_bytes({"a": entry(shape=[4, True])}), "other values"),
    "shape overflows": (file_bytes({"a": entry(shape=[2**32, 2**32])}), "instead of"),
    "shape of many sizes": (file_bytes({"a": entry(shape=[2**62] * 50_000)}), "instead of"),
    "offsets of three": (file_bytes({"a": {**entry(), "data_offsets": [0, 4, 4]}}), "other values"),
    "offsets negative": (file_bytes({"a": entry(start=-4, end=0)}), "other values"),
    "offsets reversed": (file_bytes({"a": entry(start=4, end=0)}), "instead of 32"),
    "offsets too large": (file_bytes({"a": entry(start=2**63, end=2**63 + 4)}), "other values"),
    "offsets beyond the file": (file_bytes({"a": entry(shape=[2**40], end=2**40)}), "are missing"),
    "size of another shape": (file_bytes({"a": entry(shape=[3])}), "32 bits instead of 24"),
    "half a byte": (file_bytes({"a": entry("F4", [7])}), "instead of 28"),
    "gap at the start": (file_bytes({"a": entry(start=4, end=8)}, 8), "'a' at byte"),
    "overlap": (file_bytes({"a": entry(), "b": entry(start=2, end=6)}, 6), "'b' at byte"),
    "same place": (file_bytes({"a": entry(), "b": entry()}), "'b' at byte"),
}


@pytest.mark.parametrize("case", BAD_FILES)
def test_bad_files_are_refused(tmp_path: Path, case: str) -> None:
    data, found = BAD_FILES[case]
    path = tmp_path / "bad.safetensors"
    path.write_bytes(data)
    with pytest.raises(InputError) as caught:
        read_header(path)
    assert found in caught.value.found
    assert str(path) in caught.value.wanted
    assert caught.value.next_command


@pytest.mark.parametrize("name", ["absent", ".", "absent/x", "x" * 300])
def test_what_is_no_file_is_refused(tmp_path: Path, name: str) -> None:
    with pytest.raises(InputError, match="next: "):
        read_header(tmp_path / name)


def test_missing_shards_are_listed_at_once(sharded: Path) -> None:
    for shard in sharded.glob("model-*"):
        (sharded / ".." / ".." / "blobs" / shard.readlink().name).unlink()
    with pytest.raises(InputError) as caught:
        read_checkpoint(sharded)
    assert caught.value.found == "2 missing: model-00001-of-00002.safetensors, model-00002-of-00002.safetensors"


@pytest.mark.parametrize(
    "shard",
    [
        "../model.safetensors",
        "/etc/model.safetensors",
        "..\\model.safetensors",
        "C:model.safetensors",
        "sub/model.safetensors",
        "..",
        "",
        ".safetensors",
        "pytorch_model.bin",
        "a\n.safetensors",
        "\0.safetensors",
    ],
)
def test_shards_outside_the_directory_are_refused(tmp_path: Path, shard: str) -> None:
    directory = tmp_path / "checkpoint"
    directory.mkdir()
    safetensors_numpy.save_file(ARRAYS, tmp_path / "model.safetensors")
    write_index(directory, {"a": shard})
    with pytest.raises(InputError, match="plain names"):
        read_checkpoint(directory)


@pytest.mark.parametrize("weight_map", [None, {}, [], {"a": 1}, {"a": None}, "model.safetensors"])
def test_an_index_without_a_weight_map_is_refused(tmp_path: Path, weight_map: Any) -> None:
    write_index(tmp_path, weight_map)
    with pytest.raises(InputError, match="a weight_map from tensor to shard"):
        read_checkpoint(tmp_path)


def test_an_index_that_promises_too_much_is_refused(sharded: Path) -> None:
    first, second = (f"model-{number:05}-of-00002.safetensors" for number in (1, 2))
    write_index(sharded, {"a": first, "absent": first, "flag": first, "scalar": second})
    with pytest.raises(InputError) as caught:
        read_checkpoint(sharded)
    assert caught.value.found == f"2 that are not there: 'absent' ({first}), 'flag' ({first})"


def test_a_tensor_in_two_shards_is_refused(tmp_path: Path) -> None:
    for shard in ("x.safetensors", "y.safetensors"):
        safetensors_numpy.save_file({"a": ARRAYS["a"]}, tmp_path / shard)
    write_index(tmp_path, {"a": "x.safetensors", "b": "y.safetensors"})
    with pytest.raises(InputError, match=r"'a' also in x\.safetensors"):
        read_checkpoint(tmp_path)


@pytest.mark.parametrize("name", ["pytorch_model.bin", "pytorch_model-00001-of-00002.bin", "m.pt", "m.pth", "m.ckpt"])
def test_pickled_weights_are_refused(tmp_path: Path, name: str) -> None:
    (tmp_path / name).write_bytes(b"\x80\x04.")
    with pytest.raises(InputError) as caught:
        read_checkpoint(tmp_path)
    assert "pickled" in caught.value.found
    assert name in caught.value.found
    assert "save_pretrained" in caught.value.next_command


def test_a_directory_without_weights_says_what_it_has(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="found no weights"):
        read_checkpoint(tmp_path)
    (tmp_path / "adapter_model.safetensors").touch()
    with pytest.raises(InputError, match=r"found only adapter_model\.safetensors"):
        read_checkpoint(tmp_path)
    with pytest.raises(InputError, match="no directory at"):
        read_checkpoint(tmp_path / "absent")


def check(path: Path, data: bytes) -> None:
    """Read hostile bytes: an InputError, or tensors that fill the file and that the reference takes as well."""
    path.write_bytes(data)
    try:
        tensors = read_header(path)
    except InputError:
        return
    assert accepted_by_reference(data)
    with safetensors.safe_open(path, framework="np") as reference:
        assert set(reference.keys()) == set(tensors)
    end = 8 + struct.unpack("<Q", data[:8])[0]
    for info in tensors.values():
        assert info.offset == end
        end += info.nbytes
    assert end == len(data)


SMALL = safetensors_numpy.save(ARRAYS, metadata={"format": "np"})
VALUES = st.sampled_from(
    [0, 1, -1, 4, 8, 2**63, 2**64, 4.0, True, None, "U8", "F32", "F4", [], {}, [4], [0, 4], [4, 0]]
)


@settings(max_examples=500, deadline=2000)
@given(
    steps=st.lists(
        st.tuples(
            st.sampled_from(["overwrite", "insert", "delete", "cut", "copy"]),
            st.integers(0, len(SMALL) - 1),
            st.integers(0, len(SMALL) - 1),
            st.one_of(st.binary(min_size=1, max_size=8), st.sampled_from([b'"', b"[", b"}", b",", b":{}", b"0", b" "])),
        ),
        min_size=1,
        max_size=4,
    ),
    repair_length=st.booleans(),
)
def test_mutated_files_are_read_or_refused(
    scratch: Path, steps: list[tuple[str, int, int, bytes]], repair_length: bool
) -> None:
    data = SMALL
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
    if repair_length:
        data = struct.pack("<Q", data.rfind(b"}") + 1 - 8 if b"}" in data[8:] else 0) + data[8:]
    check(scratch, data)


@settings(max_examples=300, deadline=2000)
@given(
    header=st.dictionaries(
        st.sampled_from(["a", "b", "__metadata__"]),
        VALUES
        | st.fixed_dictionaries(
            {
                "dtype": st.sampled_from([*DTYPE_BITS, "X"]) | VALUES,
                "shape": st.lists(st.integers(0, 4), max_size=3) | VALUES,
                "data_offsets": st.sampled_from([[0, 0], [0, 4], [4, 8], [0, 8], [2, 6], [0, 2**62]]) | VALUES,
            }
        ),
    ),
    data_bytes=st.sampled_from([0, 4, 8, 16]),
)
def test_generated_headers_are_read_or_refused(scratch: Path, header: dict[str, Any], data_bytes: int) -> None:
    check(scratch, file_bytes(header, data_bytes))


def test_every_cut_of_a_file_is_refused(scratch: Path) -> None:
    for size in range(len(SMALL)):
        scratch.write_bytes(SMALL[:size])
        with pytest.raises(InputError, match="missing"):
            read_header(scratch)
