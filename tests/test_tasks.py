"""Tasks: every file of the room keeps the contract, and each checker is held against answers judged by hand."""

from __future__ import annotations

import gzip
import itertools
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from edgekit.decode import find_answer
from edgekit.errors import InputError
from edgekit.tasks import Problem, Task, find_task, split_of, task_names, task_sha256, task_summary
from edgekit.tasks.constraints import KINDS
from edgekit.tasks.dyck import balanced
from edgekit.tasks.gsm8k import last_number
from edgekit.tasks.json_extraction import JsonExtraction

SPLITS = ("train", "validation", "test")
HUMAN_EVAL = {
    "task_id": "mine/0",
    "prompt": 'def scale(x):\n    return x * 3\n\n\ndef six(x: int) -> int:\n    "Six times x."\n',
    "entry_point": "six",
    "test": "def check(candidate):\n    for x in range(9):\n        assert candidate(x) == 2 * scale(x)\n",
    "canonical_solution": "    return x * 6\n",
}


def write_lines(path: Path, *rows: Any) -> Path:
    path.write_text("".join((row if isinstance(row, str) else json.dumps(row)) + "\n" for row in rows))
    return path


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A small file for each task that takes one."""
    base = tmp_path_factory.mktemp("tasks")
    gsm8k = [{"question": f"What is {n} + 1?", "answer": f"{n}+1 = <<{n}+1={n + 1}>>\n#### {n + 1}"} for n in range(40)]
    functions = [{**HUMAN_EVAL, "prompt": f"# {n}\n{HUMAN_EVAL['prompt']}"} for n in range(40)]
    own = [{"prompt": f"Say {n}.", "answer": str(n)} for n in range(40)]
    return {
        "gsm8k": write_lines(base / "gsm8k.jsonl", *gsm8k),
        "python-functions": write_lines(base / "functions.jsonl", *functions),
        "jsonl": write_lines(base / "own.jsonl", *own),
    }


def open_(name: str, files: dict[str, Path]) -> Task:
    return find_task(f"{name}:{files[name]}" if name in files else name)


# --- the contract; tests/test_lm_eval.py holds `lm-eval`

NAMES = [name for name in task_names() if name != "lm-eval"]


def test_the_room_has_these_tasks() -> None:
    assert set(NAMES) == {
        "arithmetic", "constraints", "dyck", "gsm8k", "json-extraction", "jsonl", "python-functions", "python-syntax",
    }  # fmt: skip


@pytest.mark.parametrize("name", NAMES)
def test_splits_are_disjoint_and_repeat(name: str, files: dict[str, Path]) -> None:
    task = open_(name, files)
    assert task.name.startswith(name)
    assert task.summary == task_summary(name)
    assert task.answer in {"integer", "last-number", "json", "text", "code", "line"}
    assert task.max_tokens > 0
    of = {split: {p.prompt for p in task.problems(split, None)} for split in SPLITS}
    for one, other in itertools.combinations(SPLITS, 2):
        assert of[one]
        assert not of[one] & of[other]
    first = task.problems("train", 8, seed=1)
    assert first == open_(name, files).problems("train", 8, seed=1)
    assert first != task.problems("train", 8, seed=2)
    assert first[:3] == task.problems("train", 3, seed=1)
    assert not {p.prompt for p in first} & (of["validation"] | of["test"])
    for problem in first:
        assert json.loads(json.dumps(problem.data)) == problem.data


@pytest.mark.parametrize("name", NAMES)
def test_hostile_answers_score_between_0_and_1(name: str, files: dict[str, Path]) -> None:
    task = open_(name, files)
    (problem,) = task.problems("train", 1)
    for answer in ("", "\0", "{" * 10_000, "[" * 100_000, "9" * 10_000, "\ud800", "- 1,\n" * 3000):
        assert 0 <= task.check(problem, answer) <= 1
    assert task.check(problem, "") == 0


def test_tasks_import_neither_torch_nor_the_harness(files: dict[str, Path]) -> None:
    opened = [f"{name}:{files[name]}" if name in files else name for name in NAMES]
    program = f"""
import sys
from edgekit.tasks import find_task, task_names, task_summary
for name in {opened!r}:
    find_task(name).problems('test', 2)
assert all(map(task_summary, task_names()))
heavy = {{'torch', 'transformers', 'lm_eval', 'datasets', 'llama_cpp'}} & set(sys.modules)
assert not heavy, heavy
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("arithmetc", "did you mean 'arithmetic'?"),
        ("", "use one of arithmetic"),
        ("arithmetic:2x", "digits of two numbers"),
        ("arithmetic:7x1", "digits of two numbers"),
        ("json-extraction:7", "a number of fields from 1 to 6"),
        ("dyck:13", "an even length"),
        ("dyck:²", "a length of words"),
        ("dyck:1000", "a length of words"),
        ("constraints:x", "constraints alone"),
        ("python-syntax:x", "python-syntax alone"),
        ("gsm8k", "use gsm8k:FILE.jsonl"),
        ("jsonl", "use jsonl:FILE"),
        ("python-functions", "use python-functions:HumanEval.jsonl.gz"),
        ("jsonl:/nowhere/at/all", "No such file"),
    ],
)
def test_wrong_names_are_told(name: str, text: str) -> None:
    with pytest.raises(InputError) as caught:
        find_task(name)
    assert text in str(caught.value)


# --- arithmetic


def test_all_sums_of_two_digits_are_in_exactly_one_split() -> None:
    task = find_task("arithmetic")
    every = [p.prompt.splitlines()[-1] for split in SPLITS for p in task.problems(split, None)]
    assert sorted(every) == sorted(f"{a} + {b} =" for a in range(10, 100) for b in range(10, 100))


@pytest.mark.parametrize("name", ["arithmetic", "arithmetic:3x2", "arithmetic:2x1*", "arithmetic:4x4"])
def test_results_are_what_python_computes(name: str) -> None:
    task = find_task(name)
    for problem in task.problems("test", 50):
        for line in problem.prompt.splitlines()[:-1]:
            left, right = line.split("=")
            assert eval(left) == int(right)
        result = eval(problem.prompt.splitlines()[-1].rstrip("= "))
        assert task.check(problem, f" {result}") == 1
        assert task.check(problem, f"It is {result}, not {result + 1}.") == 1
        assert task.check(problem, f" {result + 1}") == 0
        assert task.check(problem, f" {result}0") == 0
        assert task.check(problem, f" -{result}") == 0


# --- JSON


def test_every_field_must_be_right() -> None:
    task = find_task("json-extraction:4")
    assert isinstance(task, JsonExtraction)
    (problem,) = task.problems("train", 1)
    fields = problem.data["fields"]
    assert list(fields) == ["name", "item", "price", "city"]
    text = problem.prompt.splitlines()[-2]
    assert all(str(value) in text for value in fields.values())
    right = json.dumps(fields)
    for answer in (
        f" {right}",
        f"```json\n{right}\n```",
        f"Here {{it}} is: {right} {{}}",
        json.dumps(fields, indent=1),
    ):
        assert (task.check(problem, answer), task.share(problem, answer)) == (1, 1)
    wrong = {**fields, "price": fields["price"] + 1}
    assert task.check(problem, json.dumps(wrong)) == 0
    assert task.share(problem, json.dumps(wrong)) == pytest.approx(3 / 4)
    assert task.check(problem, json.dumps({**fields, "price": str(fields["price"])})) == 0
    assert task.check(problem, json.dumps({**fields, "more": 1})) == 0
    assert task.check(problem, right[:-1]) == 0
    assert task.share(problem, "{}") == 0


# --- Python


def test_a_function_is_judged_by_the_tests_of_the_file(tmp_path: Path) -> None:
    path = tmp_path / "functions.jsonl.gz"
    path.write_bytes(gzip.compress(json.dumps(HUMAN_EVAL).encode()))
    task = find_task(f"python-functions:{path}")
    (problem,) = [p for split in SPLITS for p in task.problems(split, None)]
    assert not problem.chat
    assert task.check(problem, HUMAN_EVAL["canonical_solution"]) == 1
    assert task.check(problem, "    return scale(x) + scale(x)\n") == 1
    assert task.check(problem, "    return x * 5\n") == 0
    assert task.check(problem, "    raise SystemExit(0)\n") == 0
    # the tests use their own `scale`, whatever the answer makes of it
    assert task.check(problem, "    return 0\n\n\ndef scale(x): return 0\n") == 0
    assert task.check(problem, "    return type('E', (), {'__eq__': lambda *_: True})()\n") == 0


def test_syntax_is_all_that_counts() -> None:
    task = find_task("python-syntax")
    problem = task.problems("test", 1)[0]
    assert task.check(problem, "    return max(x)\n") == 1
    assert task.check(problem, "    undefined ? 1\n") == 0
    assert task.check(problem, "   \n") == 0
    assert task.check(problem, "    return " + "(" * 5000 + ")" * 5000) == 0
    assert task.check(problem, "    import os; os._exit(0)") == 1  # it is parsed, never run


# --- words


@pytest.mark.parametrize(
    ("text", "number"),
    [
        ("So it is 72.", "72"),
        ("#### 1,200", "1200"),
        ("$1,234.50", "1234.50"),
        ("1200.00 dollars", "1200"),
        ("5 - 3", "3"),
        ("5-3", "3"),
        ("it is -7 degrees", "-7"),
        ("1, 2, 3", "3"),
        ("10,000,000 km", "10000000"),
        ("none", None),
    ],
)
def test_last_number(text: str, number: str | None) -> None:
    from decimal import Decimal

    assert last_number(text) == (None if number is None else Decimal(number))


def test_gsm8k_compares_numbers(tmp_path: Path) -> None:
    path = write_lines(tmp_path / "q.jsonl", {"question": "How many?", "answer": "Many.\n#### 1,200"})
    task = find_task(f"gsm8k:{path}")
    (problem,) = [p for split in SPLITS for p in task.problems(split, None)]
    for answer, score in (("#### 1200", 1), ("3 boxes, so 1,200.00 apples", 1), ("1200 or 1201", 0), ("many", 0)):
        assert task.check(problem, answer) == score


CONSTRAINTS = [
    ("most-words", 3, ["one two three"], ["one two three four", ""]),
    ("least-words", 3, ["one two three"], ["one two"]),
    ("contains", "green", ["So Green!", "a green one"], ["greenish", ""]),
    ("avoids", "the", ["Other things"], ["see the end", "The end", ""]),
    ("lower-case", None, ["all low, 3"], ["Not all", ""]),
    ("bullets", 2, ["* a\n* b", "Two:\n- a\n- b"], ["* a", "*a\n*b", "* a\n* b\n* c"]),
    ("ends-with", "The end.", ["It was. The end."], ["The end. Really.", ""]),
    ("no-commas", None, ["a b"], ["a, b", ""]),
    ("json", None, ['{"a": [1]}'], ['```{"a": 1}```', "3", "{", ""]),
]


def test_every_constraint_is_held_against_examples() -> None:
    assert [kind for kind, *_ in CONSTRAINTS] == list(KINDS)


@pytest.mark.parametrize(("kind", "value", "good", "bad"), CONSTRAINTS, ids=list(KINDS))
def test_constraints(kind: str, value: Any, good: list[str], bad: list[str]) -> None:
    task = find_task("constraints")
    problem = Problem("", {"constraints": [[kind, value]]})
    assert [task.check(problem, f" {text}\n") for text in good] == [1] * len(good)
    assert [task.check(problem, text) for text in bad] == [0] * len(bad)
    both = Problem("", {"constraints": [[kind, value], ["least-words", 1000]]})
    assert task.check(both, good[0]) == 0


def test_constraints_that_exclude_each_other_never_meet() -> None:
    for problem in find_task("constraints").problems("train", 500):
        kinds = [kind for kind, _ in problem.data["constraints"]]
        assert 1 <= len(set(kinds)) == len(kinds) <= 3
        for one, other in itertools.permutations(kinds, 2):
            assert other not in KINDS[one].excludes


# --- brackets


def test_balanced_agrees_with_striking_out_pairs() -> None:
    for letters in itertools.product("([)]", repeat=6):
        word = left = "".join(letters)
        while (shorter := left.replace("()", "").replace("[]", "")) != left:
            left = shorter
        assert balanced(word) == (left == "")


def test_dyck_beginnings_can_be_completed_to_the_length() -> None:
    task = find_task("dyck:8")
    closing = {"(": ")", "[": "]", "{": "}", "<": ">"}
    for problem in task.problems("train", 100):
        *examples, beginning = problem.prompt.splitlines()
        assert len(examples) == 3
        assert all(len(word) == 8 and balanced(word) for word in examples)
        still_open: list[str] = []
        for letter in beginning:
            still_open.append(closing[letter]) if letter in closing else still_open.pop()
        rest = 8 - len(beginning) - len(still_open)
        assert rest >= 0
        assert rest % 2 == 0
        answer = "()" * (rest // 2) + "".join(reversed(still_open))
        assert task.check(problem, f"{answer} ") == 1
        assert task.check(problem, answer + "()") == 0
        assert task.check(problem, answer[:-1] + "x") == 0


# --- a user's own file


@pytest.mark.parametrize(
    ("row", "good", "bad"),
    [
        ({"answer": "Rome"}, " Rome\n", "Rome."),
        ({"contains": "Rome"}, "It is Rome.", "rome"),
        ({"regex": r"^\d+ km$"}, "12 km", "12 km or so"),
        ({"regex": r"a{2}", "chat": False, "system": "Be brief."}, "xaax", "axa"),
    ],
)
def test_own_problems(tmp_path: Path, row: dict[str, Any], good: str, bad: str) -> None:
    task = find_task(f"jsonl:{write_lines(tmp_path / 'own.jsonl', {'prompt': 'Where?', **row})}")
    (problem,) = task.problems(split_of("Where?"), None)
    assert (problem.chat, problem.system) == (row.get("chat", True), row.get("system"))
    assert (task.check(problem, good), task.check(problem, bad)) == (1, 0)


def test_a_catastrophic_regex_does_not_match_and_does_not_hang(tmp_path: Path) -> None:
    task = find_task(f"jsonl:{write_lines(tmp_path / 'own.jsonl', {'prompt': 'p', 'regex': '(a+)+$'})}")
    (problem,) = task.problems(split_of("p"), None)
    assert task.check(problem, "a" * 60 + "b") == 0
    assert task.check(problem, "a" * 60) == 1


@pytest.mark.parametrize(
    ("line", "text"),
    [
        ('{"prompt": "a"}', "wanted one of answer, regex, contains, found none"),
        ('{"prompt": "a", "answer": "b", "regex": "c"}', "found answer and regex"),
        ('{"prompt": "a", "anwser": "b"}', "unknown field (did you mean 'answer'?)"),
        ('{"answer": "b"}', "prompt: is required"),
        ('{"prompt": "", "answer": "b"}', "prompt: "),
        ('{"prompt": 3, "answer": "b"}', "prompt: "),
        ('{"prompt": "a", "regex": "("}', "not a regular expression"),
        ('{"prompt": "a", "regex": "' + "a" * 1001 + '"}', "regex: "),
        ('{"prompt": "a"', "delimiter"),
        ("[" * 100_000, "own.jsonl:2"),
        ('"a"', "own.jsonl:2"),
    ],
)
def test_a_bad_line_is_named_by_its_number(tmp_path: Path, line: str, text: str) -> None:
    path = write_lines(tmp_path / "own.jsonl", {"prompt": "a", "answer": "b"}, line)
    with pytest.raises(InputError) as caught:
        find_task(f"jsonl:{path}")
    assert "own.jsonl:2" in str(caught.value)
    assert text in str(caught.value)


@pytest.mark.parametrize(
    ("name", "content", "text"),
    [
        ("empty.jsonl", b"\n\n", "an empty file"),
        ("latin.jsonl", b'{"prompt": "\xe4"}', "undecodable byte at 12"),
        ("torn.jsonl.gz", gzip.compress(b'{"prompt": "a", "answer": "b"}' * 99)[:-20], "a file of problems"),
        ("text.jsonl.gz", b'{"prompt": "a", "answer": "b"}', "gzip"),
        ("bomb.jsonl.gz", gzip.compress(bytes(300 << 20), 1), "a larger one"),
    ],
)
def test_bad_files_are_told(tmp_path: Path, name: str, content: bytes, text: str) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(InputError) as caught:
        find_task(f"jsonl:{tmp_path / name}")
    assert text in str(caught.value)


def test_a_vote_on_gsm8k_compares_the_number_that_the_checker_checks(tmp_path: Path) -> None:
    path = tmp_path / "questions.jsonl"
    path.write_text(json.dumps({"question": "How many?", "answer": "3 and 4. #### 7"}) + "\n")
    key = find_answer(find_task(f"gsm8k:{path}").answer)
    assert key("First 3, then 4, so #### 7") == key("Of 12 owls 5 leave: 7") == "7"


def test_the_digest_of_a_task_is_that_of_its_file(tmp_path: Path) -> None:
    path = tmp_path / "p.jsonl"
    path.write_text("one")
    before = task_sha256(f"jsonl:{path}")
    path.write_text("two")
    assert before is not None
    assert task_sha256(f"jsonl:{path}") not in (before, None)
    assert task_sha256("arithmetic") is None
    assert task_sha256("arithmetic:2x2") is None
