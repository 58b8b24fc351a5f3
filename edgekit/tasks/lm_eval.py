"""Tasks of lm-evaluation-harness: `lm_eval:NAME`, or `lm_eval:NAME:DIRECTORY` for one defined in a directory.

The harness (Gao et al., "A framework for few-shot language model evaluation") is an extra of this package, and the one
task that is for the host alone: its `datasets` imports torch where there is one. A directory of tasks is a program,
because its templates and functions run here: use only one that you wrote or read. Tasks that run generated code
(`unsafe_code`) are refused, remote code is never asked for. Data of the harness's own tasks comes from the hub, or from
its cache.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from edgekit.engine import Engine, Entry
from edgekit.errors import InputError, ToolError, suggest
from edgekit.tasks import Problem, Split, shuffle

SUMMARY = "generative tasks of lm-evaluation-harness"
_MAX_ROWS = 256  # rows of logits held at once
_DEFAULT_TOKENS = 256  # as in the harness

Tokens = Sequence[int]


@dataclass(frozen=True)
class HarnessTask:
    """A generative task of the harness, without few-shot examples."""

    name: str
    task: Any
    """The harness's own object."""
    summary: str = SUMMARY
    answer: str = "text"

    @property
    def stop(self) -> tuple[str, ...]:
        """Its `until`."""
        return _until(self.task.config.generation_kwargs or {})

    @property
    def max_tokens(self) -> int:
        """Its `max_gen_toks`."""
        return int((self.task.config.generation_kwargs or {}).get("max_gen_toks", _DEFAULT_TOKENS))

    def problems(self, split: Split, count: int | None, seed: int = 0) -> list[Problem]:
        """Documents that the harness would evaluate, divided as all problems are."""
        every = [
            Problem(str(self.task.doc_to_text(doc)), {"doc": self._plain(doc)}, chat=False) for doc in self._docs()
        ]
        return shuffle(every, split, count, seed)

    def _docs(self) -> Any:
        if not (self.task.has_test_docs() or self.task.has_validation_docs()):
            return self.task.training_docs()
        return self.task.eval_docs

    def _plain(self, doc: Any) -> Any:
        try:
            return json.loads(json.dumps(doc))
        except (TypeError, ValueError) as error:
            raise InputError(f"plain JSON in the documents of {self.name}", str(error), "use another task") from None

    def check(self, problem: Problem, answer: str) -> float:
        """The task's first metric after its first filter."""
        from lm_eval.api.instance import Instance

        doc = problem.data["doc"]
        instance = Instance("generate_until", doc, (problem.prompt, {}), 0, resps=[answer])
        found: Any = answer
        for chain in self.task._filters[:1]:
            chain.apply([instance])
            found = instance.filtered_resps[chain.name]
        metric, value = next(iter(self.task.process_results(doc, [found]).items()))
        if not isinstance(value, bool | int | float | np.number) or not 0 <= value <= 1:
            wanted = f"a first metric of {self.name} from 0 to 1 for one answer"
            raise InputError(wanted, f"{metric}: {value!r}"[:200], "use edgekit.tasks.lm_eval.evaluate")
        return float(value)


def open_task(name: str, argument: str) -> HarnessTask:
    """`argument`: the harness's name of the task, and behind another colon a directory that defines it."""
    task_name, _, directory = argument.partition(":")
    if not task_name:
        raise InputError("the name of a task", "none", "use lm_eval:gsm8k, or lm_eval:NAME:DIRECTORY")
    tasks = _load(task_name, Path(directory).expanduser() if directory else None)["tasks"]
    if len(tasks) != 1:
        raise InputError("a single task", f"{task_name}, a group of {len(tasks)}", "name one of its tasks")
    (task,) = tasks.values()
    if task.OUTPUT_TYPE != "generate_until":
        found = f"{task_name}, whose output is {task.OUTPUT_TYPE}"
        raise InputError("a generative task", found, "use edgekit.tasks.lm_eval.evaluate")
    return HarnessTask(name, task)


def evaluate(
    engine: Engine, name: str, limit: int | None = None, include_path: Path | None = None
) -> dict[str, dict[str, Any]]:
    """Run the harness with an engine.

    Args:
        engine: An open model with no sequence alive.
        name: Task, group or tag of the harness.
        limit: Most documents of each task; None takes all.
        include_path: A directory to take the task from, instead of the harness (a program: see above).

    Returns the harness's metrics of each task, as `exact_match,none`, without standard errors.

    Raises InputError when the task is unknown or runs generated code, ToolError when the harness or data are missing.
    """
    from lm_eval.evaluator import evaluate as run_harness

    tasks = _load(name, include_path)
    result = run_harness(engine_lm(engine), tasks, limit=limit, bootstrap_iters=0, log_samples=False)
    return {task: dict(metrics) for task, metrics in result["results"].items()}


def engine_lm(engine: Engine) -> Any:
    """The engine as an `lm_eval.api.model.LM`, for the harness's own functions."""
    _require_harness()
    from lm_eval.api.model import LM

    scorer = Scorer(engine)

    class EngineLM(LM):  # type: ignore[misc]  # the harness has no types
        """An `Engine` as the harness sees a model."""

        def loglikelihood(self, requests: list[Any], disable_tqdm: bool = False) -> list[tuple[float, bool]]:
            return scorer.score_texts([request.args for request in requests])

        def loglikelihood_rolling(self, requests: list[Any], disable_tqdm: bool = False) -> list[float]:
            return scorer.score_whole_texts([request.args[0] for request in requests])

        def generate_until(self, requests: list[Any], disable_tqdm: bool = False) -> list[str]:
            return scorer.generate([request.args for request in requests])

    return EngineLM()


class Scorer:
    """Likelihoods and greedy answers for many texts at once.

    Each sequence of the engine takes its share of the requests, in an order that puts common beginnings side by side;
    where the engine can rewind, a common beginning stays in the KV cache. No sequence may be alive beside its own.
    """

    def __init__(self, engine: Engine) -> None:
        self._engine = engine
        self._limits = engine.capabilities

    def score_texts(self, pairs: Sequence[tuple[str, str]]) -> list[tuple[float, bool]]:
        """Log-likelihood of each second text after the first, in nats, and whether greedy decoding would write it."""
        return self.score([self._encode_pair(*pair) for pair in pairs])

    def score_whole_texts(self, texts: Sequence[str]) -> list[float]:
        """Log-likelihood of each text, in nats; one longer than the context goes through in windows.

        Every token counts once, and the last window reaches back as far as the context does.
        """
        size = self._limits.context_tokens
        windows: list[tuple[Tokens, Tokens]] = []
        owners: list[int] = []
        for owner, text in enumerate(texts):
            tokens = self._engine.tokenize(text)
            start = self._start_tokens()
            for begin in range(0, len(tokens), size):
                end = min(begin + size, len(tokens))
                context = tokens[max(0, end - size - 1) : begin] if begin else start[-1:]
                windows.append((context, tokens[begin:end]))
                owners.append(owner)
        totals = [0.0] * len(texts)
        for owner, (value, _) in zip(owners, self.score(windows), strict=True):
            totals[owner] += value
        return totals

    def score(self, pairs: Sequence[tuple[Tokens, Tokens]]) -> list[tuple[float, bool]]:
        """As `score_texts`, for tokens; of a pair too long for the context the end is kept."""
        size = self._limits.context_tokens
        inputs, firsts = [], []
        for context, continuation in pairs:
            given = [*context, *continuation][:-1][-size:]
            inputs.append(given)
            firsts.append(max(0, len(given) - len(continuation)))
        values = [0.0] * len(pairs)
        greedy = [True] * len(pairs)
        with _Lanes(self._engine, inputs) as lanes:
            for taken in lanes.rounds():
                entries, targets = [], []
                for request, sequence in taken:
                    given, continuation = inputs[request], pairs[request][1]
                    first = len(given) - len(continuation)
                    kept = lanes.keep(sequence, given, firsts[request])
                    for position in range(kept, len(given)):
                        scored = position >= firsts[request]
                        entries.append(Entry(sequence, given[position], wants_logits=scored))
                        targets.append((request, continuation[position - first]) if scored else None)
                for rows, owners in self._rows(entries, targets):
                    wanted = np.array([token for _, token in owners])
                    right = rows[np.arange(len(rows)), wanted]
                    highest = rows.max(axis=1)
                    logs = right - highest - np.log(np.exp(rows - highest[:, None]).sum(axis=1))
                    for (request, token), log, best in zip(owners, logs, rows.argmax(axis=1), strict=True):
                        values[request] += float(log)
                        greedy[request] &= int(best) == token
        return list(zip(values, greedy, strict=True))

    def _rows(
        self, entries: Sequence[Entry], targets: Sequence[tuple[int, int] | None]
    ) -> Iterator[tuple[Any, list[tuple[int, int]]]]:
        """Step entries in pieces; yields logits in float64 and what each row is for."""
        for start in range(0, len(entries), _MAX_ROWS):
            piece = slice(start, start + _MAX_ROWS)
            logits = self._engine.step(entries[piece]).logits
            if owners := [target for target in targets[piece] if target is not None]:
                yield logits.astype(np.float64), owners

    def generate(self, requests: Sequence[tuple[str, dict[str, Any]]]) -> list[str]:
        """Greedy answers to prompts with the harness's settings `until` and `max_gen_toks`.

        Raises InputError when the settings ask for sampling.
        """
        prompts, longest = [], []
        for text, settings in requests:
            if settings.get("do_sample") and settings.get("temperature") != 0:
                raise InputError("a task that decodes greedily", "do_sample: true", "set do_sample to false")
            # one token of the prompt must stay, however long the answer may be
            most = min(int(settings.get("max_gen_toks", _DEFAULT_TOKENS)), self._limits.context_tokens - 1)
            tokens = self._engine.tokenize(text, special=True) or self._start_tokens()
            prompts.append(tokens[-(self._limits.context_tokens - most) :])
            longest.append(most)
        answers = [""] * len(requests)
        with _Lanes(self._engine, prompts) as lanes:
            for taken in lanes.rounds():
                pending: dict[int, tuple[int, list[int]]] = {}
                for request, sequence in taken:
                    kept = lanes.keep(sequence, prompts[request], len(prompts[request]) - 1)
                    pending[request] = (sequence, prompts[request][kept:])
                written: dict[int, list[int]] = {request: [] for request, _ in taken}
                while pending:
                    entries = [
                        Entry(sequence, token, wants_logits=i == len(tokens) - 1)
                        for sequence, tokens in pending.values()
                        for i, token in enumerate(tokens)
                    ]
                    chosen = self._engine.step(entries).logits.argmax(axis=1)
                    for (request, (sequence, _)), token in zip(list(pending.items()), chosen.tolist(), strict=True):
                        made = written[request]
                        if token not in self._engine.end_tokens:
                            made.append(token)
                        until = _until(requests[request][1])
                        answers[request], stopped = cut(self._engine.detokenize(made).decode("utf-8", "replace"), until)
                        if stopped or token in self._engine.end_tokens or len(made) >= longest[request]:
                            del pending[request]
                        else:
                            pending[request] = (sequence, [token])
        return answers

    def _encode_pair(self, context: str, continuation: str) -> tuple[list[int], list[int]]:
        # blanks belong to the word behind them, as tokenizers see it
        body = context.rstrip(" ")
        continuation = context[len(body) :] + continuation
        before = self._engine.tokenize(body, special=True) if body else []
        if not before:
            return self._start_tokens(), self._engine.tokenize(continuation)
        whole = self._engine.tokenize(body + continuation, special=True)
        return whole[: len(before)], whole[len(before) :]

    def _start_tokens(self) -> list[int]:
        """What stands before a text of its own: the beginning-of-text token, or an end token where there is none."""
        return self._engine.tokenize("", special=True) or [min(self._engine.end_tokens)]


class _Lanes:
    """Sequences of an engine that work through inputs side by side, each knowing the tokens that it holds."""

    def __init__(self, engine: Engine, inputs: Sequence[Tokens]) -> None:
        self._engine = engine
        limits = engine.capabilities
        order = sorted(range(len(inputs)), key=lambda i: list(inputs[i]))
        room = min(limits.sequences, limits.total_tokens // limits.context_tokens) if limits.batch else 1
        lanes = max(1, min(room, len(order)))
        self._held: dict[int, list[int]] = {}
        share = max(1, -(-len(order) // lanes))
        self._shares = [order[start : start + share] for start in range(0, len(order), share)]

    def __enter__(self) -> _Lanes:
        self._names = [self._engine.start() for _ in self._shares]
        self._held = {sequence: [] for sequence in self._names}
        return self

    def __exit__(self, *_: object) -> None:
        for sequence in self._names:
            self._engine.release(sequence)

    def rounds(self) -> Iterator[list[tuple[int, int]]]:
        """Yield pairs of an input's index and the sequence that takes it, one for each lane with work left."""
        for place in range(max(map(len, self._shares), default=0)):
            yield [(s[place], name) for s, name in zip(self._shares, self._names, strict=True) if place < len(s)]

    def keep(self, sequence: int, tokens: Tokens, most: int) -> int:
        """Cut a sequence to what it shares with `tokens`, at most `most` of them; returns how many those are.

        The caller then steps the others.
        """
        held = self._held[sequence]
        shared = 0
        if self._engine.capabilities.rewind:
            limit = min(most, len(held), len(tokens))
            shared = next((i for i in range(limit) if held[i] != tokens[i]), limit)
        self._engine.truncate(sequence, shared)
        self._held[sequence] = list(tokens)
        return shared


def cut(text: str, stops: Sequence[str]) -> tuple[str, bool]:
    """Text up to the first stop string, and whether there was one."""
    places = [place for stop in stops if (place := text.find(stop)) >= 0]
    return (text[: min(places)], True) if places else (text, False)


def _until(settings: dict[str, Any]) -> tuple[str, ...]:
    until = settings.get("until") or ()
    return tuple(text for text in ([until] if isinstance(until, str) else until) if text)


def _require_harness() -> None:
    try:
        import lm_eval  # noqa: F401
    except ImportError:
        raise ToolError("lm-evaluation-harness", "it is not installed", "pip install 'edgekit[harness]'") from None


def _load(name: str, include_path: Path | None) -> Any:
    """The harness's tasks by name, as its functions take them."""
    _require_harness()
    from lm_eval.tasks import TaskManager

    if include_path is not None and not include_path.is_dir():
        raise InputError("a directory of tasks", f"none at {include_path}", "check the path")
    # an index of the harness's own thousands of files takes long: only without a directory
    where = str(include_path.resolve()) if include_path else None
    manager = TaskManager(include_path=where, include_defaults=where is None)
    if name not in manager.all_tasks:
        close = suggest(name, manager.all_tasks)
        place = f"in {include_path}" if include_path else "of lm-evaluation-harness"
        raise InputError(f"a task {place} named {name!r}", f"none{close}", "check the name")
    try:
        loaded = manager.load([name])
    except (OSError, ValueError, ImportError, KeyError) as error:
        found = f"{type(error).__name__}: {str(error).partition(os.linesep)[0]}"
        raise ToolError(f"the task {name} and its data", found, "check its files, or connect to the network") from None
    for task in loaded["tasks"].values():
        if getattr(task, "UNSAFE_CODE", False):
            raise InputError("a task that runs no generated code", name, "use python-functions:FILE instead")
    return loaded
