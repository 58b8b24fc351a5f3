"""The same function with weights that are easier to round: the residual stream turned by an orthogonal matrix.

QuaRot (Ashkboos et al., arXiv:2404.00456) without its Hadamard structure: every turn is folded into the weights, so
none is left to compute. RMSNorm does not see a turn once its weights are folded into what reads it. Embedding and head
differ afterwards: a tied model becomes larger by its head.
"""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from pydantic import NonNegativeInt

from edgekit.artifact import Artifact
from edgekit.errors import InputError, ToolError
from edgekit.formats.safetensors import read_checkpoint
from edgekit.huggingface import load_model
from edgekit.model import ModelShape
from edgekit.stage import Facts, StageContext, StageParams, Tensor, stage
from edgekit.stages._quantized import copy_side_files, store_weights, write_json

TOLERANCE_NATS = 1e-3
"""Largest divergence from the model's logits; storing in 16 bits gives some 1e-5."""
_EMBEDDING, _HEAD, _LAST_NORM = "model.embed_tokens.weight", "lm_head.weight", "model.norm.weight"
_LAYER = re.compile(r"(model\.layers\.\d+\.)(.+)\.(weight|bias)")
_READERS = {
    "self_attn.q_proj": "input_layernorm",
    "self_attn.k_proj": "input_layernorm",
    "self_attn.v_proj": "input_layernorm",
    "mlp.gate_proj": "post_attention_layernorm",
    "mlp.up_proj": "post_attention_layernorm",
}
"""Matrices that read the residual stream, and the norm before each."""
_WRITERS = ("self_attn.o_proj", "mlp.down_proj")
_APART = ("self_attn.q_norm", "self_attn.k_norm")
"""They look at single heads, which stay as they are."""


class Params(StageParams):
    """Parameters of `rotate`."""

    seed: NonNegativeInt = 0
    """Of the orthogonal matrix."""


@stage(version=1, takes="checkpoint", gives="checkpoint", tools=("torch", "transformers", "safetensors"))
def run(model: Artifact, out: Path, params: Params, ctx: StageContext) -> Facts:
    """Turn the residual stream by a random orthogonal matrix, with the same function, and check the logits."""
    import torch

    config = json.loads((model.path / "config.json").read_text())
    stored = read_checkpoint(model.path)
    _check_layout(list(stored), config)
    turn = _orthogonal(config["hidden_size"], params.seed)
    read = _reader(model.path, {name: info.file for name, info in stored.items()})
    tied = _HEAD not in stored

    def convert(name: str, tensor: Any) -> dict[str, Any]:
        weight, dtype = tensor.double(), tensor.dtype
        found = _LAYER.fullmatch(name)
        if name == _LAST_NORM or (found and found[2] in _READERS.values()):
            return {name: torch.ones_like(tensor)}
        if name == _EMBEDDING:
            turned = {name: weight @ turn}
            if tied:
                turned[_HEAD] = (weight * read(_LAST_NORM)) @ turn
        elif name == _HEAD:
            turned = {name: (weight * read(_LAST_NORM)) @ turn}
        elif found and found[2] in _READERS and found[3] == "weight":
            turned = {name: (weight * read(f"{found[1]}{_READERS[found[2]]}.weight")) @ turn}
        elif found and found[2] in _WRITERS:
            # a bias is one vector of the residual stream
            turned = {name: turn.T @ weight}
        else:
            return {name: tensor}
        return {key: value.to(dtype) for key, value in turned.items()}

    config |= {"tie_word_embeddings": False}
    copy_side_files(model, out)
    store_weights(
        model.path, out, None, convert=convert, progress=lambda done, total: ctx.progress(done, total, "tensors")
    )
    write_json(out / "config.json", config)
    divergence = _divergence(model.path, out)
    if not divergence < TOLERANCE_NATS:
        wanted = f"logits within {TOLERANCE_NATS:g} nats of the model's"
        raise ToolError(wanted, f"{divergence:.2g}", "leave `rotate` out")
    parameters = model.facts["parameters"] + tied * model.facts["vocabulary"] * config["hidden_size"]
    return {**model.facts, "parameters": parameters, "rotated": params.seed, "divergence_nats": divergence}


def predict(tensors: Sequence[Tensor], params: Params, side: frozenset[str]) -> tuple[Sequence[Tensor], Sequence[str]]:
    """A tied model has a head afterwards."""
    names = {tensor.name: tensor for tensor in tensors}
    if "output.weight" in names:
        return tensors, ()
    head = replace(names["token_embd.weight"], name="output.weight")
    return [*tensors, head], ["turned weights cannot be tied: the head becomes a matrix of its own"]


def host_bytes(shape: ModelShape, params: Params) -> int:
    """The weights in float32, a tensor in float64, and what was read before."""
    return (2 << 30) + 10 * shape.parameters


def _check_layout(names: Sequence[str], config: dict[str, Any]) -> None:
    """Raise InputError for a model in which more than RMSNorms lie between what writes and what reads."""
    known = {*_READERS, *_READERS.values(), *_WRITERS, *_APART}
    for name in names:
        found = _LAYER.fullmatch(name)
        if name not in (_EMBEDDING, _HEAD, _LAST_NORM) and not (found and found[2] in known):
            raise InputError(
                "a model of Llama's kind (Llama, Mistral, Qwen 2 and 3) to rotate", f"{name}", "leave `rotate` out"
            )
    if "rms_norm_eps" not in config:
        raise InputError("a model with RMSNorm to rotate", f"{config.get('model_type')}", "leave `rotate` out")


def _orthogonal(size: int, seed: int) -> Any:
    """A matrix drawn evenly from all orthogonal ones (Mezzadri, arXiv:math-ph/0609050), float64."""
    import torch

    draw = np.random.default_rng(seed).standard_normal((size, size))
    q, r = np.linalg.qr(draw)
    return torch.from_numpy(q * np.sign(np.diagonal(r)))


def _reader(directory: Path, files: dict[str, str]) -> Any:
    from safetensors import safe_open

    def read(name: str) -> Any:
        with safe_open(directory / files[name], framework="pt") as file:
            return file.get_tensor(name).double()

    return read


def _divergence(before: Path, after: Path) -> float:
    import torch

    laws = []
    for path in (before, after):
        network = load_model(path)
        tokens = torch.arange(1, 65)[None] % network.config.vocab_size
        with torch.inference_mode():
            laws.append(network(tokens, use_cache=False).logits.double().log_softmax(-1))
    return float((laws[0].exp() * (laws[0] - laws[1])).sum(-1).mean())
