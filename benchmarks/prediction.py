"""Predicted memory, bytes and rates beside what this machine measures: `prediction.py [--memory] [MODEL.gguf ...]`.

Memory: every model (the built-in one in several types, and those named) in a fresh process, over contexts, cache types,
batches and sequences. Rates: the GGUF recipes built for this machine; `--memory` leaves them out.
"""

from __future__ import annotations

import argparse
import json
import os
import tempfile
from pathlib import Path
from typing import Any

from edgekit.build import BuildEvents
from edgekit.deliver import deliver
from edgekit.devices import Job, LatencyJob, Measures, open_device
from edgekit.engine import EngineOptions
from edgekit.engines.llama_cpp import library
from edgekit.formats.gguf import read_header
from edgekit.model import BUILTIN, model_shape, resolve_model
from edgekit.plan import make_plan
from edgekit.predict.memory import peak_rss_bytes
from edgekit.recipe import find_recipe
from edgekit.stage import Tensor
from edgekit.store import Store
from edgekit.target import find_target

FIGURES = ("weight_bytes", "peak_rss_bytes", "decode_tokens_per_s", "prefill_tokens_per_s")
TYPES = {"Q8_0": 7, "Q4_0": 2, "Q4_K_M": 15, "IQ4_NL": 25, "F16": 1}  # enum llama_ftype
# context, cache type, batch, sequences, prompt
OPTIONS = (
    (2048, "f16", 512, 1, 128),
    (512, "f16", 512, 1, 400),
    (8192, "f16", 512, 1, 128),
    (4096, "q8_0", 512, 1, 128),
    (2048, "f16", 128, 1, 400),
    (1024, "f16", 512, 4, 400),
)


def quantized(source: Path, name: str, into: Path) -> Path:
    """The source in another type, by llama.cpp's own quantizer."""
    api = library()
    params = api.llama_model_quantize_default_params()
    params.nthread, params.ftype, params.allow_requantize = 1, TYPES[name], True
    path = into / f"{name}.gguf"
    if api.llama_model_quantize(os.fsencode(source), os.fsencode(path), params):
        raise SystemExit(f"llama.cpp did not write {name}")
    return path


def peak(path: Path, options: tuple[int, str, int, int, int]) -> dict[str, Any]:
    """Predicted and measured peak of one process."""
    context, kv_type, batch, sequences, prompt = options
    shape = model_shape(resolve_model(str(path)).artifact)
    tensors = [Tensor(t.name, t.shape, t.type) for t in read_header(path).tensors]
    predicted = peak_rss_bytes(
        shape, tensors, context, kv_type, sequences=sequences, batch_tokens=batch, prompt_tokens=prompt
    )
    job = Job(
        engine="llama_cpp",
        model=str(path),
        options=EngineOptions(
            context_tokens=context,
            kv_type=kv_type,
            batch_tokens=batch,
            sequences=sequences,
            threads=1,
            accelerate=False,
        ),
        measure=Measures(latency=LatencyJob(prompt_tokens=prompt, decode_tokens=4, repeats=1, warmup=0)),
    )
    found = open_device("local").run(job)
    measured = next(m.value for m in found.measurements if m.name == "peak_rss_bytes")
    return {
        "model": path.stem,
        "context": context,
        "kv_type": kv_type,
        "batch": batch,
        "sequences": sequences,
        "prompt": prompt,
        "predicted": predicted,
        "measured": measured,
        "error": predicted / measured - 1,
    }


def memory(more: list[Path]) -> list[dict[str, Any]]:
    """Every model with the first options, the first with all of them."""
    source = resolve_model(BUILTIN).artifact
    with tempfile.TemporaryDirectory() as scratch:
        original = source.path / next(iter(source.manifest.files))
        paths = [quantized(original, name, Path(scratch)) for name in TYPES] + more
        pairs = [(paths[0], options) for options in OPTIONS] + [(path, OPTIONS[0]) for path in paths[1:]]
        pairs.append((paths[1], OPTIONS[2]))
        rows = [peak(path, options) for path, options in pairs]
    print(
        f"{'model':<12} {'context':>7} {'cache':>6} {'batch':>5} {'seqs':>4} "
        f"{'predicted':>10} {'measured':>10} {'error':>7}"
    )
    for row in rows:
        print(
            f"{row['model'][:12]:<12} {row['context']:>7} {row['kv_type']:>6} {row['batch']:>5} {row['sequences']:>4} "
            f"{row['predicted'] / 2**20:>6.1f} MiB {row['measured'] / 2**20:>6.1f} MiB {row['error']:>+7.1%}"
        )
    return rows


def rates() -> list[dict[str, Any]]:
    """Build every GGUF recipe for this machine and compare."""
    source, store, target = resolve_model(BUILTIN), Store.default(), find_target("local")
    rows = []
    for name in ("gguf-q8", "gguf-q4", "gguf-q4-0", "gguf-smallest"):
        plan = make_plan(source, find_recipe(name), target)
        with tempfile.TemporaryDirectory() as scratch:
            result = deliver(plan, store, Path(scratch), open_device("local"), BuildEvents())
        predicted = {m.name: m.value for m in plan.predictions}
        measured = {m.name: m for m in result.report.measurements if m.kind == "measured" and m.of == "bundle"}
        for figure in FIGURES:
            value = measured[figure]
            rows.append(
                {
                    "recipe": name,
                    "figure": figure,
                    "predicted": predicted[figure],
                    "measured": value.value,
                    "ratio": predicted[figure] / value.value,
                    "note": value.note,
                }
            )
    print(f"{'recipe':<14} {'figure':<22} {'predicted':>14} {'measured':>14} {'ratio':>6}")
    for row in rows:
        print(
            f"{row['recipe']:<14} {row['figure']:<22} {row['predicted']:>14,.1f} {row['measured']:>14,.1f} "
            f"{row['ratio']:>6.2f}"
        )
    return rows


def main() -> None:
    """Print both tables and one JSON line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("models", type=Path, nargs="*", help="further GGUF files to open")
    parser.add_argument("--memory", action="store_true", help="memory alone")
    asked = parser.parse_args()
    peaks = memory(asked.models)
    rows = [] if asked.memory else rates()
    worst = max(abs(row["error"]) for row in peaks)
    print(f"largest error of {len(peaks)} predicted peaks: {worst:.1%}")
    print(json.dumps({"benchmark": "prediction", "target": "local", "memory": peaks, "rows": rows}))


if __name__ == "__main__":
    main()
