"""`edgekit run`."""

from __future__ import annotations

import codecs
import dataclasses
import json
import sys
from collections.abc import Sequence
from contextlib import closing
from pathlib import Path
from typing import Any

import click

from edgekit.bundle import Bundle, open_bundle, open_engine, open_verifier
from edgekit.chat import render_chat
from edgekit.commands._paths import GivenPath
from edgekit.decode import Budget, Node, Session, find_strategy, needs_verifier, strategy_names, streams
from edgekit.engine import MAX_THREADS, Engine
from edgekit.errors import InputError

_REVISE = "Check your answer. If it is wrong, correct it. Reply with the answer alone."


@click.command(name="run", short_help="Generate text with a bundle.")
@click.argument("bundle", type=GivenPath())
@click.argument("prompt", required=False)
@click.option("--strategy", help=f"One of {', '.join(strategy_names())}.  [default: the bundle's]")
@click.option("--candidates", type=click.IntRange(1, 256), help="Answers to weigh.  [default: the bundle's]")
@click.option("--max-tokens", type=click.IntRange(min=1), help="Longest answer.  [default: the bundle's]")
@click.option("--temperature", type=click.FloatRange(min=0), help="Of sampling.  [default: the bundle's]")
@click.option("--top-p", type=click.FloatRange(0, 1, min_open=True), help="Of sampling.  [default: the bundle's]")
@click.option("--min-p", type=click.FloatRange(0, 1, max_open=True), help="Of sampling.  [default: the bundle's]")
@click.option("--stop", multiple=True, help="String that ends the answer; repeats.  [default: the bundle's]")
@click.option("--seed", type=click.IntRange(min=0), default=0, show_default=True, help="Of sampling.")
@click.option("--budget-tokens", type=click.IntRange(min=1), help="Most tokens to compute, in all candidates.")
@click.option("--budget-seconds", type=click.FloatRange(min=0, min_open=True), help="Most seconds to search.")
@click.option(
    "--budget-joules", type=click.FloatRange(min=0, min_open=True), help="Most joules, by the power of the target."
)
@click.option("--system", help="System message.")
@click.option("--raw", is_flag=True, help="Continue the prompt as it is, without the chat template.")
@click.option("--threads", type=click.IntRange(1, MAX_THREADS), help="CPU threads.  [default: the bundle's]")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON document on stdout.")
def command(
    bundle: Path,
    prompt: str | None,
    strategy: str | None,
    system: str | None,
    raw: bool,
    threads: int | None,
    as_json: bool,
    seed: int,
    **arguments: Any,
) -> None:
    """Generate text with a bundle; without PROMPT it is read from stdin, less one newline at its end.

    Strategies that go from token to token stream to stdout; the others print the answer that they chose.
    """
    if raw and system is not None:
        raise InputError(
            "--system or --raw", "both: --raw leaves out the template that a system message needs", "drop one"
        )
    opened = open_bundle(bundle)
    settings = opened.settings
    name = settings.decode.strategy if strategy is None else strategy
    decode = find_strategy(name)
    if streams(name) and arguments["candidates"]:
        wanted = "--candidates with a strategy that weighs several answers"
        raise InputError(wanted, f"{name}, which draws one", "--strategy majority, or leave it out")
    if needs_verifier(name) and settings.verifier is None:
        advice = "--strategy majority, or build with --verifier DIR"
        raise InputError(f"a verifier for {name}", f"none in {bundle}", advice)
    text = _read_stdin() if prompt is None else _check_unicode(prompt, "PROMPT")
    if not text.strip():
        raise InputError("a prompt", "none", 'edgekit run BUNDLE "Why is the sky blue?"')
    conversation = _Conversation(opened, text, settings.system if system is None else system, raw)
    budget = Budget(**{kind: arguments.pop(f"budget_{kind}") for kind in ("tokens", "seconds", "joules")})
    changes = {key: value for key, value in arguments.items() if value not in (None, ())}
    candidates = 1 if streams(name) else changes.get("candidates", settings.decode.candidates)
    with open_engine(opened, threads, candidates) as engine, open_verifier(opened, engine, threads) as verifier:
        loaded = dict(engine.loaded)
        tokens = conversation.tokens(engine)
        context = engine.capabilities.context_tokens
        if len(tokens) >= context:
            raise InputError(
                f"a prompt shorter than the context of {context} tokens",
                f"{len(tokens)} tokens",
                "shorten it, or build with a longer --context",
            )
        options = settings.decode.options(**changes, budget=budget, seed=seed, revise=conversation.reviser(engine))
        with closing(Session(engine, tokens, options, verifier, settings.traffic.counted())) as session:
            answer = session.root
            stream = _Stream(options.stop)
            for answer in decode(session):
                if streams(name) and not as_json:
                    stream.show(answer)
            value = float(session.values([answer])[0]) if verifier is not None else None
            votes, cost = session.votes, session.cost
    if answer.ended is None:
        click.echo("note: the budget was spent before the answer was finished", err=True)
    if as_json:
        fields: dict[str, Any] = {
            "text": answer.text,
            "prompt_tokens": len(tokens),
            "tokens": len(answer.tokens),
            "seconds": cost.wall_s,
            "strategy": name,
            "ended": answer.ended or "budget",
            "value": value,
            "votes": dict(sorted(votes.items(), key=lambda pair: -pair[1])),
            "runs_on": loaded,
            "cost": dataclasses.asdict(cost),
        }
        click.echo(json.dumps(fields, indent=2, ensure_ascii=False))
    else:
        stream.finish(answer)


class _Stream:
    """Shows an answer as it grows, whole characters at a time."""

    def __init__(self, stop: Sequence[str]) -> None:
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")
        self._shown = 0
        # what was just drawn may be the beginning of a stop string
        self._held_back = max((len(text.encode()) - 1 for text in stop), default=0)

    def show(self, answer: Node) -> None:
        """Show what is new of it and stays."""
        ready = max(self._shown, len(answer.data) - self._held_back)
        click.echo(self._decoder.decode(answer.data[self._shown : ready]), nl=False)
        self._shown = ready

    def finish(self, answer: Node) -> None:
        """Show the rest."""
        click.echo(self._decoder.decode(answer.data[self._shown :], final=True))


class _Conversation:
    """The question, and how it is put to the model."""

    def __init__(self, bundle: Bundle, text: str, system: str | None, raw: bool) -> None:
        self._tokenizer = bundle.path / bundle.settings.tokenizer
        self._messages = [] if system is None else [{"role": "system", "content": _check_unicode(system, "--system")}]
        self._messages.append({"role": "user", "content": text})
        self._text = text
        self._chat = None if raw else render_chat(self._tokenizer, self._messages)
        if system is not None and self._chat is None and not raw:
            raise InputError("a chat template for --system", f"none in {self._tokenizer}", "leave out --system")

    def tokens(self, engine: Engine) -> list[int]:
        """The prompt. A chat template writes the beginning of text itself."""
        return engine.tokenize(self._text if self._chat is None else self._chat, special=True)

    def reviser(self, engine: Engine) -> Any:
        """What makes the prompt that asks to do better; None without a chat template."""
        if self._chat is None:
            return None

        def revise(answers: Sequence[str]) -> list[int]:
            turns = list(self._messages)
            for answer in answers:
                turns += [{"role": "assistant", "content": answer}, {"role": "user", "content": _REVISE}]
            return engine.tokenize(render_chat(self._tokenizer, turns) or "", special=True)

        return revise


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
