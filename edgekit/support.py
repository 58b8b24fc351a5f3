"""Which recipe's result runs on which target, and why not: the table in the docs and in `edgekit recipes list`."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from edgekit.engines import find_engine
from edgekit.recipe import Recipe, find_recipe, recipe_names
from edgekit.target import Target, all_targets


@dataclass(frozen=True)
class Support:
    """One cell of the table."""

    recipe: str
    format: str
    """Kind of artifact that the engine opens, e.g. `gguf` or `checkpoint[gptq]`."""
    engine: str
    target: str
    default: bool
    """Whether the target chooses this recipe."""
    refused: str | None
    """Why it does not run there; None where it does."""


def refusal(recipe: Recipe, target: Target) -> str | None:
    """Why a recipe's result does not run on a target, or None. The planner refuses a build for the same reason."""
    if recipe.engine not in target.engines:
        return f"{recipe.engine} needs {find_engine(recipe.engine).NEEDS}"
    reasons = (stage.refuses(params, target) for stage, params in recipe.stages)
    return next(filter(None, reasons), None)


def result_format(recipe: Recipe) -> str:
    """Kind of the artifact that a recipe ships."""
    runs = find_engine(recipe.engine).RUNS
    return next((stage.gives for stage, _ in reversed(recipe.stages) if stage.gives in runs), "none")


def support_table(targets: Sequence[Target] | None = None) -> list[Support]:
    """Every recipe of the catalog on every target, in the order of the catalog."""
    rows = []
    for recipe in map(find_recipe, recipe_names()):
        shipped = result_format(recipe)
        for target in all_targets() if targets is None else targets:
            default = target.default_recipe == recipe.name
            refused = refusal(recipe, target)
            rows.append(Support(recipe.name, shipped, recipe.engine, target.name, default, refused))
    return rows


def support_markdown() -> str:
    """The table in Markdown: a row per target, a column per recipe, and the reasons of what is refused below."""
    rows = support_table()
    recipes = list(dict.fromkeys(row.recipe for row in rows))
    cells = {(row.target, row.recipe): row for row in rows}
    kinds = {row.recipe: f"{row.format}<br>{row.engine}" for row in rows}
    reasons = list(dict.fromkeys(row.refused for row in rows if row.refused))
    lines = [
        "| target | " + " | ".join(f"`{name}`<br>{kinds[name]}" for name in recipes) + " |",
        "| --- |" + " :-: |" * len(recipes),
    ]
    for target in dict.fromkeys(row.target for row in rows):
        marks = [_mark(cells[target, name], reasons) for name in recipes]
        lines.append(f"| `{target}` | " + " | ".join(marks) + " |")
    lines += ["", "**default**: what the target chooses; yes: it runs there; a number: refused, because", ""]
    return "\n".join([*lines, *(f"{number}. {reason}" for number, reason in enumerate(reasons, 1))])


def _mark(cell: Support, reasons: Sequence[str]) -> str:
    if cell.refused is not None:
        return f"({reasons.index(cell.refused) + 1})"
    return "**default**" if cell.default else "yes"
