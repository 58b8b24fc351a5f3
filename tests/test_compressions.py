"""Every format through the whole command: build, check the bundle, open it with a program that is not ours, run it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import adapters
import pytest
import tiny

from edgekit.adapter import resolve_adapter
from edgekit.bundle import open_bundle
from edgekit.recipe import find_recipe, recipe_names
from edgekit.store import Store
from edgekit.support import refusal, support_table
from edgekit.target import all_targets

SETTINGS = (
    "--set", "evaluation.windows=2", "--set", "evaluation.window_tokens=64", "--context", "256",
)  # fmt: skip
CALIBRATION = {
    "gptq-4bit": ("gptq",),
    "awq-4bit": ("awq",),
    "onnx-int4": ("gptq",),
    "onnx-best": ("sensitivity", "onnx_round"),
}
BUDGET = {"onnx-best": ("--set", "onnx_round.bits_per_weight=8")}
"""A graph's own bytes are many beside so few weights."""


def build(model: Path, recipe: str, out: Path, *more: str | Path, target: str = "generic-x86") -> Any:
    """Build a tiny model; a random one may miss a gate, but nothing else may go wrong."""
    quick = [
        part
        for stage in CALIBRATION.get(recipe, ())
        for field, value in (("windows", 2), ("window_tokens", 64))
        for part in ("--set", f"{stage}.{field}={value}")
    ]
    done = tiny.edgekit(
        "build", model, "--target", target, "--recipe", recipe, "--out", out, "--json",
        *SETTINGS, *quick, *BUDGET.get(recipe, ()), *more,
    )  # fmt: skip
    assert done.code in (0, 3), done.stderr
    return done.json["targets"][0]


def figures(built: Any, kind: str = "measured") -> dict[str, float]:
    return {m["name"]: m["value"] for m in built["measurements"] if m["kind"] == kind and m["of"] == "bundle"}


def open_with_transformers(path: Path) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(path, local_files_only=True)
    model = AutoModelForCausalLM.from_pretrained(path, local_files_only=True)
    tokens = tokenizer("def add(a, b):", return_tensors="pt")
    assert model(**tokens).logits.isfinite().all()


def open_with_genai(path: Path) -> None:
    import onnxruntime_genai as genai

    model = genai.Model(str(path))
    tokenizer = genai.Tokenizer(model)
    options = genai.GeneratorParams(model)
    options.set_search_options(max_length=16, do_sample=False)
    generator = genai.Generator(model, options)
    generator.append_tokens(tokenizer.encode("def add"))
    generator.generate_next_token()
    assert len(generator.get_sequence(0)) > 1


RECIPES = {
    "nf4": (open_with_transformers, 0.6),
    "gptq-4bit": (open_with_transformers, 0.6),
    "awq-4bit": (open_with_transformers, 0.6),
    "onnx-fp32": (open_with_genai, 1e-4),
    "onnx-fp16": (open_with_genai, 1e-2),
    "onnx-int8": (open_with_genai, 0.05),
    "onnx-int4": (open_with_genai, 0.6),
    "onnx-best": (open_with_genai, 0.6),
}
"""What opens each bundle besides us, and a bound on its divergence that breakage would exceed."""


def test_every_recipe_is_built_somewhere() -> None:
    assert {name for name in recipe_names() if not name.startswith("gguf-")} == set(RECIPES)


@pytest.mark.parametrize(
    "recipe", [pytest.param(name, marks=pytest.mark.slow if name in CALIBRATION else ()) for name in sorted(RECIPES)]
)
def test_a_bundle_is_what_others_open(recipe: str, tiny_hf: Path, empty_store: Store, tmp_path: Path) -> None:
    opens, bound = RECIPES[recipe]
    built = build(tiny_hf, recipe, tmp_path / "dist")
    bundle = open_bundle(Path(built["bundle"]))
    bundle.verify()
    opens(bundle.model)
    measured = figures(built)
    assert measured["kl_divergence_nats"] < bound
    assert figures(built, "predicted").keys().isdisjoint({"weight_bytes"})
    asked = ("plan", tiny_hf, "--target", "generic-x86", "--recipe", recipe, "--json", *BUDGET.get(recipe, ()))
    planned = tiny.edgekit(*asked).json["targets"][0]
    # of a budget the choice cannot be planned, only the size
    near = 0.05 if recipe in BUDGET else 0.01
    assert planned["memory"]["weight_bytes"] == pytest.approx(measured["weight_bytes"], rel=near)
    answer = tiny.edgekit("run", bundle.path, "--raw", "--max-tokens", "4", "--json", "def add(a, b):")
    assert answer.code == 0, answer.stderr
    assert 0 <= answer.json["tokens"] <= 4
    report = json.loads((bundle.path / "report.json").read_text())
    assert sum(group["bytes"] for group in report["tensors"]) == measured["weight_bytes"]
    assert all(step["peak_rss_bytes"] > 1 << 20 for step in report["steps"])
    assert (
        "other programs" in (bundle.path / "README.md").read_text()
        or "programs run it" in (bundle.path / "README.md").read_text()
    )


def test_an_adapter_is_merged_before_everything_else(tiny_hf: Path, empty_store: Store, tmp_path: Path) -> None:
    with adapters.quiet():
        place = adapters.train(tiny_hf, tmp_path / "lora", adapters.config_of("lora"))
    more = ("--set", "merge.windows=2", "--set", "merge.window_tokens=48")
    built = build(tiny_hf, "gguf-q8", tmp_path / "dist", "--adapter", place, *more, target="jetson")
    assert [step["stage"] for step in built["steps"]][:3] == ["checkpoint", "merge", "reference"]
    merged = {m["name"]: m["value"] for m in built["measurements"] if m["of"] == "merge"}
    assert merged["max_logit_difference"] < 1.3e-4 < merged["logit_change"]
    assert {"loss_original_nats", "loss_nf4_nats"} <= merged.keys()
    # against the merged model, not against the base
    assert figures(built)["kl_divergence_nats"] < 0.02
    assert open_bundle(Path(built["bundle"])).manifest.model["adapters"][0]["method"] == "lora"


def test_a_prompt_adapter_and_a_system_prompt_ship_as_a_computed_beginning(
    tiny_hf: Path, empty_store: Store, tmp_path: Path
) -> None:
    with adapters.quiet():
        place = adapters.train(tiny_hf, tmp_path / "prompt", adapters.config_of("prompt"))
    plain = build(tiny_hf, "gguf-q8", tmp_path / "plain", target="jetson")
    built = build(tiny_hf, "gguf-q8", tmp_path / "dist", "--adapter", place, target="jetson")
    ask = ("--raw", "--max-tokens", "12", "--json", "def add(a, b):")
    without, behind = (tiny.edgekit("run", b["bundle"], *ask) for b in (plain, built))
    assert without.code == behind.code == 0, behind.stderr
    bundle = open_bundle(Path(built["bundle"]))
    assert bundle.settings.prefix in bundle.manifest.files
    assert without.json["text"] != behind.json["text"]
    (bundle.path / str(bundle.settings.prefix)).write_bytes(b"no state")
    assert tiny.edgekit("run", bundle.path, *ask).code == 2


def test_an_adapter_of_another_model_is_refused_before_any_work(
    tiny_hf: Path, tiny_288: Path, empty_store: Store, tmp_path: Path
) -> None:
    with adapters.quiet():
        place = adapters.train(tiny_hf, tmp_path / "lora", adapters.config_of("lora"))
    done = tiny.edgekit("build", tiny_288, "--target", "jetson", "--adapter", place, "--out", tmp_path / "dist")
    assert done.code == 2
    assert "576" in done.stderr
    assert "512" in done.stderr
    assert not (tmp_path / "dist").exists()


class TestSupport:
    def test_a_build_is_refused_where_the_table_says_so(self, tiny_hf: Path, empty_store: Store) -> None:
        refused = [cell for cell in support_table() if cell.refused is not None]
        assert refused
        for cell in refused[:: max(1, len(refused) // 6)]:
            done = tiny.edgekit("plan", tiny_hf, "--target", cell.target, "--recipe", cell.recipe)
            assert done.code == 2
            assert str(cell.refused)[:40] in " ".join(done.stderr.split())

    def test_every_default_is_supported(self) -> None:
        for target in all_targets():
            assert refusal(find_recipe(target.default_recipe), target) is None

    def test_the_command_prints_the_table(self) -> None:
        listed = {row["name"]: row for row in tiny.edgekit("recipes", "list", "--json").json}
        assert set(listed) == set(recipe_names())
        assert "raspberry-pi-5" in listed["nf4"]["refused_on"]
        assert "jetson-orin-nano-super" in listed["nf4"]["runs_on"]
        assert "refused on" in tiny.edgekit("recipes", "list").stdout


def test_a_stage_that_needs_more_memory_than_the_host_has_is_refused(
    tiny_hf: Path, empty_store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    import psutil

    class Small:
        total = 1 << 28

    monkeypatch.setattr(psutil, "virtual_memory", Small)
    done = tiny.edgekit("plan", tiny_hf, "--target", "jetson")
    assert done.code == 4
    assert "the machine that builds" in done.stderr


def test_an_engine_states_its_cache_types(tiny_hf: Path) -> None:
    done = tiny.edgekit("plan", tiny_hf, "--target", "generic-x86", "--recipe", "onnx-int4", "--kv-type", "q8_0")
    assert done.code == 2
    assert "f32" in done.stderr


def test_what_onnx_cannot_take_is_refused_before_any_work(tiny_hf: Path, empty_store: Store) -> None:
    plan = ("plan", tiny_hf, "--target", "generic-x86", "--recipe", "onnx-int4")
    for setting, told in (
        ("gptq.act_order=true", "act-order"),
        ("gptq.bits=3", "gptq-int3"),
        ("onnx.precision=fp16", "fp16"),
    ):
        done = tiny.edgekit(*plan, "--set", setting)
        assert done.code == 2
        assert told in done.stderr
    beginning = tiny.edgekit(*plan, "--system", "Be brief.")
    assert beginning.code == 2
    assert "a recipe that makes GGUF" in beginning.stderr


def test_a_weight_belongs_to_its_adapter_whatever_stands_before_it(tiny_hf: Path, tmp_path: Path) -> None:
    with adapters.quiet():
        prompt = adapters.train(tiny_hf, tmp_path / "prompt", adapters.config_of("prompt"))
        lora = adapters.train(tiny_hf, tmp_path / "lora", adapters.config_of("lora"))
    given = [resolve_adapter(text) for text in (str(prompt), f"{lora}=0.5")]
    (merge,) = (params for stage, params in find_recipe("gguf-q8", None, given).stages if stage.name == "merge")
    assert merge.model_dump()["weights"] == (1.0, 0.5)
