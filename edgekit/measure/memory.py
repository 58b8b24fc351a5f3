"""Memory that this process held at its peak. It describes a model only in a process that did nothing else."""

from __future__ import annotations

import re
import resource
import sys
from pathlib import Path

_STATUS = Path("/proc/self/status")
_CLEAR_REFS = Path("/proc/self/clear_refs")


def peak_rss_bytes() -> int:
    """Peak resident memory in bytes, the interpreter and mapped weights included.

    On Linux this is VmHWM: unlike `ru_maxrss` it does not carry over what the parent held when it forked.
    """
    try:
        found = re.search(r"^VmHWM:\s+(\d+) kB", _STATUS.read_text(), re.MULTILINE)
    except OSError:
        found = None
    if found:
        return int(found[1]) * 1024
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    # kibibytes everywhere but on macOS
    return peak if sys.platform == "darwin" else peak * 1024


def reset_peak_rss() -> bool:
    """Start the peak anew from what is resident now; False where the system cannot (anything but Linux)."""
    try:
        _CLEAR_REFS.write_text("5")  # see proc(5)
    except OSError:
        return False
    return True
