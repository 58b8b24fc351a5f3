"""From a plan to a bundle in its place: build, measure on the device, check the gates, report."""

from __future__ import annotations

import datetime
import platform
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import edgekit
from edgekit.artifact import Artifact, canonical_sha256
from edgekit.build import BuildEvents, Built, build
from edgekit.bundle import (
    Bundle,
    check_place,
    discard,
    finish_bundle,
    model_summary,
    settings_of,
    stage_bundle,
    strategy_rows,
)
from edgekit.devices import (
    Device,
    DivergenceJob,
    Fingerprint,
    Job,
    JobResult,
    LatencyJob,
    Measures,
    describe_machine,
)
from edgekit.devices.local import Local
from edgekit.formats.weights import Weight, read_weights
from edgekit.gates import check_gates
from edgekit.measure.divergence import FIGURES
from edgekit.measure.strategies import StrategyRow
from edgekit.measurement import Measurement
from edgekit.plan import Plan, choose_strategy
from edgekit.predict.against import prediction_errors
from edgekit.predict.latency import predict_answer
from edgekit.recipe import Gate
from edgekit.report import ByteBudget, DeviceRecord, Fallback, MemoryPart, Report, StrategyResult, TensorGroup
from edgekit.stages.evaluate import read_evaluation
from edgekit.store import Store
from edgekit.tools import tool_version

DEVICE = "device"
"""What accuracy is `of` where a device that is not this machine measured it again."""


@dataclass(frozen=True)
class Delivered:
    """A bundle in its place, and what its report says."""

    bundle: Bundle
    report: Report


def deliver(
    plan: Plan,
    store: Store,
    out: Path,
    device: Device,
    events: BuildEvents,
    verified: dict[str, Artifact] | None = None,
) -> Delivered:
    """Make the bundle of a plan in `out`, even when a gate fails; the report says which.

    Raises the EdgekitError of whatever stopped it; then `out` is as it was before.
    """
    check_place(out / plan.target.name)
    # held to the end: until the bundle is a root, a collection could take what it copies
    with store.shared():
        built = build(plan, store, events, verified)
        work = stage_bundle(plan, built, out)
        try:
            events.started("measure", len(plan.steps) + 1, len(plan.steps) + 1)
            settings = settings_of(plan, built)
            job = Job(
                engine=settings.engine,
                model=str(work / settings.model),
                options=settings.options(),
                measure=Measures(latency=LatencyJob(), divergence=_divergence(built, store, device)),
                needs_bytes=plan.memory.required_bytes - plan.memory.margin_bytes,
            )
            payload_bytes = sum(file.stat().st_size for file in work.rglob("*") if file.is_file())
            started = time.monotonic()
            result = _label(device.run(job, progress=lambda name: events.progressed(0, None, name)))
            events.finished("measure", "executed", time.monotonic() - started)
            report = make_report(plan, built, payload_bytes, device.fingerprint(), result)
            # two builds of one target into one place would take each other's directory for a leftover
            with store.lock(f"bundle-{canonical_sha256(str(out.absolute()))}"):
                bundle = finish_bundle(plan, built, report, work, out)
        except BaseException:
            discard(work)
            raise
        store.keep(bundle.path, list(built.digests))
    return Delivered(bundle, report)


def _divergence(built: Built, store: Store, device: Device) -> DivergenceJob | None:
    """Accuracy on a device that is not the machine whose accuracy the steps have measured."""
    if isinstance(device, Local):
        return None
    reference = store.find(next(step.key for step in built.steps if step.stage == "reference"))
    return DivergenceJob(reference=str(reference.path)) if reference else None


def _label(result: JobResult) -> JobResult:
    """The same with its accuracy `of` the device: that of the bundle is the machine's that built."""
    labelled = (m.model_copy(update={"of": DEVICE}) if m.name in FIGURES else m for m in result.measurements)
    return result.model_copy(update={"measurements": tuple(labelled)})


def _gates(plan: Plan, measurements: Sequence[Measurement]) -> list[Gate]:
    """The recipe's gates, those on the bundle's accuracy once more on the device that measured it."""
    there = {m.name for m in measurements if m.of == DEVICE}
    again = (gate for gate in plan.gates if gate.of == "bundle" and gate.measure in there)
    return [*plan.gates, *(gate.model_copy(update={"of": DEVICE}) for gate in again)]


def make_report(plan: Plan, built: Built, payload_bytes: int, device: Fingerprint, timed: JobResult) -> Report:
    """Put everything that was measured, predicted and decided into one report."""
    host = describe_machine()
    measurements: list[Measurement] = []
    windows: tuple[float, ...] = ()
    for what, artifact in built.evaluations:
        found, divergence = read_evaluation(artifact, what)
        measurements += found
        windows = divergence if what == "bundle" else windows
    measurements += timed.measurements
    for stage, artifact in built.told:
        told = artifact.facts.get("measurements", ())
        measurements += [Measurement.model_validate({**fields, "of": stage}) for fields in told]
    strategies = strategy_rows(built)
    if strategies:
        chosen = choose_strategy(plan, strategies)
        measurements.append(predict_answer(plan.target, plan.predictions, chosen, plan.recipe.engine))
        measurements.append(_accuracy(chosen, host))
    weights = read_weights(built.result.model_path)
    measurements.append(_bytes("weight_bytes", sum(weight.nbytes for weight in weights)))
    measurements.append(_bytes("bundle_bytes", payload_bytes))
    # a prediction stays beside its measurement, for the reader to judge it by; sizes are exact
    measurements += [m for m in plan.predictions if m.name != "weight_bytes"]
    return Report(
        edgekit_version=edgekit.__version__,
        created_at=datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        target={
            "name": plan.target.name,
            "title": plan.target.title,
            "usable_bytes": plan.memory.usable_bytes,
            "context_tokens": plan.context_tokens,
        },
        recipe=plan.recipe.describe(),
        model=model_summary(plan, built),
        host={
            **host.facts,
            "fingerprint": host.text,
            "python": platform.python_version(),
            "tools": {tool: tool_version(tool) for tool in plan.tools},
        },
        device=DeviceRecord(
            fingerprint=timed.device,
            facts=device.facts,
            engine=timed.build,
            board=timed.board,
            samples=timed.samples,
            decode_drift=_drift(timed.samples.get("decode_tokens_per_s", ())),
        ),
        steps=built.steps,
        measurements=tuple(measurements),
        gates=check_gates(_gates(plan, measurements), measurements),
        tensors=_groups(weights),
        fallbacks=tuple(Fallback(**fallback) for fallback in built.result.facts.get("fallbacks", ())),
        budget=_budget(built.result.facts),
        memory=(
            MemoryPart(name="weights", bytes=plan.memory.weight_bytes),
            *([MemoryPart(name="verifier", bytes=plan.memory.companion_bytes)] if plan.companion else []),
            MemoryPart(name="KV cache", bytes=plan.memory.kv_cache_bytes),
            MemoryPart(name="compute buffers", bytes=plan.memory.compute_buffer_bytes),
            MemoryPart(name="margin", bytes=plan.memory.margin_bytes),
        ),
        divergence_per_window=windows,
        strategies=tuple(
            StrategyResult(
                **row.model_dump(),
                answer_s=predict_answer(plan.target, plan.predictions, row, plan.recipe.engine).value,
                chosen=bool(strategies) and row == chosen,
            )
            for row in strategies
        ),
        notes=tuple(_notes(plan, built, host, timed)),
    )


def _budget(facts: Mapping[str, Any]) -> ByteBudget | None:
    if "curve" not in facts:
        return None
    return ByteBudget.model_validate({name: facts[name] for name in ByteBudget.model_fields})


def _drift(speeds: Sequence[float]) -> float | None:
    return speeds[-1] / speeds[0] - 1 if len(speeds) > 1 and speeds[0] > 0 else None


def _notes(plan: Plan, built: Built, host: Fingerprint, timed: JobResult) -> list[str]:
    notes = [*plan.notes, *(str(note) for _, artifact in built.told for note in artifact.facts.get("notes", ()))]
    decode = next((m.note for m in timed.measurements if m.name == "decode_tokens_per_s"), None) or ""
    if "contended" in decode:
        busy = decode[decode.index("contended") :]
        notes.append(f"The machine was busy while latency was measured, so the speeds are too low ({busy}).")
    # an emulated device measures neither
    elsewhere = timed.device != host.text and any(m.of != DEVICE for m in timed.measurements)
    there = any(m.of == DEVICE for m in timed.measurements)
    accurate = f"Accuracy was measured {'there and ' if there else ''}on the machine that built ({host.text})"
    if plan.target.name == "local" and elsewhere:
        notes.append(f"{accurate}, latency on {timed.device}.")
    elif elsewhere:
        notes.append(
            f"The latency and memory shown as measured are those of {timed.device}, which is taken for a "
            f"{plan.target.title} because you named it. {accurate} with the same engine, {plan.recipe.engine}."
        )
    elif plan.target.name != "local":
        notes.append(
            f"Latency and memory on {plan.target.title} are predicted. Accuracy, and any latency shown as measured, "
            f"were measured on another machine ({host.text}) with the same engine, {plan.recipe.engine}."
        )
    # `local` measured here, or a device that was named as the target: not what another machine measured
    errors = prediction_errors(plan.predictions, timed.measurements)
    if errors and (plan.target.name != "local") == elsewhere:
        notes.append(errors)
    notes += [f"{flag[0].upper()}{flag[1:]}." for flag in (timed.board.flags if timed.board else ())]
    provider = built.result.facts.get("provider", "cpu")
    if provider != "cpu" and not timed.build.get("provider", "").lower().startswith(provider):
        notes.append(
            f"The ONNX graph is made for {provider}, which the machine that measured does not have: its structure was "
            f"checked, and it was run and compared on {timed.build.get('provider')}. It was never run on {provider}."
        )
    if plan.source.artifact.facts["quantized"]:
        notes.append(
            "The source's weights are quantized already. They lie on a grid that types of the same block size hit "
            "again, so the losses shown here are smaller than the same recipe would have on full-precision weights."
        )
    if plan.recipe.evaluation.text in ("python-docs", "python-code"):
        notes.append(
            f"Accuracy was measured on {plan.recipe.evaluation.text}, technical English with code. "
            "Name your own text with --set evaluation.text=FILE before you rely on it for another domain."
        )
    return notes


def _accuracy(row: StrategyRow, host: Fingerprint) -> Measurement:
    return Measurement(
        name="task_accuracy",
        value=row.accuracy,
        unit="ratio",
        kind="measured",
        n=row.problems,
        ci_low=row.ci_low,
        ci_high=row.ci_high,
        device=host.text,
        note=f"{row.task} by {row.strategy} with {row.candidates} candidates; chosen on these very problems",
    )


def _bytes(name: str, value: int) -> Measurement:
    return Measurement(name=name, value=value, unit="bytes", kind="measured")


def _groups(weights: Sequence[Weight]) -> tuple[TensorGroup, ...]:
    groups: dict[str, list[int]] = {}
    for weight in weights:
        groups.setdefault(weight.type, []).append(weight.nbytes)
    ordered = sorted(groups.items(), key=lambda item: -sum(item[1]))
    return tuple(TensorGroup(type=name, tensors=len(sizes), bytes=sum(sizes)) for name, sizes in ordered)
