"""Whether llama.cpp's AMX kernels were compiled right: those of some GCCs end the process at the first batch."""

from __future__ import annotations

import mmap
import re
from pathlib import Path

_COMPILER = re.compile(rb"GCC: \([^)\x00]*\) (\d+)\.(\d+)")
_MENDED = {11: 5, 12: 4, 13: 3}
"""The minor version of each GCC from which it is right; older ones never were, newer ones always."""


def miscompiled(library: Path) -> bool:
    """Whether a shared library was compiled by a GCC that keeps 8 of the 64 bytes of a tile configuration.

    The rest is whatever lay on the stack, which the processor refuses (GCC bug 114098; llama.cpp issue 20824 shows
    it). Programs of other compilers are taken to be right.
    """
    with library.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as content:
        found = [(int(major), int(minor)) for major, minor in _COMPILER.findall(content)]
    return any(minor < _MENDED.get(major, 0 if major > 13 else 1 << 30) for major, minor in found)
