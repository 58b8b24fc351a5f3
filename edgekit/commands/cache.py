"""`edgekit cache`."""

from __future__ import annotations

import json

import click

from edgekit.store import Store

_MIB = 1 << 20


@click.group(name="cache", short_help="Look after the store of finished steps.")
def command() -> None:
    """Look after the store of finished steps, at $EDGEKIT_CACHE or in the user's cache directory."""


@command.command(name="ls")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON document on stdout.")
def ls(as_json: bool) -> None:
    """List the objects in the store."""
    store = Store.default()
    rows = [{"digest": a.digest, "kind": a.kind, "bytes": a.nbytes} for a in store.objects()]
    total = sum(a.nbytes for a in store.objects())
    if as_json:
        click.echo(json.dumps({"store": str(store.root), "objects": rows, "bytes": total}, indent=2))
        return
    for row in rows:
        click.echo(f"{str(row['digest'])[:12]}  {row['kind']:<12}  {int(str(row['bytes'])) / _MIB:10.1f} MiB")
    click.echo(f"{len(rows)} objects, {total / _MIB:.1f} MiB in {store.root}")


@command.command(name="verify")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON document on stdout.")
def verify(as_json: bool) -> None:
    """Read every object; remove the damaged ones, which the next build makes again.

    Exit code 5 when something was damaged.
    """
    store = Store.default()
    count = 0

    def on_object(digest: str) -> None:
        nonlocal count
        count += 1

    problems = store.verify(on_object)
    if as_json:
        found = [{"wanted": p.wanted, "found": p.found} for p in problems]
        click.echo(json.dumps({"store": str(store.root), "objects": count, "damaged": found}, indent=2))
    else:
        for problem in problems:
            click.echo(f"damaged, removed: wanted {problem.wanted}; found {problem.found}")
        click.echo(f"{count} objects read, {len(problems)} damaged")
    if problems:
        raise click.exceptions.Exit(5)


@command.command(name="gc")
@click.option("--all", "everything", is_flag=True, help="Also what existing bundles were made from.")
@click.option("--dry-run", is_flag=True, help="Only say what would be removed.")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON document on stdout.")
def gc(everything: bool, dry_run: bool, as_json: bool) -> None:
    """Remove objects that no existing bundle was made from, and what killed builds left."""
    store = Store.default()
    collected = store.collect(everything=everything, dry_run=dry_run)
    if as_json:
        click.echo(
            json.dumps({"removed": list(collected.objects), "bytes": collected.bytes, "dry_run": dry_run}, indent=2)
        )
    else:
        verb = "would remove" if dry_run else "removed"
        click.echo(f"{verb} {len(collected.objects)} objects, {collected.bytes / _MIB:.1f} MiB")
