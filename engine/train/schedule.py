"""The global batch of each epoch (--batch-schedule): a plan, or a rule that goes by noise.

A run is a sequence of parts: whole epochs with one global batch, in a session of its own. What was
decided is in the checkpoint's position, and a run that goes on keeps to it.

The learning rate is the schedule's at the same fraction of the run's samples, times
sqrt(batch / global_batch): the square-root rule for Adam of Malladi et al., "On the SDEs and
Scaling Rules for Adaptive Gradient Algorithms" (arXiv 2205.10287). Of their rule the betas and
epsilon are left as they are.

It opens no session and measures nothing, and needs no torch.
"""

import math
import re
from collections.abc import Collection
from dataclasses import dataclass, replace

from engine.config import RunConfig
from engine.errors import UserError

LEAST_GAIN = 0.05
"""Part of the predicted time that another batch must save: less is within what timings vary by."""


@dataclass(frozen=True, kw_only=True)
class Timing:
    """How long a step of one batch takes, timed on random samples off the clock."""

    global_batch: int
    step_s: float


def ramp_of(text: str) -> list[tuple[int, int]]:
    """(global batch, epochs) of each part of "128x1,256x1,512x2".

    Raises:
        UserError: it is no such text.
    """
    found = [re.fullmatch(r"\s*([0-9]{1,8})\s*x\s*([0-9]{1,6})\s*", p) for p in text.split(",")]
    parts = [(int(part[1]), int(part[2])) for part in found if part]
    if len(parts) < len(found) or any(min(part) < 1 for part in parts):
        what = f"is {text!r}, not global batches and their epochs"
        raise UserError(f"--batch-ramp: {what}; write 128x1,256x1,512x2")
    return parts


def check_schedule(config: RunConfig) -> None:
    """UserError if the schedule's settings do not fit together."""
    optim = config.optim
    if optim.batch_ramp and optim.batch_schedule != "ramp":
        raise UserError(
            "--batch-ramp: is for --batch-schedule ramp; give that too, or leave it out"
        )
    if optim.batch_schedule == "ramp":
        num_epochs = sum(epochs for _, epochs in ramp_of(optim.batch_ramp))
        if num_epochs > config.epochs:
            what = f"spans {num_epochs} epochs, the run has {config.epochs}"
            raise UserError(f"--batch-ramp: {what}; give more --epochs, or a shorter ramp")
    low, high = optim.batch_min, optim.batch_max
    if optim.batch_schedule == "noise" and not low <= config.global_batch <= high:
        what = f"a global batch of {config.global_batch} is not from {low} to {high}"
        raise UserError(f"--batch-schedule noise: {what}; set optim.batch_min and optim.batch_max")


def planned_batches(config: RunConfig) -> list[int]:
    """The global batches that a run certainly trains with, in order."""
    if config.optim.batch_schedule == "ramp":
        return [batch for batch, _ in ramp_of(config.optim.batch_ramp)]
    return [config.global_batch]


def ramp_batch(config: RunConfig, epoch: int) -> int:
    """The global batch of an epoch of a ramp, whose last part goes on to the run's end."""
    parts = ramp_of(config.optim.batch_ramp)
    for batch, num_epochs in parts:
        if epoch < num_epochs:
            return batch
        epoch -= num_epochs
    return parts[-1][0]


def part_config(config: RunConfig, batch: int) -> RunConfig:
    """What a part of a run trains with `batch` samples of all ranks in a step."""
    rate = config.optim.learning_rate * math.sqrt(batch / config.global_batch)
    step = config.step
    if config.optim.batch_schedule == "noise":
        step = replace(step, noise_scale=True)
    optim = replace(config.optim, learning_rate=rate)
    return replace(config, global_batch=batch, optim=optim, step=step)


def neighbours(config: RunConfig, batch: int) -> list[int]:
    """What `noise` may go on with after an epoch of `batch`: half, the same, double, in bounds."""
    low, high = config.optim.batch_min, config.optim.batch_max
    half = [batch // 2] if batch % 2 == 0 else []
    return [each for each in (*half, batch, 2 * batch) if low <= each <= high or each == batch]


def choose_batch(batch: int, critical_batch: float | None, timings: Collection[Timing]) -> int:
    """The batch to go on with.

    To come as far, batches of B need steps in proportion to 1 + critical_batch / B (McCandlish et
    al., equation 2.11), of step_s each. Another batch is taken where that product is less by
    LEAST_GAIN at least.

    Args:
        critical_batch: None: not known; nothing changes.
        timings: of the batches that may be taken, `batch` among them.
    """
    if critical_batch is None:
        return batch
    cost = {
        each.global_batch: (1 + critical_batch / each.global_batch) * each.step_s
        for each in timings
    }
    near = [each for each in (batch, batch // 2, 2 * batch) if each in cost]
    if batch not in near:
        return batch
    best = min(near, key=cost.__getitem__)
    return best if cost[best] <= (1 - LEAST_GAIN) * cost[batch] else batch


def timings_text(timings: Collection[Timing]) -> str:
    """As "64: 2.0 ms, 128: 3.1 ms"."""
    texts = [f"{each.global_batch}: {1000 * each.step_s:.3g} ms" for each in timings]
    return ", ".join(texts)
