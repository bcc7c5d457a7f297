"""bf16 against fp32: the default recipe trained with both from the same seeds, pair by pair."""

import tempfile
from dataclasses import replace
from itertools import product
from pathlib import Path

import click

from tests.bench import OUT
from tests.bench.fullsize import train
from tools.report.rows import claim, row, write_result
from tools.report.statistics import mean_interval95

SIDES = {"fp32": (), "bf16": ("--amp",)}


def bench(out: Path, data: Path, pairs: int, extra: tuple[str, ...] = ()) -> None:
    """Measure and write OUT/cpu_precision.json; `extra` flags shorten a smoke run."""
    accuracy: dict[str, list[float]] = {name: [] for name in SIDES}
    for seed, (name, flags) in product(range(1, pairs + 1), SIDES.items()):
        with tempfile.TemporaryDirectory() as folder:
            report = train(data, (f"--seed={seed}", *flags, *extra), Path(folder) / "run")
        assert report.effective["precision"] == name, (
            f"{name} is not supported here: {report.notes}"
        )
        assert report.test_accuracy_fraction is not None, "the records have no test split"
        accuracy[name].append(100 * report.test_accuracy_fraction)
    points = [b - a for a, b in zip(accuracy["fp32"], accuracy["bf16"], strict=True)]
    middle, low, high = mean_interval95(points)
    difference = row("95 % interval of the mean difference", points, "points")
    rows = [
        *(row(f"{name}: test accuracy", values, "%") for name, values in accuracy.items()),
        row("bf16 less fp32, seed by seed", points, "points"),
        replace(difference, value=middle, low=low, high=high),
    ]
    claims = [
        claim(
            "the interval's end that is farther from 0 (points)", max(-low, high), 0.3, at_most=True
        )
    ]
    size = f"{report.num_epochs} epochs on {report.num_train_samples:,} images"
    title = f"bf16 against fp32: {size}"
    write_result(
        out / "cpu_precision.json",
        title=title,
        environment=report.environment,
        rows=rows,
        claims=claims,
    )


@click.command()
@click.option(
    "--data", type=click.Path(path_type=Path), required=True, help="Records of all typefaces."
)
@OUT
@click.option("--pairs", default=5, show_default=True, type=click.IntRange(2, 10))
def main(data: Path, out: Path, pairs: int) -> None:
    """Benchmark the accuracy of bf16."""
    bench(out, data, pairs)


if __name__ == "__main__":
    main()
