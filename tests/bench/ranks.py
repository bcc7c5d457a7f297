"""Two ranks of one thread against one rank of one thread, batch 512 a rank, interleaved pairs of whole processes."""

import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

import click

from engine.report import ROOT, Environment
from tools.bench.results import claim, row, write_result

BATCH = 512


def samples_per_s(num_ranks: int, num_steps: int) -> tuple[float, Environment]:
    """One torchrun of tools.profile with `num_ranks` single-threaded ranks."""
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={num_ranks}"]
        command += ["-m", "tools.profile", "run", str(ROOT / "bench_configs" / "rung_bf16.toml"), "--device=cpu"]
        command += [f"--steps={num_steps}", f"--batch-size={BATCH}", f"--out={folder}"]
        environment = os.environ | {"OMP_NUM_THREADS": "1"}
        subprocess.run(command, cwd=ROOT, env=environment, check=True, capture_output=True, timeout=300)
        profile = json.loads((Path(folder) / "profile.json").read_text())
    return profile["rows"][0]["samples_per_s"], Environment(**profile["environment"])


def bench(out: Path, pairs: int, num_steps: int) -> None:
    """Measure and write OUT/cpu_ranks.json."""
    one, two = [], []
    for _ in range(pairs):
        rate, environment = samples_per_s(1, num_steps)
        one.append(rate)
        two.append(samples_per_s(2, num_steps)[0])
    rows = [
        row("1 rank x 1 thread", one, "samples/s"),
        row("2 ranks x 1 thread, gloo", two, "samples/s"),
        row("ratio, pair by pair", [b / a for a, b in zip(one, two, strict=True)], "x"),
    ]
    claims = [claim("2 ranks over 1 (x)", rows[2]["value"], 1.8)]
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
