"""python -m tests [NAME...]: each test file in a process of its own, in random order.

A test that passes only after another, or leaves something behind for another, fails here. The seed
is printed; the same order again: TEST_SEED=number. Three files run at once on two cores, since
tests wait, too; each in a fork of this process, which has imported what all of them import and
nothing of the project: importing torch alone takes seconds. Tests marked `slow` are left to
`make proofs`.
"""

import gc
import importlib
import os
import random
import re
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import NoReturn

import numba
import pytest

ROOT = Path(__file__).resolve().parent.parent
NUM_AT_ONCE = 3
IMPORTED = (
    "torch.distributed.run",
    "torch._dynamo",
    "pandas",
    "pyarrow",
    "matplotlib.figure",
    "click.testing",
    "hypothesis",
    "safetensors.torch",
)
"""Libraries that most test files import, directly or not; none of them starts threads by itself."""
OPTIONS = (
    "-q",
    "-m",
    "not slow",
    "-o",
    "addopts=--strict-markers --strict-config",  # without -p no:randomly
    "-p",
    "no:cacheprovider",
    "-p",
    "no:anyio",
    "-p",
    "no:xdist",
    "-W",
    "ignore::pytest.PytestAssertRewriteWarning",  # of hypothesis, which is imported already
)
LONG = (
    "test_cpu.py",
    "test_setup.py",
    "test_late_dynamo.py",
    "test_canonical.py",
    "test_ensemble.py",
    "test_digits.py",
)
"""Small files that take long: they start first, so that none of them runs alone at the end."""
EMPTY = 5
"""pytest's exit code where a file has no test."""


@dataclass(frozen=True)
class Running:
    """A file whose tests run in a child."""

    file: Path
    output: Path
    start_s: float


@dataclass(frozen=True)
class Result:
    """What came of a file."""

    name: str
    num_passed: int
    has_passed: bool
    seconds: float


def call_pytest(file: Path, seed: int, output: Path) -> NoReturn:
    """Run a file's tests in this process, with all that it prints in `output`; exit as pytest."""
    handle = os.open(output, os.O_WRONLY | os.O_CREAT, 0o600)
    os.dup2(handle, 1)
    os.dup2(handle, 2)
    code = 1
    try:
        code = int(pytest.main([*OPTIONS, f"--randomly-seed={seed}", str(file)]))
        sys.stdout.flush()
    finally:
        os._exit(code)


def start(file: Path, seed: int, folder: Path) -> tuple[int, Running]:
    """Fork; the child's id, and what runs in it."""
    output = folder / file.name
    child = os.fork()
    if child == 0:
        call_pytest(file, seed, output)
    return child, Running(file, output, time.perf_counter())


def ended(running: Running, code: int) -> Result:
    """Print what came of a file: its last line, or all of its output where a test failed."""
    seconds = time.perf_counter() - running.start_s
    text = running.output.read_text(encoding="utf-8", errors="replace")
    last = (text.strip().splitlines() or [f"ended with {code}"])[-1]
    has_passed = code in (0, EMPTY)
    print(f"{running.file.name}: {last}" if has_passed else text, flush=True)
    counted = re.search(r"(\d+) passed", last)
    return Result(running.file.name, int(counted[1]) if counted else 0, has_passed, seconds)


def run(files: list[Path], seed: int, folder: Path) -> list[Result]:
    """All files, NUM_AT_ONCE at once; the first ones are started first."""
    waiting = list(reversed(files))
    running: dict[int, Running] = {}
    results = []
    while waiting or running:
        while waiting and len(running) < NUM_AT_ONCE:
            child, started = start(waiting.pop(), seed, folder)
            running[child] = started
        child, status = os.wait()
        results.append(ended(running.pop(child), os.waitstatus_to_exitcode(status)))
    return results


def main() -> None:
    seed = int(os.environ.get("TEST_SEED") or random.randrange(2**32))
    chosen = sys.argv[1:] or ["test_*.py"]
    print(f"each test file in a process of its own, in random order: TEST_SEED={seed}", flush=True)
    os.environ.setdefault("OMP_NUM_THREADS", "1")  # teams that spin beside each other are slow
    for name in IMPORTED:
        importlib.import_module(name)
    numba.njit(lambda: 0)()  # the first compilation makes numba ready, which takes half a second
    gc.freeze()  # no child looks through these objects again
    files = {file for name in chosen for file in (ROOT / "tests").glob(name)}
    longest_first = sorted(
        files, key=lambda file: (file.name not in LONG, -file.stat().st_size, file.name)
    )
    with TemporaryDirectory() as folder:
        results = run(longest_first, seed, Path(folder))
    slowest = sorted(results, key=lambda result: -result.seconds)[:5]
    print("slowest:", ", ".join(f"{each.name} {each.seconds:.0f} s" for each in slowest))
    failed = [result.name for result in results if not result.has_passed]
    num_passed = sum(result.num_passed for result in results)
    print(f"{num_passed} passed, {len(failed)} files failed {' '.join(failed)}".strip())
    sys.exit(1 if failed or not results else 0)


if __name__ == "__main__":
    main()
