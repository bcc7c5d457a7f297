"""Measurements made in this process, each cell's session kept open between its repetitions.

The GPU round's way: a process and a compilation for every repetition would take most of its time.
"""

import json
from dataclasses import replace
from math import ceil

from engine.config import RunConfig, override
from engine.data.records import Records
from engine.errors import first_cause, sentence
from engine.train.session import Session, open_session
from engine.world import World
from tools.measure.cell import timed
from tools.measure.results import Repetition
from tools.measure.roofline import copy_bandwidth
from tools.measure.runner import Job
from tools.measure.steps import measure


class InProcess:
    """Measures jobs of one rank; call close() at the end, also on errors.

    Args:
        seconds: of a repetition, about, in whole launches; no more steps than the job asks for.
        long: the number of repetitions of a cell after which one takes `long_s` instead, so that
            NVML's counter of energy tells something; 0: none does.
    """

    def __init__(
        self, records: Records, world: World, *, seconds: float, long: int = 0, long_s: float = 2.5
    ) -> None:
        self._records, self._world = records, world
        self._seconds = seconds
        self._long = long
        self._long_s = long_s
        self._bandwidth = copy_bandwidth(world.device)
        self._sessions: dict[str, Session] = {}
        self._failed: dict[str, str] = {}
        self._num_done: dict[str, int] = {}

    def __call__(self, job: Job) -> Repetition:
        """One repetition; a cell that failed once is not tried again."""
        settings = {name: value for name, value in job.settings.items() if name != "seed"}
        key = json.dumps(settings, sort_keys=True)
        if key not in self._failed:
            try:
                return replace(self._repeat(key, job), digest=job.digest)
            except Exception as error:  # out of memory, a refused launch, no compiler, an assert
                self._failed[key] = sentence(first_cause(error))
                self._drop(key)
        return job.failed(self._failed[key])

    def close(self) -> None:
        for key in list(self._sessions):
            self._drop(key)

    def _repeat(self, key: str, job: Job) -> Repetition:
        if key not in self._sessions:
            config = override(RunConfig(), job.settings, "the cell")
            self._sessions[key] = open_session(config, self._records, self._world)
        session = self._sessions[key]
        session.step.use_backends()  # another cell's may have run since
        done = self._num_done[key] = self._num_done.get(key, 0) + 1
        is_long = bool(self._long) and done == self._long + 1
        first = measure(session, 2 * session.step.steps_per_launch)
        steps_per_s = first.samples_per_s / session.config.global_batch
        num_steps = min(job.num_steps, ceil(self._seconds * steps_per_s))
        if is_long:
            num_steps = ceil(self._long_s * steps_per_s)
        return timed(session, num_steps, lambda _: self._bandwidth)

    def _drop(self, key: str) -> None:
        session = self._sessions.pop(key, None)
        if session is None:
            return
        try:
            session.close()
        except Exception as error:  # after a failed kernel nothing of the device answers
            print(f"closing: {sentence(first_cause(error))}")
