"""Best of n: the sample of the greatest value at its end (Cobbe et al., arXiv:2110.14168).

The value of the last step beats the least and the product over the steps (Snell et al., arXiv:2408.03314).
"""

from __future__ import annotations

from collections.abc import Iterator

from edgekit.decode._session import Node, Session
from edgekit.decode._vote import best_value

NEEDS_VERIFIER = True


def decode(session: Session) -> Iterator[Node]:
    """Yield the best of the samples."""
    yield best_value(session, session.draw(session.options.candidates))
