"""profile.json as DataFrames: a row a cell, with medians, intervals, speed-ups. It computes, and draws nothing.

Only cells of the same device name are ever put into a ratio, and figures of others ("published") into none.
"""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from engine.durable import Damaged, parse_json
from engine.errors import UserError

FORMAT = 1
NUM_RESAMPLES, SEED = 2000, 0
RATE = "samples_per_s"
MEASURED = (
    "step_ms", "step_p10_ms", "step_p90_ms", "data_wait_fraction", "host_peak_rss_gib", "torch_peak_gib",
    "device_used_gib", "gpu_utilisation_percent", "power_w", "energy_j_per_ksample", "roofline_fraction", "train_s",
    "time_to_target_s", "val_accuracy_fraction", "test_accuracy_fraction",
)  # fmt: skip
"""Figures of a repetition of which a cell shows the median."""


def read_profile(folder: Path) -> dict[str, Any]:
    """FOLDER/profile.json.

    Raises:
        UserError: it is missing, or of another format.
    """
    path = folder / "profile.json"
    try:
        profile: dict[str, Any] = parse_json(path.read_bytes(), path.name)
        assert profile["format"] == FORMAT and profile["cells"]
    except OSError as error:
        raise UserError(
            f"{path}: cannot be read ({error.strerror}); name a folder of `tools/profile run`"
        ) from None
    except (Damaged, AssertionError, KeyError, TypeError):
        raise UserError(
            f"{path}: is no profile of format {FORMAT}; make it anew with `tools/profile run`"
        ) from None
    return profile


def cells_frame(profile: dict[str, Any]) -> pd.DataFrame:
    """A row a cell: id, name, ladder, device, axes, num (repetitions), medians; NaN where there is none.

    samples_per_s is a median, with _p10, _p90, _low95 and _high95 (interval of the median; NaN below 3 repetitions);
    `gain` is a rung's over the rung before, `speedup` over the cell that differs only in having 1 rank (on a CPU: of
    as many threads), `efficiency` the speed-up of a rank.
    """
    frame = pd.DataFrame([_cell(cell) for cell in profile["cells"]])
    rungs = frame[frame["ladder"] & frame[RATE].notna()]
    frame["gain"] = rungs[RATE] / rungs.groupby(["device", "batch"], dropna=False)[RATE].shift()
    key = pd.Series([_like(cell) for cell in profile["cells"]], index=frame.index)
    alone = frame[(frame["ranks"] == 1) & frame[RATE].notna()].groupby(key)[RATE].first()
    frame["speedup"] = frame[RATE] / key.map(alone)
    frame["efficiency"] = frame["speedup"] / frame["ranks"]
    return frame


def parts_frame(profile: dict[str, Any], field: str) -> pd.DataFrame:
    """`memory_gib_by_owner` or `stage_ms` in long form: id, name, part, value (median), in the order of the cells."""
    rows = [
        {"id": cell["id"], "name": cell["name"], "part": part, "value": value}
        for cell in profile["cells"]
        for repetition in good(cell)
        for part, value in (repetition.get(field) or {}).items()
    ]
    frame = pd.DataFrame(rows, columns=["id", "name", "part", "value"])
    return frame.groupby(["id", "name", "part"], sort=False, as_index=False)["value"].median()


def epochs_frame(profile: dict[str, Any]) -> pd.DataFrame:
    """The validation curve of each cell's first repetition: id, name, and the columns of metrics.jsonl."""
    rows = [
        {"id": cell["id"], "name": cell["name"]} | line
        for cell in profile["cells"]
        for repetition in good(cell)[:1]
        for line in repetition.get("epochs") or []
        if line.get("val_accuracy_fraction") is not None
    ]
    return pd.DataFrame(rows, columns=None if rows else ["id"])


def good(cell: dict[str, Any]) -> list[dict[str, Any]]:
    """The repetitions that did not fail."""
    return [repetition for repetition in cell["repetitions"] if not repetition["failed"]]


def device(repetition: dict[str, Any]) -> str:
    """The name of what computed it: the GPU, else the CPU."""
    facts = repetition["environment"]
    return str(facts["gpu_name"] or facts["cpu_name"])


def interval95(values: np.ndarray) -> tuple[float, float]:
    """The 95 % interval of the median, by bootstrap with a fixed seed; NaN for fewer than 3 values."""
    if len(values) < 3:
        return np.nan, np.nan
    drawn = np.random.default_rng(SEED).choice(values, (NUM_RESAMPLES, len(values)))
    low, high = np.percentile(np.median(drawn, axis=1), [2.5, 97.5])
    return low, high


def _cell(cell: dict[str, Any]) -> dict[str, Any]:
    done = good(cell)
    figures = pd.DataFrame(done, columns=[RATE, *MEASURED]).astype(float)
    rates = figures.pop(RATE)
    row = {
        "id": cell["id"],
        "name": cell["name"],
        "ladder": cell["ladder"],
        "batch": np.nan,
        "ranks": 1,
    }
    row |= cell["axes"] | {
        "device": " + ".join(sorted({device(r) for r in done})),
        "num": len(done),
    }
    row |= {
        RATE: rates.median(),
        f"{RATE}_p10": rates.quantile(0.1),
        f"{RATE}_p90": rates.quantile(0.9),
    }
    row[f"{RATE}_low95"], row[f"{RATE}_high95"] = interval95(rates.to_numpy())
    return row | figures.median().to_dict()


def _like(cell: dict[str, Any]) -> str:
    """What two cells have in common whose ranks may be compared."""
    same = {
        k: v
        for k, v in (cell["settings"] | cell["axes"]).items()
        if k not in ("ranks", "global_batch")
    }
    done = good(cell)
    facts = done[0]["environment"] if done else {}
    threads = None if facts.get("gpu_name") else facts.get("num_threads")
    return json.dumps(
        [same, sorted({device(r) for r in done}), threads], sort_keys=True, default=str
    )
