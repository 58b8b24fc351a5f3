"""`edgekit compare`."""

from __future__ import annotations

from pathlib import Path

import click
from rich.console import Console
from rich.table import Table
from rich.text import Text

from edgekit import __version__
from edgekit.commands import _compare_page as page
from edgekit.commands._builds import build_names, profile
from edgekit.commands._paths import GivenPath
from edgekit.compare import COSTS, Comparison, compare_builds, parse_tolerances
from edgekit.errors import GateFailed, InputError
from edgekit.report.figures import clean, shorten
from edgekit.report.write import read_report
from edgekit.scenario import find_scenario, parse_overrides
from edgekit.store import explain_disk, require_writable
from edgekit.tco import read_build

MOST_BUILDS = 16


@click.command(name="compare", short_help="Set builds side by side and find what got worse.")
@click.argument("builds", nargs=-1, required=True, type=GivenPath(), metavar="BASELINE BUNDLE|REPORT...")
@click.option(
    "--tolerance",
    "tolerances",
    multiple=True,
    metavar="NAME=5%|NAME=AMOUNT",
    help="How much worse a figure may be, as a share of the baseline or in its unit; repeats.",
)
@click.option("--strict", is_flag=True, help="Count figures that are gone, or worse but not certainly, as worse.")
@click.option("--fail-on-regression", is_flag=True, help="End with exit code 3 where a figure is worse.")
@click.option("--scenario", "-s", "scenario_name", help="Scenario name or .yaml file: compares costs as well.")
@click.option(
    "--set", "settings", multiple=True, metavar="PATH=VALUE", help="Change a figure of the scenario; repeats."
)
@click.option("--out", type=GivenPath(), help="Directory for compare.json, compare.md and compare.html.")
@click.option("--junit", "junit_path", type=GivenPath(), help="File for the result as JUnit XML.")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON document on stdout.")
def command(
    builds: tuple[Path, ...],
    tolerances: tuple[str, ...],
    strict: bool,
    fail_on_regression: bool,
    scenario_name: str | None,
    settings: tuple[str, ...],
    out: Path | None,
    junit_path: Path | None,
    as_json: bool,
) -> None:
    """Set builds side by side and find what got worse.

    Takes bundles, or the report.json files of bundles; the first is the baseline. Sizes, accuracy, speed, memory and
    energy are compared where they are of one kind, and of the same text, task and machine. A figure is worse when
    it lies beyond its tolerance and its difference is certain.

    Exit codes: 0 done, 2 wrong input, 3 a figure is worse and --fail-on-regression was given.
    """
    if not 2 <= len(builds) <= MOST_BUILDS:
        raise InputError(f"2 to {MOST_BUILDS} builds", str(len(builds)), "name the baseline first, then the others")
    allowed = parse_tolerances(tolerances)
    overrides = parse_overrides(settings)
    if scenario_name is None and (overrides or any(metric.name in allowed for metric in COSTS)):
        raise InputError("--scenario with --set or a tolerance of a cost", "none", "edgekit compare --help")
    scenario = find_scenario(scenario_name, overrides) if scenario_name is not None else None
    for place in filter(None, (out, junit_path and junit_path.parent)):
        require_writable(place, "choose another place")
    if junit_path is not None and junit_path.is_dir():
        raise InputError("--junit FILE", f"{junit_path}, a directory", f"--junit {junit_path / 'compare.xml'}")
    names, reports = build_names(builds), [read_report(path) for path in builds]
    costs = None
    if scenario is not None:
        told = zip(names, reports, builds, strict=True)
        costs = (
            scenario,
            [
                read_build(name, report, profile(path, report.target.get("name")), scenario)
                for name, report, path in told
            ],
        )
    comparison = compare_builds(names, reports, __version__, tolerances=allowed, strict=strict, costs=costs)
    written = []
    if out is not None:
        with explain_disk(out):
            written = page.write(comparison, out)
    if junit_path is not None:
        with explain_disk(junit_path.parent):
            page.write_junit(comparison, junit_path)
    if as_json:
        click.echo(page.to_json(comparison), nl=False)
    else:
        show(comparison, Console(highlight=False))
        for path in (*written[-1:], *filter(None, (junit_path,))):
            click.echo(f"report: {path}")
    if fail_on_regression and comparison.regressions:
        found = "; ".join(
            f"{comparison.builds[index].name}: {row.metric} ({row.kind}) {page.change_text(row.cells[index]) or 'gone'}"
            for row, index in comparison.regressions
        )
        advice = "open the comparison, or allow more with --tolerance"
        raise GateFailed(f"no figure worse than {names[0]}'s", found, advice, documented=True)


def show(comparison: Comparison, console: Console) -> None:
    """Print the table of all builds; values are printed as text, never as markup."""

    def words(text: str, style: str = "") -> Text:
        # a terminal that cannot encode a character shows a question mark
        return Text(text.encode(console.encoding, "replace").decode(console.encoding), style)

    table = Table(box=None, padding=(0, 2, 0, 0), pad_edge=False)
    table.add_column("", overflow="fold")
    for build in comparison.builds:
        table.add_column(words(shorten(build.name, 40)), justify="right", overflow="fold")
    few = len(comparison.builds) <= 3
    for line in page.lines(comparison):
        cells = []
        for cell in line.cells:
            if cell is None:
                cells.append(words("none", "dim"))
                continue
            value = " ".join(filter(None, [cell.plain, cell.interval if few else ""]))
            parts = [words(value, "italic" if line.kind == "predicted" else "")]
            parts += [words(f"\n{cell.result}", _STYLES.get(cell.outcome or "", ""))] if cell.result else []
            cells.append(Text.assemble(*parts))
        table.add_row(words(f"{line.title} ({line.kind})"), *cells)
    console.print(table)
    for number, note in enumerate(page.notes(comparison), 1):
        console.print(words(f"[{number}] {clean(note)}"))
    for sentence in page.sentences(comparison):
        console.print(words(clean(sentence)))
    console.print(
        words(f"{page.verdict(comparison)} than the baseline", "bold red" if comparison.regressions else "bold")
    )


_STYLES = {"worse": "bold red", "maybe worse": "yellow", "missing": "yellow", "better": "green", "not compared": "dim"}
