"""profile.json as DataFrames: a row per cell, with medians, intervals, speed-ups.

Only cells of the same device name are ever put into a ratio, and figures of others ("published")
into none.
"""

import json
from dataclasses import asdict

import numpy as np
import pandas as pd

from engine.report import Environment
from tools.measure.results import RATE, CellResult, Profile, Repetition
from tools.report.figures import MEDIANS
from tools.report.statistics import median_interval95


def cells_frame(profile: Profile) -> pd.DataFrame:
    """A row per cell: id, name, ladder, device, axes, num (repetitions), medians; NaN for none.

    samples_per_s is a median, with _p10, _p90, _low95 and _high95 (interval of the median; NaN
    below 3 repetitions). `gain` is a rung's over the cell named in `base`. `speedup` is over the
    cell that differs only in having 1 rank (on a CPU: of as many threads), and `efficiency` is the
    speed-up per rank.
    """
    frame = pd.DataFrame([_row(cell) for cell in profile.cells])
    base = _bases(profile, frame)
    frame["base"] = base.map(frame["name"])
    frame["gain"] = frame[RATE] / base.map(frame[RATE])
    key = pd.Series([_like(cell) for cell in profile.cells], index=frame.index)
    alone = frame[(frame["ranks"] == 1) & frame[RATE].notna()].groupby(key)[RATE].first()
    frame["speedup"] = frame[RATE] / key.map(alone)
    frame["efficiency"] = frame["speedup"] / frame["ranks"]
    return frame


def _bases(profile: Profile, frame: pd.DataFrame) -> pd.Series:
    """The row of what each rung adds to, at the same batch on the same device; NaN if not known."""
    found = pd.Series(np.nan, index=frame.index)
    latest: dict[tuple[object, ...], int] = {}
    for row in frame.index[frame["ladder"] & frame[RATE].notna()]:
        cell = profile.cells[row]
        place = (frame["device"][row], cell.axes.get("batch"))
        found[row] = latest.get((*place, cell.base), np.nan)
        latest[*place, ""] = latest[*place, cell.rung] = row
    return found


def parts_frame(profile: Profile, field: str) -> pd.DataFrame:
    """`memory_gib_by_owner` or `stage_ms` in long form: id, name, part, value (median)."""
    rows = [
        {"id": cell.id, "name": cell.name, "part": part, "value": value}
        for cell in profile.cells
        for repetition in cell.good
        for part, value in (getattr(repetition, field) or {}).items()
    ]
    frame = pd.DataFrame(rows, columns=["id", "name", "part", "value"])
    return frame.groupby(["id", "name", "part"], sort=False, as_index=False)["value"].median()


def epochs_frame(profile: Profile) -> pd.DataFrame:
    """Each cell's validation curve, of its first repetition: id, name, and metrics.jsonl's keys."""
    rows = [
        {"id": cell.id, "name": cell.name} | asdict(line)
        for cell in profile.cells
        for repetition in cell.good[:1]
        for line in repetition.epochs
        if line.val_accuracy_fraction is not None
    ]
    if not rows:
        return pd.DataFrame(columns=["id"])
    return pd.DataFrame(rows).dropna(axis="columns", how="all")


def best_rates(profile: Profile) -> dict[str, float]:
    """The best median samples/s on real data by batch: "best at batch 2048"."""
    frame = cells_frame(profile)
    feeds = [cell.settings.get("data.feed") for cell in profile.cells]
    real = frame[frame[RATE].notna() & (pd.Series(feeds, index=frame.index) != "synthetic")]
    best = real.groupby("batch")[RATE].max()
    return {f"best at batch {batch:g}": float(rate) for batch, rate in best.items()}


def device(facts: Environment) -> str:
    """The name of what computed it: the GPU, else the CPU."""
    return facts.gpu_name or facts.cpu_name


def devices(repetitions: list[Repetition]) -> list[str]:
    """The devices of repetitions that did not fail, each once."""
    return sorted({device(repetition.facts) for repetition in repetitions})


def _row(cell: CellResult) -> dict[str, object]:
    figures = [[getattr(r, name) for name in (RATE, *MEDIANS)] for r in cell.good]
    medians = pd.DataFrame(figures, columns=[RATE, *MEDIANS]).astype(float)
    rates = medians.pop(RATE)
    low, high = median_interval95(rates.to_numpy())
    axes = {axis: _single(value) for axis, value in cell.axes.items()}
    return {
        "id": cell.id,
        "name": cell.name,
        "ladder": cell.ladder,
        "batch": np.nan,
        "ranks": 1,
        **axes,
        "device": " + ".join(devices(cell.good)),
        "num": len(cell.good),
        RATE: rates.median(),
        f"{RATE}_p10": rates.quantile(0.1),
        f"{RATE}_p90": rates.quantile(0.9),
        f"{RATE}_low95": low,
        f"{RATE}_high95": high,
        **medians.median().to_dict(),
    }


def _single(value: object) -> object:
    """An axis's value as a table holds it: a list of kernels is one text."""
    return ", ".join(map(str, value)) if isinstance(value, list) else value


def _like(cell: CellResult) -> str:
    """What two cells have in common whose ranks may be compared."""
    same = {
        name: value
        for name, value in (cell.settings | cell.axes).items()
        if name not in ("ranks", "global_batch")
    }
    first = cell.good[0].facts if cell.good else None
    threads = None if first is None or first.gpu_name else first.num_threads
    return json.dumps([same, devices(cell.good), threads], sort_keys=True)
