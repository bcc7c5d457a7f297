"""Processes that read files, where Python's lock lets threads do no more than one of them would.

They are forked: they start in milliseconds, and import nothing anew. What they run must be a
function of a module, and must start no threads.
"""

import os
import signal
from collections.abc import Iterator
from concurrent.futures import Executor, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from multiprocessing import get_context

from engine.errors import UserError
from engine.stop import end_with_parent, postponed


@contextmanager
def processes(num: int, name: str) -> Iterator[Executor]:
    """So many, already started: what is opened from here on is not theirs, too.

    Args:
        name: of what they read.
    Raises:
        UserError: one was ended by a signal.
    """
    pool = ProcessPoolExecutor(
        num, get_context("fork"), initializer=_begin, initargs=(os.getpid(),)
    )
    try:
        with postponed():
            pool.submit(os.getpid)  # the first call starts all of them
        yield pool
    except BrokenProcessPool:
        raise UserError(
            f"{name}: a process that read it was ended, perhaps for want of memory; "
            f"try again with fewer --workers"
        ) from None
    finally:
        pool.shutdown(cancel_futures=True)


def _begin(parent: int) -> None:
    """Leave Ctrl-C to the parent, and end with it."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    end_with_parent(parent, signal.SIGKILL)
