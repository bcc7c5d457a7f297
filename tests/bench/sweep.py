"""The recipe fast from 8 seeds on the sample, in three ways, in turn: whole commands by the wall.

Members of one process (`--sweep seed=1..8`); 8 processes one after another; joblib's 2 workers, as
`tools/profile ensemble` starts them, with half of the cores each. The first two do the same work,
reports and checkpoints included, and end with the same bits; the workers only train, and answer the
test split.
"""

import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from statistics import median

import click

from engine.config import RECIPES
from engine.data.sample import ensure_sample
from engine.host import ROOT, num_cpus
from engine.report import RunReport, read_report
from tests.bench import OUT
from tools.measure.ensemble import Arm, train_all
from tools.report.rows import claim, row, write_result
from tools.report.sweep import read_sweep_result

NUM = 8
NUM_WORKERS = 2
TOGETHER, APART = "members of one process", "processes one after another"
WORKERS = f"{NUM_WORKERS} workers of joblib, training alone"
Way = Callable[[Path, int], list[RunReport]]
"""(folder, epochs) -> what the trainings reported; none where they report nothing."""


def _run(*words: object) -> None:
    command = [sys.executable, "-m", "engine.run", "--device", "cpu", *map(str, words)]
    subprocess.run(command, cwd=ROOT, check=True, stdout=subprocess.DEVNULL)


def together(folder: Path, epochs: int) -> list[RunReport]:
    """One command for all."""
    _run("--sweep", f"seed=1..{NUM}", "--epochs", epochs, "--out", folder / "sweep")
    members = read_sweep_result(folder / "sweep").members
    return [read_report(folder / "sweep" / member.folder) for member in members]


def apart(folder: Path, epochs: int) -> list[RunReport]:
    """A command for each."""
    runs = [folder / str(seed) for seed in range(1, NUM + 1)]
    for seed, run in enumerate(runs, start=1):
        _run("--seed", seed, "--epochs", epochs, "--out", run)
    return [read_report(run) for run in runs]


def workers(folder: Path, epochs: int) -> list[RunReport]:
    """A command that starts the workers."""
    code = f"from tests.bench.sweep import train_by_workers; train_by_workers({epochs}, {NUM})"
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True)
    return []


def train_by_workers(epochs: int, num: int) -> None:
    """What that command does."""
    fast = RECIPES["fast"]
    data = replace(fast.data, path=str(ensure_sample()), feed="resident")
    config = replace(fast, data=data, epochs=epochs, seed=1)
    train_all(config, num, Arm(NUM_WORKERS, max(num_cpus() // NUM_WORKERS, 1)))


WAYS: dict[str, Way] = {TOGETHER: together, APART: apart, WORKERS: workers}


def bench(out: Path, rounds: int, epochs: int = 2) -> None:
    """Measure and write OUT/cpu_sweep.json."""
    ensure_sample()
    wall_s: dict[str, list[float]] = {name: [] for name in WAYS}
    train_s: dict[str, list[float]] = {TOGETHER: [], APART: []}
    for number in range(rounds):
        reports: dict[str, list[RunReport]] = {}
        for name in list(WAYS)[:: -1 if number % 2 else 1]:
            with tempfile.TemporaryDirectory() as folder:
                start_s = time.perf_counter()
                reports[name] = WAYS[name](Path(folder), epochs)
                wall_s[name].append(time.perf_counter() - start_s)
        for name, sums_s in train_s.items():
            sums_s.append(sum(report.train_s for report in reports[name]))
        losses = [[report.test_loss for report in reports[name]] for name in train_s]
        assert losses[0] == losses[1], "members are not what they are alone"
    over = {
        name: [b / a for a, b in zip(wall_s[TOGETHER], wall_s[name], strict=True)]
        for name in (APART, WORKERS)
    }
    rows = [row(f"{name}: time", seconds, "s") for name, seconds in wall_s.items()]
    rows += [row(f"{name}: of it training", seconds, "s") for name, seconds in train_s.items()]
    rows += [row(f"{name} over {TOGETHER}", ratios, "x") for name, ratios in over.items()]
    first = reports[TOGETHER][0]
    write_result(
        out / "cpu_sweep.json",
        title=f"{NUM} seeds of fast, {epochs} epochs on {first.num_train_samples:,} images",
        environment=first.environment,
        rows=rows,
        claims=[claim(f"{NUM} {APART}, time over {TOGETHER} (x)", median(over[APART]), 1.0)],
    )


@click.command()
@OUT
@click.option("--rounds", default=3, show_default=True)
def main(out: Path, rounds: int) -> None:
    """Benchmark sweeps."""
    bench(out, rounds)


if __name__ == "__main__":
    main()
