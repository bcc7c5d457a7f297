"""tools/profile plan: what more ranks, larger batches, bf16 and fsdp are worth, here or elsewhere.

It measures a step over the batch and collectives over their bytes, or takes a GPU from the ledger's
model and a link as it is given; counts what up to 1,024 ranks send and keep; predicts every way of
training, and recommends one. plan.json holds all of it, typed. What is not a measured step of one
rank is marked "model, not measured". How it is predicted: predicted.py.
"""

from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, get_args, get_type_hints

import torch

from engine.config import RunConfig, StepConfig, checked_names
from engine.data.sample import ensure_sample
from engine.errors import UserError
from engine.feeds.build import open_for
from engine.host import free_memory_bytes
from engine.report import command_line, read_report
from engine.typed import read_result_as
from tools.measure.counted import MOST_RANKS, Counted, count
from tools.measure.fit import Link, given_link, read_link
from tools.measure.ledger import machine_of
from tools.measure.link import link_here
from tools.measure.predicted import Model, Prediction, Reached, recommend
from tools.measure.timings import Here, measured_timings, modelled_timings

FORMAT = 1
_KINDS = get_type_hints(StepConfig)
PARALLEL: tuple[str, ...] = get_args(_KINDS["parallel"])
PRECISIONS: tuple[str, ...] = get_args(_KINDS["precision"])
MOST_BATCH = 2**24
REMEDY = "give --fit LINK (torchrun ... -m tools.measure.link), or --alpha-us and --beta-gbps"


@dataclass(frozen=True, kw_only=True)
class Asked:
    """What the command line asks for; empty: the default."""

    batches: str = ""
    ranks: str = ""
    precisions: str = ""
    parallel: str = ""
    gpu: str = ""
    """A whole name: this GPU by the ledger's model, and nothing is measured."""
    fit: Path | None = None
    alpha_us: float | None = None
    beta_gbps: float | None = None
    run: Path | None = None
    """A finished run, whose accuracy is to be reached."""


@dataclass(frozen=True, kw_only=True)
class Grid:
    """What is planned for."""

    ranks: tuple[int, ...]
    batches: tuple[int, ...]
    """Of a rank."""
    precisions: tuple[str, ...]
    parallel: tuple[str, ...]


@dataclass(frozen=True, kw_only=True)
class Plan:
    """plan.json."""

    format: int = FORMAT
    command: str
    network: str
    model: Model
    """All that was measured, or stated."""
    counted: list[Counted]
    predictions: list[Prediction]
    recommended: Prediction
    reason: str

    def __post_init__(self) -> None:
        if self.format != FORMAT:
            raise ValueError(f"format {self.format}, this engine reads {FORMAT}")


def make_plan(config: RunConfig, asked: Asked, here: Here) -> Plan:
    """Measure what is to be measured here, count, predict, recommend.

    Raises:
        UserError: what is asked for cannot be planned, or how fast ranks talk is not known.
    """
    if config.step.canonical:
        raise UserError("what ranks send with --canonical is not counted; leave step.canonical 0")
    if config.step.accumulate > 1:
        what = "what a step of several parts sends and keeps is not counted"
        raise UserError(f"{what}; leave step.accumulate 1")
    config = replace(config, step=replace(config.step, noise_scale=False))  # --run's: it is known
    link = _asked_link(asked, here)
    records = open_for(config.data, config.data.path or ensure_sample())
    num_samples = len(records.split("train"))
    grid = _grid(config, asked, here, num_samples)
    _check_link(link, grid, asked, here)
    reached = _read_reached(asked.run) if asked.run else None
    shape = (*records.height_width, len(records.classes))
    if asked.gpu:
        timings = modelled_timings(config, grid.precisions, grid.batches, asked.gpu, shape)
    else:
        together = _side_by_side(grid, link, here)
        timings = measured_timings(config, grid.precisions, grid.batches, together, here)
    if link is None and max(grid.ranks) > 1:
        link = link_here([number for number in grid.ranks if number > 1], here.device)
    model = Model(
        global_batch=config.global_batch,
        num_samples=reached.num_samples if reached else num_samples,
        timings=timings,
        link=link,
        num_local=_num_local(link, here),
        room_bytes=_room_bytes(asked, here),
        shares_memory=not asked.gpu and not here.on_gpu,
        reached=reached,
    )
    counts = [count(way, number, shape) for number, way in _ways(config, grid, timings.precisions)]
    return _plan(config.model.name, model, counts)


def _plan(network: str, model: Model, counts: list[Counted]) -> Plan:
    predictions = [each for counted in counts for each in model.of(counted)]
    threads = model.timings.num_threads
    best, reason = recommend(predictions, model.global_batch, model.reached, threads)
    return Plan(
        command=command_line(),
        network=network,
        model=model,
        counted=counts,
        predictions=predictions,
        recommended=best,
        reason=reason,
    )


def read_plan(path: Path) -> Plan:
    """A plan's file.

    Raises:
        UserError: it cannot be read, or is none.
    """
    return read_result_as(Plan, path, "plan", "make it anew by tools/profile plan --out")


def _asked_link(asked: Asked, here: Here) -> Link | None:
    """The link that was named, and the GPU checked that was."""
    if asked.gpu:
        machine_of(asked.gpu)
    numbers = (asked.alpha_us, asked.beta_gbps)
    if asked.fit:
        if numbers != (None, None):
            raise UserError("--fit: has an alpha and a beta; leave out --alpha-us and --beta-gbps")
        return read_link(asked.fit)
    if asked.alpha_us is None or asked.beta_gbps is None:
        if numbers != (None, None):
            raise UserError("--alpha-us and --beta-gbps: one says nothing alone; give both")
        return None
    return given_link(
        asked.alpha_us, asked.beta_gbps, "nccl" if asked.gpu or here.on_gpu else "gloo"
    )


def _grid(config: RunConfig, asked: Asked, here: Here, num_samples: int) -> Grid:
    is_known = asked.gpu or asked.fit or asked.alpha_us is not None
    most = MOST_RANKS if is_known else here.num_ranks
    batch = config.global_batch
    usual = {min(max(each, 1), num_samples) for each in (batch // 8, batch // 2, batch, 4 * batch)}
    grid = Grid(
        ranks=_numbers(asked.ranks, "--ranks", MOST_RANKS) or usual_ranks(most),
        batches=_numbers(asked.batches, "--batches", MOST_BATCH) or tuple(sorted(usual)),
        precisions=checked_names(asked.precisions, PRECISIONS, "--precisions") or ("fp32", "bf16"),
        parallel=checked_names(asked.parallel, PARALLEL, "--parallel") or PARALLEL,
    )
    if not asked.gpu and max(grid.batches) > num_samples:
        what = f"larger than the train split of {num_samples} samples"
        raise UserError(
            f"--batches {max(grid.batches)}: {what}; give smaller ones, or other --data"
        )
    return grid


def usual_ranks(most: int) -> tuple[int, ...]:
    """Powers of two, and the most."""
    return tuple(sorted({*(2**n for n in range(most.bit_length())), most}))


def _check_link(link: Link | None, grid: Grid, asked: Asked, here: Here) -> None:
    """Refuse several ranks that talk nobody knows how fast."""
    most = max(grid.ranks)
    if link or most == 1:
        return
    if asked.gpu:
        raise UserError(f"--gpu: how fast its ranks talk is not known; {REMEDY}")
    if most > here.num_ranks:
        has = f"this machine has {here.num_ranks}, and how fast others talk is not known"
        raise UserError(f"--ranks {most}: {has}; {REMEDY}")


def _numbers(text: str, option: str, most: int) -> tuple[int, ...]:
    """Whole numbers with commas between, in order; none of no text."""
    found = []
    for part in filter(None, text.split(",")) if text.strip() else ():
        word = part.strip()
        if not (word.isascii() and word.isdigit() and len(word) < 10 and 1 <= int(word) <= most):
            remedy = f"give whole numbers from 1 to {most}, with commas between"
            raise UserError(f"{option} {text}: {remedy}")
        found.append(int(word))
    return tuple(sorted(set(found)))


def _side_by_side(grid: Grid, link: Link | None, here: Here) -> set[int]:
    """Numbers of ranks that this machine has at once, from 2."""
    most = min(_num_local(link, here), here.num_ranks)
    return {min(number, most) for number in grid.ranks} - {1}


def _num_local(link: Link | None, here: Here) -> int:
    """Ranks of a machine: the link's, or as many as this one has."""
    return (link.num_local if link else 0) or here.num_ranks


def _ways(config: RunConfig, grid: Grid, precisions: list[str]) -> Iterator[tuple[int, RunConfig]]:
    """Each number of ranks with what they run; one rank has nothing to divide."""
    for number in grid.ranks:
        for parallel in grid.parallel if number > 1 else ("ddp",):
            for precision in precisions:
                yield number, _with(config, precision, parallel)


def _with(config: RunConfig, precision: str, parallel: str) -> RunConfig:
    changed: dict[str, Any] = {"precision": precision, "parallel": parallel}
    return replace(config, step=replace(config.step, **changed))


def _room_bytes(asked: Asked, here: Here) -> float | None:
    """Memory of a GPU, or of this machine; None where it is not known."""
    if asked.gpu:
        return machine_of(asked.gpu).memory_bytes
    if here.on_gpu:
        return float(torch.cuda.get_device_properties(0).total_memory)
    return float(free_memory_bytes())


def _read_reached(folder: Path) -> Reached:
    """What a run reached.

    Raises:
        UserError: it is not finished, was not evaluated, or changed its batch.
    """
    report = read_report(folder)
    accuracy = report.val_accuracy_fraction
    if report.status != "finished" or accuracy is None:
        what = "is not finished" if report.status != "finished" else "has no accuracy on val"
        raise UserError(f"{folder}: this run {what}; name the folder of another")
    batches = {each.global_batch for each in report.batches} | {report.config.global_batch}
    if len(batches) > 1:
        raise UserError(f"{folder}: this run changed its batch; name one of a fixed batch")
    return Reached(
        accuracy_fraction=accuracy,
        num_epochs=report.num_epochs,
        num_samples=report.num_train_samples,
        global_batch=report.config.global_batch,
        critical_batch=report.batches[-1].critical_batch if report.batches else None,
    )
