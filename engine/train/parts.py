"""What a part of a run hands over to the next, and how long steps of other batches take.

A part's session is closed before the next is opened: the state waits in copies on the device. It
does not touch the disk: one that refuses ends no training.
"""

import json
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from statistics import median

import torch

from engine.config import RunConfig
from engine.data.records import Records
from engine.errors import UserError
from engine.train.checkpoint import checkpoint_tensors, newest_sound_manifest
from engine.train.folder import Manifest, Position
from engine.train.journal import Journal
from engine.train.parallel import own_part
from engine.train.schedule import Timing, neighbours, part_config
from engine.train.session import check_batch, open_session
from engine.train.state import Tensors, TrainState
from engine.typed import typed
from engine.world import World

NUM_TIMED = 7
"""Launches whose median is a batch's time, after those of the session's warm-up."""


@dataclass(frozen=True)
class Handover:
    """All that the next part goes on from."""

    manifest: Manifest
    files: dict[str, Tensors]
    """Copies of this rank's state, as a checkpoint groups it."""
    journal: Journal
    notes: list[str]
    """Those that were said."""
    utilisation_percent: list[float]
    energy_j: float | None


def copies_of(state: TrainState) -> dict[str, Tensors]:
    """What this rank holds of the tensors of a checkpoint, copied on the device."""
    return {
        name: {key: own_part(tensor).detach().clone() for key, tensor in tensors.items()}
        for name, tensors in checkpoint_tensors(state).items()
    }


def put_back(files: dict[str, Tensors], state: TrainState) -> None:
    """Copy what `copies_of` gave into the live tensors of another session."""
    with torch.no_grad():
        for name, tensors in checkpoint_tensors(state).items():
            for key, tensor in tensors.items():
                own_part(tensor).copy_(files[name][key])
    state.written()


def stored_position(out: Path, resume: bool, world: World) -> Position:
    """Where the run goes on, on every rank; timings of another machine are left out. Collective."""
    manifest = newest_sound_manifest(out) if resume and world.is_first else None
    position = manifest.position if manifest else Position()
    if manifest and manifest.segments:
        last = manifest.segments[-1]
        here, there = world.environment(), last.environment
        machines = [(each.cpu_name, each.gpu_name, each.num_threads) for each in (here, there)]
        if machines[0] != machines[1] or last.num_ranks != world.size:
            position = replace(position, timings=[])
    text = world.text_of_first(json.dumps(asdict(position)))
    return typed(Position, json.loads(text), "manifest.json")


def with_timings(
    config: RunConfig, batch: int, known: list[Timing], records: Records, world: World
) -> list[Timing]:
    """`known`, and a timing of every batch that may follow `batch` and has none. Collective.

    Each is timed in a session of its own, off the clock, on random samples: the slowest rank's
    time. No model of the time is assumed: whether a step of twice the samples takes twice as long
    is what makes a batch worth while.
    """
    timings = list(known)
    timed = {timing.global_batch for timing in known}
    for each in neighbours(config, batch):
        part = part_config(config, each)
        if each in timed or not _fits(part, records, world):
            continue
        session = open_session(part, records, world)
        try:
            (step_s,) = world.most([median(session.step.time_steps(NUM_TIMED))])
        finally:
            session.close()
        timings.append(Timing(global_batch=each, step_s=step_s))
    return timings


def _fits(config: RunConfig, records: Records, world: World) -> bool:
    """Whether the batch can be divided, by the parts that the noise scale takes, too."""
    num_parts = config.step.accumulate
    if not config.step.canonical:
        num_parts = max(num_parts, 2)
    try:
        step = replace(config.step, accumulate=num_parts)
        check_batch(replace(config, step=step), records, world.size)
    except UserError:
        return False
    return True
