"""When ranks agree on saving and stopping: at the same step on all, some four times a second.

A signal reaches one rank, and clocks differ, but all ranks must save and stop at the same step.
Between two pulses no rank asks another; a pulse is one sum of three numbers on the hosts, which
does not wait for the device.
"""

import re
import time
from dataclasses import dataclass

from engine.errors import UserError
from engine.stop import STOP
from engine.world import World

PERIOD_S = 0.25
UNITS = {"steps": "steps", "step": "steps", "s": "seconds", "epochs": "epochs", "epoch": "epochs"}


@dataclass(frozen=True)
class Cadence:
    """How often a run is saved: whichever of these comes first; 0: not by this."""

    steps: int = 0
    seconds: int = 0
    epochs: int = 0

    @staticmethod
    def of(text: str) -> "Cadence":
        """From "500steps", "30s", "1epoch", or several with commas between.

        Raises:
            UserError: it is none of these.
        """
        parts = {}
        for part in text.split(","):
            found = re.fullmatch(r"\s*([0-9]{1,9}) ?([a-z]+)\s*", part)
            if not found or found[2] not in UNITS or int(found[1]) < 1:
                remedy = "write 500steps, 30s or 1epoch, or several with commas between"
                raise UserError(f"checkpoint_every: {part.strip()!r} is no interval; {remedy}")
            parts[UNITS[found[2]]] = int(found[1])
        return Cadence(**parts)


@dataclass(frozen=True)
class Wishes:
    """What the ranks agreed on at a pulse."""

    signal: int
    """The signal to stop by; 0: go on."""
    save: bool


class Pulse:
    """Counts the steps of a run up to the next pulse."""

    def __init__(self, world: World, cadence: Cadence) -> None:
        self._world = world
        self._cadence = cadence
        self._next = self._last = self._saved = 0
        self._last_s = self._saved_s = time.monotonic()

    def start(self, step: int) -> None:
        """Go on from `step`, where the run is saved."""
        self._last = self._saved = step
        self._next = step + 1
        self._last_s = self._saved_s = time.monotonic()

    def is_due(self, step: int) -> bool:
        """Whether all ranks meet after `step`; equal on all."""
        return step >= self._next

    def meet(self, step: int) -> Wishes:
        """Agree with the other ranks. Collective, on the hosts alone."""
        now_s = time.monotonic()
        steps_per_s = (step - self._last) / max(now_s - self._last_s, 1e-6)
        late = 0 < self._cadence.seconds <= now_s - self._saved_s
        stride = max(1, round(steps_per_s * PERIOD_S))
        signal, is_late, stride = (
            int(value) for value in self._world.most([STOP.number, late, stride])
        )
        self._last, self._last_s = step, now_s
        by_steps = self._cadence.steps
        self._next = step + stride
        if by_steps:
            due = self._saved + by_steps
            is_late = is_late or step >= due
            self._next = min(self._next, step + by_steps if is_late else due)
        return Wishes(signal, bool(is_late or signal))

    def saved(self, step: int) -> None:
        """A checkpoint of `step` is on its way."""
        self._saved, self._saved_s = step, time.monotonic()

    def is_saved(self, step: int) -> bool:
        """Whether a checkpoint of `step` is there, or on its way."""
        return self._saved == step
