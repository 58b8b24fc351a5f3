"""The content-addressed store: what exists in it is complete, and what is damaged is made again.

    objects/DIGEST/     artifacts, by the digest of their manifest
    steps/KEY.json      which artifact a step with that cache key gave
    tmp/KEY/            a step being executed; renamed to objects/ when its manifest is written
    locks/              one lock file per key, and one for the whole store
    roots/              the bundles that keep their artifacts alive
    tools/              fetched tools, verified by hash

A step's key covers its inputs (see `build.step_key`); an artifact's digest covers its content. A crash at
any moment leaves at most a directory in tmp/, which the next run of that step removes.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
import shutil
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from edgekit.artifact import (
    Artifact,
    CorruptArtifact,
    canonical_json,
    canonical_sha256,
    open_artifact,
    read_json,
    seal,
)
from edgekit.config import Strict
from edgekit.errors import EdgekitError, ToolError


class Record(Strict):
    """The result of one executed step."""

    stage: str
    digest: str
    """Digest of the artifact that the step gave."""
    inputs: tuple[str, ...]
    """Digests of the artifacts it took."""
    seconds: float
    peak_rss_bytes: int


@dataclass(frozen=True)
class Produced:
    """What a step's function leaves besides its files."""

    kind: str
    facts: dict[str, Any]
    peak_rss_bytes: int


@dataclass(frozen=True)
class Collected:
    """What `Store.collect` removed or would remove."""

    objects: tuple[str, ...]
    bytes: int


class Store:
    """A directory shared by builds, also by several at once."""

    def __init__(self, root: Path) -> None:
        """Use `root`, creating nothing: a store that is only read leaves no trace."""
        self.root = root

    @classmethod
    def default(cls) -> Store:
        """The store at `$EDGEKIT_CACHE`, or in the user's cache directory."""
        if configured := os.environ.get("EDGEKIT_CACHE"):
            return cls(Path(configured).expanduser().absolute())
        base = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
        return cls(Path(base) / "edgekit")

    def lookup(self, key: str) -> Record | None:
        """Return the record of a finished step, or None. A damaged record counts as none."""
        try:
            envelope = read_json(self._record_path(key))
            record = Record.model_validate(envelope["record"])
        except (EdgekitError, ValidationError, KeyError, TypeError):
            return None
        return record if envelope.get("sha256") == canonical_sha256([key, envelope["record"]]) else None

    def has(self, digest: str) -> bool:
        """Whether an object is there; its content is not read."""
        return (self._object_path(digest) / "manifest.json").is_file()

    def open(self, digest: str) -> Artifact:
        """Return an object after reading and verifying all of it. Raises CorruptArtifact."""
        artifact = open_artifact(self._object_path(digest))
        if artifact.digest != digest:
            raise CorruptArtifact(f"the manifest of {digest[:12]}...", "another manifest", "edgekit cache verify")
        artifact.verify()
        return artifact

    def peek(self, digest: str) -> Artifact:
        """Return an object without reading more than its manifest. Raises CorruptArtifact."""
        return open_artifact(self._object_path(digest))

    def find(self, key: str) -> Artifact | None:
        """What a finished step gave, verified; None where the step, its object or a part of it is not there."""
        record = self.lookup(key)
        if record is None or not self.has(record.digest):
            return None
        try:
            return self.open(record.digest)
        except CorruptArtifact:
            return None

    def discard(self, digest: str) -> None:
        """Remove a damaged object; the steps that gave it will run again."""
        shutil.rmtree(self._object_path(digest), ignore_errors=True)

    def kept(self, key: str) -> Path:
        """Where a step may keep what a further attempt can go on from; gone once the step is done."""
        return self.root / "tmp" / f"{key}.kept"

    def execute(
        self, key: str, stage: str, inputs: tuple[str, ...], produce: Callable[[Path], Produced]
    ) -> tuple[Artifact, Record, bool]:
        """Run `produce` in a temporary directory and commit it under `key`.

        Another process that executes the same key is waited for, and its result is taken. Returns the
        artifact, its record, and whether it was executed here. Raises ToolError when the disk is full.
        """
        with self.shared(), self.lock(key):
            record = self.lookup(key)
            if record is not None:
                with contextlib.suppress(CorruptArtifact):
                    return self.open(record.digest), record, False
                self.discard(record.digest)
            work = self.root / "tmp" / key
            shutil.rmtree(work, ignore_errors=True)
            work.mkdir(parents=True)
            try:
                started = time.monotonic()
                produced = produce(work)
                artifact = seal(work, produced.kind, produced.facts)
                seconds = time.monotonic() - started
                artifact = self._commit(artifact)
            finally:
                shutil.rmtree(work, ignore_errors=True)
            shutil.rmtree(self.kept(key), ignore_errors=True)
            record = Record(
                stage=stage,
                digest=artifact.digest,
                inputs=inputs,
                seconds=seconds,
                peak_rss_bytes=produced.peak_rss_bytes,
            )
            fields = record.model_dump()
            self._write(self._record_path(key), {"record": fields, "sha256": canonical_sha256([key, fields])})
            return artifact, record, True

    def keep(self, bundle: Path, digests: list[str]) -> None:
        """Register a bundle: as long as its directory exists, `collect` keeps these objects."""
        with self.shared():
            name = canonical_sha256(str(bundle.absolute()))
            self._write(self.root / "roots" / f"{name}.json", {"bundle": str(bundle.absolute()), "keep": digests})

    def objects(self) -> Iterator[Artifact]:
        """Yield every object whose manifest can be read."""
        for directory in sorted(self._children("objects")):
            with contextlib.suppress(CorruptArtifact):
                yield open_artifact(directory)

    def verify(self, on_object: Callable[[str], None] = lambda digest: None) -> list[CorruptArtifact]:
        """Read every object; remove the damaged ones and return what was wrong with each."""
        problems = []
        for directory in sorted(self._children("objects")):
            on_object(directory.name)
            try:
                self.open(directory.name)
            except CorruptArtifact as problem:
                problems.append(problem)
                self.discard(directory.name)
        return problems

    def collect(self, *, everything: bool = False, dry_run: bool = False) -> Collected:
        """Remove objects that no existing bundle needs, and what killed builds left behind.

        Raises ToolError while a build uses the store.
        """
        with self._guard_disk(), self._exclusive():
            kept: set[str] = set()
            for path in self._children("roots"):
                keep = () if everything else _kept_by(path)
                kept.update(keep)
                if not keep and not dry_run:
                    path.unlink()
            doomed = [path for path in self._children("objects") if path.name not in kept]
            size = sum(f.stat().st_size for path in doomed for f in path.rglob("*") if f.is_file())
            if not dry_run:
                for path in [*doomed, *self._children("tmp"), *self._children("locks")]:
                    shutil.rmtree(path, ignore_errors=True) if path.is_dir() else self._forget_lock(path)
                for path in self._children("steps"):
                    record = self.lookup(path.stem)
                    if record is None or not self.has(record.digest):
                        path.unlink()
                for path in [*self.root.glob("steps/.*"), *self.root.glob("roots/.*")]:
                    path.unlink()
            return Collected(tuple(path.name for path in doomed), size)

    def tool(self, name: str, sha256: str, fetch: Callable[[Path], None]) -> Path:
        """Return the directory of a fetched tool; `fetch` fills it once, under a lock.

        The directory's content is hashed when it is made, and compared on every use.
        """
        with self.shared(), self.lock(f"tool-{name}-{sha256}"):
            final = self._tool_path(name, sha256)
            with contextlib.suppress(CorruptArtifact):
                artifact = open_artifact(final)
                artifact.verify()
                return final
            shutil.rmtree(final, ignore_errors=True)
            work = self.root / "tmp" / f"tool-{name}"
            shutil.rmtree(work, ignore_errors=True)
            work.mkdir(parents=True)
            try:
                fetch(work)
                seal(work, "tool", {"sha256": sha256})
                final.parent.mkdir(parents=True, exist_ok=True)
                work.rename(final)
            finally:
                shutil.rmtree(work, ignore_errors=True)
            return final

    def has_tool(self, name: str, sha256: str) -> bool:
        """Whether a tool was fetched."""
        return (self._tool_path(name, sha256) / "manifest.json").is_file()

    def require_writable(self) -> None:
        """Raise ToolError unless the store can be written; nothing is left there."""
        require_writable(self.root, _OTHER_STORE)

    def free_bytes(self) -> int:
        """Bytes that can still be written where the store is (or will be)."""
        place = self.root
        while not place.exists():
            place = place.parent
        return shutil.disk_usage(place).free

    @contextlib.contextmanager
    def shared(self) -> Iterator[None]:
        """Hold the store against `collect`; builds share it."""
        with self._guard_disk(), self._flock("store", fcntl.LOCK_SH):
            yield

    def lock(self, name: str) -> contextlib.AbstractContextManager[None]:
        """Hold a name against other processes of this store; waits for it."""
        return self._flock(name, fcntl.LOCK_EX)

    @contextlib.contextmanager
    def _exclusive(self) -> Iterator[None]:
        with contextlib.ExitStack() as stack:
            try:
                stack.enter_context(self._flock("store", fcntl.LOCK_EX | fcntl.LOCK_NB))
            except BlockingIOError:
                raise ToolError(
                    "the store to itself", "a build that is using it", "wait for it, then try again"
                ) from None
            yield

    @contextlib.contextmanager
    def _flock(self, name: str, operation: int) -> Iterator[None]:
        # the kernel drops the lock with its process, so a kill leaves nothing to clean up
        locks = self.root / "locks"
        if not locks.is_dir():
            self.require_writable()
            locks.mkdir(parents=True, exist_ok=True)
        with (locks / name).open("a") as handle:
            fcntl.flock(handle, operation)
            yield

    def _forget_lock(self, path: Path) -> None:
        if path.name != "store":
            path.unlink(missing_ok=True)

    def _commit(self, artifact: Artifact) -> Artifact:
        final = self._object_path(artifact.digest)
        final.parent.mkdir(parents=True, exist_ok=True)
        try:
            artifact.path.rename(final)
        except OSError as error:
            if error.errno not in (errno.ENOTEMPTY, errno.EEXIST):
                raise
            # another step gave the same content; keep it unless it is damaged
            try:
                return self.open(artifact.digest)
            except CorruptArtifact:
                self.discard(artifact.digest)
                artifact.path.rename(final)
        return Artifact(final, artifact.manifest)

    def _write(self, path: Path, value: Any) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary = path.with_name(f".{path.name}.{os.getpid()}")
        try:
            temporary.write_text(canonical_json(value) + "\n")
            temporary.replace(path)
        finally:
            temporary.unlink(missing_ok=True)

    def _children(self, name: str) -> list[Path]:
        with self._guard_disk(), contextlib.suppress(FileNotFoundError):
            return sorted(p for p in (self.root / name).iterdir() if not p.name.startswith("."))
        return []

    def _object_path(self, digest: str) -> Path:
        return self.root / "objects" / digest

    def _tool_path(self, name: str, sha256: str) -> Path:
        return self.root / "tools" / f"{name}-{sha256[:16]}"

    def _record_path(self, key: str) -> Path:
        return self.root / "steps" / f"{key}.json"

    @contextlib.contextmanager
    def _guard_disk(self) -> Iterator[None]:
        with explain_disk(self.root, _OTHER_STORE):
            yield


def _kept_by(root: Path) -> tuple[str, ...]:
    """Digests that a root keeps: none once its bundle is gone, nor when it cannot be read."""
    with contextlib.suppress(ToolError, KeyError, TypeError):
        fields = read_json(root)
        if Path(fields["bundle"]).is_dir():
            return tuple(fields["keep"])
    return ()


_OTHER_STORE = "set EDGEKIT_CACHE to another directory"


def require_writable(directory: Path, advice: str) -> None:
    """Raise ToolError unless `directory` is, or could be made, a directory to write in; nothing is left there.

    It is tried out: permissions do not tell of read-only mounts and of file systems like /proc.
    """
    place = directory
    try:
        place = next(path for path in (directory, *directory.absolute().parents) if os.path.lexists(path))
        tempfile.TemporaryDirectory(prefix=".edgekit-", dir=place).cleanup()
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise _disk_full(place) from None
        found = f"{error.strerror} in {place}" if place.is_dir() else f"{place}, a file"
        raise ToolError(f"a writable directory at {directory}", found, advice) from None


@contextlib.contextmanager
def explain_disk(place: Path, advice: str = "choose another place") -> Iterator[None]:
    """Turn a full disk or an unwritable directory into a ToolError; other errors pass unchanged.

    Tools report a full disk in their own words, so the text of any exception is read for it too.
    """
    try:
        yield
    except EdgekitError as error:
        if isinstance(error, ToolError) and "No space left" in error.found and "free" not in error.wanted:
            raise _disk_full(place) from None
        raise
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise _disk_full(place) from None
        if error.errno in (errno.EACCES, errno.EROFS, errno.EPERM, errno.ENOTDIR):
            where = error.filename or place
            raise ToolError(f"a writable directory at {place}", f"{error.strerror}: {where}", advice) from None
        raise
    except Exception as error:
        if "No space left" in str(error) or "os error 28" in str(error):
            raise _disk_full(place) from None
        raise


def _disk_full(place: Path) -> ToolError:
    return ToolError(
        f"free space at {place}", "a full disk (No space left on device)", "edgekit cache gc, or set EDGEKIT_CACHE"
    )
