"""Model x recipe x target, resolved: steps, predicted sizes and rates. Reads headers, writes nothing."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import reduce
from typing import Any

import psutil

from edgekit.adapter import Adapter, check_adapter
from edgekit.artifact import Artifact, canonical_sha256
from edgekit.calibration import check_text, text_digest
from edgekit.companion import Companion, check_verifier
from edgekit.engines import find_engine
from edgekit.errors import DoesNotFit, InputError, suggest
from edgekit.measure.strategies import StrategyRow
from edgekit.measurement import Measurement
from edgekit.model import ModelShape, Source, model_shape
from edgekit.predict.energy import predict_energy
from edgekit.predict.latency import predict_answer, predict_latency
from edgekit.predict.memory import MemoryPlan, compute_buffer_bytes, kv_cache_bytes, plan_memory, predict_peak
from edgekit.recipe import Gate, Recipe
from edgekit.stage import Stage, StageParams, Tensor, find_stage
from edgekit.store import Record, Store
from edgekit.support import refusal
from edgekit.target import Target
from edgekit.tasks import task_sha256
from edgekit.tools import tool_version

IMPORT_GATE = Gate(of="import", measure="kl_divergence_nats", max=0.02)
"""llama.cpp on an imported GGUF against the checkpoint made of it; it rounds activations, so they differ a little."""
_WINDOWS_ON_THE_WAY = 2
"""Windows that a check on the way reads: it looks for breakage, not for a precise figure."""


@dataclass(frozen=True)
class Step:
    """One execution of a stage. Inputs are indices of earlier steps; below 0 stand model, adapters and companion."""

    stage: Stage
    params: StageParams
    input: int
    side: tuple[tuple[str, int], ...] = ()
    checks: str | None = None
    """For an evaluation: what it evaluates (`import`, a stage's name, `bundle`)."""

    @property
    def label(self) -> str:
        """The stage, and for an evaluation what it evaluates."""
        return f"{self.stage.name} {self.checks}" if self.checks else self.stage.name

    @property
    def inputs(self) -> tuple[int, ...]:
        """Indices of everything it reads."""
        return (self.input, *(index for _, index in self.side))

    @property
    def tools(self) -> tuple[str, ...]:
        """Distributions whose versions are part of its key."""
        return (*self.stage.tools, *self.params.tools)

    @property
    def target_fields(self) -> tuple[str, ...]:
        """Fields of the target that are part of its key."""
        return (*self.stage.target_fields, *self.params.target_fields)


@dataclass(frozen=True)
class Plan:
    """Everything a build will do, and what is predicted of its result."""

    source: Source
    adapters: tuple[Adapter, ...]
    companion: Companion | None
    shape: ModelShape
    recipe: Recipe
    target: Target
    context_tokens: int
    kv_type: str
    steps: tuple[Step, ...]
    result: int
    """Index of the step whose artifact the bundle ships."""
    tensors: tuple[Tensor, ...]
    """Predicted tensors of the result."""
    memory: MemoryPlan
    predictions: tuple[Measurement, ...]
    fallbacks: tuple[str, ...]
    """Tensors that cannot take their wanted type, in words."""
    notes: tuple[str, ...]
    """What the user should know before and after."""

    @property
    def inputs(self) -> dict[int, Artifact]:
        """What the user gave, by the index that steps know it by."""
        given = [self.source.artifact, *(adapter.artifact for adapter in self.adapters)]
        if self.companion is not None:
            given.append(self.companion.artifact)
        return {-1 - position: artifact for position, artifact in enumerate(given)}

    @property
    def base_digest(self) -> str:
        """What a companion is made for: the source model with its adapters, however it is quantized."""
        if not self.adapters:
            return self.source.artifact.digest
        adapters = [[adapter.artifact.digest, adapter.weight] for adapter in self.adapters]
        return canonical_sha256([self.source.artifact.digest, adapters])

    @property
    def tools(self) -> tuple[str, ...]:
        """Every distribution that a step declares."""
        return tuple(sorted({tool for step in self.steps for tool in step.tools}))

    @property
    def weight_bytes(self) -> int:
        """Predicted bytes of the result's tensors, exact from their types."""
        return self.memory.weight_bytes

    @property
    def gates(self) -> tuple[Gate, ...]:
        """The recipe's gates, and the one on the import of a GGUF."""
        imported = any(what == "import" for what, _ in self.evaluations())
        return (IMPORT_GATE, *self.recipe.gates) if imported else self.recipe.gates

    def evaluations(self) -> list[tuple[str, int]]:
        """(what is evaluated, index of its step), in order."""
        return [(step.checks, index) for index, step in enumerate(self.steps) if step.checks]

    def step_bytes(self, index: int) -> int:
        """Bytes that executing a step writes to the store, to know before it starts whether the disk is full."""
        step, half = self.steps[index], 2 * self.shape.parameters
        if index == self.result:
            return self.weight_bytes
        if step.stage.gives == "reference":
            evaluation = self.recipe.evaluation
            return evaluation.windows * evaluation.window_tokens * self.shape.vocabulary
        return half if step.stage.gives in ("checkpoint", "gguf") else 1 << 20

    def host_bytes(self, index: int) -> int:
        """Predicted memory that a step needs on the machine that builds."""
        step = self.steps[index]
        return step.stage.host_bytes(self.shape, step.params)


def make_plan(
    source: Source,
    recipe: Recipe,
    target: Target,
    *,
    context_tokens: int | None = None,
    kv_type: str | None = None,
    adapters: Sequence[Adapter] = (),
    companion: Companion | None = None,
) -> Plan:
    """Resolve a build. Raises InputError where stages do not fit together or the engine is not the target's."""
    if why := refusal(recipe, target):
        wanted = f"a recipe that runs on {target.name} (engines {', '.join(target.engines)})"
        raise InputError(
            wanted,
            f"{recipe.name}: {why}",
            "edgekit recipes list" if recipe.name == target.default_recipe else f"--recipe {target.default_recipe}",
        )
    shape = model_shape(source.artifact)
    if context_tokens is not None and context_tokens > shape.context_tokens:
        most = shape.context_tokens
        raise InputError(
            f"at most {most} tokens, the model's context", f"--context {context_tokens}", f"--context {most}"
        )
    context = min(context_tokens or target.context_tokens, shape.context_tokens)
    offered = find_engine(recipe.engine).KV_TYPES
    kv_type = offered[0] if kv_type is None else kv_type
    if kv_type not in offered:
        known = ", ".join(offered)
        found = f"{kv_type!r}{suggest(kv_type, offered)}"
        raise InputError(f"a type of {recipe.engine}'s KV cache ({known})", found, f"--kv-type {offered[0]}")
    advice = [note for adapter in adapters for note in check_adapter(adapter, source, shape)]
    filled = {
        "engine": recipe.engine,
        "kv_type": kv_type,
        "context_tokens": min(context, 2048),
        "kv_bytes_per_token": kv_cache_bytes(shape, context, kv_type) // context,
        "task_sha256": tuple(sha256 for name in recipe.tasks if (sha256 := task_sha256(name))),
    }
    steps, result = _resolve_steps(source, recipe, adapters, companion, filled)
    companions = companion is not None
    steps = [replace(step, params=step.stage.resolve(step.params, shape, companion=companions)) for step in steps]
    for step in steps:
        _check_texts(step, shape)
    beside = 0 if companion is None else _companion_bytes(companion, shape, target, steps, context, kv_type)
    empty = plan_memory(shape, 0, target.memory.usable_bytes.value, context, kv_type, beside)
    steps = [_fit_budget(step, empty, target) for step in steps]
    tensors, fallbacks = _predict_tensors(shape, target, steps, result)
    weight_bytes = sum(t.nbytes for t in tensors)
    memory = plan_memory(shape, weight_bytes, target.memory.usable_bytes.value, context, kv_type, beside)
    plan = Plan(
        source=source,
        adapters=tuple(adapters),
        companion=companion,
        shape=shape,
        recipe=recipe,
        target=target,
        context_tokens=context,
        kv_type=kv_type,
        steps=tuple(steps),
        result=result,
        tensors=tuple(tensors),
        memory=memory,
        predictions=tuple(_predictions(target, shape, tensors, memory, context, kv_type, recipe.engine)),
        fallbacks=tuple(fallbacks),
        notes=tuple(advice),
    )
    if companion is None:
        return plan
    return replace(plan, notes=(*plan.notes, *check_verifier(companion, plan.base_digest, recipe.engine, recipe.tasks)))


def _fit_budget(step: Step, empty: MemoryPlan, target: Target) -> Step:
    """The step with bytes where its budget was what fits beside everything else."""
    if getattr(step.params, "budget_bytes", None) != "fit":
        return step
    room = empty.usable_bytes - empty.required_bytes
    if room <= 0:
        wanted = f"room for weights in {empty.usable_bytes >> 20} MiB of usable memory on {target.name}"
        raise DoesNotFit(wanted, f"{empty.required_bytes >> 20} MiB needed beside them", "--context with fewer tokens")
    return replace(step, params=step.params.model_copy(update={"budget_bytes": room}))


def _check_texts(step: Step, shape: ModelShape) -> None:
    """Raise InputError where a step's windows are longer than the model's context or than its text has tokens."""
    # a recipe states the parameters of `reference` under `evaluation`
    place = "evaluation" if step.stage.gives == "reference" else step.stage.name
    windows, length = (getattr(step.params, name, 1) for name in ("windows", "window_tokens"))
    if length > shape.context_tokens:
        raise InputError(
            f"windows of at most {shape.context_tokens} tokens, the model's context",
            f"{place}.window_tokens={length}",
            f"--set {place}.window_tokens={shape.context_tokens}",
        )
    for name, split in step.params.text_fields.items():
        check_text(getattr(step.params, name), split, windows * length)


def choose_strategy(plan: Plan, rows: Sequence[StrategyRow]) -> StrategyRow:
    """The row that got most right on the first task within every gate on `answer_s`; of equals the cheapest.

    Where none is within, the fastest. Controls are never chosen.
    """
    bounds = [gate.max for gate in plan.recipe.gates if gate.measure == "answer_s" and gate.max is not None]
    bound = min(bounds, default=math.inf)
    eligible = [row for row in rows if row.verifier != "random" and row.task == rows[0].task]
    timed = [(predict_answer(plan.target, plan.predictions, row, plan.recipe.engine).value, row) for row in eligible]
    within = [row for seconds, row in timed if seconds <= bound]
    if not within:
        return min(timed, key=lambda pair: pair[0])[1]
    return max(within, key=lambda row: (row.accuracy, -row.tokens_forward))


def check_fit(plan: Plan, *, documented: bool = False) -> None:
    """Raise DoesNotFit, with what would fit, when the plan needs more memory than the target has."""
    memory = plan.memory
    if memory.fits:
        return
    mib = 1 << 20
    raise DoesNotFit(
        f"at most {memory.usable_bytes // mib} MiB of usable memory on {plan.target.name}",
        f"{-(-memory.required_bytes // mib)} MiB needed (weights {memory.weight_bytes // mib}, "
        f"{f'companion {memory.companion_bytes // mib}, ' if plan.companion else ''}"
        f"KV cache {memory.kv_cache_bytes // mib} at {plan.context_tokens} tokens, "
        f"buffers {memory.compute_buffer_bytes // mib}, margin {memory.margin_bytes // mib})",
        "; or ".join(what_fits(plan)) or "choose a smaller model or a larger target",
        documented=documented,
    )


def check_host(plan: Plan, *, documented: bool = False) -> None:
    """Raise DoesNotFit when a step needs more memory than this machine has."""
    present = psutil.virtual_memory().total
    for index, step in enumerate(plan.steps):
        if (needed := plan.host_bytes(index)) > present:
            raise DoesNotFit(
                f"at most {present >> 20} MiB, the memory of the machine that builds",
                f"{needed >> 20} MiB needed by {step.label}",
                "build on a machine with more memory, or choose a smaller model",
                documented=documented,
            )


def what_fits(plan: Plan) -> list[str]:
    """Options of the command line that would make the plan fit: quantized KV, shorter context, smaller type."""
    options = []
    usable = plan.memory.usable_bytes

    def fits(weight_bytes: int, context: int, kv_type: str) -> bool:
        return plan_memory(plan.shape, weight_bytes, usable, context, kv_type, plan.memory.companion_bytes).fits

    for kv_type in find_engine(plan.recipe.engine).KV_TYPES[1:]:
        if fits(plan.weight_bytes, plan.context_tokens, kv_type):
            options.append(f"--kv-type {kv_type}")
            break
    context = plan.context_tokens // 2
    while context >= 256 and not fits(plan.weight_bytes, context, plan.kv_type):
        context //= 2
    if context >= 256:
        options.append(f"--context {context}")
    if any(stage.name == "gguf" for stage, _ in plan.recipe.stages):
        options.extend(_smaller_types(plan, fits))
    return options


def step_key(step: Step, inputs: Sequence[str], target: Target) -> str | None:
    """Cache key of a step given its inputs' digests; None while a tool it declares is not installed.

    The key is the sha256 of canonical JSON over the stage's name and version, every parameter, the digests of
    inputs and text, the versions of the declared tools and the declared target fields (see docs/architecture.md).
    """
    tools = {name: tool_version(name) for name in step.tools}
    if None in tools.values():
        return None
    return canonical_sha256(
        {
            "stage": step.stage.name,
            "version": step.stage.version,
            "params": step.params.model_dump(exclude=set(step.params.text_fields)),
            "texts": {name: text_digest(getattr(step.params, name)) for name in step.params.text_fields},
            "inputs": list(inputs),
            "tools": tools,
            "target": {path: reduce(getattr, path.split("."), target) for path in step.target_fields},
        }
    )


def cached_records(plan: Plan, store: Store) -> list[tuple[str | None, Record | None]]:
    """Key and record of every step as far as they are known without executing anything."""
    found: list[tuple[str | None, Record | None]] = []
    for step in plan.steps:
        digests = []
        for index in step.inputs:
            record = found[index][1] if index >= 0 else None
            digests.append(plan.inputs[index].digest if index < 0 else record.digest if record else None)
        known = [digest for digest in digests if digest is not None]
        key = step_key(step, known, plan.target) if len(known) == len(digests) else None
        record = store.lookup(key) if key else None
        found.append((key, record if record and store.has(record.digest) else None))
    return found


def _resolve_steps(
    source: Source,
    recipe: Recipe,
    adapters: Sequence[Adapter],
    companion: Companion | None,
    filled: Mapping[str, Any],
) -> tuple[list[Step], int]:
    """Put the steps in order; parameters named in `filled` are those of the build."""
    evaluation = recipe.evaluation
    reference, evaluate = find_stage("reference"), find_stage("evaluate")
    runs = find_engine(recipe.engine).RUNS
    imported = source.artifact.facts["format"] in runs
    merges = any(stage.name == "merge" for stage, _ in recipe.stages)
    latest = {"source": -1}
    for position in range(len(adapters)):
        latest[f"adapter.{position}"] = -2 - position
    if companion is not None:
        latest["companion"] = -2 - len(adapters)
    steps: list[Step] = []

    def add(step: Step) -> int:
        steps.append(step)
        return len(steps) - 1

    def check(index: int, what: str) -> None:
        windows = evaluation.windows if what == "bundle" else min(evaluation.windows, _WINDOWS_ON_THE_WAY)
        params = evaluate.params.model_validate({"engine": recipe.engine, "windows": windows})
        add(Step(evaluate, params, index, (("reference", latest["reference"]),), checks=what))

    for stage, params in recipe.stages:
        params = params.model_copy(update={name: filled[name] for name in filled if name in stage.params.model_fields})
        takes = [kind for kind in stage.takes if kind in latest]
        if not takes:
            raise InputError(
                f"an earlier stage that gives {' or '.join(stage.takes)} before {stage.name!r} in {recipe.name}",
                f"only {', '.join(sorted(latest))}",
                "reorder the recipe's stages",
            )
        also = set(stage.also) - params.unused
        side = tuple((kind, latest[kind]) for kind in latest if kind.partition(".")[0] in also)
        index = add(Step(stage, params, max(latest[kind] for kind in takes), side))
        latest[stage.gives] = index
        # what the user wants to ship is the model with its adapters; an import is checked before they go in
        if stage.name == "merge" or (stage.name == "checkpoint" and (imported or not merges)):
            values = evaluation.model_dump()
            latest["reference"] = add(Step(reference, reference.params.model_validate(values), index))
            if stage.name == "checkpoint" and imported:
                check(-1, "import")
        elif any(gate.of == stage.name for gate in recipe.gates):
            check(index, stage.name)
    result = max((latest[kind] for kind in runs if kind in latest), default=None)
    if result is None:
        wanted = f"a stage in {recipe.name} that gives {' or '.join(runs)} for {recipe.engine}"
        raise InputError(wanted, "none", "add one")
    check(result, "bundle")
    return steps, result


def _predict_tensors(
    shape: ModelShape, target: Target, steps: Sequence[Step], result: int
) -> tuple[Sequence[Tensor], list[str]]:
    tensors: Sequence[Tensor] = shape.tensors
    chain = []
    index = result
    while index >= 0:
        chain.append(steps[index])
        index = steps[index].input
    notes: list[str] = []
    for step in reversed(chain):
        side = frozenset(kind for kind, _ in step.side)
        tensors, told = step.stage.predict(tensors, step.params, side, shape=shape, target=target)
        notes.extend(told)
    return tensors, notes


def _companion_bytes(
    companion: Companion, shape: ModelShape, target: Target, steps: Sequence[Step], context_tokens: int, kv_type: str
) -> int:
    """Weights of a verifier as the device holds them, and cache and buffers of a trunk of its own."""
    if not companion.has_trunk:
        return companion.nbytes
    if (model := companion.trunk_shape()) is None:
        # a LoRA stays as it was trained
        weights, own = companion.nbytes, shape
    else:
        quantizer = next(step for step in steps if step.stage.gives == "trunk")
        tensors, _ = quantizer.stage.predict(model.tensors, quantizer.params, frozenset(), shape=model, target=target)
        weights, own = sum(tensor.nbytes for tensor in tensors), model
    cache = kv_cache_bytes(own, context_tokens, kv_type)
    return weights + cache + compute_buffer_bytes(own, context_tokens)


def _predictions(
    target: Target,
    shape: ModelShape,
    tensors: Sequence[Tensor],
    memory: MemoryPlan,
    context_tokens: int,
    kv_type: str,
    engine: str,
) -> list[Measurement]:
    sizes = {
        "weight_bytes": memory.weight_bytes,
        "companion_bytes": memory.companion_bytes,
        "kv_cache_bytes": memory.kv_cache_bytes,
        "compute_buffer_bytes": memory.compute_buffer_bytes,
        "required_bytes": memory.required_bytes,
        "usable_bytes": memory.usable_bytes,
    }
    exact = [
        Measurement(name=name, value=value, unit="bytes", kind="predicted", device=target.name)
        for name, value in sizes.items()
        if name != "companion_bytes" or value
    ]
    peak = predict_peak(target, shape, tensors, context_tokens, kv_type, engine)
    rates = predict_latency(target, shape, tensors, context_tokens, kv_type, engine)
    return exact + peak + rates + predict_energy(target, rates)


def _smaller_types(plan: Plan, fits: Any) -> list[str]:
    """The largest file type of llama.cpp below the planned size that fits, if one does."""
    position = next(i for i, step in enumerate(plan.steps) if step.stage.name == "gguf")
    for name in ("Q8_0", "Q6_K", "Q5_K_M", "Q4_K_M", "Q4_0", "Q3_K_M", "Q2_K"):
        step = plan.steps[position]
        steps = list(plan.steps)
        steps[position] = replace(step, params=step.params.model_copy(update={"type": name}))
        tensors, _ = _predict_tensors(plan.shape, plan.target, steps, plan.result)
        weight_bytes = sum(t.nbytes for t in tensors)
        if weight_bytes < plan.weight_bytes and fits(weight_bytes, plan.context_tokens, plan.kv_type):
            return [f"--set gguf.type={name}"]
    return []
