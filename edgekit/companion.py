"""What a user may call a verifier, resolved to files with digests; and a verifier, opened beside its model."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from edgekit.artifact import Artifact, Manifest, describe_files
from edgekit.engine import Engine, EngineOptions
from edgekit.engines import find_engine
from edgekit.errors import InputError
from edgekit.model import ModelShape, model_shape, resolve_model
from edgekit.tasks import find_task
from edgekit.verifier import (
    MANIFEST,
    MODEL_DIRECTORY,
    TRUNK,
    OwnTrunk,
    Verifier,
    VerifierManifest,
    load_head,
    verify_files,
)


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
    check_engine(companion.manifest.kind, engine)
    notes = []
    if trunk.engine != engine and not companion.has_trunk:
        notes.append(f"The verifier was trained on the states that {trunk.engine} gives; this bundle runs on {engine}.")
    domains = companion.manifest.domains
    if unseen := [name for name in tasks if name not in domains]:
        seen = ", ".join(domains)
        notes.append(f"The verifier has not seen {', '.join(unseen)}: outside of {seen} its values may mean nothing.")
    return notes


@contextmanager
def open_verifier(directory: Path, base: Engine, options: EngineOptions) -> Iterator[Verifier]:
    """Open a verifier beside the model that it is for, until the block ends.

    One with a trunk of its own opens it in llama.cpp: a LoRA over the weights of `base`, or a model. `options` are
    those that the base was opened with; the trunk needs one sequence. Raises InputError as `load_head` does, and for
    a base that cannot have an adapter beside it.
    """
    manifest, head = load_head(directory)
    if manifest.kind == "head":
        yield head
        return
    path = directory / TRUNK
    if TRUNK not in manifest.files:
        raise InputError(f"a built verifier, with {TRUNK}", f"one as it was trained in {directory}", "edgekit build")
    verify_files(directory, [TRUNK])
    own = replace(options, sequences=1, total_tokens=None)
    opens = find_engine("llama_cpp").open_model if manifest.kind == "model" else getattr(base, "adapted", None)
    if opens is None:
        raise InputError("llama.cpp, which runs a LoRA beside the base", type(base).__name__, "build a GGUF recipe")
    to_text = (lambda tokens: base.detokenize(tokens).decode("utf-8", "replace")) if manifest.reads_text else None
    engine: Any = opens(path, own)
    with OwnTrunk(engine, head, to_text=to_text, weight_bytes=engine.weight_bytes) as trunk:
        yield trunk


def check_engine(kind: str, engine: str) -> None:
    """Raise InputError for a verifier with a trunk of its own on another engine than llama.cpp."""
    if kind != "head" and engine != "llama_cpp":
        wanted = f"a recipe for llama.cpp, which runs the {kind} of a verifier"
        raise InputError(wanted, f"one for {engine}", "--recipe gguf-q4, or train a head")


def check_tasks(names: Sequence[str]) -> None:
    """Raise InputError for a task that there is not."""
    for name in names:
        find_task(name)
