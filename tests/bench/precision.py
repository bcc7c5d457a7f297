"""bf16 against fp32: the default recipe on the same records, trained with both from the same seeds, pair by pair."""

import tempfile
from itertools import product
from math import sqrt
from pathlib import Path
from statistics import mean, stdev

import click

from engine.report import Environment
from tests.bench.fullsize import train
from tools.report.rows import claim, row, write_result

SIDES = {"fp32": (), "bf16": ("--amp",)}
STUDENT_T = {
    2: 12.706,
    3: 4.303,
    4: 3.182,
    5: 2.776,
    6: 2.571,
    7: 2.447,
    8: 2.365,
    9: 2.306,
    10: 2.262,
}
"""97.5 % quantile of Student's t with n - 1 degrees of freedom, by the number n of pairs."""


def bench(out: Path, data: Path, pairs: int, extra: tuple[str, ...] = ()) -> None:
    """Measure and write OUT/cpu_precision.json; `extra` flags shorten a smoke run."""
    accuracy: dict[str, list[float]] = {name: [] for name in SIDES}
    for seed, (name, flags) in product(range(1, pairs + 1), SIDES.items()):
        with tempfile.TemporaryDirectory() as folder:
            report = train(data, (f"--seed={seed}", *flags, *extra), Path(folder) / "run")
        assert report["effective"]["precision"] == name, (
            f"{name} is not supported here: {report['notes']}"
        )
        accuracy[name].append(100 * report["test_accuracy_fraction"])
    points = [b - a for a, b in zip(accuracy["fp32"], accuracy["bf16"], strict=True)]
    half = STUDENT_T[pairs] * stdev(points) / sqrt(pairs)
    low, high = mean(points) - half, mean(points) + half
    rows = [
        *(row(f"{name}: test accuracy", values, "%") for name, values in accuracy.items()),
        row("bf16 less fp32, seed by seed", points, "points"),
        {"name": "95 % interval of the mean difference", "value": mean(points), "unit": "points"}
        | {"low": low, "high": high, "n": pairs},
    ]
    claims = [
        claim(
            "the interval's end that is farther from 0 (points)", max(-low, high), 0.3, at_most=True
        )
    ]
    title = f"bf16 against fp32: {report['num_epochs']} epochs on {report['num_train_samples']:,} images"
    environment = Environment(**report["environment"])
    write_result(
        out / "cpu_precision.json", title=title, environment=environment, rows=rows, claims=claims
    )


@click.command()
@click.option(
    "--data", type=click.Path(path_type=Path), required=True, help="Records of all typefaces."
)
@click.option(
    "--out", type=click.Path(path_type=Path), default=Path("runs/bench"), show_default=True
)
@click.option("--pairs", default=5, show_default=True, type=click.IntRange(2, 10))
def main(data: Path, out: Path, pairs: int) -> None:
    """Benchmark the accuracy of bf16."""
    bench(out, data, pairs)


if __name__ == "__main__":
    main()
