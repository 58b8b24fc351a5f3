"""The integer matrices of an ONNX model rounded anew with error feedback, of as many bits as a budget allows."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from edgekit.artifact import Artifact
from edgekit.errors import InputError, ToolError
from edgekit.formats.onnx import read_tensors
from edgekit.grids import integer_parts
from edgekit.grids.budget import Option, assumed_loss, choose, spend
from edgekit.huggingface import calibration_windows, open_checkpoint
from edgekit.model import ModelShape
from edgekit.stage import BudgetParams, CalibratedParams, Facts, StageContext, Tensor, stage
from edgekit.stages._onnx_graph import DATA, HALF, MODEL, stored_bytes
from edgekit.stages._quantized import rounding_host_bytes
from edgekit.stages.sensitivity import FILE_NAME as SENSITIVITY_FILE
from edgekit.stages.sensitivity import read_sensitivity
from edgekit.target import Target
from edgekit.tools import copy_file

if TYPE_CHECKING:
    from edgekit.stages._onnx_round import Graph

TYPES = tuple(f"int{bits}-g{group}{zeros}" for bits in (4, 8) for group in (32, 64, 128) for zeros in ("", "-zeros"))
"""What MatMulNBits has fast kernels for on a processor, and `sensitivity` is worth asking about."""
_PROVIDERS = ("cpu", "cuda")
"""Whose MatMulNBits takes any of these types in one graph, by their sources; run on the CPU's alone."""
_EMBEDDING = "token_embd.weight"
_PLANNED = re.compile(r"int(\d)-b(\d+)")
_ADDED_BYTES = 256
"""More than the graph grows by for each part: names, and the place of zero points."""


class Params(CalibratedParams, BudgetParams):
    """Parameters of `onnx_round`. Without a budget every matrix keeps its type."""

    @property
    def unused(self) -> frozenset[str]:
        """Losses are read for a budget."""
        return frozenset() if self.has_budget else frozenset({"sensitivity"})


@stage(
    version=2,
    takes="onnx",
    gives="onnx",
    also=("checkpoint", "sensitivity"),
    tools=("onnx", "torch", "transformers"),
)
def run(model: Artifact, out: Path, params: Params, ctx: StageContext) -> Facts:
    """Choose a type for every matrix and round it onto that (`edgekit.grids.solver`), a layer at a time.

    Also a table of embeddings in half precision becomes integers, where the budget finds that worth it. Attention,
    activations and everything else of the graph stay as they are.
    """
    from edgekit.stages import _onnx_round

    if "checkpoint" not in ctx.side:
        raise InputError("a checkpoint to round with feedback", "only an ONNX model", "build from the checkpoint")
    for name in model.manifest.files:
        if name not in (MODEL, DATA):
            copy_file(model.path / name, out / name)
    tokenizer, network = open_checkpoint(ctx.side["checkpoint"])
    windows = calibration_windows(
        tokenizer, lambda: network, params.text, params.windows, params.window_tokens, ctx.progress
    )
    graph = _onnx_round.open_graph(model.path, ctx.side["checkpoint"], network)
    budget = params.budget(ctx.side["checkpoint"].facts["parameters"])
    types = graph.types
    facts: Facts = {}
    if budget is not None:
        if "sensitivity" not in ctx.side:
            raise InputError("measured losses for a budget", "none", "add `- sensitivity:` before `- onnx_round:`")
        losses = read_sensitivity(ctx.side["sensitivity"].path / SENSITIVITY_FILE)
        allowed = {name: params.allowed(by_type) for name, by_type in losses.items()}
        types, facts = _within_budget(graph, allowed, budget)
    graph.round(types, windows, out, lambda done, total: ctx.progress(done, total, "matrices"), ctx.kept)
    written = sum((out / name).stat().st_size for name in (MODEL, DATA))
    if budget is not None and written > budget:
        raise ToolError(f"files of at most {budget} bytes", f"{written}", "lower the budget a little")
    return {
        **model.facts,
        "algorithm": "feedback",
        "weight_bytes": sum(tensor.nbytes for tensor in read_tensors(out / MODEL)),
        "rounded_with_feedback": sum(kind != HALF for kind in types.values()),
        **facts,
    }


def _within_budget(
    graph: Graph, losses: Mapping[str, Mapping[str, float]], budget: int
) -> tuple[dict[str, str], Facts]:
    """Return the type of each part that loses least in files of at most `budget` bytes, and facts on the choice."""
    options = {
        name: [
            Option(kind, part.nbytes(kind), sum(losses[tensor][kind] for tensor in part.tensors) if kind != HALF else 0)
            for kind in part.kinds(losses)
        ]
        for name, part in graph.parts.items()
    }
    besides = graph.nbytes - sum(part.nbytes(graph.types[name]) for name, part in graph.parts.items())
    besides += _ADDED_BYTES * len(options)
    return spend(options, budget, besides)


def predict(
    tensors: Sequence[Tensor], params: Params, side: frozenset[str], *, shape: ModelShape | None = None
) -> tuple[Sequence[Tensor], Sequence[str]]:
    """Types by assumed losses where there is a budget; else what the graph has."""
    budget = params.budget(shape.parameters if shape else sum(math.prod(t.shape) for t in tensors))
    if budget is None:
        return tensors, ()
    width = {"f32": 4, "f16": 2}.get(next((t.type for t in tensors if len(t.shape) == 1), "f32"), 4)
    options: dict[str, list[Option]] = {}
    for tensor in tensors:
        planned = _PLANNED.fullmatch(tensor.type)
        if planned is None and (tensor.name != _EMBEDDING or tensor.type != HALF):
            continue
        columns, rows = tensor.shape
        parts = {kind: integer_parts(kind) for kind in TYPES}
        kinds = [kind for kind, (_, block, zeros) in parts.items() if columns % block == 0 and not zeros]
        sizes = {kind: stored_bytes(kind, rows, columns, width) for kind in params.allowed(dict.fromkeys(kinds, 0.0))}
        options[tensor.name] = [
            Option(kind, size, assumed_loss(rows * columns, size)) for kind, size in sizes.items()
        ] + ([] if planned else [Option(HALF, tensor.nbytes, 0.0)])
    besides = sum(tensor.nbytes for tensor in tensors if tensor.name not in options)
    found = choose(list(options.values()), budget, besides)
    chosen = {
        name: next(option for option in kinds if option.type == kind)
        for (name, kinds), kind in zip(options.items(), found.types, strict=True)
    }
    return [
        replace(tensor, type=option.type.replace("-g", "-b"), stored_bytes=option.nbytes)
        if (option := chosen.get(tensor.name))
        else tensor
        for tensor in tensors
    ], ()


def refuses(params: Params, target: Target) -> str | None:
    """Why a target's execution provider may not run a mix of bits, blocks and zero points."""
    if target.onnx_provider in _PROVIDERS:
        return None
    return f"matrices of several types are for {' and '.join(_PROVIDERS)}, not for {target.onnx_provider}"


def host_bytes(shape: ModelShape, params: Params) -> int:
    """Peak memory of the build host in bytes."""
    return rounding_host_bytes(shape, params)
