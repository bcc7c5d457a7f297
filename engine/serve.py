"""The page that shows a run while it trains: its port, its address, and the process that serves it.

The port is opened before anything is written, so that a taken one is said at once; then a process
of its own (tools/report/live.py) gets it. That reads what the run leaves on the disk and nothing
else. The pipe that brings it the address's token ends with the run, however that ends, and it with
the pipe. It is no part of the run: where it breaks down the training goes on.
"""

import secrets
import socket
import subprocess
import sys
from contextlib import suppress
from importlib.util import find_spec
from pathlib import Path
from types import TracebackType
from typing import Self

from engine.config import NO_PAGE
from engine.errors import UserError
from engine.paths import path_text

HOST = "127.0.0.1"
SERVER = "tools.report.live"
NEEDED = ("starlette", "uvicorn")
PATIENCE_S = 3.0
"""How long the end of a run waits for the server's."""


def check_installed() -> None:
    """UserError if what serves is not here."""
    missing = [name for name in NEEDED if find_spec(name) is None]
    if missing:
        remedy = f"pip install {' '.join(NEEDED)}, or leave it out"
        raise UserError(f"--serve: the package {missing[0]} is not installed; {remedy}")


def listening(port: int) -> socket.socket:
    """A socket at this port of this machine alone; 0: at a free one.

    Raises:
        UserError: it is another program's, or may not be taken.
    """
    try:
        return socket.create_server((HOST, port))
    except OSError as error:
        remedy = "name another, or none for a free one"
        raise UserError(f"--serve: port {port} is not free ({error.strerror}); {remedy}") from None


def address(listener: socket.socket, token: str) -> str:
    """The page's; who does not know the token is shown nothing."""
    return f"http://{HOST}:{listener.getsockname()[1]}/{token}/"


class Page:
    """Of one run or sweep; opens its port when entered, and closes it in the end."""

    def __init__(self, port: int) -> None:
        self._port = port
        self._listener: socket.socket | None = None
        self._server: subprocess.Popen[bytes] | None = None

    def __enter__(self) -> Self:
        if self._port != NO_PAGE:
            check_installed()
            self._listener = listening(self._port)
        return self

    def start(self, out: Path) -> str:
        """Serve the run or sweep in OUT, and its neighbours to compare with.

        Returns:
            A line that says where; "" where no page was asked for.
        """
        if self._listener is None:
            return ""
        token, handle = secrets.token_urlsafe(), self._listener.fileno()
        self._server = subprocess.Popen(
            [sys.executable, "-m", SERVER, str(handle), path_text(out)],
            stdin=subprocess.PIPE,
            stdout=subprocess.DEVNULL,
            pass_fds=[handle],
            start_new_session=True,  # Ctrl-C is the run's; the server ends after it
        )
        assert self._server.stdin
        with suppress(BrokenPipeError):
            self._server.stdin.write(f"{token}\n".encode())
            self._server.stdin.flush()
        line = f"page: {address(self._listener, token)}"
        self._listener.close()  # the server's alone: without one nobody waits here
        return line

    def __exit__(
        self, kind: type | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._listener:
            self._listener.close()
        if self._server is None or self._server.stdin is None:
            return
        with suppress(OSError):
            self._server.stdin.close()
        try:
            self._server.wait(PATIENCE_S)
        except subprocess.TimeoutExpired:
            self._server.kill()
            self._server.wait()
