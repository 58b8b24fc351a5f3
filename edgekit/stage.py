"""How a stage is declared, and how it is found: the name of its file is its name in recipes."""

from __future__ import annotations

import importlib
import inspect
import pkgutil
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any, Literal, Protocol

from pydantic import Field, PositiveInt, field_validator

import edgekit.stages
from edgekit.artifact import Artifact
from edgekit.calibration import Split
from edgekit.config import Strict
from edgekit.engines import engine_names, find_engine
from edgekit.errors import InputError, suggest
from edgekit.formats.gguf import tensor_bytes
from edgekit.grids import grid_name
from edgekit.store import Store
from edgekit.target import Target


class StageParams(Strict):
    """Base of a stage's parameters. The defaults, filled in, are part of the cache key."""

    @property
    def text_fields(self) -> Mapping[str, Split]:
        """Fields that name a text set, with the split they read: the digest of the text is part of the key."""
        return {}

    @property
    def tools(self) -> tuple[str, ...]:
        """Distributions that change the output because of a parameter, besides those that the stage declares."""
        return ()

    @property
    def target_fields(self) -> tuple[str, ...]:
        """Fields of the target that change the output because of a parameter, besides those that the stage declares."""
        return ()

    @property
    def unused(self) -> frozenset[str]:
        """Kinds that the stage declares in `also` and has no use for with these parameters."""
        return frozenset()


class CalibratedParams(StageParams):
    """Base of the parameters of a stage that reads calibration text."""

    @property
    def text_fields(self) -> Mapping[str, Split]:
        """The calibration text."""
        return {"text": "calibration"}

    text: str = "python-docs"
    """A text set, or the path of a file; only its calibration split is used."""
    windows: PositiveInt = 16
    window_tokens: PositiveInt = 512


class BudgetParams(StageParams):
    """Base of the parameters of a stage that chooses types for a budget of bytes."""

    budget_bytes: PositiveInt | Literal["fit"] | None = None
    """Most bytes of the files that the runtime reads: tensors take the types that lose least, as `sensitivity` measured
    before. `fit`: what the target has room for beside the KV cache, buffers, a companion and the margin."""
    bits_per_weight: float | None = Field(None, gt=0, le=32)
    """The same in bits of the files for each weight; `budget_bytes` counts where both are given."""
    types: tuple[str, ...] | None = None
    """Types that the budget may choose, e.g. those that the target's kernels run fastest; without, all that were
    measured. A tensor that fits none of them may take any."""

    @field_validator("types")
    @classmethod
    def _are_grids(cls, value: tuple[str, ...] | None) -> tuple[str, ...] | None:
        try:
            return None if value is None else tuple(map(grid_name, value))
        except InputError as error:
            raise ValueError(f"{error.found} is no type to round to") from None

    def allowed(self, losses: Mapping[str, float]) -> dict[str, float]:
        """Of the losses of a tensor by type, those of types that may be chosen."""
        found = {name: loss for name, loss in losses.items() if self.types is None or grid_name(name) in self.types}
        return found or dict(losses)

    @property
    def has_budget(self) -> bool:
        """Whether there is one."""
        return self.budget_bytes is not None or self.bits_per_weight is not None

    def budget(self, weights: int) -> int | None:
        """Most bytes of files of so many weights, or None. A plan has put a number where `fit` was."""
        assert self.budget_bytes != "fit"
        if self.budget_bytes is None and self.bits_per_weight is not None:
            return int(weights * self.bits_per_weight / 8)
        return self.budget_bytes


class Progress(Protocol):
    """Called by a stage as it goes on; `total` is None where it is not known."""

    def __call__(self, done: int, total: int | None = None, unit: str = "") -> None:
        """Report `done` of `total` units."""


@dataclass(frozen=True)
class StageContext:
    """What a stage may see besides its input and parameters."""

    store: Store
    """For fetched tools only; a stage writes nothing else there."""
    side: Mapping[str, Artifact] = field(default_factory=dict)
    """Artifacts of the kinds that the stage declared in `also`, where the plan had one."""
    target: Target | None = None
    """Only the fields declared in `target_fields` may be read: only they are part of the key."""
    progress: Progress = lambda done, total=None, unit="": None
    kept: Path | None = None
    """A directory for what a further attempt can go on from, should this one be cut off; it need not exist."""


@dataclass(frozen=True)
class Tensor:
    """A tensor of the planned model: GGUF name, shape (innermost first) and storage type."""

    name: str
    shape: tuple[int, ...]
    type: str
    stored_bytes: int | None = None
    """For a type that GGUF does not know: bytes of all its parts (codes, scales, zero points)."""

    @property
    def nbytes(self) -> int:
        """Bytes that the tensor occupies in a file."""
        return tensor_bytes(self.type, self.shape) if self.stored_bytes is None else self.stored_bytes


Facts = dict[str, Any]
Run = Callable[[Artifact, Path, Any, StageContext], Facts]


@dataclass(frozen=True)
class Stage:
    """A declared stage."""

    name: str
    version: int
    takes: tuple[str, ...]
    gives: str
    also: tuple[str, ...]
    tools: tuple[str, ...]
    target_fields: tuple[str, ...]
    reports: bool
    params: type[StageParams]
    run: Run
    summary: str

    def predict(
        self,
        tensors: Sequence[Tensor],
        params: StageParams,
        side: frozenset[str],
        *,
        shape: Any = None,
        target: Target | None = None,
    ) -> tuple[Sequence[Tensor], Sequence[str]]:
        """Tensors after this stage, and notes on them, without reading weights.

        A stage module states this as a function `predict` of tensors, parameters and the kinds of `also` that the
        plan has; where it names `shape` (a `ModelShape`) or `target` as well, it gets them. Without one, nothing
        changes.
        """
        function = getattr(sys.modules[self.run.__module__], "predict", None)
        if function is None:
            return tensors, ()
        named = inspect.signature(function).parameters
        known = {name: value for name, value in (("shape", shape), ("target", target)) if name in named}
        result: tuple[Sequence[Tensor], Sequence[str]] = function(tensors, params, side, **known)
        return result

    def resolve(self, params: StageParams, shape: Any, *, companion: bool) -> StageParams:
        """Parameters with what they left open decided for a model of this `ModelShape`, with a companion or without.

        A stage module states this as a function `resolve` of the same arguments. Without one, nothing is open.
        """
        function = getattr(sys.modules[self.run.__module__], "resolve", None)
        found: StageParams = function(params, shape, companion=companion) if function else params
        return found

    def outlook(
        self, model: Artifact, side: Mapping[str, Artifact], params: StageParams, target: Target
    ) -> Facts | None:
        """What the stage would choose for its budget, from artifacts that exist already; None where it has none.

        A stage module states this as a function `outlook` of the same arguments, which gives `budget_bytes`,
        `predicted_divergence_nats`, `types` and `curve`.
        """
        function = getattr(sys.modules[self.run.__module__], "outlook", None)
        found: Facts | None = function(model, side, params, target) if function else None
        return found

    def refuses(self, params: StageParams, target: Target) -> str | None:
        """Why a target cannot run what this stage makes, or None.

        A stage module states this as a function `refuses` of the same arguments. Without one, nothing is refused.
        """
        function = getattr(sys.modules[self.run.__module__], "refuses", None)
        return function(params, target) if function else None

    def host_bytes(self, shape: Any, params: StageParams) -> int:
        """Memory that the stage needs on the build host, in bytes, for a model of this `ModelShape`.

        A stage module states this as a function `host_bytes` of the same arguments. Without one, a stage that
        declares torch is taken to hold the weights in float32.
        """
        function = getattr(sys.modules[self.run.__module__], "host_bytes", None)
        if function:
            return int(function(shape, params))
        return _PROCESS_BYTES + (4 * int(shape.parameters) if "torch" in self.tools else 0)


_PROCESS_BYTES = 1 << 30
"""A Python process with torch and transformers loaded, and what earlier steps left in it."""


def stage(
    *,
    version: int,
    takes: str | tuple[str, ...],
    gives: str,
    also: tuple[str, ...] = (),
    tools: tuple[str, ...] = (),
    target_fields: tuple[str, ...] = (),
    reports: bool = False,
) -> Callable[[Run], Stage]:
    """Declare the function as the stage of its module, whose class `Params` types its parameters.

    Args:
        version: Raise it when the same inputs would give another output.
        takes: Kind of the artifact it transforms, or several it can: the latest of them in the recipe.
        gives: Kind of the artifact it writes.
        also: Kinds of further artifacts it uses when the recipe made one before; `adapter` stands for
            `adapter.0`, `adapter.1`... in the order of the command line.
        tools: Distributions whose versions change the output; they are part of the key.
        target_fields: Fields of the target (dotted) that change the output.
        reports: Whether its facts hold `measurements` (as `Measurement`) or `notes` for the report.
    """

    def declare(run: Run) -> Stage:
        module = sys.modules[run.__module__]
        summary = (run.__doc__ or "").strip().partition("\n")[0]
        name = run.__module__.rpartition(".")[2]
        alternatives = (takes,) if isinstance(takes, str) else takes
        return Stage(
            name, version, alternatives, gives, also, tools, target_fields, reports, module.Params, run, summary
        )

    return declare


@cache
def runnable() -> tuple[str, ...]:
    """Kinds of artifacts that an engine opens: what a stage takes that runs whatever the recipe made."""
    return tuple(dict.fromkeys(kind for name in engine_names() for kind in find_engine(name).RUNS))


@cache
def stage_names() -> tuple[str, ...]:
    """Names of all stages: the files of the room."""
    return tuple(sorted(m.name for m in pkgutil.iter_modules(edgekit.stages.__path__) if not m.name.startswith("_")))


@cache
def find_stage(name: str) -> Stage:
    """Return a stage by name. Raises InputError with the closest name."""
    if name not in stage_names():
        raise InputError(
            f"a stage named {name!r}", f"none{suggest(name, stage_names())}", f"use one of {', '.join(stage_names())}"
        )
    found: Stage = importlib.import_module(f"edgekit.stages.{name}").run
    return found
