"""GPTQ's container: our stage beside GPTQModel and AutoRound at the same bits, group size and calibration text.

Each side rounds in a fresh process that gets the same checkpoint. Peers get token ids; the seconds of rounding leave
out imports, loading and, on our side, tokenizing, and the seconds of the process have all of it.
"""

from __future__ import annotations

import importlib.util
import json
import statistics
import sys
from collections.abc import Collection
from pathlib import Path

import numpy as np
from _judge import Goal, Part, Row, beside, judge
from _peers import AUTOROUND, EDGEKIT_GPTQ, GPTQMODEL, Ran, direct

from edgekit.artifact import Artifact
from edgekit.formats.safetensors import read_checkpoint
from edgekit.huggingface import load_tokenizer, text_windows
from edgekit.measure.divergence import Reference
from edgekit.recipe import Overrides, find_recipe

OURS = "gptq-4bit"
LIGHT = {"iters": 50, "lr": 5e-3}
"""AutoRound's own preset `auto-round-light`: its default of 200 steps takes hours on two cores."""


def stored_bytes(directory: Path) -> int:
    """Bytes of all tensors; one in float32 counts in half precision, as we store it."""
    return sum(t.nbytes // 2 if t.dtype == "F32" else t.nbytes for t in read_checkpoint(directory).values())


def measure(
    checkpoint: Artifact,
    laws: dict[str, Reference],
    scratch: Path,
    *,
    overrides: Overrides,
    turns: int = 1,
    light: bool = True,
    skip: Collection[str] = (),
) -> Part:
    """Round on each side in turns, judge the last files, and compare medians of seconds."""
    recipe = find_recipe("gptq-4bit", overrides)
    params = next(params for stage, params in recipe.stages if stage.name == "gptq")
    settings = params.model_dump(mode="json")
    tokenizer = load_tokenizer(checkpoint.path)
    count, length = settings["windows"], settings["window_tokens"]
    windows = text_windows(tokenizer, settings["text"], "calibration", count, length)
    np.save(scratch / "windows.npy", windows)
    sides = {OURS: scratch / "ours", "GPTQModel": scratch / "gptqmodel", "AutoRound": scratch / "autoround"}
    for name in list(sides)[1:]:
        if name.lower() in skip:
            print(f"{name}: left out, as told", file=sys.stderr)
            del sides[name]
    if "AutoRound" in sides and importlib.util.find_spec("auto_round") is None:
        print("AutoRound: left out, it is not installed (pip install auto-round==0.16.1)", file=sys.stderr)
        del sides["AutoRound"]
    ran: dict[str, list[Ran]] = {name: [] for name in sides}
    chosen: dict[str, object] = {}
    for turn in range(turns):
        for name, out in sides.items():
            if turn and name == "AutoRound":
                continue  # no goal asks for its seconds
            out = out / str(turn)
            out.mkdir(parents=True)
            if name == OURS:
                ran[name].append(direct(EDGEKIT_GPTQ, scratch, str(checkpoint.path), str(out), json.dumps(settings)))
                stated = json.loads((out / "config.json").read_text())["quantization_config"]
                chosen = {"bits": stated["bits"], "group_size": stated["group_size"], "sym": stated["sym"]}
            elif name == "GPTQModel":
                told = json.dumps({**chosen, "desc_act": settings["act_order"]})
                ran[name].append(direct(GPTQMODEL, scratch, "gptq", str(checkpoint.path), str(out), told))
            else:
                told = json.dumps({**chosen, **(LIGHT if light else {})})
                ran[name].append(direct(AUTOROUND, scratch, str(checkpoint.path), str(out), told))
    part = Part()
    for name, out in sides.items():
        # AutoRound may write into a folder below
        found = next(path.parent for path in sorted((out / str(len(ran[name]) - 1)).rglob("config.json")))
        facts = {
            "rounding_s": statistics.median(one.rounding_s for one in ran[name]),
            "process_s": statistics.median(one.process_s for one in ran[name]),
            "laps_s": [one.laps for one in ran[name]],
            "written_bytes": sum(tensor.nbytes for tensor in read_checkpoint(found).values()),
            **chosen,
        }
        if name == "AutoRound":
            facts["steps"] = LIGHT["iters"] if light else 200
        part.rows.append(
            Row("gptq", name, name == OURS, stored_bytes(found), judge("torch_reference", found, laws), facts)
        )
        print(f"gptq {name}: {facts['rounding_s']:.0f} s, {part.rows[-1].loss}", file=sys.stderr, flush=True)
    ours, *peers = part.rows
    for peer in peers:
        seconds = {kind: ours.facts[kind] / peer.facts[kind] for kind in ("rounding_s", "process_s")}
        part.pairs.append(beside(ours, peer, **seconds))
    for pair in part.pairs:
        if pair.peer == "GPTQModel":
            for domain, ratio in pair.loss.items():
                part.goals.append(Goal("gptq", f"{domain}: KLD <= GPTQModel's", f"{ratio:.3f}", ratio <= 1))
            for kind, what in (("rounding_s", "rounding alone"), ("process_s", "the whole process")):
                ratio = pair.facts[kind]
                goal = Goal("gptq", f"wall time of {what} <= 0.5 of GPTQModel's", f"{ratio:.3f}", ratio <= 0.5)
                part.goals.append(goal)
    return part
