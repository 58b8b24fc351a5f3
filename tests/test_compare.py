"""Builds against a baseline: what is worse and how surely, what is not compared, dominance, and the command."""

from __future__ import annotations

import itertools
import json
import math
import re
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import numpy as np
import pytest
from click.testing import CliRunner
from hypothesis import given, settings
from hypothesis import strategies as st
from test_tco import Page, check_page, figure, scenario

from edgekit import tco
from edgekit.cli import cli
from edgekit.commands import _compare_page as page
from edgekit.commands._builds import build_names
from edgekit.compare import METRICS, Cell, Comparison, Row, Tolerance, compare_builds, paired_interval, parse_tolerances
from edgekit.errors import GateFailed, InputError
from edgekit.measure.divergence import Divergence
from edgekit.measurement import Measurement
from edgekit.report import Report, StepRecord, StrategyResult
from edgekit.report.write import to_json

HOST, OTHER = "build-host #1234", "board #9876"
TARGET = "raspberry-pi-5"
WINDOWS = (0.030, 0.042, 0.037, 0.025, 0.051, 0.033, 0.040, 0.029)


def measured(name: str, value: float, unit: str = "s", half: float | None = None, **more: Any) -> Measurement:
    interval = {} if half is None else {"ci_low": value - half, "ci_high": value + half}
    return figure(name, value, unit, "measured", **{"device": HOST, **interval, **more})


def predicted(name: str, value: float, unit: str = "tokens/s", **more: Any) -> Measurement:
    return figure(name, value, unit, **{"device": TARGET, "ci_low": 0.65 * value, "ci_high": 1.35 * value, **more})


def strategy(task: str = "arithmetic", problems: int = 40) -> StrategyResult:
    return StrategyResult(
        task=task, strategy="greedy", verifier="none", candidates=1, problems=problems, accuracy=0.5, ci_low=0.4,
        ci_high=0.6, tokens_forward=30, steps=10, verifier_calls=0, verifier_tokens=0, bytes_moved=1e9, wall_s=0.5,
        answer_s=0.4, chosen=True,
    )  # fmt: skip


def report(*measurements: Measurement, key: str | None = "reference-key", **fields: Any) -> Report:
    steps = (StepRecord(stage="reference", key=key, status="cached", seconds=1.0),) if key else ()
    return Report(
        **{
            "edgekit_version": "0.1.0",
            "created_at": "2026-01-01",
            "target": {"name": TARGET, "title": "A board"},
            "recipe": {"name": "gguf-q4", "engine": "llama_cpp", "evaluation": {"text": "python-docs", "windows": 8}},
            "model": {"name": "tiny", "digest": "d1", "adapters": []},
            "host": {"fingerprint": HOST},
            "measurements": measurements,
            "steps": steps,
            **fields,
        }
    )


def quality(windows: tuple[float, ...] = WINDOWS, **fields: Any) -> Report:
    """A report with the divergence that these windows have, as a build would state it."""
    kld = np.array(windows)[:, None]
    made = Divergence(kld, kld + 2, np.full_like(kld, 2.0), np.ones(kld.shape, bool)).measurements(device=HOST)
    kept = [m for m in made if m.name == "kl_divergence_nats"]
    return report(*kept, divergence_per_window=windows, **fields)


def compare(*reports: Report, **options: Any) -> Comparison:
    return compare_builds([f"b{index}" for index in range(len(reports))], reports, "0.1.0", **options)


def cell(*reports: Report, metric: str, kind: str = "measured", **options: Any) -> Cell:
    """The second build's cell in the row of a metric."""
    (row,) = [r for r in compare(*reports, **options).rows if (r.metric, r.kind) == (metric, kind)]
    return row.cells[1]


# --- what is worse


@pytest.mark.parametrize(
    ("base", "ours", "outcome"),
    [
        (1000, 1010, "same"),
        (1000, 1011, "worse"),
        (1000, 990, "same"),
        (1000, 989, "better"),
        (1000, 1000, "same"),
    ],
)
def test_a_size_is_worse_from_its_tolerance_on(base: int, ours: int, outcome: str) -> None:
    found = cell(*(report(measured("bundle_bytes", n, "bytes", device=None)) for n in (base, ours)), metric="size")
    assert found.outcome == outcome
    assert found.change == pytest.approx(ours / base - 1)
    assert found.difference == ours - base


@pytest.mark.parametrize(
    ("base", "ours", "outcome"),
    [
        ((100, 2), (90, 2), "worse"),
        ((100, 6), (90, 5), "maybe worse"),
        ((100, 2), (96, 0.1), "same"),
        ((100, 2), (110, 2), "better"),
        ((100, 9), (110, 9), "maybe better"),
        ((100, 5), (90, 5), "maybe worse"),  # they touch
        ((100, None), (90, 5), "worse"),
    ],
)
def test_intervals_that_overlap_leave_it_open(
    base: tuple[float, float], ours: tuple[float, float], outcome: str
) -> None:
    made = [report(measured("decode_tokens_per_s", v, "tokens/s", half, n=5)) for v, half in (base, ours)]
    assert cell(*made, metric="decode").outcome == outcome


def test_the_sign_follows_the_metric() -> None:
    slower = [report(measured("ttft_s", value, half=0.001)) for value in (0.1, 0.2)]
    assert cell(*slower, metric="ttft").outcome == "worse"
    assert cell(*reversed(slower), metric="ttft").outcome == "better"
    assert {metric.better for metric in METRICS if metric.figure.endswith(("_bytes", "_s", "_nats"))} == {
        "lower",
        "higher",
    }
    assert [m.name for m in METRICS if m.better == "higher"] == ["top1", "accuracy", "decode", "prefill"]


def test_the_same_windows_are_paired() -> None:
    """Each window 10% worse: far within the spread of the windows, and certain all the same."""
    worse = tuple(1.1 * value for value in WINDOWS)
    found = cell(quality(), quality(worse), metric="kld")
    assert found.outcome == "worse"
    assert found.figure is not None
    assert found.figure.low is not None
    assert found.figure.low < np.mean(WINDOWS)  # the plain intervals overlap
    assert (found.difference_low, found.difference_high) == paired_interval(WINDOWS, worse)
    assert cell(quality(), quality(worse, key="another"), metric="kld").outcome == "maybe worse"
    assert cell(quality(), quality(worse), metric="kld", tolerances={"kld": Tolerance(share=0.11)}).outcome == "same"


def test_the_paired_interval_against_a_table() -> None:
    """Differences 1, 2, 3, 4: mean 2.5, s = sqrt(5/3), t(3, 97.5%) = 3.1824."""
    low, high = paired_interval((0, 0, 0, 0), (1, 2, 3, 4)) or (0, 0)
    half = 3.1824 * math.sqrt(5 / 3) / 2
    assert (low, high) == pytest.approx((2.5 - half, 2.5 + half))
    assert paired_interval((1, 2), (1, 2, 3)) is None
    assert paired_interval((1,), (2,)) is None
    assert paired_interval((1, math.inf), (2, math.inf)) is None


def test_a_window_that_improves_makes_a_small_mean_uncertain() -> None:
    mixed = tuple(value + (0.03 if index else -0.08) for index, value in enumerate(WINDOWS))
    found = cell(quality(), quality(mixed), metric="kld")
    assert found.difference is not None
    assert found.difference > 0.05 * np.mean(WINDOWS)
    assert (found.outcome, found.why) == ("maybe worse", "the interval of the difference holds 0")


@settings(max_examples=60, deadline=None)
@given(st.floats(1e-6, 1e6), st.floats(1e-6, 1e6), st.floats(0, 2), st.floats(0, 2))
def test_swapping_two_builds_swaps_better_and_worse(a: float, b: float, half_a: float, half_b: float) -> None:
    made = [report(measured("ttft_s", v, half=v * h / 2, n=5)) for v, h in ((a, half_a), (b, half_b))]
    allowed = {"ttft": Tolerance(amount=0.5)}
    there, back = (cell(*pair, metric="ttft", tolerances=allowed) for pair in (made, made[::-1]))
    swapped = {"better": "worse", "worse": "better", "maybe better": "maybe worse", "maybe worse": "maybe better"}
    assert back.outcome == swapped.get(str(there.outcome), there.outcome)


@pytest.mark.parametrize("note", ["64 tokens; contended: others took 51% of the CPU"])
@pytest.mark.parametrize("which", [0, 1])
def test_a_busy_machine_decides_nothing(note: str, which: int) -> None:
    made = [
        report(measured("decode_tokens_per_s", value, "tokens/s", 1, n=5, note=note if index == which else None))
        for index, value in enumerate((100, 50))
    ]
    found = cell(*made, metric="decode")
    assert (found.outcome, found.why) == ("maybe worse", "other programs kept the machine busy")


def test_a_single_sample_decides_nothing() -> None:
    made = [report(measured("load_s", value, half=0, n=1)) for value in (1.0, 9.0)]
    assert (found := cell(*made, metric="load")).outcome == "maybe worse"
    assert found.why == "a single sample"


# --- like with like


def test_predictions_share_the_error_of_their_formula() -> None:
    made = [report(predicted("decode_tokens_per_s", value)) for value in (100, 90)]
    assert cell(*made, metric="decode", kind="predicted").outcome == "worse"
    newer = report(predicted("decode_tokens_per_s", 90), edgekit_version="0.2.0")
    found = cell(made[0], newer, metric="decode", kind="predicted")
    assert (found.outcome, found.why) == ("maybe worse", "predicted by edgekit 0.1.0 and 0.2.0")


@pytest.mark.parametrize(
    ("metric", "base", "ours", "why"),
    [
        ("decode", measured("decode_tokens_per_s", 9, "tokens/s"), {"device": OTHER}, "board #9876; the baseline: bu"),
        ("decode", measured("decode_tokens_per_s", 9, "tokens/s", device=None), {}, "not named"),
        ("accuracy", measured("task_accuracy", 0.5, "ratio"), {}, "does not say on which task"),
    ],
)
def test_unlike_figures_are_shown_and_not_compared(
    metric: str, base: Measurement, ours: dict[str, Any], why: str
) -> None:
    found = cell(report(base), report(base.model_copy(update=ours)), metric=metric)
    assert found.outcome == "not compared"
    assert why in found.why
    assert found.figure is not None
    assert found.figure.value == base.value


def test_energy_of_another_scope_is_not_compared() -> None:
    def taken(joules: float, covers: str) -> Report:
        note = f"{covers}: it, read every 0.1 s; idle power included; 64 tokens"
        return report(measured("energy_j_per_token", joules, "J/token", 0.01, n=5, note=note))

    assert cell(taken(1, "package"), taken(2, "package"), metric="energy").outcome == "worse"
    found = cell(taken(1, "package: RAPL package-0; GPU"), taken(2, "package"), metric="energy")
    assert (found.outcome, found.why) == ("not compared", "covers package, the baseline's package + GPU")


def test_measured_and_predicted_are_never_compared() -> None:
    a, b = report(measured("decode_tokens_per_s", 100, "tokens/s", 1)), report(predicted("decode_tokens_per_s", 10))
    rows = {row.kind: row.cells for row in compare(a, b).rows}
    assert rows["measured"][1].figure is None
    assert rows["predicted"][0].figure is None
    assert {row[1].outcome for row in rows.values()} == {"not compared"}
    assert {row[1].why for row in rows.values()} == {"not of one kind and unit in both builds"}
    assert not compare(a, b, strict=True).regressions


def test_another_unit_is_another_figure() -> None:
    base, ours = (report(measured("ttft_s", 2, unit)) for unit in ("s", "ms"))
    found = cell(base, ours, metric="ttft")
    assert (found.figure, found.outcome) == (None, "not compared")


def test_quality_needs_the_same_source_and_text() -> None:
    base = quality()
    for changed, why in (
        ({"model": {"name": "tiny", "digest": "d2"}}, "another source model"),
        ({"recipe": {"name": "r", "evaluation": {"text": "mine.txt", "windows": 8}}}, "another text"),
        ({"model": {"name": "tiny", "digest": "d1", "adapters": [{"digest": "a"}]}}, "another text or other windows"),
    ):
        found = cell(base, quality(key="another", **changed), metric="kld")
        assert found.outcome == "not compared"
        assert why in found.why
    assert cell(base, quality(key=None), metric="kld").outcome == "same"


def test_accuracy_needs_the_same_task_and_problems() -> None:
    def judged(value: float, *rows: StrategyResult) -> Report:
        return report(measured("task_accuracy", value, "ratio", 0.05, n=40), strategies=rows)

    assert cell(judged(0.8, strategy()), judged(0.5, strategy()), metric="accuracy").outcome == "worse"
    found = cell(judged(0.8, strategy()), judged(0.5, strategy("gsm8k", 20)), metric="accuracy")
    assert found.why == "on 20 problems of gsm8k, the baseline on 40 of arithmetic"


def test_of_several_machines_the_baselines_is_taken() -> None:
    base = report(measured("ttft_s", 0.1, half=0.001, device=OTHER))
    both = report(measured("ttft_s", 9.0, device=HOST), measured("ttft_s", 0.2, half=0.001, device=OTHER))
    assert cell(base, both, metric="ttft").outcome == "worse"


def test_what_only_one_build_has() -> None:
    base, bare = report(measured("ttft_s", 0.1), measured("bundle_bytes", 5, "bytes")), report()
    gone = cell(base, bare, metric="ttft")
    assert (gone.outcome, gone.figure) == ("missing", None)
    assert cell(bare, base, metric="ttft").outcome == "not compared"
    assert not compare(base, bare).regressions
    assert [(row.metric, index) for row, index in compare(base, bare, strict=True).regressions] == [
        ("size", 1),
        ("ttft", 1),
    ]


def test_strict_counts_what_is_not_certain() -> None:
    made = [report(measured("ttft_s", value, half=0.5, n=5)) for value in (1.0, 1.4)]
    assert not compare(*made).regressions
    assert [(row.metric, index) for row, index in compare(*made, strict=True).regressions] == [("ttft", 1)]
    assert not compare(*made[::-1], strict=True).regressions


def test_values_beyond_any_scale_are_not_compared() -> None:
    made = [report(measured("ttft_s", value)) for value in (1.7e308, -1.7e308)]
    assert cell(*made, metric="ttft").outcome == "not compared"
    zero = [report(measured("ttft_s", value)) for value in (0.0, 1e-300)]
    assert cell(*zero, metric="ttft").change is None
    tiny = [report(measured("ttft_s", value)) for value in (1e-308, 1e308)]
    assert cell(*tiny, metric="ttft").change is None
    for pair in (made, zero, tiny):
        json.loads(page.to_json(compare(*pair)))
        Page(page.html(compare(*pair)))


# --- tolerances


def test_tolerances_are_shares_or_amounts() -> None:
    parsed = parse_tolerances(["kld=5%", "decode=0.5", "size=1.5e-3", "load=.2%", "kld=7%"])
    assert parsed["kld"] == Tolerance(share=0.07)
    assert parsed["decode"] == Tolerance(amount=0.5)
    assert parsed["size"] == Tolerance(amount=0.0015)
    assert parsed["load"].of(-10) == pytest.approx(0.02)
    assert Tolerance(share=0.05, amount=2).of(10) == 2
    assert [Tolerance(share=0.05).text, Tolerance(amount=0.1).text, Tolerance().text] == ["5%", "0.1", "0%"]
    assert Tolerance(share=0.05, amount=2).text == "5% or 2"


@pytest.mark.parametrize("text", ["kld", "kld=", "kld=x%", "kld=-5%", "kdl=5%", "kld=inf", "kld=nan%", "kld=1e999"])
def test_a_bad_tolerance_is_an_input_error(text: str) -> None:
    with pytest.raises(InputError, match="tolerance"):
        parse_tolerances([text])


def test_the_page_on_comparing_states_every_metric() -> None:
    text = (Path(__file__).parents[1] / "docs" / "compare.md").read_text()
    rows = re.findall(r"^\| `([\w-]+)` \| (?:`(\w+)`|[^|]+) \| (\w+) \| (.+?) \|$", text, re.MULTILINE)
    assert [row[0] for row in rows] == [metric.name for metric in METRICS]
    for (_, name, better, tolerance), metric in zip(rows, METRICS, strict=True):
        assert name in (metric.figure, "")
        assert better == metric.better
        assert tolerance.removesuffix(", whichever is more") == metric.tolerance.text


# --- dominance


@settings(max_examples=50, deadline=None)
@given(st.lists(st.tuples(st.integers(1, 6), st.integers(1, 6)), min_size=2, max_size=6))
def test_dominance_against_brute_force(places: list[tuple[int, int]]) -> None:
    made = [
        report(measured("bundle_bytes", size, "bytes"), measured("kl_divergence_nats", kld, "nats"))
        for size, kld in places
    ]
    (front,) = compare(*made).fronts
    assert [point.build for point in front.points] == list(range(len(places)))
    for point, (size, kld) in zip(front.points, places, strict=True):
        wanted = [i for i, (s, k) in enumerate(places) if (s < size and k <= kld) or (s <= size and k < kld)]
        assert list(point.dominated_by) == wanted
    svg = page.front_svg(compare(*made), front)
    free = sum(not point.dominated_by for point in front.points)
    assert svg.count('class="front"') == 2 * (free - 1)
    assert svg.count('class="dot"') == free
    # builds in one place share a label: numbers on top of each other could not be read
    labels = re.findall(r'class="who" (x="\S+" dx="8" y="\S+")>([^<]*)<', svg)
    assert len({place for place, _ in labels}) == len(labels)
    assert sorted(number for _, text in labels for number in text.split(", ")) == [
        str(n + 1) for n in range(len(places))
    ]


def test_higher_is_better_where_it_is() -> None:
    made = [
        report(measured("decode_tokens_per_s", rate, "tokens/s"), measured("kl_divergence_nats", kld, "nats"))
        for rate, kld in ((10, 0.1), (20, 0.1), (30, 0.3))
    ]
    (front,) = compare(*made).fronts
    assert (front.x, front.y) == ("decode", "kld")
    assert [point.dominated_by for point in front.points] == [(1,), (), ()]


def test_a_build_on_another_machine_is_in_no_plot_of_speed() -> None:
    made = [
        report(measured("decode_tokens_per_s", 10, "tokens/s", device=d), measured("kl_divergence_nats", 0.1, "nats"))
        for d in (HOST, OTHER)
    ]
    assert compare(*made).fronts == ()


def test_axes_span_decades_or_start_at_zero() -> None:
    row = Row(
        metric="size", figure="bundle_bytes", title="", unit="bytes", kind="measured", better="lower",
        tolerance=Tolerance(), cells=(),
    )  # fmt: skip
    plain = page.axis(row, [100 << 20, 200 << 20])
    assert (plain.unit, plain.logarithmic, plain.at(0)) == ("MiB", False, 0)
    assert plain.at(115 << 20) == pytest.approx(0.5)
    wide = page.axis(row.model_copy(update={"unit": "nats", "figure": "x"}), [0.002, 3.0])
    assert wide.logarithmic
    assert [label for _, label in wide.ticks] == ["0.001", "0.01", "0.1", "1", "10"]
    assert wide.at(0.1) == pytest.approx(0.5)
    assert wide.at(0) == 0


# --- costs


def owned(rate: float, **more: Any) -> Report:
    return report(predicted("decode_tokens_per_s", rate), predicted("prefill_tokens_per_s", 100.0), **more)


def cost_comparison(*reports: Report, **changes: Any) -> Comparison:
    chosen = scenario(**changes)
    builds = [tco.read_build(f"b{index}", r, None, chosen) for index, r in enumerate(reports)]
    return compare(*reports, costs=(chosen, builds))


def test_costs_are_those_of_the_scenario() -> None:
    made = [owned(10.0), owned(5.0)]
    rows = {row.metric: row for row in cost_comparison(*made).rows}
    assert "cost-per-answer" not in rows
    chosen = scenario()
    for found, one in zip(rows["cost"].cells, made, strict=True):
        wanted = tco.assess(tco.read_build("b", one, None, chosen), chosen, draws=1).figures[tco.HEADLINE]
        assert found.figure is not None
        assert found.figure.value == wanted.value
    assert rows["cost"].kind == "predicted"


def test_a_cost_is_certain_by_its_paired_draws() -> None:
    """A price that both share moves both: the intervals overlap, the difference does not hold 0."""
    price = {"value": 300, "low": 100, "high": 2000}
    exact = [
        report(*(measured(f"{name}_tokens_per_s", value, "tokens/s", device=OTHER) for name, value in rates.items()))
        for rates in ({"decode": 10.0, "prefill": 100.0}, {"decode": 2.0, "prefill": 100.0})
    ]
    (row,) = [
        r for r in cost_comparison(*exact, hardware__price=price, hardware__busy_w=200).rows if r.metric == "cost"
    ]
    base, ours = (one.figure for one in row.cells)
    assert base is not None
    assert ours is not None
    assert base.high is not None
    assert ours.low is not None
    assert ours.low < base.high
    assert row.kind == "assumed"
    assert row.cells[1].outcome == "worse"
    assert row.cells[1].difference_low is not None
    assert row.cells[1].difference_low > 0


@pytest.mark.parametrize(("task", "outcome"), [("arithmetic", "worse"), ("gsm8k", "not compared")])
def test_right_answers_to_other_questions_have_another_price(task: str, outcome: str) -> None:
    def answering(seconds: float, asked: str) -> Report:
        rates = (predicted("decode_tokens_per_s", 10.0), predicted("prefill_tokens_per_s", 100.0))
        accuracy = measured("task_accuracy", 0.5, "ratio", 0.1, n=40)
        return report(*rates, accuracy, predicted("answer_s", seconds, "s"), strategies=(strategy(asked),))

    found = cost_comparison(answering(1.0, "arithmetic"), answering(60.0, task))
    (row,) = (row for row in found.rows if row.metric == "cost-per-answer")
    assert row.cells[1].outcome == outcome
    assert row.cells[1].why == (
        "" if outcome == "worse" else "on 40 problems of gsm8k, the baseline on 40 of arithmetic"
    )


def test_costs_of_another_kind_are_not_compared() -> None:
    rates = {"decode": 10.0, "prefill": 100.0}
    board = report(*(measured(f"{n}_tokens_per_s", v, "tokens/s", device=OTHER) for n, v in rates.items()))
    found = {row.kind: row.cells for row in cost_comparison(owned(10.0), board).rows if row.metric == "cost"}
    assert set(found) == {"predicted", "assumed"}
    assert found["assumed"][0].figure is None
    assert found["assumed"][1].outcome == "not compared"
    assert "assumed, the baseline's predicted" in found["assumed"][1].why


# --- the command


def invoke(*arguments: object) -> Any:
    return CliRunner().invoke(cli, ["compare", *map(str, arguments)])


NASTY = '<script>alert(1)</script>"]]><img src=x>\u202e|\x00\ufffe`=1'


def full(size: int = 1000, rate: float = 20.0, kld: tuple[float, ...] = WINDOWS, **fields: Any) -> Report:
    made = quality(kld)
    return report(
        *made.measurements,
        measured("bundle_bytes", size, "bytes", device=None),
        measured("decode_tokens_per_s", rate, "tokens/s", 0.5, n=5),
        predicted("decode_tokens_per_s", 3 * rate),
        predicted("prefill_tokens_per_s", 100.0),
        measured("task_accuracy", 0.5, "ratio", 0.1, n=40),
        predicted("answer_s", 2 / rate, "s"),
        divergence_per_window=kld,
        strategies=(strategy(),),
        **fields,
    )


@pytest.fixture
def three(tmp_path: Path) -> list[Path]:
    worse = tuple(1.2 * value for value in WINDOWS)
    made = {"old": full(), "new": full(2000, 10.0, worse), "fast": full(990, 40.0)}
    paths = [tmp_path / name / "report.json" for name in made]
    for path, one in zip(paths, made.values(), strict=True):
        path.parent.mkdir()
        path.write_text(to_json(one))
    return paths


def test_the_command_end_to_end(three: list[Path], tmp_path: Path) -> None:
    out, xml = tmp_path / "out", tmp_path / "ci" / "new" / "compare.xml"
    result = invoke(*three, "--out", out, "--junit", xml)
    assert result.exit_code == 0, result.output
    for words in ("old", "new", "fast", "+100.0%, worse", "-50.0%, worse", "+20.0%, worse", "+100.0%, better", "equal"):
        assert words in result.output
    assert xml.is_file()
    document = json.loads((out / "compare.json").read_text())
    assert document["passed"] is False
    assert {(one["build"], one["metric"], one["kind"]) for one in document["regressions"]} == {
        ("new", "size", "measured"),
        ("new", "kld", "measured"),
        ("new", "decode", "measured"),
        ("new", "decode", "predicted"),
        ("new", "answer", "predicted"),
    }
    assert [(f["x"], f["y"]) for f in document["fronts"]] == [
        ("size", "kld"),
        ("answer", "accuracy"),
        ("decode", "kld"),
    ]
    Comparison.model_validate_json(
        json.dumps({key: value for key, value in document.items() if key not in ("passed", "regressions")})
    )
    text = (out / "compare.md").read_text()
    assert "**5 figures worse** than the baseline, old." in text
    assert text.count("**+100.0%, worse**") == 2  # size, and the answer's time


def test_a_regression_ends_a_ci_job(three: list[Path], tmp_path: Path) -> None:
    old, new, fast = three
    xml = tmp_path / "compare.xml"
    assert invoke(old, fast, "--fail-on-regression").exit_code == 0
    failed = invoke(old, new, "--fail-on-regression", "--junit", xml, "--json")
    assert isinstance(failed.exception, GateFailed)
    assert "new: size (measured) +100.0%" in failed.exception.found
    assert json.loads(failed.stdout)["passed"] is False
    assert xml.is_file()
    allowed = [f"--tolerance={name}=150%" for name in ("size", "kld", "decode", "answer")]
    assert invoke(old, new, "--fail-on-regression", *allowed).exit_code == 0


def test_junit_counts_and_names_what_the_table_says(three: list[Path], tmp_path: Path) -> None:
    xml = tmp_path / "compare.xml"
    assert invoke(*three, "--junit", xml).exit_code == 0
    root = ElementTree.parse(xml).getroot()
    assert root.tag == "testsuites"
    suites = root.findall("testsuite")
    assert [suite.get("name") for suite in suites] == ["new", "fast"]
    for suite in [*suites, root]:
        for tag, count in (("testcase", "tests"), ("failure", "failures"), ("skipped", "skipped"), ("error", "errors")):
            assert len(suite.findall(f".//{tag}")) == int(suite.get(count, ""))
    cases = suites[0].findall("testcase")
    assert [case.get("name") for case in cases][:2] == ["size (measured)", "kld (measured)"]
    assert len({case.get("name") for case in cases}) == len(cases)
    (failure,) = cases[0].findall("failure")
    assert "baseline 1000 bytes" in (failure.get("message") or "").replace(",", "")
    assert not suites[1].findall(".//failure")


def test_junit_skips_what_is_not_compared_and_holds_any_text() -> None:
    other = report(measured("ttft_s", 9.0, device=NASTY), measured("load_s", 9.0, half=8.9, n=5))
    made = [report(measured("ttft_s", 0.1), measured("load_s", 1.0, half=0.9, n=5)), other]
    loose, strict = (
        ElementTree.fromstring(page.junit(compare_builds([NASTY, NASTY + "2"], made, "0", strict=strict)))
        for strict in (False, True)
    )
    assert [len(root.findall(".//skipped")) for root in (loose, strict)] == [2, 1]
    assert [len(root.findall(".//failure")) for root in (loose, strict)] == [0, 1]
    told = loose.findall(".//skipped")[0].get("message") or ""
    assert "<script>" in told
    assert "\\u202e" in told
    assert "\ufffe" not in told


def test_json_repeats(three: list[Path]) -> None:
    first, second = (invoke(*three, "--json", "-s", "factory-cell").output for _ in range(2))
    assert first == second
    assert {row["metric"] for row in json.loads(first)["rows"]} >= {"cost", "cost-per-answer"}
    cheaper = invoke(*three, "--json", "-s", "factory-cell", "--set", "hardware.price=1").output
    assert cheaper != first


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["{old}"], "2 to 16 builds"),
        (["{old}"] * 17, "2 to 16 builds"),
        (["{old}", "nowhere/report.json"], "report"),
        (["{old}", "{new}", "--tolerance", "kld"], "--tolerance"),
        (["{old}", "{new}", "--tolerance", "cost=5%"], "--scenario"),
        (["{old}", "{new}", "--set", "years=3"], "--scenario"),
        (["{old}", "{new}", "-s", "nothing"], "scenario"),
        (["{old}", "{new}", "--junit", "{directory}"], "a directory"),
    ],
)
def test_bad_input_is_one_input_error(arguments: list[str], said: str, three: list[Path]) -> None:
    names = {"old": three[0], "new": three[1], "directory": three[0].parent}
    result = invoke(*(text.format(**names) for text in arguments))
    assert isinstance(result.exception, InputError)
    assert said in str(result.exception)


def test_names_are_what_paths_do_not_share(tmp_path: Path) -> None:
    for name in ("a/q4/board", "a/q8/board", "b/q4/board"):
        (tmp_path / name).mkdir(parents=True)

    def named(*names: str) -> list[str]:
        return build_names(tuple(tmp_path / name for name in names))

    assert named("a/q4/board", "a/q8/board") == ["q4", "q8"]
    assert named("a/q4/board", "b/q4/board") == ["a", "b"]
    assert named("a/q4", "a/q8/board") == ["q4", "board"]
    same = named("a/q4/board", "a/q4/board", "a/q8/board")
    assert len(same) == 3


def test_two_real_bundles(bundles: Any, tmp_path: Path) -> None:
    """The same model for two targets: sizes and quality compare, predictions of two targets do not."""
    result = invoke(bundles.jetson, bundles.out / "raspberry-pi-5", "--json", "-s", "factory-cell")
    assert result.exit_code == 0, result.output
    rows = {(row["metric"], row["kind"]): row["cells"][1] for row in json.loads(result.output)["rows"]}
    assert rows["kld", "measured"]["difference_low"] is not None
    assert rows["decode", "measured"]["outcome"] not in ("not compared", "missing")
    assert rows["decode", "predicted"]["outcome"] == "not compared"
    assert rows["required", "predicted"]["why"] == (
        "predicted for raspberry-pi-5; the baseline: jetson-orin-nano-super"
    )
    assert rows["energy", "predicted"]["figure"]["value"] > 0
    assert rows["cost", "predicted"]["figure"]["value"] > 0


# --- the page


def pages() -> list[str]:
    hostile = full(model={"name": NASTY, "digest": "d1"}, target={"name": NASTY}, recipe={"name": NASTY})
    odd = report(measured("ttft_s", 9.0, device=NASTY), created_at=NASTY)
    spread = [full(size, rate, tuple(k * w for w in WINDOWS)) for size, rate, k in ((10**9, 1, 1), (10**6, 900, 900))]
    return [
        page.html(compare(full(), full(2000, 10.0), full(900, 5.0))),
        page.html(compare_builds([NASTY, NASTY], [hostile, odd], NASTY)),
        page.html(compare(*spread)),
        page.html(compare(report(), report())),
        page.html(cost_comparison(owned(10.0), owned(5.0))),
    ]


@pytest.mark.parametrize("source", pages(), ids=["three", "hostile", "decades", "nothing", "costs"])
def test_the_page_is_well_formed_and_loads_nothing(source: str) -> None:
    check_page(source)
    for height in re.findall(r'(?:cy|y1|y2)="(-?[\d.]+)"', source):
        assert -0.01 <= float(height) <= 280


def test_hostile_names_stay_text_in_markdown() -> None:
    text = page.markdown(compare_builds([NASTY, "b"], [full(), full(2000)], "0"))
    assert "<script>" not in text
    assert "\x00" not in text
    widths = [len(re.findall(r"(?<!\\)\|", line)) for line in text.splitlines() if line.startswith("|")]
    tables = [list(group) for _, group in itertools.groupby(widths)]
    assert len(tables) >= 2
    assert min(map(len, tables)) > 2


def test_every_predicted_figure_is_marked() -> None:
    found = page.lines(compare(full(), full(2000, 10.0)))
    assert {line.kind for line in found} == {"measured", "predicted"}
    for line in found:
        assert all(one.value.startswith("≈ ") == (line.kind == "predicted") for one in line.cells if one)


def test_changes_in_words() -> None:
    def told(base: float, ours: float) -> str:
        return page.change_text(cell(*(report(measured("ttft_s", v)) for v in (base, ours)), metric="ttft"))

    assert told(2, 2) == "equal"
    assert told(2, 2.1) == "+5.0%"
    assert told(100_000, 100_001) == "+<0.1%"
    assert told(100_000, 99_999) == "-<0.1%"
    assert told(1, 12) == "12.0×"  # noqa: RUF001
    assert told(0, 0.25) == "+0.25"
