"""The bundle: one directory per target that a device runs, with everything needed to check where it came from."""

from __future__ import annotations

import contextlib
import json
import os
import re
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar, cast

import jinja2
import psutil
from pydantic import Field, NonNegativeFloat, NonNegativeInt, PositiveInt, ValidationError

import edgekit
from edgekit import companion
from edgekit.artifact import (
    Artifact,
    CorruptArtifact,
    FileEntry,
    canonical_sha256,
    describe_files,
    file_sha256,
    relative_files,
)
from edgekit.build import Built
from edgekit.config import Strict, explain
from edgekit.decode import MAX_TILT, Choice, Options, Sampling, Traffic
from edgekit.engine import Engine, EngineOptions
from edgekit.engines import find_engine
from edgekit.errors import InputError
from edgekit.measure.strategies import StrategyRow
from edgekit.plan import Plan, choose_strategy
from edgekit.prefix import Prefixed, StateEngine, load_prefix
from edgekit.report import Report
from edgekit.report.write import write_report
from edgekit.store import explain_disk, require_writable
from edgekit.tools import copy_file, tool_version
from edgekit.verifier import Verifier

M = TypeVar("M", bound=Strict)

MANIFEST = "manifest.json"
SETTINGS = "settings.json"
MODEL_DIRECTORY = "model"
"""Where a model of several files goes; one of a single file keeps its name at the top."""
TOKENIZER_DIRECTORY = "tokenizer"
VERIFIER_DIRECTORY = "verifier"
REPORT_FILES = ("report.html", "report.json", "report.md")
_TOKENIZER_FILES = ("*.json", "*.jinja", "*.model", "merges.txt", "vocab.txt", "LICENSE*")
_NOT_TOKENIZER = ("manifest.json", "model.safetensors.index.json")


class DecodeSettings(Strict):
    """How the bundle answers: the strategy and its arguments, as `edgekit.decode.Options` has them."""

    strategy: str = "greedy"
    candidates: PositiveInt = 8
    max_tokens: PositiveInt = 256
    temperature: NonNegativeFloat = 0.7
    top_k: NonNegativeInt = 0
    top_p: Annotated[float, Field(gt=0, le=1)] = 0.95
    min_p: Annotated[float, Field(ge=0, lt=1)] = 0.0
    top_n_sigma: NonNegativeFloat = 0.0
    stop: tuple[str, ...] = ()
    answer: str = "text"
    block_tokens: PositiveInt = 16
    width: PositiveInt = 4
    steps: PositiveInt = 64
    momentum: Annotated[float, Field(ge=0, le=1)] | None = None
    tilt: Annotated[float, Field(gt=0, le=MAX_TILT)] = 1.0
    choices: tuple[tuple[float, str, PositiveInt], ...] = ()
    """For `auto`: (difficulty, strategy, candidates), measured when the bundle was built."""

    def options(self, **changes: Any) -> Options:
        """Options of a session; `changes` are further arguments, or other values."""
        fields = self.model_dump(exclude={"strategy", "choices"}) | changes
        filters = ("temperature", "top_k", "top_p", "min_p", "top_n_sigma")
        sampling = Sampling(**{name: fields.pop(name) for name in filters})
        choices = tuple(Choice(*choice) for choice in self.choices)
        return Options(sampling=sampling, choices=choices, **fields)


class TrafficSettings(Strict):
    """What a step costs on the target, as `edgekit.decode.Traffic` has it."""

    weight_bytes: NonNegativeInt = 0
    kv_bytes_per_token: NonNegativeInt = 0
    watts: NonNegativeFloat | None = None

    def counted(self) -> Traffic:
        """As a session takes it."""
        return Traffic(**self.model_dump())


class Settings(Strict):
    """How to run the bundle: what `edgekit run` reads."""

    engine: str
    model: str = "model.gguf"
    """The file or directory that the engine opens."""
    tokenizer: str = TOKENIZER_DIRECTORY
    """The directory with tokenizer and chat template in Hugging Face layout."""
    context_tokens: int
    threads: int | None
    """CPU threads; None takes the physical cores of the machine it runs on."""
    kv_type: str
    decode: DecodeSettings = DecodeSettings()
    traffic: TrafficSettings = TrafficSettings()
    verifier: str | None = None
    """The directory of the verifier."""
    prefix: str | None = None
    """A file with the precomputed start of every sequence."""
    system: str | None = None
    """The system prompt that the prefix holds."""

    @property
    def paths(self) -> tuple[str, ...]:
        """What it names of the bundle."""
        return tuple(filter(None, (self.model, self.tokenizer, self.verifier, self.prefix)))

    def options(self, threads: int | None = None, candidates: int = 1) -> EngineOptions:
        """Engine options, for the machine that opens the model; `threads` overrides the settings.

        Candidates share one KV cache of the context's size: several cost no more memory than the plan foresees.
        """
        return EngineOptions(
            context_tokens=self.context_tokens,
            # a prefix is held in a sequence of its own
            sequences=candidates + (self.prefix is not None),
            total_tokens=self.context_tokens if candidates > 1 else None,
            threads=threads or self.threads,
            kv_type=self.kv_type,
            fall_back=True,
        )


class BundleManifest(Strict):
    """The bundle's table of contents. `digest` covers `files`; measurements are listed apart, for they vary."""

    schema_version: Literal[1] = 1
    edgekit_version: str
    digest: str
    target: dict[str, Any]
    recipe: dict[str, Any]
    model: dict[str, Any]
    """name, uri, revision, source digest, licence, architecture, parameters."""
    tools: dict[str, str | None]
    steps: tuple[dict[str, str], ...]
    """stage and cache key of every step."""
    files: dict[str, FileEntry]
    measurements: dict[str, FileEntry]


@dataclass(frozen=True)
class Bundle:
    """An opened bundle."""

    path: Path
    manifest: BundleManifest
    settings: Settings

    @property
    def model(self) -> Path:
        """What the engine opens."""
        return self.path / self.settings.model

    def verify(self) -> None:
        """Compare every file with the manifest. Raises CorruptArtifact."""
        for name, entry in {**self.manifest.files, **self.manifest.measurements}.items():
            path = self.path / name
            if not path.is_file():
                raise CorruptArtifact(f"the file {path} of the manifest", "no such file", _REBUILD)
            if path.stat().st_size != entry.bytes or file_sha256(path) != entry.sha256:
                raise CorruptArtifact(f"sha256 {entry.sha256[:12]}... in {path}", "other content", _REBUILD)


def open_bundle(path: Path) -> Bundle:
    """Read a bundle's manifest and settings. Raises InputError when the directory is not a bundle."""
    if not (path / MANIFEST).is_file():
        found = f"no {MANIFEST} in {path}" if path.is_dir() else f"{path}, a file" if path.exists() else f"no {path}"
        # `edgekit build --out dist` puts a bundle for each target there
        inside = next((found.parent for found in sorted(path.glob(f"*/{MANIFEST}"))), None)
        raise InputError(
            "a bundle directory", found, f"name one: {inside}" if inside else "edgekit build --target local"
        )
    manifest = _read(path / MANIFEST, BundleManifest)
    settings = _read(path / SETTINGS, Settings)
    for name in (*manifest.files, *manifest.measurements, *settings.paths):
        if Path(name).is_absolute() or ".." in Path(name).parts:
            raise InputError(f"files inside {path}", f"{name!r} in its manifest or settings", "do not use this bundle")
    return Bundle(path, manifest, settings)


def open_engine(bundle: Bundle, threads: int | None = None, candidates: int = 1) -> Engine:
    """Open a bundle's model as its settings say, behind its prefix where it has one. Raises as engines do."""
    settings = bundle.settings
    engine = find_engine(settings.engine).open_model(bundle.model, settings.options(threads, candidates))
    if settings.prefix is None:
        return engine
    try:
        loaded = load_prefix(
            cast(StateEngine, engine),
            bundle.path / settings.prefix,
            model_sha256=bundle.manifest.files[settings.model].sha256,
            kv_type=settings.kv_type,
        )
    except BaseException:
        engine.close()
        raise
    return Prefixed(engine, loaded)


def open_verifier(
    bundle: Bundle, engine: Engine, threads: int | None = None
) -> contextlib.AbstractContextManager[Verifier | None]:
    """The bundle's verifier beside its open model, for a `with`; None where it has none.

    Raises InputError when it is damaged.
    """
    if bundle.settings.verifier is None:
        return contextlib.nullcontext()
    return companion.open_verifier(bundle.path / bundle.settings.verifier, engine, bundle.settings.options(threads))


def _read(path: Path, model: type[M]) -> M:
    try:
        return model.model_validate_json(path.read_bytes())
    except OSError as error:
        found = f"{path}: {error.strerror}"
    except ValidationError as error:
        problems = [f"{'.'.join(map(str, e['loc']))}: {explain(model, e)}".removeprefix(": ") for e in error.errors()]
        more = f" and {len(problems) - 3} more" if len(problems) > 3 else ""
        found = f"{path}: {'; '.join(problems[:3])}{more}"
    raise InputError("a bundle of this edgekit", found, _REBUILD) from None


_REBUILD = "build the bundle again"


def check_place(final: Path) -> None:
    """Check, before hours are spent, that a bundle can be put there; clean up after killed builds.

    Raises InputError when the place holds something that is not a bundle, ToolError when it is not writable.
    """
    if final.exists() and not (final / MANIFEST).is_file() and any(final.iterdir() if final.is_dir() else [final]):
        raise InputError(
            f"a bundle or nothing at {final}", "something else, which is left alone", "choose another --out"
        )
    require_writable(final.parent, "choose another --out")
    for left in final.parent.glob(f".{final.name}.*"):
        owner = re.fullmatch(r"(part|old)-(\d+)", left.name.removeprefix(f".{final.name}."))
        if owner is None or psutil.pid_exists(int(owner[2])):
            continue
        # a kill between the two renames of a swap left the good bundle under its other name
        if owner[1] == "old" and not final.exists():
            left.rename(final)
        else:
            discard(left)


def stage_bundle(plan: Plan, built: Built, out: Path) -> Path:
    """Write the bundle without its report next to its final place; returns the temporary directory."""
    work = out / f".{plan.target.name}.part-{os.getpid()}"
    discard(work)
    with explain_disk(out), contextlib.ExitStack() as stack:
        stack.callback(discard, work)
        work.mkdir(parents=True)
        settings = settings_of(plan, built)
        place = work if _is_one_file(built.result) else work / MODEL_DIRECTORY
        for name in built.result.manifest.files:
            copy_file(built.result.path / name, place / name)
        if settings.tokenizer == TOKENIZER_DIRECTORY:
            names = {p.name for pattern in _TOKENIZER_FILES for p in built.checkpoint.path.glob(pattern)}
            for name in sorted(names.difference(_NOT_TOKENIZER)):
                copy_file(built.checkpoint.path / name, work / TOKENIZER_DIRECTORY / name)
        if built.verifier is not None:
            for name in built.verifier.manifest.files:
                copy_file(built.verifier.path / name, work / VERIFIER_DIRECTORY / name)
        if built.prefix is not None:
            copy_file(built.prefix.model_path, work / built.prefix.model_path.name)
        (work / SETTINGS).write_text(settings.model_dump_json(indent=2) + "\n")
        (work / "README.md").write_text(_readme(plan, built))
        stack.pop_all()
    return work


def finish_bundle(plan: Plan, built: Built, report: Report, work: Path, out: Path) -> Bundle:
    """Add report and manifest, then put the bundle in its place; one that is there is moved aside first."""
    final = out / plan.target.name
    with explain_disk(out):
        write_report(report, work)
        names = [name for name in relative_files(work) if name not in REPORT_FILES]
        files = describe_files(work, names)
        manifest = BundleManifest(
            edgekit_version=edgekit.__version__,
            digest=canonical_sha256({name: entry.sha256 for name, entry in files.items()}),
            target=plan.target.model_dump(mode="json"),
            recipe=plan.recipe.describe(),
            model=model_summary(plan, built),
            tools={name: tool_version(name) for name in plan.tools},
            steps=tuple({"stage": step.stage, "key": step.key} for step in built.steps),
            files=files,
            measurements=describe_files(work, list(REPORT_FILES)),
        )
        text = json.dumps(manifest.model_dump(mode="json"), indent=2, sort_keys=True) + "\n"
        (work / MANIFEST).write_text(text)
        swap(work, final)
    return Bundle(final, manifest, settings_of(plan, built))


def discard(work: Path) -> None:
    """Remove an unfinished bundle."""
    shutil.rmtree(work, ignore_errors=True)


def settings_of(plan: Plan, built: Built) -> Settings:
    """The settings that the plan was made for."""
    here = plan.target.name == "local"
    one_file = _is_one_file(built.result)
    return Settings(
        engine=plan.recipe.engine,
        model=built.result.model_path.name if one_file else MODEL_DIRECTORY,
        tokenizer=TOKENIZER_DIRECTORY if one_file else MODEL_DIRECTORY,
        decode=_decode_settings(plan, built),
        verifier=None if built.verifier is None else VERIFIER_DIRECTORY,
        prefix=None if built.prefix is None else built.prefix.model_path.name,
        system=next(
            (getattr(params, "system", None) for stage, params in plan.recipe.stages if stage.name == "prefix"), None
        ),
        context_tokens=plan.context_tokens,
        threads=None if here else plan.target.compute.threads,
        kv_type=plan.kv_type,
        traffic=TrafficSettings(
            weight_bytes=plan.weight_bytes,
            kv_bytes_per_token=plan.memory.kv_cache_bytes // plan.context_tokens,
            watts=watts.value if (watts := plan.target.power.typical_w or plan.target.power.max_w) else None,
        ),
    )


def _decode_settings(plan: Plan, built: Built) -> DecodeSettings:
    """The strategy that got most right within the bound on `answer_s`, where strategies were measured."""
    if built.strategies is None:
        return DecodeSettings()
    chosen = choose_strategy(plan, strategy_rows(built))
    asked = built.strategies.facts["decode"]
    return DecodeSettings.model_validate({**asked, "strategy": chosen.strategy, "candidates": chosen.candidates})


def strategy_rows(built: Built) -> tuple[StrategyRow, ...]:
    """What the strategies got right and cost."""
    rows = () if built.strategies is None else built.strategies.facts["rows"]
    return tuple(StrategyRow.model_validate(row) for row in rows)


def _is_one_file(artifact: Artifact) -> bool:
    return artifact.model_path != artifact.path


def model_summary(plan: Plan, built: Built) -> dict[str, Any]:
    """Where the model comes from."""
    wanted = ("name", "licence", "architecture", "parameters", "source_digest", "format")
    return {
        **{key: built.checkpoint.facts[key] for key in wanted},
        "uri": plan.source.uri,
        "revision": plan.source.revision,
        "digest": built.checkpoint.digest,
        "adapters": [
            {**adapter.artifact.facts, "weight": adapter.weight, "digest": adapter.artifact.digest}
            for adapter in plan.adapters
        ],
    }


def swap(work: Path, final: Path) -> None:
    """Put a finished directory in its place; one that is there is moved aside first, and back if that fails."""
    old = final.with_name(f".{final.name}.old-{os.getpid()}")
    if final.exists():
        final.rename(old)
    try:
        work.rename(final)
    except OSError:
        if old.exists():
            old.rename(final)
        raise
    shutil.rmtree(old, ignore_errors=True)


def _readme(plan: Plan, built: Built) -> str:
    template = jinja2.Template(
        Path(__file__).with_name("bundle_readme.md.j2").read_text(),
        keep_trailing_newline=True,
        undefined=jinja2.StrictUndefined,
    )
    values: Mapping[str, Any] = {
        "target": plan.target,
        "recipe": plan.recipe,
        "model": model_summary(plan, built),
        "settings": settings_of(plan, built),
        "install": _install(plan),
        "version": edgekit.__version__,
    }
    return str(template.render(values))


def _install(plan: Plan) -> str:
    """The command that installs the bundle's engine on the target."""
    extra = {"llama_cpp": "gguf", "onnxruntime": "onnx"}.get(plan.recipe.engine, "build,quantize")
    command = f"pip install --constraint constraints.txt -e '.[{extra}]'"
    flag = _GGML_FLAGS.get(plan.target.compute.accelerator) if extra == "gguf" else None
    return f"CMAKE_ARGS=-D{flag}=on {command}" if flag else command


_GGML_FLAGS = {"cuda": "GGML_CUDA", "metal": "GGML_METAL", "vulkan": "GGML_VULKAN", "sycl": "GGML_SYCL"}
"""What llama-cpp-python is compiled with for an accelerator."""
