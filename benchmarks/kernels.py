"""What a weight of each type costs in decode on this machine's CPU, relative to Q8_0: what a target profile keeps.

A model of two wide layers and random weights is written in every type and decodes one token after another. The types
take turns, so that a machine whose speed drifts slows all of them.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
from gguf import GGMLQuantizationType, GGUFWriter

from edgekit.engine import EngineOptions, Entry
from edgekit.engines.llama_cpp import open_model
from edgekit.grids import NAMES
from edgekit.stages.gguf import QuantizerParams, quantize

HIDDEN, FEED_FORWARD, LAYERS, VOCABULARY = 2048, 6144, 2, 256
TOKENS, WARM_UP = 24, 4


def write_model(path: Path) -> int:
    """Write the model in 16 bits; returns the weights that a token is multiplied with."""
    draw = np.random.default_rng(0)
    writer = GGUFWriter(path, "llama")
    writer.add_context_length(512)
    writer.add_embedding_length(HIDDEN)
    writer.add_block_count(LAYERS)
    writer.add_feed_forward_length(FEED_FORWARD)
    writer.add_head_count(HIDDEN // 64)
    writer.add_head_count_kv(HIDDEN // 64)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_vocab_size(VOCABULARY)
    writer.add_tokenizer_model("llama")
    writer.add_token_list([f"<{number}>" for number in range(VOCABULARY)])
    writer.add_token_scores([0.0] * VOCABULARY)
    writer.add_token_types([1] * VOCABULARY)
    writer.add_quantization_version(2)
    weights = 0

    def add(name: str, rows: int, columns: int) -> None:
        nonlocal weights
        weights += rows * columns
        matrix = (draw.standard_normal((rows, columns), np.float32) / np.sqrt(columns)).astype(np.float16)
        writer.add_tensor(name, matrix, raw_dtype=GGMLQuantizationType.F16)

    add("output.weight", VOCABULARY, HIDDEN)
    for layer in range(LAYERS):
        for name in ("attn_q", "attn_k", "attn_v", "attn_output"):
            add(f"blk.{layer}.{name}.weight", HIDDEN, HIDDEN)
        for name in ("ffn_gate", "ffn_up"):
            add(f"blk.{layer}.{name}.weight", FEED_FORWARD, HIDDEN)
        add(f"blk.{layer}.ffn_down.weight", HIDDEN, FEED_FORWARD)
        for name in ("attn_norm", "ffn_norm"):
            writer.add_tensor(f"blk.{layer}.{name}.weight", np.ones(HIDDEN, np.float32))
    multiplied = weights
    add("token_embd.weight", VOCABULARY, HIDDEN)
    writer.add_tensor("output_norm.weight", np.ones(HIDDEN, np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return multiplied


def seconds_per_token(path: Path, threads: int) -> float:
    """Median time of a step of one token."""
    with open_model(path, EngineOptions(context_tokens=64, threads=threads)) as engine:
        sequence, times = engine.start(), []
        for token in range(WARM_UP + TOKENS):
            begun = time.perf_counter()
            engine.step([Entry(sequence, token)])
            times.append(time.perf_counter() - begun)
    return statistics.median(times[WARM_UP:])


def main() -> None:
    """Measure every type in turns and print the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--rounds", type=int, default=5)
    arguments = parser.parse_args()
    found: dict[str, list[float]] = {name: [] for name in NAMES}
    with tempfile.TemporaryDirectory() as name:
        source, files = Path(name) / "f16.gguf", {}
        weights = write_model(source)
        for kind in NAMES:
            files[kind] = Path(name) / f"{kind}.gguf"
            base = f"{kind}_S" if kind in ("Q3_K", "Q4_K", "Q5_K") else kind
            settings = QuantizerParams(type=base, pure=True, output_type=kind, token_embedding_type=kind)
            quantize(source, files[kind], settings, None)
        for turn in range(arguments.rounds):
            for kind, path in files.items():
                found[kind].append(seconds_per_token(path, arguments.threads))
            print(f"round {turn + 1} of {arguments.rounds}", file=sys.stderr)
    relative = {
        kind: sorted(mine / base for mine, base in zip(times, found["Q8_0"], strict=True))
        for kind, times in found.items()
    }
    print(f"{'type':<8} {'ps a weight':>12} {'of Q8_0':>8}   least to most")
    for kind, ratios in relative.items():
        cost = statistics.median(found[kind]) / weights * 1e12
        print(f"{kind:<8} {cost:>12.1f} {statistics.median(ratios):>8.3f}   {ratios[0]:.3f} to {ratios[-1]:.3f}")
    medians = {kind: round(statistics.median(ratios), 3) for kind, ratios in relative.items()}
    print(json.dumps({"benchmark": "kernels", "threads": arguments.threads, "relative": medians}))


if __name__ == "__main__":
    main()
