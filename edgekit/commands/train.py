"""`edgekit train`."""

from __future__ import annotations

import json
import os
import shutil
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import click

from edgekit.build import Built, build
from edgekit.bundle import swap
from edgekit.commands._options import make_plans, model_options
from edgekit.commands._paths import GivenPath
from edgekit.commands._progress import ProgressDisplay
from edgekit.decode import Options, Sampling
from edgekit.engine import Engine, EngineOptions
from edgekit.engines import find_engine
from edgekit.errors import InputError
from edgekit.plan import Plan, check_host
from edgekit.store import Store, explain_disk, require_writable
from edgekit.tasks import Split, Task, find_task
from edgekit.tools import require
from edgekit.verifier import MANIFEST, Attention, Linear, Mlp, Training, Trunk, VerifierManifest, save_verifier

_SHAPES = {"attention": Attention, "mlp": Mlp, "linear": Linear}


@click.group(name="train", short_help="Train a companion for a model: a verifier.")
def command() -> None:
    """Train a companion for a model."""


@command.command()
@model_options
@click.option("--task", "tasks", multiple=True, required=True, help="Task to learn from, e.g. arithmetic; repeats.")
@click.option("--out", "-o", type=GivenPath(), required=True, help="Directory of the verifier.")
@click.option("--architecture", type=click.Choice(list(_SHAPES)), default="attention", show_default=True, help="Head.")
@click.option("--problems", type=click.IntRange(min=4), default=600, show_default=True, help="To train on, a task.")
@click.option("--heldout", type=click.IntRange(min=4), default=150, show_default=True, help="To judge by, a task.")
@click.option("--samples", type=click.IntRange(2, 64), default=8, show_default=True, help="Answers to each problem.")
@click.option("--temperature", type=click.FloatRange(0, min_open=True), default=0.7, show_default=True, help="Theirs.")
@click.option("--top-p", type=click.FloatRange(0, 1, min_open=True), default=0.95, show_default=True, help="Theirs.")
@click.option("--seed", type=click.IntRange(min=0), default=0, show_default=True, help="Of everything drawn.")
@click.option("--threads", type=click.IntRange(min=1), help="CPU threads.  [default: the physical cores]")
def verifier(
    tasks: tuple[str, ...],
    out: Path,
    architecture: str,
    problems: int,
    heldout: int,
    samples: int,
    temperature: float,
    top_p: float,
    seed: int,
    threads: int | None,
    as_json: bool,
    **arguments: Any,
) -> None:
    """Train a verifier for MODEL as it is quantized for the target.

    The model answers the problems of the tasks; each answer is checked, and a small head learns from the model's own
    hidden states how likely a partial answer ends right. It is judged and calibrated on problems it has not seen.
    """
    plans = make_plans(**arguments)
    if len(plans) > 1:
        raise InputError("one target", f"{len(plans)}", "train a verifier for each")
    (plan,) = plans
    found = [find_task(name) for name in tasks]
    require("torch")
    check_host(plan)
    _check_place(out)
    run = _Run(plan, found, samples, seed, Options(sampling=Sampling(temperature, top_p=top_p), seed=seed), threads)
    with ProgressDisplay() as display:
        manifest = run.train(out, architecture, problems, heldout, display)
    if as_json:
        click.echo(json.dumps({"verifier": str(out), **manifest.model_dump(mode="json", exclude={"files"})}, indent=2))
        return
    for name, metric in manifest.metrics.items():
        click.echo(f"{name:<12} {metric.value:.3f} [{metric.ci_low:.3f}, {metric.ci_high:.3f}]  held out")
    click.echo(f"verifier: {out} ({sum(file.bytes for file in manifest.files.values()) / 1024:.0f} KiB)")
    click.echo(f"next: edgekit build ... --verifier {out}")


@dataclass(frozen=True)
class _Run:
    plan: Plan
    tasks: Sequence[Task]
    samples: int
    seed: int
    options: Options
    threads: int | None

    def train(
        self, out: Path, architecture: str, problems: int, heldout: int, display: ProgressDisplay
    ) -> VerifierManifest:
        """Build the model, roll out, train, save."""
        from edgekit.companions.verifier import train_head

        started = time.monotonic()
        version = find_engine(self.plan.recipe.engine).build_info()["version"]
        store = Store.default()
        with store.shared():
            built = build(self.plan, store, display)
            steps = 2 * len(self.tasks) + 1
            with self._open(built) as engine:
                train, forward = self._collect(engine, built, "train", problems, display, 1, steps)
                judge, more = self._collect(engine, built, "validation", heldout, display, 1 + len(self.tasks), steps)
        display.started("train", steps, steps)
        begun = time.monotonic()
        trained = train_head(
            train,
            judge,
            architecture=_SHAPES[architecture](),
            seed=self.seed,
            threads=self.threads or EngineOptions().cpu_threads,
            progress=lambda done, total: display.progressed(done, total, "epochs"),
        )
        display.finished("train", "executed", time.monotonic() - begun)
        work = out.with_name(f".{out.name}.part-{os.getpid()}")
        with explain_disk(out.parent):
            try:
                manifest = save_verifier(
                    work,
                    trained.head,
                    trunk=Trunk(
                        source_digest=self.plan.base_digest,
                        model_digest=built.result.digest,
                        name=str(built.checkpoint.facts["name"]),
                        engine=self.plan.recipe.engine,
                    ),
                    domains=[task.name for task in self.tasks],
                    training=Training(
                        problems=len({item.prefixes.problem for item in train}),
                        rollouts=len(train),
                        prefixes=sum(len(item.prefixes.positions) for item in train),
                        tokens_forward=forward + more,
                        seconds=time.monotonic() - started,
                        engine=f"{self.plan.recipe.engine} {version}",
                        seed=self.seed,
                    ),
                    metrics=trained.metrics,
                    heldout=[item.prefixes for item in judge],
                )
                swap(work, out)
            finally:
                shutil.rmtree(work, ignore_errors=True)
        return manifest

    def _open(self, built: Built) -> Engine:
        context = min(self.plan.context_tokens, 2048)
        options = EngineOptions(
            context_tokens=context,
            sequences=self.samples,
            total_tokens=2 * context,
            threads=self.threads,
            kv_type=self.plan.kv_type,
            fall_back=True,
        )
        return find_engine(self.plan.recipe.engine).open_model(built.result.model_path, options)

    def _collect(
        self, engine: Engine, built: Built, split: Split, count: int, display: ProgressDisplay, first: int, steps: int
    ) -> tuple[list[Any], int]:
        from edgekit.companions.rollouts import collect

        answers: list[Any] = []
        forward = 0
        for position, task in enumerate(self.tasks, first):
            label = f"{task.name} {split}"
            display.started(label, position, steps)
            started = time.monotonic()
            rollouts = collect(
                engine,
                task,
                task.problems(split, count, self.seed),
                built.checkpoint.path,
                samples=self.samples,
                options=self.options,
                progress=lambda done, total: display.progressed(done, total, "problems"),
            )
            display.finished(label, "executed", time.monotonic() - started)
            display.noted(f"{rollouts.right:.1%} of {len(rollouts.answers)} answers right")
            answers += rollouts.answers
            forward += rollouts.tokens_forward
        return answers, forward


def _check_place(out: Path) -> None:
    """Raise InputError when the place holds something that is not a verifier."""
    if out.exists() and not (out / MANIFEST).is_file() and any(out.iterdir() if out.is_dir() else [out]):
        found = "something else, which is left alone"
        raise InputError(f"a verifier or nothing at {out}", found, "choose another --out")
    require_writable(out.parent, "choose another --out")
