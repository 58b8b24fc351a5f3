import io
import json
import math
import re
from html.parser import HTMLParser
from pathlib import Path

import jsonschema
import pytest
from hypothesis import given
from hypothesis import strategies as st
from rich.cells import cell_len
from rich.console import Console

from edgekit.devices.board import BoardRecord
from edgekit.errors import InputError
from edgekit.measurement import Measurement
from edgekit.report import (
    ByteBudget,
    DeviceRecord,
    Fallback,
    GateResult,
    MemoryPart,
    Report,
    StepRecord,
    TensorGroup,
    figures,
    html,
    markdown,
)
from edgekit.report.figures import bytes_text, number, percent, seconds_text, shown, ticks
from edgekit.report.summary import (
    device_line,
    device_text,
    key_figures,
    memory_on_target,
    pick,
    rows,
    sentence,
    verdict,
)
from edgekit.report.terminal import show
from edgekit.report.write import read_report, report_schema, to_json, write_report

SCHEMA = Path(__file__).parent.parent / "docs" / "schemas" / "report.schema.json"
MIB = 1 << 20
HOST = "x86_64-xeon-2c-5d41402a"
TARGET = "jetson-orin-nano-8gb"


def measured(
    name: str, value: float, unit: str, n: int | None = None, half: float | None = None, **more
) -> Measurement:
    interval = {} if half is None else {"ci_low": value - half, "ci_high": value + half}
    return Measurement(name=name, value=value, unit=unit, kind="measured", n=n, **interval, **more)


def predicted(name: str, value: float, unit: str, **more) -> Measurement:
    return Measurement(name=name, value=value, unit=unit, kind="predicted", device=TARGET, **more)


def realistic() -> Report:
    windows = tuple(0.0705 + 0.021 * math.sin(1.7 * i) + 0.012 * math.sin(0.61 * i * i) for i in range(48))
    return Report(
        edgekit_version="0.1.0",
        created_at="2025-11-21T05:30:00Z",
        target={
            "name": TARGET,
            "title": "NVIDIA Jetson Orin Nano 8 GB (Super)",
            "usable_bytes": int(5.2 * 1024 * MIB),
            "context_tokens": 4096,
        },
        recipe={
            "name": "gguf-q4",
            "description": "4-bit K-quants with an importance matrix, for llama.cpp",
            "stages": [{"stage": "convert", "type": "f16"}, {"stage": "quantize", "type": "Q4_K_M"}],
        },
        model={
            "source": "builtin:smollm2-135m",
            "digest": "9f0b" + "3c" * 30,
            "architecture": "llama",
            "parameters": 134_515_008,
            "licence": "apache-2.0",
            "provenance": {"repository": "HuggingFaceTB/SmolLM2-135M-Instruct", "revision": "12fd25f"},
        },
        host={
            "fingerprint": HOST,
            "cpu": "Intel(R) Xeon(R) Processor @ 2.60GHz",
            "cores": 2,
            "os": "Linux 6.1 x86_64",
            "tools": {"llama-cpp-python": "0.3.36", "gguf": "0.19.0"},
        },
        steps=(
            StepRecord(stage="convert", key="ab12" * 16, status="cached", seconds=6.21),
            StepRecord(stage="imatrix", key="cd34" * 16, status="cached", seconds=41.8),
            StepRecord(stage="quantize", key="ef56" * 16, status="executed", seconds=9.75),
            StepRecord(stage="evaluate", key="0a78" * 16, status="executed", seconds=88.4),
            StepRecord(stage="bundle", key="1b90" * 16, status="executed", seconds=0.412),
        ),
        measurements=(
            measured("weight_bytes", 270_885_728, "bytes", of="convert"),
            measured("weight_bytes", 105_454_432, "bytes"),
            predicted("weight_bytes", 105_400_000, "bytes"),
            measured("bundle_bytes", 107_581_214, "bytes"),
            measured("perplexity", 18.214, "perplexity", 48, 0.61, device=HOST),
            measured("source_perplexity", 17.102, "perplexity", 48, 0.57, device=HOST, of="source"),
            measured("perplexity_ratio", 1.065, "ratio", 48, 0.008, device=HOST),
            measured("kl_divergence_nats", 0.0705, "nats", 48, 0.0054, device=HOST),
            measured("kl_divergence_median_nats", 0.0412, "nats", 6096, device=HOST),
            measured("kl_divergence_p99_nats", 0.512, "nats", 6096, device=HOST),
            measured("kl_divergence_max_nats", 2.913, "nats", 6096, device=HOST),
            measured("top1_agreement", 0.8817, "ratio", 6096, 0.0081, device=HOST),
            measured("prefill_tokens_per_s", 214.3, "tokens/s", 5, 6.1, device=HOST),
            measured("decode_tokens_per_s", 62.31, "tokens/s", 5, 1.42, device=HOST),
            predicted("prefill_tokens_per_s", 6120.0, "tokens/s"),
            predicted("decode_tokens_per_s", 248.0, "tokens/s", note="bandwidth bound"),
            predicted("ttft_s", 0.0213, "s"),
            measured("load_s", 0.0871, "s", 5, 0.0042, device=HOST),
            measured("peak_rss_bytes", 322_961_408, "bytes", 5, 1_200_000, device=HOST),
            predicted("kv_cache_bytes", 94_371_840, "bytes"),
            predicted("compute_buffer_bytes", 103_809_024, "bytes"),
            predicted("required_bytes", 360_000_000, "bytes"),
            predicted("usable_bytes", 5.2 * 1024 * MIB, "bytes"),
            measured("first_word_kept", 0.5, "ratio", 12, device="ssh-box"),
        ),
        gates=(
            GateResult(
                name="kl_divergence_nats",
                bound="kl_divergence_nats <= 0.35",
                value=0.0705123,
                passed=True,
                kind="measured",
            ),
            GateResult(
                name="perplexity_ratio",
                bound="perplexity_ratio <= 1.06",
                value=1.0650391,
                passed=False,
                certain=False,
                kind="measured",
            ),
            GateResult(
                name="required_bytes",
                bound="required_bytes <= usable_bytes",
                value=360_000_000,
                passed=True,
                kind="predicted",
            ),
        ),
        tensors=(
            TensorGroup(type="Q8_0", tensors=1, bytes=30_081_024),
            TensorGroup(type="Q4_K", tensors=176, bytes=58_982_400),
            TensorGroup(type="Q6_K", tensors=33, bytes=15_925_248),
            TensorGroup(type="F32", tensors=61, bytes=140_544),
        ),
        fallbacks=tuple(
            Fallback(tensor=f"blk.{i}.attn_k.weight", wanted="Q4_K", found="Q5_0 (192 columns are no multiple of 256)")
            for i in range(30)
        ),
        budget=ByteBudget(
            budget_bytes=105_500_000,
            predicted_divergence_nats=0.0912,
            curve=((80_000_000, 0.61), (90_000_000, 0.2), (110_000_000, 0.07), (140_000_000, 0.004)),
        ),
        memory=(
            MemoryPart(name="weights", bytes=105_454_432),
            MemoryPart(name="KV cache", bytes=94_371_840),
            MemoryPart(name="compute buffers", bytes=103_809_024),
            MemoryPart(name="margin", bytes=56_364_704),
        ),
        divergence_per_window=windows,
        notes=("Latency and memory of the Jetson are predicted: the build ran on another machine.",),
    )


NASTY = (
    '<script>alert(1)</script>"><img src=x onerror=alert(2)>\u202egpj.exe|`]( https://evil.example/ )\n# \x1b[31mred'
)


def hostile() -> Report:
    long = "very-long-name-" * 40
    rtl = "نموذج الاختبار"
    wide = "模型" * 50
    return Report(
        edgekit_version=NASTY,
        created_at=NASTY,
        target={"name": NASTY, "title": NASTY, "usable_bytes": 50, NASTY: {NASTY: [NASTY, {NASTY: NASTY}]}},
        recipe={"name": NASTY, "stages": [{"stage": NASTY}]},
        model={"source": NASTY, "licence": rtl, "wide": wide, "long": long},
        host={"fingerprint": NASTY, "cpu": NASTY},
        device=DeviceRecord(
            fingerprint=long,
            facts={"board": NASTY, NASTY: NASTY},
            engine={NASTY: NASTY},
            board=BoardRecord.model_validate({"start": {"power_mode": NASTY, "temperatures_c": {NASTY: 1e9}}}),
            samples={NASTY: (0.0, 1e300)},
            decode_drift=-1.0,
        ),
        steps=(StepRecord(stage=NASTY, key=NASTY, status="executed", seconds=0),),
        measurements=(
            measured("decode_tokens_per_s", 1e-9, "tokens/s", 1, 0.0, device=NASTY),
            measured("decode_tokens_per_s", 3.0, NASTY, device=long),
            predicted(NASTY, 0.0, NASTY, of=NASTY, note=NASTY),
            predicted("perplexity", 1e300, wide, of=rtl),
        ),
        gates=(GateResult(name=NASTY, bound=NASTY + long, value=-1.5, passed=False, kind="predicted", of=NASTY),),
        tensors=(TensorGroup(type=NASTY, tensors=0, bytes=0),),
        fallbacks=(Fallback(tensor=NASTY, wanted=rtl, found=wide),),
        budget=ByteBudget(budget_bytes=0, predicted_divergence_nats=0.0, curve=((0, 0.0),)),
        memory=(MemoryPart(name=NASTY, bytes=100), MemoryPart(name=wide, bytes=0)),
        divergence_per_window=(0.0,),
        notes=(NASTY, long, wide, rtl),
    )


def minimal() -> Report:
    return Report(edgekit_version="0", created_at="", target={}, recipe={}, model={}, host={})


ALL = pytest.mark.parametrize("report", [realistic(), hostile(), minimal()], ids=["realistic", "hostile", "minimal"])


class Page(HTMLParser):
    """Elements with their attributes, the text outside style sheets, and the nesting checked."""

    VOID = frozenset({"meta", "link", "br", "img", "input"})

    def __init__(self, source: str) -> None:
        super().__init__()
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.text = ""
        self.open: list[str] = []
        self.feed(source)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        names = [name for name, _ in attrs]
        assert len(names) == len(set(names)), f"<{tag}> repeats an attribute"
        self.elements.append((tag, dict(attrs)))
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if self.open and self.open[-1] not in {"style", "title"}:
            self.text += data

    def all(self, tag: str) -> list[dict[str, str | None]]:
        return [attributes for name, attributes in self.elements if name == tag]

    @property
    def words(self) -> str:
        return " ".join(self.text.split())


# --- HTML


def test_the_curve_of_a_budget_is_logarithmic_and_marks_the_choice():
    svg = figures.falling_curve([(0, 1.0), (100, 0.1), (200, 0.01)], (100, 0.1), "t")
    lines = re.findall(r'<line class="mean" x1="([\d.]+)%" y1="([\d.]+)" x2="([\d.]+)%" y2="([\d.]+)"', svg)
    (x1, y1, x2, y2), (x3, y3, x4, y4) = [tuple(map(float, line)) for line in lines]
    # equal factors are equal heights, equal bytes equal widths
    assert (x2, y2) == (x3, y3)
    assert x2 - x1 == pytest.approx(x4 - x3)
    assert y2 - y1 == pytest.approx(y4 - y3)
    assert f'<circle class="chosen" cx="{x2:.3f}%" cy="{y2:.1f}"' in svg


def test_a_report_with_a_budget_says_what_was_predicted_within_it():
    report = realistic()
    page = html.render(report)
    assert "Types within 101 MiB" in Page(page).words
    assert "0.0912 nats were predicted within 101 MiB" in markdown.render(report)
    assert "Types within" not in html.render(minimal())


@ALL
def test_html_loads_and_runs_nothing(report):
    source = html.render(report)
    page = Page(source)
    tags = {tag for tag, _ in page.elements}
    assert not tags & {"script", "img", "link", "a", "iframe", "object", "embed", "form", "base", "image", "use"}
    for _tag, attributes in page.elements:
        assert not attributes.keys() & {"src", "href", "xlink:href", "srcset", "action", "style"}
        assert not [name for name in attributes if name.startswith("on")]
    style = source[source.index("<style>") : source.index("</style>")]
    assert set(re.findall(r"url\(([^)]*)\)", style)) == {"#hatch"}
    assert "@import" not in style


@ALL
def test_html_has_a_strict_content_security_policy(report):
    metas = Page(html.render(report)).all("meta")
    policy = [meta["content"] for meta in metas if meta.get("http-equiv") == "Content-Security-Policy"]
    assert policy == ["default-src 'none'; style-src 'unsafe-inline'; img-src data:"]


def test_html_shows_hostile_text_as_text():
    source = html.render(hostile())
    page = Page(source)
    assert "<script>alert(1)</script>" in page.text
    assert "\u202e" not in source
    assert "\x1b" not in source
    assert r"\u202egpj.exe" in page.text
    assert "نموذج" in page.text


@ALL
def test_html_is_accessible(report):
    page = Page(html.render(report))
    assert page.all("html") == [{"lang": "en"}]
    assert len(page.all("h1")) == 1
    assert all(header.get("scope") in {"col", "row"} for header in page.all("th"))
    for svg in page.all("svg"):
        hidden = svg.get("aria-hidden") == "true"
        assert hidden or (svg.get("role") == "img" and svg.get("aria-label"))
    headings = [int(tag[1]) for tag, _ in page.elements if re.fullmatch("h[1-6]", tag)]
    assert headings[0] == 1
    ids = [attributes["id"] for _, attributes in page.elements if "id" in attributes]
    assert len(ids) == len(set(ids))
    labelled = [attributes["aria-labelledby"] for _, attributes in page.elements if "aria-labelledby" in attributes]
    assert set(labelled) <= set(ids)


def test_html_sections_come_in_reading_order():
    page = html.render(realistic())
    order = ["<h1>", 'class="tiles"', 'id="memory"', 'id="tensors"', 'id="divergence"', 'id="gates"', 'id="steps"']
    places = [page.index(mark) for mark in [*order, 'id="measurements"', 'id="provenance"']]
    assert places == sorted(places)


def test_html_tells_measured_from_predicted():
    page = Page(html.render(realistic()))
    assert "62.3 [60.9, 63.7] tokens/s measured on Intel Xeon Processor @ 2.60GHz (build host), n = 5" in page.words
    assert "≈ 248 tokens/s predicted for NVIDIA Jetson Orin Nano 8 GB (Super)" in page.words
    assert "Failed gate: perplexity_ratio <= 1.06, found 1.065039 (measured)." in page.words


def test_no_rendering_prints_a_prediction_without_its_mark():
    value = "777"
    report = minimal().model_copy(update={"measurements": (predicted("decode_tokens_per_s", 777.0, "tokens/s"),)})
    for text in (Page(html.render(report)).words, markdown.render(report), terminal(report)):
        assert value in text
        assert re.findall(rf"(?<!≈ ){value}", text) == []
        assert "predicted" in text
        assert not re.search(rf"{value}[^.]*measured", text.split("A figure marked")[0].split("All measurements")[0])


def test_an_uncertain_gate_says_so_everywhere():
    report = realistic()
    certain = report.model_copy(update={"gates": tuple(g for g in report.gates if g.certain)})
    for make in (html.render, markdown.render, terminal):
        assert "uncertain" in make(report)
        assert "uncertain" not in make(certain)


def test_long_fallback_lists_are_collapsed_and_short_ones_are_not():
    long = realistic()
    short = long.model_copy(update={"fallbacks": long.fallbacks[:2]})
    assert len(Page(html.render(long)).all("details")) == 1
    assert Page(html.render(short)).all("details") == []
    for report in (long, short):
        assert f"{len(report.fallbacks)} tensors could not take the wanted type" in Page(html.render(report)).words


def test_html_says_by_how_much_a_model_does_not_fit():
    report = realistic()
    small = report.model_copy(update={"target": {**report.target, "usable_bytes": 300 * MIB}})
    words = Page(html.render(small)).words
    assert "Does not fit: 43.3 MiB more than the 300 MiB" in words
    assert "Does not fit" not in Page(html.render(report)).words
    assert 'class="limit"' in html.render(small)


def test_html_stays_small():
    assert len(html.render(realistic()).encode()) < 60_000


# --- SVG


def rectangles(svg: str, style: str) -> list[dict[str, float]]:
    found = re.findall(rf'<rect class="{style}" ([^>]*)>', svg)
    return [{name: float(value) for name, value in re.findall(r'(\w+)="([\d.]+)%?"', text)} for text in found]


def test_stacked_bar_is_to_scale():
    parts = [figures.Segment("a", 30, "m1"), figures.Segment("b", 50, "m2"), figures.Segment("<c>", 20, "free")]
    svg = figures.bar_stack(parts, 100, '"quoted" <title>')
    assert rectangles(svg, "m1")[0]["width"] == 30
    assert rectangles(svg, "m2")[0] == {"x": 30, "y": 8, "width": 50, "height": 36}
    assert "&lt;c&gt;" in svg
    assert "<c>" not in svg
    assert "&quot;quoted&quot; &lt;title&gt;" in svg
    assert "limit" not in svg
    over = figures.bar_stack(parts, 40, "t")
    assert rectangles(over, "m2")[0]["width"] == 50
    assert 'class="limit" x1="40.000%"' in over


def test_columns_are_to_scale():
    svg = figures.columns_with_band([1.0, 4.0, 0.0], 2.0, 1.5, 2.5, "t")
    low, high, zero = (column["height"] for column in rectangles(svg, "column"))
    assert high == 4 * low == 170
    assert zero == 0
    assert rectangles(svg, "band")[0]["height"] == pytest.approx(170 / 4, abs=0.11)
    assert '<line class="mean" x1="0" x2="100%" y1="95.0" y2="95.0"/>' in svg


@pytest.mark.parametrize("values", [[], [0.0], [0.0] * 500])
def test_columns_without_height_are_drawn(values):
    assert figures.columns_with_band(values, 0, 0, 0, "t").endswith("</svg>")


@given(st.floats(1e-9, 1e15))
def test_ticks_are_round_and_within_the_limit(limit):
    found = ticks(limit)
    assert 3 <= len(found) <= 7
    assert found[0] == 0
    assert found[-1] <= limit * (1 + 1e-6)
    step = found[1] / 10.0 ** math.floor(math.log10(found[1]) + 1e-9)
    assert min(abs(step - nice) for nice in (1, 2, 5, 10)) < 1e-6


# --- formatting


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        (0, "0"),
        (1e-9, "1.00e-09"),
        (0.03124, "0.0312"),
        (-0.5, "-0.500"),
        (17.42, "17.4"),
        (1234567, "1,234,567"),
        (99.96, "100"),
        (1e300, "1.00e+300"),
    ],
)
def test_number(value, expected):
    assert number(value) == expected


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        (0, "0 bytes"),
        (512, "512 bytes"),
        (1024, "1.00 KiB"),
        (1024**2 - 1, "1.00 MiB"),
        (105_454_432, "101 MiB"),
        (5.25 * 1024**3, "5.25 GiB"),
        (-2048, "-2.00 KiB"),
        (1024**7, "1,048,576 PiB"),
    ],
)
def test_bytes_text(value, expected):
    assert bytes_text(value) == expected


@pytest.mark.parametrize(
    ("value", "expected"),
    [(0, "0 s"), (2e-6, "2.00 µs"), (0.0871, "87.1 ms"), (9.75, "9.75 s"), (250.4, "4 min 10 s"), (119.9, "120 s")],
)
def test_seconds_text(value, expected):
    assert seconds_text(value) == expected


@pytest.mark.parametrize(
    ("fraction", "expected"),
    [(0, "0%"), (0.912, "91.2%"), (1, "100%"), (0.9997, "99.97%"), (0.99999, "99.999%"), (1.5, "150.0%")],
)
def test_percent_rounds_to_100_only_when_it_is(fraction, expected):
    assert percent(fraction) == expected


@pytest.mark.parametrize(
    ("name", "unit", "value", "low", "high", "expected"),
    [
        ("kl_divergence_nats", "nats", 0.0312, 0.0290, 0.0334, "0.0312 [0.0290, 0.0334] nats"),
        ("kl_divergence_nats", "nats", 0.0, 0.0, 0.0, "0 nats"),
        ("kl_divergence_nats", "nats", 3e-7, 1e-7, 5e-7, "3.00e-07 [1.00e-07, 5.00e-07] nats"),
        ("kl_divergence_nats", "nats", 0.25, None, None, "0.250 nats"),
        ("kl_divergence_nats", "nats", 0.1, -0.1, 0.3, "0.10 [-0.10, 0.30] nats"),
        ("top1_agreement", "ratio", 0.9115, 0.906, 0.917, "91.15 [90.60, 91.70] %"),
        ("top1_agreement", "ratio", 0.912, None, None, "91.2%"),
        ("top1_agreement", "ratio", 0.99996, None, None, "99.996%"),
        ("perplexity_ratio", "ratio", 1.065, None, None, "1.06\N{MULTIPLICATION SIGN}"),
        ("perplexity", "perplexity", 18.2139, None, None, "18.2"),
        ("decode_tokens_per_s", "tokens/s", 62.31, 60.89, 63.73, "62.3 [60.9, 63.7] tokens/s"),
        ("decode_tokens_per_s", "tokens/s", 1200, 950, 1450, "1,200 [950, 1,450] tokens/s"),
        ("load_s", "s", 0.0871, 0.0829, 0.0913, "87.1 [82.9, 91.3] ms"),
        ("peak_rss_bytes", "bytes", 2**30, 2**30 - 2**20, 2**30 + 2**20, "1.00000 [0.99902, 1.00098] GiB"),
        ("made_up", "widgets", 12.0, None, None, "12.0 widgets"),
    ],
)
def test_shown(name, unit, value, low, high, expected):
    m = Measurement(name=name, value=value, unit=unit, kind="measured", ci_low=low, ci_high=high)
    assert shown(m).text == expected
    assert shown(m.model_copy(update={"kind": "predicted"})).text == "≈ " + expected


@given(st.floats(1e-6, 1e12), st.floats(1e-5, 1.0))
def test_rounding_keeps_the_interval_apart(value, spread):
    half = value * spread
    m = Measurement(name="x", value=value, unit="W", kind="measured", n=9, ci_low=value - half, ci_high=value + half)
    texts = [shown(m).value, *shown(m).interval.strip("[]").split(", ")]
    middle, low, high = (float(text.replace(",", "")) for text in texts)
    assert low <= middle <= high
    # two digits of the half-width or six of the value survive, and whole numbers are never cut
    tolerance = max(half * 0.06, value * 5.1e-6, 0 if value < 1e-4 else 1e-15) + (0.51 if half >= 10 else 0)
    if value >= 1e-4:
        assert abs(middle - value) <= tolerance


def test_values_beside_bounds_show_which_side_they_are_on():
    assert figures.exact("kl_divergence_nats", 0.3500012) == "0.3500012"
    assert figures.exact("weight_bytes", 105_454_432) == "105,454,432 (101 MiB)"
    assert figures.exact("made_up", 3.0) == "3"


def test_clean_keeps_words_and_shows_what_is_invisible():
    assert figures.clean("naïve 模型 عربي") == "naïve 模型 عربي"
    assert figures.clean("a\nb\x1b\u2066\ud800") == r"a\nb\x1b\u2066\ud800"
    assert figures.shorten("abcdefghij", 7) == "abcd…ij"


# --- what the report says


def test_verdict_counts_gates():
    gate = realistic().gates[0]
    assert (verdict(realistic()).word, verdict(realistic()).detail) == ("Failed", "1 of 3 gates failed")
    assert verdict(realistic().model_copy(update={"gates": (gate,)})).detail == "1 gate passed"
    assert verdict(minimal()).word == "Built"


def test_pick_prefers_the_bundle_for_each_kind():
    report = realistic()
    assert [(m.kind, m.value) for m in pick(report, "weight_bytes")] == [
        ("measured", 105_454_432),
        ("predicted", 105_400_000),
    ]
    only_steps = report.model_copy(update={"measurements": report.measurements[:1]})
    assert [m.of for m in pick(only_steps, "weight_bytes")] == ["convert"]
    (source,) = pick(report, "source_perplexity")
    on_the_way = source.model_copy(update={"of": "import", "value": 99.0})
    ours = source.model_copy(update={"of": "bundle"})
    mixed = report.model_copy(update={"measurements": (on_the_way, ours)})
    assert pick(mixed, "source_perplexity") == [ours]


def test_key_figures_put_host_and_target_side_by_side():
    tiles = {tile.title: tile for tile in key_figures(realistic())}
    assert list(tiles) == ["Size", "KL divergence", "Perplexity", "Top-1 agreement", "Decode speed", "Peak memory"]
    assert [reading.label for reading in tiles["Decode speed"].readings] == [
        "measured on Intel Xeon Processor @ 2.60GHz (build host)",
        "predicted for NVIDIA Jetson Orin Nano 8 GB (Super)",
    ]
    assert [reading.name for reading in tiles["Peak memory"].readings] == ["peak_rss_bytes", "required_bytes"]
    assert tiles["Perplexity"].context == "source 17.10, relative 1.0650\N{MULTIPLICATION SIGN}"
    assert key_figures(minimal()) == []


def test_the_device_that_measured_is_named_with_its_state():
    assert device_line(realistic()) == device_line(minimal()) == ""
    state = {"power_mode": "15W", "temperatures_c": {"cpu": 41.0, "gpu": 47.6}}
    hot = {**state, "temperatures_c": {"cpu": 63.2}}
    board = BoardRecord.model_validate({"start": state, "end": hot, "throttled": False})
    device = DeviceRecord(fingerprint="pi #1", facts={"cpu": "A76", "board": "Acme(R) Pi"}, engine={}, samples={})
    report = realistic().model_copy(update={"device": device})
    assert device_line(report) == "device: Acme Pi"
    assert device_text(report, "pi #1") == "Acme Pi"
    assert device_text(report, HOST).endswith("(build host)")
    told = device.model_copy(update={"board": board, "decode_drift": 0.0123})
    assert device_line(report.model_copy(update={"device": told})) == (
        "device: Acme Pi; power mode: 15W; throttled: no; temperature: 48 to 63 °C; "
        "decode speed from the first repeat to the last: +1.2%"
    )
    here = report.model_copy(update={"host": {"fingerprint": "pi #1", "cpu": "A76"}})
    assert device_line(here) == "device: A76 (build host)"


def test_sentence_uses_only_what_is_there():
    assert sentence(minimal()) == "The build recorded no measurements."
    one = minimal().model_copy(update={"measurements": (measured("bundle_bytes", 3 * MIB, "bytes"),)})
    assert sentence(one) == "The bundle takes 3.00 MiB."
    full = sentence(realistic())
    assert "keeps the source's first choice of token 88.17% of the time" in full
    assert "decodes 62.3 tokens/s on the build host; on NVIDIA Jetson" in full
    assert full.endswith("it should decode ≈ 248 tokens/s and need ≈ 343 MiB of the 5.20 GiB usable (predicted).")
    small = realistic().model_copy(update={"target": {"usable_bytes": 300 * MIB}, "measurements": ()})
    assert sentence(small) == ("On unnamed target it should need ≈ 343 MiB, more than the 300 MiB usable (predicted).")


def test_rows_group_by_figure_and_what_it_is_of():
    found = {(row.name, row.of): row for row in rows(realistic())}
    assert len(found[("decode_tokens_per_s", "bundle")].measured) == 1
    assert len(found[("decode_tokens_per_s", "bundle")].predicted) == 1
    assert ("weight_bytes", "convert") in found
    assert list(found)[-1] == ("first_word_kept", "bundle")
    assert found[("first_word_kept", "bundle")].title == "first word kept"
    assert sum(len(row.measured) + len(row.predicted) for row in found.values()) == len(realistic().measurements)


def test_memory_on_target_copes_with_what_is_missing():
    memory = memory_on_target(realistic())
    assert memory is not None
    assert memory.required_bytes == 360_000_000
    assert memory.free_bytes == memory.usable_bytes - 360_000_000
    assert memory.segments[-1].style == "margin"
    unknown = memory_on_target(realistic().model_copy(update={"target": {}}))
    assert (unknown.usable_bytes, unknown.free_bytes, unknown.over_bytes) == (None, 0, 0)
    assert memory_on_target(minimal()) is None


# --- Markdown


@ALL
def test_markdown_tables_are_well_formed(report):
    for block in markdown.render(report).split("\n\n"):
        if not block.startswith("|"):
            continue
        lines = block.strip().split("\n")
        cells = [re.split(r"(?<!\\)\|", line)[1:-1] for line in lines]
        assert len({len(row) for row in cells}) == 1
        assert all(re.fullmatch(r" -{3}:? ", cell) for cell in cells[1])
        assert all(line.startswith("| ") and line.endswith(" |") for line in lines)


@ALL
def test_markdown_has_no_markup_from_the_report(report):
    text = markdown.render(report)
    assert re.findall(r"<(?!/?(?:br|details|summary)>)[a-zA-Z/!]", text) == []
    assert re.findall(r"(?<!\\)://", re.sub(r"`[^`]*`", "", text)) == []
    assert re.findall(r"(?<!\\)\]\(", text) == []
    assert "\x1b" not in text
    assert "\u202e" not in text
    assert text.endswith("\n")


def test_markdown_says_measured_and_predicted():
    text = markdown.render(realistic())
    assert "| **Decode speed** | 62.3 \\[60.9, 63.7\\] tokens/s | **measured** | on Intel" in text
    assert "| ≈ 248 tokens/s | *predicted* | for NVIDIA Jetson" in text
    assert "**Failed: 1 of 3 gates failed.**" in text


@pytest.mark.parametrize("value", ["a|b", "a`b", "<b>", "", "  ", "[x](y)"])
def test_only_plain_identifiers_become_code(value):
    assert not markdown.code(value).startswith("`")


# --- terminal


def terminal(report: Report, width: int = 80, encoding: str = "utf-8") -> str:
    raw = io.BytesIO()
    with io.TextIOWrapper(raw, encoding=encoding, write_through=True) as file:
        show(report, Console(file=file, width=width, force_terminal=False))
        file.flush()
        return raw.getvalue().decode(encoding)


@ALL
@pytest.mark.parametrize("width", [80, 200])
def test_terminal_lines_fit_80_columns(report, width):
    lines = terminal(report, width).split("\n")
    assert max(cell_len(line) for line in lines) <= 80
    assert not any("\x1b" in line for line in lines)


def test_terminal_shows_verdict_figures_gates_and_memory():
    text = terminal(realistic())
    assert text.startswith("Failed: 1 of 3 gates failed\n")
    assert re.search(r"Decode speed +62\.3 \[60\.9, 63\.7\] tokens/s +measured +build host, n = 5\n", text)
    assert re.search(r"\n +≈ 248 tokens/s +predicted +jetson-orin-nano-8gb\n", text)
    assert re.search(r"FAIL +perplexity_ratio <= 1\.06 +1\.065039 +measured", text)
    assert "≈ 343 MiB of 5.20 GiB usable" in text
    assert "free 4.86 GiB" in text
    assert len(text.splitlines()) <= 36


def test_terminal_bar_has_the_width_of_the_terminal():
    for report in (realistic(), hostile()):
        bar = next(line for line in terminal(report).split("\n") if line.startswith("  [") and line.endswith("]"))
        assert cell_len(bar) == 80


def test_terminal_markup_in_names_is_text():
    report = minimal().model_copy(update={"model": {"source": "[bold red]x[/] :smile:"}})
    assert "[bold red]x[/] :smile:" in terminal(report)


def test_terminal_survives_a_narrow_character_set():
    assert "? 248 tokens/s" in terminal(realistic(), encoding="ascii")


# --- on disk


@ALL
def test_report_survives_the_disk(report, tmp_path):
    out = tmp_path / "a" / "b"
    write_report(report, out)
    assert sorted(path.name for path in out.iterdir()) == ["report.html", "report.json", "report.md"]
    assert read_report(out) == read_report(out / "report.json") == report
    first = (out / "report.json").read_bytes()
    write_report(read_report(out), out)
    assert (out / "report.json").read_bytes() == first


def test_json_is_canonical():
    text = to_json(realistic())
    value = json.loads(text)
    assert text.endswith("}\n")
    assert text == json.dumps(value, indent=2, sort_keys=True) + "\n"
    with pytest.raises(ValueError, match="not JSON compliant"):
        to_json(minimal().model_copy(update={"divergence_per_window": (math.nan,)}))


def test_schema_is_published_as_it_is():
    published = json.loads(SCHEMA.read_text("utf-8"))
    assert published == report_schema(), f"write json.dumps(report_schema(), indent=2) and a newline to {SCHEMA}"


@ALL
def test_reports_are_valid_by_their_schema(report):
    jsonschema.Draft202012Validator.check_schema(report_schema())
    jsonschema.validate(json.loads(to_json(report)), report_schema())


@pytest.mark.parametrize(
    "change",
    [{"surprise": 1}, {"gates": [{"name": "x"}]}, {"schema_version": 2}, {"steps": "none"}, {"edgekit_version": None}],
)
def test_schema_and_reader_refuse_the_same(change, tmp_path):
    value = {**json.loads(to_json(minimal())), **change}
    with pytest.raises(jsonschema.ValidationError):
        jsonschema.validate(value, report_schema())
    (tmp_path / "report.json").write_text(json.dumps(value))
    with pytest.raises(InputError):
        read_report(tmp_path)


@pytest.mark.parametrize(
    ("text", "found"),
    [
        ("", "Expecting value"),
        ("{", "Expecting property name"),
        ("[]", "without a schema_version"),
        ("{}", "without a schema_version"),
        ('{"schema_version": true}', "without a schema_version"),
        ('{"schema_version": 1, "schema_version": 1}', "given twice"),
        ('{"schema_version": 1, "x": NaN}', "NaN is not a JSON number"),
        ('{"schema_version": 1}', "edgekit_version: Field required"),
        ('{"schema_version": 99}', "version 99, from a newer edgekit"),
        ("[" * 100_000, "recursion"),
        (b"\xff\xfe\xfa", ""),
    ],
)
def test_malformed_reports_are_input_errors(text, found, tmp_path):
    file = tmp_path / "report.json"
    file.write_bytes(text if isinstance(text, bytes) else text.encode())
    with pytest.raises(InputError) as error:
        read_report(file)
    assert found in error.value.found
    assert str(file) in error.value.wanted


def test_missing_and_wrongly_typed_reports_are_input_errors(tmp_path):
    with pytest.raises(InputError, match="No such file"):
        read_report(tmp_path / "none.json")
    value = json.loads(to_json(realistic()))
    value["memory"][0]["bytes"] = "105454432"
    (tmp_path / "report.json").write_text(json.dumps(value))
    with pytest.raises(InputError, match=r"memory\.0\.bytes"):
        read_report(tmp_path)


def test_terminal_cuts_neither_targets_nor_bounds():
    report = realistic()
    target = {**report.target, "name": "jetson-orin-nano-super"}
    speed = Measurement(
        name="decode_tokens_per_s",
        value=104.0,
        unit="tokens/s",
        kind="predicted",
        ci_low=94.9,
        ci_high=110.7,
        device=target["name"],
    )
    bound = "kl_divergence_nats <= 0.0001"
    gate = GateResult(
        name="kl_divergence_nats", bound=bound, value=2.12218e-06, passed=True, kind="measured", of="convert"
    )
    text = terminal(report.model_copy(update={"target": target, "measurements": (speed,), "gates": (gate,)}))
    assert "jetson-orin-nano-super" in text
    assert f"convert: {bound}" in text
    assert "…" not in text


def test_a_contended_speed_says_so_wherever_it_stands():
    note = "load; contended: others took 40% of the CPU, this process ran on 1.1 cores"
    speed = measured("decode_tokens_per_s", 8.6, "tokens/s", 5, 2.0, device=HOST, note=note)
    report = realistic().model_copy(update={"measurements": (speed,), "notes": ()})
    assert "(contended)" in sentence(report)
    (tile,) = [figure for figure in key_figures(report) if figure.title == "Decode speed"]
    assert tile.context == "contended: others took 40% of the CPU, this process ran on 1.1 cores"
    assert "contended: others took 40%" in terminal(report)
    quiet = report.model_copy(update={"measurements": (speed.model_copy(update={"note": "load"}),)})
    assert all("contended" not in text for text in (sentence(quiet), terminal(quiet), markdown.render(quiet)))


def test_steps_say_what_they_evaluate():
    steps = tuple(
        StepRecord(stage="evaluate", of=of, key="ab" * 32, status="executed", seconds=1.0)
        for of in ("import", "convert", "bundle")
    )
    report = realistic().model_copy(update={"steps": steps})
    for page in (markdown.render(report), html.render(report)):
        assert all(f"evaluate {step.of}" in page for step in steps)
