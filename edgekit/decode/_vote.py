"""Choosing among finished answers."""

from __future__ import annotations

from collections.abc import Sequence

from edgekit.decode._answers import find_answer
from edgekit.decode._session import Node, Session


def vote(session: Session, nodes: Sequence[Node], weights: Sequence[float]) -> Node:
    """The heaviest answer, each node adding its weight to its own; of its nodes the one that weighs most.

    Finished answers that can be compared come first; where there is none, the likeliest node wins.
    """
    answer = find_answer(session.options.answer)
    totals: dict[str, float] = {}
    best: dict[str, tuple[float, Node]] = {}
    for node, weight in zip(nodes, weights, strict=True):
        key = answer(node.text) if node.ended else None
        if key is None:
            continue
        totals[key] = totals.get(key, 0.0) + weight
        if key not in best or weight > best[key][0]:
            best[key] = (weight, node)
    session.votes = totals
    if not totals:
        return max(nodes, key=lambda node: node.log_probability)
    return best[max(totals, key=lambda key: totals[key])][1]


def best_value(session: Session, nodes: Sequence[Node]) -> Node:
    """The node of the greatest value, a finished one where there is one."""
    values = session.values(nodes)
    return max(zip(nodes, values, strict=True), key=lambda pair: (pair[0].ended is not None, pair[1]))[0]
