"""tools/profile compare: two runs, or two profiles cell by cell. Says "no difference shown" where that is so.

Throughput is compared by the ratio B / A of paired repetitions (the same number of repetition, measured close together
in time): the mean of the log-ratios with Student's t interval. Ratios are near log-normal, and there are 3 to 10 pairs;
a bootstrap of so few resamples the same values and covers too seldom (of 3 pairs 73 %, of 5 83 %, not 95 %: simulated).
It measures nothing, and compares nothing across devices.
"""

import json
from math import exp, inf, log
from pathlib import Path
from statistics import mean, stdev
from textwrap import indent
from typing import Any

import pandas as pd

from engine.durable import write_file, writing
from engine.errors import UserError, printable
from engine.report import Environment, read_report, write_json
from tools.report.rows import markdown_table, row, write_result
from tools.report.tables import RATE, device, read_profile

STUDENT_T = (
    inf,
    12.706,
    4.303,
    3.182,
    2.776,
    2.571,
    2.447,
    2.365,
    2.306,
    2.262,
    2.228,
    2.201,
    2.179,
    2.160,
    2.145,
)
"""97.5 % quantiles of Student's t for 0, 1, ... degrees of freedom; beyond, the last one (a little too wide)."""
LOSS_TOLERANCE, ACCURACY_TOLERANCE = 1e-3, 5e-3
"""What the same training may differ by when numbers are added in another order, or rounded to bf16."""
NO_DIFFERENCE = "no difference shown"


def paired_ratio(a: list[float], b: list[float]) -> tuple[float, float, float]:
    """The geometric mean of b / a over pairs of positive figures, and its 95 % interval; (0, inf) for one pair."""
    logs = [log(y / x) for x, y in zip(a, b, strict=True)]
    half = (
        inf
        if len(logs) < 2
        else STUDENT_T[min(len(logs), len(STUDENT_T)) - 1] * stdev(logs) / len(logs) ** 0.5
    )
    return exp(mean(logs)), exp(mean(logs) - half), inf if half == inf else exp(mean(logs) + half)


def compare_profiles(folder_a: Path, folder_b: Path, out: Path | None) -> str:
    """A row for each cell that both folders have; OUT/comparison.md and .json where asked for. Returns the text.

    Raises:
        UserError: a folder holds no profile, or the two have no cell in common.
    """
    cells_a, cells_b = (
        {_key(c): c for c in read_profile(f)["cells"]} for f in (folder_a, folder_b)
    )
    rows = [_row(cell, cells_b[key]) for key, cell in cells_a.items() if key in cells_b]
    if not rows:
        raise UserError(
            f"{folder_a} and {folder_b}: have no cell in common; measure the same matrix in both"
        )
    frame = pd.DataFrame(rows)
    table = frame.to_string(index=False, na_rep="", float_format="{:,.4g}".format)
    alone = f"{len(cells_a) + len(cells_b) - 2 * len(rows)} more are in one folder only"
    text = f"{table}\n\nB / A of samples/s with its 95 % interval; {len(rows)} cells, {alone}"
    if out:
        plain = frame.astype(object).where(frame.notna() & (frame != inf), None).to_dict("records")
        with writing(out):
            out.mkdir(parents=True, exist_ok=True)
            block = indent(text, "    ", lambda line: True)
            write_file(
                out / "comparison.md",
                f"# {folder_a.name} and {folder_b.name}\n\n{block}\n".encode(),
            )
            write_json(
                {"a": folder_a.name, "b": folder_b.name, "cells": plain}, out / "comparison.json"
            )
    return text


def _key(cell: dict[str, Any]) -> str:
    return json.dumps([cell["name"], cell["axes"], cell["settings"]], sort_keys=True)


def _row(a: dict[str, Any], b: dict[str, Any]) -> dict[str, Any]:
    both = zip(a["repetitions"], b["repetitions"], strict=False)
    pairs = [(x, y) for x, y in both if not (x["failed"] or y["failed"])]
    found: dict[str, Any] = {"cell": printable(a["name"]), **a["axes"], "pairs": len(pairs)}
    if not pairs:
        return found | {"speed": "not measured in both"}
    if len(devices := {device(r) for pair in pairs for r in pair}) > 1:
        return found | {"speed": printable(f"not comparable: {' and '.join(sorted(devices))}")}
    ratio, low, high = paired_ratio(
        *([float(r[RATE]) for r in side] for side in zip(*pairs, strict=True))
    )
    verdict = NO_DIFFERENCE if low <= 1 <= high else f"B is {ratio:.3g} x as fast"
    found |= {"ratio": ratio, "low95": low, "high95": high, "speed": verdict}
    lines_a, lines_b = (
        [line for r in side for line in r.get("epochs") or []] for side in zip(*pairs, strict=True)
    )
    accuracies = [
        (x.get("test_accuracy_fraction"), y.get("test_accuracy_fraction")) for x, y in pairs
    ]
    accuracies = [pair for pair in accuracies if None not in pair]
    return found | {
        "losses": losses(lines_a, lines_b),
        "test_accuracy": agreement(accuracies, ACCURACY_TOLERANCE),
    }


def losses(lines_a: list[dict[str, Any]], lines_b: list[dict[str, Any]]) -> str:
    """How the losses of epochs in metrics.jsonl agree; empty where there are none."""
    names = ("train_loss", "val_loss")
    both = zip(lines_a, lines_b, strict=False)
    return agreement(
        [(x[n], y[n]) for x, y in both for n in names if n in x and n in y], LOSS_TOLERANCE
    )


def agreement(pairs: list[tuple[float, float]], tolerance: float) -> str:
    """Whether pairs of figures are equal to the bit, within an absolute tolerance, or different."""
    if not pairs:
        return ""
    largest = max(abs(x - y) for x, y in pairs)
    if largest == 0:
        return "equal to the bit"
    return f"{f'within {tolerance:g}' if largest <= tolerance else 'different'}: at most {largest:.2g} apart"


def compare_runs(folder_a: Path, folder_b: Path, out: Path | None) -> str:
    """The reports of two runs side by side, and how their losses agree where both train the same.

    Writes OUT/comparison.md and .json where asked for.
    """
    names = (folder_a.name, folder_b.name)
    reports = (read_report(folder_a), read_report(folder_b))
    text = _side_by_side(*reports, *names)
    same = reports[0]["config_digest"] == reports[1]["config_digest"]
    if same and (told := losses(_metrics(folder_a), _metrics(folder_b))):
        text += f"\n\nLosses of the epochs that both have: {told}."
    if out:
        rows = []
        for name, r in zip(names, reports, strict=True):
            rows.append(
                row(f"{name}, {r['num_epochs']} epochs: training time", [r["train_s"]], "s")
            )
            rows.append(row(f"{name}: throughput", [r["samples_per_s"]], "samples/s"))
            rows.append(row(f"{name}: test accuracy", [100 * r["test_accuracy_fraction"]], "%"))
        facts, images = (
            Environment(**r["environment"]),
            f"{r['num_train_samples']:,} training images",
        )
        title = f"{out.name}: {' and '.join(names)}, {images}, one run each"
        with writing(out):
            write_result(
                out / "comparison.json", title=title, environment=facts, rows=rows, claims=[]
            )
            write_file(out / "comparison.md", f"# {' and '.join(names)}\n\n{text}\n".encode())
    return text


def _metrics(folder: Path) -> list[dict[str, Any]]:
    try:
        return [
            json.loads(line)
            for line in (folder / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
        ]
    except (OSError, ValueError):
        raise UserError(
            f"{folder}: its metrics.jsonl cannot be read; name the folder of a finished run"
        ) from None


COMPARED: dict[str, tuple[str, str, str]] = {
    "train_s": ("training time (s)", "{:.2f}", "less"),
    "samples_per_s": ("samples/s", "{:,.0f}", "more"),
    "test_accuracy_fraction": ("test accuracy", "{:.2%}", "points"),
    "val_accuracy_fraction": ("best validation accuracy", "{:.2%}", "points"),
    "data_wait_fraction": ("waiting for data", "{:.1%}", ""),
    "num_epochs": ("epochs", "{}", ""),
    "global_batch": ("global batch", "{}", ""),
    "precision": ("precision", "{}", ""),
    "feed": ("feed", "{}", ""),
    "cuda_graphs": ("CUDA graphs", "{}", ""),
    "host_peak_rss_gib": ("peak host memory (GiB)", "{:.2f}", ""),
    "torch_peak_gib": ("peak GPU memory of torch (GiB)", "{:.2f}", ""),
}
"""A figure's title and format, and what B / A says of it: faster where it is less or more; or B - A in points."""


def _side_by_side(a: dict[str, Any], b: dict[str, Any], name_a: str, name_b: str) -> str:
    """Two run reports as a Markdown table."""
    rows = []
    flat_a, flat_b = ({**r["config"], **r["effective"], **r} for r in (a, b))
    for key, (title, form, better) in COMPARED.items():
        x, y = flat_a[key], flat_b[key]
        if x is None or y is None:
            continue
        verdict = f"{100 * (y - x):+.2f} points" if better == "points" else ""
        if better in ("less", "more") and x and y:
            verdict = f"{y / x if better == 'more' else x / y:.1f} x faster"
        rows.append((title, form.format(x), form.format(y), verdict))
    return "\n".join(markdown_table(f"| | {name_a} | {name_b} | {name_b} is |", "lrrl", rows))
