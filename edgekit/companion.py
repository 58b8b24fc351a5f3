"""What a user may call a verifier, resolved to files with digests: its manifest is read, no weights."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from edgekit.artifact import Artifact, Manifest, describe_files
from edgekit.errors import InputError
from edgekit.tasks import find_task
from edgekit.verifier import MANIFEST, VerifierManifest, verify_files


@dataclass(frozen=True)
class Companion:
    """A verifier's directory."""

    artifact: Artifact
    manifest: VerifierManifest

    @property
    def nbytes(self) -> int:
        """Bytes of its weights."""
        return sum(file.bytes for name, file in self.manifest.files.items() if name.endswith(".safetensors"))


def resolve_verifier(directory: Path) -> Companion:
    """Read a verifier's manifest and hash its files. Raises InputError for a damaged one."""
    manifest = verify_files(directory)
    if manifest.kind != "head":
        found = f"one of the kind {manifest.kind} in {directory}, which has a trunk of its own"
        raise InputError("a verifier that reads the base's states", found, "edgekit train verifier")
    files = describe_files(directory, [MANIFEST, *manifest.files])
    facts = {"kind": manifest.kind, "domains": list(manifest.domains), "architecture": manifest.architecture.name}
    return Companion(Artifact(directory, Manifest(kind="companion", files=files, facts=facts)), manifest)


def check_verifier(companion: Companion, base_digest: str, engine: str, tasks: Sequence[str]) -> list[str]:
    """Compare a verifier with the model it is to be shipped with; returns what the user should know.

    Raises InputError when it was trained on the states of another model.
    """
    trunk = companion.manifest.trunk
    if trunk.source_digest != base_digest:
        raise InputError(
            f"a verifier trained on this model ({base_digest[:12]}...)",
            f"one for {trunk.name} ({trunk.source_digest[:12]}...)",
            "edgekit train verifier MODEL, with the same adapters",
        )
    notes = []
    if trunk.engine != engine:
        notes.append(f"The verifier was trained on the states that {trunk.engine} gives; this bundle runs on {engine}.")
    domains = companion.manifest.domains
    if unseen := [name for name in tasks if name not in domains]:
        seen = ", ".join(domains)
        notes.append(f"The verifier has not seen {', '.join(unseen)}: outside of {seen} its values may mean nothing.")
    return notes


def check_tasks(names: Sequence[str]) -> None:
    """Raise InputError for a task that there is not."""
    for name in names:
        find_task(name)
