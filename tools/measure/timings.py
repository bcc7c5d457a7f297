"""Step times and memory of one rank over its batch: measured here, or by the ledger's model.

On a CPU the ranks of one machine take bandwidth and clock rate from each other. How much is
measured, too: as many processes at once that share nothing, against one alone.

Between two batches that were measured, times and memory are taken between theirs; beyond them
nothing is known. What ranks send each other is counted.py's.
"""

from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from pathlib import Path
from statistics import median
from typing import Any, Literal

from engine.config import RunConfig, changed_settings
from engine.errors import UserError
from engine.host import num_cpus
from tools.measure.counted import activation_bytes
from tools.measure.fit import interpolated
from tools.measure.ledger import machine_of, operations_on
from tools.measure.matrix import Cell
from tools.measure.results import CellResult, Repetition
from tools.measure.runner import Job, Run, in_child

Basis = Literal["measured", "model, not measured"]
MODEL: Basis = "model, not measured"
TOGETHER_STEPS = 3
"""Times as many steps as of a cell: processes that start at once are not ready at once."""


@dataclass(frozen=True, kw_only=True)
class StepTime:
    """A step of one rank alone."""

    precision: str
    batch: int
    step_ms: float
    """The median of n repetitions, and their extremes."""
    low_ms: float
    high_ms: float
    n: int
    peak_gib: float | None = None
    """Of the GPU, with what CUDA takes where NVML tells it, or of the process; None: not
    measured."""
    activation_bytes: float | None = None
    """Kept for the backward, of a sample; where memory is not measured but counted."""


@dataclass(frozen=True, kw_only=True)
class Slowdown:
    """What ranks of one machine lose to each other without exchanging anything."""

    num_ranks: int
    factor: float
    """Of a step's time; 1: nothing."""


@dataclass(frozen=True, kw_only=True)
class Timings:
    """All that is known of steps without collectives."""

    basis: Basis
    device: str
    steps: list[StepTime]
    slowdowns: list[Slowdown] = field(default_factory=list)
    num_threads: int = 0
    """Of the one rank; 0: as many as torch takes."""
    notes: list[str] = field(default_factory=list)

    @property
    def precisions(self) -> list[str]:
        return list(dict.fromkeys(each.precision for each in self.steps))

    @property
    def batches(self) -> list[int]:
        return sorted({each.batch for each in self.steps})

    def step_ms(self, precision: str, batch: float, num_ranks: int = 1) -> float:
        """Of a rank among so many; of a batch from the least to the largest."""
        known = [(float(e.batch), e.step_ms) for e in self.steps if e.precision == precision]
        return interpolated(known, batch) * self.slowdown(num_ranks)

    def slowdown(self, num_ranks: int) -> float:
        """That of the most ranks that were measured, up to these."""
        known = [each for each in self.slowdowns if each.num_ranks <= num_ranks]
        return max(known, key=lambda each: each.num_ranks).factor if known else 1.0

    def peak_gib(self, precision: str, batch: float) -> float | None:
        """Memory of a rank under ddp; None where it was not measured."""
        of = [each for each in self.steps if each.precision == precision]
        known = [(float(each.batch), each.peak_gib) for each in of if each.peak_gib is not None]
        return interpolated(known, batch) if known else None

    def activation_bytes(self, precision: str) -> float:
        """Kept for the backward, of a sample; of timings without measured memory."""
        of = (each.activation_bytes for each in self.steps if each.precision == precision)
        return next(found for found in of if found is not None)


@dataclass(frozen=True, kw_only=True)
class Here:
    """How this machine is measured."""

    out: Path
    """Folder of what is measured; an earlier profile in it is overwritten."""
    device: str
    num_gpus: int
    num_steps: int
    repetitions: int

    @property
    def num_ranks(self) -> int:
        """That this machine can have."""
        return self.num_gpus or num_cpus()

    @property
    def on_gpu(self) -> bool:
        return self.num_gpus > 0


def measured_timings(
    config: RunConfig,
    precisions: tuple[str, ...],
    batches: tuple[int, ...],
    side_by_side: set[int],
    here: Here,
) -> Timings:
    """Measure every precision and batch, one rank each, and ranks of this machine side by side.

    Args:
        side_by_side: how many, from 2. Where there are some, a CPU's rank has one thread, the one
            alone, too: torchrun gives several of a machine one each.
    Raises:
        UserError: a cell failed.
    """
    num_threads = int(bool(side_by_side) and not here.on_gpu)
    grid = [(precision, batch) for precision in precisions for batch in batches]
    cells = [
        replace(_cell(config, *place, here, num_threads), id=f"c{number:03}")
        for number, place in enumerate(grid)
    ]
    run = Run(title="plan", cells=cells, out=here.out, device=here.device, num_gpus=here.num_gpus)
    run.measure(run.missing(resume=False), in_child)
    results = run.profile().cells
    steps: dict[tuple[str, int], StepTime] = {}
    for each in map(_step_time, results):
        steps.setdefault((each.precision, each.batch), each)
    job = run.job(cells[len(batches) // 2], 0)
    notes = [note for result in results for one in result.good for note in one.notes]
    if num_threads:
        notes.append("each rank has one thread, one alone, too: with more it may be faster")
    facts = results[0].good[0].facts
    return Timings(
        basis="measured",
        device=facts.gpu_name or facts.cpu_name,
        steps=list(steps.values()),
        slowdowns=[
            slowdown_of(job, number, here.repetitions)
            for number in sorted(side_by_side)
            if not here.on_gpu
        ],
        num_threads=num_threads,
        notes=list(dict.fromkeys(notes)),
    )


def _cell(config: RunConfig, precision: str, batch: int, here: Here, num_threads: int) -> Cell:
    """One rank's."""
    given = {"step.precision": precision, "global_batch": batch, "step.parallel": "ddp"}
    return Cell(
        name=f"{precision}, batch {batch}",
        axes={"batch": batch, "ranks": 1, "step.precision": precision},
        settings=changed_settings(config) | given,
        num_steps=here.num_steps,
        repetitions=here.repetitions,
        num_threads=num_threads,
    )


def _step_time(result: CellResult) -> StepTime:
    """Of a cell, under the precision that it had in effect.

    Raises:
        UserError: no repetition of it succeeded.
    """
    if not result.good:
        why = result.repetitions[0].failed if result.repetitions else result.not_measured
        raise UserError(f"{result.name} could not be measured: {why}")
    times_ms = [step_ms_of(each) for each in result.good]
    peaks = [
        each.device_used_gib or each.torch_peak_gib or each.host_peak_rss_gib
        for each in result.good
    ]
    return StepTime(
        precision=str(result.good[0].effective["precision"]),
        batch=int(result.axes["batch"]),
        step_ms=median(times_ms),
        low_ms=min(times_ms),
        high_ms=max(times_ms),
        n=len(times_ms),
        peak_gib=max((each for each in peaks if each), default=None),
    )


def step_ms_of(found: Repetition) -> float:
    """The median step of a repetition that did not fail."""
    assert found.step_ms is not None
    return found.step_ms


def slowdown_of(job: Job, num_ranks: int, repetitions: int) -> Slowdown:
    """A step of so many processes at once over that of one alone, in turn.

    Raises:
        UserError: one of them failed.
    """
    job = replace(job, num_steps=TOGETHER_STEPS * job.num_steps, first=False)
    factors = []
    for _ in range(repetitions):
        alone = in_child(job)
        with ThreadPoolExecutor(num_ranks) as pool:
            together = list(pool.map(in_child, [job] * num_ranks))
        for each in (alone, *together):
            if each.failed:
                raise UserError(f"{num_ranks} at once could not be measured: {each.failed}")
        factors.append(max(map(step_ms_of, together)) / step_ms_of(alone))
    return Slowdown(num_ranks=num_ranks, factor=max(median(factors), 1.0))


def modelled_timings(
    config: RunConfig,
    precisions: tuple[str, ...],
    batches: tuple[int, ...],
    gpu: str,
    shape: tuple[int, int, int],
) -> Timings:
    """A GPU's by the ledger's model: launches and bytes counted, times predicted.

    Args:
        gpu: its whole name.
        shape: height and width of an image, and classes.
    Raises:
        UserError: there is no model of it, or of the step.
    """
    machine = machine_of(gpu)
    steps = []
    for precision in precisions:
        changed: dict[str, Any] = {"precision": precision, "parallel": "ddp", "cuda_graphs": True}
        asked = replace(config, step=replace(config.step, **changed))
        counted = [operations_on(machine, asked, batch, shape) for batch in batches]
        kept_bytes = activation_bytes(asked, shape)
        for batch, operations in zip(batches, counted, strict=True):
            ms = sum(map(machine.us, operations)) / 1000
            found = StepTime(
                precision=precision, batch=batch, step_ms=ms, low_ms=ms, high_ms=ms, n=0
            )
            steps.append(replace(found, activation_bytes=kept_bytes))
    return Timings(basis=MODEL, device=gpu, steps=steps)
