"""Whole trainings of the recipes against --baseline, all to their end, in turn."""

import subprocess
import sys
import tempfile
from pathlib import Path
from statistics import mean, median

import click

from engine.host import ROOT
from engine.report import RunReport, read_report
from tests.bench import OUT
from tools.report.rows import Claim, Row, claim, row, write_result

FAST = ("--amp", "--cuda-graphs")
BEST = ("--recipe=best", *FAST)
BASELINE = ("--baseline",)
NAMES = {FAST: "fast (first layer whitened and frozen)", BEST: "best", BASELINE: "baseline"}


def train(data: Path, flags: tuple[str, ...], folder: Path) -> RunReport:
    """One run of engine.run; its report."""
    command = [
        sys.executable,
        "-m",
        "engine.run",
        "--device=cpu",
        f"--data={data}",
        f"--out={folder}",
        *flags,
    ]
    subprocess.run(command, cwd=ROOT, check=True)
    return read_report(folder)


def bench(out: Path, data: Path, rounds: int, seeds: int, extra: tuple[str, ...] = ()) -> None:
    """Measure and write OUT/cpu_fullsize.json; `extra` flags shorten a smoke run."""
    reports: dict[tuple[str, ...], list[RunReport]] = {flags: [] for flags in NAMES}
    with tempfile.TemporaryDirectory() as folder:
        for seed in range(1, seeds + 1):
            for flags in (FAST, BEST, *[BASELINE] * (seed <= rounds)):
                name = f"{seed}{''.join(flags)}"
                line = (*flags, f"--seed={seed}", *extra)
                reports[flags].append(train(data, line, Path(folder) / name))
    rows = [each for flags, runs in reports.items() for each in rows_of(NAMES[flags], runs)]
    first = reports[FAST][0]
    size = f"{first.num_train_samples:,} images, two cores"
    write_result(
        out / "cpu_fullsize.json",
        title=f"Training on {size}: the recipes and the baseline, a seed after the other",
        environment=first.environment,
        rows=rows,
        claims=claims_of(reports),
    )


def accuracies(runs: list[RunReport]) -> list[float]:
    """Percent of the test split."""
    return [100 * (run.test_accuracy_fraction or 0.0) for run in runs]


def rows_of(name: str, runs: list[RunReport]) -> list[Row]:
    """Time, accuracy and throughput of a recipe."""
    title = f"{name}, {runs[0].num_epochs} epochs, batch {runs[0].config.global_batch}"
    return [
        row(f"{title}: training time", [run.train_s for run in runs], "s"),
        row(f"{title}: test accuracy", accuracies(runs), "%"),
        row(f"{title}: throughput", [run.samples_per_s for run in runs], "samples/s"),
    ]


def claims_of(reports: dict[tuple[str, ...], list[RunReport]]) -> list[Claim]:
    """What the recipes must reach."""
    fast, best, baseline = reports[FAST], reports[BEST], reports[BASELINE]
    fast_s = median(run.train_s for run in fast)
    ratio = median(run.train_s for run in baseline) / fast_s
    more = mean(accuracies(fast)) - mean(accuracies(baseline))
    return [
        claim("baseline's training time over fast's (x)", ratio, 30.0),
        claim("fast's mean test accuracy less the baseline's (points)", more, 0.0),
        claim("best's mean test accuracy (%)", mean(accuracies(best)), 89.5),
    ]


@click.command()
@click.option(
    "--data",
    type=click.Path(path_type=Path),
    required=True,
    help="Records of all typefaces, --split random.",
)
@OUT
@click.option("--rounds", default=1, show_default=True, help="Runs of the baseline.")
@click.option("--seeds", default=5, show_default=True, help="Runs of each recipe.")
def main(data: Path, out: Path, rounds: int, seeds: int) -> None:
    """Benchmark whole trainings."""
    bench(out, data, rounds, seeds)


if __name__ == "__main__":
    main()
