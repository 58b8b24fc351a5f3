"""Every error a user can cause, and the exit code each one ends with.

An error says what was wanted, what was found, and the next command to type. Anything that is not an
`EdgekitError` is a bug of ours and exits with 1.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class EdgekitError(Exception):
    """Base of the tree: `wanted`, `found` and `next_command` are whole phrases without a final stop."""

    exit_code = 1

    def __init__(self, wanted: str, found: str, next_command: str, *, documented: bool = False) -> None:
        """`documented` says that a command's JSON document on stdout tells of it already."""
        super().__init__(wanted, found, next_command)
        self.documented = documented
        self.wanted = wanted
        self.found = found
        self.next_command = next_command

    def __str__(self) -> str:
        return f"wanted {self.wanted}; found {self.found}\n  next: {self.next_command}"


class InputError(EdgekitError):
    """Wrong input or configuration: an unknown name, a malformed file, an unsafe checkpoint."""

    exit_code = 2


class GateFailed(EdgekitError):
    """A measurement lies outside the bound that the recipe sets."""

    exit_code = 3


class DoesNotFit(EdgekitError):
    """The planned artifact needs more memory than the target has."""

    exit_code = 4


class ToolError(EdgekitError):
    """A tool, an engine, a device or the machine (disk, network) is missing or failed."""

    exit_code = 5


def suggest(name: str, known: Iterable[str]) -> str:
    """Return `" (did you mean 'x'?)"` for the closest known name, or an empty string."""
    close = difflib.get_close_matches(name, list(known), n=1, cutoff=0.6)
    return f" (did you mean {close[0]!r}?)" if close else ""
