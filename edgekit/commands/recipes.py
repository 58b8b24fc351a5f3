"""`edgekit recipes`."""

from __future__ import annotations

import json

import click
from rich.console import Console
from rich.table import Table

from edgekit.recipe import find_recipe, recipe_names
from edgekit.target import all_targets


@click.group(name="recipes", short_help="List and show recipes.")
def command() -> None:
    """List and show recipes: the ordered stages that make an artifact, with their gates."""


@command.command(name="list")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON document on stdout.")
def list_(as_json: bool) -> None:
    """List the recipes, their engines, and the targets that choose them by default."""
    recipes = [find_recipe(name) for name in recipe_names()]
    users = {r.name: [t.name for t in all_targets() if t.default_recipe == r.name] for r in recipes}
    if as_json:
        click.echo(json.dumps([{**r.describe(), "default_of": users[r.name]} for r in recipes], indent=2))
        return
    table = Table(box=None, padding=(0, 2, 0, 0))
    for title in ("recipe", "engine", "what", "default of"):
        table.add_column(title, overflow="fold")
    for r in recipes:
        table.add_row(r.name, r.engine, r.description, str(len(users[r.name])) + " targets")
    Console().print(table)


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
