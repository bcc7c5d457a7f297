"""engine.loader beside the feed that it serves, and beside what others' loops take, at batch 2048.

Each is measured alone in a process of its own, all in turn, round by round. torchdata and FFCV are
measured where they are installed.
"""

import tempfile
from functools import partial
from pathlib import Path
from statistics import median

import click
import torch

from engine.data.pack import PackOptions, pack
from engine.report import environment
from tests.bench import OUT
from tests.bench.pack import TMNIST_ROWS, repeated_sample
from tests.bench.peers import installed
from tools.measure.feeds import measure_all
from tools.report.rows import claim, row, write_result

BATCH = 2048
FEED, OURS, PLAIN = "resident", "engine.loader", "TensorDataset"
OTHERS = (PLAIN, "torchdata", "FFCV")
TITLES = {
    FEED: "the resident feed, bare",
    OURS: "engine.loader over it",
    PLAIN: "DataLoader over TensorDataset, 2 workers",
    "torchdata": "torchdata's StatefulDataLoader over it, 2 workers",
    "FFCV": "FFCV, 2 workers",
}


def bench(out: Path, rounds: int, seconds: float, num_rows: int = TMNIST_ROWS) -> None:
    """Measure and write OUT/cpu_loader.json."""
    out.mkdir(parents=True, exist_ok=True)
    rates: dict[str, list[float]] = {name: [] for name in (FEED, OURS, *installed(OTHERS))}
    with tempfile.TemporaryDirectory(dir=out) as folder:
        records = Path(folder) / "records"
        csv = repeated_sample(Path(folder) / "tmnist.csv", num_rows)
        pack(csv, records, PackOptions(split="none"))
        csv.unlink()
        for _ in range(rounds):
            for name, found in rates.items():
                module = "tools.measure.feeds" if name == FEED else "tests.bench.peers"
                measure = partial(measure_all, names=[name], module=module)
                found.append(measure(records, BATCH, seconds)[0].samples_per_s)
    rows = [row(TITLES[name], found, "samples/s") for name, found in rates.items()]
    kept = [100 * b / a for a, b in zip(rates[FEED], rates[OURS], strict=True)]
    times = [b / a for a, b in zip(rates[PLAIN], rates[OURS], strict=True)]
    rows += [
        row("engine.loader of the bare feed, round by round", kept, "%"),
        row("engine.loader over TensorDataset, round by round", times, "x"),
    ]
    claims = [
        claim("engine.loader of the bare feed (%)", median(kept), 95),
        claim("engine.loader over TensorDataset (x)", median(times), 25),
    ]
    num_threads = torch.get_num_threads()
    facts = environment(num_threads=num_threads, allocator="keep_large_blocks", gpu={})
    title = f"engine.loader: shuffled batches of {BATCH} with ids, {num_rows:,} images, two cores"
    write_result(out / "cpu_loader.json", title=title, environment=facts, rows=rows, claims=claims)


@click.command()
@OUT
@click.option("--rounds", default=5, show_default=True)
@click.option("--seconds", default=4.0, show_default=True, help="For each side of a round.")
def main(out: Path, rounds: int, seconds: float) -> None:
    """Benchmark engine.loader."""
    bench(out, rounds, seconds)


if __name__ == "__main__":
    main()
