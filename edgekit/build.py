"""Runs a plan: pulls the artifacts that the bundle needs through the store, executing what is missing."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from edgekit.artifact import Artifact, CorruptArtifact
from edgekit.errors import ToolError
from edgekit.measure.memory import peak_rss_bytes, reset_peak_rss
from edgekit.plan import Plan, Step, step_key
from edgekit.report import StepRecord
from edgekit.stage import StageContext
from edgekit.store import Produced, Record, Store
from edgekit.tools import require


class BuildEvents:
    """What a build tells while it runs. This class keeps silent; one that shows something extends it."""

    def started(self, step: str, position: int, steps: int) -> None:
        """A step begins to execute."""

    def progressed(self, done: int, total: int | None, unit: str) -> None:
        """The executing step went on."""

    def finished(self, step: str, status: str, seconds: float) -> None:
        """A step was executed, or its cached artifact is used."""

    def noted(self, text: str) -> None:
        """Something the user should know."""


@dataclass(frozen=True)
class Built:
    """The artifacts of a finished plan."""

    result: Artifact
    checkpoint: Artifact
    """The latest plain checkpoint: the model with its adapters."""
    prefix: Artifact | None
    """The precomputed start of every sequence, where the plan makes one."""
    verifier: Artifact | None
    """The verifier for the result, where the plan has one."""
    strategies: Artifact | None
    """What each strategy gets right, where it was measured."""
    told: tuple[tuple[str, Artifact], ...]
    """(stage, artifact) of the steps whose facts hold measurements or notes for the report."""
    evaluations: tuple[tuple[str, Artifact], ...]
    """(what was evaluated, its evaluation)."""
    steps: tuple[StepRecord, ...]
    digests: tuple[str, ...]
    """Every artifact of the plan that exists: what keeps the bundle reproducible."""


def build(plan: Plan, store: Store, events: BuildEvents, verified: dict[str, Artifact] | None = None) -> Built:
    """Make every artifact of the plan that the bundle needs.

    A cached step whose artifact nobody asks for is not even read. `verified` holds artifacts that this process
    has verified already; pass the same dictionary for several targets.

    Raises the stage's own EdgekitError, or ToolError when a tool is missing or the disk is full.
    """
    return _Run(plan, store, events, {} if verified is None else verified).everything()


def _step_record(step: Step, key: str, status: Literal["executed", "cached"], record: Record) -> StepRecord:
    return StepRecord(
        stage=step.stage.name,
        of=step.checks,
        key=key,
        status=status,
        seconds=record.seconds,
        peak_rss_bytes=record.peak_rss_bytes,
    )


class _Run:
    def __init__(self, plan: Plan, store: Store, events: BuildEvents, verified: dict[str, Artifact]) -> None:
        self.plan, self.store, self.events, self.verified = plan, store, events, verified
        self.artifacts: dict[int, Artifact] = dict(plan.inputs)
        self.records: dict[int, StepRecord] = {}

    def everything(self) -> Built:
        with self.store.shared():
            evaluations = tuple((what, self.artifact(index)) for what, index in self.plan.evaluations())
            result = self.artifact(self.plan.result)
            names = {step.stage.name: index for index, step in enumerate(self.plan.steps)}
            checkpoint = self.artifact(names.get("merge", 0))
            prefix, verifier, strategies = (
                self.artifact(names[name]) if name in names else None for name in ("prefix", "verifier", "strategies")
            )
            told = tuple(
                (step.stage.name, self.artifact(i)) for i, step in enumerate(self.plan.steps) if step.stage.reports
            )
            digests = tuple(dict.fromkeys(self.digest(index) for index in range(len(self.plan.steps))))
        steps = tuple(self.records[index] for index in range(len(self.plan.steps)))
        return Built(result, checkpoint, prefix, verifier, strategies, told, evaluations, steps, digests)

    def artifact(self, index: int) -> Artifact:
        """The verified artifact of a step, executing whatever is missing or damaged."""
        if index not in self.artifacts:
            record = self.known_record(index)
            cached = self._open(record) if record else None
            self.artifacts[index] = cached if cached else self._execute(index)
        return self.artifacts[index]

    def digest(self, index: int) -> str:
        """The digest of a step's artifact, from its record where there is one."""
        if index in self.artifacts:
            return self.artifacts[index].digest
        record = self.known_record(index)
        return record.digest if record else self.artifact(index).digest

    def known_record(self, index: int) -> Record | None:
        key = self._key(index)
        record = self.store.lookup(key)
        if record and index not in self.records:
            step = self.plan.steps[index]
            self.records[index] = _step_record(step, key, "cached", record)
            self.events.finished(step.label, "cached", record.seconds)
        return record

    def _key(self, index: int) -> str:
        step = self.plan.steps[index]
        key = step_key(step, [self.digest(i) for i in step.inputs], self.plan.target)
        if key is None:
            for tool in step.tools:
                require(tool)
        assert key is not None
        return key

    def _open(self, record: Record) -> Artifact | None:
        if record.digest not in self.verified:
            if not self.store.has(record.digest):
                return None
            try:
                self.verified[record.digest] = self.store.open(record.digest)
            except CorruptArtifact as problem:
                self.events.noted(f"{record.stage}: {problem.found} in the store; it is made again")
                self.store.discard(record.digest)
                return None
        return self.verified[record.digest]

    def _execute(self, index: int) -> Artifact:
        step, plan = self.plan.steps[index], self.plan
        model = self.artifact(step.input)
        side = {kind: self.artifact(i) for kind, i in step.side}
        # an input that was made again may differ, and then the key differs, too
        key = self._key(index)
        self._check_disk(plan.step_bytes(index))
        self.events.started(step.label, index + 1, len(plan.steps))
        context = StageContext(
            store=self.store,
            side=side,
            target=plan.target,
            progress=lambda d, t=None, u="": self.events.progressed(d, t, u),
            kept=self.store.kept(key),
        )

        def produce(work: Path) -> Produced:
            reset_peak_rss()
            facts = step.stage.run(model, work, step.params, context)
            return Produced(step.stage.gives, facts, peak_rss_bytes())

        inputs = tuple(self.digest(i) for i in step.inputs)
        artifact, record, executed = self.store.execute(key, step.stage.name, inputs, produce)
        status: Literal["executed", "cached"] = "executed" if executed else "cached"
        self.records[index] = _step_record(step, key, status, record)
        self.events.finished(step.label, status, record.seconds)
        self.verified[artifact.digest] = artifact
        return artifact

    def _check_disk(self, needed: int) -> None:
        free = self.store.free_bytes()
        if free < needed:
            mib = 1 << 20
            raise ToolError(
                f"{needed // mib} MiB of free space at {self.store.root}",
                f"{free // mib} MiB",
                "edgekit cache gc, or set EDGEKIT_CACHE to a larger disk",
            )
