"""`edgekit plan`."""

from __future__ import annotations

import json
from typing import Any

import click
from rich.console import Console
from rich.table import Table

from edgekit.commands._options import make_plans, planning_options
from edgekit.plan import Plan, cached_records, check_fit, check_host, what_fits
from edgekit.report.figures import number
from edgekit.store import Store


@click.command(name="plan", short_help="Show what a build would do and what it would need; writes nothing.")
@planning_options
def command(as_json: bool, **arguments: Any) -> None:
    """Show what a build would do and what it would need; writes nothing.

    Sizes are exact from tensor types; rates are predicted. Exit code 4 when a target is too small.
    """
    plans = make_plans(**arguments)
    store = Store.default()
    if as_json:
        click.echo(json.dumps({"targets": [describe(plan, store) for plan in plans]}, indent=2))
    else:
        for plan in plans:
            show(plan, store, Console())
    for plan in plans:
        check_fit(plan, documented=as_json)
        check_host(plan, documented=as_json)


def describe(plan: Plan, store: Store) -> dict[str, Any]:
    """The plan as plain JSON."""
    return {
        "target": plan.target.name,
        "recipe": plan.recipe.name,
        "model": {
            "uri": plan.source.uri,
            "revision": plan.source.revision,
            "digest": plan.source.artifact.digest,
            "parameters": plan.shape.parameters,
        },
        "context_tokens": plan.context_tokens,
        "kv_type": plan.kv_type,
        "steps": [
            {
                "stage": step.stage.name,
                "of": step.checks,
                "key": key,
                "cached": record is not None,
                "params": step.params.model_dump(mode="json"),
                "host_bytes": plan.host_bytes(index),
            }
            for index, (step, (key, record)) in enumerate(zip(plan.steps, cached_records(plan, store), strict=True))
        ],
        "memory": {
            "weight_bytes": plan.memory.weight_bytes,
            "companion_bytes": plan.memory.companion_bytes,
            "kv_cache_bytes": plan.memory.kv_cache_bytes,
            "compute_buffer_bytes": plan.memory.compute_buffer_bytes,
            "margin_bytes": plan.memory.margin_bytes,
            "required_bytes": plan.memory.required_bytes,
            "usable_bytes": plan.memory.usable_bytes,
        },
        "budget": _outlook(plan, store),
        "fits": plan.memory.fits,
        "would_fit": [] if plan.memory.fits else what_fits(plan),
        "measurements": [m.model_dump(mode="json") for m in plan.predictions],
        "fallbacks": list(plan.fallbacks),
        "notes": list(plan.notes),
    }


def _outlook(plan: Plan, store: Store) -> dict[str, Any] | None:
    """What a step would choose for its budget, where everything that it reads is in the store already."""
    records = cached_records(plan, store)
    for step in plan.steps:
        digests = [records[index][1] if index >= 0 else None for index in step.inputs]
        if not getattr(step.params, "has_budget", False) or None in digests:
            continue
        model, *side = (store.peek(record.digest) for record in digests if record)
        named = dict(zip((kind for kind, _ in step.side), side, strict=True))
        return step.stage.outlook(model, named, step.params, plan.target)
    return None


_CURVE_ROWS = 8


def _show_curve(outlook: dict[str, Any], console: Console) -> None:
    """A few points of the curve, and the budget among them."""
    points = [(nbytes, nats, "") for nbytes, nats in outlook["curve"]]
    budget = outlook["budget_bytes"]
    chosen = (budget, outlook["predicted_divergence_nats"], "the budget")
    rows = sorted([*points[:: max(1, len(points) // _CURVE_ROWS)], chosen])
    table = Table(box=None, padding=(0, 2, 0, 0))
    for title in ("a file of MiB", "loses nats (predicted)", ""):
        table.add_column(title, justify="right" if title else "left")
    for nbytes, nats, word in rows:
        table.add_row(f"{nbytes / (1 << 20):,.1f}", f"{nats:.4f}", word)
    console.print(table)
    types = ", ".join(f"{count} {kind}" for kind, count in outlook["types"].items())
    console.print(f"types for the budget: {types}", highlight=False)


def show(plan: Plan, store: Store, console: Console) -> None:
    """Print the plan for people, at most 80 columns wide."""
    facts = plan.source.artifact.facts
    console.print(f"[bold]{plan.target.title}[/]  ({plan.target.name})", highlight=False)
    console.print(
        f"{facts['name']}, {plan.shape.parameters / 1e6:.1f} M parameters, licence {facts['licence']}; "
        f"recipe {plan.recipe.name}",
        highlight=False,
    )
    steps = Table(box=None, padding=(0, 2, 0, 0))
    for title in ("step", "of", "cached", "parameters"):
        steps.add_column(title, overflow="fold")
    for step, (_, record) in zip(plan.steps, cached_records(plan, store), strict=True):
        changed = step.params.model_dump(mode="json")
        text = ", ".join(f"{name}={value}" for name, value in changed.items() if value not in (None, {}, False))
        steps.add_row(step.stage.name, step.checks or "", "yes" if record else "no", text)
    console.print(steps)
    budgeted = any(getattr(step.params, "has_budget", False) for step in plan.steps)
    memory = Table(box=None, padding=(0, 2, 0, 0))
    memory.add_column("memory on the target (predicted)")
    memory.add_column("MiB", justify="right")
    parts = {
        f"weights ({'within the budget' if budgeted else 'exact from tensor types'})": plan.memory.weight_bytes,
        **({"verifier": plan.memory.companion_bytes} if plan.companion else {}),
        f"KV cache, {plan.kv_type}, {plan.context_tokens} tokens": plan.memory.kv_cache_bytes,
        "compute buffers": plan.memory.compute_buffer_bytes,
        "margin": plan.memory.margin_bytes,
        "needed": plan.memory.required_bytes,
        "usable": plan.memory.usable_bytes,
    }
    for name, size in parts.items():
        memory.add_row(name, f"{size / (1 << 20):,.1f}")
    console.print(memory)
    if outlook := _outlook(plan, store):
        _show_curve(outlook, console)
    needed = max(range(len(plan.steps)), key=plan.host_bytes)
    host = f"building needs up to {plan.host_bytes(needed) / (1 << 20):,.0f} MiB here, for {plan.steps[needed].label}"
    console.print(host, highlight=False)
    for prediction in plan.predictions:
        if prediction.unit in ("tokens/s", "J/token"):
            low, high = (number(end) for end in (prediction.ci_low or 0.0, prediction.ci_high or 0.0))
            words = f"{prediction.name}: {number(prediction.value)} predicted [{low} to {high}]"
            words += f", {prediction.note}" if prediction.unit == "J/token" else ""
            console.print(words, markup=False, highlight=False)
        elif prediction.name == "peak_rss_bytes":
            peak = f"{prediction.value / (1 << 20):,.1f} MiB predicted for the whole process, {prediction.note}"
            console.print(f"{prediction.name}: {peak}", markup=False, highlight=False)
    rate = next(m for m in plan.predictions if m.name == "decode_tokens_per_s")
    console.print(f"rates: {rate.note}", markup=False, highlight=False)
    if plan.fallbacks:
        first = plan.fallbacks[0]
        console.print(f"{len(plan.fallbacks)} tensors fall back to another type, e.g. {first}", highlight=False)
    for note in plan.notes:
        console.print(f"note: {note}", highlight=False, markup=False)
    console.print()
