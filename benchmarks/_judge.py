"""What a comparison finds: files with their losses on held-out text, pairs of them, and goals."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from edgekit.artifact import Artifact, seal
from edgekit.build import BuildEvents, Built, build
from edgekit.engine import EngineOptions
from edgekit.engines import find_engine
from edgekit.huggingface import open_checkpoint, text_windows
from edgekit.measure.divergence import Reference, compare, open_reference, write_reference
from edgekit.model import Source
from edgekit.plan import Plan, make_plan
from edgekit.recipe import Overrides, find_recipe
from edgekit.stage import StageContext, find_stage
from edgekit.store import Store
from edgekit.target import find_target

RECIPES = {"gguf": ("gguf-best",), "gptq": ("gptq-4bit",), "onnx": ("onnx-int4", "onnx-best")}
"""Ours, by the part of the frontier that they belong to."""
DOMAINS = {"prose": "python-docs", "code": "python-code"}
"""What is judged on; calibration text is the other split of the first."""
LENGTH = 512
"""Tokens of a held-out window; the second half is scored."""


@dataclass(frozen=True)
class Loss:
    """KL divergence to the source in nats, with its 95% interval over windows (None for one window)."""

    nats: float
    low: float | None
    high: float | None

    def __str__(self) -> str:
        return f"{self.nats:.4f}" + ("" if self.low is None else f" [{self.low:.4f}, {self.high:.4f}]")


@dataclass(frozen=True)
class Row:
    """A file that was written and judged."""

    part: str
    name: str
    ours: bool
    nbytes: int
    loss: dict[str, Loss]
    """By domain."""
    facts: dict[str, Any] = field(default_factory=dict)
    """Whatever else was measured: names end in their units."""


@dataclass(frozen=True)
class Pair:
    """A file of ours beside a peer's; ratios are ours to theirs."""

    part: str
    ours: str
    peer: str
    nbytes: float
    loss: dict[str, float]
    """By domain."""
    facts: dict[str, Any] = field(default_factory=dict)
    """Further ratios: `rounding_s`, `process_s`, `rate` as (median, low, high)."""


@dataclass(frozen=True)
class Goal:
    """A bound and what was found; `met` is None where it could not be judged."""

    part: str
    text: str
    found: str
    met: bool | None


@dataclass(frozen=True)
class Part:
    """All that one part of a comparison found."""

    rows: list[Row] = field(default_factory=list)
    pairs: list[Pair] = field(default_factory=list)
    goals: list[Goal] = field(default_factory=list)


def beside(ours: Row, peer: Row, **facts: Any) -> Pair:
    """Pair two files."""
    loss = {domain: ours.loss[domain].nats / peer.loss[domain].nats for domain in ours.loss}
    return Pair(ours.part, ours.name, peer.name, ours.nbytes / peer.nbytes, loss, facts)


def overrides_of(recipe: str, overrides: Overrides) -> Overrides:
    """Those of stages that a recipe has."""
    known = {stage.name for stage, _ in find_recipe(recipe).stages} | {"evaluation"}
    return {(stage, name): value for (stage, name), value in overrides.items() if stage in known}


def made(
    source: Source, recipe: str, overrides: Overrides, store: Store, verified: dict[str, Artifact]
) -> tuple[Plan, Built]:
    """Build a recipe for x86 as `edgekit build` does."""
    plan = make_plan(source, find_recipe(recipe, overrides), find_target("generic-x86"))
    return plan, build(plan, store, BuildEvents(), verified)


def artifact_of(store: Store, built: Built, stage: str) -> Artifact:
    """The artifact that a stage of a build gave."""
    key = next(step.key for step in built.steps if step.stage == stage)
    found = store.find(key)
    assert found is not None
    return found


def checkpoint_of(source: Source, place: Path) -> Artifact:
    """The model as the stage `checkpoint` gives it, written into `place`, a new directory."""
    place.mkdir()
    stage = find_stage("checkpoint")
    facts = stage.run(source.artifact, place, stage.params(), StageContext(Store.default()))
    return seal(place, stage.gives, facts)


def references(checkpoint: Artifact, place: Path, windows: int) -> dict[str, Reference]:
    """The source model's laws on held-out prose and on code, kept in `place`."""
    import torch

    tokenizer, network = open_checkpoint(checkpoint)
    found = {}
    for domain, text in DOMAINS.items():
        tokens = text_windows(tokenizer, text, "evaluation", windows, LENGTH)

        def logits(index: int, tokens: Any = tokens) -> Any:
            with torch.inference_mode():
                row = torch.from_numpy(tokens[index].astype(np.int64))[None]
                return network(row, use_cache=False).logits[0].float().numpy()

        (place / domain).mkdir()
        write_reference(place / domain, tokens, logits)
        found[domain] = open_reference(place / domain)
    return found


def judge(engine_name: str, path: Path, laws: Mapping[str, Reference]) -> dict[str, Loss]:
    """What an engine loses with a file, by domain."""
    length = max(law.window_tokens for law in laws.values())
    options = EngineOptions(context_tokens=length, batch_tokens=length)
    found: dict[str, Loss] = {}
    with find_engine(engine_name).open_model(path, options) as engine:
        for domain, law in laws.items():
            figure = next(m for m in compare(engine, law).measurements() if m.name == "kl_divergence_nats")
            found[domain] = Loss(figure.value, figure.ci_low, figure.ci_high)
    return found
