"""The pair from end to end on a tiny model: train a verifier, build with it, answer with it."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny

from edgekit.bundle import open_bundle, open_engine, open_verifier
from edgekit.companions.rollouts import collect, read_states
from edgekit.decode import Options, Sampling, Session, strategy_names, streams
from edgekit.engine import EngineOptions
from edgekit.engines import find_engine
from edgekit.tasks import find_task
from edgekit.verifier import Head, RandomVerifier, read_heldout, read_manifest

PROMPTS = [f"{a} owl{'s' * (a > 1)} and {b} foxes count the stars" for a in range(1, 9) for b in range(1, 9)]
NAMES = "strategies.names=[greedy, majority, weighted, best-of-n, vgb]"
CUTS = ("--set", "strategies.problems=3", "--set", "strategies.candidates=[2]", "--set", NAMES)


@dataclass(frozen=True)
class Pair:
    """What `train verifier` and `build --verifier` left."""

    verifier: Path
    bundle: Path
    task: str
    trained: Any
    built: Any


@pytest.fixture(scope="module")
def task(bundles: Any, tmp_path_factory: pytest.TempPathFactory) -> str:
    """Problems that a random model gets right about half the time: its answer has some pair of letters."""
    with find_engine("llama_cpp").open_model(bundles.model, EngineOptions(context_tokens=512, sequences=8)) as engine:
        options = Options(candidates=32, max_tokens=256, sampling=Sampling(temperature=0.7, top_p=0.95))
        session = Session(engine, engine.tokenize(PROMPTS[0], special=True), options)
        texts = [node.text for node in session.draw(32)]
        session.close()
    pairs = {text[i : i + 2] for text in texts for i in range(len(text) - 1)}
    pair = min(sorted(p for p in pairs if p.isalpha()), key=lambda p: abs(sum(p in text for text in texts) - 16))
    assert 6 <= sum(pair in text for text in texts) <= 26
    path = tmp_path_factory.mktemp("task") / "letters.jsonl"
    rows = [{"prompt": prompt, "contains": pair, "chat": False} for prompt in PROMPTS]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return f"jsonl:{path}"


@pytest.fixture(scope="module")
def pair(bundles: Any, tiny_hf: Path, task: str, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Pair]:
    out = tmp_path_factory.mktemp("pair")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("EDGEKIT_CACHE", str(bundles.store.root))
        model = (str(tiny_hf), "--target", "jetson", *tiny.QUICK)
        trained = tiny.edgekit(
            "train", "verifier", *model, "--task", task, "--out", out / "verifier", "--problems", "16", "--heldout",
            "8", "--samples", "4", "--architecture", "mlp", "--threads", "1", "--json",
        )  # fmt: skip
        assert trained.code == 0, trained.stderr
        built = tiny.edgekit("build", *model, *CUTS, "--verifier", out / "verifier", "--out", out / "dist", "--json")
        assert built.code == 0, built.stderr
        yield Pair(out / "verifier", out / "dist" / "jetson-orin-nano-super", task, trained.json, built.json)


def test_a_verifier_says_what_it_read_what_it_saw_and_what_it_cost(pair: Pair, bundles: Any) -> None:
    manifest = read_manifest(pair.verifier)
    assert manifest.domains == (pair.task,)
    assert manifest.hidden_size == 256
    assert {"auc", "ece"} <= set(manifest.metrics)
    assert manifest.training.problems == 16
    assert manifest.training.rollouts == 64
    assert manifest.training.tokens_forward > 64
    assert pair.trained["metrics"]["auc"]["value"] == manifest.metrics["auc"].value
    # the very file that the bundle ships
    built = json.loads((bundles.jetson / "manifest.json").read_text())
    assert manifest.trunk.source_digest == built["model"]["source_digest"]


def test_the_bundle_has_the_verifier_its_strategy_and_the_curve(pair: Pair) -> None:
    bundle = open_bundle(pair.bundle)
    bundle.verify()
    with open_engine(bundle) as engine, open_verifier(bundle, engine) as verifier:
        assert isinstance(verifier, Head)
    report = json.loads((pair.bundle / "report.json").read_text())
    rows = report["strategies"]
    chosen = [row for row in rows if row["chosen"]]
    assert len(chosen) == 1
    assert bundle.settings.decode.strategy == chosen[0]["strategy"]
    assert chosen[0]["accuracy"] == max(row["accuracy"] for row in rows if row["verifier"] != "random")
    assert {(row["strategy"], row["verifier"]) for row in rows} >= {
        ("greedy", "none"), ("majority", "none"), ("weighted", "trained"), ("best-of-n", "random"), ("vgb", "trained")
    }  # fmt: skip
    assert all(row["tokens_forward"] > 0 and row["answer_s"] > 0 for row in rows)
    names = {(m["name"], m["kind"]) for m in report["measurements"]}
    assert {("verifier_auc", "measured"), ("verifier_auc_source", "measured"), ("answer_s", "predicted")} <= names
    page = (pair.bundle / "report.html").read_text()
    assert "Strategies: accuracy and cost" in page
    assert "random verifier" in (pair.bundle / "report.md").read_text()
    # the head weighs next to nothing
    weights = next(m["value"] for m in report["measurements"] if m["name"] == "weight_bytes")
    assert (pair.bundle / "verifier" / "verifier.safetensors").stat().st_size < 0.1 * weights


def test_a_second_build_executes_nothing(
    pair: Pair, bundles: Any, tiny_hf: Path, tmp_path: Path, monkeypatch: Any
) -> None:
    monkeypatch.setenv("EDGEKIT_CACHE", str(bundles.store.root))
    again = tiny.edgekit(
        "build", tiny_hf, "--target", "jetson", *tiny.QUICK, *CUTS, "--verifier", pair.verifier, "--out", tmp_path,
        "--json",
    )  # fmt: skip
    assert again.code == 0, again.stderr
    steps = again.json["targets"][0]["steps"]
    assert {step["stage"] for step in steps} >= {"verifier", "strategies"}
    assert all(step["status"] == "cached" for step in steps)
    assert again.json["targets"][0]["digest"] == pair.built["targets"][0]["digest"]


@pytest.mark.parametrize("name", [name for name in strategy_names() if name != "revise"])
def test_run_answers_by_every_strategy_and_tells_the_cost(pair: Pair, name: str) -> None:
    several = () if streams(name) else ("--candidates", "3")
    command = ("run", pair.bundle, PROMPTS[0], "--raw", "--strategy", name, *several, "--max-tokens", "12", "--json")
    told = tiny.edgekit(*command)
    assert told.code == 0, told.stderr
    assert told.json["strategy"] == name
    assert 0 < told.json["value"] < 1
    if name == "majority":
        assert sum(told.json["votes"].values()) == 3
    cost = told.json["cost"]
    assert cost["tokens_forward"] >= told.json["prompt_tokens"] + told.json["tokens"] - 1
    assert cost["bytes_moved"] >= cost["steps"] * 1000
    assert cost["predicted_energy_j"] > 0
    assert tiny.edgekit(*command).json["text"] == told.json["text"]


def test_revise_asks_again_through_the_chat_template(pair: Pair) -> None:
    told = tiny.edgekit(
        "run", pair.bundle, "How many owls?", "--strategy", "revise", "--candidates", "3", "--max-tokens", "8", "--json"
    )
    assert told.code == 0, told.stderr
    raw = tiny.edgekit("run", pair.bundle, "How many owls?", "--strategy", "revise", "--raw")
    assert raw.code == 2
    assert "a chat template to ask for a revision with" in raw.stderr


def test_the_pair_runs_without_build_libraries(pair: Pair) -> None:
    code = (
        "import sys\n"
        "for name in ('torch', 'transformers', 'gguf', 'accelerate', 'safetensors', 'peft'): sys.modules[name] = None\n"
        f"sys.argv = ['edgekit', 'run', {str(pair.bundle)!r}, 'hi', '--max-tokens', '4', '--strategy', 'vgb']\n"
        "from edgekit.cli import main\nmain()"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def test_a_budget_ends_the_search_with_an_answer(pair: Pair) -> None:
    told = tiny.edgekit("run", pair.bundle, PROMPTS[0], "--raw", "--strategy", "vgb", "--budget-tokens", "60", "--json")
    assert told.code == 0, told.stderr
    assert 60 <= told.json["cost"]["tokens_forward"] < 80


def test_another_quantization_of_the_model_gives_states_of_its_own(pair: Pair, bundles: Any) -> None:
    """What the stage judges by: the shipped model's states, not those the verifier was trained on."""
    items = read_heldout(pair.verifier)[:6]
    with open_engine(open_bundle(pair.bundle), candidates=4) as engine:
        (one, *_) = read_states(engine, items)
    assert one.hidden.shape == (1 + len(items[0].answer), 256)
    options = EngineOptions(context_tokens=512, sequences=4)
    with find_engine("llama_cpp").open_model(bundles.model, options) as engine:
        found = collect(
            engine, find_task(pair.task), find_task(pair.task).problems("train", 4), pair.bundle, samples=4,
            options=Options(seed=1),
        )  # fmt: skip
        again = read_states(engine, [item.prefixes for item in found.answers])
    for drawn, read in zip(found.answers, again, strict=True):
        # a batch rounds its 8-bit activations otherwise
        distance = np.linalg.norm(drawn.hidden.astype(np.float32) - read.hidden.astype(np.float32))
        assert distance < 0.05 * np.linalg.norm(drawn.hidden.astype(np.float32))


def test_validate_answers_a_task_by_the_strategy_of_the_bundle(pair: Pair) -> None:
    told = tiny.edgekit("validate", pair.bundle, "--task", pair.task, "--problems", "5", "--json")
    assert told.code == 0, told.stderr
    found = {m["name"]: m for m in told.json["measurements"]}
    accuracy = found["task_accuracy"]
    assert accuracy["n"] == 5
    assert accuracy["value"] * 5 == pytest.approx(round(accuracy["value"] * 5))
    assert accuracy["ci_low"] <= accuracy["value"] <= accuracy["ci_high"]
    assert found["answer_s"]["kind"] == "measured"
    # what the bundle answers is what `run` answers
    task = find_task(pair.task)
    settings = open_bundle(pair.bundle).settings.decode
    right = 0.0
    for index, problem in enumerate(task.problems("test", 5)):
        several = () if streams(settings.strategy) else ("--candidates", settings.candidates)
        answer = tiny.edgekit(
            "run", pair.bundle, problem.prompt, "--raw", "--strategy", settings.strategy, *several, "--seed", index,
            "--max-tokens", task.max_tokens, "--json",
        )  # fmt: skip
        right += task.check(problem, answer.json["text"])
    assert right / 5 == accuracy["value"]
    wrong = tiny.edgekit("validate", pair.bundle, "--task", "arithmetics")
    assert wrong.code == 2
    assert "did you mean 'arithmetic'?" in wrong.stderr


# --- trunks of their own


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["adapter", "model"])
def test_a_verifier_with_a_trunk_of_its_own_goes_the_same_way(
    kind: str, task: str, bundles: Any, tiny_hf: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("EDGEKIT_CACHE", str(bundles.store.root))
    model = (str(tiny_hf), "--target", "jetson", *tiny.QUICK)
    reward = tmp_path / "reward"
    if kind == "model":
        tiny.write_reward_model(reward, tiny_hf, 1, "sequence")
    trained = tiny.edgekit(
        "train", "verifier", *model, "--task", task, "--out", tmp_path / "verifier", "--problems", "6", "--heldout",
        "6", "--samples", "4", "--threads", "1", "--kind", kind, "--json",
        *(("--reward-model", reward) if kind == "model" else ()),
    )  # fmt: skip
    assert trained.code == 0, trained.stderr
    manifest = read_manifest(tmp_path / "verifier")
    assert manifest.kind == kind
    assert not manifest.reads_text  # the tokenizers are the same
    planned = tiny.edgekit("plan", *model, "--verifier", tmp_path / "verifier", "--json")
    assert planned.code == 0, planned.stderr
    memory = planned.json["targets"][0]["memory"]
    built = tiny.edgekit(
        "build", *model, *CUTS, "--set", "verifier.problems=3", "--verifier", tmp_path / "verifier", "--out",
        tmp_path / "dist", "--json",
    )  # fmt: skip
    assert built.code == 0, built.stderr
    bundle = open_bundle(tmp_path / "dist" / "jetson-orin-nano-super")
    bundle.verify()
    shipped = bundle.path / "verifier"
    assert sorted(path.name for path in shipped.iterdir()) == [
        "heldout.jsonl.gz", "trunk.gguf", "verifier.json", "verifier.safetensors"
    ]  # fmt: skip
    # cache and buffers of the second context are in the plan
    assert memory["companion_bytes"] > (shipped / "trunk.gguf").stat().st_size + memory["kv_cache_bytes"]
    report = json.loads((bundle.path / "report.json").read_text())
    assert {"verifier_auc", "verifier_auc_source"} <= {m["name"] for m in report["measurements"]}
    walks = [row for row in report["strategies"] if row["verifier"] == "trained"]
    assert all(row["verifier_tokens"] > 0 for row in walks)
    command = ("run", bundle.path, PROMPTS[0], "--raw", "--strategy", "best-of-n", "--candidates", "3", "--max-tokens")
    told = tiny.edgekit(*command, "12", "--json")
    assert told.code == 0, told.stderr
    assert 0 < told.json["value"] < 1
    assert told.json["cost"]["verifier_tokens"] >= told.json["prompt_tokens"] + told.json["tokens"] - 1
    onnx = tiny.edgekit("plan", *model[:3], "--recipe", "onnx-int8", "--verifier", tmp_path / "verifier")
    assert onnx.code == 2
    assert "a recipe for llama.cpp" in onnx.stderr


# --- what a user gets wrong


def planned(tiny_hf: Path, *arguments: Any) -> tiny.Result:
    return tiny.edgekit("plan", tiny_hf, "--target", "jetson", *tiny.QUICK, *arguments)


def test_a_verifier_of_another_model_is_refused(pair: Pair, tiny_288: Path) -> None:
    result = planned(tiny_288, "--verifier", pair.verifier)
    assert result.code == 2
    assert "a verifier trained on this model" in result.stderr
    assert "Traceback" not in result.stderr


def test_a_task_that_the_verifier_has_not_seen_is_warned_of(pair: Pair, tiny_hf: Path) -> None:
    result = planned(tiny_hf, "--verifier", pair.verifier, "--task", "arithmetic")
    assert result.code == 0, result.stderr
    assert "has not seen arithmetic" in result.stdout


def test_a_damaged_verifier_is_refused_when_planning(pair: Pair, tiny_hf: Path, tmp_path: Path) -> None:
    copy = Path(shutil.copytree(pair.verifier, tmp_path / "verifier"))
    data = bytearray((copy / "verifier.safetensors").read_bytes())
    data[-1] ^= 1
    (copy / "verifier.safetensors").write_bytes(data)
    result = planned(tiny_hf, "--verifier", copy)
    assert result.code == 2
    assert "verifier.safetensors" in result.stderr


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        (("--verifier", "nowhere"), "nowhere"),
        (("--task", "arithmetics"), "did you mean 'arithmetic'?"),
        (("--task", "arithmetic", "--set", "strategies.names=[vbg]"), "did you mean 'vgb'?"),
        (("--task", "arithmetic", "--set", "strategies.problems=0"), "strategies.problems"),
    ],
)
def test_wrong_arguments_are_one_clear_error(tiny_hf: Path, arguments: Any, text: str) -> None:
    result = planned(tiny_hf, *arguments)
    assert result.code == 2
    assert text in result.stderr
    assert "Traceback" not in result.stderr


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        (("--kind", "model"), "--reward-model DIR"),
        (("--reward-model", "somewhere"), "--reward-model with the kind head"),
        (("--kind", "adapter", "--architecture", "mlp"), "whose head is linear"),
        (("--kind", "adapter", "--recipe", "onnx-int8"), "a recipe for llama.cpp"),
        (("--kind", "model", "--reward-model", "nowhere"), "nowhere"),
    ],
)
def test_kinds_of_verifiers_that_cannot_be_are_refused_at_once(
    arguments: Any, text: str, tiny_hf: Path, tmp_path: Path
) -> None:
    result = tiny.edgekit(
        "train", "verifier", tiny_hf, "-t", "jetson", "--task", "arithmetic", "--out", tmp_path / "v", *arguments
    )
    assert result.code == 2, result.stderr
    assert text in result.stderr
    assert "Traceback" not in result.stderr
    assert not list(tmp_path.iterdir())


def test_a_place_that_holds_something_else_is_left_alone(tiny_hf: Path, tmp_path: Path) -> None:
    (tmp_path / "precious").write_text("x")
    result = tiny.edgekit("train", "verifier", tiny_hf, "-t", "jetson", "--task", "arithmetic", "--out", tmp_path)
    assert result.code == 2
    assert [path.name for path in tmp_path.iterdir()] == ["precious"]


def test_a_bundle_without_a_verifier_says_so(bundles: Any) -> None:
    result = tiny.edgekit("run", bundles.jetson, "hi", "--strategy", "vgb")
    assert result.code == 2
    assert "a verifier for vgb" in result.stderr
    assert "--strategy majority" in result.stderr


def test_candidates_of_a_strategy_that_draws_one_are_refused(pair: Pair) -> None:
    result = tiny.edgekit("run", pair.bundle, "hi", "--strategy", "sample", "--candidates", "4")
    assert result.code == 2
    assert "sample, which draws one" in result.stderr


def test_a_budget_smaller_than_the_question_is_said(pair: Pair) -> None:
    told = tiny.edgekit("run", pair.bundle, PROMPTS[0], "--strategy", "majority", "--budget-tokens", "5", "--json")
    assert told.code == 0
    assert told.json["ended"] == "budget"
    assert "the budget was spent before the answer was finished" in told.stderr


def test_strategies_without_a_verifier_are_those_that_need_none(tiny_hf: Path) -> None:
    result = planned(tiny_hf, "--task", "arithmetic", "--json")
    (step,) = [s for s in json.loads(result.stdout)["targets"][0]["steps"] if s["stage"] == "strategies"]
    assert step["params"]["names"] == ["greedy", "majority"]


def test_every_target_that_does_not_run_the_recipe_is_named(tiny_hf: Path) -> None:
    result = tiny.edgekit("plan", tiny_hf, "-t", "rtx-3060", "-t", "pi", "-t", "mac-mini-m4", "--recipe", "gptq-4bit")
    assert result.code == 2
    assert "raspberry-pi-5" in result.stderr
    assert "mac-mini" in result.stderr


def test_the_random_control_is_no_better_than_a_draw(pair: Pair) -> None:
    """Best of n by random values over many questions: its accuracy is the mean of the draws."""
    task = find_task(pair.task)
    right, chance = [], []
    with open_engine(open_bundle(pair.bundle), candidates=4) as engine:
        for seed, problem in enumerate([*task.problems("train", 24), *task.problems("test", None)]):
            prompt = engine.tokenize(problem.prompt, special=True)
            session = Session(engine, prompt, Options(candidates=4, max_tokens=64, seed=seed), RandomVerifier(seed))
            nodes = session.draw(4)
            checks = [task.check(problem, node.text) for node in nodes]
            right.append(checks[int(np.argmax(session.values(nodes)))])
            chance.append(float(np.mean(checks)))
            session.close()
    error = np.std(np.array(right) - chance) / np.sqrt(len(right)) + 1e-9
    assert abs(np.mean(right) - np.mean(chance)) < 4 * error
