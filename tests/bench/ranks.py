"""Two ranks of one thread against one rank of one thread, batch 512 per rank, in turn.

What two cores can do at most is measured beside them: two runs of one rank that share nothing.
"""

from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path

import click

from tests.bench import OUT
from tests.bench.child import measured
from tools.report.rows import claim, row, write_result

BATCH = 512


def bench(out: Path, pairs: int, num_steps: int) -> None:
    """Measure and write OUT/cpu_ranks.json."""
    one, apart, two = [], [], []
    ranks = partial(measured, "rung_bf16", batch_size=BATCH, num_steps=num_steps, num_threads=1)
    for _ in range(pairs):
        one.append(ranks(num_ranks=1).rate)
        with ThreadPoolExecutor(2) as pool:
            apart.append(
                sum(each.rate for each in pool.map(lambda _: ranks(num_ranks=1), range(2)))
            )
        found = ranks(num_ranks=2)
        two.append(found.rate)
    efficiencies = [50 * b / a for a, b in zip(one, two, strict=True)]
    rows = [
        row("1 rank x 1 thread", one, "samples/s"),
        row("2 such runs side by side, together", apart, "samples/s"),
        row("2 ranks x 1 thread, gloo", two, "samples/s"),
        row("2 ranks over 1, round by round", [b / a for a, b in zip(one, two, strict=True)], "x"),
        row("efficiency of 2 ranks, round by round", efficiencies, "%"),
        row(
            "the same of 2 runs side by side",
            [50 * b / a for a, b in zip(one, apart, strict=True)],
            "%",
        ),
        row(
            "2 ranks over 2 runs side by side",
            [100 * b / a for a, b in zip(apart, two, strict=True)],
            "%",
        ),
    ]
    claims = [claim("efficiency of 2 ranks (%)", rows[4].value, 92)]
    title = f"DDP on two cores, batch {BATCH} a rank, bf16 channels-last"
    write_result(
        out / "cpu_ranks.json", title=title, environment=found.facts, rows=rows, claims=claims
    )


@click.command()
@OUT
@click.option("--pairs", default=5, show_default=True)
@click.option("--steps", default=100, show_default=True)
def main(out: Path, pairs: int, steps: int) -> None:
    """Benchmark data parallelism."""
    bench(out, pairs, steps)


if __name__ == "__main__":
    main()
