"""One file per engine, behind the protocol in `edgekit.engine`; found by its name."""

from __future__ import annotations

import importlib
import pkgutil
from functools import cache
from typing import cast

from edgekit.engine import EngineModule
from edgekit.errors import InputError, suggest


@cache
def engine_names() -> tuple[str, ...]:
    """Names of all engines: the files of this room."""
    return tuple(sorted(m.name for m in pkgutil.iter_modules(__path__) if not m.name.startswith("_")))


def find_engine(name: str) -> EngineModule:
    """Return an engine's module by name. Raises InputError with the closest name."""
    if name not in engine_names():
        known = engine_names()
        raise InputError(f"an engine named {name!r}", f"none{suggest(name, known)}", f"use one of {', '.join(known)}")
    return cast(EngineModule, importlib.import_module(f"edgekit.engines.{name}"))
