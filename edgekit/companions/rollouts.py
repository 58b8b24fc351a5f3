"""Answers of a model to a task's problems, with the hidden states behind them: what a verifier learns from."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from edgekit.chat import problem_tokens
from edgekit.companions.verifier import Labelled, label_prefixes
from edgekit.decode import Options, Session
from edgekit.engine import Engine, FloatArray
from edgekit.errors import InputError
from edgekit.tasks import Problem, Task
from edgekit.verifier import NO_WORK, Prefixes, Work


@dataclass(frozen=True)
class Rollouts:
    """Labelled answers and what they cost."""

    answers: tuple[Labelled, ...]
    tokens_forward: int
    right: float
    """Mean label of the finished answers."""


@dataclass(frozen=True)
class _Recorder:
    """A verifier in form only: what it remembers are the states themselves, shape (positions, hidden size)."""

    reads: bool = True
    work: Work = NO_WORK

    def begin(self, prompt: Sequence[int], hidden: FloatArray | None) -> Any:
        """The prompt's last position."""
        return _half(hidden)

    def extend(self, state: Any, tokens: Sequence[int], hidden: FloatArray | None) -> Any:
        """And those of the answer."""
        return np.concatenate([state, _half(hidden)])

    def values(self, states: Sequence[Any], done: Sequence[bool]) -> FloatArray:
        """It has none."""
        raise NotImplementedError


def collect(
    engine: Engine,
    task: Task,
    problems: Sequence[Problem],
    tokenizer: Path,
    *,
    samples: int,
    options: Options,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> Rollouts:
    """Draw answers to each problem, check them, and label every prefix with a token of the answer or none.

    Args:
        engine: The base model, as quantized for the target.
        task: Checks the answers; its stop strings and its longest answer replace those of the options.
        problems: Of the task.
        tokenizer: Directory with the chat template.
        samples: Answers to each problem.
        options: How tokens are drawn; the seed is counted up from problem to problem.
        progress: Called with finished and planned problems.

    Raises InputError when the engine gives no hidden states, or no problem is both solved and failed.
    """
    answers: list[Labelled] = []
    forward, outcomes = 0, []
    for index, problem in enumerate(problems):
        drawn = replace(options, stop=task.stop, max_tokens=task.max_tokens, seed=options.seed + index)
        session = Session(engine, problem_tokens(engine, tokenizer, problem), drawn, _Recorder())
        try:
            nodes = session.draw(samples)
        finally:
            session.close()
        forward += session.cost.tokens_forward
        right = [task.check(problem, node.text) for node in nodes]
        outcomes += right
        for node, labels in zip(nodes, label_prefixes([node.tokens for node in nodes], right), strict=True):
            count = len(node.tokens)
            prefixes = Prefixes(
                problem=f"{task.name}/{problem.prompt}",
                domain=task.name,
                prompt=node.prompt,
                answer=node.tokens,
                positions=tuple(range(count + 1)),
                labels=tuple(float(label) for label in labels),
                done=tuple(position == count for position in range(count + 1)),
            )
            answers.append(Labelled(prefixes, node.state))
        progress(index + 1, len(problems))
    if len(set(outcomes)) < 2:
        found = f"{np.mean(outcomes):.0%} of {len(outcomes)} right" if outcomes else "no problems"
        wanted = f"right and wrong answers to {task.name} to learn from"
        raise InputError(wanted, found, "choose an easier or a harder task")
    return Rollouts(tuple(answers), forward, float(np.mean(outcomes)))


def read_states(engine: Engine, items: Sequence[Prefixes]) -> list[Labelled]:
    """Compute answers that are known already, to judge them by the states of another quantization of the base.

    Each prompt is computed once, and each of its answers once.
    """
    answers: dict[tuple[int, ...], dict[tuple[int, ...], Any]] = {}
    for item in items:
        answers.setdefault(item.prompt, {})[item.answer] = None
    for prompt, known in answers.items():
        session = Session(engine, prompt, Options(), _Recorder())
        try:
            for node in session.read(session.root, list(known)):
                known[node.tokens] = node.state
        finally:
            session.close()
    return [Labelled(item, answers[item.prompt][item.answer]) for item in items]


def _half(hidden: FloatArray | None) -> Any:
    assert hidden is not None
    return hidden.astype(np.float16)
