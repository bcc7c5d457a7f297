"""Packing TMNIST's CSV against polars.read_csv of it, and opening the records, in turn.

The two that are compared are timed as whole processes, start of the interpreter included.
"""

import gzip
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import click

from engine.data import sample
from engine.host import ROOT
from engine.report import environment
from tests.bench import OUT
from tools.report.rows import claim, row, write_result

TMNIST_ROWS = 274_093
TIMED = """
import json, resource, sys, time
start = time.perf_counter()
{work}
seconds = time.perf_counter() - start
print(json.dumps([seconds, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**10]))
"""
POLARS = TIMED.format(work="import polars; polars.read_csv(sys.argv[1])")
PACK = TIMED.format(
    work="from tools.pack_tmnist import main\nmain(sys.argv[1:3], standalone_mode=False)"
)
OPEN = TIMED.format(
    work="from engine.data.records import open_records; open_records(sys.argv[2])"
).replace("start =", "import engine.data.records\nstart =")


def measure(code: str, *arguments: Path, whole: bool = True) -> tuple[float, float]:
    """(seconds, peak MiB) of a process that runs `code`, or, if not `whole`, of its work alone."""
    command = [sys.executable, "-c", code, *map(str, arguments)]
    start = time.perf_counter()
    done = subprocess.run(
        command, cwd=ROOT, check=True, capture_output=True, text=True, timeout=600
    )
    whole_s = time.perf_counter() - start
    seconds, peak_mib = json.loads(done.stdout.splitlines()[-1])
    return whole_s if whole else seconds, peak_mib


def repeated_sample(path: Path, num_rows: int) -> Path:
    """A CSV of so many rows: the packaged sample's, again and again."""
    with gzip.open(sample.CSV) as file:
        header, *rows = file.readlines()
    with open(path, "wb") as out:
        out.write(header)
        for start in range(0, num_rows, len(rows)):
            out.writelines(rows[: num_rows - start])
    return path


def bench(out: Path, csv: Path | None, rounds: int, num_rows: int = TMNIST_ROWS) -> None:
    """Measure and write OUT/cpu_pack.json."""
    out.mkdir(parents=True, exist_ok=True)
    sides: dict[str, list[tuple[float, float]]] = {"polars": [], "pack": [], "open": []}
    with tempfile.TemporaryDirectory(dir=out) as folder:
        csv, records = (
            csv or repeated_sample(Path(folder) / "tmnist.csv", num_rows),
            Path(folder) / "records",
        )
        csv_mb = csv.stat().st_size / 1e6
        with open(csv, "rb") as file:  # into the page cache, for both sides
            while file.read(2**24):
                pass
        measure(PACK, csv, records)  # compiles the lexer, once in its life
        for _ in range(rounds):
            sides["polars"].append(measure(POLARS, csv))
            shutil.rmtree(records)
            os.sync()
            sides["pack"].append(measure(PACK, csv, records))
            sides["open"].append(measure(OPEN, csv, records, whole=False))
        num_bytes = sum(file.stat().st_size for file in records.iterdir())
    (polars, _), (pack, pack_mib), (opened, _) = (zip(*sides[name], strict=True) for name in sides)
    rows = [
        row("polars.read_csv alone, whole process", list(polars), "s"),
        row("tools/pack_tmnist, whole process", list(pack), "s"),
        row(
            "ratio pack over polars, round by round",
            [b / a for a, b in zip(polars, pack, strict=True)],
            "x",
        ),
        row("pack: peak memory", list(pack_mib), "MiB"),
        row("polars: peak memory", [mib for _, mib in sides["polars"]], "MiB"),
        row(f"open_records, verified, {num_bytes / 2**20:.0f} MiB", list(opened), "s"),
    ]
    claims = [
        claim("pack's time over polars' (x)", rows[2].value, 0.6, at_most=True),
        claim("pack's peak memory (MiB)", rows[3].value, 500, at_most=True),
        claim("open_records (s)", rows[5].value, 0.25, at_most=True),
    ]
    title = f"Packing a CSV of {csv_mb:,.0f} MB from the page cache, two cores"
    facts = environment(num_threads=len(os.sched_getaffinity(0)), allocator="default", gpu={})
    write_result(out / "cpu_pack.json", title=title, environment=facts, rows=rows, claims=claims)


@click.command()
@click.option(
    "--csv",
    type=click.Path(path_type=Path),
    help="TMNIST's CSV.  [default: the sample's rows, repeated]",
)
@OUT
@click.option("--rounds", default=7, show_default=True)
def main(csv: Path | None, out: Path, rounds: int) -> None:
    """Benchmark the packer."""
    bench(out, csv, rounds)


if __name__ == "__main__":
    main()
