"""The report of a build: one model (`report.json`) and its renderings for people."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import Field

from edgekit.config import Strict
from edgekit.devices.board import BoardRecord
from edgekit.measure.strategies import StrategyRow
from edgekit.measurement import Measurement


class GateResult(Strict):
    """One bound of the recipe and whether the unrounded value kept it."""

    name: str
    bound: str
    """The bound in words, e.g. `kl_divergence_nats <= 0.35`."""
    value: float
    passed: bool
    certain: bool = True
    """Whether the value's whole interval lies on the same side of the bound."""
    kind: Literal["measured", "predicted"]
    of: str = "bundle"


class StepRecord(Strict):
    """One step of the build."""

    stage: str
    of: str | None = None
    """For an evaluation: what it evaluates."""
    key: str
    status: Literal["executed", "cached"]
    seconds: float
    """Wall time when it was executed (also shown for a cached step)."""
    peak_rss_bytes: int | None = None
    """Most memory that the process held while it was executed."""

    @property
    def label(self) -> str:
        """The stage, and for an evaluation what it evaluates."""
        return f"{self.stage} {self.of}" if self.of else self.stage


class TensorGroup(Strict):
    """All tensors of one storage type."""

    type: str
    tensors: int
    bytes: int


class Fallback(Strict):
    """A tensor that could not take its wanted type."""

    tensor: str
    wanted: str
    found: str


class StrategyResult(StrategyRow):
    """What a strategy got right, what that cost, and what it would take on the target."""

    answer_s: float
    """Predicted for the target."""
    chosen: bool
    """Whether the bundle answers this way."""


class ByteBudget(Strict):
    """What the types of the tensors were chosen by, where the recipe gave the file a budget; losses are predicted."""

    budget_bytes: int
    """Most bytes that the file was allowed."""
    predicted_divergence_nats: float
    """Of the choice, as the sum over tensors."""
    curve: Annotated[tuple[tuple[int, float], ...], Field(min_length=1)]
    """(bytes of the file, nats) of the best choices, from the smallest."""


class MemoryPart(Strict):
    """One part of the memory needed on the target (predicted)."""

    name: str
    bytes: int


class DeviceRecord(Strict):
    """The machine that latency and memory were measured on, while they were."""

    fingerprint: str
    """As in the measurements."""
    facts: dict[str, str | int]
    """cpu, cores, threads, memory_bytes, machine, os, kernel; board and accelerator where there are such."""
    engine: dict[str, str]
    """Its build, and what the opened model told of it."""
    board: BoardRecord | None = None
    """Power mode, clocks, temperatures and throttling at the start and the end."""
    samples: dict[str, tuple[float, ...]]
    """Every repeat behind the figures, by their names."""
    decode_drift: float | None = None
    """Change of the decode speed from the first repeat to the last, relative to the first."""


class Report(Strict):
    """Everything a build found out; published as `docs/schemas/report.schema.json`."""

    schema_version: Literal[1] = 1
    edgekit_version: str
    created_at: str
    target: dict[str, Any]
    """name, title, usable_bytes, context_tokens."""
    recipe: dict[str, Any]
    """name, description, stages."""
    model: dict[str, Any]
    """source, digest, architecture, parameters, licence, provenance."""
    host: dict[str, Any]
    """The machine that built and measured accuracy: fingerprint, cpu, cores, os, tool versions."""
    device: DeviceRecord | None = None
    """The machine that measured the rest; the host itself where the build named no other."""
    steps: tuple[StepRecord, ...] = ()
    measurements: tuple[Measurement, ...] = ()
    gates: tuple[GateResult, ...] = ()
    tensors: tuple[TensorGroup, ...] = ()
    fallbacks: tuple[Fallback, ...] = ()
    budget: ByteBudget | None = None
    memory: tuple[MemoryPart, ...] = ()
    """Predicted memory on the target, part by part."""
    divergence_per_window: tuple[float, ...] = ()
    """Mean KL divergence (nats) at each evaluation window, for the plot."""
    strategies: tuple[StrategyResult, ...] = ()
    """The accuracy-cost curve, where strategies were measured."""
    notes: tuple[str, ...] = ()
    """What the reader must know, e.g. that latency is predicted because the target is another machine."""

    @property
    def needs_bytes(self) -> int:
        """Memory predicted to be taken on the target, without the margin."""
        return sum(part.bytes for part in self.memory if part.name != "margin")

    @property
    def passed(self) -> bool:
        """Whether every gate was kept."""
        return all(gate.passed for gate in self.gates)
