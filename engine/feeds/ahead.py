"""Work done ahead of its consumer, in a thread; whatever goes wrong there reaches the consumer within a second."""

import itertools
import queue
import threading
import time
from collections.abc import Iterator
from typing import Generic, TypeVar

T = TypeVar("T")
DEADLINE_S, JOIN_S, POLL_S = 20.0, 5.0, 0.5


class Ahead(Generic[T]):
    """The items of an iterator, made in a thread.

    The iterator may reuse `slots` buffers in turn: it is asked for an item only when the consumer has let go of the one
    made `slots` items earlier. The consumer lets go of an item by asking for `held` more.

    Raises:
        Exception: from iteration, whatever the iterator raised.
        RuntimeError: the thread has died, or has made nothing for the deadline.
    """

    def __init__(self, items: Iterator[T], slots: int, held: int = 1, deadline_s: float | None = None) -> None:
        assert slots > held
        self._items, self._held, self._deadline_s = items, held, deadline_s or DEADLINE_S
        self._free = threading.Semaphore(slots)
        self._ready: queue.SimpleQueue[tuple[str, T | BaseException | None]] = queue.SimpleQueue()
        self._stopped = False
        self._thread = threading.Thread(target=self._work, name="feed", daemon=True)
        self._thread.start()

    def _work(self) -> None:
        try:
            while True:
                self._free.acquire()
                if self._stopped:
                    return
                for item in self._items:
                    self._ready.put(("item", item))
                    break
                else:
                    self._ready.put(("end", None))
                    return
        except BaseException as error:
            self._ready.put(("error", error))

    def __iter__(self) -> Iterator[T]:
        for number in itertools.count():
            if number >= self._held:
                self._free.release()
            kind, item = self._get()
            if kind == "error":
                raise item  # type: ignore[misc]
            if kind == "end":
                return
            yield item  # type: ignore[misc]

    def _get(self) -> tuple[str, T | BaseException | None]:
        deadline = time.monotonic() + self._deadline_s
        while True:
            alive = self._thread.is_alive()
            try:
                return self._ready.get(timeout=POLL_S)
            except queue.Empty:
                if not alive:
                    raise RuntimeError("the feed's thread ended without a word") from None
                if time.monotonic() > deadline:
                    raise RuntimeError(f"the feed has made no batch for {self._deadline_s:.0f} s") from None

    def close(self, to_restart: bool = False) -> None:
        """Stop the thread; an item that is being made is finished first, unless that takes longer than JOIN_S.

        Raises:
            RuntimeError: `to_restart`, and the thread may still write to the buffers of its iterator.
        """
        self._stopped = True
        self._free.release()
        self._thread.join(self._deadline_s if to_restart else JOIN_S)
        if to_restart and self._thread.is_alive():
            raise RuntimeError("the feed's thread does not end; its buffers cannot be used again")
