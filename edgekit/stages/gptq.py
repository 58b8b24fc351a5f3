"""GPTQ checkpoints: matrices rounded column by column, each column's error fed into those not yet rounded."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Literal

from pydantic import Field

from edgekit.artifact import Artifact
from edgekit.grids import integer_grid
from edgekit.model import ModelShape
from edgekit.stage import CalibratedParams, Facts, StageContext, Tensor, stage
from edgekit.stages._quantized import (
    find_group_size,
    packed_bytes,
    planned_tensors,
    predict_tensors,
    rounding_host_bytes,
    type_name,
)

_GROUP_SIZES = (1024, 512, 256, 128, 64, 32, 16)


class Params(CalibratedParams):
    """Parameters of `gptq`."""

    bits: Literal[2, 3, 4, 8] = 4
    group_size: Literal["auto", -1, 16, 32, 64, 128, 256, 512, 1024] = "auto"
    """Inputs that share a scale; -1: all. `auto` takes the largest of 128, 64 and 32 that divides every matrix."""
    act_order: bool = False
    """Round columns in the order of their activations (`desc_act`): a little better, slower on some kernels."""
    sym: bool = True
    """Grids symmetric about zero, which more kernels run; else with a zero point per group."""
    damping: float | None = Field(None, gt=0, lt=10)
    """What is added to each second moment of the inputs, as a part of its geometric mean with their average. Without,
    0.4 times the root of inputs over calibration tokens."""


@stage(
    version=3,
    takes="checkpoint",
    gives="checkpoint[gptq]",
    tools=("torch", "transformers", "safetensors"),
)
def run(model: Artifact, out: Path, params: Params, ctx: StageContext) -> Facts:
    """Round the matrices of all layers with GPTQ (Frantar et al., arXiv:2210.17323) and a sweep after it.

    The rounding is `edgekit.grids.solver`'s, the format that of AutoGPTQ, which transformers and vLLM read.
    """
    from edgekit.grids.containers import gptq_tensors
    from edgekit.stages._integers import quantize_checkpoint

    group_size = _group_size([*planned_tensors(model).values()], params)
    quantization = {
        "quant_method": "gptq",
        "checkpoint_format": "gptq",
        "bits": params.bits,
        "group_size": group_size,
        "desc_act": params.act_order,
        "sym": params.sym,
    }
    return quantize_checkpoint(
        model,
        out,
        params,
        ctx,
        quantization,
        grid_of=lambda inputs: integer_grid(
            params.bits, inputs if group_size == -1 else group_size, symmetric=params.sym
        ),
        pack=lambda rounded: gptq_tensors(rounded, params.bits),
        # loaders take zero points for right only where a writer is named that is known to store them less 1, as we do
        writers=() if params.sym else ("gptqmodel:0.9.0",),
        damping=params.damping,
        act_order=params.act_order,
    )


def predict(tensors: Sequence[Tensor], params: Params, side: frozenset[str]) -> tuple[Sequence[Tensor], Sequence[str]]:
    """Codes, a float16 scale and a zero point per group and output, and a group index per input (int32)."""
    bits, group_size = params.bits, _group_size(tensors, params)

    def matrix_bytes(inputs: int, outputs: int) -> int:
        groups = 1 if group_size == -1 else inputs // group_size
        codes = packed_bytes(inputs, bits) * outputs
        return codes + groups * (2 * outputs + packed_bytes(outputs, bits)) + 4 * inputs

    name = type_name("gptq", bits, group_size) + ("-act-order" if params.act_order else "")
    return predict_tensors(tensors, name, matrix_bytes), ()


def host_bytes(shape: ModelShape, params: Params) -> int:
    """Peak memory of the build host in bytes."""
    return rounding_host_bytes(shape, params)


def _group_size(tensors: Sequence[Tensor], params: Params) -> int:
    # zero points of so many outputs fill words
    columns = 32 if params.bits == 3 else 32 // params.bits
    return find_group_size("gptq", tensors, params.group_size, _GROUP_SIZES, columns)
