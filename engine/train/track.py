"""`--track`: a run's settings and figures as they go to trackers, on rank 0, and never in its way.

Each tracker has a thread, so that a server which is slow, gone or silent costs the training no
step. One that fails is left out, which is said once. What the trackers are: train/trackers.py.
"""

import queue
import re
import threading
import time
import tomllib
import uuid
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path

from engine.config import RunConfig, TrackerName, flatten
from engine.config_text import to_toml
from engine.durable import write_file
from engine.errors import UserError, first_cause, sentence
from engine.report import RunReport, without_folders
from engine.train.trackers import (
    TRACKERS,
    Figures,
    Tracked,
    Tracker,
    epoch_figures,
    final_figures,
)

TRACK_ID = "track_id"
"""A file of the run's folder."""
PATIENCE_S = 30.0
"""How long trackers are waited for, all together, before the first step and after the last."""
NUM_SHOWN = 6
"""Digits of the id that a run's name ends with."""
Say = Callable[[str], None]


def check_trackers(names: tuple[TrackerName, ...]) -> None:
    """UserError where a tracker's package is not installed."""
    for name in names:
        found = find_spec(name)
        if found is None or found.origin is None:  # a mere folder of that name, as wandb leaves one
            remedy = f"pip install {name}, or leave it out"
            raise UserError(f"--track {name}: the package is not installed; {remedy}")


def tracked(config: RunConfig, out: Path, num_epochs_done: int) -> Tracked:
    """What trackers are given of the run in `out`; its id is made where it has none."""
    settings = without_folders(flatten(tomllib.loads(to_toml(config))))
    plain = {n: ",".join(v) if isinstance(v, list) else v for n, v in settings.items()}
    file = out / TRACK_ID
    try:
        known = re.fullmatch(r"[0-9a-f]{32}", file.read_text(encoding="ascii").strip())
    except (FileNotFoundError, UnicodeDecodeError):
        known = None
    number = known[0] if known else uuid.uuid4().hex
    if not known:
        write_file(file, f"{number}\n".encode())
    name = f"{out.name}-{number[:NUM_SHOWN]}"
    return Tracked(out=out, name=name, id=number, settings=plain, num_epochs_done=num_epochs_done)


class Working:
    """A tracker at work in a thread of its own."""

    def __init__(self, name: TrackerName, run: Tracked) -> None:
        self.name = name
        self.failure = ""
        """Why it takes nothing any more."""
        self.opened = threading.Event()
        """Set where opening failed, too."""
        self._jobs: queue.SimpleQueue[Callable[[Tracker], None] | None] = queue.SimpleQueue()
        # A daemon: nobody waits at exit for a server that does not answer.
        self._thread = threading.Thread(target=self._work, args=(run,), name=name, daemon=True)
        self._thread.start()

    def ask(self, job: Callable[[Tracker], None]) -> None:
        """Have it done after all that was asked before."""
        self._jobs.put(job)

    def end(self, patience_s: float) -> None:
        """Wait for all that was asked, and end the thread."""
        self._jobs.put(None)
        self._thread.join(patience_s)
        if self._thread.is_alive():
            self.failure = "it does not answer"

    def _work(self, run: Tracked) -> None:
        try:
            tracker = TRACKERS[self.name](run)
            self.opened.set()
            while job := self._jobs.get():
                job(tracker)
        except Exception as error:  # any, of any package: training goes on
            self.failure = sentence(first_cause(error))
        finally:
            self.opened.set()


class Tracking:
    """The trackers of a run; none where none was asked for, and on ranks other than 0."""

    def __init__(self, say: Say) -> None:
        self._say = say
        self._working: list[Working] = []
        self._patience_s = PATIENCE_S
        self._num_epochs = 0

    def start(self, config: RunConfig, out: Path, num_epochs_done: int) -> None:
        """Open them; returns when they are open, or have been waited for.

        Raises:
            OSError: the run's id cannot be written.
        """
        if not config.track:
            return
        run = tracked(config, out, num_epochs_done)
        self._num_epochs = num_epochs_done
        self._patience_s = min(PATIENCE_S, config.timeout_s / 2)  # other ranks wait meanwhile
        self._working = [Working(name, run) for name in config.track]
        deadline_s = time.monotonic() + self._patience_s
        for each in self._working:
            each.opened.wait(max(deadline_s - time.monotonic(), 0))
        self._leave_out()

    def epoch(self, metrics: Figures) -> None:
        """Give them a line of metrics.jsonl, and wait for nothing."""
        number, figures = int(metrics["epoch"]), epoch_figures(metrics)
        self._num_epochs = number

        def give(tracker: Tracker) -> None:
            if number > tracker.num_epochs:
                tracker.epoch(number, figures)

        for each in self._working:
            each.ask(give)
        self._leave_out()

    def end(self, report: RunReport | None = None) -> None:
        """Close them; the second time there is nothing left to do.

        Args:
            report: of a run that is finished.
        """
        figures, number = final_figures(report) if report else {}, self._num_epochs
        deadline_s = time.monotonic() + self._patience_s
        for each in self._working:
            each.ask(lambda tracker: tracker.end(number, figures, report is not None))
        for each in self._working:
            each.end(max(deadline_s - time.monotonic(), 0))
        self._leave_out()
        self._working = []

    def _leave_out(self) -> None:
        """Say which have failed, and ask them for no more."""
        for each in self._working:
            if each.failure:
                self._say(f"note: --track {each.name}: left out, training goes on: {each.failure}")
        self._working = [each for each in self._working if not each.failure]
