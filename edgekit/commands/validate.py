"""`edgekit validate`."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import click
from rich.console import Console
from rich.table import Table

from edgekit.answers import judge_answers, questions
from edgekit.bundle import open_bundle
from edgekit.commands._paths import GivenPath
from edgekit.commands._progress import ProgressDisplay
from edgekit.devices import Device, DivergenceJob, Job, LatencyJob, Measures, open_device
from edgekit.errors import GateFailed
from edgekit.gates import check_gates
from edgekit.measurement import Measurement
from edgekit.recipe import Gate
from edgekit.report.figures import shown
from edgekit.report.write import read_report
from edgekit.store import Store
from edgekit.tasks import Task, find_task


@click.command(name="validate", short_help="Check a bundle's files and measure it again.")
@click.argument("bundle", type=GivenPath())
@click.option("--task", "tasks", multiple=True, help="Task to answer as well, e.g. arithmetic; repeats.")
@click.option(
    "--problems", type=click.IntRange(min=2), default=100, show_default=True, help="Of each task's test split."
)
@click.option(
    "--device", "device_url", default="local", show_default=True, help="Where to measure: local, ssh://user@host."
)
@click.option("--json", "as_json", is_flag=True, help="Print one JSON document on stdout.")
def command(bundle: Path, tasks: tuple[str, ...], problems: int, device_url: str, as_json: bool) -> None:
    """Check a bundle's files and measure it again.

    Every file is compared with the manifest, then latency and memory are measured. Accuracy is measured, too, and
    the recipe's gates are checked, where the store still has the source model's log-probabilities. The problems of
    tasks are answered by the bundle's own strategy, and checked here.
    """
    asked = [find_task(name) for name in tasks]
    device = open_device(device_url)
    opened = open_bundle(bundle)
    opened.verify()
    settings = opened.settings
    reference = Store.default().find(
        next((step["key"] for step in opened.manifest.steps if step["stage"] == "reference"), "")
    )
    job = Job(
        engine=settings.engine,
        model=str(opened.model),
        options=settings.options(),
        measure=Measures(
            latency=LatencyJob(), divergence=DivergenceJob(reference=str(reference.path)) if reference else None
        ),
        needs_bytes=read_report(opened.path).needs_bytes,
    )
    with ProgressDisplay() as display:
        display.started("measure", 1, 1)
        result = device.run(job, progress=lambda name: display.progressed(0, None, name))
    measurements = [
        *result.measurements,
        *(m for task in asked for m in _answer(task, problems, opened.path, job, device)),
    ]
    gates = [gate for fields in opened.manifest.recipe["gates"] if (gate := Gate.model_validate(fields)).of == "bundle"]
    checked = check_gates(gates, result.measurements) if reference else ()
    document: dict[str, Any] = {
        "bundle": str(bundle),
        "files": len(opened.manifest.files) + len(opened.manifest.measurements),
        "device": result.device,
        "measurements": [m.model_dump(mode="json") for m in measurements],
        "gates": [gate.model_dump(mode="json") for gate in checked],
        "build": result.build,
        "samples": result.samples,
        "board": result.board.model_dump(mode="json") if result.board else None,
    }
    if as_json:
        click.echo(json.dumps(document, indent=2))
    else:
        console = Console(highlight=False)
        console.print(f"{document['files']} files are what the manifest says; measured on {result.device}")
        table = Table(box=None, padding=(0, 2, 0, 0), show_header=False)
        for measurement in measurements:
            table.add_row(measurement.name, shown(measurement).text, measurement.note or "")
        console.print(table)
        for flag in result.board.flags if result.board else ():
            console.print(f"note: {flag}", markup=False)
        for outcome in checked:
            word, sure = "passed" if outcome.passed else "FAILED", "" if outcome.certain else " (uncertain)"
            console.print(f"gate {word}: {outcome.bound}, found {outcome.value:g}{sure}")
        if not reference:
            console.print("accuracy: not measured, the store no longer has the source model's log-probabilities")
            console.print(f"gates: {len(gates)} not checked, for they need accuracy")
    failed = [f"{gate.bound}, found {gate.value:g}" for gate in checked if not gate.passed]
    if failed:
        raise GateFailed("every gate of the recipe kept", "; ".join(failed), "open the report", documented=True)


def _answer(task: Task, count: int, bundle: Path, job: Job, device: Device) -> list[Measurement]:
    problems = task.problems("test", count)
    with ProgressDisplay() as display:
        display.started(task.name, 1, 1)
        answered = 0

        def progress(name: str) -> None:
            nonlocal answered
            answered += name == "answer"
            display.progressed(answered, len(problems), "problems")

        asking = job.model_copy(update={"measure": Measures(answers=questions(task, problems, bundle))})
        result = device.run(asking, progress=progress)
    return judge_answers(task, problems, result.answers, result.device)
