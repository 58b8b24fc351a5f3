"""How `gptq` rounds a network: each matrix onto integers, and what the checkpoint holds of it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn

from edgekit.errors import InputError
from edgekit.grids import integer_grid
from edgekit.grids.containers import gptq_tensors
from edgekit.grids.solver import round_matrix
from edgekit.stage import Progress
from edgekit.stages._hessians import with_hessians

if TYPE_CHECKING:
    from edgekit.stages.gptq import Params


def round_layers(
    network: Any,
    windows: npt.NDArray[np.int32],
    matrices: Sequence[str],
    params: Params,
    group_size: int,
    progress: Progress,
) -> dict[str, dict[str, Tensor]]:
    """Round matrices and return what stands for each in the checkpoint, by the matrix's name there.

    Args:
        network: A causal language model of transformers in float32; it is left with the rounded weights.
        windows: (windows, tokens) of calibration text.
        matrices: Names of weights in the checkpoint.
        params: The stage's.
        group_size: Inputs that share a scale; -1 for all.
        progress: Called with matrices done and their number.

    Raises InputError for a matrix that no linear layer holds.
    """
    modules = {name: module for name, module in network.named_modules() if isinstance(module, nn.Linear)}
    linears = {}
    for matrix in matrices:
        name = matrix.removesuffix(".weight")
        if name not in modules:
            raise InputError("linear layers, for gptq", f"{matrix} in another kind of layer", "use a gguf recipe")
        linears[name] = modules[name]
    tokens = torch.from_numpy(windows.astype(np.int64))
    packed: dict[str, dict[str, Tensor]] = {}
    with torch.inference_mode():
        for name, module, hessian in with_hessians(network, tokens, linears, changes=True):
            module.weight.data, tensors = _round(module.weight.data, hessian, params, group_size)
            packed[f"{name}.weight"] = {f"{name}.{part}": tensor for part, tensor in tensors.items()}
            progress(len(packed), len(linears), "matrices")
    return packed


def _round(weight: Tensor, hessian: Tensor, params: Params, group_size: int) -> tuple[Tensor, dict[str, Tensor]]:
    """Return the rounded matrix and its tensors."""
    columns = weight.shape[1]
    block = columns if group_size == -1 else group_size
    order = torch.arange(columns)
    if params.act_order:
        order = hessian.diagonal().argsort(descending=True, stable=True)
    back = order.argsort()
    grid = integer_grid(params.bits, block, symmetric=params.sym)
    rounded = round_matrix(weight[:, order], hessian[order][:, order], grid, damping=params.damping)
    return rounded.matrix[:, back], gptq_tensors(rounded.codes[:, back], rounded.scales, params.bits, back // block)
