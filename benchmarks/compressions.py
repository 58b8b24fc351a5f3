"""What we lose, and how long we take, path by path: checkpoints and ONNX models against the libraries used directly.

MODEL should be off its grid (see offgrid.py). Every path sees the same calibration and the same held-out text, and
is compared with the same source; peers are the libraries' own few lines from their documentation.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np

from edgekit.artifact import Artifact
from edgekit.build import BuildEvents, Built, build
from edgekit.engine import EngineOptions
from edgekit.engines import find_engine
from edgekit.formats.onnx import read_tensors
from edgekit.formats.weights import read_weights
from edgekit.huggingface import load_tokenizer, text_windows
from edgekit.measure.divergence import compare, open_reference
from edgekit.model import resolve_model
from edgekit.plan import Plan, make_plan
from edgekit.recipe import Overrides, find_recipe
from edgekit.store import Store
from edgekit.target import find_target

GPTQMODEL = """
import json, sys
import numpy as np, torch
from gptqmodel import BACKEND, AWQConfig, GPTQConfig, GPTQModel
method, model, out, settings = sys.argv[1], sys.argv[2], sys.argv[3], json.loads(sys.argv[4])
tokens = [{"input_ids": list(map(int, row)), "attention_mask": [1] * len(row)} for row in np.load("windows.npy")]
awq = method == "awq"
backend = BACKEND.AWQ_TORCH if awq else BACKEND.AUTO
config = (AWQConfig if awq else GPTQConfig)(**settings, device="cpu")
network = GPTQModel.load(model, config, dtype=torch.bfloat16 if awq else torch.float32, backend=backend)
network.quantize(tokens, batch_size=1, calibration_data_min_length=1, backend=backend)
network.save(out)
"""
BITSANDBYTES = """
import sys, torch
from transformers import AutoModelForCausalLM, AutoTokenizer, BitsAndBytesConfig
config = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=sys.argv[3] == "1")
network = AutoModelForCausalLM.from_pretrained(sys.argv[1], quantization_config=config, dtype=torch.float16)
network.save_pretrained(sys.argv[2])
AutoTokenizer.from_pretrained(sys.argv[1]).save_pretrained(sys.argv[2])
"""
BUILDER = """
import sys
from onnxruntime_genai.models import builder
arguments = ("", sys.argv[1], sys.argv[2], sys.argv[3], "cpu", sys.argv[2] + "/cache")
builder.create_model(*arguments, **builder.parse_extra_options(*arguments, ["hf_token=false"]))
"""


def divergence(engine_name: str, path: Path, reference: Path) -> tuple[float, float, float]:
    """KL divergence to the source in nats with its interval."""
    opened = open_reference(reference)
    options = EngineOptions(context_tokens=opened.window_tokens, batch_tokens=opened.window_tokens)
    with find_engine(engine_name).open_model(path, options) as engine:
        figures = {m.name: m for m in compare(engine, opened).measurements()}
    found = figures["kl_divergence_nats"]
    return found.value, float(found.ci_low or 0), float(found.ci_high or 0)


def weight_bytes(path: Path) -> int:
    """Bytes of all stored tensors."""
    return sum(weight.nbytes for weight in read_weights(path))


def builder_bytes(checkpoint: Path) -> int:
    """Size of the builder's default of 4 bits, its embedding table in half precision, as we store it."""
    with tempfile.TemporaryDirectory() as name:
        out = Path(name) / "out"
        out.mkdir()
        direct(BUILDER, Path(name), str(checkpoint), str(out), "int4")
        table = [t.nbytes for t in read_tensors(out / "model.onnx") if "embed" in t.name and t.type == "f32"]
        return sum(file.stat().st_size for file in out.glob("model.onnx*")) - sum(table) // 2


def ours(
    source: Any, recipe: str, overrides: Overrides, store: Store, verified: dict[str, Artifact]
) -> tuple[Plan, Built]:
    """Build a recipe for x86 as `edgekit build` does."""
    plan = make_plan(source, find_recipe(recipe, overrides), find_target("generic-x86"))
    return plan, build(plan, store, BuildEvents(), verified)


def direct(script: str, directory: Path, *arguments: str) -> float:
    """Run a library's own lines in a process; returns its seconds."""
    start = time.perf_counter()
    environment = {**os.environ, "GPTQMODEL_CPU_WORKERS": "2", "HF_HUB_OFFLINE": "1"}
    done = subprocess.run(
        [sys.executable, "-c", script, *arguments],
        cwd=directory,
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    if done.returncode:
        raise SystemExit(done.stderr[-2000:])
    return time.perf_counter() - start


def main() -> None:
    """Compare every path of the catalog that is not GGUF (see fidelity.py for that)."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model", help="a Hugging Face directory, off its grid")
    parser.add_argument("--skip", nargs="*", default=[], help="recipes to leave out")
    parser.add_argument("--awq-windows", type=int, default=4, help="calibration windows of AWQ, which is slow on a CPU")
    arguments = parser.parse_args()
    source, store = resolve_model(arguments.model), Store.default()
    verified: dict[str, Artifact] = {}
    rows: list[dict[str, Any]] = []
    recipes: dict[str, Overrides] = {
        "gptq-4bit": {},
        "awq-4bit": {("awq", "windows"): arguments.awq_windows},
        "nf4": {},
        "onnx-fp32": {},
        "onnx-fp16": {},
        "onnx-int8": {},
        "onnx-int4": {},
        "onnx-best": {},
    }
    for name, overrides in recipes.items():
        if name in arguments.skip:
            continue
        if name == "onnx-best":
            checkpoint = ours(source, "onnx-fp32", {}, store, verified)[1].checkpoint
            overrides = {("onnx_round", "budget_bytes"): builder_bytes(checkpoint.path)}
        plan, built = ours(source, name, overrides, store, verified)
        step = {record.stage: record for record in built.steps}
        reference = store.open(_digest(store, step["reference"].key)).path
        checkpoint = built.checkpoint
        params = {stage.name: values for stage, values in plan.recipe.stages}
        kld = divergence(plan.recipe.engine, built.result.model_path, reference)
        seconds = sum(
            record.seconds for record in built.steps if record.stage in params and record.stage != "checkpoint"
        )
        row = {
            "path": name, "weight_bytes": weight_bytes(built.result.model_path), "kld_nats": kld[0],
            "interval": kld[1:], "seconds": seconds, "peak_rss_bytes": max(r.peak_rss_bytes or 0 for r in built.steps),
        }  # fmt: skip
        with tempfile.TemporaryDirectory() as scratch:
            place, out = Path(scratch), Path(scratch) / "out"
            out.mkdir()
            engine = plan.recipe.engine
            if name in ("gptq-4bit", "awq-4bit"):
                method = name.partition("-")[0]
                tokenizer, read = load_tokenizer(checkpoint.path), params[method]
                windows = text_windows(tokenizer, read.text, "calibration", read.windows, read.window_tokens)
                np.save(place / "windows.npy", windows)
                group = built.result.facts["group_size"]
                settings: dict[str, Any] = {"bits": 4, "group_size": group, "sym": method == "gptq"}
                if method == "gptq":
                    settings |= {"desc_act": False}
                took = direct(GPTQMODEL, place, method, str(checkpoint.path), str(out), json.dumps(settings))
            elif name == "nf4":
                double = str(int(params["bitsandbytes"].double_quant))
                took = direct(BITSANDBYTES, place, str(checkpoint.path), str(out), double)
            else:
                precision = name.removeprefix("onnx-").replace("best", "int4")
                if (
                    precision == "fp16"
                ):  # its graph for a CPU cannot keep the cache in place, so our engine does not open it
                    rows.append({**row, "peer": None})
                    continue
                took = direct(BUILDER, place, str(checkpoint.path), str(out), precision)
            theirs = divergence(engine, out, reference)
            row |= {"peer_weight_bytes": weight_bytes(out), "peer_kld_nats": theirs[0], "peer_interval": theirs[1:]}
            row |= {"peer_seconds": took, "ratio": kld[0] / theirs[0], "peer": "the library itself"}
        rows.append(row)
        print(json.dumps(row), file=sys.stderr, flush=True)
    print(f"{'path':<11} {'MiB':>7} {'KLD':>9} {'peer MiB':>9} {'peer KLD':>9} {'ratio':>7} {'s':>6} {'peer s':>7}")
    for row in rows:
        peer = "" if row["peer"] is None else (
            f"{row['peer_weight_bytes'] / 2**20:>9.1f} {row['peer_kld_nats']:>9.2e} {row['ratio']:>7.4f} "
            f"{row['seconds']:>6.0f} {row['peer_seconds']:>7.0f}"
        )  # fmt: skip
        print(f"{row['path']:<11} {row['weight_bytes'] / 2**20:>7.1f} {row['kld_nats']:>9.2e} {peer}")
    print(json.dumps({"benchmark": "compressions", "model": arguments.model, "rows": rows}))


def _digest(store: Store, key: str) -> str:
    record = store.lookup(key)
    assert record is not None
    return record.digest


if __name__ == "__main__":
    main()
