"""What two answers are compared by in a vote: the same number said in two ways is the same answer."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from decimal import Decimal, InvalidOperation
from typing import Any

from edgekit.errors import InputError, suggest

Answer = Callable[[str], str | None]
"""From a text to a key that equal answers share; None where the text gives no answer."""

_NUMBER = re.compile(r"-?\d[\d,]*(?:\.\d+)?")
_LONGEST = 1000
"""Digits of a number that are read: Decimal takes quadratic time."""


def find_answer(name: str) -> Answer:
    """Return an extractor by name. Raises InputError with the closest name."""
    if name not in _ANSWERS:
        known = ", ".join(_ANSWERS)
        raise InputError(f"a way to compare answers ({known})", f"{name!r}{suggest(name, _ANSWERS)}", "choose one")
    return _ANSWERS[name]


def _text(text: str) -> str | None:
    return " ".join(text.split()) or None


def _line(text: str) -> str | None:
    lines = text.strip().splitlines()
    return _text(lines[0]) if lines else None


def _first_number(text: str) -> str | None:
    return _as_number(_NUMBER.search(text))


def _last_number(text: str) -> str | None:
    return _as_number(max(_NUMBER.finditer(text), key=lambda found: found.start(), default=None))


def _as_number(found: re.Match[str] | None) -> str | None:
    if found is None or len(found[0]) > _LONGEST:
        return None
    try:
        # 3, 3.0 and 3.00 are one number
        return format(Decimal(found[0].replace(",", "")).normalize(), "f")
    except InvalidOperation:
        return None


def first_json(text: str, openings: str = "{[") -> Any:
    """The first JSON value in a text that begins with one of the brackets; None where there is none."""
    decoder = json.JSONDecoder()
    for place in (place for place, letter in enumerate(text) if letter in openings):
        try:
            return decoder.raw_decode(text, place)[0]
        except (ValueError, RecursionError):
            continue
    return None


def _json(text: str) -> str | None:
    value = first_json(text)
    return None if value is None else json.dumps(value, sort_keys=True)


def _code(text: str) -> str | None:
    lines = (line.rstrip() for line in text.splitlines())
    return "\n".join(line for line in lines if line and not line.lstrip().startswith("#")) or None


_ANSWERS: dict[str, Answer] = {
    "text": _text,
    "line": _line,
    "integer": _first_number,
    "last-number": _last_number,
    "json": _json,
    "code": _code,
}
