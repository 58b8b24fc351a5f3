"""Predicted bytes and decode rates of the plan beside what this machine measures."""

from __future__ import annotations

import json
import tempfile
from pathlib import Path

from edgekit.build import BuildEvents
from edgekit.deliver import deliver
from edgekit.devices import open_device
from edgekit.model import BUILTIN, resolve_model
from edgekit.plan import make_plan
from edgekit.recipe import find_recipe
from edgekit.store import Store
from edgekit.target import find_target

FIGURES = ("weight_bytes", "decode_tokens_per_s", "prefill_tokens_per_s")


def main() -> None:
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
    print(json.dumps({"benchmark": "prediction", "target": "local", "rows": rows}))


if __name__ == "__main__":
    main()
