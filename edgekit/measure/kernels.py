"""What a weight of each GGUF type costs in decode on llama.cpp's kernels here: `weight_costs` of a target.

Nothing is downloaded or quantized: a file of some wide layers is written for every type as one hole, whose zeros are
valid blocks of all of them and take as long as any weights.
"""

from __future__ import annotations

import math
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import psutil

from edgekit.engine import Engine, EngineOptions, Entry
from edgekit.formats.gguf import Value, canonical_type, tensor_bytes, write_skeleton

TYPES = ("Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0", "IQ4_NL", "Q2_K", "Q3_K", "Q4_K", "Q5_K", "Q6_K")
"""Those that a budget of bytes chooses among."""
BASE = "Q8_0"
"""Costs are relative to this type's."""
HIDDEN, FEED_FORWARD, VOCABULARY, HEAD = 2048, 6144, 256, 64
"""Matrices of a model of a billion parameters."""
MOST_LAYERS = 8
"""0.46 GB of Q8_0: two fit a server's cache, and Q4_0 took .4 of Q8_0's time in them where it takes .9 in eight."""
TURNS, TOKENS = 5, 12
_MATRICES = (
    *((name, (HIDDEN, HIDDEN)) for name in ("attn_q", "attn_k", "attn_v", "attn_output")),
    *((name, (HIDDEN, FEED_FORWARD)) for name in ("ffn_gate", "ffn_up")),
    ("ffn_down", (FEED_FORWARD, HIDDEN)),
)
"""Of a layer: name and shape, innermost first."""


def measure_weight_costs(threads: int, turns: int = TURNS) -> dict[str, float]:
    """Return the time that a weight of each type takes relative to Q8_0's, by the best step of each.

    Args:
        threads: CPU threads that decode.
        turns: How often every type is timed. Types take turns, so that a machine whose speed drifts slows all of them;
            the best step counts, for others only slow it down.

    Raises:
        ToolError: llama.cpp is missing or does not run, or there is no room for a file.
    """
    from edgekit.engines.llama_cpp import open_model

    best = dict.fromkeys(TYPES, math.inf)
    # a quarter of what is free for the largest type, and as much again where llama.cpp lays it out anew
    room = psutil.virtual_memory().available // 4 // sum(tensor_bytes("q8_0", shape) for _, shape in _MATRICES)
    layers = max(1, min(MOST_LAYERS, room))
    options = EngineOptions(context_tokens=64, threads=threads)
    with tempfile.TemporaryDirectory(prefix="edgekit-kernels-") as directory:
        for _ in range(turns):
            for name in TYPES:
                path = Path(directory) / f"{name}.gguf"
                write_model(path, name, layers)
                with open_model(path, options) as engine:
                    best[name] = min(best[name], _best_step_s(engine))
                path.unlink()
    return {name: float(f"{seconds / best[BASE]:.3g}") for name, seconds in best.items()}


def write_model(path: Path, name: str, layers: int) -> None:
    """Write a llama of zeros whose matrices are all of one type."""
    metadata: dict[str, Value] = {
        "general.architecture": "llama",
        "llama.context_length": 512,
        "llama.embedding_length": HIDDEN,
        "llama.block_count": layers,
        "llama.feed_forward_length": FEED_FORWARD,
        "llama.attention.head_count": HIDDEN // HEAD,
        "llama.attention.layer_norm_rms_epsilon": 1e-5,
        "tokenizer.ggml.model": "llama",
        "tokenizer.ggml.tokens": tuple(f"<{token}>" for token in range(VOCABULARY)),
    }
    write_skeleton(path, metadata, [*_tensors(canonical_type(name), layers)])


def _tensors(kind: str, layers: int) -> Iterator[tuple[str, tuple[int, ...], str]]:
    yield "token_embd.weight", (HIDDEN, VOCABULARY), kind
    yield "output.weight", (HIDDEN, VOCABULARY), kind
    yield "output_norm.weight", (HIDDEN,), "f32"
    for layer in (f"blk.{index}" for index in range(layers)):
        for norm in ("attn_norm", "ffn_norm"):
            yield f"{layer}.{norm}.weight", (HIDDEN,), "f32"
        for matrix, shape in _MATRICES:
            yield f"{layer}.{matrix}.weight", shape, kind


def _best_step_s(engine: Engine) -> float:
    """Time of the fastest step of one token; the first, which read the file, are never that."""
    sequence, best = engine.start(), math.inf
    for token in range(TOKENS):
        begun = time.perf_counter()
        engine.step([Entry(sequence, token)])
        best = min(best, time.perf_counter() - begun)
    return best
