"""python -m tests.alone [NAME...]: each test file in a process of its own, in random order; the seed is printed.

A file that passes only after another fails here. The same order again: ALONE_SEED=number.
"""

import os
import random
import re
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
NUM_AT_ONCE = 2
RANDOM = ("-o", "addopts=--strict-markers --strict-config", "-p", "no:cacheprovider")
"""Without pyproject.toml's `-p no:randomly`, which keeps the order of `make test`."""
EMPTY = 5
"""pytest's exit code where a file has no test."""


def run(file: Path, seed: int) -> int:
    """One file alone: how many of its tests passed, -1 if one did not; then what it prints is shown."""
    command = [
        sys.executable,
        "-m",
        "pytest",
        "-q",
        "-m",
        "not slow",
        *RANDOM,
        f"--randomly-seed={seed}",
    ]
    command.append(str(file.relative_to(ROOT)))
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    passed = done.returncode in (0, EMPTY)
    lines = done.stdout.strip().splitlines() or [done.stderr.strip()]
    print(f"{file.name}: {lines[-1]}" if passed else f"{done.stdout}{done.stderr}", flush=True)
    counted = re.search(r"(\d+) passed", lines[-1])
    return (int(counted[1]) if counted else 0) if passed else -1


def main() -> None:
    seed = int(os.environ.get("ALONE_SEED") or random.randrange(2**32))
    chosen = sys.argv[1:] or ["test_*.py"]
    print(f"each test file alone, in random order: ALONE_SEED={seed}", flush=True)
    files = sorted(file for name in chosen for file in (ROOT / "tests").glob(name))
    with ThreadPoolExecutor(NUM_AT_ONCE) as threads:
        results = list(threads.map(lambda file: run(file, seed), files))
    num_failed = results.count(-1)
    print(f"{sum(max(result, 0) for result in results)} passed, {num_failed} failed", flush=True)
    sys.exit(1 if num_failed else 0)


if __name__ == "__main__":
    main()
