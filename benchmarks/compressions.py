"""What we lose, and how long we take, path by path: the formats that frontier.py leaves out, against their libraries.

MODEL should be off its grid (see offgrid.py). Every path sees the same calibration and the same held-out text, and
is compared with the same source; peers are the libraries' own few lines from their documentation.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
from _judge import artifact_of, judge, made
from _peers import BITSANDBYTES, BUILDER, GPTQMODEL, direct

from edgekit.artifact import Artifact
from edgekit.formats.weights import read_weights
from edgekit.huggingface import load_tokenizer, text_windows
from edgekit.measure.divergence import open_reference
from edgekit.model import resolve_model
from edgekit.recipe import Overrides
from edgekit.store import Store


def weight_bytes(path: Path) -> int:
    """Bytes of all stored tensors."""
    return sum(weight.nbytes for weight in read_weights(path))


def main() -> None:
    """Compare every path of the catalog that neither frontier.py nor fidelity.py has."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model", help="a Hugging Face directory, off its grid")
    parser.add_argument("--skip", nargs="*", default=[], help="recipes to leave out")
    parser.add_argument("--awq-windows", type=int, default=4, help="calibration windows of AWQ, which is slow on a CPU")
    arguments = parser.parse_args()
    source, store = resolve_model(arguments.model), Store.default()
    verified: dict[str, Artifact] = {}
    rows: list[dict[str, Any]] = []
    recipes: dict[str, Overrides] = {
        "awq-4bit": {("awq", "windows"): arguments.awq_windows},
        "nf4": {},
        "onnx-fp32": {},
        "onnx-fp16": {},
        "onnx-int8": {},
    }
    for name, overrides in recipes.items():
        if name in arguments.skip:
            continue
        plan, built = made(source, name, overrides, store, verified)
        laws = {"held out": open_reference(artifact_of(store, built, "reference").path)}
        checkpoint, engine = built.checkpoint, plan.recipe.engine
        params = {stage.name: values.model_dump() for stage, values in plan.recipe.stages}
        loss = judge(engine, built.result.model_path, laws)["held out"]
        seconds = sum(
            record.seconds for record in built.steps if record.stage in params and record.stage != "checkpoint"
        )
        row: dict[str, Any] = {
            "path": name, "weight_bytes": weight_bytes(built.result.model_path), "kld_nats": loss.nats,
            "interval": [loss.low, loss.high], "seconds": seconds,
            "peak_rss_bytes": max(r.peak_rss_bytes or 0 for r in built.steps), "peer": None,
        }  # fmt: skip
        rows.append(row)
        if name == "onnx-fp16":
            continue  # the builder's graph for a CPU cannot keep the cache in place, so our engine does not open it
        with tempfile.TemporaryDirectory() as scratch:
            place, out = Path(scratch), Path(scratch) / "out"
            out.mkdir()
            if name == "awq-4bit":
                tokenizer, read = load_tokenizer(checkpoint.path), params["awq"]
                windows = text_windows(tokenizer, read["text"], "calibration", read["windows"], read["window_tokens"])
                np.save(place / "windows.npy", windows)
                settings = {"bits": 4, "group_size": built.result.facts["group_size"], "sym": False}
                ran = direct(GPTQMODEL, place, "awq", str(checkpoint.path), str(out), json.dumps(settings))
            elif name == "nf4":
                double = str(int(params["bitsandbytes"]["double_quant"]))
                ran = direct(BITSANDBYTES, place, str(checkpoint.path), str(out), double)
            else:
                ran = direct(BUILDER, place, str(checkpoint.path), str(out), name.removeprefix("onnx-"))
            theirs = judge(engine, out, laws)["held out"]
            row |= {"peer_weight_bytes": weight_bytes(out), "peer_kld_nats": theirs.nats}
            row |= {"peer_interval": [theirs.low, theirs.high], "peer_seconds": ran.process_s}
            row |= {"ratio": loss.nats / theirs.nats, "peer": "the library itself"}
        print(json.dumps(row), file=sys.stderr, flush=True)
    print(f"{'path':<11} {'MiB':>7} {'KLD':>9} {'peer MiB':>9} {'peer KLD':>9} {'ratio':>7} {'s':>6} {'peer s':>7}")
    for row in rows:
        peer = "" if row["peer"] is None else (
            f"{row['peer_weight_bytes'] / 2**20:>9.1f} {row['peer_kld_nats']:>9.2e} {row['ratio']:>7.4f} "
            f"{row['seconds']:>6.0f} {row['peer_seconds']:>7.0f}"
        )  # fmt: skip
        print(f"{row['path']:<11} {row['weight_bytes'] / 2**20:>7.1f} {row['kld_nats']:>9.2e} {peer}")
    print(json.dumps({"benchmark": "compressions", "model": arguments.model, "rows": rows}))


if __name__ == "__main__":
    main()
