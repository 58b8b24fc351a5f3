"""VGB, value-guided backtracking (Rohatgi et al., arXiv:2510.03149): a random walk over blocks that may go back.

The answer is a draw from the model's law times V at the end, or times V to the power `tilt`: any positive weight of
prefixes gives a walk that is exact for its weights of leaves. V must be above 0; the better it is, the sooner the
walk is there. Blocks that were drawn and not looked at wait for the node's next visit, so a batch costs no exactness.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator, Sequence

from edgekit.decode._session import Node, Session
from edgekit.decode._walk import arrive, momentum_walk, walk

NEEDS_VERIFIER = True


def decode(session: Session) -> Iterator[Node]:
    """Yield every leaf that the walk comes to; the last is where `arrive` found it.

    A walk that was not found at a leaf gives the last that it was at; one that came to none is finished by sampling.
    """
    tree = _Blocks(session)
    options = session.options
    if options.momentum is None:
        places = walk(tree, session.root, session.random, lambda: session.spent)
    else:
        places = momentum_walk(tree.children, tree.value, session.root, tree.parent, options.momentum, session.random)
    node, leaf = session.root, None
    for node in arrive(places, tree.is_leaf, options.steps):
        if node.ended and node is not leaf:
            leaf = node
            yield leaf
        if session.spent:
            break
    if leaf is None:
        yield from session.stream(node)


class _Blocks:
    """The tree of blocks: children are drawn `width` at a time, in one batch."""

    def __init__(self, session: Session) -> None:
        self._session = session
        self._waiting: dict[Node, deque[Node]] = {}
        self._fixed: dict[Node, Sequence[tuple[float, Node]]] = {}

    def parent(self, node: Node) -> Node | None:
        """The node before."""
        return node.parent

    def is_leaf(self, node: Node) -> bool:
        """Whether the answer is finished."""
        return node.ended is not None

    def value(self, node: Node) -> float:
        """V of a node, to the power that was asked for."""
        value: float = float(self._session.values([node])[0]) ** self._session.options.tilt
        return value

    def propose(self, node: Node) -> Node:
        """The next of the children that were drawn at this node."""
        waiting = self._waiting.setdefault(node, deque())
        if not waiting:
            grown = self._session.grow([node] * self._session.options.width)
            self._session.values(grown)
            waiting.extend(grown)
        return waiting.popleft()

    def children(self, node: Node) -> Sequence[tuple[float, Node]]:
        """For the walk with momentum, which needs their mass: `candidates` draws, the same at each visit."""
        if node.ended:
            return ()
        if node not in self._fixed:
            grown = self._session.grow([node] * self._session.options.candidates)
            self._session.values(grown)
            self._fixed[node] = [(1 / len(grown), child) for child in grown]
        return self._fixed[node]
