"""Greedy decoding: the likeliest token, always."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from edgekit.engine import Engine, Entry


def generate(engine: Engine, prompt: Sequence[int], max_tokens: int) -> Iterator[int]:
    """Yield at most `max_tokens` tokens after a prompt of at least one, up to (not including) an end token."""
    sequence = engine.start()
    try:
        pending = [Entry(sequence, token, wants_logits=False) for token in prompt[:-1]]
        if pending:
            engine.step(pending)
        token = prompt[-1]
        for _ in range(max_tokens):
            logits = engine.step([Entry(sequence, token)]).logits[0]
            token = int(logits.argmax())
            if token in engine.end_tokens:
                return
            yield token
    finally:
        engine.release(sequence)
