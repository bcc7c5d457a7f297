"""The one error that a user may cause, and how a command ends on it: one line, exit code 2."""

import os
import signal
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from engine.stop import STOP, Stopped
from engine.ui import guard_outputs

EXIT_USER_ERROR = 2
LINGER_S = 10.0


class UserError(Exception):
    """A fault the user can mend; its text is one line: what is wrong, where, and what to do."""

    is_shared = False
    """Whether every rank of the run raises it."""
    speaks = True
    """False where another process prints it: of a shared one, a single rank of each machine."""


def printable(text: str) -> str:
    """`text` with controls shown as \\xNN: data neither breaks the line nor steers a terminal."""
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)


def first_cause(error: BaseException) -> BaseException:
    """What went wrong first.

    What fails while an error is handled hides it, as the end of a failed capture does.
    """
    while error.__context__ and not error.__suppress_context__:
        error = error.__context__
    return error


def sentence(error: BaseException) -> str:
    """The error's kind and the first line of what it says."""
    return f"{type(error).__name__}: {str(error).strip().partition(chr(10))[0]}"


@contextmanager
def exit_on_user_error(end: Callable[[int], Any] = sys.exit) -> Iterator[None]:
    """Turn a UserError into one line on stderr and exit code 2.

    Args:
        end: ends the process with a code; ranks must not go through the interpreter's shutdown.
    """
    guard_outputs()
    try:
        yield
    except UserError as error:
        if error.speaks:
            print(f"error: {printable(str(error))}", file=sys.stderr, flush=True)
        else:
            _let_the_speaker_end()
        end(EXIT_USER_ERROR)
    except MemoryError:
        print(
            "error: not enough memory; free some, or raise its limit", file=sys.stderr, flush=True
        )
        end(EXIT_USER_ERROR)
    except Stopped as stopped:
        print(f"error: {stopped}; there was nothing to save", file=sys.stderr, flush=True)
        end(128 + stopped.number)
    except KeyboardInterrupt:
        print("error: interrupted", file=sys.stderr, flush=True)
        end(128 + signal.SIGINT)


def _let_the_speaker_end() -> None:
    """Wait for the rank that speaks: torchrun kills the others as soon as one has ended.

    One that was asked to stop does not wait: the speaker has ended, or the torchrun has, and nobody
    would ask again.
    """
    signal.signal(signal.SIGTERM, lambda *_: os._exit(EXIT_USER_ERROR))
    if not STOP.number:
        time.sleep(LINGER_S)
