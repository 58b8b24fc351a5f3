"""What `build`, `plan` and `train` share: their arguments, and the plans they lead to."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, TypeVar

import click

from edgekit.adapter import resolve_adapter
from edgekit.commands._paths import GivenPath
from edgekit.companion import check_tasks, resolve_verifier
from edgekit.errors import InputError
from edgekit.model import BUILTIN, resolve_model
from edgekit.plan import Plan, make_plan
from edgekit.recipe import Recipe, find_recipe, parse_overrides
from edgekit.support import refusal
from edgekit.target import Target, all_targets, find_target

F = TypeVar("F", bound=Callable[..., Any])

_MODEL = [
    click.argument("model", required=False),
    click.option(
        "--target", "-t", "targets", multiple=True, required=True, help="Target, alias or file; repeats; `all`."
    ),
    click.option("--recipe", "-r", help="Recipe name or file.  [default: the target's own]"),
    click.option("--set", "settings", multiple=True, metavar="STAGE.PARAM=VALUE", help="Change a parameter; repeats."),
    click.option(
        "--context", "context_tokens", type=click.IntRange(min=1), help="Context tokens.  [default: the target's]"
    ),
    click.option("--kv-type", help="Type of the KV cache, e.g. f16, q8_0, q4_0.  [default: the engine's]"),
    click.option(
        "--adapter",
        "adapters",
        multiple=True,
        metavar="DIR[=WEIGHT]",
        help="PEFT adapter to merge or to ship; repeats, in order.",
    ),
    click.option("--system", help="System prompt to ship, its KV cache computed (llama.cpp only)."),
    click.option("--json", "as_json", is_flag=True, help="Print one JSON document on stdout."),
]
_PAIR = [
    click.option("--verifier", type=GivenPath(), help="Verifier to ship with the model: `edgekit train verifier`."),
    click.option(
        "--task", "tasks", multiple=True, help="Task to choose a strategy by; repeats.  [default: the verifier's]"
    ),
]


def model_options(function: F) -> F:
    """Add the arguments that say which model is made for what."""
    for option in reversed(_MODEL):
        function = option(function)
    return function


def planning_options(function: F) -> F:
    """Add the arguments that `build` and `plan` share: the model, and what goes with it."""
    for option in reversed([*_MODEL, *_PAIR]):
        function = option(function)
    return function


def make_plans(
    model: str | None,
    targets: tuple[str, ...],
    recipe: str | None,
    settings: tuple[str, ...],
    context_tokens: int | None,
    kv_type: str | None,
    adapters: tuple[str, ...],
    system: str | None,
    verifier: Path | None = None,
    tasks: tuple[str, ...] = (),
) -> list[Plan]:
    """Resolve the arguments to one plan per target; every name is checked before the model is read."""
    overrides = parse_overrides(settings)
    if system is not None and not system.strip():
        raise InputError("a system prompt", "an empty one", "leave --system out")
    if system is not None:
        overrides["prefix", "system"] = system
    chosen = _choose_targets(targets)
    found = [resolve_adapter(text) for text in adapters]
    companion = None if verifier is None else resolve_verifier(verifier)
    check_tasks(tasks)
    tasks = tasks or (companion.manifest.domains if companion else ())
    recipes = [
        find_recipe(
            target.default_recipe if recipe is None else recipe,
            overrides,
            found,
            companion=companion,
            tasks=tasks,
        )
        for target in chosen
    ]
    if len(refused := _refusals(chosen, recipes)) > 1:
        advice = "leave them out, or see edgekit recipes list"
        raise InputError("a recipe that runs on every target", "; ".join(refused), advice)
    if model is None:
        click.echo(f"no MODEL given: using {BUILTIN}", err=True)
    source = resolve_model(BUILTIN if model is None else model)
    return [
        make_plan(
            source,
            resolved,
            target,
            context_tokens=context_tokens,
            kv_type=kv_type,
            adapters=found,
            companion=companion,
        )
        for target, resolved in zip(chosen, recipes, strict=True)
    ]


def _refusals(targets: Sequence[Target], recipes: Sequence[Recipe]) -> list[str]:
    """The targets that do not run their recipe, and why."""
    pairs = zip(targets, recipes, strict=True)
    return [f"{target.name}: {why}" for target, recipe in pairs if (why := refusal(recipe, target))]


def _choose_targets(names: tuple[str, ...]) -> list[Target]:
    chosen: dict[str, Target] = {}
    for name in names:
        for target in all_targets() if name == "all" else [find_target(name)]:
            chosen[target.name] = target
    return list(chosen.values())
