"""How the ranks of one try meet in torchrun's store, and who did not come.

torchrun starts a run's ranks again where one has failed; that is a try. Its store outlives the try,
with all that the ranks left there, so what is left needs a name that belongs to one try alone.
"""

import time
from datetime import timedelta
from hashlib import sha256
from typing import Any
from uuid import uuid4

from engine.errors import UserError
from engine.heart import named
from engine.host import env_meeting_place, env_num_machines
from engine.network import means_only_here

LEAST_PAUSE_S = 0.01
MOST_PAUSE_S = 0.2
"""Between two looks into the store: ever longer, where many ranks wait for one."""
GIVE_ADDRESS = "give each machine's torchrun --local-addr with its own address"


def common_try(store: Any, rank: int, size: int, timeout: timedelta) -> str:
    """A name that all ranks of this try have and no earlier try had. Collective.

    torchrun's store outlives a try, and its count of restarts is no such name: a node whose ranks
    failed counts, one that starts again because of the other does not. So each rank leaves a name
    of its own; rank 0 proposes the list of them, anew whenever one has changed, and the list is
    settled as soon as every rank has found its own name there and agreed.

    Raises:
        UserError: not all came within the time-out; it names those that did not.
    """
    places = _Places(size)
    mine = uuid4().hex
    store.set(places.names[rank], mine)
    end_s = time.monotonic() + timeout.total_seconds()
    pause_s = LEAST_PAUSE_S
    while True:
        names = _propose(store, places) if rank == 0 else _left(store, [places.list])[0]
        digest = sha256(names.encode()).hexdigest()[:16]
        if mine in names:
            store.set(places.agreed[rank], digest)
            if rank == 0 and set(_left(store, places.agreed)) == {digest}:
                store.set(places.settled, digest)
            if _left(store, [places.settled]) == [digest]:
                return digest
        if time.monotonic() > end_s:
            raise UserError(did_not_come(_missing(store, places, rank, digest), timeout))
        time.sleep(pause_s)
        pause_s = min(1.5 * pause_s, MOST_PAUSE_S)


class _Places:
    """Where the ranks of a try leave what they agree by."""

    def __init__(self, size: int) -> None:
        self.names = [f"name of {rank} of {size}" for rank in range(size)]
        self.agreed = [f"agreed {rank} of {size}" for rank in range(size)]
        self.list = f"names of {size}"
        self.settled = f"settled of {size}"


def _propose(store: Any, places: _Places) -> str:
    """The names that there are, once all are; rank 0 alone proposes."""
    names = _left(store, places.names)
    if not all(names):
        return ""
    text = " ".join(names)
    store.set(places.list, text)
    return text


def _missing(store: Any, places: _Places, rank: int, digest: str) -> list[int]:
    """Who has left no name, or else has not agreed; rank 0 if all have, since it settles."""
    silent = [other for other, name in enumerate(_left(store, places.names)) if not name]
    agreed = enumerate(_left(store, places.agreed))
    return silent or [other for other, each in agreed if each != digest and other != rank] or [0]


def _left(store: Any, places: list[str]) -> list[str]:
    """What was left there; "" where nothing was."""
    if store.check(places):
        return [text.decode() for text in store.multi_get(places)]
    return [store.get(place).decode() if store.check([place]) else "" for place in places]


def did_not_come(absent: list[int], timeout: timedelta) -> str:
    """The sentence of those that came, about those that did not."""
    what = f"{named(absent)} did not come within {timeout.total_seconds():.0f} s"
    address, port = env_meeting_place()
    if env_num_machines() > 1 and means_only_here(address):
        return f"{what}; they were told to meet at {address}:{port}: {GIVE_ADDRESS}"
    return f"{what}; look at the output of their machines"
