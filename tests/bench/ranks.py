"""Two ranks of one thread against one rank of one thread, batch 512 a rank, interleaved pairs of whole processes."""

from pathlib import Path

import click

from tests.bench.child import samples_per_s
from tools.bench.results import claim, row, write_result

BATCH = 512


def bench(out: Path, pairs: int, num_steps: int) -> None:
    """Measure and write OUT/cpu_ranks.json."""
    one, two = [], []
    for _ in range(pairs):
        for num_ranks, rates in ((1, one), (2, two)):
            rate, environment = samples_per_s(
                "rung_bf16", batch_size=BATCH, num_steps=num_steps, num_ranks=num_ranks, num_threads=1
            )
            rates.append(rate)
    rows = [
        row("1 rank x 1 thread", one, "samples/s"),
        row("2 ranks x 1 thread, gloo", two, "samples/s"),
        row("ratio, pair by pair", [b / a for a, b in zip(one, two, strict=True)], "x"),
    ]
    rows.append(row("efficiency, pair by pair", [50 * b / a for a, b in zip(one, two, strict=True)], "%"))
    claims = [claim("efficiency of 2 ranks (%)", rows[3]["value"], 92)]
    title = f"DDP on two cores, batch {BATCH} a rank, bf16 channels-last"
    write_result(out / "cpu_ranks.json", title=title, environment=environment, rows=rows, claims=claims)


@click.command()
@click.option("--out", type=click.Path(path_type=Path), default=Path("runs/bench"), show_default=True)
@click.option("--pairs", default=5, show_default=True)
@click.option("--steps", default=100, show_default=True)
def main(out: Path, pairs: int, steps: int) -> None:
    """Benchmark data parallelism."""
    bench(out, pairs, steps)


if __name__ == "__main__":
    main()
