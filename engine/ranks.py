"""The ranks of a run before they have a process group, and beside it: what one cannot do, all say.

torchrun ends the ranks of a machine as soon as one of them has ended, and those of other machines
wait for minutes. So a rank that cannot go on leaves its sentence in torch's key-value store, which
needs neither devices nor a process group; there the others find it, say it once per machine, and
end too.
"""

import os
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from datetime import timedelta
from typing import Any, TypeVar

from engine.errors import UserError, printable, sentence
from engine.heart import EXIT_HUNG, LEFT, PERIOD_S, Beat, Heart, Watch, died, read_beats
from engine.host import (
    env_local_rank,
    env_machine,
    env_meeting_place,
    env_num_machines,
    env_rank,
    env_world_size,
    prefer_interface,
    quiet_native_log,
)
from engine.meeting import GIVE_ADDRESS, MOST_PAUSE_S, common_try, did_not_come
from engine.network import means_only_here, own_address, way_to
from engine.stop import STOP, Stopped

JOIN_TIMEOUT = timedelta(seconds=120)
"""For all ranks to come: machines start at different moments, and one may pack the sample first."""
ALONE_TIMEOUT = timedelta(seconds=20)
"""For a store that another machine can hardly have: torchrun opens it before it starts ranks."""
LEAVE_TIMEOUT = timedelta(seconds=5)
"""For all ranks to have read why they end."""
SHORTEST_PAUSE_S = 0.001
"""Between two looks into the store, at first."""
REASON_S = 3.0
"""How long a rank whose collective broke looks for another rank's reason."""
SIGNS = "signs"
"""Key of a count in the store."""
T = TypeVar("T")


class OtherRankFailed(UserError):
    """Another rank failed and this one cannot go on; that one's reason is in the store."""


@dataclass
class Ranks:
    """The processes of a run."""

    rank: int
    size: int
    local_rank: int
    store: Any = None
    """torch's, with a prefix for each try; None for a rank alone."""
    _turn: int = 0
    _last_beats: dict[int, Beat] = field(default_factory=dict)
    """What the watch saw last of all ranks; empty before there is one."""
    _patience_s: float = JOIN_TIMEOUT.total_seconds()
    """How long the store may be asked why another rank failed."""

    def agree(self, work: Callable[[], T]) -> T:
        """Do `work` on every rank and wait for the others; where one fails, all end. Collective.

        Raises:
            UserError: "rank N: ..." of the lowest rank that failed; without its number if all
                failed alike.
        """
        if self.size == 1:
            return work()
        failed: UserError | None = None
        try:
            result = work()
        except UserError as error:
            failed = error
            self._leave_reason(error)
        self._turn += 1
        num_failed = self._meet(f"turn {self._turn}", failed is not None)
        if num_failed:
            _, text = self._reason() or (0, str(failed))
            self.leave()
            raise _spoken(text, self.local_rank == 0)
        return result

    def agree_on(self, what: str, value: str) -> None:
        """Refuse to go on where a rank has another `value` than rank 0. Collective.

        Raises:
            UserError: naming `what`, the rank and both values.
        """

        def compare() -> None:
            if self.rank == 0:
                self.store.set(f"value of {what}", value)
            try:
                self._wait_for(f"value of {what}", JOIN_TIMEOUT)
                first = self.store.get(f"value of {what}").decode()
            except RuntimeError:
                raise UserError(did_not_come([0], JOIN_TIMEOUT)) from None
            if first != value:
                raise UserError(
                    f"its {what} is {value}, that of rank 0 is {first}; give all ranks the same"
                )

        if self.size > 1:
            self.agree(compare)

    @contextmanager
    def explaining(self) -> Iterator[None]:
        """Where a rank fails inside, let it say so with its number; where its collective breaks
        because another failed, let it say that one's reason, or which rank has gone."""
        try:
            yield
        except Stopped as stopped:
            if self.size > 1:
                broken = _broken_before(stopped)
                with self._answered(broken or stopped), STOP.polled():
                    if broken:
                        self._explain(broken)
                    self._leave_reason(UserError(str(stopped)))
            raise
        except Exception as error:  # of the process group's own, torch documents no common type
            if self.size > 1 and not (isinstance(error, UserError) and error.is_shared):
                # torchrun asks the others to stop as soon as one has ended, or its rendezvous has;
                # they would say that in place of the reason.
                with self._answered(error), STOP.polled():
                    self._explain(error)
            raise

    def _explain(self, error: Exception) -> None:
        """Raise the sentence that stands for the error; return where it is this rank's own bug."""
        if isinstance(error, UserError) and not isinstance(error, OtherRankFailed):
            self._leave_reason(error)
            raise _spoken(f"rank {self.rank}: {error}", True) from None
        before = self._beats_of_the_living()
        found = self._wait_for_reason()
        if found:
            machine, text = found
            elsewhere = machine != env_machine()  # where it failed, that rank itself speaks
            raise _spoken(text, self.local_rank == 0 and elsewhere) from None
        if _is_broken_collective(error):
            speaks = self._is_first_to_speak()
            raise _spoken(died(self._dead(before)), speaks) from None

    @contextmanager
    def _answered(self, error: BaseException) -> Iterator[None]:
        """End the process where the store lets this rank wait: nobody watches over it any more."""

        def end() -> None:
            what = f"rank {self.rank}: {printable(sentence(error))}; and the ranks' store is silent"
            print(f"error: {what}; start the run again with --resume", file=sys.stderr, flush=True)
            os._exit(EXIT_HUNG)

        timer = threading.Timer(self._patience_s, end)
        timer.daemon = True
        timer.start()
        try:
            yield
        finally:
            timer.cancel()

    @contextmanager
    def watching(self, heart: Heart, timeout_s: float) -> Iterator[None]:
        """Beat for the others, and end where one of them hangs, while this is entered."""
        if self.size == 1:
            yield
            return
        self._patience_s = timeout_s + REASON_S
        watch = Watch(self.store.clone(), self.rank, self.size, heart, timeout_s)
        self.agree(lambda: None)  # all have beaten once
        watch.start()
        has_failed = True
        try:
            yield
            has_failed = False
        finally:
            watch.stop(has_failed)
            self._last_beats = watch.beats

    def from_first(self, work: Callable[[], str]) -> str:
        """Do `work` on rank 0; its text on every rank. Collective; errors as in `agree`."""
        if self.size == 1:
            return work()
        key = f"text {self._turn}"

        def share() -> None:
            if self.rank == 0:
                self.store.set(key, work())

        self.agree(share)
        return str(self.store.get(key).decode())

    def texts_of_all(self, what: str, text: str) -> list[str]:
        """Each rank's text, by rank. Collective."""
        if self.size == 1:
            return [text]
        self.store.set(f"{what} of {self.rank}", text)
        self.agree(lambda: None)
        return [self.store.get(f"{what} of {rank}").decode() for rank in range(self.size)]

    def sign(self) -> None:
        """Let the others see that this rank gets on with what they wait for, and wait on."""
        if self.size > 1:
            self.store.add(SIGNS, 1)

    def leave(self) -> None:
        """Wait for the others before this rank ends: the store may end with it. Collective."""
        if self.size > 1:
            with suppress(RuntimeError, UserError):
                self._meet("leaving", False, LEAVE_TIMEOUT)

    def _leave_reason(self, error: UserError) -> None:
        with suppress(RuntimeError):
            self.store.set(f"reason of {self.rank}", f"{env_machine()} {printable(str(error))}")

    def _reason(self, wait_s: float = 0.0) -> tuple[int, str] | None:
        """(machine, "rank N: text") of the lowest rank that left one, or the text if all agree.

        A signal that comes meanwhile ends the waiting.
        """
        end = time.monotonic() + wait_s
        asked = STOP.number
        with suppress(RuntimeError):
            while not (failed := [r for r in range(self.size) if self._has_reason(r)]):
                if time.monotonic() >= end or STOP.number != asked:
                    return None
                time.sleep(0.1)
            left = [self.store.get(f"reason of {rank}").decode().split(" ", 1) for rank in failed]
            texts = {text for _, text in left}
            alike = len(failed) == self.size and len(texts) == 1
            machine, text = left[0]
            return int(machine), text if alike else f"rank {failed[0]}: {text}"
        return None

    def _wait_for_reason(self) -> tuple[int, str] | None:
        asked = STOP.number
        found = self._reason(REASON_S)
        if not found and STOP.number != asked:
            time.sleep(2 * PERIOD_S)  # who lives beats meanwhile
            found = self._reason()
        return found

    def _beats_of_the_living(self) -> dict[int, Beat]:
        """Say that this rank lives, though it beats no more; what all wrote last, empty if gone."""
        with suppress(RuntimeError):
            self.store.set(f"{self.rank} lives", b"")
            return read_beats(self.store, self.size) if self._last_beats else {}
        return {}

    def _dead(self, before: dict[int, Beat]) -> list[int]:
        """Who has gone since: they neither beat nor say that they live. Empty: nobody can say.

        Where the store is gone, too, it is whoever was on its machine, that of rank 0.
        """
        try:
            now = read_beats(self.store, self.size) if before else {}
            dead = [
                rank
                for rank, beat in now.items()
                if (beat.count == before[rank].count or beat.doing == LEFT)
                and not self.store.check([f"{rank} lives"])
            ]
        except RuntimeError:
            dead = []
        if not before and self._last_beats:
            dead = [rank for rank, beat in self._last_beats.items() if beat.machine == 0]
        return [] if self.rank in dead else dead

    def _is_first_to_speak(self) -> bool:
        """Whether no other rank of this machine has asked before."""
        with suppress(RuntimeError):
            return bool(self.store.add(f"speakers of machine {env_machine()}", 1) == 1)
        return self.local_rank == 0

    def _has_reason(self, rank: int) -> bool:
        return bool(self.store.check([f"reason of {rank}"]))

    def _meet(self, place: str, has_failed: bool, timeout: timedelta = JOIN_TIMEOUT) -> int:
        """Wait until all ranks have come to `place`; how many of them had failed."""
        self.store.add(f"{place}: failed", int(has_failed))
        self.store.set(f"{place}: {self.rank} came", b"")
        if self.store.add(f"{place}: came", 1) == self.size:
            self.store.set(f"{place}: all", b"")
        try:
            self._wait_for(f"{place}: all", timeout)
        except RuntimeError:
            raise UserError(self._absent(place, timeout)) from None
        return int(self.store.add(f"{place}: failed", 0))

    def _wait_for(self, key: str, timeout: timedelta) -> None:
        """Wait until a rank has set `key`: by looks, since in the store's own wait Python hears no
        signal.

        Raises:
            RuntimeError: none has within the time-out after a rank's last sign, or the store has
                gone.
        """
        num_signs = -1
        end_s = 0.0
        pause_s = SHORTEST_PAUSE_S
        while not self.store.check([key]):
            if (seen := self.store.add(SIGNS, 0)) != num_signs:
                num_signs = seen
                end_s = time.monotonic() + timeout.total_seconds()
            if time.monotonic() > end_s:
                raise RuntimeError(f"nobody has set {key!r}")
            time.sleep(pause_s)
            pause_s = min(1.5 * pause_s, MOST_PAUSE_S)

    def _absent(self, place: str, timeout: timedelta) -> str:
        """The sentence of those that came to `place`, about those that did not."""
        try:
            absent = [r for r in range(self.size) if not self._has_come(place, r)]
        except RuntimeError:
            return "the ranks' store has ended, on the machine of rank 0; look at its output"
        return did_not_come(absent, timeout)

    def _has_come(self, place: str, rank: int) -> bool:
        return bool(self.store.check([f"{place}: {rank} came"]))


def join_ranks() -> Ranks:
    """Meet the other ranks that torchrun started; alone without torchrun.

    Raises:
        UserError: the machine that all ranks meet at cannot be reached, or not all came.
    """
    ranks = Ranks(env_rank(), env_world_size(), env_local_rank())
    if ranks.size == 1:
        return ranks
    quiet_native_log()
    _choose_interface()
    from torch.distributed import PrefixStore  # type: ignore[attr-defined]
    from torch.distributed.rendezvous import rendezvous

    address, port = env_meeting_place()
    is_elsewhere = env_machine() > 0 and means_only_here(address)
    try:
        timeout = ALONE_TIMEOUT if is_elsewhere else JOIN_TIMEOUT
        store, _, _ = next(iter(rendezvous("env://", timeout=timeout)))
        store.set_timeout(JOIN_TIMEOUT)
        name = common_try(store, ranks.rank, ranks.size, JOIN_TIMEOUT)
    except (RuntimeError, ValueError) as error:
        why = f"cannot meet the others at {address}:{port} ({str(error).partition(chr(10))[0]})"
        remedy = "check torchrun's address and port, and the network between the machines"
        if is_elsewhere:
            remedy = f"that is this machine itself: {GIVE_ADDRESS}"
        raise UserError(f"rank {ranks.rank}: {why}; {remedy}") from None
    ranks.store = PrefixStore(f"try {name}", store)
    return ranks


def _choose_interface() -> None:
    """Where this machine's own name means nothing elsewhere, gloo shall not go by it.

    It would tell the other machines to connect to themselves. The interface taken instead is the
    one that the meeting place is reached by.
    """
    address, _ = env_meeting_place()
    own = own_address()
    if env_num_machines() == 1 or (own and not means_only_here(own)) or means_only_here(address):
        return
    if way := way_to(address):
        prefer_interface(way.name)


def _is_broken_collective(error: Exception) -> bool:
    """Whether it is what torch raises where another rank is gone: gloo's has no type of its own."""
    from torch.distributed import DistError

    return isinstance(error, DistError) or "gloo" in str(error)


def _broken_before(stopped: Stopped) -> Exception | None:
    """What a signal interrupted, where that is a collective's end: it came while the rank tidied
    up after another one's death, of which the launcher had heard as well."""
    error = stopped.__context__
    while error is not None:
        if isinstance(error, Exception) and _is_broken_collective(error):
            return error
        error = error.__context__
    return None


def _spoken(text: str, speaks: bool) -> UserError:
    """The error of one rank as another one raises it; it is printed where `speaks`."""
    error = UserError(text)
    error.is_shared = True
    error.speaks = speaks
    return error
