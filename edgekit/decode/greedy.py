"""Greedy decoding: the likeliest token, always."""

from __future__ import annotations

from collections.abc import Iterator

from edgekit.decode._session import GREEDY, Node, Session

STREAMS = True


def decode(session: Session) -> Iterator[Node]:
    """Yield the answer after every token."""
    yield from session.stream(session.root, GREEDY)
