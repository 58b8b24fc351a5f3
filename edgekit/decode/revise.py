"""Sequential revision (Snell et al., arXiv:2408.03314): the model is shown its answers and asked to do better.

Models flip a good part of their right answers, so the last revision is never taken for the best: the verifier, or
without one the vote, chooses among all.
"""

from __future__ import annotations

from collections.abc import Iterator

from edgekit.decode._session import Node, Session
from edgekit.decode._vote import best_value, vote
from edgekit.errors import InputError


def decode(session: Session) -> Iterator[Node]:
    """Yield the best answer after every round: `width` chains, `candidates` answers in all."""
    options = session.options
    if options.revise is None:
        raise InputError("a chat template to ask for a revision with", "none", "use another strategy")
    chains = min(options.width, options.candidates)
    answers: list[list[Node]] = [[node] for node in session.draw(chains)]
    for count in range(chains, options.candidates + 1):
        nodes = [node for chain in answers for node in chain]
        yield best_value(session, nodes) if session.has_verifier else vote(session, nodes, [1.0] * len(nodes))
        if count == options.candidates or session.spent:
            return
        chain = answers[count % chains]
        asked = session.begin(options.revise([node.text for node in chain]))
        (revised,) = session.grow([asked], whole=True)
        if not revised.tokens:
            return
        # as an answer to the question itself: what the verifier knows, and what the vote counts
        chain += session.read(session.root, [revised.tokens]) if session.has_verifier else [revised]
