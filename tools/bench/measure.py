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
from engine.feeds.batch import Batch
from engine.trainer import Session

NUM_UNTIMED = 5
"""Steps after the warm-up proper that let the feed fill its queues."""


@dataclass(frozen=True, kw_only=True)
class Measured:
    """Times of the steps of one rank."""

    step_ms_S: np.ndarray
    """Milliseconds of each step, its waiting for data included."""
    wait_ms_S: np.ndarray
    """Milliseconds the host waited for the feed before each step."""
    samples_per_s: float
    """Over all ranks."""


def measure(session: Session, num_steps: int) -> Measured:
    """Train `num_steps` steps on the clock; call inside world.on_stream()."""
    batches = _endless(session)
    for batch in islice(batches, NUM_UNTIMED):
        session.step.train(batch)
    session.world.synchronize()
    on_gpu = session.world.device.type == "cuda"
    marks, waits_s = [_mark(on_gpu)], []
    for _ in range(num_steps):
        start = time.perf_counter()
        batch = next(batches)
        waits_s.append(time.perf_counter() - start)
        session.step.train(batch)
        marks.append(_mark(on_gpu))
    session.world.synchronize()
    step_ms = np.array([_elapsed_ms(a, b) for a, b in pairwise(marks)])
    return Measured(
        step_ms_S=step_ms,
        wait_ms_S=np.array(waits_s) * 1000,
        samples_per_s=num_steps * session.config.global_batch / (float(step_ms.sum()) / 1000),
    )


def describe(session: Session, measured: Measured, nvml: clock.Nvml, energy_j: float | None) -> dict[str, Any]:
    """One row of a profile: throughput, step times, waiting, memory, power."""
    p10, median, p90 = np.percentile(measured.step_ms_S, [10, 50, 90])
    return {
        "samples_per_s": measured.samples_per_s,
        "step_ms": median,
        "step_p10_ms": p10,
        "step_p90_ms": p90,
        "data_wait_fraction": measured.wait_ms_S.sum() / measured.step_ms_S.sum(),
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


def _endless(session: Session) -> Iterator[Batch]:
    for epoch in count():
        yield from session.feed.batches(epoch)


def _mark(on_gpu: bool) -> Any:
    if not on_gpu:
        return time.perf_counter()
    event = torch.cuda.Event(enable_timing=True)
    event.record()
    return event


def _elapsed_ms(start: Any, end: Any) -> float:
    return (end - start) * 1000 if isinstance(start, float) else start.elapsed_time(end)
