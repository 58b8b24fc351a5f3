"""Majority vote, self-consistency (Wang et al., arXiv:2203.11171): the answer that most samples agree on."""

from __future__ import annotations

from collections.abc import Iterator

from edgekit.decode._session import Node, Session
from edgekit.decode._vote import vote


def decode(session: Session) -> Iterator[Node]:
    """Yield the winner."""
    nodes = session.draw(session.options.candidates)
    yield vote(session, nodes, [1.0] * len(nodes))
