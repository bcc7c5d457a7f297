"""tools/profile ensemble: networks trained side by side on CPU cores, and what their vote is worth.

Each network sees the whole training set through the TrainStep of training, with a seed of its own.
Workers are joblib's processes, not threads: torch's random state and number of threads belong to a
process, and so does the interpreter's lock. Workers x threads = cores, and each worker keeps to its
own. The resident feed replaces the recipe's loader: it hands out the same batches, and no loader
processes compete for the cores. Probabilities come back as arrays.

Shapes: M networks, N test samples, K classes.
"""

import os
import tempfile
import time
from contextlib import closing
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pandas as pd
import torch
from joblib import Parallel, delayed

from engine.config import RunConfig
from engine.data.records import Records, open_records
from engine.data.remote import local
from engine.data.sample import ensure_sample
from engine.durable import writing
from engine.errors import UserError
from engine.host import num_cpus
from engine.late_dynamo import import_late
from engine.report import Environment
from engine.train.session import open_session
from engine.world import World, start_world
from tools.measure.steps import train_epochs
from tools.report.rows import Row, claim, row, write_result
from tools.report.statistics import bootstrap95

EVAL_BATCH = 1024
READY_WITHIN_S = 300


class Arm(NamedTuple):
    """The same networks, trained by so many workers of so many threads: "2 x 1"."""

    num_workers: int
    num_threads: int

    def __str__(self) -> str:
        return f"{self.num_workers} x {self.num_threads}"


def profile_ensemble(config: RunConfig, num_networks: int, num_workers: int, out: Path) -> str:
    """Train the networks by one worker and by several, write OUT/ensemble.json; returns the table.

    Raises:
        UserError: there are fewer cores than workers, or no test split.
    """
    num_cores = num_cpus()
    if num_workers > min(num_cores, num_networks):
        raise UserError(
            f"--workers {num_workers}: for {num_networks} networks on {num_cores} cores; give fewer"
        )
    path = local(config.data.path or ensure_sample(), config.data.cache_gib)
    records = open_records(path)
    if "test" not in records.splits:
        raise UserError(f"{path}: has no test split to vote on; pack it with --split random")
    config = replace(config, data=replace(config.data, path=str(path), feed="resident"))
    num_threads = num_cores // num_workers
    arms = [Arm(1, num_threads), Arm(1, num_workers * num_threads), Arm(num_workers, num_threads)]
    measured = {arm: train_all(config, num_networks, arm) for arm in dict.fromkeys(arms)}
    rows = _rows(arms, measured, records.split("test").label_N)
    facts: Environment = measured[arms[-1]][2]
    claims = [
        claim(
            "the vote over the mean single network, low end of its interval (points)",
            rows[-1].low,
            0,
        )
    ]
    size = f"{len(records.split('train')):,} images"
    trained = f"{num_networks} networks by joblib, workers x threads"
    title = f"{trained}; {config.epochs} epochs each on {size}"
    with writing(out):
        write_result(
            out / "ensemble.json", title=title, environment=facts, rows=rows, claims=claims
        )
    table = pd.DataFrame(map(asdict, rows)).to_string(index=False, float_format="{:,.4g}".format)
    return f"{title}\n{table}\nwritten: {out / 'ensemble.json'}"


def train_all(
    config: RunConfig, num_networks: int, arm: Arm
) -> tuple[float, np.ndarray, Environment]:
    """(seconds, probability_MNK, circumstances of a worker).

    The clock runs from when all workers are ready to the last network's answers.
    """
    networks = [replace(config, seed=config.seed + number) for number in range(num_networks)]
    cores = sorted(os.sched_getaffinity(0))[: num_cpus()]
    with (
        tempfile.TemporaryDirectory() as folder,
        Parallel(n_jobs=max(arm.num_workers, 2), batch_size=1) as run,
    ):
        places = range(
            arm.num_workers
        )  # of one worker, too, the work is done by a process of its own: n_jobs is 2
        done = run(
            delayed(_train_share)(networks[p :: len(places)], p, cores, arm, folder) for p in places
        )
    start_s, end_s, answers, facts = zip(*done, strict=True)
    probability_MNK = np.empty((num_networks, *answers[0][0].shape), np.float32)
    for place, answer in enumerate(answers):
        probability_MNK[place :: arm.num_workers] = answer
    return max(end_s) - min(start_s), probability_MNK, facts[0]


def _train_share(
    networks: list[RunConfig], place: int, cores: list[int], arm: Arm, folder: str
) -> tuple[float, float, list[np.ndarray], Environment]:
    """A worker's part: keep to its cores, wait until all are ready, train its networks in turn."""
    import_late()
    own = cores[place * arm.num_threads : (place + 1) * arm.num_threads]
    for thread in os.listdir("/proc/self/task"):
        os.sched_setaffinity(int(thread), own)
    torch.set_num_threads(arm.num_threads)
    records = open_records(networks[0].data.path)
    with start_world("cpu") as world:
        _wait_for_all(Path(folder), place, arm.num_workers)
        start_s = time.monotonic()  # one clock for all processes
        done = [train_one(network, records, world) for network in networks]
        return start_s, time.monotonic(), [probability_NK for probability_NK, _ in done], done[0][1]


def _wait_for_all(folder: Path, place: int, num_workers: int) -> None:
    (folder / str(place)).touch()
    deadline_s = time.monotonic() + READY_WITHIN_S
    while len(os.listdir(folder)) < num_workers:
        if time.monotonic() > deadline_s:
            raise UserError(
                f"only some of {num_workers} workers started; give fewer --workers, or free memory"
            )
        time.sleep(0.01)


def train_one(config: RunConfig, records: Records, world: World) -> tuple[np.ndarray, Environment]:
    """Train a network; probability_NK of the test split, and where it was made."""
    with closing(open_session(config, records, world)) as session:
        train_epochs(session, range(config.epochs))
        images = torch.from_numpy(records.split("test").image_NHW).split(EVAL_BATCH)
        with torch.no_grad():
            parts = [session.step.objective.logits(part).softmax(1) for part in images]
        return torch.cat(parts).numpy(), session.environment


def _rows(arms: list[Arm], measured: dict[Arm, Any], label_N: np.ndarray) -> list[Row]:
    alone_s, all_cores_s, together_s = (measured[arm][0] for arm in arms)
    rows = [row(f"{arm}: time", [measured[arm][0]], "s") for arm in dict.fromkeys(arms)]
    rows += [
        row(f"{arms[2]}: speed-up over {arms[0]}", [alone_s / together_s], "x"),
        row(f"{arms[2]}: efficiency", [100 * alone_s / together_s / arms[2].num_workers], "%"),
        row(f"{arms[2]}: speed-up over {arms[1]}", [all_cores_s / together_s], "x"),
    ]
    for arm in (arms[0], arms[2]):
        single_M, vote, gain, low, high = vote_over_singles(measured[arm][1], label_N)
        gained = row(
            f"{arm}: the vote over the mean network, 95 % interval", [100 * gain], "points"
        )
        rows += [
            row(f"{arm}: test accuracy of a network, n networks", (100 * single_M).tolist(), "%"),
            row(
                f"{arm}: standard deviation over networks",
                [100 * float(single_M.std(ddof=1))],
                "points",
            ),
            row(f"{arm}: test accuracy of their vote", [100 * vote], "%"),
            replace(gained, low=100 * low, high=100 * high),
        ]
    return rows


def vote_over_singles(
    probability_MNK: np.ndarray, label_N: np.ndarray
) -> tuple[np.ndarray, float, float, float, float]:
    """Accuracy of each network, of the mean of their probabilities, and the gain over the mean.

    Returns:
        single_M, vote, gain, and the gain's 95 % interval: for these networks, by a bootstrap over
        test samples with a fixed seed. All are fractions.
    """
    right_MN = probability_MNK.argmax(2) == label_N
    vote_N = probability_MNK.mean(0).argmax(1) == label_N
    gain_N = vote_N - right_MN.mean(0)
    low, high = bootstrap95(gain_N, np.mean)
    return right_MN.mean(1), float(vote_N.mean()), float(gain_N.mean()), low, high
