"""`edgekit --help` beside `python -c "import click"`, interleaved."""

from __future__ import annotations

import json
import statistics
import subprocess
import sys
import time


def seconds(*arguments: str) -> float:
    """Wall time of a fresh interpreter."""
    start = time.perf_counter()
    subprocess.run([sys.executable, *arguments], check=True, capture_output=True)
    return time.perf_counter() - start


def main() -> None:
    """Print medians and the median of the paired ratios."""
    pairs = [(seconds("-m", "edgekit", "--help"), seconds("-c", "import click")) for _ in range(21)]
    ours, theirs = (statistics.median(side) for side in zip(*pairs, strict=True))
    ratios = sorted(a / b for a, b in pairs)
    print(f"edgekit --help {ours * 1e3:.0f} ms, import click {theirs * 1e3:.0f} ms")
    print(f"ratio {statistics.median(ratios):.2f} [{ratios[2]:.2f}, {ratios[-3]:.2f}]")
    print(json.dumps({"benchmark": "startup", "ratio": statistics.median(ratios), "help_s": ours, "click_s": theirs}))


if __name__ == "__main__":
    main()
