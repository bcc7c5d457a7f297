"""Work done ahead in a thread; whatever goes wrong there reaches its consumer at once."""

import queue
import threading
from collections.abc import Iterator
from typing import TypeVar

from engine.errors import UserError

T = TypeVar("T")
DEADLINE_S = 20.0
JOIN_S = 5.0


class Ahead(Iterator[T]):
    """The items of an iterator (None is none), made in a thread that dies with the process.

    That iterator may reuse `slots` buffers in turn: it is asked for an item only when the consumer
    has let go of the one made `slots` items earlier. The consumer lets go of an item by asking for
    `held` more. Closed, this ends.

    Raises:
        Exception: from iteration, whatever the iterator raised.
        UserError: from iteration, when nothing was made for the deadline.
    """

    def __init__(
        self, items: Iterator[T], slots: int, held: int = 1, deadline_s: float | None = None
    ) -> None:
        assert slots > held
        self._items = items
        self._held = held
        self._deadline_s = deadline_s or DEADLINE_S
        self._num_given = 0
        self._over = False
        self._free = threading.Semaphore(slots)
        self._ready: queue.SimpleQueue[tuple[T | None, BaseException | None]] = queue.SimpleQueue()
        # A daemon: other threads are waited for at exit.
        self._thread = threading.Thread(target=self._work, name="feed", daemon=True)
        self._thread.start()

    def _work(self) -> None:
        while self._free.acquire() and not self._over:
            item: T | None = None
            error: BaseException | None = None
            try:
                item = next(self._items, None)
            except BaseException as raised:
                error = raised
            self._ready.put((item, error))
            if item is None:
                return

    def __next__(self) -> T:
        if self._over:
            raise StopIteration
        if self._num_given >= self._held:
            self._free.release()
        try:
            item, error = self._ready.get(timeout=self._deadline_s)
        except queue.Empty:
            raise late(self._deadline_s) from None
        self._num_given += 1
        if item is None:
            self._over = True
            raise error or StopIteration
        return item

    def close(self, to_restart: bool = False) -> None:
        """Stop the thread; an item being made is finished first, if that takes at most JOIN_S.

        Raises:
            RuntimeError: `to_restart`, and the thread may still write to its iterator's buffers.
        """
        self._over = True
        self._free.release()
        self._thread.join(self._deadline_s if to_restart else JOIN_S)
        if to_restart and self._thread.is_alive():
            raise RuntimeError("the feed's thread does not end; its buffers cannot be used again")


def late(deadline_s: float) -> UserError:
    """The error of a feed that makes nothing."""
    what = f"the feed has made no batch for {deadline_s:.0f} s"
    remedy = "look at the disk and the memory of this machine, then go on from the last checkpoint"
    return UserError(f"{what}; {remedy}")
