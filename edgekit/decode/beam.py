"""Beam search by values over blocks (Snell et al., arXiv:2408.03314): of the candidates, `width` go on.

It over-optimises an imperfect verifier on easy questions: more budget can lower its accuracy.
"""

from __future__ import annotations

from collections.abc import Iterator

from edgekit.decode._session import Node, Session
from edgekit.decode._vote import best_value

NEEDS_VERIFIER = True


def decode(session: Session) -> Iterator[Node]:
    """Yield the best partial answer after every round."""
    options = session.options
    width = min(options.width, options.candidates)
    pool = session.grow([session.root] * options.candidates)
    while True:
        values = dict(zip(pool, session.values(pool), strict=True))
        beams = sorted(pool, key=lambda node: -values[node])[:width]
        yield best_value(session, beams)
        alive = [node for node in beams if not node.ended]
        if not alive or session.spent:
            return
        each, more = divmod(options.candidates - (len(beams) - len(alive)), len(alive))
        parents = [node for place, node in enumerate(alive) for _ in range(each + (place < more))]
        # a finished beam stays in the race
        pool = [node for node in beams if node.ended] + session.grow(parents)
