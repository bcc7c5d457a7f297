"""What every feed and its peers carry at batch 2048, and how long training waits for a feed.

Training is at batch 512, on a set of full size, packed with split none.
"""

import subprocess
import sys
import tempfile
from dataclasses import replace
from pathlib import Path

import click

from engine.data.pack import PackOptions, pack
from engine.host import ROOT
from engine.report import Environment, read_report
from tests.bench import OUT
from tests.bench.pack import TMNIST_ROWS, repeated_sample
from tests.bench.peers import measure_peers
from tools.measure.feeds import FEEDS, measure_all
from tools.report.rows import claim, row, write_result

WANTED = {"resident": 12e6, "dali": 5e6, "stream": 3e6}
AUGMENT = ("shift_pixels=2", "rotate_degrees=10", "shear_degrees=5", "scale_fraction=0.1")


def train(
    records: Path, feed: str, augmented: bool, folder: Path, first: str = ""
) -> tuple[float, Environment]:
    """One epoch of fast at batch 512; the percentage of it that the host waited for the feed.

    Args:
        first: Python that the training process runs before anything else.
    """
    order = "blocked" if feed == "stream" else "exact"
    flags = ["--amp", "--device=cpu", "--epochs=1", f"--feed={feed}", f"--order={order}"]
    flags.append("--batch-size=512")
    places = [f"--data={records}", f"--out={folder}"]
    code = f"{first}from engine.run import main; main()"
    command = [sys.executable, "-c", code, *flags, *places]
    if augmented:
        command += [word for amount in AUGMENT for word in ("--set", f"augment.{amount}")]
    subprocess.run(command, cwd=ROOT, check=True, stdout=subprocess.DEVNULL)
    report = read_report(folder)
    return 100 * report.data_wait_fraction, report.environment


def bench(out: Path, seconds: float, num_rows: int = TMNIST_ROWS) -> None:
    """Measure and write OUT/cpu_feeds.json."""
    out.mkdir(parents=True, exist_ok=True)
    rows, claims = [], []
    with tempfile.TemporaryDirectory(dir=out) as folder:
        records = Path(folder) / "records"
        pack(
            repeated_sample(Path(folder) / "tmnist.csv", num_rows),
            records,
            PackOptions(split="none"),
        )
        (Path(folder) / "tmnist.csv").unlink()
        measured = measure_all(records, 2048, seconds, names=FEEDS)
        for found in measured + measure_peers(records, 2048, seconds):
            name, rate = found.name, found.samples_per_s
            passes = [found.low, rate, found.high]
            line = row(f"{name}, {found.order} order", passes, "samples/s")
            rows.append(replace(line, n=found.num_passes))
            rows.append(row(f"{name}: CPU time a million samples", [found.cpu_s_per_million], "s"))
            if name in WANTED:
                claims.append(claim(f"{name} (samples/s)", rate, WANTED[name]))
        for feed in WANTED:
            for augmented in (False, True):
                title = f"training at batch 512 waits for {feed}{' augmented' if augmented else ''}"
                waited, environment = train(
                    records, feed, augmented, Path(folder) / title.replace(" ", "_")
                )
                rows.append(row(title, [waited], "%"))
                if not augmented:
                    claims.append(claim(f"{title} (%)", waited, 1.0, at_most=True))
    title = f"Feeds: shuffled uint8 batches of 2048 with ids, {num_rows:,} images, two cores"
    write_result(
        out / "cpu_feeds.json", title=title, environment=environment, rows=rows, claims=claims
    )


@click.command()
@OUT
@click.option("--seconds", default=8.0, show_default=True, help="For each feed.")
def main(out: Path, seconds: float) -> None:
    """Benchmark the feeds."""
    bench(out, seconds)


if __name__ == "__main__":
    main()
