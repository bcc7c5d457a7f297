"""What a person sees while work goes on: a progress bar on a terminal, plain lines elsewhere."""

import sys
from types import TracebackType
from typing import Any


class Progress:
    """Progress of one task.

    Args:
        title: what is being done.
        total: units of work; the bar is full there.
        enabled: false on ranks other than 0; then nothing is shown.
    """

    def __init__(self, title: str, total: float, enabled: bool = True) -> None:
        self._bar: Any = None
        if enabled and sys.stderr.isatty():
            from rich.console import Console
            from rich.progress import BarColumn, TextColumn, TimeRemainingColumn
            from rich.progress import Progress as Bar

            columns = (TextColumn("{task.description}"), BarColumn(), TextColumn("{task.fields[note]}"))
            self._bar = Bar(*columns, TimeRemainingColumn(), console=Console(stderr=True), transient=True)
            self._task = self._bar.add_task(title, total=total, note="")

    def update(self, done: float, note: str = "") -> None:
        if self._bar is not None:
            self._bar.update(self._task, completed=done, note=note)

    def __enter__(self) -> "Progress":
        if self._bar is not None:
            self._bar.start()
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, trace: TracebackType | None) -> None:
        if self._bar is not None:
            self._bar.stop()
