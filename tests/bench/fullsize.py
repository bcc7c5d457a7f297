"""The default fast recipe against --baseline, both to their end: fast, baseline, fast."""

import subprocess
import sys
import tempfile
from pathlib import Path
from statistics import median

import click

from engine.host import ROOT
from engine.report import RunReport, read_report
from tests.bench import OUT
from tools.report.rows import claim, row, write_result

FAST = ("--amp", "--cuda-graphs")
BASELINE = ("--baseline",)


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


def bench(out: Path, data: Path, rounds: int, extra: tuple[str, ...] = ()) -> None:
    """Measure and write OUT/cpu_fullsize.json; `extra` flags shorten a smoke run."""
    reports: dict[tuple[str, ...], list[RunReport]] = {FAST: [], BASELINE: []}
    with tempfile.TemporaryDirectory() as folder:
        plan = [FAST, *[BASELINE, FAST] * rounds]
        for number, flags in enumerate(plan):
            reports[flags].append(train(data, flags + extra, Path(folder) / str(number)))
    rows = []
    for name, flags in (("fast", FAST), ("baseline", BASELINE)):
        runs = reports[flags]
        title = f"{name}, {runs[0].num_epochs} epochs, batch {runs[0].config.global_batch}"
        rows.append(row(f"{title}: training time", [r.train_s for r in runs], "s"))
        rows.append(
            row(
                f"{title}: test accuracy",
                [100 * r.test_accuracy_fraction for r in runs],
                "%",
            )
        )
        rows.append(row(f"{title}: throughput", [r.samples_per_s for r in runs], "samples/s"))
    speedup = median(r.train_s for r in reports[BASELINE]) / median(
        r.train_s for r in reports[FAST]
    )
    claims = [
        claim("baseline's training time over fast's (x)", speedup, 6.0),
        claim("fast test accuracy (%)", rows[1].value, 87.7),
    ]
    first = reports[FAST][0]
    size = f"{first.num_train_samples:,} images, two cores"
    title = f"Training on {size}: the default fast recipe and the baseline"
    write_result(
        out / "cpu_fullsize.json",
        title=title,
        environment=first.environment,
        rows=rows,
        claims=claims,
    )


@click.command()
@click.option(
    "--data",
    type=click.Path(path_type=Path),
    required=True,
    help="Records of all typefaces, --split random.",
)
@OUT
@click.option("--rounds", default=1, show_default=True, help="Baseline runs; one fast run more.")
def main(data: Path, out: Path, rounds: int) -> None:
    """Benchmark whole trainings."""
    bench(out, data, rounds)


if __name__ == "__main__":
    main()
