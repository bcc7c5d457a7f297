"""The ladder: rungs of bench_configs/ladder_h100.toml as cells of (rung, batch size), measured in turn.

All sessions are opened first (every capture comes before any feed's threads), then measured A B C A B C, so that drift
favours none. A cell that fails is told, and the others go on.
"""

import time
from dataclasses import dataclass, field
from math import ceil
from typing import Any

from engine import meters
from engine.config import RunConfig, override, read_toml
from engine.data.records import Records
from engine.errors import UserError
from engine.host import ROOT
from engine.train.session import Session, open_session
from engine.world import World
from tools.measure.matrix import rungs
from tools.measure.steps import measure
from tools.report.rows import row

LADDER = ROOT / "bench_configs" / "ladder_h100.toml"


@dataclass
class Cell:
    rung: str
    config: RunConfig
    session: Session | None = None
    rates: list[float] = field(default_factory=list)
    """samples/s of each repetition."""

    @property
    def name(self) -> str:
        name = f"batch {self.config.global_batch}: {self.rung}"
        lacking = self.session and [note for note in self.session.notes if "used" in note]
        return f"{name} ({'; '.join(lacking)})" if lacking else name

    def close(self) -> None:
        if self.session:
            self.session.close()
            self.session = None


def make_cells(largest_batch: int, compiled: bool) -> list[Cell]:
    """Every rung at each of its batch sizes, up to `largest_batch` (or at that, if all are larger)."""
    cells, ladder = [], read_toml(LADDER)
    for rung, settings in rungs(ladder, LADDER.name):
        if settings.get("step.compile", "off") != "off" and not compiled:
            continue
        wanted = rung.get("batches", [ladder["batch"]])
        for batch in [b for b in wanted if b <= largest_batch] or [largest_batch]:
            config = override(RunConfig(), settings | {"global_batch": batch}, LADDER.name)
            cells.append(Cell(rung["name"], config))
    return cells


def climb(
    cells: list[Cell],
    records: Records,
    world: World,
    *,
    seconds: float,
    repetitions: int,
    budget_s: float,
) -> list[str]:
    """Open all cells and measure them in turn; a sentence for each that failed. Repetitions end with the budget."""
    failures: list[str] = []
    end = time.perf_counter() + budget_s
    for number in range(1 + repetitions):
        if number > 1 and time.perf_counter() > end:
            break
        for cell in cells:
            try:
                if not number:
                    cell.session = open_session(cell.config, records, world)
                elif cell.session:
                    cell.rates.append(rate(cell.session, seconds))
            except (
                RuntimeError,
                UserError,
                AssertionError,
            ) as error:  # out of memory, refused capture, ...
                failures.append(
                    f"{cell.name}: {type(error).__name__}: {str(error).partition(chr(10))[0]}"
                )
                cell.close()
    return failures


def rate(session: Session, seconds: float) -> float:
    """samples/s over about so many seconds, in whole launches; a first, short measurement tells how many."""
    first = measure(session, 2 * session.step.steps_per_launch)
    steps_per_s = first.samples_per_s / session.config.global_batch
    return measure(session, ceil(seconds * steps_per_s)).samples_per_s


def joules(session: Session, seconds: float) -> float | None:
    """J of the whole GPU for a thousand samples, over so many seconds; None where NVML does not tell."""
    batch = session.config.global_batch
    num_steps = ceil(
        seconds * measure(session, session.step.steps_per_launch).samples_per_s / batch
    )
    measured = measure(session, num_steps, meters.Nvml(session.world.device))
    return measured.energy_j and measured.energy_j / (len(measured.step_ms_S) * batch) * 1000


def rows_of(cells: list[Cell]) -> list[dict[str, Any]]:
    """A result line for each measured cell, and the best of each batch size."""
    measured = [cell for cell in cells if cell.rates]
    rows = [row(cell.name, cell.rates, "samples/s") for cell in measured]
    for batch in sorted({cell.config.global_batch for cell in measured}):
        real = [
            r
            for r in rows
            if r["name"].startswith(f"batch {batch}:") and "synthetic" not in r["name"]
        ]
        if real:
            rows.append(
                max(real, key=lambda r: float(r["value"])) | {"name": f"best at batch {batch}"}
            )
    return rows
