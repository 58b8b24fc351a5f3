"""`edgekit tco`."""

from __future__ import annotations

from pathlib import Path

import click
from rich.console import Console
from rich.table import Table
from rich.text import Text

from edgekit import __version__
from edgekit.commands import _tco_page as page
from edgekit.commands._builds import build_names, profile
from edgekit.commands._paths import GivenPath
from edgekit.errors import InputError
from edgekit.report.figures import clean, shorten
from edgekit.report.write import read_report
from edgekit.scenario import find_scenario, parse_overrides, scenario_names
from edgekit.store import explain_disk, require_writable
from edgekit.tco import Build, Costs, compare_costs, read_build

MOST_BUILDS = 6


@click.command(name="tco", short_help="Say what owning a fleet of devices costs, against cloud and API.")
@click.argument("builds", nargs=-1, required=True, type=GivenPath(), metavar="BUNDLE|REPORT...")
@click.option(
    "--scenario", "-s", "scenario_name", required=True, help=f"{', '.join(scenario_names())}, or a .yaml file."
)
@click.option("--out", type=GivenPath(), help="Directory for tco.json, tco.md, tco.csv and tco.html.")
@click.option(
    "--set", "settings", multiple=True, metavar="PATH=VALUE", help="Change a figure of the scenario; repeats."
)
@click.option("--seed", type=click.IntRange(min=0, max=2**32 - 1), default=0, show_default=True, help="Of the draws.")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON document on stdout.")
def command(
    builds: tuple[Path, ...],
    scenario_name: str,
    out: Path | None,
    settings: tuple[str, ...],
    seed: int,
    as_json: bool,
) -> None:
    """Say what owning a fleet of devices costs, against cloud and API.

    Takes bundles, or the report.json files of bundles, and sets them side by side: cost of 1M output tokens, of a
    right answer, break-even, energy and emissions, with intervals and with the source of every input.
    """
    if len(builds) > MOST_BUILDS:
        raise InputError(f"at most {MOST_BUILDS} builds", str(len(builds)), "compare fewer at a time")
    scenario = find_scenario(scenario_name, parse_overrides(settings))
    if out is not None:
        require_writable(out, "choose another --out")
    names = build_names(builds)
    found: list[Build] = []
    for name, path in zip(names, builds, strict=True):
        report = read_report(path)
        found.append(read_build(name, report, profile(path, report.target.get("name")), scenario))
    costs = compare_costs(found, scenario, __version__, seed=seed)
    if out is not None:
        with explain_disk(out):
            written = page.write(costs, out)
    if as_json:
        click.echo(page.to_json(costs), nl=False)
        return
    show(costs, Console(highlight=False))
    if out is not None:
        click.echo(f"report: {written[-1]}")


def show(costs: Costs, console: Console) -> None:
    """Print the table of all builds; values are printed as text, never as markup."""

    def words(text: str, style: str = "") -> Text:
        # a terminal that cannot encode a character shows a question mark
        return Text(text.encode(console.encoding, "replace").decode(console.encoding), style)

    console.print(words(f"{costs.scenario['name']}: {clean(costs.scenario['description'])}", "bold"))
    table = Table(box=None, padding=(0, 2, 0, 0), pad_edge=False)
    table.add_column("", overflow="fold")
    for build in costs.builds:
        table.add_column(words(shorten(build.name, 30)), justify="right", overflow="fold")
    for row in page.rows(costs):
        if not row.cells:
            table.add_row(words(row.title, "bold"))
            continue
        cells = [words("not known", "dim") if one is None else words(one.text, _STYLES[one.kind]) for one in row.cells]
        table.add_row(words(f"  {row.title}"), *cells)
    console.print(table)
    for note in page.notes(costs):
        console.print(words(f"note: {clean(note)}"))
    console.print(words(f"[low, high]: {costs.interval}. ≈ rests on a prediction."))


_STYLES = {"measured": "bold", "predicted": "italic", "assumed": ""}
