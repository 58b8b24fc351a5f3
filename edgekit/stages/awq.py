"""AWQ checkpoints: matrices rounded with the inputs that matter scaled up, and the inverse in what comes before."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Literal

from edgekit.artifact import Artifact
from edgekit.grids import integer_grid
from edgekit.model import ModelShape, read_config
from edgekit.stage import CalibratedParams, Facts, StageContext, Tensor, stage
from edgekit.stages._quantized import (
    find_group_size,
    packed_bytes,
    planned_tensors,
    predict_tensors,
    rounding_host_bytes,
    stored_dtype,
    type_name,
)

_BITS = 4  # what the kernels of the format (`gemm`) run
_GROUP_SIZES = (128, 64, 32, 16)
_COLUMNS = 8  # a word holds so many outputs


class Params(CalibratedParams):
    """Parameters of `awq`."""

    group_size: Literal["auto", 16, 32, 64, 128] = "auto"
    """Inputs that share a scale. `auto` takes the largest of 128, 64 and 32 that divides every matrix."""


@stage(
    version=3,
    takes="checkpoint",
    gives="checkpoint[awq]",
    tools=("torch", "transformers", "safetensors"),
)
def run(model: Artifact, out: Path, params: Params, ctx: StageContext) -> Facts:
    """Round the matrices of all layers to 4 bits after AWQ's scaling (Lin et al., arXiv:2306.00978).

    Scales of inputs are searched as AWQ does and folded into the norm or matrix before them, where there is one that
    nothing else reads. Rounding is then `edgekit.grids.solver`'s, not to the nearest.
    """
    from edgekit.grids.containers import awq_tensors
    from edgekit.stages._awq import Folding
    from edgekit.stages._integers import quantize_checkpoint

    group_size = _group_size([*planned_tensors(model).values()], params)
    quantization = {
        "quant_method": "awq",
        "version": "gemm",
        "checkpoint_format": "gemm",
        "bits": _BITS,
        "group_size": group_size,
        "zero_point": True,
    }
    dtype = stored_dtype(read_config(model.path)) or "float16"

    def prepare(network: object) -> tuple[Folding, dict[str, object]]:
        folding = Folding(network, group_size, dtype)
        return folding, folding.changed

    return quantize_checkpoint(
        model,
        out,
        params,
        ctx,
        quantization,
        grid_of=lambda inputs: integer_grid(_BITS, group_size, symmetric=False),
        pack=awq_tensors,
        prepare=prepare,
    )


def predict(tensors: Sequence[Tensor], params: Params, side: frozenset[str]) -> tuple[Sequence[Tensor], Sequence[str]]:
    """Codes, and a float16 scale and a zero point per group and output."""
    group_size = _group_size(tensors, params)

    def matrix_bytes(inputs: int, outputs: int) -> int:
        row = packed_bytes(outputs, _BITS)
        return inputs * row + inputs // group_size * (2 * outputs + row)

    return predict_tensors(tensors, type_name("awq", _BITS, group_size), matrix_bytes), ()


def host_bytes(shape: ModelShape, params: Params) -> int:
    """Peak memory of the build host in bytes."""
    return rounding_host_bytes(shape, params)


def _group_size(tensors: Sequence[Tensor], params: Params) -> int:
    return find_group_size("awq", tensors, params.group_size, _GROUP_SIZES, _COLUMNS)
