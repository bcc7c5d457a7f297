"""tools/profile compare: two runs, or two profiles cell by cell.

Throughput is compared by the ratio B / A of paired repetitions (the same number of repetition,
measured close together in time). It measures nothing, and compares nothing across devices.
"""

import json
from dataclasses import asdict, dataclass, replace
from math import isfinite
from pathlib import Path
from textwrap import indent

import pandas as pd

from engine.durable import write_file, writing
from engine.errors import UserError
from engine.report import RunReport, read_report, write_json
from tools.measure.results import (
    CellResult,
    Epoch,
    Repetition,
    Settings,
    read_epochs,
    read_profile,
)
from tools.report.figures import heading, show
from tools.report.rows import Row, markdown_table, row, write_result
from tools.report.statistics import paired_ratio
from tools.report.tables import devices

LOSS_TOLERANCE, ACCURACY_TOLERANCE = 1e-3, 5e-3
"""What the same training may differ by: sums in another order, or numbers rounded to bf16."""
NO_DIFFERENCE = "no difference shown"


@dataclass(frozen=True, kw_only=True)
class Compared:
    """A cell that both profiles have."""

    cell: str
    axes: Settings
    pairs: int
    speed: str
    ratio: float | None = None
    low95: float | None = None
    high95: float | None = None
    losses: str | None = None
    test_accuracy: str | None = None

    @property
    def columns(self) -> dict[str, object]:
        """Its row of the table; what is endless or unknown is None."""
        tree = asdict(self)
        figures = ("ratio", "low95", "high95")
        known = {n: tree[n] if isfinite(tree[n] or 0) else None for n in figures}
        if known["high95"] is None:  # of one pair there is no interval
            known["low95"] = None
        row = {"cell": tree.pop("cell"), **tree.pop("axes"), "pairs": tree.pop("pairs")}
        return row | {name: known.get(name, tree[name]) for name in tree}


def compare_profiles(folder_a: Path, folder_b: Path, out: Path | None) -> str:
    """A row for each cell that both folders have, as text.

    Writes OUT/comparison.md and .json where asked for.

    Raises:
        UserError: a folder holds no profile, or the two have no cell in common.
    """
    cells_a, cells_b = ({_key(c): c for c in read_profile(f).cells} for f in (folder_a, folder_b))
    rows = [_compared(cell, cells_b[key]) for key, cell in cells_a.items() if key in cells_b]
    if not rows:
        raise UserError(
            f"{folder_a} and {folder_b}: have no cell in common; measure the same matrix in both"
        )
    tree = [row.columns for row in rows]
    table = pd.DataFrame(tree).to_string(index=False, na_rep="", float_format="{:,.4g}".format)
    alone = f"{len(cells_a) + len(cells_b) - 2 * len(rows)} more are in one folder only"
    text = f"{table}\n\nB / A of samples/s with its 95 % interval; {len(rows)} cells, {alone}"
    if out:
        names = {"a": folder_a.name, "b": folder_b.name}
        with writing(out):
            out.mkdir(parents=True, exist_ok=True)
            block = indent(text, "    ", lambda line: True)
            page = f"# {folder_a.name} and {folder_b.name}\n\n{block}\n"
            write_file(out / "comparison.md", page.encode())
            write_json(names | {"cells": tree}, out / "comparison.json")
    return text


def _key(cell: CellResult) -> str:
    return json.dumps([cell.name, cell.axes, cell.settings], sort_keys=True)


def _compared(a: CellResult, b: CellResult) -> Compared:
    both = zip(a.repetitions, b.repetitions, strict=False)
    pairs = [(x, y) for x, y in both if not (x.failed or y.failed)]
    found = Compared(cell=a.name, axes=a.axes, pairs=len(pairs), speed="not measured in both")
    if not pairs:
        return found
    names = devices([repetition for pair in pairs for repetition in pair])
    if len(names) > 1:
        return replace(found, speed=f"not comparable: {' and '.join(names)}")
    side_a, side_b = ([pair[n] for pair in pairs] for n in (0, 1))
    ratio, low, high = paired_ratio([r.rate for r in side_a], [r.rate for r in side_b])
    return replace(
        found,
        speed=NO_DIFFERENCE if low <= 1 <= high else f"B is {ratio:.3g} x as fast",
        ratio=ratio,
        low95=low,
        high95=high,
        losses=losses(_epochs(side_a), _epochs(side_b)),
        test_accuracy=agreement(_accuracies(pairs), ACCURACY_TOLERANCE),
    )


def _epochs(side: list[Repetition]) -> list[Epoch]:
    return [line for repetition in side for line in repetition.epochs]


def _accuracies(pairs: list[tuple[Repetition, Repetition]]) -> list[tuple[float, float]]:
    accuracies = [(x.test_accuracy_fraction, y.test_accuracy_fraction) for x, y in pairs]
    return [(x, y) for x, y in accuracies if x is not None and y is not None]


def losses(lines_a: list[Epoch], lines_b: list[Epoch]) -> str:
    """How the losses of epochs agree; empty where there are none."""
    both = list(zip(lines_a, lines_b, strict=False))
    pairs = [(x.train_loss, y.train_loss) for x, y in both]
    pairs += [(x.val_loss, y.val_loss) for x, y in both]
    known = [(x, y) for x, y in pairs if x is not None and y is not None]
    return agreement(known, LOSS_TOLERANCE)


def agreement(pairs: list[tuple[float, float]], tolerance: float) -> str:
    """Whether pairs of figures are equal to the bit, within an absolute tolerance, or different."""
    if not pairs:
        return ""
    largest = max(abs(x - y) for x, y in pairs)
    if largest == 0:
        return "equal to the bit"
    verdict = f"within {tolerance:g}" if largest <= tolerance else "different"
    return f"{verdict}: at most {largest:.2g} apart"


def compare_runs(folder_a: Path, folder_b: Path, out: Path | None) -> str:
    """The reports of two runs side by side, and how their losses agree where both train the same.

    Writes OUT/comparison.md and .json where asked for.
    """
    names = (folder_a.name, folder_b.name)
    reports = (read_report(folder_a), read_report(folder_b))
    text = _side_by_side(*reports, *names)
    same = reports[0].config_digest == reports[1].config_digest
    if same and (found := losses(read_epochs(folder_a), read_epochs(folder_b))):
        text += f"\n\nLosses of the epochs that both have: {found}."
    if out:
        last = reports[1]
        images = f"{last.num_train_samples:,} training images"
        title = f"{out.name}: {' and '.join(names)}, {images}, one run each"
        rows = [line for name, r in zip(names, reports, strict=True) for line in _rows(name, r)]
        with writing(out):
            file = out / "comparison.json"
            write_result(file, title=title, environment=last.environment, rows=rows, claims=[])
            page = f"# {' and '.join(names)}\n\n{text}\n"
            write_file(out / "comparison.md", page.encode())
    return text


def _rows(name: str, report: RunReport) -> list[Row]:
    rows = [
        row(f"{name}, {report.num_epochs} epochs: training time", [report.train_s], "s"),
        row(f"{name}: throughput", [report.samples_per_s], "samples/s"),
    ]
    if report.test_accuracy_fraction is not None:
        rows.append(row(f"{name}: test accuracy", [100 * report.test_accuracy_fraction], "%"))
    return rows


COMPARED = {
    "train_s": "less",
    "samples_per_s": "more",
    "test_accuracy_fraction": "points",
    "val_accuracy_fraction": "points",
    "data_wait_fraction": "",
    "num_epochs": "",
    "global_batch": "",
    "precision": "",
    "feed": "",
    "cuda_graphs": "",
    "host_peak_rss_gib": "",
    "torch_peak_gib": "",
}
"""What B / A says of a figure: faster where it is less or more; or B - A in points."""


def _side_by_side(a: RunReport, b: RunReport, name_a: str, name_b: str) -> str:
    """Two run reports as a Markdown table."""
    rows = []
    flat_a = {"global_batch": a.config.global_batch, **a.effective, **asdict(a)}
    flat_b = {"global_batch": b.config.global_batch, **b.effective, **asdict(b)}
    for key, better in COMPARED.items():
        x, y = flat_a.get(key), flat_b.get(key)
        if x is None or y is None:
            continue
        verdict = f"{100 * (y - x):+.2f} points" if better == "points" else ""
        if better in ("less", "more") and x and y:
            verdict = f"{y / x if better == 'more' else x / y:.1f} x faster"
        rows.append((heading(key), show(key, x), show(key, y), verdict))
    return "\n".join(markdown_table(f"| | {name_a} | {name_b} | {name_b} is |", "lrrl", rows))
