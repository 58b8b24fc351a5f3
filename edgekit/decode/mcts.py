"""Monte Carlo tree search over blocks with UCT (Kocsis and Szepesvári, 2006); the value of a new node is its V.

In published comparisons it stays below plain sampling at every budget: measure it before you ship it.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, field

from edgekit.decode._session import Node, Session
from edgekit.decode._vote import vote

NEEDS_VERIFIER = True


@dataclass(eq=False)
class _Place:
    node: Node
    parent: _Place | None = None
    children: list[_Place] = field(default_factory=list)
    visits: int = 0
    total: float = 0.0

    def urgency(self, exploration: float) -> float:
        """Mean value and the bonus for what was tried seldom."""
        assert self.parent is not None
        if not self.visits:
            return math.inf
        return self.total / self.visits + exploration * math.sqrt(math.log(self.parent.visits) / self.visits)


def decode(session: Session) -> Iterator[Node]:
    """Yield the weighted vote among the finished answers after every simulation that finished one."""
    options = session.options
    root = _Place(session.root)
    finished: list[Node] = []
    for _ in range(options.candidates):
        place = root
        while place.children:
            place = max(place.children, key=lambda child: child.urgency(options.exploration))
        if not place.node.ended and not session.spent:
            grown = session.grow([place.node] * options.width)
            place.children = [_Place(node, place) for node in grown]
            session.values(grown)
            if ended := [node for node in grown if node.ended]:
                finished += ended
                yield vote(session, finished, session.values(finished).tolist())
            place = max(place.children, key=lambda child: child.node.value or 0.0)
        (value,) = session.values([place.node])
        up: _Place | None = place
        while up is not None:
            up.visits += 1
            up.total += float(value)
            up = up.parent
        if session.spent:
            break
    if not finished:
        place = root
        while place.children:
            place = max(place.children, key=lambda child: child.visits)
        yield from session.stream(place.node)
