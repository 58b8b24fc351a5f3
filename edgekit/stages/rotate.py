"""The same function with weights that are easier to round: residual stream and values turned by orthogonal matrices.

QuaRot (Ashkboos et al., arXiv:2404.00456) without its Hadamard structure: every turn is folded into the weights, so
none is left to compute. RMSNorm does not see a turn once its weights are folded into what reads it. Embedding and head
differ afterwards: a tied model becomes larger by its head. Attention mixes the values of a head over positions, so that
values may be turned by one matrix per head, and what reads them back.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

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
_HEAD_SHARE = 0.02
"""Of a tied model's weights: a head of at most so much may become a matrix of its own."""
_UNTIED = "turned weights cannot be tied: the head becomes a matrix of its own"
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
    """Of the orthogonal matrices."""
    residual: bool | Literal["auto"] = True
    """Turn the residual stream. `auto`: where the bytes that it costs pay, which is where the head is a matrix of its
    own already or at most a fiftieth of the model; and only without a companion, which reads the states as they are."""
    values: bool = True
    """Turn the values of each head, which costs no bytes."""


@stage(version=2, takes="checkpoint", gives="checkpoint", tools=("torch", "transformers", "safetensors"))
def run(model: Artifact, out: Path, params: Params, ctx: StageContext) -> Facts:
    """Turn the residual stream by a random orthogonal matrix, with the same function, and check the logits."""
    import torch

    config = json.loads((model.path / "config.json").read_text())
    stored = read_checkpoint(model.path)
    _check_layout(list(stored), config)
    turn = _orthogonal(config["hidden_size"], [params.seed])
    read = _reader(model.path, {name: info.file for name, info in stored.items()})
    tied = _HEAD not in stored
    turn_values = _values_turner(config, params.seed) if params.values else None

    def convert(name: str, tensor: Any) -> dict[str, Any]:
        dtype = tensor.dtype
        found = _LAYER.fullmatch(name)
        if turn_values and found:
            tensor = turn_values(found, tensor)
        turned = turn_stream(name, found, tensor) if params.residual else {name: tensor}
        return {key: value.to(dtype) for key, value in turned.items()}

    def turn_stream(name: str, found: re.Match[str] | None, tensor: Any) -> dict[str, Any]:
        weight = tensor.double()
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
            turned = {name: tensor}
        return turned

    untied = tied and bool(params.residual)
    config |= {"tie_word_embeddings": tied and not untied}
    copy_side_files(model, out)
    store_weights(
        model.path, out, None, convert=convert, progress=lambda done, total: ctx.progress(done, total, "tensors")
    )
    write_json(out / "config.json", config)
    divergence = _divergence(model.path, out)
    if not divergence < TOLERANCE_NATS:
        wanted = f"logits within {TOLERANCE_NATS:g} nats of the model's"
        raise ToolError(wanted, f"{divergence:.2g}", "leave `rotate` out")
    parameters = model.facts["parameters"] + untied * model.facts["vocabulary"] * config["hidden_size"]
    return {**model.facts, "parameters": parameters, "rotated": params.seed, "divergence_nats": divergence}


def predict(tensors: Sequence[Tensor], params: Params, side: frozenset[str]) -> tuple[Sequence[Tensor], Sequence[str]]:
    """A tied model has a head afterwards, where the residual stream is turned."""
    names = {tensor.name: tensor for tensor in tensors}
    if "output.weight" in names or not params.residual:
        return tensors, ()
    head = replace(names["token_embd.weight"], name="output.weight")
    return [*tensors, head], [_UNTIED]


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


def resolve(params: Params, shape: ModelShape, *, companion: bool) -> Params:
    """Decide what `auto` left open, from shapes: what the bytes of an untied head would lose elsewhere.

    Turning took 6 to 14% off what Q4_0 with feedback loses on SmolLM2-135M. A tenth of a bit for every weight does the
    same, and a head of a fiftieth of the weights, at 5 bits, costs that.
    """
    if params.residual != "auto":
        return params
    head = shape.vocabulary * shape.hidden
    tied = all(tensor.name != "output.weight" for tensor in shape.tensors)
    pays = not companion and (not tied or head <= _HEAD_SHARE * shape.parameters)
    return params.model_copy(update={"residual": pays})


def _values_turner(config: dict[str, Any], seed: int) -> Callable[[re.Match[str], Any], Any]:
    """Return what turns the rows of values and the columns that read them, head by head."""
    import torch

    heads = config["num_attention_heads"]
    groups = config.get("num_key_value_heads") or heads
    size = config.get("head_dim") or config["hidden_size"] // heads

    def turn(found: re.Match[str], tensor: Any) -> Any:
        part = found[2]
        if part not in ("self_attn.v_proj", "self_attn.o_proj") or (part.endswith("o_proj") and found[3] == "bias"):
            return tensor
        layer = int(found[1].split(".")[2])
        turns = torch.stack([_orthogonal(size, [seed, layer, group]) for group in range(groups)])
        weight = tensor.double()
        if part.endswith("v_proj"):
            rows = weight.reshape(groups, size, -1)
            return (turns @ rows).reshape(weight.shape)
        columns = weight.reshape(len(weight), groups, heads // groups, size)
        return torch.einsum("oghd,ged->oghe", columns, turns).reshape(weight.shape)

    return turn


def _orthogonal(size: int, seed: Sequence[int]) -> Any:
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
