"""What wrapping costs: our GGUF files against llama.cpp's own quantizer on the same importance matrix.

With `--llama-quantize PATH` the peer is upstream's program; without, a direct call of `llama_model_quantize`.
"""

from __future__ import annotations

import argparse
import ctypes
import json
import subprocess
import tempfile
from pathlib import Path

import gguf
import numpy as np
from llama_cpp import llama_cpp as api

from edgekit.artifact import Artifact
from edgekit.build import BuildEvents, build
from edgekit.engine import EngineOptions
from edgekit.engines import find_engine
from edgekit.measure.divergence import compare, open_reference
from edgekit.model import BUILTIN, resolve_model
from edgekit.plan import make_plan
from edgekit.recipe import find_recipe
from edgekit.stages.evaluate import read_evaluation
from edgekit.store import Store
from edgekit.target import find_target


def peer_file(f16: Path, imatrix: Path | None, file_type: tuple[str, int], out: Path, program: str | None) -> Path:
    """Quantize with llama.cpp alone."""
    if program:
        matrix = ["--imatrix", str(imatrix)] if imatrix else []
        command = [program, *matrix, str(f16), str(out), file_type[0], "2"]
        subprocess.run(command, check=True, capture_output=True)
        return out
    settings = api.llama_model_quantize_default_params()
    settings.ftype = file_type[1]
    keep = []
    if imatrix:
        values = {t.name: np.array(t.data, dtype=np.float32).reshape(-1) for t in gguf.GGUFReader(imatrix).tensors}
        for name in [n.removesuffix(".in_sum2") for n in values if n.endswith(".in_sum2")]:
            mean = values[f"{name}.in_sum2"] / values[f"{name}.counts"]
            keep.append((name.encode(), mean.ctypes.data_as(ctypes.POINTER(ctypes.c_float)), mean.size))
        settings.imatrix = (api.llama_model_imatrix_data * (len(keep) + 1))(*keep, (None, None, 0))
    if api.llama_model_quantize(str(f16).encode(), str(out).encode(), ctypes.byref(settings)):
        raise SystemExit("llama.cpp's quantizer failed")
    return out


def same_tensors(ours: Path, theirs: Path) -> int:
    """Tensors whose type and bytes are equal."""
    pairs = zip(gguf.GGUFReader(ours).tensors, gguf.GGUFReader(theirs).tensors, strict=True)
    return sum(a.name == b.name and a.tensor_type == b.tensor_type and np.array_equal(a.data, b.data) for a, b in pairs)


def main() -> None:
    """Compare every GGUF recipe of the catalog."""
    from edgekit.stages.gguf import FILE_TYPES

    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", default=BUILTIN)
    parser.add_argument("--llama-quantize", help="upstream's program")
    arguments = parser.parse_args()
    source, store, target = resolve_model(arguments.model), Store.default(), find_target("generic-x86")
    verified: dict[str, Artifact] = {}
    rows = []
    for name in ("gguf-q8", "gguf-q4", "gguf-q4-0", "gguf-smallest"):
        # feedback is ours: it is what the quantizer itself gives that is compared
        plan = make_plan(source, find_recipe(name, {("gguf", "feedback"): False}), target)
        built = build(plan, store, BuildEvents(), verified)
        by_kind = {step.stage: store.lookup(step.key) for step in built.steps}
        params = next(params for stage, params in plan.recipe.stages if stage.name == "gguf")
        f16 = store.open(by_kind["convert"].digest).path / "model.gguf"
        imatrix = store.open(by_kind["imatrix"].digest).path / "imatrix.gguf" if "imatrix" in by_kind else None
        reference = open_reference(store.open(by_kind["reference"].digest).path)
        converted = read_evaluation(dict(built.evaluations)["convert"], "convert")[0]
        ours = read_evaluation(dict(built.evaluations)["bundle"], "bundle")[0]
        with tempfile.TemporaryDirectory() as scratch:
            file_type = (params.type, FILE_TYPES[params.type])
            theirs = peer_file(f16, imatrix, file_type, Path(scratch) / "peer.gguf", arguments.llama_quantize)
            options = EngineOptions(context_tokens=reference.window_tokens, batch_tokens=reference.window_tokens)
            with find_engine("llama_cpp").open_model(theirs, options) as engine:
                peer = compare(engine, reference).measurements()
            equal = same_tensors(built.result.path / "model.gguf", theirs)
            total = len(gguf.GGUFReader(theirs).tensors)
        kld = {m.name: m for m in ours}["kl_divergence_nats"]
        peer_kld = {m.name: m for m in peer}["kl_divergence_nats"].value
        rows.append(
            {
                "recipe": name,
                "type": params.type,
                "f16_kld_nats": {m.name: m.value for m in converted}["kl_divergence_nats"],
                "kld_nats": kld.value,
                "kld_interval": [kld.ci_low, kld.ci_high],
                "peer_kld_nats": peer_kld,
                "ratio": kld.value / peer_kld,
                "equal_tensors": equal,
                "tensors": total,
                "weight_bytes": built.result.facts["weight_bytes"],
                "predicted_weight_bytes": plan.weight_bytes,
            }
        )
    print(f"{'recipe':<14} {'type':<7} {'f16 KLD':>9} {'KLD':>8} {'peer KLD':>9} {'ratio':>7} {'equal tensors':>14}")
    for row in rows:
        print(
            f"{row['recipe']:<14} {row['type']:<7} {row['f16_kld_nats']:>9.2e} {row['kld_nats']:>8.4f} "
            f"{row['peer_kld_nats']:>9.4f} {row['ratio']:>7.4f} {row['equal_tensors']:>7} / {row['tensors']}"
        )
    print(json.dumps({"benchmark": "fidelity", "model": arguments.model, "rows": rows}))


if __name__ == "__main__":
    main()
