"""Value-guided random walks on a tree of prefixes (VGB, Rohatgi et al., arXiv:2510.03149), whatever makes the tree.

At a node v the parent weighs V(v) and a child va weighs pi(a|v) V(va); with probability 1/2 the walk stays. At a leaf
V is the outcome's weight tau. The law of the walk's place, given that it is a leaf, tends to pi * tau / Z for any
positive V: an imperfect V costs time, not exactness.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Sequence
from typing import Protocol, TypeVar

import numpy as np

N = TypeVar("N")

PATIENCE = 32
"""Proposals that a step of the walk draws at most."""
LOOKS = 4
"""Times that a walk is looked at in as many steps as it took before the first look."""
LONGEST = 8
"""Times these steps that it takes at most."""


class Tree(Protocol[N]):
    """A tree of prefixes."""

    def parent(self, node: N) -> N | None:
        """The node before; None for the root."""
        ...

    def is_leaf(self, node: N) -> bool:
        """Whether the answer is finished."""
        ...

    def value(self, node: N) -> float:
        """V of a node, above 0 and at most 1."""
        ...

    def propose(self, node: N) -> N:
        """A child drawn anew from pi."""
        ...


def walk(tree: Tree[N], node: N, random: np.random.Generator, stop: Callable[[], bool]) -> Iterator[N]:
    """Yield the place after every step, until `stop` says so.

    No step looks at every child. With V at most 1, the parent is proposed with probability V(v) / (V(v) + 1), else a
    child is drawn from pi and kept with probability V(va); what is not kept is drawn again, parent or child. Where V is
    small everywhere that would take 1 / V draws: after `PATIENCE` of them the move is drawn among the parent and those
    that were proposed, by their values (importance resampling: its error falls as 1 / PATIENCE).
    """
    while True:
        if random.random() < 0.5:
            yield node
            continue
        back = tree.parent(node)
        mass = 0.0 if back is None else tree.value(node)
        proposed: list[N] = []
        while not stop():
            if tree.is_leaf(node) or random.random() * (mass + 1) < mass:
                node = node if back is None else back
                break
            proposed.append(tree.propose(node))
            if random.random() < tree.value(proposed[-1]):
                node = proposed[-1]
                break
            if len(proposed) == PATIENCE:
                # what was not kept has the law pi (1 - V): an odds V / (1 - V) weighs it as V weighs a draw from pi
                values = np.array([tree.value(child) for child in proposed])
                odds = np.cumsum(values / (1 - values))
                if random.random() * (mass + (mean := odds[-1] / (PATIENCE + odds[-1]))) < mean:
                    node = proposed[int(np.searchsorted(odds, random.random() * odds[-1], side="right"))]
                else:
                    node = node if back is None else back
                break
        else:
            return
        yield node


def arrive(places: Iterator[N], is_leaf: Callable[[N], bool], steps: int) -> Iterator[N]:
    """Yield the places of a walk until it is seen at a leaf: after `steps` steps, or at a later look.

    Only who looks at times that the walk knows nothing of finds leaves by the law of its places. Those where it ends
    first, or was last, are others: the leaf before a long way back to the next would come too often.
    """
    every = max(1, steps // LOOKS)
    for step, place in enumerate(itertools.islice(places, LONGEST * steps), 1):
        yield place
        if step >= steps and (step - steps) % every == 0 and is_leaf(place):
            return


def momentum_walk(
    children: Callable[[N], Sequence[tuple[float, N]]],
    value: Callable[[N], float],
    node: N,
    parent: Callable[[N], N | None],
    momentum: float,
    random: np.random.Generator,
) -> Iterator[N]:
    """Yield the place after every step of the walk with a direction, which it keeps where it can.

    With f the mass of the children and b that of the parent, the walk down goes to a child by its mass and turns with
    weight b - momentum * min(f, b); the walk up goes to the parent with weight b and turns with weight
    f - momentum * min(f, b); with what is left of f + b it stays. For momentum in [0, 1] the places have the law of
    the plain walk (the flows into and out of each state are equal). `children` gives (pi, child) of every child.
    """
    down = True
    while True:
        # the flows balance without it, but a walk that never stays has a period
        if random.random() < 0.5:
            yield node
            continue
        back = parent(node)
        found = children(node)
        masses = [probability * value(child) for probability, child in found]
        ahead, behind = sum(masses), 0.0 if back is None else value(node)
        overlap = momentum * min(ahead, behind)
        draw = random.random() * (ahead + behind)
        if down:
            if draw < ahead:
                node = found[int(np.searchsorted(np.cumsum(masses), draw, side="right"))][1]
            elif draw < ahead + behind - overlap:
                down = False
        elif draw < behind and back is not None:
            node = back
        elif draw < behind + ahead - overlap:
            down = True
        yield node
