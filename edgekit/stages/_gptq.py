"""How `gptq` rounds a network: each matrix onto integers, and what the checkpoint holds of it."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn

from edgekit.errors import InputError
from edgekit.grids import integer_grid
from edgekit.grids.containers import gptq_tensors
from edgekit.stage import Progress
from edgekit.stages._moments import round_network

if TYPE_CHECKING:
    from edgekit.stages.gptq import Params


def round_layers(
    network: Any,
    windows: npt.NDArray[np.int32],
    matrices: Sequence[str],
    params: Params,
    group_size: int,
    progress: Progress,
    kept: Path | None,
) -> dict[str, dict[str, Tensor]]:
    """Round matrices and return what stands for each in the checkpoint, by the matrix's name there.

    Args:
        network: A causal language model of transformers in float32; it is left with the rounded weights.
        windows: (windows, tokens) of calibration text.
        matrices: Names of weights in the checkpoint.
        params: The stage's.
        group_size: Inputs that share a scale; -1 for all.
        progress: Called with matrices done and their number.
        kept: As of `round_network`.

    Raises InputError for a matrix that no linear layer holds.
    """
    modules = {name: module for name, module in network.named_modules() if isinstance(module, nn.Linear)}
    grids = {}
    for matrix in matrices:
        name = matrix.removesuffix(".weight")
        if name not in modules:
            raise InputError("linear layers, for gptq", f"{matrix} in another kind of layer", "use a gguf recipe")
        block = modules[name].in_features if group_size == -1 else group_size
        grids[name] = integer_grid(params.bits, block, symmetric=params.sym)
    tokens = torch.from_numpy(windows.astype(np.int64))
    packed: dict[str, dict[str, Tensor]] = {}
    with torch.inference_mode():
        for group in round_network(
            network, tokens, grids, damping=params.damping, act_order=params.act_order, kept=kept
        ):
            for name, rounded in group.items():
                groups = None if rounded.order is None else rounded.order // grids[name].block
                tensors = gptq_tensors(rounded.codes, rounded.scales, params.bits, groups)
                packed[f"{name}.weight"] = {f"{name}.{part}": tensor for part, tensor in tensors.items()}
                progress(len(packed), len(grids), "matrices")
    return packed
