"""Model x recipe x target, resolved: steps, predicted sizes and rates. Reads headers, writes nothing."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import reduce
from typing import Any

from edgekit.artifact import canonical_sha256
from edgekit.calibration import check_text, text_digest
from edgekit.engines import find_engine
from edgekit.errors import DoesNotFit, InputError
from edgekit.formats.gguf import tensor_bytes
from edgekit.measurement import Measurement
from edgekit.model import ModelShape, Source, model_shape
from edgekit.predict.latency import predict_latency
from edgekit.predict.memory import KV_TYPES, MemoryPlan, plan_memory
from edgekit.recipe import Gate, Recipe
from edgekit.stage import Stage, StageParams, Tensor, find_stage
from edgekit.store import Record, Store
from edgekit.target import Target
from edgekit.tools import tool_version

IMPORT_GATE = Gate(of="import", measure="kl_divergence_nats", max=0.02)
"""llama.cpp on an imported GGUF against the checkpoint made of it; it rounds activations, so they differ a little."""
_WINDOWS_ON_THE_WAY = 2
"""Windows that a check on the way reads: it looks for breakage, not for a precise figure."""


@dataclass(frozen=True)
class Step:
    """One execution of a stage. Inputs are indices of earlier steps; -1 is the model itself."""

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


@dataclass(frozen=True)
class Plan:
    """Everything a build will do, and what is predicted of its result."""

    source: Source
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
    notes: tuple[str, ...]

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


def make_plan(
    source: Source, recipe: Recipe, target: Target, *, context_tokens: int | None = None, kv_type: str = "f16"
) -> Plan:
    """Resolve a build. Raises InputError where stages do not fit together or the engine is not the target's."""
    if recipe.engine not in target.engines:
        raise InputError(
            f"a recipe for an engine of {target.name} ({', '.join(target.engines)})",
            f"{recipe.name}, which needs {recipe.engine}",
            "edgekit recipes list" if recipe.name == target.default_recipe else f"--recipe {target.default_recipe}",
        )
    shape = model_shape(source.artifact)
    if context_tokens is not None and context_tokens > shape.context_tokens:
        most = shape.context_tokens
        raise InputError(
            f"at most {most} tokens, the model's context", f"--context {context_tokens}", f"--context {most}"
        )
    context = min(context_tokens or target.context_tokens, shape.context_tokens)
    steps, result = _resolve_steps(source, recipe)
    for step in steps:
        _check_texts(step, shape)
    tensors, notes = _predict_tensors(shape.tensors, steps, result)
    weight_bytes = sum(tensor_bytes(t.type, t.shape) for t in tensors)
    memory = plan_memory(shape, weight_bytes, target.memory.usable_bytes.value, context, kv_type)
    return Plan(
        source=source,
        shape=shape,
        recipe=recipe,
        target=target,
        context_tokens=context,
        kv_type=kv_type,
        steps=tuple(steps),
        result=result,
        tensors=tuple(tensors),
        memory=memory,
        predictions=tuple(_predictions(target, shape, tensors, memory, context, kv_type)),
        notes=tuple(notes),
    )


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


def check_fit(plan: Plan, *, documented: bool = False) -> None:
    """Raise DoesNotFit, with what would fit, when the plan needs more memory than the target has."""
    memory = plan.memory
    if memory.fits:
        return
    mib = 1 << 20
    raise DoesNotFit(
        f"at most {memory.usable_bytes // mib} MiB of usable memory on {plan.target.name}",
        f"{-(-memory.required_bytes // mib)} MiB needed (weights {memory.weight_bytes // mib}, "
        f"KV cache {memory.kv_cache_bytes // mib} at {plan.context_tokens} tokens, "
        f"buffers {memory.compute_buffer_bytes // mib}, margin {memory.margin_bytes // mib})",
        "; or ".join(what_fits(plan)) or "choose a smaller model or a larger target",
        documented=documented,
    )


def what_fits(plan: Plan) -> list[str]:
    """Options of the command line that would make the plan fit: quantized KV, shorter context, smaller type."""
    options = []
    usable = plan.memory.usable_bytes

    def fits(weight_bytes: int, context: int, kv_type: str) -> bool:
        return plan_memory(plan.shape, weight_bytes, usable, context, kv_type).fits

    for kv_type in KV_TYPES[1:]:
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
    tools = {name: tool_version(name) for name in step.stage.tools}
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
            "target": {path: reduce(getattr, path.split("."), target) for path in step.stage.target_fields},
        }
    )


def cached_records(plan: Plan, store: Store) -> list[tuple[str | None, Record | None]]:
    """Key and record of every step as far as they are known without executing anything."""
    found: list[tuple[str | None, Record | None]] = []
    for step in plan.steps:
        digests = []
        for index in (step.input, *(i for _, i in step.side)):
            record = found[index][1] if index >= 0 else None
            digests.append(plan.source.artifact.digest if index < 0 else record.digest if record else None)
        known = [digest for digest in digests if digest is not None]
        key = step_key(step, known, plan.target) if len(known) == len(digests) else None
        record = store.lookup(key) if key else None
        found.append((key, record if record and store.has(record.digest) else None))
    return found


def _resolve_steps(source: Source, recipe: Recipe) -> tuple[list[Step], int]:
    evaluation = recipe.evaluation
    reference, evaluate = find_stage("reference"), find_stage("evaluate")
    latest = {"source": -1}
    steps: list[Step] = []

    def add(step: Step) -> int:
        steps.append(step)
        return len(steps) - 1

    def check(index: int, what: str) -> None:
        windows = evaluation.windows if what == "bundle" else min(evaluation.windows, _WINDOWS_ON_THE_WAY)
        params = evaluate.params.model_validate({"engine": recipe.engine, "windows": windows})
        add(Step(evaluate, params, index, (("reference", latest["reference"]),), checks=what))

    for stage, params in recipe.stages:
        if stage.takes not in latest:
            raise InputError(
                f"an earlier stage that gives {stage.takes!r} before {stage.name!r} in {recipe.name}",
                f"only {', '.join(sorted(latest))}",
                "reorder the recipe's stages",
            )
        side = tuple((kind, latest[kind]) for kind in stage.also if kind in latest)
        index = add(Step(stage, params, latest[stage.takes], side))
        latest[stage.gives] = index
        if stage.name == "checkpoint":
            values = evaluation.model_dump()
            latest["reference"] = add(Step(reference, reference.params.model_validate(values), index))
            if source.artifact.facts["format"] == find_engine(recipe.engine).RUNS:
                check(-1, "import")
        elif any(gate.of == stage.name for gate in recipe.gates):
            check(index, stage.name)
    runs = find_engine(recipe.engine).RUNS
    result = latest.get(runs)
    if result is None:
        raise InputError(f"a stage in {recipe.name} that gives {runs!r} for {recipe.engine}", "none", "add one")
    check(result, "bundle")
    return steps, result


def _predict_tensors(
    tensors: Sequence[Tensor], steps: Sequence[Step], result: int
) -> tuple[Sequence[Tensor], list[str]]:
    chain = []
    index = result
    while index >= 0:
        chain.append(steps[index])
        index = steps[index].input
    notes: list[str] = []
    for step in reversed(chain):
        tensors, told = step.stage.predict(tensors, step.params, frozenset(kind for kind, _ in step.side))
        notes.extend(told)
    return tensors, notes


def _predictions(
    target: Target,
    shape: ModelShape,
    tensors: Sequence[Tensor],
    memory: MemoryPlan,
    context_tokens: int,
    kv_type: str,
) -> list[Measurement]:
    sizes = {
        "weight_bytes": memory.weight_bytes,
        "kv_cache_bytes": memory.kv_cache_bytes,
        "compute_buffer_bytes": memory.compute_buffer_bytes,
        "required_bytes": memory.required_bytes,
        "usable_bytes": memory.usable_bytes,
    }
    exact = [
        Measurement(name=name, value=value, unit="bytes", kind="predicted", device=target.name)
        for name, value in sizes.items()
    ]
    return exact + predict_latency(target, shape, tensors, context_tokens, kv_type)


def _smaller_types(plan: Plan, fits: Any) -> list[str]:
    """The largest file type of llama.cpp below the planned size that fits, if one does."""
    position = next(i for i, step in enumerate(plan.steps) if step.stage.name == "gguf")
    for name in ("Q8_0", "Q6_K", "Q5_K_M", "Q4_K_M", "Q4_0", "Q3_K_M", "Q2_K"):
        step = plan.steps[position]
        steps = list(plan.steps)
        steps[position] = replace(step, params=step.params.model_copy(update={"type": name}))
        tensors, _ = _predict_tensors(plan.shape.tensors, steps, plan.result)
        weight_bytes = sum(tensor_bytes(t.type, t.shape) for t in tensors)
        if weight_bytes < plan.weight_bytes and fits(weight_bytes, plan.context_tokens, plan.kv_type):
            return [f"--set gguf.type={name}"]
    return []
