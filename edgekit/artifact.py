"""An artifact: an immutable directory whose manifest names every file and its sha256."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from pydantic import Field, ValidationError

from edgekit.config import Strict
from edgekit.errors import EdgekitError, ToolError

MANIFEST = "manifest.json"


class FileEntry(Strict):
    """Size and digest of one file."""

    bytes: int
    sha256: str


class Manifest(Strict):
    """What an artifact is made of. Its digest covers everything in it."""

    kind: str
    """`source`, `adapter`, `checkpoint`, `checkpoint[gptq]`, `gguf`, `onnx`, `imatrix`, `reference`, `evaluation`..."""
    files: dict[str, FileEntry]
    """By POSIX path relative to the artifact's directory."""
    facts: dict[str, Any] = Field(default_factory=dict)
    """What the stage found out, e.g. architecture, parameters, licence. Plain JSON."""

    @property
    def digest(self) -> str:
        """Full sha256 (hex) of the canonical JSON of this manifest."""
        return canonical_sha256(self.model_dump())


class CorruptArtifact(EdgekitError):
    """A file of an artifact is missing, extra or not what its manifest says."""

    exit_code = 5


@dataclass(frozen=True)
class Artifact:
    """A directory with its manifest. `path` is read-only by convention."""

    path: Path
    manifest: Manifest

    @property
    def kind(self) -> str:
        """What the manifest says it is."""
        return self.manifest.kind

    @property
    def facts(self) -> dict[str, Any]:
        """What the producing stage found out."""
        return self.manifest.facts

    @cached_property
    def digest(self) -> str:
        """The manifest's digest."""
        return self.manifest.digest

    @property
    def model_path(self) -> Path:
        """What an engine opens: the file of an artifact that is one file, else the directory."""
        names = list(self.manifest.files)
        return self.path / names[0] if len(names) == 1 else self.path

    @property
    def nbytes(self) -> int:
        """Bytes of all files, the manifest not counted."""
        return sum(entry.bytes for entry in self.manifest.files.values())

    def verify(self) -> None:
        """Read every file and compare it with the manifest. Raises CorruptArtifact."""
        present = {name for name in relative_files(self.path) if name != MANIFEST}
        if odd := present.symmetric_difference(self.manifest.files):
            raise CorruptArtifact(f"the files of its manifest in {self.path}", f"a difference in {min(odd)}", _REPAIR)
        for name, entry in self.manifest.files.items():
            path = self.path / name
            if path.stat().st_size != entry.bytes or file_sha256(path) != entry.sha256:
                raise CorruptArtifact(f"sha256 {entry.sha256[:12]}... in {path}", "other content", _REPAIR)


_REPAIR = "edgekit cache verify"


def seal(directory: Path, kind: str, facts: dict[str, Any]) -> Artifact:
    """Hash every file below `directory` and write the manifest, last."""
    files = {name: _entry(directory / name) for name in sorted(relative_files(directory))}
    manifest = Manifest(kind=kind, files=files, facts=facts)
    (directory / MANIFEST).write_text(canonical_json(manifest.model_dump()) + "\n")
    return Artifact(directory, manifest)


def open_artifact(directory: Path) -> Artifact:
    """Read the manifest of an artifact; its files are not read. Raises CorruptArtifact."""
    try:
        return Artifact(directory, Manifest.model_validate_json((directory / MANIFEST).read_bytes()))
    except (OSError, ValidationError) as error:
        reason = (error.strerror or str(error)) if isinstance(error, OSError) else "not a manifest"
        raise CorruptArtifact(f"a manifest in {directory}", reason, _REPAIR) from None


def describe_files(directory: Path, names: list[str]) -> dict[str, FileEntry]:
    """Hash the named files of a directory that is not (yet) an artifact."""
    return {name: _entry(directory / name) for name in sorted(names)}


def relative_files(directory: Path) -> Iterator[str]:
    """Yield the POSIX path of every file below `directory`."""
    for root, _, names in os.walk(directory):
        for name in names:
            yield (Path(root) / name).relative_to(directory).as_posix()


def file_sha256(path: Path) -> str:
    """Hex sha256 of a file's bytes."""
    with path.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def canonical_json(value: Any) -> str:
    """JSON with sorted keys, no white space and no NaN: equal values give equal bytes."""
    return json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=True, allow_nan=False)


def canonical_sha256(value: Any) -> str:
    """Hex sha256 of the canonical JSON of `value`."""
    return hashlib.sha256(canonical_json(value).encode()).hexdigest()


def read_json(path: Path) -> Any:
    """Parse a JSON file of ours. Raises ToolError when it is damaged."""
    try:
        return json.loads(path.read_bytes())
    except (OSError, ValueError) as error:
        raise ToolError(f"readable JSON in {path}", str(error), _REPAIR) from None


def _entry(path: Path) -> FileEntry:
    return FileEntry(bytes=path.stat().st_size, sha256=file_sha256(path))
