"""How tokens are chosen: one file per strategy, numpy only, seeing nothing but the Engine protocol.

A strategy is a function `generate(engine, prompt, max_tokens) -> Iterator[int]` in the file of its name.
"""

from __future__ import annotations

import importlib
import pkgutil
from collections.abc import Callable, Iterator, Sequence
from functools import cache
from typing import cast

from edgekit.engine import Engine
from edgekit.errors import InputError, suggest

Strategy = Callable[[Engine, Sequence[int], int], Iterator[int]]


@cache
def strategy_names() -> tuple[str, ...]:
    """Names of all strategies: the files of this room."""
    return tuple(sorted(module.name.replace("_", "-") for module in pkgutil.iter_modules(__path__)))


def find_strategy(name: str) -> Strategy:
    """Return a strategy by name. Raises InputError with the closest name."""
    if name not in strategy_names():
        known = strategy_names()
        raise InputError(f"a strategy named {name!r}", f"none{suggest(name, known)}", f"use one of {', '.join(known)}")
    module = importlib.import_module(f"edgekit.decode.{name.replace('-', '_')}")
    return cast(Strategy, module.generate)
