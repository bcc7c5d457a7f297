"""Signals that ask a run to stop: the step in hand is finished and saved, then the run ends.

SIGTERM (schedulers, torchrun), SIGUSR1 (SLURM's warning), SIGHUP (a terminal that closes) and
SIGINT (Ctrl-C) all mean this. The same again, a second later or more, means at once. Before
training and after it there is nothing to save, so the process ends where it stands.

Python hears a signal between two of its own instructions: not while the main thread is in a
collective that waits for a rank which has died. `was_sent` knows of it all the same.
"""

import ctypes
import os
import signal
import socket
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import Any

SIGNALS = (signal.SIGTERM, signal.SIGUSR1, signal.SIGHUP, signal.SIGINT)
PATIENCE_S = 1.0
"""Signals this soon after the first are the same wish: a terminal and torchrun both send one."""
PR_SET_PDEATHSIG = 1
"""linux/prctl.h."""


class Stopped(BaseException):
    """A signal came while nothing was there to be saved."""

    def __init__(self, number: int) -> None:
        super().__init__(f"stopped by {signal.Signals(number).name}")
        self.number = number


class StopRequest:
    """What signals asked of this process."""

    def __init__(self) -> None:
        self.number = 0
        """The first signal that came; 0: none."""
        self._since_s = 0.0
        self._is_polled = False
        self._was_sent = False
        self._sent, self._woken = _new_pipe()

    def install(self) -> None:
        """Handle the signals from now on; only the main thread may call this."""
        sys.unraisablehook = _report_unraisable
        # A process that was forked shares those it was made with: it would hear others' signals.
        sent, woken = _new_pipe()
        signal.set_wakeup_fd(woken.fileno(), warn_on_full_buffer=False)
        self._sent, self._woken = sent, woken  # only now: a signal may still go to the old one
        os.register_at_fork(after_in_child=lambda: signal.set_wakeup_fd(-1))
        for number in SIGNALS:
            if signal.getsignal(number) is not signal.SIG_IGN:  # nohup ignores SIGHUP
                signal.signal(number, self._handle)

    def was_sent(self) -> bool:
        """Whether a signal has come, even if Python has not heard it yet; for another thread."""
        with suppress(BlockingIOError):
            self._was_sent = bool(set(self._sent.recv(64)) & set(SIGNALS)) or self._was_sent
        return self._was_sent

    @contextmanager
    def polled(self) -> Iterator[None]:
        """While this is entered a signal only sets `number`, which the caller looks at."""
        was_polled = self._is_polled
        self._is_polled = True
        try:
            yield
        finally:
            self._is_polled = was_polled

    def _handle(self, number: int, _: Any) -> None:
        now_s = time.monotonic()
        if not self.number:
            self.number = number
            self._since_s = now_s
            if not self._is_polled:
                raise Stopped(number)
        elif now_s - self._since_s >= PATIENCE_S:
            os._exit(128 + number)


def _new_pipe() -> tuple[socket.socket, socket.socket]:
    """What Python writes the numbers of signals into, and the end that they are read from first."""
    sent, woken = socket.socketpair()
    sent.setblocking(False)
    woken.setblocking(False)
    return sent, woken


def _report_unraisable(unraisable: Any) -> None:
    """Python drops what is raised in a destructor; a Stopped that is lost there comes to nothing:
    its number is kept, and the run stops at its first pulse."""
    if not isinstance(unraisable.exc_value, Stopped):
        sys.__unraisablehook__(unraisable)


STOP = StopRequest()
"""Signals reach the whole process, so there is one."""


@contextmanager
def postponed() -> Iterator[None]:
    """Hear SIGINT and SIGTERM only when this is left: where they would leave processes behind.

    Of threads only the main one hears signals; in another nothing is postponed.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    heard: list[int] = []
    handlers = {
        number: signal.signal(number, lambda number, _: heard.append(number))
        for number in (signal.SIGINT, signal.SIGTERM)
    }
    try:
        yield
    finally:
        for number, handler in handlers.items():
            signal.signal(number, signal.SIG_DFL if handler is None else handler)
        for sent in heard:
            signal.raise_signal(sent)


def end_with_launcher() -> None:
    """Let a rank be asked to stop when the torchrun that started it dies, even by SIGKILL."""
    if "TORCHELASTIC_RUN_ID" not in os.environ:
        return
    launcher = os.getppid()
    end_with_parent(launcher, signal.SIGTERM)
    if launcher == 1 and not _runs_this_python(launcher):  # it died before
        os.kill(os.getpid(), signal.SIGTERM)


def _runs_this_python(pid: int) -> bool:
    """Whether a process is one of this interpreter; in a container, process 1 may be torchrun."""
    try:
        return os.path.samefile(f"/proc/{pid}/exe", "/proc/self/exe")
    except OSError:
        return False


def end_with_parent(parent: int, number: int) -> None:
    """Let this process get a signal when its parent dies, even by SIGKILL."""
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, number)
    if os.getppid() != parent:  # it died before the call
        os.kill(os.getpid(), number)
