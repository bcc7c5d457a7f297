"""The fast step against eager fp32 NCHW, and what the engine adds to the bare operations.

Processes run in turn with the same allocator setting; the latter is tests/bench/minimal.py.
"""

import json
import subprocess
import sys
from pathlib import Path

import click

from engine.host import ROOT
from tests.bench import OUT
from tests.bench.child import measured
from tools.report.rows import claim, row, write_result

SIDES = ("rung_eager_fp32", "rung_bf16")
BATCH = 512


def bench(out: Path, rounds: int, num_steps: int) -> None:
    """Measure and write OUT/cpu_step.json."""
    rates: dict[str, list[float]] = {name: [] for name in SIDES}
    for _ in range(rounds):
        for name in SIDES:
            found = measured(name, batch_size=BATCH, num_steps=num_steps)
            rates[name].append(found.rate)
    eager, fast = (rates[name] for name in SIDES)
    ratios = [b / a for a, b in zip(eager, fast, strict=True)]
    command = [sys.executable, "-m", "tests.bench.minimal", str(BATCH), str(5 * rounds), "8"]
    times = json.loads(
        subprocess.run(command, cwd=ROOT, check=True, capture_output=True, text=True).stdout
    )
    overheads = [100 * (a / b - 1) for a, b in zip(times["engine"], times["bare"], strict=True)]
    rows = [
        row("eager fp32 NCHW, ReLU before pool, Adam", eager, "samples/s"),
        row("bf16 channels-last, ReLU after pool, fused AdamW", fast, "samples/s"),
        row("ratio, round by round", ratios, "x"),
        row("a step, in turn with the bare one", times["engine"], "ms"),
        row("its operations in a bare loop", times["bare"], "ms"),
        row("time the engine adds to them, round by round", overheads, "%"),
    ]
    claims = [
        claim("fast step over eager fp32 NCHW (x)", rows[2].value, 2.4),
        claim("fast step over eager fp32 NCHW, stretch (x)", rows[2].value, 3.0),
        claim("fast step (samples/s)", rows[1].value, 12_000),
        claim("time the engine adds to the bare operations (%)", rows[5].value, 3.0, at_most=True),
    ]
    title = f"Training step at batch {BATCH} on two cores, resident feed"
    write_result(
        out / "cpu_step.json", title=title, environment=found.facts, rows=rows, claims=claims
    )


@click.command()
@OUT
@click.option("--rounds", default=7, show_default=True)
@click.option("--steps", default=60, show_default=True)
def main(out: Path, rounds: int, steps: int) -> None:
    """Benchmark the step."""
    bench(out, rounds, steps)


if __name__ == "__main__":
    main()
