"""Sampling: every token drawn from the model's law, as the options filter it."""

from __future__ import annotations

from collections.abc import Iterator

from edgekit.decode._session import Node, Session

STREAMS = True


def decode(session: Session) -> Iterator[Node]:
    """Yield the answer after every token."""
    yield from session.stream(session.root)
