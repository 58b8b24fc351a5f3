"""The store: what exists is complete, what is damaged is found and made again."""

from __future__ import annotations

import contextlib
import json
import multiprocessing
import os
import shutil
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import tiny

from edgekit.artifact import Artifact, CorruptArtifact, canonical_sha256
from edgekit.errors import InputError, ToolError
from edgekit.store import Produced, Store

KEY = "k" * 64


def make(text: str = "content", seconds: float = 0.0) -> Callable[[Path], Produced]:
    def produce(work: Path) -> Produced:
        (work / "sub").mkdir()
        (work / "sub" / "file.txt").write_text(text)
        (work / "other.bin").write_bytes(bytes(range(256)))
        time.sleep(seconds)
        return Produced("checkpoint", {"name": "x"}, 1)

    return produce


def put(store: Store, key: str = KEY, text: str = "content") -> Artifact:
    return store.execute(key, "stage", (), make(text))[0]


@pytest.fixture
def store(tmp_path: Path) -> Store:
    return Store(tmp_path / "store")


def listing(root: Path) -> dict[str, bytes]:
    return {p.relative_to(root).as_posix(): p.read_bytes() for p in root.rglob("*") if p.is_file()}


# --- looking and committing


def test_looking_leaves_no_trace(store: Store) -> None:
    assert store.lookup(KEY) is None
    assert not store.has(KEY)
    assert list(store.objects()) == []
    assert store.verify() == []
    assert store.free_bytes() > 0
    assert not store.root.exists()


def test_a_result_is_found_again_and_is_not_made_twice(store: Store) -> None:
    artifact, record, executed = store.execute(KEY, "stage", ("in",), make())
    assert executed
    assert store.lookup(KEY) == record
    assert (record.digest, record.stage, record.inputs) == (artifact.digest, "stage", ("in",))
    again, _, executed = store.execute(KEY, "stage", ("in",), make("never run"))
    assert not executed
    assert (again.path / "sub" / "file.txt").read_text() == "content"
    assert store.open(artifact.digest).manifest == artifact.manifest


def test_equal_content_of_two_keys_is_stored_once(store: Store) -> None:
    assert put(store, "a" * 64).digest == put(store, "b" * 64).digest
    assert len(list(store.objects())) == 1
    assert put(store, "c" * 64, "other").digest != put(store, "a" * 64).digest


def test_equal_content_replaces_a_damaged_object(store: Store) -> None:
    damaged = put(store, "a" * 64)
    (damaged.path / "other.bin").write_bytes(b"")
    assert put(store, "b" * 64).digest == damaged.digest
    assert store.verify() == []


@pytest.mark.parametrize("error", [RuntimeError("x"), KeyboardInterrupt(), InputError("a", "b", "c")])
def test_failures_leave_nothing_and_are_not_cached(store: Store, error: BaseException) -> None:
    def fail(work: Path) -> Produced:
        (work / "half").write_text("half")
        raise error

    with pytest.raises(type(error)):
        store.execute(KEY, "stage", (), fail)
    assert store.lookup(KEY) is None
    assert set(listing(store.root)) == {"locks/store", f"locks/{KEY}"}
    assert put(store).facts == {"name": "x"}


def test_nothing_is_visible_before_it_is_complete(store: Store) -> None:
    seen: list[Any] = []

    def produce(work: Path) -> Produced:
        done = make()(work)
        seen.extend([store.lookup(KEY), list(store.objects())])
        return done

    store.execute(KEY, "stage", (), produce)
    assert seen == [None, []]


def test_leftovers_of_a_killed_step_are_not_taken_over(store: Store) -> None:
    left = store.root / "tmp" / KEY
    left.mkdir(parents=True)
    (left / "alien").write_text("from a killed build")
    assert "alien" not in put(store).manifest.files


# --- several processes


def _contend(root: Path, log: Path, key: str) -> None:
    def produce(work: Path) -> Produced:
        with log.open("a") as stream:
            stream.write("executed\n")
        return make(seconds=0.3)(work)

    _, _, executed = Store(root).execute(key, "stage", (), produce)
    with log.open("a") as stream:
        stream.write(f"returned {executed}\n")


def test_processes_with_one_key_execute_it_once(store: Store, tmp_path: Path) -> None:
    log = tmp_path / "log"
    context = multiprocessing.get_context("fork")
    workers = [context.Process(target=_contend, args=(store.root, log, KEY)) for _ in range(4)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join(30)
        assert worker.exitcode == 0
    lines = log.read_text().splitlines()
    assert (lines.count("executed"), lines.count("returned True"), lines.count("returned False")) == (1, 1, 3)


def _meet(root: Path, barrier: Any, key: str) -> None:
    def produce(work: Path) -> Produced:
        barrier.wait(60)
        return make()(work)

    Store(root).execute(key, "stage", (), produce)


def test_different_keys_do_not_wait_for_each_other(store: Store) -> None:
    context = multiprocessing.get_context("fork")
    barrier = context.Barrier(4)
    workers = [context.Process(target=_meet, args=(store.root, barrier, letter * 64)) for letter in "abcd"]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join(90)
        # nobody leaves before all four are inside
        assert worker.exitcode == 0
    assert store.verify() == []


# --- damage


FILES = ("manifest.json", "other.bin", "sub/file.txt")


def flip(path: Path, position: int) -> None:
    content = bytearray(path.read_bytes())
    content[position % len(content)] ^= 0x01
    path.write_bytes(content)


@pytest.mark.parametrize("position", [0, 7, -1])
@pytest.mark.parametrize("name", FILES)
def test_a_flipped_bit_anywhere_is_found(store: Store, name: str, position: int) -> None:
    artifact = put(store)
    path = artifact.path / name
    if name == "manifest.json" and position == -1:
        position = -2  # the very last byte is white space of the JSON
    flip(path, position)
    with pytest.raises(CorruptArtifact):
        store.open(artifact.digest)
    (problem,) = store.verify()
    assert problem.exit_code == 5
    assert not store.has(artifact.digest)
    again, _, executed = store.execute(KEY, "stage", (), make())
    assert executed
    assert again.digest == artifact.digest
    assert store.verify() == []


@pytest.mark.parametrize("change", ["missing", "extra", "shorter", "directory"])
def test_other_damage_is_found(store: Store, change: str) -> None:
    artifact = put(store)
    path = artifact.path / "other.bin"
    if change == "missing":
        path.unlink()
    elif change == "extra":
        (artifact.path / "new").touch()
    elif change == "shorter":
        path.write_bytes(path.read_bytes()[:-1])
    else:
        path.unlink()
        path.mkdir()
    with pytest.raises(CorruptArtifact):
        store.open(artifact.digest)
    assert store.execute(KEY, "stage", (), make())[2]
    assert store.verify() == []


@pytest.mark.parametrize("content", [b"", b"{", b"[]", b"null", b'"x"', b'{"record": {}}', b"\xff\xfe", b"1" * 5000])
def test_a_damaged_record_counts_as_none(store: Store, content: bytes) -> None:
    put(store)
    path = store.root / "steps" / f"{KEY}.json"
    path.write_bytes(content)
    assert store.lookup(KEY) is None
    assert store.execute(KEY, "stage", (), make())[2]
    assert store.lookup(KEY) is not None


def test_a_record_of_another_key_is_not_believed(store: Store) -> None:
    put(store)
    other = "o" * 64
    shutil.copyfile(store.root / "steps" / f"{KEY}.json", store.root / "steps" / f"{other}.json")
    assert store.lookup(other) is None


def test_a_record_changed_by_hand_is_not_believed(store: Store) -> None:
    put(store)
    put(store, "b" * 64, "other")
    path = store.root / "steps" / f"{KEY}.json"
    envelope = json.loads(path.read_text())
    envelope["record"]["digest"] = store.lookup("b" * 64).digest  # type: ignore[union-attr]
    path.write_text(json.dumps(envelope))
    assert store.lookup(KEY) is None


@pytest.mark.parametrize("part", ["header", "middle", "end"])
def test_every_object_of_a_build_is_watched_and_repaired(
    bundles: Any, warm_store: Store, tiny_hf: Path, part: str
) -> None:
    plan = tiny.plan_of(tiny_hf)
    tiny.build_in(warm_store, plan)
    before = {artifact.digest for artifact in warm_store.objects()}
    for artifact in list(warm_store.objects()):
        for name in artifact.manifest.files:
            path = artifact.path / name
            original = path.read_bytes()
            flip(path, {"header": 3, "middle": len(original) // 2, "end": -1}[part])
            with pytest.raises(CorruptArtifact):
                warm_store.open(artifact.digest)
            path.write_bytes(original)
    result = next(a for a in warm_store.objects() if a.digest == tiny.build_in(warm_store, plan).result.digest)
    flip(result.path / "model.gguf", 100_000)
    built = tiny.build_in(warm_store, plan)
    statuses = [step.status for step in built.steps]
    assert statuses.count("executed") == 1
    assert built.result.digest == result.digest
    assert warm_store.verify() == []
    assert {artifact.digest for artifact in warm_store.objects()} == before


# --- collecting


def test_existing_bundles_keep_their_objects(store: Store, tmp_path: Path) -> None:
    kept, doomed = put(store), put(store, "b" * 64, "other")
    bundle = tmp_path / "bundle"
    bundle.mkdir()
    store.keep(bundle, [kept.digest])
    assert store.collect(dry_run=True).objects == (doomed.digest,)
    assert store.has(doomed.digest)
    found = store.collect()
    assert found.objects == (doomed.digest,)
    assert found.bytes >= doomed.nbytes
    assert store.lookup(KEY) is not None
    assert store.lookup("b" * 64) is None
    bundle.rmdir()
    assert store.collect().objects == (kept.digest,)
    assert set(listing(store.root)) == {"locks/store"}


def test_everything_means_everything(store: Store, tmp_path: Path) -> None:
    kept = put(store)
    store.keep(tmp_path, [kept.digest])
    assert store.collect(everything=True).objects == (kept.digest,)
    assert set(listing(store.root)) == {"locks/store"}


def test_collecting_removes_what_killed_builds_left(store: Store) -> None:
    kept = put(store)
    store.keep(store.root, [kept.digest])
    complete = listing(store.root)
    (store.root / "tmp" / "left").mkdir(parents=True)
    (store.root / "tmp" / "left" / "big").write_text("x")
    (store.root / "steps" / ".half.json.999999").write_text("{")
    (store.root / "roots" / ".half.json.999999").write_text("{")
    store.collect()
    assert {n for n in listing(store.root) if "locks" not in n} == {n for n in complete if "locks" not in n}


@pytest.mark.parametrize("content", ["", "{", "[]", '{"bundle": 1}', '{"bundle": "/", "keep": 3}', "{}"])
def test_a_damaged_root_stops_no_collection(store: Store, content: str) -> None:
    put(store)
    (store.root / "roots").mkdir()
    (store.root / "roots" / "x.json").write_text(content)
    assert len(store.collect().objects) == 1


def test_no_collection_while_a_build_uses_the_store(store: Store) -> None:
    artifact = put(store)
    with store.shared(), pytest.raises(ToolError, match="a build that is using it"):
        Store(store.root).collect()
    assert store.has(artifact.digest)
    Store(store.root).collect()


def test_the_bundle_is_kept_by_the_real_build(warm_store: Store, bundles: Any) -> None:
    warm_store.collect()
    for target in bundles.document["targets"]:
        for step in target["steps"]:
            record = warm_store.lookup(step["key"])
            assert record is not None
            assert warm_store.has(record.digest)
    assert warm_store.collect(everything=True).objects


# --- a full disk, and one that cannot be written


@contextlib.contextmanager
def mounted(place: Path, options: str) -> Iterator[Path]:
    place.mkdir()
    done = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", options, "tmpfs", str(place)], capture_output=True, check=False
    )
    if done.returncode:
        pytest.skip(f"mounting is not allowed here: {done.stderr.decode().strip()}")
    try:
        yield place
    finally:
        subprocess.run(["umount", str(place)], check=True)


needs_mount = pytest.mark.skipif(os.geteuid() != 0 or not shutil.which("mount"), reason="mounting needs root")


@needs_mount
def test_a_full_disk_is_said_and_the_store_stays_usable(tmp_path: Path) -> None:
    with mounted(tmp_path / "disk", "size=1m") as disk:
        store = Store(disk / "store")
        first = put(store)

        def fill(work: Path) -> Produced:
            (work / "big").write_bytes(bytes(2 << 20))
            return Produced("checkpoint", {}, 1)

        with pytest.raises(ToolError, match="No space left") as caught:
            store.execute("b" * 64, "stage", (), fill)
        assert caught.value.exit_code == 5
        assert "edgekit cache gc" in caught.value.next_command
        assert list((store.root / "tmp").iterdir()) == []
        assert store.verify() == []
        assert put(store).digest == first.digest
        assert put(store, "c" * 64, "small").facts == {"name": "x"}


@needs_mount
@pytest.mark.parametrize("size", ["256k", "3m", "5m"])
def test_a_build_on_a_full_disk_ends_well(size: str, tmp_path: Path, tools: Path, tiny_hf: Path) -> None:
    with mounted(tmp_path / "disk", f"size={size}") as disk:
        (disk / "tools").symlink_to(tools)
        store = Store(disk)
        with pytest.raises(ToolError) as caught:
            tiny.build_in(store, tiny.plan_of(tiny_hf, "gguf-q4", "evaluation.windows=8", small=False))
        assert caught.value.exit_code == 5
        assert "space" in caught.value.wanted
        assert store.verify() == []
        assert not any((disk / "tmp").glob("*/*"))


@needs_mount
def test_a_full_disk_under_out_leaves_out_empty(warm_store: Store, tiny_hf: Path, tmp_path: Path) -> None:
    with mounted(tmp_path / "out", "size=256k") as out:
        result = tiny.edgekit("build", tiny_hf, "--target", "jetson", "--out", out, *tiny.QUICK)
        assert result.code == 5, result.stderr
        assert "No space left" in result.stderr
        assert list(out.iterdir()) == []


@needs_mount
def test_a_read_only_store(tmp_path: Path) -> None:
    with mounted(tmp_path / "disk", "ro") as disk, pytest.raises(ToolError, match="writable directory"):
        put(Store(disk / "store"))


@pytest.mark.skipif(os.geteuid() == 0, reason="permissions do not bind root")
def test_an_unwritable_store(tmp_path: Path) -> None:
    tmp_path.chmod(0o500)
    with pytest.raises(ToolError, match="writable directory"):
        put(Store(tmp_path / "store"))


def test_a_store_below_a_file(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    for use in (lambda s: put(s), lambda s: s.collect(), lambda s: s.keep(tmp_path, [])):
        with pytest.raises(ToolError, match="writable directory"):
            use(Store(tmp_path / "file" / "store"))


# --- what the key of a record covers


def test_the_format_of_a_record_is_fixed(store: Store) -> None:
    # other versions read these files: a change here must be meant
    artifact = put(store)
    envelope = json.loads((store.root / "steps" / f"{KEY}.json").read_text())
    assert set(envelope) == {"record", "sha256"}
    assert set(envelope["record"]) == {"stage", "digest", "inputs", "seconds", "peak_rss_bytes"}
    assert envelope["sha256"] == canonical_sha256([KEY, envelope["record"]])
    assert artifact.digest == "123cc1b849bd6a0d2f6c2bee9fab7fce6ca072f2e3007c4e2b1f6cc3be03b336"
