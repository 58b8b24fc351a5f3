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
from edgekit.stage import Progress
from edgekit.stages._moments import Moments, round_group, with_moments

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
        for group, moments in with_moments(network, tokens, linears, changes=True):
            for name, tensors in _round(group, moments, params, group_size).items():
                packed[f"{name}.weight"] = {f"{name}.{part}": tensor for part, tensor in tensors.items()}
                progress(len(packed), len(linears), "matrices")
    return packed


def _round(
    modules: dict[str, nn.Linear], moments: Moments, params: Params, group_size: int
) -> dict[str, dict[str, Tensor]]:
    """Round matrices that read the same inputs and return the tensors of each."""
    hessian = moments.hessian
    columns = len(hessian)
    block = columns if group_size == -1 else group_size
    order = torch.arange(columns)
    if params.act_order:
        order = hessian.diagonal().argsort(descending=True, stable=True)
    back = order.argsort()
    for module in modules.values():
        module.weight.data = module.weight.data[:, order]
    grids = dict.fromkeys(modules, integer_grid(params.bits, block, symmetric=params.sym))
    found = round_group(modules, Moments(hessian[order][:, order], moments.tokens), grids, params.damping)
    for module in modules.values():
        module.weight.data = module.weight.data[:, back]
    return {
        name: gptq_tensors(rounded.codes[:, back], rounded.scales, params.bits, back // block)
        for name, rounded in found.items()
    }
