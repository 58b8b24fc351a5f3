"""What stands before every prompt, computed once: a system prompt, or the virtual tokens of a trained adapter."""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any, Literal

import numpy as np
import numpy.typing as npt

from edgekit.adapter import PREPENDED, PROMPT_TENSOR, WEIGHTS, Contents, open_adapter, side_adapters
from edgekit.artifact import Artifact
from edgekit.chat import render_chat
from edgekit.engine import EngineOptions, FloatArray
from edgekit.engines.llama_cpp import LlamaCpp, open_model, open_vocabulary
from edgekit.errors import InputError
from edgekit.formats.gguf import read_header
from edgekit.formats.llama_state import read_state
from edgekit.formats.safetensors import TensorInfo
from edgekit.prefix import FILE_NAME, Header, Prefix, compute, write_prefix
from edgekit.stage import Facts, StageContext, StageParams, stage
from edgekit.stages.convert import FILE_NAME as MODEL_FILE

_PROBES = ("a", "1", "é", "\n?")
"""Messages of a user. What their conversations share is what stands before any message."""


class Params(StageParams):
    """Parameters of `prefix`."""

    system: str | None = None
    """A system prompt, which the model's chat template writes before the user's message."""
    kv_type: Literal["f16", "q8_0", "q4_0"] = "f16"
    """Element type of the KV cache that the state is for: the one that the bundle runs with."""


@stage(version=1, takes="gguf", gives="prefix", also=("adapter", "checkpoint"), tools=("llama-cpp-python",))
def run(model: Artifact, out: Path, params: Params, ctx: StageContext) -> Facts:
    """Compute the state of the model after its virtual tokens and its system prompt, and store it."""
    adapters = [adapter for adapter in side_adapters(ctx.side) if adapter.facts["method"] in PREPENDED]
    if len(adapters) > 1:
        raise InputError("one adapter of virtual tokens", f"{len(adapters)}", "choose one: they were trained alone")
    path = model.path / MODEL_FILE
    tokens = _system_tokens(path, ctx.side["checkpoint"].path, params.system) if params.system is not None else []
    if not adapters and not tokens:
        raise InputError(
            "an adapter of virtual tokens or a system prompt", "neither", "--set prefix.system='You are...'"
        )
    contents = open_adapter(adapters[0]) if adapters else None
    matrix = None if contents is None else _read_matrix(adapters[0].path / WEIGHTS, contents.shared[PROMPT_TENSOR])
    embeddings: FloatArray = np.zeros((0, 0), np.float32)
    virtual = 0 if matrix is None else len(matrix)
    options = EngineOptions(context_tokens=virtual + len(tokens), sequences=1, kv_type=params.kv_type, accelerate=False)
    with open_model(path, options) as engine:
        if matrix is None or contents is None:
            sequence = compute(engine, embeddings, tokens)
        elif contents.method == "prefix":
            sequence = compute(engine, embeddings, tokens, _inject(engine, matrix, contents, params.kv_type))
        else:
            embeddings = matrix / np.float32(_embedding_scale(path))
            sequence = compute(engine, embeddings, tokens)
        state = engine.save(sequence)
    header = Header(
        model_sha256=model.manifest.files[MODEL_FILE].sha256,
        kv_type=params.kv_type,
        virtual=virtual,
        tokens=tuple(tokens),
        embedding_size=embeddings.shape[1] if len(embeddings) else 0,
        state_bytes=len(state),
    )
    write_prefix(out / FILE_NAME, Prefix(header, embeddings, state))
    return {
        "kv_type": params.kv_type,
        "virtual": virtual,
        "tokens": len(tokens),
        "positions": virtual + len(tokens),
        "method": contents.method if contents else "system",
        "adapters": [adapter.facts for adapter in adapters],
        "state_bytes": len(state),
    }


def _system_tokens(path: Path, tokenizer: Path, system: str) -> list[int]:
    """Tokens that every conversation under a system prompt begins with.

    Rendered and tokenized as `edgekit run` does it, whole: text cut at a message's beginning may give other tokens.
    """
    rendered = []
    with open_vocabulary(path) as vocabulary:
        for probe in _PROBES:
            messages = [{"role": "system", "content": system}, {"role": "user", "content": probe}]
            text = render_chat(tokenizer, messages)
            if text is None or system.strip() not in text:
                found = "none" if text is None else "one that leaves it out"
                raise InputError("a chat template that takes a system prompt", found, "leave prefix.system out")
            rendered.append(vocabulary.tokenize(text, special=True))
    shared = itertools.takewhile(lambda tokens: len(set(tokens)) == 1, zip(*rendered, strict=False))
    return [tokens[0] for tokens in shared]


def _read_matrix(path: Path, info: TensorInfo) -> FloatArray:
    """Read one floating-point matrix. Raises InputError for another type, or values that are not finite."""
    with path.open("rb") as file:
        file.seek(info.offset)
        data = file.read(info.nbytes)
    if info.dtype == "BF16":
        values = (np.frombuffer(data, "<u2").astype(np.uint32) << 16).view(np.float32)
    elif info.dtype in ("F32", "F16"):
        values = np.frombuffer(data, {"F32": "<f4", "F16": "<f2"}[info.dtype]).astype(np.float32)
    else:
        raise InputError(f"{info.name} in a floating-point type in {path}", info.dtype, "save it again with PEFT")
    if not np.isfinite(values).all():
        raise InputError(f"finite values of {info.name} in {path}", "others", "train it again")
    return values.reshape(info.shape)


def _embedding_scale(path: Path) -> float:
    """What llama.cpp multiplies an input embedding with, where transformers multiplies only a token's."""
    header = read_header(path)
    # gemma2.cpp scales whatever comes in; gemma3.cpp only tokens, and granite scales both in both
    if header.architecture != "gemma2":
        return 1.0
    return float(np.sqrt(float(str(header.metadata["gemma2.embedding_length"]))))


def _inject(engine: LlamaCpp, matrix: FloatArray, contents: Contents, kv_type: str) -> int:
    """Start a sequence whose keys and values are those of prefix tuning (Li and Liang, arXiv:2101.00190).

    PEFT puts them into the cache as they are: its keys count as rotated already. So does this, in a state of as many
    dummy tokens; where RoPE turns neighbours, llama.cpp's keys lie in the order that the converter gives their rows.
    """
    if kv_type != "f16":
        # llama.cpp rotates what it quantizes by a matrix of its own
        raise InputError("an f16 KV cache for prefix tuning", kv_type, "--kv-type f16")
    positions, layers = len(matrix), int(contents.options["num_layers"])
    heads = int(contents.options["num_attention_heads"])
    pairs: npt.NDArray[Any] = matrix.reshape(positions, layers, 2, heads, -1)
    if np.abs(pairs).max() > np.finfo(np.float16).max:
        raise InputError("keys and values that fit f16", "an overflow", "train it again")
    dummy = compute(engine, np.zeros((0, 0), np.float32), [0] * positions)
    state = bytearray(engine.save(dummy))
    engine.release(dummy)
    _, (cache, *more) = read_state(bytes(state))
    if more or len(cache.keys) != layers:
        raise InputError("prefix tuning of a model with one KV cache", "one with sliding windows", "use prompt tuning")
    for layer in range(layers):
        keys, values = (pairs[:, layer, kind].astype("<f2") for kind in (0, 1))
        if engine.pairs_neighbours:
            keys = keys.reshape(positions, heads, 2, -1).swapaxes(2, 3)
        rows = values.reshape(positions, -1)
        for block, data in ((cache.keys[layer], keys), (cache.values[layer], rows.T if cache.transposed else rows)):
            blob = np.ascontiguousarray(data).tobytes()
            if len(blob) != block.nbytes:
                wanted = f"{block.nbytes} bytes of keys and values per layer"
                raise InputError(wanted, f"{len(blob)} in the adapter", "use the model it was trained on")
            state[block.offset : block.offset + block.nbytes] = blob
    return engine.load(bytes(state))
