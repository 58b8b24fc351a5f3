"""GGUF: a budget spent by us beside every preset of llama.cpp's quantizer, and decode rates beside uniform types.

Both sides get the same f16 file, the same importance matrix and the same calibration text. The quantizer runs in this
process and is upstream's bit for bit (see fidelity.py). Ours is the stage `gguf` of the recipe `gguf-best`; before,
what a weight of each type costs is measured on this machine, as `edgekit targets probe` does.
"""

from __future__ import annotations

import math
import statistics
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from _judge import Goal, Pair, Part, Row, artifact_of, beside, judge, made

from edgekit.engine import EngineOptions, Entry
from edgekit.engines.llama_cpp import open_model
from edgekit.errors import InputError
from edgekit.formats.gguf import read_header
from edgekit.measure.divergence import Reference
from edgekit.measure.kernels import measure_weight_costs
from edgekit.measurement import median_interval
from edgekit.model import Source
from edgekit.recipe import Overrides, find_recipe
from edgekit.stage import StageContext, find_stage
from edgekit.stages.gguf import FILE_NAME, Params, quantize
from edgekit.stages.imatrix import FILE_NAME as IMATRIX_FILE
from edgekit.stages.imatrix import read_imatrix
from edgekit.store import Store
from edgekit.target import Figure

PRESETS = (
    "Q2_K", "IQ3_XS", "Q3_K_S", "IQ3_M", "Q3_K_M", "Q3_K_L", "IQ4_XS", "Q4_0", "Q4_K_S", "Q4_K_M", "Q5_0", "Q5_K_S",
    "Q5_K_M", "Q6_K",
)  # fmt: skip
PURE = "-pure"
"""Ends the name of a preset whose one type every matrix takes."""
SIZES = ("Q2_K", "Q3_K_S-pure", "Q3_K_M", "Q4_0-pure", "Q4_K_M", "Q5_0-pure", "Q5_K_M", "Q6_K-pure")
"""Whose bytes ours are written in: uniform types, which have a rate to compare with, and mixtures between them."""
UNIFORM = ("Q2_K", "Q3_K_S", "Q4_0", "Q4_1", "Q4_K_S", "Q5_0", "Q5_1", "Q5_K_S", "Q6_K", "Q8_0")
"""Types to compare rates with."""
LEAST, MOST = 3.3, 6.6
"""Bits for each weight of the sizes that the mean is over."""
RATE_THREADS = 1
"""Of decode: a second waits for the first where others use the machine."""
SAME = 0.005
"""How far below a budget a uniform type is of its size."""


class Gguf:
    """The files of both sides, from one model."""

    def __init__(self, source: Source, overrides: Overrides, costs: dict[str, float], scratch: Path) -> None:
        store = Store.default()
        # whatever `gguf` is told, what goes into it is the same
        before = {key: value for key, value in overrides.items() if key[0] != "gguf"}
        plan, built = made(source, "gguf-best", before, store, {})
        recipe = find_recipe("gguf-best", overrides)
        self.params = next(params for stage, params in recipe.stages if stage.name == "gguf")
        kinds = ("checkpoint", "convert", "imatrix", "sensitivity")
        self.given = {kind: artifact_of(store, built, kind) for kind in kinds}
        self.weights = int(self.given["checkpoint"].facts["parameters"])
        self.imatrix = read_imatrix(self.given["imatrix"].path / IMATRIX_FILE)
        known = Figure(value=costs, estimate="measured by this benchmark") if costs else None
        compute = plan.target.compute.model_copy(update={"weight_costs": known})
        self.context = StageContext(store, self.given, plan.target.model_copy(update={"compute": compute}))
        self.scratch = scratch

    def theirs(self, preset: str) -> tuple[Path, float]:
        """The file of a preset, and the seconds that the quantizer took."""
        path, begun = self.scratch / f"llama-{preset}.gguf", time.perf_counter()
        settings = {"type": preset.removesuffix(PURE), "pure": preset.endswith(PURE)}
        quantize(self.given["convert"].model_path, path, Params.model_validate(settings), self.imatrix)
        return path, time.perf_counter() - begun

    def ours(self, name: str, budget: int) -> tuple[Path, float, dict[str, Any]]:
        """Our file of at most `budget` bytes, the seconds from the losses on, and the stage's facts."""
        out, begun = self.scratch / f"ours-{name}", time.perf_counter()
        out.mkdir()
        params = self.params.model_copy(update={"budget_bytes": budget, "bits_per_weight": None})
        facts = find_stage("gguf").run(self.given["convert"], out, params, self.context)
        seconds = time.perf_counter() - begun
        path = (out / FILE_NAME).rename(self.scratch / f"ours-{name}.gguf")
        out.rmdir()
        return path, seconds, facts


def decode_rate(path: Path, tokens: int = 48, ahead: int = 8) -> float:
    """Tokens a second, one after the other, after some that are not counted."""
    with open_model(path, EngineOptions(context_tokens=256, threads=RATE_THREADS)) as engine:
        sequence, token, begun = engine.start(), 1, 0.0
        for step in range(tokens + ahead):
            if step == ahead:
                begun = time.perf_counter()
            token = int(engine.step([Entry(sequence, token)]).logits[0].argmax())
        return tokens / (time.perf_counter() - begun)


def rate_ratios(ours: Path, peers: Sequence[Path], turns: int) -> list[tuple[float, float, float]]:
    """Our decode rate to each peer's: median and interval of the ratios within a turn."""
    found: list[list[float]] = []
    for turn in range(turns):
        # who goes first alternates, so that a slow drift of the machine favours neither
        order = list(dict.fromkeys((ours, *peers)))[:: -1 if turn % 2 else 1]
        rates = {path: decode_rate(path) for path in order}
        found.append([rates[ours] / rates[peer] for peer in peers])
    return [median_interval(ratios) for ratios in zip(*found, strict=True)]


def measure(
    source: Source,
    laws: dict[str, Reference],
    scratch: Path,
    *,
    overrides: Overrides,
    presets: Sequence[str] = PRESETS,
    sizes: Sequence[str] = SIZES,
    rate_turns: int = 0,
) -> Part:
    """Write every preset and our file of the bytes of `sizes` into `scratch`, and judge all; decode rates in so many
    turns."""
    costs = measure_weight_costs(RATE_THREADS) if rate_turns else {}
    print(f"gguf: a weight takes, of Q8_0's time, {costs or 'its bytes'}", file=sys.stderr, flush=True)
    gguf = Gguf(source, overrides, costs, scratch)
    part = Part()
    uniform = {name + PURE: gguf.theirs(name + PURE)[0] for name in UNIFORM} if rate_turns else {}
    seen: set[tuple[str, ...]] = set()
    lacking: list[str] = []
    for preset in dict.fromkeys((*sizes, *presets)):
        path, seconds = uniform.get(preset), 0.0
        if path is None:
            path, seconds = gguf.theirs(preset)
        nbytes = path.stat().st_size
        if (types := tuple(tensor.type for tensor in read_header(path).tensors)) in seen:
            continue  # another name of the same file
        seen.add(types)
        facts: dict[str, Any] = {"bits_per_weight": 8 * nbytes / gguf.weights, "rounding_s": seconds}
        theirs = Row("gguf", preset, False, nbytes, judge("llama_cpp", path, laws), facts)
        part.rows.append(theirs)
        if preset not in sizes:
            print(f"gguf {preset}: {', '.join(map(str, theirs.loss.values()))}", file=sys.stderr, flush=True)
            continue
        try:
            written, seconds, stage_facts = gguf.ours(preset, nbytes)
        except InputError as error:
            print(f"{preset}: no file of ours, {error.wanted}, found {error.found}", file=sys.stderr)
            lacking.append(preset)
            continue
        size = written.stat().st_size
        facts = {"bits_per_weight": 8 * size / gguf.weights, "rounding_s": seconds, **_kept(stage_facts)}
        facts |= {"weight_costs": costs} if costs else {}
        ours = Row("gguf", f"ours-{preset}", True, size, judge("llama_cpp", written, laws), facts)
        part.rows.append(ours)
        facts = _rates(written, preset, path, uniform, rate_turns) if rate_turns else {}
        part.pairs.append(beside(ours, theirs, **facts))
        told = ", ".join(f"{domain} {theirs.loss[domain]} ours {ours.loss[domain]}" for domain in laws)
        print(f"gguf {preset}: {told}", file=sys.stderr, flush=True)
    part.rows.sort(key=lambda row: row.nbytes)
    part.pairs[:] = [_best_up_to(pair, part.rows) for pair in part.pairs]
    part.goals.extend(_goals(part, list(laws), lacking))
    return part


def _kept(facts: dict[str, Any]) -> dict[str, Any]:
    return {name: facts[name] for name in ("predicted_divergence_nats", "types") if name in facts}


def _rates(ours: Path, preset: str, theirs: Path, uniform: dict[str, Path], turns: int) -> dict[str, Any]:
    """Our rate to the preset's and to those of the largest uniform types in no more bytes, and how large these are."""
    budget = theirs.stat().st_size
    sizes = {name: size for name, path in uniform.items() if (size := path.stat().st_size) <= budget}
    largest = max(sizes.values(), default=0)
    near = [name for name, size in sizes.items() if size >= (1 - SAME) * largest]
    peers = {preset: theirs} | {name: uniform[name] for name in near}
    rates = dict(zip(peers, rate_ratios(ours, list(peers.values()), turns), strict=True))
    return {"rates": rates, "uniform": near, "uniform_bytes": largest / budget}


def _best_up_to(pair: Pair, rows: Sequence[Row]) -> Pair:
    """The pair with its losses against the best preset of no more bytes: a larger one is sometimes worse."""
    peer = next(row for row in rows if row.name == pair.peer)
    ours = next(row for row in rows if row.name == pair.ours)
    below = [row for row in rows if not row.ours and row.nbytes <= peer.nbytes]
    loss = {domain: found.nats / min(row.loss[domain].nats for row in below) for domain, found in ours.loss.items()}
    return Pair(pair.part, pair.ours, pair.peer, pair.nbytes, loss, pair.facts)


def _goals(part: Part, domains: Sequence[str], lacking: Sequence[str]) -> list[Goal]:
    goals = []
    bits = {row.name: row.facts["bits_per_weight"] for row in part.rows}
    inside = [pair for pair in part.pairs if LEAST <= bits[pair.peer] <= MOST]
    beyond = [pair for pair in part.pairs if pair not in inside]
    for domain in domains:
        ratios = [pair.loss[domain] for pair in inside]
        if ratios:
            mean = math.exp(statistics.fmean(map(math.log, ratios)))
            text = f"{domain}: geometric mean of KLD to the best preset of no more bytes <= 0.45, six sizes or more"
            enough = len(ratios) >= 6
            found = f"{mean:.3f} over {len(ratios)} sizes of {LEAST} to {MOST} bits"
            goals.append(Goal("gguf", text, found, mean <= 0.45 if enough else None))
            worst = max(inside, key=lambda pair: pair.loss[domain])
            found = f"{worst.loss[domain]:.3f} at {worst.peer}" + "".join(
                f"; of other bits {pair.loss[domain]:.3f} at {pair.peer}" for pair in beyond
            )
            met = worst.loss[domain] <= 0.8 and not lacking
            goals.append(Goal("gguf", f"{domain}: KLD <= 0.8 of it at every one of these sizes", found, met))
    if part.pairs:
        slack = [1 - pair.nbytes for pair in part.pairs]
        found = f"{min(slack):.3%} to {max(slack):.3%} below"
        met = min(slack) >= 0 and max(slack) <= 0.005
        goals.append(Goal("gguf", "bytes within 0.5% below the budget, never above", found, met))
    rates = {
        f"{pair.ours} to {name}": pair.facts["rates"][name]
        for pair in part.pairs
        if pair.facts.get("uniform_bytes", 0) >= 1 - SAME
        for name in pair.facts["uniform"]
    }
    if rates:
        slowest = min(rates, key=lambda name: rates[name][0])
        ratio, low, high = rates[slowest]
        found = f"{ratio:.3f} [{low:.3f}, {high:.3f}], {slowest}, the least of {len(rates)}"
        goals.append(Goal("gguf", "decode rate >= 0.97 of the uniform type of the same size", found, ratio >= 0.97))
    return goals
