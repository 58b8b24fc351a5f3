"""What a user may call a verifier, resolved to files with digests: its manifest is read, no weights."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from edgekit.artifact import Artifact, Manifest, describe_files
from edgekit.errors import InputError
from edgekit.model import ModelShape, model_shape, resolve_model
from edgekit.tasks import find_task
from edgekit.verifier import MANIFEST, MODEL_DIRECTORY, VerifierManifest, verify_files


@dataclass(frozen=True)
class Companion:
    """A verifier's directory."""

    artifact: Artifact
    manifest: VerifierManifest

    @property
    def nbytes(self) -> int:
        """Bytes of its weights, as they were trained."""
        return sum(file.bytes for name, file in self.manifest.files.items() if name.endswith(".safetensors"))

    @property
    def has_trunk(self) -> bool:
        """Whether it computes hidden states of its own."""
        return self.manifest.kind != "head"

    def trunk_shape(self) -> ModelShape | None:
        """Dimensions of the model that it brings; None where it reads the base."""
        if self.manifest.kind != "model":
            return None
        return model_shape(resolve_model(str(self.artifact.path / MODEL_DIRECTORY)).artifact)


def resolve_verifier(directory: Path) -> Companion:
    """Read a verifier's manifest and hash its files. Raises InputError for a damaged one."""
    manifest = verify_files(directory)
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
    if companion.has_trunk and engine != "llama_cpp":
        wanted = f"a recipe for llama.cpp, which runs the {companion.manifest.kind} of this verifier"
        raise InputError(wanted, f"one for {engine}", "--recipe gguf-q4, or train a head")
    notes = []
    if trunk.engine != engine and not companion.has_trunk:
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
