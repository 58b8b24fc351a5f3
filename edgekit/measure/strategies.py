"""What each strategy gets right on a task, and what it costs: the accuracy-cost curve of a model with its verifier."""

from __future__ import annotations

import copy
import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Literal

from edgekit.config import Strict
from edgekit.decode import Budget, Cost, Node, Options, Session, Traffic, find_strategy, needs_verifier, streams
from edgekit.engine import Engine
from edgekit.measurement import share_interval
from edgekit.tasks import Problem, Task
from edgekit.verifier import Verifier

_POOLED = ("majority", "weighted", "best-of-n")
"""They choose among the same draws, which are drawn once."""
_DEAREST = 2
"""Times the tokens of the largest pool that a search may spend: one that needs more is no choice beside a vote."""


class StrategyRow(Strict):
    """One strategy with one number of candidates on a task; costs are means over the problems."""

    task: str
    strategy: str
    verifier: Literal["trained", "random", "none"]
    candidates: int
    problems: int
    accuracy: float
    ci_low: float
    ci_high: float
    """Wilson's 95% interval over problems."""
    tokens_forward: float
    steps: float
    verifier_calls: float
    verifier_tokens: float
    bytes_moved: float
    wall_s: float
    """On the machine that measured."""


@dataclass(frozen=True)
class Outcome:
    """One strategy on one problem."""

    right: float
    cost: Cost


@dataclass(frozen=True)
class Curve:
    """Rows, and for each problem what its difficulty was estimated to be and what every row did."""

    rows: tuple[StrategyRow, ...]
    difficulties: tuple[float, ...]
    outcomes: dict[tuple[str, int], tuple[Outcome, ...]]


def measure_strategies(
    engine: Engine,
    task: Task,
    problems: Sequence[Problem],
    tokens: Callable[[Problem], list[int]],
    verifier: Verifier | None,
    names: Sequence[str],
    candidates: Sequence[int],
    options: Options,
    traffic: Traffic,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> Curve:
    """Run strategies on the same problems with the same seeds.

    Args:
        engine: An open model with as many sequences as the most candidates.
        task: Checks the answers; its stop strings, its longest answer and its way to compare answers are used.
        problems: Of the task.
        tokens: Makes the prompt of a problem.
        verifier: For the strategies that need one; without it they are left out.
        names: Strategies.
        candidates: Numbers of candidates; one that streams is run once.
        options: The other arguments.
        traffic: What a step moves.
        progress: Called with finished and planned problems.

    Searches end when they have spent twice the tokens of the most candidates drawn at once: a walk may never come to an
    end that its verifier is content with. The control with a random verifier is exact: best of n by a random value is
    right as often as a draw is.
    """
    runs = [
        (name, count)
        for name in names
        if verifier is not None or not needs_verifier(name)
        for count in ([1] if streams(name) else candidates)
    ]
    outcomes: dict[tuple[str, int], list[Outcome]] = {run: [] for run in runs}
    chance: dict[int, list[Outcome]] = {count: [] for count in candidates}
    difficulties = []
    for index, problem in enumerate(problems):
        prompt = tokens(problem)
        told = replace(
            options, stop=task.stop, max_tokens=task.max_tokens, answer=task.answer, seed=options.seed + index
        )

        def judge(node: Node, cost: Cost, problem: Problem = problem) -> Outcome:
            return Outcome(task.check(problem, node.text), copy.copy(cost))

        dearest = 0
        for count in candidates:
            session = Session(engine, prompt, replace(told, candidates=count), verifier, traffic)
            try:
                for name in _POOLED:
                    if (name, count) in outcomes:
                        (*_, node) = find_strategy(name)(session)
                        outcomes[name, count].append(judge(node, session.cost))
                pool = session.draw(count)
                share = statistics.fmean(task.check(problem, node.text) for node in pool)
                chance[count].append(Outcome(share, copy.copy(session.cost)))
                dearest = max(dearest, session.cost.tokens_forward + session.cost.verifier_tokens)
                if verifier is not None and count == candidates[0]:
                    difficulties.append(1 - float(session.values(pool[: told.width]).mean()))
            finally:
                session.close()
        for name, count in runs:
            if name in _POOLED:
                continue
            searching = replace(told, candidates=count, budget=Budget(tokens=_DEAREST * dearest))
            session = Session(engine, prompt, searching, verifier, traffic)
            try:
                node = session.root
                for node in find_strategy(name)(session):  # noqa: B007 - the last one counts
                    pass
                outcomes[name, count].append(judge(node, session.cost))
            finally:
                session.close()
        progress(index + 1, len(problems))
    rows = [
        _row(task, name, "trained" if needs_verifier(name) else "none", count, found)
        for (name, count), found in outcomes.items()
    ]
    if verifier is not None:
        rows += [_row(task, "best-of-n", "random", count, found) for count, found in chance.items()]
    return Curve(tuple(rows), tuple(difficulties), {run: tuple(found) for run, found in outcomes.items()})


def _row(
    task: Task, name: str, verifier: Literal["trained", "random", "none"], count: int, found: Sequence[Outcome]
) -> StrategyRow:
    accuracy, low, high = share_interval(sum(one.right for one in found), len(found))

    def mean(field: str) -> float:
        return statistics.fmean(float(getattr(one.cost, field)) for one in found)

    return StrategyRow(
        task=task.name,
        strategy=name,
        verifier=verifier,
        candidates=count,
        problems=len(found),
        accuracy=accuracy,
        ci_low=low,
        ci_high=high,
        tokens_forward=mean("tokens_forward"),
        steps=mean("steps"),
        verifier_calls=mean("verifier_calls"),
        verifier_tokens=mean("verifier_tokens"),
        bytes_moved=mean("bytes_moved"),
        wall_s=mean("wall_s"),
    )
