"""ONNX in 4 bits: `onnx-int4` and `onnx-best` beside the builder's default and ONNX Runtime's own quantizer.

`onnx-best` gets the bytes of the builder's default. RTN and HQQ round the builder's graph in float32, in blocks of 32
with zero points, which takes more bytes than either.
"""

from __future__ import annotations

import sys
from collections.abc import Collection
from pathlib import Path

from _judge import Goal, Part, Row, artifact_of, beside, judge, made
from _peers import ONNXRUNTIME, build_onnx, direct, onnx_bytes

from edgekit.artifact import Artifact
from edgekit.measure.divergence import Reference
from edgekit.model import Source
from edgekit.recipe import Overrides
from edgekit.store import Store

DEFAULT = "builder-int4"


def measure(
    source: Source,
    checkpoint: Artifact,
    laws: dict[str, Reference],
    scratch: Path,
    *,
    overrides: dict[str, Overrides],
    skip: Collection[str] = (),
) -> Part:
    """Write and judge the peers' graphs, then ours; `overrides` by recipe."""
    part = Part()
    weights = int(checkpoint.facts["parameters"])

    def add(name: str, path: Path, ours: bool, seconds: float) -> Row:
        nbytes = onnx_bytes(path)
        facts = {"bits_per_weight": 8 * nbytes / weights, "steps_s" if ours else "process_s": seconds}
        row = Row("onnx", name, ours, nbytes, judge("onnxruntime", path, laws), facts)
        part.rows.append(row)
        print(f"onnx {name}: {nbytes / 1e6:.2f} MB, {row.loss}", file=sys.stderr, flush=True)
        return row

    default = add(DEFAULT, scratch / DEFAULT, False, build_onnx(checkpoint.path, scratch / DEFAULT, "int4").process_s)
    peers = [default]
    methods = [method for method in ("rtn", "hqq") if method not in skip]
    if methods:
        build_onnx(checkpoint.path, scratch / "fp32", "fp32")
    for method in methods:
        out = scratch / method
        ran = direct(ONNXRUNTIME, scratch, method, str(scratch / "fp32"), str(out))
        peers.append(add(f"ort-{method}", out, False, ran.process_s))
    store, verified = Store.default(), dict[str, Artifact]()
    budgets: dict[str, Overrides] = {
        "onnx-int4": {},
        "onnx-best": {("onnx_round", "budget_bytes"): default.nbytes},
    }
    for recipe, budget in budgets.items():
        plan, built = made(source, recipe, {**overrides[recipe], **budget}, store, verified)
        named = {stage.name for stage, _ in plan.recipe.stages} - {"checkpoint"}
        seconds = sum(step.seconds for step in built.steps if step.stage in named)
        last = plan.recipe.stages[-1][0].name
        ours = add(recipe, artifact_of(store, built, last).path, True, seconds)
        part.pairs.extend(beside(ours, peer) for peer in peers)
    for pair in part.pairs:
        if pair.peer == DEFAULT:
            fits = pair.nbytes <= 1
            for domain, ratio in pair.loss.items():
                found = f"{ratio:.3f} in {pair.nbytes:.3f} of its bytes" + ("" if fits else ": larger, not judged")
                text = f"{domain}: KLD of {pair.ours} <= 0.5 of the builder's default, in no more bytes"
                part.goals.append(Goal("onnx", text, found, ratio <= 0.5 if fits else None))
    return part
