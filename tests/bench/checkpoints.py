"""What saving every 50 steps costs, how long the training thread stands still, what resuming costs.

In one process, in turn: 50 steps, then 50 steps with a checkpoint begun before them, which the
saver's thread writes to the disk meanwhile: the difference is the price, its work included. And,
in turn, the time from an open session to the first step done of a fresh run, and of one that goes
on in the middle of an epoch.
"""

import tempfile
import time
from collections.abc import Iterator
from contextlib import closing, suppress
from itertools import islice
from pathlib import Path

import click
import torch

from engine.config import RunConfig
from engine.data.records import open_records
from engine.data.sample import ensure_sample
from engine.feeds.batch import Feed
from engine.train.progress import Progress
from engine.train.saver import Saver
from engine.train.session import Session, open_session
from engine.train.step import Launch, TrainStep
from engine.train.trainer import Trainer
from engine.world import start_world
from tests.bench import OUT
from tools.measure.steps import endless
from tools.report.rows import claim, row, write_result

BATCH = 512
NUM_STEPS = 50


def train(launches: Iterator[Launch]) -> None:
    for _ in islice(launches, NUM_STEPS):
        pass


def measure(session: Session, folder: Path, rounds: int) -> dict[str, list[float]]:
    """Seconds of 50 steps without a save and with one; milliseconds of the standstill."""
    found: dict[str, list[float]] = {"plain": [], "saved": [], "stall": []}
    saver = Saver(folder, session.step.state)
    progress = Progress(session, session.requested)
    launches = endless(session)
    train(launches)
    for number in range(rounds + 1):
        saver.wait()
        start = time.perf_counter()
        train(launches)
        plain_s = time.perf_counter() - start
        start = time.perf_counter()
        progress.trained(session.step.read_training(), 0, 0.0)
        progress.end_epoch()
        saver.save(progress.manifest(), torch.zeros(NUM_STEPS, dtype=torch.float64))
        stall_s = time.perf_counter() - start
        train(launches)
        saved_s = time.perf_counter() - start
        if number:  # the first save makes the buffers
            found["plain"].append(plain_s)
            found["saved"].append(saved_s)
            found["stall"].append(1000 * stall_s)
    saver.wait()
    return found


class FirstStepDone(Exception):
    """Ends a run whose first step was waited for."""


def first_step_s(session: Session, run: Path, resume: bool) -> float:
    """Seconds from an open session to the first step done of a run in folder `run`."""
    start = time.perf_counter()

    def first(feed: Feed, epoch: int, first_step: int = 0) -> Iterator[Launch]:
        yield next(TrainStep.train_epoch(session.step, feed, epoch, first_step))
        raise FirstStepDone

    vars(session.step)["train_epoch"] = first
    with suppress(FirstStepDone):
        Trainer(session, run, lambda line: None).fit(resume)
    del vars(session.step)["train_epoch"]
    return time.perf_counter() - start


def stopped_run(session: Session, run: Path) -> None:
    """Leave the checkpoint of a run that was stopped in the middle of its first epoch."""
    run.mkdir()
    num_steps = session.feed.order.steps_per_epoch // 2
    for _ in islice(session.step.train_epoch(session.feed, 0), num_steps):
        pass
    progress = Progress(session, session.requested)
    progress.trained(session.step.read_training(), num_steps, 0.0)
    saver = Saver(run, session.step.state)
    saver.save(progress.manifest(), torch.from_numpy(progress.log.loss_S.copy()))
    saver.wait()
    saver.close()


def measure_resume(session: Session, folder: Path, rounds: int) -> dict[str, list[float]]:
    """Seconds to the first step of fresh runs and of resumed ones, in turn."""
    found: dict[str, list[float]] = {"fresh": [], "resumed": []}
    stopped_run(session, folder / "stopped")
    for number in range(rounds + 1):  # the first imports what is imported late
        (folder / f"{number}").mkdir()
        fresh_s = first_step_s(session, folder / f"{number}", resume=False)
        resumed_s = first_step_s(session, folder / "stopped", resume=True)
        if number:
            found["fresh"].append(fresh_s)
            found["resumed"].append(resumed_s)
    return found


def bench(out: Path, rounds: int) -> None:
    """Measure and write OUT/cpu_checkpoints.json."""
    out.mkdir(parents=True, exist_ok=True)
    config = RunConfig(global_batch=BATCH)
    records = open_records(ensure_sample())
    with (
        tempfile.TemporaryDirectory(dir=out) as folder,
        start_world("cpu") as world,
        closing(open_session(config, records, world)) as session,
    ):
        found = measure(session, Path(folder), rounds)
        first = measure_resume(session, Path(folder), rounds)
        environment = session.environment
    pairs = zip(found["saved"], found["plain"], strict=True)
    costs = [100 * (saved / plain - 1) for saved, plain in pairs]
    rate = NUM_STEPS * BATCH
    added_s = [a - b for a, b in zip(first["resumed"], first["fresh"], strict=True)]
    rows = [
        row("50 steps", [rate / s for s in found["plain"]], "samples/s"),
        row("50 steps and a checkpoint", [rate / s for s in found["saved"]], "samples/s"),
        row("what the checkpoint costs, round by round", costs, "%"),
        row("the training thread stands still", found["stall"], "ms"),
        row("from an open session to the first step", first["fresh"], "s"),
        row("the same of a resumed run", first["resumed"], "s"),
        row("what resuming adds, round by round", added_s, "s"),
    ]
    claims = [
        claim("a checkpoint every 50 steps costs (%)", rows[2].value, 2.0, at_most=True),
        claim("the training thread stands still (ms)", rows[3].value, 5.0, at_most=True),
        claim("resuming adds to start-up (s)", rows[6].value, 3.0, at_most=True),
    ]
    title = f"Saving every {NUM_STEPS} steps at batch {BATCH}, on two cores"
    write_result(
        out / "cpu_checkpoints.json", title=title, environment=environment, rows=rows, claims=claims
    )


@click.command()
@OUT
@click.option("--rounds", default=15, show_default=True)
def main(out: Path, rounds: int) -> None:
    """Benchmark checkpoints."""
    bench(out, rounds)


if __name__ == "__main__":
    main()
