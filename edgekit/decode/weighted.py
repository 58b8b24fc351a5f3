"""Weighted vote: the answer whose samples have the greatest sum of values (Li et al., arXiv:2206.02336)."""

from __future__ import annotations

from collections.abc import Iterator

from edgekit.decode._session import Node, Session
from edgekit.decode._vote import vote

NEEDS_VERIFIER = True


def decode(session: Session) -> Iterator[Node]:
    """Yield the winner."""
    nodes = session.draw(session.options.candidates)
    yield vote(session, nodes, session.values(nodes).tolist())
