"""Rendering a conversation with the chat template that a bundle carries: a stranger's program, in a sandbox."""

from __future__ import annotations

import datetime
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NoReturn

import jinja2
from jinja2.sandbox import ImmutableSandboxedEnvironment

from edgekit.artifact import read_json
from edgekit.engine import Engine
from edgekit.errors import InputError
from edgekit.tasks import Problem


def render_chat(tokenizer: Path, messages: Sequence[Mapping[str, str]]) -> str | None:
    """Text of a conversation with the assistant's turn opened; None when the model has no chat template.

    Args:
        tokenizer: Directory with `chat_template.jinja` or `tokenizer_config.json`.
        messages: Mappings with `role` and `content`.

    Raises InputError when the template fails or refuses the conversation.
    """
    config = read_json(tokenizer / "tokenizer_config.json") if (tokenizer / "tokenizer_config.json").is_file() else {}
    file = tokenizer / "chat_template.jinja"
    source = file.read_text() if file.is_file() else config.get("chat_template")
    if not isinstance(source, str):
        return None
    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=["jinja2.ext.loopcontrols"]
    )
    environment.filters["tojson"] = lambda value, **options: json.dumps(value, ensure_ascii=False, **options)
    environment.globals["raise_exception"] = _refuse
    environment.globals["strftime_now"] = lambda form: datetime.datetime.now().strftime(form)
    tokens = {name: _token_text(config.get(name)) for name in ("bos_token", "eos_token", "pad_token", "unk_token")}
    try:
        return environment.from_string(source).render(messages=messages, add_generation_prompt=True, **tokens)
    except (jinja2.TemplateError, TypeError, ValueError, RecursionError) as error:
        raise InputError("a conversation that the chat template takes", str(error), "try --raw") from None


def problem_tokens(engine: Engine, tokenizer: Path, problem: Problem) -> list[int]:
    """The prompt of a task's problem, as tokens. Raises InputError where it needs a chat template and there is none."""
    messages = [{"role": "user", "content": problem.prompt}]
    if problem.system is not None:
        messages.insert(0, {"role": "system", "content": problem.system})
    text = render_chat(tokenizer, messages) if problem.chat else problem.prompt
    if text is None:
        raise InputError(f"a chat template in {tokenizer}", "none", "choose a task that continues text")
    # a chat template writes the beginning of text itself
    return engine.tokenize(text, special=True)


def _refuse(message: str) -> NoReturn:
    raise jinja2.TemplateError(message)


def _token_text(token: Any) -> str:
    return str(token["content"]) if isinstance(token, dict) else str(token or "")
