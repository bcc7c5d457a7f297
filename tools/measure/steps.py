"""A fixed number of steps through the very TrainStep and feed of training, timed step by step.

Times are device events on CUDA (nothing synchronises between steps) and the wall clock elsewhere.
"""

import time
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import count, islice, pairwise
from typing import Any

import numpy as np
import torch

from engine.meters import Nvml
from engine.train.session import Session
from engine.train.step import Launch

NUM_UNTIMED = 5
"""Launches after the warm-up proper that let the feed fill its queues."""
UNREAD = Nvml(torch.device("cpu"))
"""Every reading is None."""


@dataclass(frozen=True, kw_only=True)
class Measured:
    """Times of the steps of one rank."""

    step_ms_S: np.ndarray
    """Milliseconds of each step with its waiting for data; steps of one launch share its time."""
    wait_ms: float
    """Milliseconds the host waited for the feed, in all."""
    samples_per_s: float
    """Over all ranks."""
    steps_per_launch: float
    gpu_utilisation_percent: float | None
    power_w: float | None
    energy_j: float | None
    """Of the whole GPU; NVML is too coarse for less than some seconds."""


def measure(session: Session, num_steps: int, nvml: Nvml = UNREAD) -> Measured:
    """Train at least `num_steps` steps on the clock, in whole launches, inside world.on_stream().

    Args:
        nvml: read for the energy, and once for utilisation and power: between two launches in the
            middle, while the device works on what was launched before. (A thread of its own would
            contend with the host's launches.)
    """
    launches = endless(session)
    for _ in islice(launches, NUM_UNTIMED):
        pass
    session.world.synchronize()
    before_j = nvml.energy_j()
    on_gpu = session.world.device.type == "cuda"
    marks, sizes, wait_s, done = [_mark(on_gpu)], list[int](), 0.0, 0
    utilisation_percent = power_w = None
    while done < num_steps:
        launch = next(launches)
        marks.append(_mark(on_gpu))
        sizes.append(launch.num_steps)
        wait_s += launch.wait_s
        if done < num_steps / 2 <= done + launch.num_steps:
            utilisation_percent, power_w = nvml.utilisation_percent(), nvml.power_w()
        done += launch.num_steps
    session.world.synchronize()
    after_j = nvml.energy_j()
    launch_ms = [_elapsed_ms(a, b) for a, b in pairwise(marks)]
    return Measured(
        step_ms_S=np.concatenate(
            [np.full(n, ms / n) for n, ms in zip(sizes, launch_ms, strict=True)]
        ),
        wait_ms=wait_s * 1000,
        samples_per_s=done * session.config.global_batch / (sum(launch_ms) / 1000),
        steps_per_launch=done / len(sizes),
        gpu_utilisation_percent=utilisation_percent,
        power_w=power_w,
        energy_j=None if before_j is None or after_j is None else after_j - before_j,
    )


def endless(session: Session) -> Iterator[Launch]:
    """Launches without end, epoch after epoch."""
    for epoch in count():
        yield from session.step.train_epoch(session.feed, epoch)


def train_epochs(session: Session, epochs: range) -> list[np.ndarray]:
    """Train these epochs off the clock; loss_S of each. UserError if one is not finite."""
    losses = []
    for epoch in epochs:
        for _ in session.step.train_epoch(session.feed, epoch):
            pass
        losses.append(session.step.read_training().loss_S)
    return losses


def _mark(on_gpu: bool) -> Any:
    if not on_gpu:
        return time.perf_counter()
    event = torch.cuda.Event(enable_timing=True)
    event.record()
    return event


def _elapsed_ms(start: Any, end: Any) -> float:
    if isinstance(start, float):
        return float((end - start) * 1000)
    return float(start.elapsed_time(end))
