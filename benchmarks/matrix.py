"""Every recipe on several targets: bytes, bits per weight, perplexity, KL divergence, decode rate. `make matrix`."""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

from edgekit.model import BUILTIN, model_shape, resolve_model
from edgekit.recipe import find_recipe, recipe_names
from edgekit.support import refusal
from edgekit.target import find_target

TARGETS = ("jetson-orin-nano-super", "raspberry-pi-5", "generic-x86", "intel-lunar-lake")


def main() -> None:
    """Build what is supported, name what is refused and why."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", default=BUILTIN)
    parser.add_argument("--target", nargs="*", default=list(TARGETS))
    parser.add_argument("--recipe", nargs="*", default=list(recipe_names()))
    parser.add_argument("--out", type=Path, default=Path("dist/matrix"))
    arguments = parser.parse_args()
    parameters = model_shape(resolve_model(arguments.model).artifact).parameters
    rows: list[dict[str, Any]] = []
    failures = 0
    for recipe in arguments.recipe:
        for target in arguments.target:
            row: dict[str, Any] = {"recipe": recipe, "target": target}
            why = refusal(find_recipe(recipe), find_target(target))
            rows.append(row)
            if why:
                row["refused"] = why
                continue
            command = [
                sys.executable,
                "-m",
                "edgekit",
                "build",
                arguments.model,
                "--target",
                target,
                "--recipe",
                recipe,
            ]
            done = subprocess.run(
                [*command, "--out", str(arguments.out / recipe), "--json"],
                stdout=subprocess.PIPE,
                text=True,
                check=False,
            )
            row["exit_code"] = done.returncode
            if done.returncode not in (0, 3):
                failures += 1
                continue
            (built,) = json.loads(done.stdout)["targets"]
            found = {
                m["name"]: m["value"] for m in built["measurements"] if m["of"] == "bundle" and m["kind"] == "measured"
            }
            names = ("weight_bytes", "bundle_bytes", "perplexity", "kl_divergence_nats", "decode_tokens_per_s")
            row |= {name: found.get(name) for name in names}
            row["bits_per_weight"] = 8 * found["weight_bytes"] / parameters
            row["passed"] = built["passed"]
    columns = ("MiB", "bpw", "perplexity", "KLD", "tok/s here", "gates")
    print(f"{'recipe':<14} {'target':<23}" + "".join(f"{name:>11}" for name in columns))
    for row in rows:
        print(f"{row['recipe']:<14} {row['target']:<23}" + _cells(row))
    print(json.dumps({"benchmark": "matrix", "model": arguments.model, "rows": rows}))
    sys.exit(1 if failures else 0)


def _cells(row: dict[str, Any]) -> str:
    if "refused" in row:
        return f"  refused: {row['refused']}"
    if "weight_bytes" not in row:
        return f"  failed with exit code {row['exit_code']}"

    def shown(name: str, form: str) -> str:
        return f"{'-':>11}" if row[name] is None else f"{row[name]:>11{form}}"

    size = f"{row['weight_bytes'] / 2**20:>11.1f}{row['bits_per_weight']:>11.2f}"
    quality = shown("perplexity", ".2f") + shown("kl_divergence_nats", ".2e")
    return size + quality + shown("decode_tokens_per_s", ".1f") + f"{'passed' if row['passed'] else 'FAILED':>11}"


if __name__ == "__main__":
    main()
