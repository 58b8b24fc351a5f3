"""What `build` and `plan` share: their arguments, and the plans they lead to."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

import click

from edgekit.model import BUILTIN, resolve_model
from edgekit.plan import Plan, make_plan
from edgekit.predict.memory import KV_TYPES
from edgekit.recipe import find_recipe, parse_overrides
from edgekit.target import Target, all_targets, find_target

F = TypeVar("F", bound=Callable[..., Any])

_OPTIONS = [
    click.argument("model", required=False),
    click.option(
        "--target", "-t", "targets", multiple=True, required=True, help="Target, alias or file; repeats; `all`."
    ),
    click.option("--recipe", "-r", help="Recipe name or file.  [default: the target's own]"),
    click.option("--set", "settings", multiple=True, metavar="STAGE.PARAM=VALUE", help="Change a parameter; repeats."),
    click.option(
        "--context", "context_tokens", type=click.IntRange(min=1), help="Context tokens.  [default: the target's]"
    ),
    click.option(
        "--kv-type", type=click.Choice(KV_TYPES), default="f16", show_default=True, help="Type of the KV cache."
    ),
    click.option("--json", "as_json", is_flag=True, help="Print one JSON document on stdout."),
]


def planning_options(function: F) -> F:
    """Add the arguments that `build` and `plan` share."""
    for option in reversed(_OPTIONS):
        function = option(function)
    return function


def make_plans(
    model: str | None,
    targets: tuple[str, ...],
    recipe: str | None,
    settings: tuple[str, ...],
    context_tokens: int | None,
    kv_type: str,
) -> list[Plan]:
    """Resolve the arguments to one plan per target; every name is checked before the model is read."""
    overrides = parse_overrides(settings)
    chosen = _choose_targets(targets)
    recipes = [find_recipe(target.default_recipe if recipe is None else recipe, overrides) for target in chosen]
    if model is None:
        click.echo(f"no MODEL given: using {BUILTIN}", err=True)
    source = resolve_model(BUILTIN if model is None else model)
    return [
        make_plan(source, found, target, context_tokens=context_tokens, kv_type=kv_type)
        for target, found in zip(chosen, recipes, strict=True)
    ]


def _choose_targets(names: tuple[str, ...]) -> list[Target]:
    chosen: dict[str, Target] = {}
    for name in names:
        for target in all_targets() if name == "all" else [find_target(name)]:
            chosen[target.name] = target
    return list(chosen.values())
