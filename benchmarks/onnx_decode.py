"""Decode with edgekit's engine beside onnxruntime-genai's own loop, on one ONNX model, interleaved.

    python benchmarks/onnx_decode.py DIRECTORY [THREADS]

DIRECTORY holds `genai_config.json` and its model, e.g. the bundle of `edgekit build --recipe onnx-int4`.
"""

from __future__ import annotations

import json
import multiprocessing
import statistics
import sys
import time
from collections.abc import Callable
from multiprocessing.connection import Connection
from pathlib import Path

from edgekit.engine import EngineOptions, Entry
from edgekit.engines._tokenizer import Tokenizer
from edgekit.engines.onnxruntime import open_model
from edgekit.measurement import median_interval

PROMPT = "The planner reads the header of a checkpoint and says what the result will weigh. " * 8
PROMPT_TOKENS, DECODE_TOKENS, ROUNDS = 96, 64, 9

Run = Callable[[list[int]], tuple[float, float, list[int]]]
"""Prompt -> wall and CPU seconds per token, and the tokens."""


class Clock:
    """Starts when made. CPU time is what a busy machine leaves comparable, with one thread."""

    def __init__(self) -> None:
        self._wall_s, self._cpu_s = time.perf_counter(), time.process_time()

    def per_token(self) -> tuple[float, float]:
        """Wall and CPU seconds of each of `DECODE_TOKENS` tokens."""
        wall_s, cpu_s = time.perf_counter() - self._wall_s, time.process_time() - self._cpu_s
        return wall_s / DECODE_TOKENS, cpu_s / DECODE_TOKENS


def ours(directory: Path, threads: int) -> Run:
    """Greedy tokens through the Engine protocol."""
    engine = open_model(directory, EngineOptions(context_tokens=256, threads=threads, accelerate=False))

    def run(prompt: list[int]) -> tuple[float, float, list[int]]:
        sequence = engine.start()
        logits = engine.step(
            [Entry(sequence, t, wants_logits=i == len(prompt) - 1) for i, t in enumerate(prompt)]
        ).logits
        found = [int(logits[0].argmax())]
        clock = Clock()
        while len(found) <= DECODE_TOKENS:
            found.append(int(engine.step([Entry(sequence, found[-1])]).logits[0].argmax()))
        wall_s, cpu_s = clock.per_token()
        engine.release(sequence)
        return wall_s, cpu_s, found

    return run


def genai(directory: Path, threads: int) -> Run:
    """Greedy tokens by the generator of onnxruntime-genai."""
    import onnxruntime_genai

    config = onnxruntime_genai.Config(str(directory))
    config.clear_providers()
    settings = {"model": {"decoder": {"session_options": {"intra_op_num_threads": threads}}}}
    config.overlay(json.dumps(settings))
    model = onnxruntime_genai.Model(config)

    def run(prompt: list[int]) -> tuple[float, float, list[int]]:
        params = onnxruntime_genai.GeneratorParams(model)
        params.set_search_options(max_length=256, min_length=256, do_sample=False)
        generator = onnxruntime_genai.Generator(model, params)
        generator.append_tokens(prompt)
        generator.generate_next_token()
        found = [int(generator.get_next_tokens()[0])]
        clock = Clock()
        while len(found) <= DECODE_TOKENS:
            generator.generate_next_token()
            found.append(int(generator.get_next_tokens()[0]))
        return *clock.per_token(), found

    return run


class Worker:
    """One side in a process of its own: in one process, the side that loads second finds other memory (12% here)."""

    def __init__(self, side: str, directory: Path, threads: int) -> None:
        spawn = multiprocessing.get_context("spawn")
        self._pipe, far = spawn.Pipe()
        self._process = spawn.Process(target=_serve, args=(far, side, directory, threads), daemon=True)
        self._process.start()

    def run(self, prompt: list[int]) -> tuple[float, float, list[int]]:
        """Run one generation in the process and return what it measured."""
        """As the side's own `Run`."""
        self._pipe.send(prompt)
        answer: tuple[float, float, list[int]] = self._pipe.recv()
        return answer


def _serve(pipe: Connection, side: str, directory: Path, threads: int) -> None:
    run = (ours if side == "edgekit" else genai)(directory, threads)
    while True:
        pipe.send(run(pipe.recv()))


def main() -> None:
    """Print medians with 95% intervals and the median of the paired ratios."""
    directory = Path(sys.argv[1])
    threads = int(sys.argv[2]) if len(sys.argv) > 2 else 2
    prompt = Tokenizer(directory).tokenize(PROMPT)[:PROMPT_TOKENS]
    runs = {side: Worker(side, directory, threads) for side in ("edgekit", "onnxruntime-genai")}
    rates: dict[str, list[float]] = {name: [] for name in runs}
    cpu: dict[str, list[float]] = {name: [] for name in runs}
    tokens: dict[str, list[int]] = {}
    for worker in runs.values():
        worker.run(prompt)
    for round_ in range(ROUNDS):
        # who goes first alternates, so that a slow drift of the machine favours neither
        for name in sorted(runs, reverse=round_ % 2 == 1):
            wall_s, cpu_s, tokens[name] = runs[name].run(prompt)
            rates[name].append(1 / wall_s)
            cpu[name].append(cpu_s)
    equal = tokens["edgekit"] == tokens["onnxruntime-genai"]
    for name, samples in rates.items():
        median, low, high = median_interval(samples)
        cpu_ms = 1e3 * statistics.median(cpu[name])
        print(f"{name:20} {median:7.1f} tokens/s [{low:.1f}, {high:.1f}], {cpu_ms:.1f} ms of CPU per token")
    ratio, low, high = median_interval([a / b for a, b in zip(*rates.values(), strict=True)])
    print(f"ratio {ratio:.2f} [{low:.2f}, {high:.2f}], {'equal' if equal else 'OTHER'} tokens")
    medians = {f"{name}_tokens_per_s": statistics.median(found) for name, found in rates.items()}
    summary = {"benchmark": "onnx_decode", "ratio": ratio, "ratio_low": low, "ratio_high": high, "equal_tokens": equal}
    cpu_ratio = statistics.median(b / a for a, b in zip(*cpu.values(), strict=True))
    cores = statistics.median(used * rate for name in runs for used, rate in zip(cpu[name], rates[name], strict=True))
    print(f"ratio by CPU time {cpu_ratio:.2f}; each had {cores:.2f} cores to itself, of {threads} that it asked for")
    print(
        json.dumps(
            {**summary, "cpu_ratio": cpu_ratio, "threads": threads, "rounds": ROUNDS, **medians, "cores_used": cores}
        )
    )


if __name__ == "__main__":
    main()
