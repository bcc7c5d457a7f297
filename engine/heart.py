"""Each rank's heartbeat in the ranks' store, and the end of a run where one has stopped beating.

A thread writes once a second what its rank is doing, and reads what the others wrote. A rank that
is stopped, or whose machine is gone, writes nothing; one whose main thread hangs writes the same
again and again. After the time-out the others end with a sentence that names it. This does not rely
on the process group, whose collectives are what hangs.

The store is on the machine of rank 0. Where that one is cut off, the thread waits for an answer
that never comes, for the quarter of an hour that TCP takes to give up; a second thread looks at the
clock alone, and ends the rank after the same time-out.

A rank that was killed ends the others' collectives, but not always: torch may wait on. Its launcher
then asks the others to stop, which they do not hear in there; the second thread ends them.
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
from engine.host import env_machine, is_last_try
from engine.stop import STOP

PERIOD_S = 1.0
JOIN_S = 5.0
POLL_S = 0.05
SPEAK_S = 1.5
"""For the rank of a machine that speaks to have spoken and ended their launcher; else others do."""
DEAF_S = 5.0
"""How long a rank that was asked to stop waits for one that beats no more."""
DIED = (
    "ended without a word, perhaps killed; "
    "start the run again with --resume, and look at the memory of its machine"
)
LEFT = "leaving"
"""What a rank did last that beats no more because its run has ended."""
SAVING = "saving"
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


def hung_ranks(
    seen: dict[int, Seen], now_s: float, timeout_s: float
) -> tuple[list[int], str] | None:
    """(ranks, sentence) of those that hold the others up; None while all is well."""
    here = {rank: each for rank, each in seen.items() if each.beat.doing != LEFT}
    silent_s = {rank: now_s - each.silent_since_s for rank, each in here.items()}
    if max(silent_s.values(), default=0.0) >= timeout_s:
        # a machine's ranks do not beat at one moment: those that went with it are named with it
        silent = [rank for rank, each_s in silent_s.items() if each_s >= timeout_s - 2 * PERIOD_S]
        each = seen[silent[0]]
        verb = "has" if len(silent) == 1 else "have"
        what = f"{verb} been silent for {max(silent_s.values()):.0f} s (stopped, or gone)"
        return silent, _sentence(silent, each.beat, what)
    still = [each for each in here.values() if now_s - each.still_since_s >= timeout_s]
    if len(still) < len(here) or any(each.beat.doing not in GUARDED for each in still):
        return None
    behind = min(here, key=lambda rank: (seen[rank].beat.step, seen[rank].beat.doing != WAITING))
    each = seen[behind]
    what = f"hangs for {now_s - each.still_since_s:.0f} s"
    return [behind], _sentence([behind], each.beat, what)


def died(ranks: list[int]) -> str:
    """The sentence of those that are left, about ranks that beat no more; of one that nobody can
    name where the list is empty."""
    who = f"{named(ranks)}:" if ranks else "another rank"
    return f"{who} {'have' if len(ranks) > 1 else 'has'} {DIED}"


def named(ranks: list[int]) -> str:
    """Ranks as a sentence names them: rank 3; ranks 0, 1 and 2."""
    if len(ranks) == 1:
        return f"rank {ranks[0]}"
    return f"ranks {', '.join(map(str, ranks[:-1]))} and {ranks[-1]}"


def _sentence(ranks: list[int], beat: Beat, what: str) -> str:
    """What the first of the ranks was at stands for all: they are on one machine, or in step."""
    where = f"its last step was {beat.step}, it was {beat.doing}"
    if len(ranks) > 1:
        where = f"the last step of rank {ranks[0]} was {beat.step}, it was {beat.doing}"
    return f"{named(ranks)}: {what}; {where}; start the run again with --resume"


def read_beats(store: Any, size: int) -> dict[int, Beat]:
    """What each rank wrote last.

    Raises:
        RuntimeError: the store has gone.
    """
    texts = store.multi_get([f"beat {rank}" for rank in range(size)])
    return {rank: Beat(**json.loads(text)) for rank, text in enumerate(texts)}


class Watch:
    """The threads of a rank that beat and look after the others; they die with the process."""

    def __init__(self, store: Any, rank: int, size: int, heart: Heart, timeout_s: float) -> None:
        """`store` is a connection that nobody else uses."""
        self._store = store
        self._rank = rank
        self._size = size
        self._heart = heart
        self._timeout_s = timeout_s
        self._launcher = os.getppid()
        self._count = 0
        self._over = threading.Event()
        self._has_failed = False
        self._thread = threading.Thread(target=self._work, name="heart", daemon=True)
        self._guard = threading.Thread(target=self._look_at_clock, name="guard", daemon=True)
        self.beats: dict[int, Beat] = {}
        """What the ranks wrote last."""
        self._write()

    def start(self) -> None:
        """Begin, once all ranks have made theirs."""
        self.beats = read_beats(self._store, self._size)
        self._thread.start()
        self._guard.start()

    def stop(self, failed: bool = False) -> None:
        """The run has ended; nobody is waited for any more.

        A rank that failed is missed by the others; one that is done is not.

        The thread is: in the middle of asking the store while the interpreter ends, it would abort
        the process.
        """
        self._has_failed = failed
        self._over.set()
        self._guard.join(JOIN_S)
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

    def _work(self) -> None:
        now_s = time.monotonic()
        seen = {rank: Seen(beat, now_s, now_s) for rank, beat in self.beats.items()}
        while not self._over.wait(PERIOD_S):
            try:
                self._write()
                self.beats = read_beats(self._store, self._size)
            except RuntimeError:  # it has ended with its machine: collectives break by that, too
                return
            now_s = time.monotonic()
            for rank, beat in self.beats.items():
                seen[rank].update(beat, now_s)
            if (found := hung_ranks(seen, now_s, self._timeout_s)) and not self._over.is_set():
                _end_hung(*found, self.beats, self._rank)
        if not self._has_failed:
            self._heart.doing = LEFT
            with suppress(RuntimeError):
                self._write()

    def _look_at_clock(self) -> None:
        """End this rank where the store has not answered for the time-out; and where it was asked
        to stop, but waits for a rank that has died.

        It counts its own waits: a process that was stopped for a while has missed nothing.
        """
        answered = asked = self.beats
        silent_s = deaf_s = 0.0
        while not self._over.wait(PERIOD_S):
            silent_s = silent_s + PERIOD_S if self.beats is answered else 0.0
            answered = self.beats
            if silent_s >= self._timeout_s:
                self._end_cut_off(silent_s)
            if not STOP.was_sent():
                asked = answered
                continue
            deaf_s += PERIOD_S
            dead = died_since(asked, answered, self._rank)
            is_saving = self._heart.doing == SAVING  # it waits for a disk, not for a rank
            if dead and deaf_s >= DEAF_S and not is_saving and not self._over.is_set():
                _say(died(dead), answered, self._rank, dead)
                os._exit(EXIT_HUNG)

    def _end_cut_off(self, silent_s: float) -> None:
        speaks = _say(lost_store(self.beats, self._heart, silent_s), self.beats, self._rank, [])
        if self._thread.is_alive():  # else the store has ended, and its kernel said so
            _end_launcher(self._launcher, 0.0 if speaks else SPEAK_S)
        os._exit(EXIT_HUNG)


def died_since(before: dict[int, Beat], now: dict[int, Beat], rank: int) -> list[int]:
    """Which ranks have beaten no more since then and did not leave; none if `rank` is one."""
    still = [r for r, beat in now.items() if beat.count == before[r].count and beat.doing != LEFT]
    return [] if rank in still else still


def lost_store(beats: dict[int, Beat], heart: Heart, silent_s: float) -> str:
    """The sentence of a rank that is cut off; those on the store's machine are missing to it."""
    lost = named([rank for rank, each in beats.items() if each.machine == 0])
    what = f"the ranks' store, on the machine of {lost}, has not answered for {silent_s:.0f} s"
    why = "stopped, or gone, or the network to it is"
    where = f"the last step here was {heart.step}, {heart.doing}"
    return f"{what} ({why}); {where}; start the run again with --resume"


def _end_hung(hung: list[int], sentence: str, beats: dict[int, Beat], rank: int) -> None:
    """Say it once per machine, kill those that hang if they are here, and end."""
    mine = beats[rank]
    _say(sentence, beats, rank, hung)
    for each in hung:
        other = beats[each]
        if (other.machine, other.parent) == (mine.machine, mine.parent) and each != rank:
            with suppress(OSError):
                os.kill(other.pid, signal.SIGKILL)  # torchrun would wait 30 s for it
    os._exit(EXIT_HUNG)


def _end_launcher(launcher: int, wait_s: float) -> None:
    """End the torchrun of a rank that is cut off, on its last try, if it has not ended by then.

    It waits for the same store, deaf to signals, for as long as TCP tries. Where it may start its
    ranks again it is left alone: the network may come back.
    """
    if not is_last_try():
        return
    end_s = time.monotonic() + wait_s
    while os.getppid() == launcher and time.monotonic() < end_s:
        time.sleep(POLL_S)
    if os.getppid() == launcher:  # else it has died, and this process has another parent
        with suppress(OSError):
            os.kill(launcher, signal.SIGKILL)


def _say(sentence: str, beats: dict[int, Beat], rank: int, hung: list[int]) -> bool:
    """Print it if this is the first rank of its machine that does not hang; whether it is."""
    machine = beats[rank].machine
    here = [r for r, each in beats.items() if each.machine == machine and r not in hung]
    speaks = rank == min(here, default=rank)
    if speaks:
        print(f"error: {printable(sentence)}", file=sys.stderr, flush=True)
    sys.stdout.flush()
    return speaks
