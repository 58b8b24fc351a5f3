"""Quantization to any type of llama.cpp: by its own quantizer in this process, or on its types with error feedback."""

from __future__ import annotations

import ctypes
import math
import re
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from pydantic import Field, field_validator

from edgekit.artifact import Artifact
from edgekit.calibration import Split
from edgekit.engines.llama_cpp import Log, collect_log, library
from edgekit.errors import InputError, ToolError, suggest
from edgekit.formats import gguf
from edgekit.grids import NAMES
from edgekit.grids.budget import Option, assumed_loss, spend
from edgekit.huggingface import calibration_windows, open_checkpoint
from edgekit.stage import BudgetParams, CalibratedParams, Facts, StageContext, StageParams, Tensor, stage
from edgekit.stages.imatrix import FILE_NAME as IMATRIX_FILE
from edgekit.stages.imatrix import read_imatrix
from edgekit.stages.sensitivity import FILE_NAME as SENSITIVITY_FILE
from edgekit.stages.sensitivity import read_sensitivity
from edgekit.target import Target

FILE_NAME = "model.gguf"

FILE_TYPES = {
    "F32": 0, "F16": 1, "BF16": 32,
    "Q4_0": 2, "Q4_1": 3, "Q5_0": 8, "Q5_1": 9, "Q8_0": 7, "Q1_0": 40, "Q2_0": 41,
    "Q2_K": 10, "Q2_K_S": 21, "Q3_K_S": 11, "Q3_K_M": 12, "Q3_K_L": 13,
    "Q4_K_S": 14, "Q4_K_M": 15, "Q5_K_S": 16, "Q5_K_M": 17, "Q6_K": 18,
    "IQ1_S": 24, "IQ1_M": 31, "IQ2_XXS": 19, "IQ2_XS": 20, "IQ2_S": 28, "IQ2_M": 29,
    "IQ3_XXS": 23, "IQ3_XS": 22, "IQ3_S": 26, "IQ3_M": 27, "IQ4_NL": 25, "IQ4_XS": 30,
    "TQ1_0": 36, "TQ2_0": 37, "MXFP4_MOE": 38,
}  # fmt: skip
"""llama.cpp's file types (`enum llama_ftype` in llama.h) that its quantizer writes."""


class QuantizerParams(StageParams):
    """What llama.cpp's quantizer is told."""

    type: str = Field("Q4_K_M", json_schema_extra={"enum": [*sorted(FILE_TYPES)]})
    """File type: llama.cpp's mix of tensor types."""
    tensor_types: dict[str, str] = Field(default_factory=dict)
    """Types of single tensors: regular expression on the GGUF name -> tensor type, e.g. `ffn_down: q6_K`."""
    output_type: str | None = None
    """Type of the output head, and of the embedding where the two are one tensor."""
    token_embedding_type: str | None = None
    pure: bool = False
    """Give every matrix the file type's base type, without llama.cpp's mix."""

    @field_validator("type")
    @classmethod
    def _is_a_file_type(cls, value: str) -> str:
        if value.upper() not in FILE_TYPES:
            known = suggest(value.upper(), FILE_TYPES) or f" (one of {', '.join(FILE_TYPES)})"
            raise ValueError(f"not a file type of llama.cpp{known}")
        return value.upper()

    @field_validator("output_type", "token_embedding_type")
    @classmethod
    def _is_a_type(cls, value: str | None) -> str | None:
        return None if value is None else gguf.canonical_type(value)

    @field_validator("tensor_types")
    @classmethod
    def _are_types(cls, value: dict[str, str]) -> dict[str, str]:
        for pattern in value:
            try:
                re.compile(pattern)
            except re.error as error:
                raise ValueError(f"{pattern!r} is not a regular expression ({error})") from None
        return {pattern: gguf.canonical_type(name) for pattern, name in value.items()}


class Params(QuantizerParams, CalibratedParams, BudgetParams):
    """Parameters of `gguf`; the text is read for feedback only."""

    rate: float | None = Field(None, gt=0, le=1)
    """Within a budget: least decode rate, by the target's `weight_costs`, as a part of that of a file of one type and
    the same size. Without, only divergence and bytes count."""
    feedback: bool = False
    """Round with error feedback (GPTQ, arXiv:2210.17323) on the types that have a grid; needs the checkpoint."""

    @property
    def text_fields(self) -> Mapping[str, Split]:
        """The calibration text of feedback."""
        return super().text_fields if self.feedback else {}

    @property
    def unused(self) -> frozenset[str]:
        """The checkpoint is read for feedback, losses for a budget."""
        used = {"checkpoint": self.feedback, "sensitivity": self.has_budget}
        return frozenset(kind for kind, wanted in used.items() if not wanted)

    @property
    def target_fields(self) -> tuple[str, ...]:
        """What types cost there, for a budget."""
        return ("compute.costs",) if self.has_budget else ()

    @property
    def tools(self) -> tuple[str, ...]:
        """What feedback computes with."""
        return ("torch", "transformers", "gguf") if self.feedback else ()


_COST_MARGIN = 1.01
"""Costs of weights are measured to within some percent: a rate is held by more than it asks for."""
_ADDED_BYTES = 4096
"""More than the metadata that the quantizer adds, and the alignment after it."""


@dataclass(frozen=True)
class Decision:
    """What llama.cpp's quantizer decided: the type of each tensor, and where it fell back."""

    types: dict[str, str]
    fallbacks: tuple[dict[str, str], ...]


@stage(
    version=4, takes="gguf", gives="gguf", also=("imatrix", "checkpoint", "sensitivity"), tools=("llama-cpp-python",)
)
def run(model: Artifact, out: Path, params: Params, ctx: StageContext) -> Facts:
    """Quantize the weights: under the importance matrix where there is one, with feedback, within a budget."""
    imatrix = read_imatrix(ctx.side["imatrix"].path / IMATRIX_FILE) if "imatrix" in ctx.side else None
    source, target = model.path / FILE_NAME, out / FILE_NAME
    facts: Facts = {}
    budget = params.budget(gguf.read_header(source).parameters)
    if budget is not None:
        if "sensitivity" not in ctx.side:
            raise InputError("measured losses for a budget", "none", "add `- sensitivity:` before `- gguf:`")
        losses = read_sensitivity(ctx.side["sensitivity"].path / SENSITIVITY_FILE)
        assert ctx.target is not None
        params, facts = within_budget(source, target, params, imatrix, losses, budget, ctx.target.compute.costs)
    decision = quantize(source, target, params, imatrix, on_tensor=lambda i, n: ctx.progress(i, n, "tensors"))
    if budget is not None and target.stat().st_size > budget:
        raise ToolError(f"a file of at most {budget} bytes", f"{target.stat().st_size}", "lower the budget a little")
    rounded = _feed_back(ctx, params, source, target) if params.feedback else []
    header = gguf.read_header(target)
    return {
        "architecture": header.architecture,
        "type": params.type,
        "weight_bytes": header.weight_bytes,
        "fallbacks": list(decision.fallbacks),
        "imatrix": imatrix is not None,
        "rounded_with_feedback": len(rounded),
        **facts,
    }


def outlook(model: Artifact, side: Mapping[str, Artifact], params: Params, target: Target) -> Facts | None:
    """What `run` would choose."""
    budget = params.budget(gguf.read_header(model.path / FILE_NAME).parameters)
    if budget is None or "sensitivity" not in side:
        return None
    imatrix = read_imatrix(side["imatrix"].path / IMATRIX_FILE) if "imatrix" in side else None
    losses = read_sensitivity(side["sensitivity"].path / SENSITIVITY_FILE)
    with tempfile.TemporaryDirectory() as scratch:
        source, file = model.path / FILE_NAME, Path(scratch) / FILE_NAME
        return within_budget(source, file, params, imatrix, losses, budget, target.compute.costs)[1]


def _feed_back(ctx: StageContext, params: Params, source: Path, target: Path) -> list[str]:
    from edgekit.stages._feedback import round_file

    if "checkpoint" not in ctx.side:
        raise InputError("a checkpoint to round with feedback", "only a GGUF file", "build from the checkpoint")
    tokenizer, network = open_checkpoint(ctx.side["checkpoint"])
    windows = calibration_windows(
        tokenizer, lambda: network, params.text, params.windows, params.window_tokens, ctx.progress
    )
    return round_file(
        ctx.side["checkpoint"], network, windows, source, target, lambda i, n: ctx.progress(i, n, "matrices"), ctx.kept
    )


def predict(
    tensors: Sequence[Tensor], params: Params, side: frozenset[str], *, target: Target | None = None
) -> tuple[Sequence[Tensor], Sequence[str]]:
    """Ask llama.cpp's quantizer, in a dry run on a skeleton of the model, which type each tensor takes.

    The skeleton has the model's tensor names and shapes and no data. It poses as a llama: the quantizer's
    choices depend on names, shapes, layer and expert counts and the head ratio.
    """
    with tempfile.TemporaryDirectory() as scratch:
        skeleton = Path(scratch) / "skeleton.gguf"
        gguf.write_skeleton(skeleton, _skeleton_metadata(tensors), [(t.name, t.shape, t.type) for t in tensors])
        # the quantizer only asks whether there is a matrix, not what it says
        imatrix = {"-": np.ones(1, np.float32)} if "imatrix" in side else None
        out = Path(scratch) / "out.gguf"
        budget = params.budget(sum(math.prod(t.shape) for t in tensors))
        if budget is not None:
            losses, costs = _assumed_losses(tensors), target.compute.costs if target else {}
            params, _ = within_budget(skeleton, out, params, imatrix, losses, budget, costs)
        decision = quantize(skeleton, out, params, imatrix, dry_run=True)
    notes = [
        f"{f['tensor']}: {f['wanted']} does not divide its rows, falls back to {f['found']}" for f in decision.fallbacks
    ]
    return [replace(t, type=decision.types.get(t.name, t.type)) for t in tensors], notes


def within_budget(
    source: Path,
    target: Path,
    params: Params,
    imatrix: Mapping[str, np.ndarray[Any, np.dtype[np.float32]]] | None,
    losses: Mapping[str, Mapping[str, float]],
    budget: int,
    costs: Mapping[str, float],
) -> tuple[Params, Facts]:
    """Return the parameters with the types that lose least in a file of at most `budget` bytes, and facts on them.

    `costs` are those of a target by types, which then alone are chosen; without any, a weight costs its bytes. Tensors
    without losses, and those that `tensor_types` names, keep what they have. Raises InputError where the budget is too
    small.
    """
    header = gguf.read_header(source)
    mix = quantize(source, target, params, imatrix, dry_run=True).types

    def nbytes(info: gguf.TensorInfo, type_name: str) -> int:
        return -(-gguf.tensor_bytes(type_name, info.shape) // header.alignment) * header.alignment

    untied = any(info.name == "output.weight" for info in header.tensors)

    def cost(info: gguf.TensorInfo, type_name: str) -> float:
        if untied and info.name == "token_embd.weight":
            return 0.0  # it is looked up
        return math.prod(info.shape) * costs[type_name.upper()] if costs else nbytes(info, type_name)

    options: dict[str, list[Option]] = {}
    besides = header.data_offset + _ADDED_BYTES
    for info in header.tensors:
        if info.name in losses and not any(re.search(pattern, info.name) for pattern in params.tensor_types):
            known = {name: loss for name, loss in losses[info.name].items() if not costs or name.upper() in costs}
            kinds = {gguf.canonical_type(name): loss for name, loss in params.allowed(known).items()}
            options[info.name] = [
                Option(name, nbytes(info, name), loss, cost(info, name)) for name, loss in kinds.items()
            ]
        else:
            besides += nbytes(info, mix.get(info.name, info.type))
    rate = params.rate and params.rate * (_COST_MARGIN if costs else 1)
    types, facts = spend(options, budget, besides, rate)
    named = {"^" + name.replace(".", r"\.") + "$": kind for name, kind in types.items()}
    update = {
        "tensor_types": named | params.tensor_types,
        "output_type": types.get("output.weight", params.output_type),
        "token_embedding_type": types.get("token_embd.weight", params.token_embedding_type),
    }
    return params.model_copy(update=update), facts


def _assumed_losses(tensors: Sequence[Tensor]) -> dict[str, dict[str, float]]:
    known = {gguf.canonical_type(name): name for name in NAMES}
    kinds = [kind for kind in gguf.GGML_TYPES.values() if kind.name in known]
    return {
        t.name: {
            kind.name: assumed_loss(math.prod(t.shape), gguf.tensor_bytes(kind.name, t.shape))
            for kind in kinds
            if t.shape[0] % kind.block_elements == 0
        }
        for t in tensors
        if len(t.shape) == 2 and t.shape[0] % 32 == 0
    }


def quantize(
    source: Path,
    target: Path,
    params: QuantizerParams,
    imatrix: Mapping[str, np.ndarray[Any, np.dtype[np.float32]]] | None,
    *,
    dry_run: bool = False,
    on_tensor: Callable[[int, int], None] = lambda index, total: None,
) -> Decision:
    """Run `llama_model_quantize` from `source` to `target`.

    Raises InputError when the types need an importance matrix and there is none (also in a dry run), and ToolError
    with llama.cpp's last error.
    """
    api = library()
    identities = {t.name: identity for identity, t in gguf.GGML_TYPES.items()}
    settings = api.llama_model_quantize_default_params()
    settings.ftype = FILE_TYPES[params.type]
    settings.pure = params.pure
    settings.dry_run = dry_run
    settings.nthread = 0
    if params.output_type:
        settings.output_tensor_type = identities[params.output_type]
    if params.token_embedding_type:
        settings.token_embedding_type = identities[params.token_embedding_type]
    overrides = [(pattern.encode(), identities[name]) for pattern, name in params.tensor_types.items()]
    settings.tt_overrides = (api.llama_model_tensor_override * (len(overrides) + 1))(*overrides, (None, 0))
    if imatrix is not None:
        entries = [
            (name.encode(), values.ctypes.data_as(ctypes.POINTER(ctypes.c_float)), values.size)
            for name, values in imatrix.items()
        ]
        settings.imatrix = (api.llama_model_imatrix_data * (len(entries) + 1))(*entries, (None, None, 0))

    def on_line(line: str) -> None:
        if found := _TENSOR_LINE.match(line):
            on_tensor(int(found[1]), int(found[2]))

    with collect_log(on_line) as log:
        status = api.llama_model_quantize(str(source).encode(), str(target).encode(), ctypes.byref(settings))
    if imatrix is None and any(_NEEDS_IMATRIX in line for line in log):
        raise InputError(
            f"an importance matrix for {params.type}", "none in the recipe", "add `- imatrix:` before `- gguf:`"
        )
    if status != 0:
        raise ToolError(
            f"{params.type} from llama.cpp's quantizer", _last_error(log), "choose another type with --set gguf.type="
        )
    return _read_decision(log)


_NEEDS_IMATRIX = "an imatrix!"
"""Ends what llama.cpp says when a tensor's type needs a matrix; which types do depends on the tensor."""
_TENSOR_LINE = re.compile(r"\[ *(\d+)/ *(\d+)\] +(\S+) +- \[.*?\], type = +(\w+), (.*)")
_FALLBACK_LINE = re.compile(r"warning: (\S+) +- ncols .*required for type +(\w+)\).* falling back to +(\w+)")


def _read_decision(log: Sequence[str]) -> Decision:
    types, fallbacks = {}, []
    for line in log:
        if found := _TENSOR_LINE.match(line):
            changed = re.search(r"\((\w+)\)\s*$", found[5]) or re.search(
                r"(?:converting|quantizing) to (\w+)", found[5]
            )
            types[found[3]] = changed[1] if changed else found[4]
        elif found := _FALLBACK_LINE.search(line):
            fallbacks.append({"tensor": found[1], "wanted": found[2], "found": found[3]})
    return Decision(types, tuple(fallbacks))


def _last_error(log: Log) -> str:
    return (log.errors or log or ["no message"])[-1].strip()


def _skeleton_metadata(tensors: Sequence[Tensor]) -> dict[str, str | int | float | bool]:
    shapes = {t.name: t.shape for t in tensors}
    layers = 1 + max((int(name.split(".")[1]) for name in shapes if name.startswith("blk.")), default=-1)
    query, key = shapes.get("blk.0.attn_q.weight"), shapes.get("blk.0.attn_k.weight")
    groups = query[1] // key[1] if query and key and key[1] else 1
    hidden = shapes["token_embd.weight"][0]
    experts = max((shape[2] for shape in shapes.values() if len(shape) > 2), default=0)
    metadata: dict[str, str | int | float | bool] = {
        "general.architecture": "llama",
        "llama.block_count": layers,
        "llama.context_length": 512,
        "llama.embedding_length": hidden,
        "llama.feed_forward_length": 4 * hidden,
        "llama.attention.head_count": groups,
        "llama.attention.head_count_kv": 1,
        "llama.attention.layer_norm_rms_epsilon": 1e-5,
    }
    if experts:
        metadata |= {"llama.expert_count": experts, "llama.expert_used_count": 1}
    return metadata
