"""The fast step against eager fp32 NCHW at batch 512, interleaved processes with the same allocator setting."""

from pathlib import Path

import click

from tests.bench.child import samples_per_s
from tools.bench.results import claim, row, write_result

SIDES = ("rung_eager_fp32", "rung_bf16")
BATCH = 512


def bench(out: Path, rounds: int, num_steps: int) -> None:
    """Measure and write OUT/cpu_step.json."""
    rates: dict[str, list[float]] = {name: [] for name in SIDES}
    for _ in range(rounds):
        for name in SIDES:
            rate, environment = samples_per_s(name, batch_size=BATCH, num_steps=num_steps)
            rates[name].append(rate)
    eager, fast = (rates[name] for name in SIDES)
    ratios = [b / a for a, b in zip(eager, fast, strict=True)]
    rows = [
        row("eager fp32 NCHW, ReLU before pool, Adam", eager, "samples/s"),
        row("bf16 channels-last, ReLU after pool, fused AdamW", fast, "samples/s"),
        row("ratio, round by round", ratios, "x"),
    ]
    claims = [
        claim("fast step over eager fp32 NCHW (x)", rows[2]["value"], 2.4),
        claim("fast step (samples/s)", rows[1]["value"], 12_000),
    ]
    title = f"Training step at batch {BATCH} on two cores, resident feed"
    write_result(out / "cpu_step.json", title=title, environment=environment, rows=rows, claims=claims)


@click.command()
@click.option("--out", type=click.Path(path_type=Path), default=Path("runs/bench"), show_default=True)
@click.option("--rounds", default=7, show_default=True)
@click.option("--steps", default=60, show_default=True)
def main(out: Path, rounds: int, steps: int) -> None:
    """Benchmark the step."""
    bench(out, rounds, steps)


if __name__ == "__main__":
    main()
