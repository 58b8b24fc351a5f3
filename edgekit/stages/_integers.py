"""What `gptq` and `awq` share: matrices of layers rounded onto integers, and the checkpoint that holds them."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import edgekit
from edgekit.artifact import Artifact
from edgekit.errors import InputError
from edgekit.formats.safetensors import read_checkpoint
from edgekit.grids import Grid
from edgekit.grids.solver import Rounded
from edgekit.huggingface import calibration_windows, open_checkpoint
from edgekit.model import read_config
from edgekit.stage import CalibratedParams, Facts, StageContext
from edgekit.stages._moments import Prepare, Rounding, round_network
from edgekit.stages._quantized import (
    copy_side_files,
    is_matrix,
    planned_tensors,
    store_weights,
    stored_dtype,
    write_config,
    write_json,
)


def quantize_checkpoint(
    model: Artifact,
    out: Path,
    params: CalibratedParams,
    ctx: StageContext,
    quantization: Mapping[str, Any],
    *,
    grid_of: Callable[[int], Grid],
    pack: Callable[[Rounded], Mapping[str, Tensor]],
    writers: Sequence[str] = (),
    prepare: Callable[[Any], tuple[Prepare, Mapping[str, Tensor]]] | None = None,
    damping: float | None = None,
    act_order: bool = False,
) -> Facts:
    """Round the matrices of all layers and write the checkpoint as transformers and vLLM read it.

    A layer sees the inputs that the rounded layers before it give. What is not rounded keeps 16 bits; all files but
    weights and config are the source's.

    Args:
        quantization: For config.json: what loaders ask of the method, `quant_method`, `bits` and `group_size` among it.
        writers: Further programs, with versions, that are known to write the format as it is written here.
        grid_of: The grid of a matrix with so many inputs.
        pack: The tensors of a matrix, by what follows its name.
        prepare: Gives, for the network, what is done to a layer before it is rounded, and what that changed beside
            matrices, by names of the checkpoint.
        damping: As of `Metric`; None for what the number of tokens asks for.
        act_order: As of `round_matrix`.

    Raises InputError for matrices that no linear layer of the network holds.
    """
    tokenizer, network = open_checkpoint(model)
    windows = calibration_windows(
        tokenizer, lambda: network, params.text, params.windows, params.window_tokens, ctx.progress
    )
    modules = {name: module for name, module in network.named_modules() if isinstance(module, nn.Linear)}
    grids = {}
    for matrix in (name for name, tensor in planned_tensors(model).items() if is_matrix(tensor)):
        name = matrix.removesuffix(".weight")
        if name not in modules:
            found = f"{matrix} in another kind of layer"
            raise InputError(f"linear layers, for {quantization['quant_method']}", found, "use a gguf recipe")
        grids[name] = grid_of(modules[name].in_features)
    prepared, changed = prepare(network) if prepare else (None, {})
    packed: dict[str, dict[str, Tensor]] = {}
    with torch.inference_mode():
        walk = round_network(
            network,
            torch.from_numpy(windows).long(),
            Rounding(grids, damping, act_order),
            prepare=prepared,
            kept=None if prepare else ctx.kept,
        )
        for group in walk:
            for name, rounded in group.items():
                packed[f"{name}.weight"] = {f"{name}.{part}": tensor for part, tensor in pack(rounded).items()}
                ctx.progress(len(packed), len(grids), "matrices")
    copy_side_files(model, out)
    config = read_config(model.path)

    def convert(name: str, tensor: Tensor) -> Mapping[str, Tensor]:
        return packed[name] if name in packed else {name: changed.get(name, tensor).to(tensor)}

    tied = bool(config.get("tie_word_embeddings"))
    dtype = store_weights(
        model.path, out, stored_dtype(config), drop=["lm_head.weight"] if tied else (), convert=convert
    )
    meta = {"quantizer": [f"edgekit:{edgekit.__version__}", *writers]}
    stated = {**quantization, "lm_head": False, "pack_dtype": "int32", "meta": meta}
    write_config(out, config, dtype, stated)
    write_json(out / "quantize_config.json", stated)
    return {
        **model.facts,
        "quantization": quantization["quant_method"],
        "bits": quantization["bits"],
        "group_size": quantization["group_size"],
        "tokens": int(windows.size),
        "text": params.text,
        "weight_bytes": sum(tensor.nbytes for tensor in read_checkpoint(out).values()),
    }
