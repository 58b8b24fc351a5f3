"""Divergence against bytes: our types, budgets and rounding beside every preset of llama.cpp's quantizer.

MODEL should be off its grid (see offgrid.py). Both sides get the same f16 file, the same importance matrix and the same
calibration prose; both are judged on held-out prose and on code. For each preset we write a file of at most its bytes.
The quantizer runs in this process and is upstream's bit for bit (see fidelity.py).
"""

from __future__ import annotations

import argparse
import json
import math
import statistics
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np

from edgekit.artifact import Artifact
from edgekit.build import BuildEvents, build
from edgekit.engine import EngineOptions, Entry
from edgekit.engines.llama_cpp import open_model
from edgekit.formats import gguf
from edgekit.huggingface import open_checkpoint, text_windows
from edgekit.measure.divergence import Reference, compare, open_reference, write_reference
from edgekit.model import resolve_model
from edgekit.plan import make_plan
from edgekit.recipe import find_recipe
from edgekit.stages._feedback import round_file
from edgekit.stages.gguf import Params, quantize, within_budget
from edgekit.stages.imatrix import FILE_NAME as IMATRIX_FILE
from edgekit.stages.imatrix import read_imatrix
from edgekit.stages.sensitivity import FILE_NAME as SENSITIVITY_FILE
from edgekit.stages.sensitivity import read_sensitivity
from edgekit.store import Store
from edgekit.target import find_target

PRESETS = (
    "Q2_K", "IQ3_XS", "Q3_K_S", "IQ3_M", "Q3_K_M", "Q3_K_L", "IQ4_XS", "Q4_0", "Q4_K_S", "Q4_K_M", "Q5_0", "Q5_K_S",
    "Q5_K_M", "Q6_K",
)  # fmt: skip
WINDOWS, LENGTH = 8, 512


def steps(model: str) -> dict[str, Artifact]:
    """Build the recipe and return the artifact of each step."""
    store = Store.default()
    plan = make_plan(resolve_model(model), find_recipe("gguf-best", {}), find_target("generic-x86"))
    built = build(plan, store, BuildEvents())
    found = {}
    for step in built.steps:
        record = store.lookup(step.key)
        assert record is not None
        found[step.stage] = store.open(record.digest)
    return found


def references(checkpoint: Artifact, scratch: Path) -> dict[str, Reference]:
    """The source model's laws on held-out prose and on code."""
    import torch

    tokenizer, network = open_checkpoint(checkpoint)
    found = {}
    for domain, text in (("prose", "python-docs"), ("code", "python-code")):
        windows = text_windows(tokenizer, text, "evaluation", WINDOWS, LENGTH)

        def logits(index: int, windows: Any = windows) -> Any:
            with torch.inference_mode():
                row = torch.from_numpy(windows[index].astype(np.int64))[None]
                return network(row, use_cache=False).logits[0].float().numpy()

        (scratch / domain).mkdir()
        write_reference(scratch / domain, windows, logits)
        found[domain] = open_reference(scratch / domain)
    return found


def judge(path: Path, laws: dict[str, Reference]) -> dict[str, Any]:
    """Divergence by domain, with its interval."""
    found: dict[str, Any] = {}
    with open_model(path, EngineOptions(context_tokens=LENGTH, batch_tokens=LENGTH)) as engine:
        for domain, law in laws.items():
            figure = next(m for m in compare(engine, law).measurements() if m.name == "kl_divergence_nats")
            found[domain] = {"nats": figure.value, "interval": [figure.ci_low, figure.ci_high]}
    return found


def decode_rate(path: Path, tokens: int = 48) -> float:
    """Tokens a second, one after the other, on one thread."""
    with open_model(path, EngineOptions(context_tokens=256, threads=1)) as engine:
        sequence, token = engine.start(), 1
        begun = 0.0
        for step in range(tokens + 8):
            if step == 8:
                begun = time.perf_counter()
            token = int(engine.step([Entry(sequence, token)]).logits[0].argmax())
        return tokens / (time.perf_counter() - begun)


def main() -> None:
    """Write every preset and our file of its bytes, and print the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model", help="a Hugging Face directory, off its grid")
    parser.add_argument("--presets", nargs="+", default=list(PRESETS))
    parser.add_argument("--rates", action="store_true", help="measure decode rates as well")
    parser.add_argument("--out", type=Path, help="directory to keep the files in")
    arguments = parser.parse_args()
    made = steps(arguments.model)
    source = made["convert"].model_path
    imatrix = read_imatrix(made["imatrix"].path / IMATRIX_FILE)
    losses = read_sensitivity(made["sensitivity"].path / SENSITIVITY_FILE)
    weights = gguf.read_header(source).parameters
    rows: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory() as name:
        scratch = arguments.out or Path(name)
        scratch.mkdir(parents=True, exist_ok=True)
        laws = references(made["checkpoint"], Path(name))
        for preset in arguments.presets:
            theirs, ours = scratch / f"llama-{preset}.gguf", scratch / f"ours-{preset}.gguf"
            begun = time.perf_counter()
            quantize(source, theirs, Params(type=preset), imatrix)
            row: dict[str, Any] = {"preset": preset, "bytes": theirs.stat().st_size}
            if any(other["bytes"] == row["bytes"] for other in rows):
                continue  # another name of the same types
            row |= {"bits_per_weight": 8 * row["bytes"] / weights, "theirs_s": time.perf_counter() - begun}
            row["theirs"] = judge(theirs, laws)
            begun = time.perf_counter()
            params, facts = within_budget(source, ours, Params(type="Q4_0"), imatrix, losses, row["bytes"])
            quantize(source, ours, params, imatrix)
            tokenizer, network = open_checkpoint(made["checkpoint"])
            windows = text_windows(tokenizer, "python-docs", "calibration", 2 * WINDOWS, LENGTH)
            round_file(made["checkpoint"], network, windows, source, ours, lambda i, n: None)
            del network
            row |= {"ours_s": time.perf_counter() - begun, "ours_bytes": ours.stat().st_size}
            row |= {"ours": judge(ours, laws), "predicted": facts["predicted_divergence_nats"], "types": facts["types"]}
            if arguments.rates:
                row["rates"] = [decode_rate(path) for path in (theirs, ours)]
            rows.append(row)
            print(f"{preset}: {row['theirs']['prose']['nats']:.4f} {row['ours']['prose']['nats']:.4f}", file=sys.stderr)
            if arguments.out is None:
                theirs.unlink()
                ours.unlink()
    report(rows)


def report(rows: list[dict[str, Any]]) -> None:
    """Compare each of our files with the best preset of no more bytes, and with its own."""
    print(
        f"{'preset':<8} {'bits':>5} {'MB':>7} {'ours MB':>8}   prose: theirs  ours   ratio   code: theirs  ours   ratio"
    )
    ratios: dict[str, list[float]] = {"prose": [], "code": []}
    for row in rows:
        line = f"{row['preset']:<8} {row['bits_per_weight']:>5.2f} {row['bytes'] / 1e6:>7.2f}"
        line += f" {row['ours_bytes'] / 1e6:>8.2f}  "
        row["ratio"] = {}
        for domain in ratios:
            # a larger preset is sometimes worse than a smaller one
            best = min(other["theirs"][domain]["nats"] for other in rows if other["bytes"] <= row["bytes"])
            mine = row["ours"][domain]["nats"]
            row["ratio"][domain] = mine / best
            ratios[domain].append(mine / best)
            line += f"{row['theirs'][domain]['nats']:>13.4f} {mine:>6.4f} {mine / best:>6.2f} "
        print(line)
    inside = [row for row in rows if 3.3 <= row["bits_per_weight"] <= 6.6]
    means = {}
    for domain in ratios:
        found = [row["ratio"][domain] for row in inside]
        if found:
            means[domain] = math.exp(statistics.fmean(map(math.log, found)))
            verdict = "met" if means[domain] <= 0.45 and max(found) <= 0.8 else "MISSED"
            print(
                f"{domain}: geometric mean {means[domain]:.3f} over {len(found)} sizes from 3.3 to 6.6 bits, largest "
                f"{max(found):.3f}; goal <= 0.45 and <= 0.8: {verdict}"
            )
    slack = [1 - row["ours_bytes"] / row["bytes"] for row in rows]
    print(
        f"bytes below the budget: at most {max(slack):.3%}, goal <= 0.5%; above it: {sum(s < 0 for s in slack)} files"
    )
    print(json.dumps({"benchmark": "frontier", "geometric_mean": means, "rows": rows}))


if __name__ == "__main__":
    main()
