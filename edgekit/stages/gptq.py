"""GPTQ: matrices rounded column by column, each column's error fed into those not yet rounded."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Literal

from pydantic import Field

from edgekit.artifact import Artifact
from edgekit.model import ModelShape
from edgekit.stage import CalibratedParams, Facts, StageContext, Tensor, stage
from edgekit.stages._gptqmodel import (
    calibrated_host_bytes,
    find_group_size,
    packed_bytes,
    quantize,
    type_name,
)
from edgekit.stages._quantized import planned_tensors, predict_tensors

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
    damping: float = Field(0.05, gt=0, lt=1)
    """Share of the mean diagonal that is added to the diagonal of the second moments."""


@stage(
    version=1,
    takes="checkpoint",
    gives="checkpoint[gptq]",
    tools=("gptqmodel", "torch", "transformers", "safetensors"),
)
def run(model: Artifact, out: Path, params: Params, ctx: StageContext) -> Facts:
    """Quantize the matrices of all layers with GPTQ (Frantar et al., arXiv:2210.17323)."""
    group_size = _group_size([*planned_tensors(model).values()], params)
    settings = {
        "bits": params.bits,
        "desc_act": params.act_order,
        "sym": params.sym,
        "damp_percent": params.damping,
        # the library's default where columns keep their order: groups by activation, no cost at run time
        "act_group_aware": not params.act_order and group_size != -1,
    }
    return quantize("gptq", model, out, params, ctx, group_size=group_size, settings=settings)


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
    # a layer's inputs and outputs, and the widest activation between them
    return calibrated_host_bytes(shape, params, kept=4 * shape.hidden + shape.feed_forward // max(1, params.windows))


def _group_size(tensors: Sequence[Tensor], params: Params) -> int:
    # zero points of so many outputs fill words
    columns = 32 if params.bits == 3 else 32 // params.bits
    return find_group_size("gptq", tensors, params.group_size, _GROUP_SIZES, columns)
