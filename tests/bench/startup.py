"""Start-up of engine.run: a whole process of one short epoch, with torch's compiler and without.

One side imports torch._dynamo and sympy before all else, as torch does at the first step of an
optimiser; the other is the command as it is (engine/late_dynamo.py). Interleaved.
"""

import os
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from statistics import median

import click

from engine.data.sample import ensure_sample
from engine.report import environment
from tests.bench import OUT
from tests.bench.predict import seconds
from tools.report.rows import claim, row, write_result

RUN = "from engine.run import main; main(prog_name='engine.run')"
SIDES = {
    "engine.run, the compiler imported first": f"import torch._dynamo, sympy; {RUN}",
    "engine.run": RUN,
    "importing torch alone": "import torch",
}
WANTED = 0.75


def bench(out: Path, rounds: int, num_warm: int = 1, flags: Sequence[object] = ()) -> None:
    """Measure and write OUT/cpu_startup.json.

    Args:
        num_warm: rounds before, which fill the page cache and do not count.
        flags: more of them, of the runs.
    """
    out.mkdir(parents=True, exist_ok=True)
    settings = ["--data", ensure_sample(), "--epochs", 1, "--device", "cpu", *flags, "--out"]
    times: dict[str, list[float]] = {side: [] for side in SIDES}
    with tempfile.TemporaryDirectory(dir=out) as name:
        for number in range(rounds + num_warm):
            for side, code in SIDES.items():
                words = [sys.executable, "-P", "-c", code, *settings, Path(name, f"{number}{side}")]
                took_s = seconds(words)
                if number >= num_warm:
                    times[side].append(took_s)
    first, second, _ = times.values()
    parts = [late / early for early, late in zip(first, second, strict=True)]
    rows = [row(side, took_s, "s") for side, took_s in times.items()]
    rows.append(row("the command's time as a part of the first side's", parts, "x"))
    facts = environment(num_threads=len(os.sched_getaffinity(0)), allocator="default", gpu={})
    title = "Start-up of engine.run: one epoch on the sample, the whole process"
    claims = [claim("the command's time as a part", median(parts), WANTED, at_most=True)]
    write_result(out / "cpu_startup.json", title=title, environment=facts, rows=rows, claims=claims)


@click.command()
@OUT
@click.option("--rounds", default=9, show_default=True)
def main(out: Path, rounds: int) -> None:
    """Benchmark the start-up of a run."""
    bench(out, rounds)


if __name__ == "__main__":
    main()
