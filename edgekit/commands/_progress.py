"""A build's progress on stderr: a bar while a step executes, one line when it is done."""

from __future__ import annotations

import time
from types import TracebackType
from typing import Self

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, SpinnerColumn, TextColumn, TimeElapsedColumn

from edgekit.build import BuildEvents

_QUIET_S = 30.0
"""Where a log shows no bar, a step that takes longer says how far it is."""


class ProgressDisplay(BuildEvents):
    """Shows events on stderr; without a terminal there, only the lines."""

    def __init__(self) -> None:
        self.console = Console(stderr=True, highlight=False)
        self._progress = Progress(
            SpinnerColumn(),
            TextColumn("{task.description}"),
            BarColumn(bar_width=30),
            MofNCompleteColumn(),
            TextColumn("{task.fields[unit]}"),
            TimeElapsedColumn(),
            console=self.console,
            transient=True,
        )
        self._task = self._progress.add_task("", total=None, unit="", visible=False)
        self._step, self._told = "", 0.0

    def __enter__(self) -> Self:
        self._progress.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._progress.stop()

    def started(self, step: str, position: int, steps: int) -> None:
        """Show a fresh bar."""
        self._step, self._told = step, time.monotonic()
        self._progress.reset(self._task, total=None, description=f"{position}/{steps} {step}", unit="", visible=True)

    def progressed(self, done: int, total: int | None, unit: str) -> None:
        """Move the bar; without a terminal, print a line every half minute."""
        if not self.console.is_terminal and time.monotonic() >= self._told + _QUIET_S:
            self._told = time.monotonic()
            self.console.print(f"  {self._step:<18} {done} of {total or '?'} {unit}")
        self._progress.update(self._task, completed=done, total=total, unit=unit)

    def finished(self, step: str, status: str, seconds: float) -> None:
        """Print one line for the step."""
        self._progress.update(self._task, visible=False)
        detail = f"{seconds:6.1f} s" if status == "executed" else "  cached"
        self.console.print(f"  {step:<18} {detail}")

    def noted(self, text: str) -> None:
        """Print a remark."""
        self.console.print(f"  note: {text}", markup=False)
