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

from engine import clock
from engine.step import Launch
from engine.trainer import Session

NUM_UNTIMED = 5
"""Launches after the warm-up proper that let the feed fill its queues."""


@dataclass(frozen=True, kw_only=True)
class Measured:
    """Times of the steps of one rank."""

    step_ms_S: np.ndarray
    """Milliseconds of each step, its waiting for data included; those of one launch share its time."""
    wait_ms: float
    """Milliseconds the host waited for the feed, in all."""
    samples_per_s: float
    """Over all ranks."""


def measure(session: Session, num_steps: int) -> Measured:
    """Train at least `num_steps` steps on the clock, in whole launches; call inside world.on_stream()."""
    launches = endless(session)
    for _ in islice(launches, NUM_UNTIMED):
        pass
    session.world.synchronize()
    on_gpu = session.world.device.type == "cuda"
    marks, sizes, wait_s = [_mark(on_gpu)], [0], 0.0
    while sum(sizes) < num_steps:
        launch = next(launches)
        marks.append(_mark(on_gpu))
        sizes.append(launch.num_steps)
        wait_s += launch.wait_s
    session.world.synchronize()
    launch_ms = [_elapsed_ms(a, b) for a, b in pairwise(marks)]
    return Measured(
        step_ms_S=np.concatenate([np.full(n, ms / n) for n, ms in zip(sizes[1:], launch_ms, strict=True)]),
        wait_ms=wait_s * 1000,
        samples_per_s=sum(sizes) * session.config.global_batch / (sum(launch_ms) / 1000),
    )


def describe(session: Session, measured: Measured, nvml: clock.Nvml, energy_j: float | None) -> dict[str, Any]:
    """One row of a profile: throughput, step times, waiting, memory, power."""
    p10, median, p90 = np.percentile(measured.step_ms_S, [10, 50, 90])
    return {
        "samples_per_s": measured.samples_per_s,
        "step_ms": median,
        "step_p10_ms": p10,
        "step_p90_ms": p90,
        "data_wait_fraction": measured.wait_ms / measured.step_ms_S.sum(),
        "num_steps": len(measured.step_ms_S),
        "num_ranks": session.world.size,
        "global_batch": session.config.global_batch,
        **session.effective,
        "host_peak_rss_gib": clock.host_peak_rss_gib(),
        "torch_peak_gib": clock.torch_peak_gib(session.world.device),
        "device_used_gib": nvml.used_gib(),
        "gpu_utilisation_percent": nvml.utilisation_percent(),
        "power_w": nvml.power_w(),
        "energy_j": energy_j,
        "notes": "; ".join(session.notes),
    }


def profile_session(session: Session, num_steps: int) -> dict[str, Any]:
    """Measure a session and describe it."""
    nvml = clock.Nvml(session.world.device)
    before_j = nvml.energy_j()
    measured = measure(session, num_steps)
    after_j = nvml.energy_j()
    used_j = None if before_j is None or after_j is None else after_j - before_j
    return describe(session, measured, nvml, used_j)


def endless(session: Session) -> Iterator[Launch]:
    """Launches without end, epoch after epoch."""
    for epoch in count():
        yield from session.step.train_epoch(session.feed, epoch)


def _mark(on_gpu: bool) -> Any:
    if not on_gpu:
        return time.perf_counter()
    event = torch.cuda.Event(enable_timing=True)
    event.record()
    return event


def _elapsed_ms(start: Any, end: Any) -> float:
    return (end - start) * 1000 if isinstance(start, float) else start.elapsed_time(end)
