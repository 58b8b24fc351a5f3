"""How tokens are chosen: one file per strategy, numpy only, seeing nothing but the Engine protocol.

A strategy is a function `decode(session) -> Iterator[Node]` in the file of its name. What it yields is the answer as
it stands; the last one is the answer. Files with a leading underscore are what strategies share.
"""

from __future__ import annotations

import importlib
import pkgutil
from collections.abc import Callable, Iterator
from functools import cache
from types import ModuleType
from typing import cast

from edgekit.decode._answers import find_answer, first_json
from edgekit.decode._options import MAX_TILT, Budget, Choice, Options, Traffic
from edgekit.decode._sampling import Sampling
from edgekit.decode._session import Cost, Node, Session
from edgekit.errors import InputError, suggest

__all__ = [
    "MAX_TILT",
    "Budget",
    "Choice",
    "Cost",
    "Node",
    "Options",
    "Sampling",
    "Session",
    "Strategy",
    "Traffic",
    "find_answer",
    "find_strategy",
    "first_json",
    "needs_verifier",
    "strategy_names",
    "streams",
]

Strategy = Callable[[Session], Iterator[Node]]


@cache
def strategy_names() -> tuple[str, ...]:
    """Names of all strategies: the files of this room."""
    names = (module.name for module in pkgutil.iter_modules(__path__))
    return tuple(sorted(name.replace("_", "-") for name in names if not name.startswith("_")))


def find_strategy(name: str) -> Strategy:
    """Return a strategy by name. Raises InputError with the closest name."""
    return cast(Strategy, _module(name).decode)


def needs_verifier(name: str) -> bool:
    """Whether a strategy asks for values."""
    return bool(getattr(_module(name), "NEEDS_VERIFIER", False))


def streams(name: str) -> bool:
    """Whether a strategy goes from token to token and never back, so that its answer can be shown as it grows."""
    return bool(getattr(_module(name), "STREAMS", False))


def _module(name: str) -> ModuleType:
    if name not in strategy_names():
        known = strategy_names()
        raise InputError(f"a strategy named {name!r}", f"none{suggest(name, known)}", f"use one of {', '.join(known)}")
    return importlib.import_module(f"edgekit.decode.{name.replace('-', '_')}")
