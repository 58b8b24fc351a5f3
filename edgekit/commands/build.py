"""`edgekit build`."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import click

from edgekit.artifact import Artifact
from edgekit.bundle import check_place
from edgekit.commands import plan as plan_command
from edgekit.commands._options import make_plans, planning_options
from edgekit.commands._paths import GivenPath
from edgekit.commands._progress import ProgressDisplay
from edgekit.deliver import Delivered, deliver
from edgekit.devices import open_device
from edgekit.errors import GateFailed
from edgekit.plan import Plan, check_fit, check_host
from edgekit.report.terminal import show
from edgekit.store import Store


@click.command(name="build", short_help="Make a bundle for one or more targets.")
@planning_options
@click.option("--out", "-o", type=GivenPath(), default=Path("dist"), show_default=True, help="Output.")
@click.option(
    "--device", "device_url", default="local", show_default=True, help="Where to measure: local, ssh://user@host."
)
@click.option("--dry-run", is_flag=True, help="Only plan, like `edgekit plan`.")
@click.pass_context
def command(ctx: click.Context, /, as_json: bool, out: Path, device_url: str, dry_run: bool, **arguments: Any) -> None:
    """Make a bundle for one or more targets.

    MODEL is a Hugging Face directory, a .gguf file, a hub id (org/name[@revision]) or
    builtin:smollm2-135m, the default. Finished steps are kept and shared between targets; an interrupted build
    goes on where it stopped.

    Exit codes: 0 done, 2 wrong input, 3 a gate failed, 4 does not fit, 5 a tool or device failed.
    """
    if dry_run:
        ctx.invoke(plan_command.command, as_json=as_json, **arguments)
        return
    device = open_device(device_url)
    plans = make_plans(**arguments)
    for plan in plans:
        check_fit(plan)
        check_host(plan)
    for plan in plans:
        check_place(out / plan.target.name)
    store = Store.default()
    delivered = []
    verified: dict[str, Artifact] = {}
    with ProgressDisplay() as display:
        for plan in plans:
            display.console.print(f"{plan.target.name}: {plan.recipe.name}")
            delivered.append((plan, deliver(plan, store, out, device, display, verified)))
    if as_json:
        click.echo(json.dumps({"targets": [_describe(plan, result) for plan, result in delivered]}, indent=2))
    else:
        for _, result in delivered:
            show(result.report, display.console)
            click.echo(f"bundle: {result.bundle.path}")
            click.echo(f"report: {result.bundle.path / 'report.html'}")
    failed = [
        f"{plan.target.name}: {gate.of}: {gate.bound}, found {gate.value:g}"
        for plan, result in delivered
        for gate in result.report.gates
        if not gate.passed
    ]
    if failed:
        advice = "open the report, or choose another recipe"
        raise GateFailed("every gate of the recipe kept", "; ".join(failed), advice, documented=True)


def _describe(plan: Plan, result: Delivered) -> dict[str, Any]:
    report = result.report
    return {
        "target": plan.target.name,
        "recipe": plan.recipe.name,
        "bundle": str(result.bundle.path),
        "digest": result.bundle.manifest.digest,
        "report": str(result.bundle.path / "report.json"),
        "passed": report.passed,
        "device": report.device.model_dump(mode="json") if report.device else None,
        "steps": [step.model_dump(mode="json") for step in report.steps],
        "measurements": [m.model_dump(mode="json") for m in report.measurements],
        "gates": [gate.model_dump(mode="json") for gate in report.gates],
    }
