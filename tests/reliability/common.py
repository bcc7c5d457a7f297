"""What the rows share: a tally, small data, and the command in a child that can be killed."""

import ctypes
import functools
import gc
import hashlib
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from engine.data.pack import pack
from engine.data.records import open_records
from engine.errors import UserError
from tools.pack_tmnist import main

SEED = 20260801
MAX_NOTES = 8
WAIT_S = 20.0
CLASSES = ("0", "NA", ",", '"', "é", "~")
PR_SET_PTRACER = 0x59616D61
LIBC = ctypes.CDLL(None, use_errno=True)
SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGQUIT, signal.SIGUSR1)
STRACE = ("strace", "-f", "-y", "-qq", "-s", "0")


@dataclass
class Tally:
    """One row's counts, its folders and its randomness."""

    level: str
    folder: Path
    fast: Path
    """A folder in memory, for what needs no disk."""
    tried: int = 0
    failed: int = 0
    notes: list[str] = field(default_factory=list)
    rng: random.Random = field(default_factory=lambda: random.Random(SEED))

    def count(self, tiny: int, ci: int, full: int) -> int:
        """How often to try at this level."""
        return {"tiny": tiny, "ci": ci, "full": full}[self.level]

    def check(self, good: bool, what: str) -> bool:
        """Count a try; the first failures are noted."""
        self.tried += 1
        if not good:
            self.failed += 1
            self.note(f"FAILED {what}")
        return good

    def note(self, text: str) -> None:
        for folder in (self.folder, self.fast):  # reports carry no folders of this machine
            text = text.replace(str(folder), "...")
        text = " ".join(text.split())[:400]
        if len(self.notes) < MAX_NOTES and text not in self.notes:
            self.notes.append(text)

    def skip(self, what: str, why: str) -> None:
        self.notes.insert(0, f"skipped: {what}: {why}")


@dataclass(frozen=True)
class Done:
    """How a child ended: its exit code (None: it had to be stopped), and all it printed."""

    code: int | None
    text: str
    seconds: float

    @property
    def refused(self) -> bool:
        """Exit code 2 and nothing but one line."""
        return self.code == 2 and self.text.startswith("error: ") and self.text.count("\n") == 1

    def __str__(self) -> str:
        return f"exit {self.code} after {self.seconds:.2f} s: {self.text[-200:]!r}"


def _usual_signals() -> None:
    """Give a forked process the handlers of an executed one; not what nohup or a shell's & ignores,
    since the rows send those, too."""
    for number in SIGNALS:
        usual = signal.default_int_handler if number == signal.SIGINT else signal.SIG_DFL
        signal.signal(number, usual)


def fork(function: Callable[[], int | None]) -> int:
    """Run `function` in a child, whose exit code is its result or, if it raises, 1; the pid."""
    sys.stdout.flush()
    gc.freeze()  # no child looks through these objects again
    pid = os.fork()
    if pid:
        return pid
    code: Any = 1
    try:
        _usual_signals()
        code = function() or 0
    except SystemExit as ended:
        code = ended.code or 0
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


class Child:
    """The command pack_tmnist, forked from this warmed process: 20 times as fast as an exec.

    With `strace` (its options) a tracer is attached before the command begins, so that it counts
    the command's own system calls; its log is in `trace`. With `held` it begins at `go()`.
    Another command is a subclass with another `main`.
    """

    @staticmethod
    def warm() -> None:
        """Let this process import and compile what the command needs."""
        warm()

    @staticmethod
    def main(words: list[str]) -> object:
        """The command itself, in the child."""
        return main.main(words, "pack_tmnist")

    def __init__(
        self,
        *words: object,
        before: Callable[[], object] = lambda: None,
        strace: tuple[str, ...] = (),
        stdin: int | None = None,
        held: bool = False,
    ) -> None:
        self.warm()
        self._log, log = os.pipe()  # no file: it would feel the limits and faults that are tried
        self._gate, self._key = os.pipe()
        self._started = time.perf_counter()
        self.trace = ""

        def command() -> None:
            LIBC.prctl(
                PR_SET_PTRACER, ctypes.c_ulong(-1), 0, 0, 0
            )  # lets a user's strace attach, too
            os.close(self._key)
            os.read(self._gate, 1)
            os.dup2(log, 1)
            os.dup2(log, 2)
            os.dup2(os.open(os.devnull, os.O_RDONLY) if stdin is None else stdin, 0)
            before()
            self.main([str(word) for word in words])

        self.pid = fork(command)
        os.close(self._gate)
        os.close(log)
        self._tracer = None
        if strace:
            self._trace_file = tempfile.NamedTemporaryFile("r", errors="replace")  # noqa: SIM115
            line = [*STRACE, "-o", self._trace_file.name, "-p", str(self.pid), *strace]
            self._tracer = subprocess.Popen(
                line, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
            )
            while (
                self._tracer.poll() is None
                and "\nTracerPid:\t0\n" in Path(f"/proc/{self.pid}/status").read_text()
            ):
                time.sleep(0.001)
        if not held:
            self.go()

    def go(self) -> None:
        self._started = time.perf_counter()
        os.close(self._key)

    def kill(self) -> None:
        os.kill(self.pid, signal.SIGKILL)

    def wait(self, seconds: float = WAIT_S) -> Done:
        """How it ended, of itself or killed after so long from now."""
        code: int | None = None
        end_s = time.perf_counter() + seconds
        while (ended := os.waitpid(self.pid, os.WNOHANG))[0] == 0:
            if time.perf_counter() > end_s:
                self.kill()
                os.waitpid(self.pid, 0)
                break
            time.sleep(0.0005)
        else:
            code = os.waitstatus_to_exitcode(ended[1])
        taken = time.perf_counter() - self._started
        if self._tracer:
            self._tracer.wait()
            self.trace = self._trace_file.read()
            self._trace_file.close()
        return Done(code, self._printed(), taken)

    def _printed(self) -> str:
        """What is in the pipe; a child of the command that lives on may hold its other end."""
        os.set_blocking(self._log, False)
        found = b""
        with suppress(BlockingIOError):
            while data := os.read(self._log, 65536):
                found += data
        os.close(self._log)
        return found.decode(errors="replace")


def run(*words: object, **options: Any) -> Done:
    """The command, from beginning to end."""
    return Child(*words, **options).wait()


@functools.cache
def warm() -> None:
    """Compile, and import what a first pack imports, so that children start with it."""
    with tempfile.TemporaryDirectory() as folder:
        pack(glyph_csv(Path(folder) / "warm.csv", 18, 2), Path(folder) / "out")


@functools.cache
def why_no_strace() -> str:
    """Why system calls cannot be traced here; empty if they can."""
    if not shutil.which("strace"):
        return "there is no strace"
    child = Child("--verify", "nothing", strace=("-e", "trace=exit_group"))
    child.wait()
    return "" if "exit_group" in child.trace else "strace may not attach to a process"


def glyph_csv(path: Path, num_rows: int, side: int, seed: int = 0) -> Path:
    """Write a CSV of random images in TMNIST's layout."""
    rng = random.Random(seed)
    lines = [",".join(["names", "labels", *map(str, range(1, side * side + 1))])]
    for row in range(num_rows):
        label = CLASSES[row % len(CLASSES)].replace('"', '""')
        lines.append(f'Font{row % 9},"{label}",' + ",".join(map(str, rng.randbytes(side * side))))
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return path


def digest(directory: Path) -> str:
    """SHA-256 over the names and bytes of a directory's files."""
    found = hashlib.sha256()
    for file in sorted(directory.iterdir()):
        found.update(f"{file.name} {file.stat().st_size}\n".encode() + file.read_bytes())
    return found.hexdigest()


def verdict(directory: Path, in_memory: bool = True) -> str:
    """What reading a record directory comes to: its fingerprint, missing, refused, or an error."""
    if not os.path.lexists(directory):
        return "missing"
    try:
        records = open_records(directory, in_memory=in_memory)
        for split in records.splits.values():
            split.image_NHW[:]
    except UserError:
        return "refused"
    except Exception as error:
        return f"raised {error!r}"
    return records.fingerprint


def beside(target: Path) -> list[str]:
    """What lies beside `target`: nothing should."""
    return [name for name in os.listdir(target.parent) if name != target.name]
