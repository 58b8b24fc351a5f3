"""`edgekit run`."""

from __future__ import annotations

import codecs
import json
import sys
import time
from pathlib import Path

import click

from edgekit.bundle import open_bundle, open_engine
from edgekit.chat import render_chat
from edgekit.decode import find_strategy, strategy_names
from edgekit.errors import InputError


@click.command(name="run", short_help="Generate text with a bundle.")
@click.argument("bundle", type=click.Path(path_type=Path))
@click.argument("prompt", required=False)
@click.option("--strategy", help=f"One of {', '.join(strategy_names())}.  [default: the bundle's]")
@click.option("--max-tokens", type=click.IntRange(min=1), default=256, show_default=True, help="Longest answer.")
@click.option("--system", help="System message.")
@click.option("--raw", is_flag=True, help="Continue the prompt as it is, without the chat template.")
@click.option("--threads", type=click.IntRange(min=1), help="CPU threads.  [default: the bundle's]")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON document on stdout.")
def command(
    bundle: Path,
    prompt: str | None,
    strategy: str | None,
    max_tokens: int,
    system: str | None,
    raw: bool,
    threads: int | None,
    as_json: bool,
) -> None:
    """Generate text with a bundle; without PROMPT it is read from stdin.

    Text streams to stdout as it is decoded.
    """
    opened = open_bundle(bundle)
    settings = opened.settings
    generate = find_strategy(strategy or settings.strategy)
    text = sys.stdin.read() if prompt is None else prompt
    if not text.strip():
        raise InputError("a prompt", "none", 'edgekit run BUNDLE "Why is the sky blue?"')
    system = settings.system if system is None else system
    messages = [{"role": "system", "content": system}] if system else []
    chat = (
        None if raw else render_chat(opened.path / settings.tokenizer, [*messages, {"role": "user", "content": text}])
    )
    with open_engine(opened, threads) as engine:
        # a chat template writes the beginning of text itself
        tokens = engine.tokenize(chat, special=True) if chat else engine.tokenize(text, special=True)
        room = settings.context_tokens - len(tokens)
        if room < 1:
            raise InputError(
                f"a prompt shorter than the context of {settings.context_tokens} tokens",
                f"{len(tokens)} tokens",
                "shorten it, or build with a longer --context",
            )
        decoder = codecs.getincrementaldecoder("utf-8")("replace")
        answer, count, started = "", 0, time.perf_counter()
        for token in generate(engine, tokens, min(max_tokens, room)):
            count += 1
            piece = decoder.decode(engine.detokenize([token]))
            answer += piece
            if not as_json:
                click.echo(piece, nl=False)
        answer += decoder.decode(b"", final=True)
        seconds = time.perf_counter() - started
    if as_json:
        fields = {"text": answer, "prompt_tokens": len(tokens), "tokens": count, "seconds": seconds}
        click.echo(json.dumps({**fields, "strategy": strategy or settings.strategy}, indent=2, ensure_ascii=False))
    else:
        click.echo()
