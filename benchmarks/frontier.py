"""Divergence against bytes: our files beside the peers of GGUF, of GPTQ's container and of ONNX, in one run.

MODEL should be off its grid (see offgrid.py). All sides get the same checkpoint and calibration prose, and all files
are judged on the same held-out prose and code. The parts are `gguf` (llama.cpp's quantizer), `gptq` (GPTQModel,
AutoRound) and `onnx` (onnxruntime-genai's builder, ONNX Runtime's RTN and HQQ); see the modules _frontier_*.py. Until a
part is done, all of its models lie in a temporary directory: some forty for `gguf`.
"""

from __future__ import annotations

import argparse
import json
import shutil
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import _frontier_gguf
import _frontier_gptq
import _frontier_onnx
import _frontier_plot
from _judge import LENGTH, RECIPES, Goal, Loss, Pair, Part, Row, checkpoint_of, overrides_of, references

from edgekit.model import resolve_model
from edgekit.recipe import parse_overrides

FLATTERED = "flattered: this model lies on a Q4_1 grid"
RECORD, PICTURE = "frontier.json", "frontier.svg"


def main() -> None:
    """Measure the parts, print tables, goals and one JSON line, and draw the picture."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model", help="a Hugging Face directory, off its grid")
    parser.add_argument("--parts", nargs="+", choices=list(RECIPES), default=list(RECIPES))
    parser.add_argument("--windows", type=int, default=8, help=f"held-out windows of {LENGTH} tokens, in each domain")
    parser.add_argument("--flattered", action="store_true", help=f"mark everything: {FLATTERED}")
    parser.add_argument("--out", type=Path, help=f"directory for {PICTURE} and {RECORD}; parts of an earlier run stay")
    parser.add_argument("--keep", action="store_true", help="keep the models in OUT as well")
    parser.add_argument("--set", action="append", default=[], metavar="STAGE.PARAM=VALUE", help="for all recipes of it")
    parser.add_argument(
        "--presets", nargs="+", default=list(_frontier_gguf.PRESETS), help="of llama.cpp; Q4_0-pure for one type"
    )
    parser.add_argument(
        "--sizes", nargs="+", default=list(_frontier_gguf.SIZES), help="presets whose bytes ours are written in"
    )
    parser.add_argument("--rates", action="store_true", help="measure decode rates of GGUF files as well")
    parser.add_argument("--rate-turns", type=int, default=9)
    parser.add_argument("--wall-turns", type=int, default=1, help="how often each side of GPTQ rounds")
    parser.add_argument("--full-autoround", action="store_true", help="200 steps, not the 50 of its light preset")
    parser.add_argument("--skip", nargs="+", default=[], choices=["gptqmodel", "autoround", "rtn", "hqq"])
    arguments = parser.parse_args()
    if arguments.keep and arguments.out is None:
        parser.error("--keep needs --out")
    source, overrides = resolve_model(arguments.model), parse_overrides(tuple(arguments.set))
    chosen = {recipe: overrides_of(recipe, overrides) for part in arguments.parts for recipe in RECIPES[part]}
    if unknown := set(overrides) - {key for found in chosen.values() for key in found}:
        parser.error(f"no recipe of these parts has {'.'.join(min(unknown))}")
    facts = {"model": source.artifact.digest, "windows": arguments.windows, "flattered": arguments.flattered}
    record = arguments.out / RECORD if arguments.out else None
    parts = _earlier(record, facts) if record else {}
    with tempfile.TemporaryDirectory() as name:
        place = Path(name)
        checkpoint = checkpoint_of(source, place / "checkpoint")
        laws = references(checkpoint, place, arguments.windows)
        for part in arguments.parts:
            scratch = arguments.out / part if arguments.keep else place / part
            shutil.rmtree(scratch, ignore_errors=True)
            scratch.mkdir(parents=True)
            if part == "gguf":
                found = _frontier_gguf.measure(
                    source, laws, scratch, overrides=chosen["gguf-best"], presets=arguments.presets,
                    sizes=arguments.sizes, rate_turns=arguments.rate_turns if arguments.rates else 0,
                )  # fmt: skip
            elif part == "gptq":
                found = _frontier_gptq.measure(
                    checkpoint, laws, scratch, overrides=chosen["gptq-4bit"], turns=arguments.wall_turns,
                    light=not arguments.full_autoround, skip=arguments.skip,
                )  # fmt: skip
            else:
                found = _frontier_onnx.measure(source, checkpoint, laws, scratch, overrides=chosen, skip=arguments.skip)
            if not arguments.keep:
                shutil.rmtree(scratch)
            parts[part] = found
            if record:  # a later part may fail, and this one took long
                record.parent.mkdir(parents=True, exist_ok=True)
                record.write_text(json.dumps({**facts, "parts": {part: asdict(one) for part, one in parts.items()}}))
    note = FLATTERED if arguments.flattered else ""
    rows = [row for part in parts.values() for row in part.rows]
    report(parts, note)
    if arguments.out:
        title = f"{Path(arguments.model).name}: loss over size, {arguments.windows} x {LENGTH} held-out tokens"
        (arguments.out / PICTURE).write_text(_frontier_plot.draw(rows, title, note))
        print(f"picture: {arguments.out / PICTURE}")
    print(json.dumps({"benchmark": "frontier", **facts, "parts": {part: asdict(one) for part, one in parts.items()}}))


def _earlier(record: Path, facts: dict[str, Any]) -> dict[str, Part]:
    """Parts that an earlier run measured on the same model and windows."""
    if not record.exists():
        return {}
    kept = json.loads(record.read_text())
    if any(kept.get(name) != value for name, value in facts.items()):
        print(f"{record} is of another model or of other windows: written anew", file=sys.stderr)
        return {}
    return {
        name: Part(
            [Row(**{**row, "loss": {key: Loss(**loss) for key, loss in row["loss"].items()}}) for row in part["rows"]],
            [Pair(**pair) for pair in part["pairs"]],
            [Goal(**goal) for goal in part["goals"]],
        )
        for name, part in kept["parts"].items()
    }


def report(parts: dict[str, Part], note: str) -> None:
    """Print every file, every pair and every goal."""
    if note:
        print(note)
    rows = [row for part in parts.values() for row in part.rows]
    print(
        f"\n{'':4} {'file':<16} {'MB':>8} {'bits':>5} {'s':>6}  " + _cells([f"KLD {name}" for name in rows[0].loss], 26)
    )
    for row in rows:
        bits = row.facts.get("bits_per_weight")
        seconds = next((row.facts[kind] for kind in ("rounding_s", "process_s", "steps_s") if kind in row.facts), 0.0)
        head = (
            f"{row.part:4} {row.name:<16} {row.nbytes / 1e6:>8.2f} {f'{bits:.2f}' if bits else '':>5} {seconds:>6.0f}"
        )
        print(f"{head}  " + _cells(list(map(str, row.loss.values())), 26))
    print(
        f"\n{'':4} {'ours to a peer':<30} {'bytes':>7} " + _cells([f"KLD {name}" for name in rows[0].loss], 10) + "also"
    )
    for pair in (pair for part in parts.values() for pair in part.pairs):
        also = [f"{kind.removesuffix('_s')} s {pair.facts[kind]:.2f}" for kind in _WALL if kind in pair.facts]
        for peer, (ratio, low, high) in pair.facts.get("rates", {}).items():
            also.append(f"rate to {peer} {ratio:.3f} [{low:.3f}, {high:.3f}]")
        cells = _cells([f"{ratio:.3f}" for ratio in pair.loss.values()], 10)
        print(f"{pair.part:4} {f'{pair.ours} to {pair.peer}':<30} {pair.nbytes:>7.4f} {cells}{', '.join(also)}")
    print()
    for goal in (goal for part in parts.values() for goal in part.goals):
        verdict = {True: "met", False: "MISSED", None: "not judged"}[goal.met]
        print(f"{verdict:<10} {goal.part}: {goal.text}: {goal.found}")


_WALL = ("rounding_s", "process_s")


def _cells(texts: Sequence[str], width: int) -> str:
    return "".join(f"{text:<{width}}" for text in texts)


if __name__ == "__main__":
    main()
