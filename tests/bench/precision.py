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

FLAGS = {"fp32": (), "bf16": ("--amp",), "fp8": ("--amp=fp8",)}
"""By precision."""


def bench(out: Path, data: Path, pairs: int, extra: tuple[str, ...] = ()) -> None:
    """Measure and write OUT/cpu_precision.json; `extra` flags shorten a smoke run."""
    compare(out / "cpu_precision.json", data, ("fp32", "bf16"), pairs, 0.3, extra)


def compare(
    file: Path,
    data: Path,
    sides: tuple[str, str],
    pairs: int,
    most_points: float,
    extra: tuple[str, ...] = (),
) -> None:
    """Train both sides with each seed and write how the second's test accuracy differs.

    Args:
        most_points: how far from 0 the difference's interval may reach.
    """
    accuracy: dict[str, list[float]] = {name: [] for name in sides}
    for seed, name in product(range(1, pairs + 1), sides):
        with tempfile.TemporaryDirectory() as folder:
            flags = (f"--seed={seed}", *FLAGS[name], *extra)
            report = train(data, flags, Path(folder) / "run")
        assert report.effective["precision"] == name, (
            f"{name} is not supported here: {report.notes}"
        )
        assert report.test_accuracy_fraction is not None, "the records have no test split"
        accuracy[name].append(100 * report.test_accuracy_fraction)
    base, other = sides
    points = [b - a for a, b in zip(accuracy[base], accuracy[other], strict=True)]
    middle, low, high = mean_interval95(points)
    difference = row("95 % interval of the mean difference", points, "points")
    rows = [
        *(row(f"{name}: test accuracy", values, "%") for name, values in accuracy.items()),
        row(f"{other} less {base}, seed by seed", points, "points"),
        replace(difference, value=middle, low=low, high=high),
    ]
    text = "the interval's end that is farther from 0 (points)"
    plural = "" if report.num_epochs == 1 else "s"
    size = f"{report.num_epochs} epoch{plural} on {report.num_train_samples:,} images"
    write_result(
        file,
        title=f"{other} against {base}: {size}",
        environment=report.environment,
        rows=rows,
        claims=[claim(text, max(-low, high), most_points, at_most=True)],
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
