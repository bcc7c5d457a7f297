"""Distortion on a CPU: the compiled warp against torch's grid_sample, in turn.

What the resident feed carries at batch 2048, and how long training at batch 512 waits for it, on a
set of full size, packed with split none.
"""

import json
import subprocess
import sys
import tempfile
from pathlib import Path

import click

from engine.data.pack import PackOptions, pack
from engine.host import ROOT
from engine.report import Environment
from engine.typed import typed
from tests.bench import OUT
from tests.bench.feeds import train
from tests.bench.pack import TMNIST_ROWS, repeated_sample
from tools.measure.feeds import FeedRate
from tools.report.rows import claim, row, write_result

SIDES = {
    "grid_sample": "from kernels import cpu; cpu.warps = lambda image_NHW: False\n",
    "compiled": "",
}
"""What a process does first, so that it warps in this way."""


def bench(out: Path, rounds: int, seconds: float, num_rows: int = TMNIST_ROWS) -> None:
    """Measure and write OUT/cpu_warp.json."""
    out.mkdir(parents=True, exist_ok=True)
    rates: dict[str, list[float]] = {name: [] for name in SIDES}
    waits: dict[str, list[float]] = {name: [] for name in SIDES}
    with tempfile.TemporaryDirectory(dir=out) as folder:
        records, runs = Path(folder) / "records", Path(folder) / "runs"
        csv = repeated_sample(Path(folder) / "tmnist.csv", num_rows)
        pack(csv, records, PackOptions(split="none"))
        csv.unlink()
        for number in range(rounds):
            for name in sorted(SIDES, reverse=bool(number % 2)):
                rates[name].append(carried(records, name, seconds))
                waited, environment = waits_for(records, name, runs / f"{name}_{number}")
                waits[name].append(waited)
    _write(out, rates, waits, environment)


def _write(
    out: Path,
    rates: dict[str, list[float]],
    waits: dict[str, list[float]],
    environment: Environment,
) -> None:
    sides = [rates["grid_sample"], rates["compiled"]]
    rows = [row(f"resident augmented, {name}", rates[name], "samples/s") for name in SIDES]
    rows.append(row("ratio", [b / a for a, b in zip(*sides, strict=True)], "x"))
    rows += [
        row(f"training at batch 512 waits for the feed, {name}", waits[name], "%") for name in SIDES
    ]
    claims = [
        claim("resident augmented, compiled (samples/s)", rows[1].value, 1.5e6),
        claim("training at batch 512 waits, compiled (%)", rows[4].value, 2.0, at_most=True),
    ]
    title = "Affine distortion compiled for the CPU: shuffled batches of 2048, two cores"
    write_result(
        out / "cpu_warp.json", title=title, environment=environment, rows=rows, claims=claims
    )


def carried(records: Path, side: str, seconds: float) -> float:
    """samples/s of the augmented resident feed, in a process of its own."""
    code = f"{SIDES[side]}from tools.measure.feeds import main, open_feed; main(open_feed)"
    command = [sys.executable, "-c", code, "resident augmented", str(records), "2048", str(seconds)]
    done = subprocess.run(command, cwd=ROOT, check=True, stdout=subprocess.PIPE, encoding="utf-8")
    return typed(FeedRate, json.loads(done.stdout.splitlines()[-1]), side).samples_per_s


def waits_for(records: Path, side: str, folder: Path) -> tuple[float, Environment]:
    """The percentage of an epoch that the host waited for the feed, and where."""
    return train(records, "resident", augmented=True, folder=folder, first=SIDES[side])


@click.command()
@OUT
@click.option("--rounds", default=3, show_default=True)
@click.option("--seconds", default=2.0, show_default=True, help="For each side of a round.")
def main(out: Path, rounds: int, seconds: float) -> None:
    """Benchmark the warp."""
    bench(out, rounds, seconds)


if __name__ == "__main__":
    main()
