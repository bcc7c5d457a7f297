"""tools/predict on PNGs, the whole command: start-up, torch's import, reading, answering, writing.

Each round is a process of its own. The images are those of the packaged sample, each a file; the
network is trained for an epoch before, off the clock.
"""

import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import click

from engine.config import RECIPES
from engine.data.records import open_records
from engine.data.sample import ensure_sample
from engine.host import ROOT
from engine.report import environment
from engine.train.trainer import fit
from engine.world import start_world
from tests.bench import OUT
from tests.bench.sources import drawn
from tools.report.rows import claim, row, write_result

NUM_IMAGES = 10_000
WANTED_S = 5.0


def bench(out: Path, rounds: int, num: int = NUM_IMAGES) -> None:
    """Measure and write OUT/cpu_predict.json."""
    out.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=out) as name:
        folder = Path(name)
        run = trained(folder / "run")
        tree = drawn(num).png(folder / "tree")
        flat = folder / "flat"
        flat.mkdir()
        for file in tree.glob("*/*.png"):
            os.link(file, flat / file.name)
        files = sorted(flat.iterdir())
        sides = {
            f"{num:,} PNGs in a folder": [*predict(run), flat, "--out", folder / "a.csv"],
            f"{num:,} PNGs, each named": [*predict(run), *files, "--out", folder / "a.csv"],
            "one PNG": [*predict(run), files[0], "--out", folder / "a.csv"],
            "importing torch alone": [sys.executable, "-c", "import torch"],
        }
        times: dict[str, list[float]] = {side: [] for side in sides}
        seconds(sides[f"{num:,} PNGs in a folder"])  # compiles, and does not count
        for _ in range(rounds):
            for side, words in sides.items():
                times[side].append(seconds(words))
    rows = [row(side, took_s, "s") for side, took_s in times.items()]
    claims = [claim(f"{each.name} (s)", each.value, WANTED_S, at_most=True) for each in rows[:2]]
    title = f"tools/predict on {num:,} PNGs of 28 x 28, the whole command"
    facts = environment(num_threads=len(os.sched_getaffinity(0)), allocator="default", gpu={})
    write_result(out / "cpu_predict.json", title=title, environment=facts, rows=rows, claims=claims)


def predict(run: Path) -> list[object]:
    return [sys.executable, "-P", "-m", "tools.predict", run]


def trained(run: Path) -> Path:
    """A run of one epoch on the packaged sample."""
    config = RECIPES["fast"]
    run.mkdir()
    with start_world("cpu") as world:
        fit(config, open_records(ensure_sample()), world, run, resume=False, say=click.echo)
    return run


def seconds(words: list[object]) -> float:
    """Of a child process, from its start to its end."""
    folders = [str(ROOT), os.environ.get("PYTHONPATH", "")]
    variables = os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, folders))}
    start = time.perf_counter()
    line = [str(word) for word in words]
    done = subprocess.run(line, env=variables, capture_output=True, text=True)
    took_s = time.perf_counter() - start
    if done.returncode:
        raise SystemExit(done.stderr)
    return took_s


@click.command()
@OUT
@click.option("--rounds", default=5, show_default=True)
@click.option("--images", "num", default=NUM_IMAGES, show_default=True)
def main(out: Path, rounds: int, num: int) -> None:
    """Benchmark predictions."""
    bench(out, rounds, num)


if __name__ == "__main__":
    main()
