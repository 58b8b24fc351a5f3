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
from edgekit.errors import InputError


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


def _refuse(message: str) -> NoReturn:
    raise jinja2.TemplateError(message)


def _token_text(token: Any) -> str:
    return str(token["content"]) if isinstance(token, dict) else str(token or "")
