"""REBASE, reward-balanced search (Wu et al., arXiv:2408.00724): the budget follows the softmax of the values."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np

from edgekit.decode._session import Node, Session
from edgekit.decode._vote import vote
from edgekit.engine import FloatArray

NEEDS_VERIFIER = True


def decode(session: Session) -> Iterator[Node]:
    """Yield the weighted vote among the finished answers after every round."""
    options = session.options
    finished: list[Node] = []
    nodes = session.grow([session.root] * options.candidates)
    while True:
        finished += [node for node in nodes if node.ended]
        alive = [node for node in nodes if not node.ended]
        budget = options.candidates - len(finished)
        over = session.spent or not alive
        if finished or over:
            among = finished or alive
            yield vote(session, among, session.values(among).tolist())
        if over:
            return
        counts = allocate(budget, session.values(alive), options.balance)
        nodes = session.grow([node for node, count in zip(alive, counts, strict=True) for _ in range(count)])


def allocate(budget: int, values: FloatArray | Sequence[float], balance: float) -> list[int]:
    """Children for each node: `budget * softmax(values / balance)`, rounded so that they sum to the budget.

    The largest remainders round up (Hamilton's method); rounding each alone, as published, misses the sum.
    """
    scaled = np.asarray(values, np.float64) / balance
    weights = np.exp(scaled - scaled.max())
    shares = budget * weights / weights.sum()
    counts = np.floor(shares).astype(int)
    order = np.argsort(counts - shares, kind="stable")
    counts[order[: budget - counts.sum()]] += 1
    return [int(count) for count in counts]
