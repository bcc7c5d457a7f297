"""What a person sees: output that cannot fail the work, and a progress bar on a terminal.

The work is what counts, not its words. Characters that an output's encoding lacks are shown as
backslash escapes; an output that is closed, full, or whose reader has gone swallows the rest, and
the exit code stays the work's own.
"""

import codecs
import io
import os
import select
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, TextIO

import click
from click.core import ParameterSource


def options_given() -> dict[str, str]:
    """What the running command's line gives, by parameter: the option as users write it."""
    context = click.get_current_context()
    return {
        each.name: max(each.opts, key=len)
        for each in context.command.params
        if each.name and context.get_parameter_source(each.name) is ParameterSource.COMMANDLINE
    }


@contextmanager
def progress_bar(title: str, total: float, enabled: bool = True) -> Iterator[Callable[..., None]]:
    """A bar for one task; yields what is called with the units done and, at will, a note.

    Args:
        total: units of work; the bar is full there.
        enabled: false on ranks other than 0; then nothing is shown.
    """
    if not (enabled and sys.stderr.isatty()):
        yield lambda done, note="": None
        return
    from rich.console import Console
    from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        TextColumn("{task.fields[note]}"),
        TimeRemainingColumn(),
    )
    console = Console(file=sys.stderr)  # named, so that rich asks for its encoding
    with Progress(*columns, console=console, transient=True) as bar:
        task = bar.add_task(title, total=total, note="")
        yield lambda done, note="": bar.update(task, completed=done, note=note)


def guard_outputs() -> None:
    """Make stdout and stderr such that no text and no state of theirs can raise; call it first.

    Only the process's own streams are replaced, once; what a test put in their place stays.
    """
    _occupy_standard_descriptors()
    if sys.stdout is sys.__stdout__:
        sys.stdout = _guarded(sys.stdout, 1)
    if sys.stderr is sys.__stderr__:
        sys.stderr = _guarded(sys.stderr, 2)


def _occupy_standard_descriptors() -> None:
    """Open /dev/null as 0, 1 and 2 where they are closed, lest a file of ours becomes one."""
    while (handle := os.open(os.devnull, os.O_RDWR)) <= 2:
        os.set_inheritable(handle, True)
    os.close(handle)


def _guarded(stream: TextIO | None, descriptor: int) -> TextIO:
    encoding = stream.encoding if stream else "utf-8"
    file: io.BufferedWriter[Any] = io.BufferedWriter(_LossyFile(descriptor, "w", closefd=False))
    if descriptor == 1 and codecs.lookup(encoding).name == "ascii":
        return _EscapingText(file, encoding, "utf-8")  # click goes round a stdout that says ASCII
    return _EscapingText(file, encoding, encoding)


class _LossyFile(io.FileIO):
    """A descriptor that swallows what it cannot write: the disk is full, or its reader has gone."""

    def write(self, data: Any) -> int:
        try:
            while (written := super().write(data)) is None:  # a pipe that does not block
                select.select([], [self], [])
        except OSError:
            return memoryview(data).nbytes
        return written


class _EscapingText(io.TextIOWrapper):
    """Text of which every character can be written, those `encoding` lacks as backslash escapes."""

    def __init__(self, file: "io.BufferedWriter[Any]", encoding: str, claimed: str) -> None:
        super().__init__(file, claimed, line_buffering=True)
        self._encoding = encoding

    def write(self, text: str) -> int:
        return super().write(text.encode(self._encoding, "backslashreplace").decode(self._encoding))
