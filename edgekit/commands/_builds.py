"""Builds on the command line: bundles, or the reports of bundles."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

from pydantic import ValidationError

from edgekit.bundle import open_bundle
from edgekit.errors import InputError
from edgekit.target import LOCAL, Target, all_targets


def build_names(paths: tuple[Path, ...]) -> list[str]:
    """The directory of each build; where two are called the same, what of their paths is not common to all."""
    directories = [path if path.is_dir() else path.parent for path in paths]
    names = [directory.resolve().name or str(directory) for directory in directories]
    counted = Counter(names)
    if max(counted.values()) == 1:
        return names
    parts = [directory.resolve().parts for directory in directories]
    while len({p[0] for p in parts if p}) == 1 and all(len(p) > 1 for p in parts):
        parts = [p[1:] for p in parts]
    while len({p[-1] for p in parts if p}) == 1 and all(len(p) > 1 for p in parts):
        parts = [p[:-1] for p in parts]
    short = ["/".join(p) for p in parts]
    return short if len(set(short)) == len(short) else [str(path) for path in paths]


def profile(path: Path, name: object) -> Target | None:
    """The target that a bundle was made for, or for a report alone the catalog's; this machine has none."""
    if path.is_dir():
        try:
            return Target.model_validate(open_bundle(path).manifest.target)
        except ValidationError:
            raise InputError("a bundle of this edgekit", f"{path}: another target", "build the bundle again") from None
    return next((target for target in all_targets() if target.name == name and name != LOCAL), None)
