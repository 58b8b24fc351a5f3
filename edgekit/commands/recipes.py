"""`edgekit recipes`."""

from __future__ import annotations

import json

import click
from rich.console import Console
from rich.padding import Padding
from rich.text import Text

from edgekit.recipe import find_recipe, recipe_names
from edgekit.support import Support, result_format, support_table


@click.group(name="recipes", short_help="List and show recipes.")
def command() -> None:
    """List and show recipes: the ordered stages that make an artifact, with their gates."""


@command.command(name="list")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON document on stdout.")
def list_(as_json: bool) -> None:
    """List the recipes: format, engine, and the targets that run the result, choose it, or refuse it and why."""
    recipes = [find_recipe(name) for name in recipe_names()]
    cells: dict[str, list[Support]] = {}
    for cell in support_table():
        cells.setdefault(cell.recipe, []).append(cell)
    if as_json:
        documents = [
            {
                **r.describe(),
                "format": result_format(r),
                "default_of": [cell.target for cell in cells[r.name] if cell.default],
                "runs_on": [cell.target for cell in cells[r.name] if cell.refused is None],
                "refused_on": {cell.target: cell.refused for cell in cells[r.name] if cell.refused is not None},
            }
            for r in recipes
        ]
        click.echo(json.dumps(documents, indent=2))
        return
    console = Console(highlight=False, markup=False)
    reasons: dict[str, list[str]] = {}
    for r in recipes:
        runs = [cell for cell in cells[r.name] if cell.refused is None]
        chosen = sum(cell.default for cell in runs)
        console.print(r.name, style="bold")
        console.print(Padding(r.description, (0, 0, 0, 4)))
        fit = f"{result_format(r)} for {r.engine}; runs on {len(runs)} targets, default of {chosen}"
        console.print(Padding(Text(fit), (0, 0, 0, 4)))
        for cell in cells[r.name]:
            if cell.refused is not None:
                reasons.setdefault(cell.refused, []).append(cell.target)
    for reason, refused in reasons.items():
        console.print(f"\nrefused on {', '.join(dict.fromkeys(refused))}: {reason}")


@command.command(name="show")
@click.argument("name")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON document on stdout.")
def show(name: str, as_json: bool) -> None:
    """Show a recipe with every parameter filled in."""
    recipe = find_recipe(name)
    if as_json:
        click.echo(json.dumps(recipe.describe(), indent=2))
        return
    console = Console(highlight=False)
    console.print(f"[bold]{recipe.name}[/]: {recipe.description}\n")
    for stage, params in recipe.stages:
        console.print(f"[bold]{stage.name}[/]  {stage.summary}")
        for field, value in params.model_dump(mode="json").items():
            meaning = type(params).model_fields[field].description or ""
            console.print(f"    {field}: {json.dumps(value)}  [dim]{meaning}[/]")
    text = recipe.evaluation
    console.print(f"\nevaluated on {text.windows} x {text.window_tokens} tokens of {text.text}")
    for gate in recipe.gates:
        console.print(f"gate: {json.dumps(gate.model_dump(exclude_none=True))}")
