"""The critical batch: predicted by the noise scale, and measured by a sweep of fixed batches.

Every run ends at the same validation accuracy, with a constant learning rate that goes with the
root of the batch; it is a part of the recipe's, whose rate falls from its highest at once. Of the
fixed batches' steps follows the measured critical batch: steps = least steps x (1 + critical batch
/ batch). Then --batch-schedule noise against the best fixed batch.
"""

import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import median

import click
import numpy as np

from engine.config import RECIPES
from engine.report import RunReport
from engine.train.schedule import part_config
from tests.bench import OUT
from tests.bench.fullsize import train
from tools.report.rows import Claim, Row, claim, row, write_result

BATCHES = (64, 128, 256, 512, 1024, 2048)
START = 128
"""Where noise starts, and the batch of the recipe's learning rate."""
BETWEEN_SAMPLES = 4096
"""Samples between two evaluations."""
MOST_EPOCHS = 8
RATE_SHARE = 0.4
"""At the recipe's own rate, kept constant, runs of 256 samples a batch diverge."""
CONSTANT = ("--set", "optim.schedule=constant", "--set", "data.order=exact")


@dataclass(frozen=True)
class Sweep:
    """What is trained, and how far."""

    data: Path
    target: float
    """Validation accuracy, 0..1."""
    seeds: int
    batches: tuple[int, ...] = BATCHES
    epochs: int = MOST_EPOCHS

    def run(self, batch: int, seed: int, *flags: str) -> RunReport:
        """One training with `batch` samples to begin with."""
        rate = RATE_SHARE * part_config(RECIPES["fast"], batch).optim.learning_rate
        every = max(1, BETWEEN_SAMPLES // batch)
        words = (*CONSTANT, f"--seed={seed}", f"--batch-size={batch}", f"--epochs={self.epochs}")
        words += (f"--evaluate-every={every}", "--set", f"optim.learning_rate={rate}", *flags)
        with tempfile.TemporaryDirectory() as folder:
            return train(self.data, words, Path(folder) / "run")

    def to_target(self, batch: int, *flags: str) -> list[RunReport]:
        """The runs of all seeds that reach the target."""
        target = f"--target-accuracy={self.target}"
        runs = [self.run(batch, seed, target, *flags) for seed in range(1, self.seeds + 1)]
        reached = [run for run in runs if run.time_to_target_s]
        if len(reached) < len(runs):
            click.echo(f"batch {batch}: {len(runs) - len(reached)} runs did not reach the target")
        return reached


def fitted(batches: Sequence[int], steps: Sequence[float]) -> tuple[float, float]:
    """(least steps, critical batch) of steps = least x (1 + critical / batch).

    By least squares of the relative errors.
    """
    steps_N = np.asarray(steps, float)
    design_N2 = np.stack([np.ones(len(batches)), 1 / np.asarray(batches, float)], 1)
    (least, slope), *_ = np.linalg.lstsq(design_N2 / steps_N[:, None], np.ones(len(batches)))
    return float(least), float(slope / least)


def bench(out: Path, sweep: Sweep) -> None:
    """Measure and write OUT/cpu_noise.json."""
    found = {batch: sweep.to_target(batch) for batch in sweep.batches}
    fixed = {batch: runs for batch, runs in found.items() if runs}
    noise = sweep.to_target(START, "--batch-schedule=noise")
    if len(fixed) < 2 or not noise:
        raise click.ClickException("the target was not reached; give a lower --target")
    predicted = predictions(sweep)
    steps = [median(run.num_steps for run in runs) for runs in fixed.values()]
    _, measured = fitted(list(fixed), steps)
    best = min(fixed, key=lambda batch: median(seconds(fixed[batch])))
    rows = [each for batch, runs in fixed.items() for each in rows_of(f"batch {batch}", runs)]
    rows += rows_of(f"noise, from batch {START}", noise)
    rows += [
        row("noise: its last batch", [float(last_batch(run)) for run in noise], "samples"),
        row("critical batch, fitted to the sweep", [measured], "samples"),
    ]
    if predicted:
        rows.append(row("critical batch, predicted after an epoch", predicted, "samples"))
    ratio = median(seconds(noise)) / median(seconds(fixed[best]))
    size = f"{noise[0].num_train_samples:,} images"
    write_result(
        out / "cpu_noise.json",
        title=f"Steps and time to {sweep.target:.0%} by batch: {size}",
        environment=noise[0].environment,
        rows=rows,
        claims=claims_of(predicted, measured, ratio, best),
    )


def predictions(sweep: Sweep) -> list[float]:
    """The critical batch by the noise scale, after one epoch with a fixed batch, of each seed."""
    flags = ("--noise-scale", "--epochs=1")
    runs = [sweep.run(START, seed, *flags) for seed in range(1, sweep.seeds + 1)]
    found = [run.batches[-1].critical_batch for run in runs]
    return [each for each in found if each is not None]


def seconds(runs: list[RunReport]) -> list[float]:
    """Training time to the target."""
    return [run.time_to_target_s or run.train_s for run in runs]


def last_batch(run: RunReport) -> int:
    """The global batch that a run ended with."""
    return run.segments[-1].global_batch


def num_samples(run: RunReport) -> float:
    """Samples trained, of all parts."""
    return float(sum(part.num_steps * part.global_batch for part in run.segments))


def rows_of(name: str, runs: list[RunReport]) -> list[Row]:
    """Steps, samples and time to the target."""
    return [
        row(f"{name}: steps", [float(run.num_steps) for run in runs], "steps"),
        row(f"{name}: samples", [num_samples(run) for run in runs], "samples"),
        row(f"{name}: training time", seconds(runs), "s"),
    ]


def claims_of(predicted: list[float], measured: float, ratio: float, best: int) -> list[Claim]:
    """What the noise scale and the schedule must reach.

    None of the noise scale where the sweep's steps do not fall with the batch, or it found none.
    """
    text = f"time of noise over the best fixed batch's, {best} (x)"
    claims = [claim(text, ratio, 0.95, at_most=True)]
    if predicted and measured > 0:
        share = median(predicted) / measured
        text = "critical batch, predicted over measured or the inverse (x)"
        claims.append(claim(text, max(share, 1 / share), 2.0, at_most=True))
    return claims


@click.command()
@click.option("--data", type=click.Path(path_type=Path), required=True, help="Records.")
@OUT
@click.option("--target", default=0.84, show_default=True, type=click.FloatRange(0, 1))
@click.option("--seeds", default=3, show_default=True, type=click.IntRange(1, 10))
@click.option("--batches", default=",".join(map(str, BATCHES)), show_default=True)
@click.option("--epochs", default=MOST_EPOCHS, show_default=True, help="At most.")
def main(data: Path, out: Path, target: float, seeds: int, batches: str, epochs: int) -> None:
    """Benchmark the noise scale and its schedule."""
    sizes = tuple(int(batch) for batch in batches.split(","))
    bench(out, Sweep(data, target, seeds, sizes, epochs))


if __name__ == "__main__":
    main()
