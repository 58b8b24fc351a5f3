"""AWQ: matrices rounded after scaling up the inputs that matter, with the inverse folded into what comes before."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Literal

from edgekit.artifact import Artifact
from edgekit.model import ModelShape
from edgekit.stage import CalibratedParams, Facts, StageContext, Tensor, stage
from edgekit.stages._gptqmodel import calibrated_host_bytes, quantize
from edgekit.stages._quantized import find_group_size, packed_bytes, planned_tensors, predict_tensors, type_name

_BITS = 4  # what the kernels of the format (`gemm`) run
_GROUP_SIZES = (128, 64, 32, 16)
_COLUMNS = 64  # the search for clipping bounds takes so many outputs at a time


class Params(CalibratedParams):
    """Parameters of `awq`."""

    group_size: Literal["auto", 16, 32, 64, 128] = "auto"
    """Inputs that share a scale. `auto` takes the largest of 128, 64 and 32 that divides every matrix."""


@stage(
    version=1,
    takes="checkpoint",
    gives="checkpoint[awq]",
    tools=("gptqmodel", "torch", "transformers", "safetensors"),
)
def run(model: Artifact, out: Path, params: Params, ctx: StageContext) -> Facts:
    """Quantize the matrices of all layers to 4 bits with AWQ (Lin et al., arXiv:2306.00978)."""
    group_size = _group_size([*planned_tensors(model).values()], params)
    settings = {"bits": _BITS, "sym": False}
    return quantize(model, out, params, ctx, group_size=group_size, settings=settings)


def predict(tensors: Sequence[Tensor], params: Params, side: frozenset[str]) -> tuple[Sequence[Tensor], Sequence[str]]:
    """Codes, and a float16 scale and a zero point per group and output."""
    group_size = _group_size(tensors, params)

    def matrix_bytes(inputs: int, outputs: int) -> int:
        row = packed_bytes(outputs, _BITS)
        return inputs * row + inputs // group_size * (2 * outputs + row)

    return predict_tensors(tensors, type_name("awq", _BITS, group_size), matrix_bytes), ()


def host_bytes(shape: ModelShape, params: Params) -> int:
    """Peak memory of the build host in bytes."""
    # the inputs of every matrix of a layer are kept for the search, and the outputs to compare with
    return calibrated_host_bytes(shape, params, kept=8 * shape.hidden + 3 * shape.feed_forward)


def _group_size(tensors: Sequence[Tensor], params: Params) -> int:
    return find_group_size("awq", tensors, params.group_size, _GROUP_SIZES, _COLUMNS)
