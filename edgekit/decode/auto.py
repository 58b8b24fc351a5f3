"""Compute-optimal choice (Snell et al., arXiv:2408.03314): the strategy and its budget by estimated difficulty.

The difficulty of a question is 1 - the mean value of a few answers. They count: they are the first of the candidates
of whatever is chosen, and their cost is in the total. Which strategy is best for which difficulty was measured when
the bundle was built (`Options.choices`).
"""

from __future__ import annotations

from collections.abc import Iterator

from edgekit.decode import find_strategy
from edgekit.decode._session import Node, Session
from edgekit.errors import InputError

NEEDS_VERIFIER = True


def decode(session: Session) -> Iterator[Node]:
    """Yield what the chosen strategy yields."""
    choices = session.options.choices
    if not choices:
        raise InputError("strategies measured for each difficulty", "none", "edgekit build --verifier DIR --task NAME")
    probes = session.draw(min(session.options.width, choices[0].candidates))
    difficulty = 1 - float(session.values(probes).mean())
    choice = next((choice for choice in choices if difficulty <= choice.difficulty), choices[-1])
    session.choose(choice)
    yield from find_strategy(choice.strategy)(session)
