"""For tests of ONNX: the export of a tiny checkpoint, checkpoints in GPTQ's format, and how far logits diverge."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import tiny

from edgekit.artifact import Artifact, Manifest
from edgekit.model import model_shape, resolve_model
from edgekit.stage import Facts, StageContext, find_stage
from edgekit.store import Store
from edgekit.target import Target


def checkpoint_artifact(directory: Path, source: Path | None = None) -> Artifact:
    """A directory as the stage `checkpoint` gives it; `source` is the plain model that it was made of."""
    artifact = resolve_model(str(source or directory)).artifact
    facts = {**artifact.facts, "layers": model_shape(artifact).layers, "trust_remote_code": False}
    return Artifact(directory, Manifest(kind="checkpoint", files={}, facts=facts))


def export(model: Artifact, out: Path, target: Target | None = None, **params: Any) -> Facts:
    """Run the stage `onnx` into a new directory."""
    out.mkdir(parents=True)
    stage = find_stage("onnx")
    return stage.run(model, out, stage.params(**params), StageContext(Store(out.parent / "store"), target=target))


def write_gptq(
    directory: Path, source: Path, *, bits: int = 4, group: int = 64, symmetric: bool = True, act_order: bool = False
) -> dict[str, Any]:
    """Quantize the matrices of a checkpoint in GPTQ's format by rounding to nearest.

    Returns the state dict of the model that the codes mean, in float32: the oracle for whatever reads them.
    """
    import torch
    from safetensors.torch import load_file, save_file

    shutil.copytree(source, directory)
    stored: dict[str, Any] = {}
    meant: dict[str, Any] = {}
    top = (1 << bits) - 1
    shifts = torch.arange(0, 32, bits)

    def pack(codes: Any) -> Any:
        """Words of 32 bits down the rows."""
        words = codes.reshape(-1, 32 // bits, codes.shape[1]).long() << shifts[None, :, None]
        return words.sum(dim=1).to(torch.int32)

    for name, weight in load_file(directory / "model.safetensors").items():
        if "_proj." not in name:
            stored[name], meant[name] = weight, weight.float()
            continue
        columns = weight.float().T
        index = torch.arange(len(columns)) // group
        if act_order:
            index = index[torch.randperm(len(columns), generator=torch.Generator().manual_seed(len(columns)))]
        scales, zeros = [], []
        for g in range(len(columns) // group):
            part = columns[index == g]
            low, high = part.amin(dim=0).clamp(max=0), part.amax(dim=0).clamp(min=0)
            if symmetric:
                high = torch.maximum(-low, high)
                low = -high
            scale = ((high - low) / top).half().float()
            scales.append(scale)
            zeros.append(torch.full_like(scale, (top + 1) // 2) if symmetric else torch.round(-low / scale))
        scale, zero = torch.stack(scales), torch.stack(zeros).clamp(1, top)
        codes = torch.clamp(torch.round(columns / scale[index] + zero[index]), 0, top)
        meant[name] = ((codes - zero[index]) * scale[index]).T.contiguous()
        base = name.removesuffix(".weight")
        stored |= {
            f"{base}.qweight": pack(codes),
            # the format keeps the zero points less one
            f"{base}.qzeros": pack((zero - 1).T).T.contiguous(),
            f"{base}.scales": scale.half(),
            f"{base}.g_idx": index.to(torch.int32),
        }
    save_file(stored, directory / "model.safetensors")
    quantization = {
        "quant_method": "gptq", "bits": bits, "group_size": group, "sym": symmetric, "desc_act": act_order,
        "checkpoint_format": "gptq", "lm_head": False,
    }  # fmt: skip
    tiny.edit_json(directory / "config.json", quantization_config=quantization)
    return meant


def edit_config(directory: Path, **decoder: Any) -> None:
    """Set keys of `model.decoder` in genai_config.json."""
    path = directory / "genai_config.json"
    content = json.loads(path.read_text())
    content["model"]["decoder"].update(decoder)
    path.write_text(json.dumps(content))


def torch_logits(model: Any, tokens: list[int]) -> Any:
    """Logits of a transformers model, shape (tokens, vocabulary)."""
    import torch

    with torch.inference_mode():
        return model(torch.tensor([tokens])).logits[0].numpy()


def divergence(expected: Any, found: Any) -> float:
    """Mean KL divergence of rows of logits in nats, in float64."""
    p, q = (
        x - np.logaddexp.reduce(x, axis=1, keepdims=True) for x in (a.astype(np.float64) for a in (expected, found))
    )
    return float((np.exp(p) * (p - q)).sum(axis=1).mean())
