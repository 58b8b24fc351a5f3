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
from edgekit.commands._paths import GivenPath
from edgekit.decode import find_strategy, strategy_names
from edgekit.engine import MAX_THREADS
from edgekit.errors import InputError


@click.command(name="run", short_help="Generate text with a bundle.")
@click.argument("bundle", type=GivenPath())
@click.argument("prompt", required=False)
@click.option("--strategy", help=f"One of {', '.join(strategy_names())}.  [default: the bundle's]")
@click.option("--max-tokens", type=click.IntRange(min=1), default=256, show_default=True, help="Longest answer.")
@click.option("--system", help="System message.")
@click.option("--raw", is_flag=True, help="Continue the prompt as it is, without the chat template.")
@click.option("--threads", type=click.IntRange(1, MAX_THREADS), help="CPU threads.  [default: the bundle's]")
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
    """Generate text with a bundle; without PROMPT it is read from stdin, less one newline at its end.

    Text streams to stdout as it is decoded.
    """
    if raw and system is not None:
        raise InputError(
            "--system or --raw", "both: --raw leaves out the template that a system message needs", "drop one"
        )
    opened = open_bundle(bundle)
    settings = opened.settings
    generate = find_strategy(settings.strategy if strategy is None else strategy)
    text = _read_stdin() if prompt is None else _check_unicode(prompt, "PROMPT")
    if not text.strip():
        raise InputError("a prompt", "none", 'edgekit run BUNDLE "Why is the sky blue?"')
    system = settings.system if system is None else system
    messages = [] if system is None else [{"role": "system", "content": _check_unicode(system, "--system")}]
    tokenizer = opened.path / settings.tokenizer
    chat = None if raw else render_chat(tokenizer, [*messages, {"role": "user", "content": text}])
    if messages and chat is None and not raw:
        raise InputError("a chat template for --system", f"none in {tokenizer}", "leave out --system")
    with open_engine(opened, threads) as engine:
        # a chat template writes the beginning of text itself
        tokens = engine.tokenize(chat, special=True) if chat else engine.tokenize(text, special=True)
        context = engine.capabilities.context_tokens
        room = context - len(tokens)
        if room < 1:
            raise InputError(
                f"a prompt shorter than the context of {context} tokens",
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


def _read_stdin() -> str:
    data = sys.stdin.buffer.read() if sys.stdin else b""
    try:
        text = data.decode("utf-8-sig").replace("\r\n", "\n")
    except UnicodeDecodeError as error:
        found = f"byte {data[error.start]:#04x} at offset {error.start}"
        raise InputError("a prompt in UTF-8 on stdin", found, "convert it, e.g. with iconv -t UTF-8") from None
    # echo and editors end the last line, which is no part of the question
    return text.removesuffix("\n")


def _check_unicode(text: str, name: str) -> str:
    try:
        text.encode()
    except UnicodeEncodeError as error:
        found = f"something else at character {error.start}"
        raise InputError(f"UTF-8 in {name}", found, "check the encoding of the terminal or of the file") from None
    return text
