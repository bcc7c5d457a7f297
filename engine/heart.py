"""Each rank's heartbeat in the ranks' store, and the end of a run where one has stopped beating.

A thread writes once a second what its rank is doing, and reads what the others wrote. A rank that
is stopped, or whose machine is gone, writes nothing; one whose main thread hangs writes the same
again and again. After the time-out the others end with a sentence that names it. This does not rely
on the process group, whose collectives are what hangs.
"""

import json
import os
import signal
import sys
import threading
import time
from contextlib import suppress
from dataclasses import asdict, dataclass
from typing import Any

from engine.errors import printable
from engine.host import env_machine

PERIOD_S = 1.0
JOIN_S = 5.0
WAITING = "waiting for its feed"
TRAINING = "training"
EVALUATING = "evaluating"
GUARDED = (WAITING, TRAINING, EVALUATING)
"""What may not stand still; start-up, compilation and a slow disk may."""
EXIT_HUNG = 3


@dataclass
class Heart:
    """What a rank is doing, set by its main thread."""

    step: int = 0
    """The last step it finished."""
    doing: str = "starting"
    num_signs: int = 0
    """Grows as it goes on."""


@dataclass(frozen=True)
class Beat:
    """What a rank wrote."""

    count: int
    step: int
    doing: str
    num_signs: int
    pid: int
    parent: int
    machine: int


@dataclass
class Seen:
    """A rank as another one sees it."""

    beat: Beat
    silent_since_s: float
    """When its thread wrote last."""
    still_since_s: float
    """When its main thread went on last."""

    def update(self, beat: Beat, now_s: float) -> None:
        if beat.count != self.beat.count:
            self.silent_since_s = now_s
        if (beat.num_signs, beat.doing) != (self.beat.num_signs, self.beat.doing):
            self.still_since_s = now_s
        self.beat = beat


def hung_rank(seen: dict[int, Seen], now_s: float, timeout_s: float) -> tuple[int, str] | None:
    """(rank, sentence) of the one that holds the others up; None while all is well."""
    silent = [rank for rank, each in seen.items() if now_s - each.silent_since_s >= timeout_s]
    if silent:
        each = seen[silent[0]]
        what = f"has been silent for {now_s - each.silent_since_s:.0f} s"
        return silent[0], _sentence(silent[0], each.beat, f"{what} (stopped, or gone)")
    still = [each for each in seen.values() if now_s - each.still_since_s >= timeout_s]
    if len(still) < len(seen) or any(each.beat.doing not in GUARDED for each in still):
        return None
    behind = min(seen, key=lambda rank: (seen[rank].beat.step, seen[rank].beat.doing != WAITING))
    each = seen[behind]
    return behind, _sentence(behind, each.beat, f"hangs for {now_s - each.still_since_s:.0f} s")


def _sentence(rank: int, beat: Beat, what: str) -> str:
    where = f"its last step was {beat.step}, it was {beat.doing}"
    return f"rank {rank}: {what}; {where}; start the run again with --resume"


class Watch:
    """The thread of a rank that beats and looks after the others; it dies with the process."""

    def __init__(self, store: Any, rank: int, size: int, heart: Heart, timeout_s: float) -> None:
        """`store` is a connection that nobody else uses."""
        self._store = store
        self._rank = rank
        self._size = size
        self._heart = heart
        self._timeout_s = timeout_s
        self._count = 0
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._work, name="heart", daemon=True)
        self._write()

    def start(self) -> None:
        """Begin, once all ranks have made theirs."""
        self._thread.start()

    def stop(self) -> None:
        """The run has ended; nobody is waited for any more.

        The thread is: in the middle of asking the store while the interpreter ends, it would abort
        the process.
        """
        self._over.set()
        self._thread.join(JOIN_S)

    def _write(self) -> None:
        self._count += 1
        beat = Beat(
            count=self._count,
            pid=os.getpid(),
            parent=os.getppid(),
            machine=env_machine(),
            **asdict(self._heart),
        )
        self._store.set(f"beat {self._rank}", json.dumps(asdict(beat)))

    def _read(self) -> dict[int, Beat]:
        texts = self._store.multi_get([f"beat {rank}" for rank in range(self._size)])
        return {rank: Beat(**json.loads(text)) for rank, text in enumerate(texts)}

    def _work(self) -> None:
        now_s = time.monotonic()
        seen = {rank: Seen(beat, now_s, now_s) for rank, beat in self._read().items()}
        while not self._over.wait(PERIOD_S):
            try:
                self._write()
                beats = self._read()
            except RuntimeError:  # the store has ended with its machine: collectives break by that
                return
            now_s = time.monotonic()
            for rank, beat in beats.items():
                seen[rank].update(beat, now_s)
            if (found := hung_rank(seen, now_s, self._timeout_s)) and not self._over.is_set():
                _end(*found, seen, self._rank)


def _end(hung: int, sentence: str, seen: dict[int, Seen], rank: int) -> None:
    """Say it once per machine, kill the one that hangs if it is here, and end."""
    mine = seen[rank].beat
    here = [r for r, each in seen.items() if each.beat.machine == mine.machine and r != hung]
    if rank == min(here, default=rank):
        print(f"error: {printable(sentence)}", file=sys.stderr, flush=True)
    other = seen[hung].beat
    if (other.machine, other.parent) == (mine.machine, mine.parent) and hung != rank:
        with suppress(OSError):
            os.kill(other.pid, signal.SIGKILL)  # torchrun would wait 30 s for it
    sys.stdout.flush()
    os._exit(EXIT_HUNG)
