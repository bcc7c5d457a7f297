"""All rows, and how they run: three at a time, each in a fresh process with folders of its own."""

import ctypes
import multiprocessing
import shutil
import tempfile
import time
import traceback
from concurrent.futures import ProcessPoolExecutor, as_completed
from pathlib import Path
from typing import Any

from tests.reliability import (
    crash,
    damage,
    fuzz,
    hostile,
    nodes,
    rank_runs,
    ranks,
    run_faults,
    runs,
    system,
)
from tests.reliability.common import LIBC, Tally

ROWS = (
    *crash.ROWS,
    *damage.ROWS,
    *fuzz.ROWS,
    *hostile.ROWS,
    *ranks.ROWS,
    *nodes.ROWS,
    *runs.ROWS,
    *rank_runs.ROWS,
    *run_faults.ROWS,
    *system.ROWS,
)
JOBS = 3
"""Of two cores: rows wait for half of their time."""
LONGEST = ("R10", "R11", "R8", "R9", "R7", "R13", "R12")
"""Started first, so that no long row is left alone at the end."""
MEMORY = Path("/dev/shm")
PR_SET_CHILD_SUBREAPER = 36
"""linux/prctl.h: orphans become children of the row, which counts them."""


def run_row(number: int, level: str) -> dict[str, Any]:
    """Run one row in this process, in folders of its own; what it raises is a failure."""
    name, what, function = ROWS[number]
    LIBC.prctl(PR_SET_CHILD_SUBREAPER, ctypes.c_ulong(1), 0, 0, 0)
    multiprocessing.set_start_method(None, force=True)  # as in a run that a user starts
    folder = Path(tempfile.mkdtemp(prefix="reliability-"))
    fast = Path(tempfile.mkdtemp(prefix="reliability-", dir=MEMORY if MEMORY.is_dir() else None))
    tally, start = Tally(level, folder, fast), time.perf_counter()
    try:
        folder.chmod(0o755)  # another user enters it in R17
        function(tally)
    except Exception:
        tally.check(False, "the row itself")
        tally.notes.insert(0, f"stopped by {traceback.format_exc()[-600:]}")
    finally:
        shutil.rmtree(folder, ignore_errors=True)
        shutil.rmtree(fast, ignore_errors=True)
    if not tally.tried and not any(note.startswith("skipped") for note in tally.notes):
        tally.check(False, "nothing was tried")
    seconds = round(time.perf_counter() - start, 2)
    counts = {"tried": tally.tried, "failed": tally.failed}
    return {"row": name, "what": what, **counts, "notes": tally.notes, "seconds": seconds}


def run_rows(level: str, only: set[str]) -> list[dict[str, Any]]:
    """Run the rows, three at a time, each in a fresh process; a line for each that ends.

    They are forked from one process that has imported and compiled what they need.
    """
    chosen = [number for number, row in enumerate(ROWS) if not only or row[0] in only]
    server = multiprocessing.get_context("forkserver")
    server.set_forkserver_preload(["tests.reliability.warmed"])
    results: dict[int, dict[str, Any]] = {}
    with ProcessPoolExecutor(JOBS, server, max_tasks_per_child=1) as pool:
        longest_first = sorted(chosen, key=_turn)
        jobs = {pool.submit(run_row, number, level): number for number in longest_first}
        for job in as_completed(jobs):
            results[jobs[job]] = result = job.result()
            print(line(result), flush=True)
    return [results[number] for number in chosen]


def _turn(number: int) -> int:
    """How late a row starts."""
    name = ROWS[number][0]
    return LONGEST.index(name) if name in LONGEST else len(LONGEST)


def line(result: dict[str, Any]) -> str:
    counts = f"{result['tried']:>8,} {result['failed']:>7,} {result['seconds']:>8.1f}"
    return f"{result['row']:<4} {result['what']:<56} {counts}"
