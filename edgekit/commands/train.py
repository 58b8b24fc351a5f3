"""`edgekit train`."""

from __future__ import annotations

import json
import os
import shutil
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from edgekit.adapter import CONFIG, WEIGHTS
from edgekit.artifact import relative_files
from edgekit.build import Built, build
from edgekit.bundle import swap
from edgekit.commands._options import make_plans, model_options
from edgekit.commands._paths import GivenPath
from edgekit.commands._progress import ProgressDisplay
from edgekit.companion import check_engine
from edgekit.decode import Options, Sampling
from edgekit.engine import Engine, EngineOptions
from edgekit.engines import find_engine
from edgekit.errors import InputError
from edgekit.plan import Plan, check_host
from edgekit.store import Store, explain_disk, require_writable
from edgekit.tasks import Split, Task, find_task
from edgekit.tools import require
from edgekit.verifier import (
    ADAPTER_DIRECTORY,
    MANIFEST,
    MODEL_DIRECTORY,
    Attention,
    Linear,
    Mlp,
    Training,
    Trunk,
    VerifierManifest,
    save_verifier,
)

if TYPE_CHECKING:
    from edgekit.companions.verifier import Labelled, Trained

_SHAPES = {"attention": Attention, "mlp": Mlp, "linear": Linear}


@click.group(name="train", short_help="Train a companion for a model: a verifier.")
def command() -> None:
    """Train a companion for a model."""


@command.command()
@model_options
@click.option("--task", "tasks", multiple=True, required=True, help="Task to learn from, e.g. arithmetic; repeats.")
@click.option("--out", "-o", type=GivenPath(), required=True, help="Directory of the verifier.")
@click.option(
    "--kind",
    type=click.Choice(["head", "adapter", "model"]),
    default="head",
    show_default=True,
    help="A head on the model's states, on those of a LoRA of it, or a reward model.",
)
@click.option("--architecture", type=click.Choice(list(_SHAPES)), help="Of the kind head.  [default: attention]")
@click.option(
    "--reward-model",
    type=GivenPath(),
    help="For the kind model: a sequence or token classifier, in a Hugging Face directory.",
)
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
    kind: str,
    architecture: str | None,
    reward_model: Path | None,
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
    A reward model is not trained: only its calibration is learned.
    """
    if (kind == "model") != (reward_model is not None):
        given = "--kind model without one" if reward_model is None else f"--reward-model with the kind {kind}"
        raise InputError("--kind model with --reward-model DIR", given, "give both, or neither")
    if architecture is not None and kind != "head":
        raise InputError("--architecture with the kind head", f"the kind {kind}, whose head is linear", "leave it out")
    plans = make_plans(**arguments)
    if len(plans) > 1:
        raise InputError("one target", f"{len(plans)}", "train a verifier for each")
    (plan,) = plans
    check_engine(kind, plan.recipe.engine)
    found = [find_task(name) for name in tasks]
    require("torch")
    if reward_model is not None:
        from edgekit.companions.verifier import check_reward_model

        check_reward_model(reward_model)
    check_host(plan)
    _check_place(out)
    options = Options(sampling=Sampling(temperature, top_p=top_p), seed=seed)
    run = _Run(plan, found, kind, architecture or "attention", reward_model, samples, seed, options, threads)
    with ProgressDisplay() as display:
        manifest = run.train(out, problems, heldout, display)
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
    kind: str
    architecture: str
    reward_model: Path | None
    samples: int
    seed: int
    options: Options
    threads: int | None

    def train(self, out: Path, problems: int, heldout: int, display: ProgressDisplay) -> VerifierManifest:
        """Build the model, roll out, train, save."""
        started = time.monotonic()
        version = find_engine(self.plan.recipe.engine).build_info()["version"]
        store = Store.default()
        train: list[Labelled] = []
        forward = 0
        with store.shared():
            built = build(self.plan, store, display)
            learns = self.kind != "model"
            steps = (1 + learns) * len(self.tasks) + 1
            with self._open(built) as engine:
                if learns:
                    train, forward = self._collect(engine, built, "train", problems, display, 1, steps)
                first = steps - len(self.tasks)
                judge, more = self._collect(engine, built, "validation", heldout, display, first, steps)
        work = out.with_name(f".{out.name}.part-{os.getpid()}")
        with explain_disk(out.parent):
            try:
                display.started("train", steps, steps)
                begun = time.monotonic()
                work.mkdir(parents=True)
                trained, files, reads_text = self._learn(train, judge, built, work, display)
                display.finished("train", "executed", time.monotonic() - begun)
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
                    kind=self.kind,  # type: ignore[arg-type]
                    reads_text=reads_text,
                    files=files,
                )
                swap(work, out)
            finally:
                shutil.rmtree(work, ignore_errors=True)
        return manifest

    def _learn(
        self, train: list[Labelled], judge: list[Labelled], built: Built, work: Path, display: ProgressDisplay
    ) -> tuple[Trained, list[str], bool]:
        """The head, the files of its trunk in `work`, and whether that reads text."""
        from edgekit.companions.verifier import judge_model, train_adapter, train_head

        def progress(done: int, total: int) -> None:
            display.progressed(done, total, "epochs")

        common: dict[str, Any] = {"seed": self.seed, "threads": self.threads or EngineOptions().cpu_threads}
        if self.kind == "head":
            architecture = _SHAPES[self.architecture]()
            return train_head(train, judge, architecture=architecture, progress=progress, **common), [], False
        known = [[item.prefixes for item in items] for items in (train, judge)]
        checkpoint = built.checkpoint.path
        if self.kind == "adapter":
            trained = train_adapter(checkpoint, work / ADAPTER_DIRECTORY, *known, progress=progress, **common)
            return trained, [f"{ADAPTER_DIRECTORY}/{name}" for name in (CONFIG, WEIGHTS)], False
        assert self.reward_model is not None
        trained, reads_text = judge_model(
            self.reward_model, work / MODEL_DIRECTORY, known[1], checkpoint, threads=common["threads"]
        )
        return (
            trained,
            sorted(f"{MODEL_DIRECTORY}/{name}" for name in relative_files(work / MODEL_DIRECTORY)),
            reads_text,
        )

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
    ) -> tuple[list[Labelled], int]:
        from edgekit.companions.rollouts import collect

        answers: list[Labelled] = []
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
