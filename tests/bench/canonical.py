"""--canonical 4 against the plain step, in turn: 1 and 2 ranks of one thread, batch 512 in all."""

from pathlib import Path

import click

from tests.bench import OUT
from tests.bench.child import measured
from tools.report.rows import row, write_result

GLOBAL_BATCH = 512
SHARDS = 4
RANKS = (1, 2)


def bench(out: Path, rounds: int, num_steps: int) -> None:
    """Measure and write OUT/cpu_canonical.json."""
    sides = [(num_ranks, shards) for num_ranks in RANKS for shards in (0, SHARDS)]
    rates: dict[tuple[int, int], list[float]] = {side: [] for side in sides}
    for number in range(rounds):
        for num_ranks, shards in sides[:: -1 if number % 2 else 1]:
            found = measured(
                "rung_bf16",
                batch_size=GLOBAL_BATCH // num_ranks,
                num_steps=num_steps,
                num_ranks=num_ranks,
                num_threads=1,
                changed={"step.canonical": shards},
            )
            rates[num_ranks, shards].append(found.rate)
    rows = []
    for num_ranks in RANKS:
        plain, canonical = rates[num_ranks, 0], rates[num_ranks, SHARDS]
        ratios = [b / a for a, b in zip(plain, canonical, strict=True)]
        name = "1 rank" if num_ranks == 1 else f"{num_ranks} ranks"
        rows += [
            row(f"{name}, plain", plain, "samples/s"),
            row(f"{name}, --canonical {SHARDS}", canonical, "samples/s"),
            row(f"{name}, canonical over plain, round by round", ratios, "x"),
        ]
    title = f"The cost of --canonical {SHARDS}, global batch {GLOBAL_BATCH}, bf16 channels-last"
    write_result(
        out / "cpu_canonical.json", title=title, environment=found.facts, rows=rows, claims=[]
    )


@click.command()
@OUT
@click.option("--rounds", default=5, show_default=True)
@click.option("--steps", default=60, show_default=True)
def main(out: Path, rounds: int, steps: int) -> None:
    """Benchmark canonical training."""
    bench(out, rounds, steps)


if __name__ == "__main__":
    main()
