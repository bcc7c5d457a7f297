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
from typing import Any

import pandas as pd

from engine.errors import UserError, printable
from engine.publish import write_file, writing
from engine.report import Environment, read_report, write_json
from tools.bench.results import row, write_result
from tools.bench.tables import RATE, device, read_profile

STUDENT_T = (inf, 12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262, 2.228, 2.201, 2.179, 2.160, 2.145)
"""97.5 % quantiles of Student's t for 0, 1, ... degrees of freedom; beyond, the last one (a little too wide)."""
LOSS_TOLERANCE, ACCURACY_TOLERANCE = 1e-3, 5e-3
"""What the same training may differ by when numbers are added in another order, or rounded to bf16."""
NO_DIFFERENCE = "no difference shown"


def paired_ratio(a: list[float], b: list[float]) -> tuple[float, float, float]:
    """The geometric mean of b / a over pairs of positive figures, and its 95 % interval; (0, inf) for one pair."""
    logs = [log(y / x) for x, y in zip(a, b, strict=True)]
    half = inf if len(logs) < 2 else STUDENT_T[min(len(logs), len(STUDENT_T)) - 1] * stdev(logs) / len(logs) ** 0.5
    return exp(mean(logs)), exp(mean(logs) - half), inf if half == inf else exp(mean(logs) + half)


def compare_profiles(folder_a: Path, folder_b: Path, out: Path | None) -> str:
    """A row for each cell that both folders have; OUT/comparison.md and .json where asked for. Returns the text.

    Raises:
        UserError: a folder holds no profile, or the two have no cell in common.
    """
    cells_a, cells_b = ({_key(c): c for c in read_profile(f)["cells"]} for f in (folder_a, folder_b))
    rows = [_row(cell, cells_b[key]) for key, cell in cells_a.items() if key in cells_b]
    if not rows:
        raise UserError(f"{folder_a} and {folder_b}: have no cell in common; measure the same matrix in both")
    frame = pd.DataFrame(rows)
    table = frame.to_string(index=False, na_rep="", float_format="{:,.4g}".format)
    alone = len(cells_a) + len(cells_b) - 2 * len(rows)
    text = (
        f"{table}\n\nB / A of samples/s with its 95 % interval; {len(rows)} cells, {alone} more are in one folder only"
    )
    if out:
        with writing(out):
            out.mkdir(parents=True, exist_ok=True)
            block = "\n".join(f"    {line}" for line in text.splitlines())
            write_file(out / "comparison.md", f"# {folder_a.name} and {folder_b.name}\n\n{block}\n".encode())
            plain = frame.astype(object).where(frame.notna() & (frame != inf), None)
            write_json(
                {"a": folder_a.name, "b": folder_b.name, "cells": plain.to_dict("records")}, out / "comparison.json"
            )
    return text


def _key(cell: dict[str, Any]) -> str:
    return json.dumps([cell["name"], cell["axes"], cell["settings"]], sort_keys=True)


def _row(a: dict[str, Any], b: dict[str, Any]) -> dict[str, Any]:
    pairs = [
        (x, y) for x, y in zip(a["repetitions"], b["repetitions"], strict=False) if not (x["failed"] or y["failed"])
    ]
    found: dict[str, Any] = {"cell": printable(a["name"]), **a["axes"], "pairs": len(pairs)}
    if not pairs:
        return found | {"speed": "not measured in both"}
    if len(devices := {device(r) for pair in pairs for r in pair}) > 1:
        return found | {"speed": printable(f"not comparable: {' and '.join(sorted(devices))}")}
    ratio, low, high = paired_ratio(*([float(r[RATE]) for r in side] for side in zip(*pairs, strict=True)))
    verdict = NO_DIFFERENCE if low <= 1 <= high else f"B is {ratio:.3g} x as fast"
    found |= {"ratio": ratio, "low95": low, "high95": high, "speed": verdict}
    lines_a, lines_b = ([line for r in side for line in r.get("epochs") or []] for side in zip(*pairs, strict=True))
    return found | {"losses": losses(lines_a, lines_b), "test_accuracy": _accuracies(pairs)}


def _accuracies(pairs: list[tuple[dict[str, Any], dict[str, Any]]]) -> str:
    found = [(x.get("test_accuracy_fraction"), y.get("test_accuracy_fraction")) for x, y in pairs]
    return agreement([(x, y) for x, y in found if x is not None and y is not None], ACCURACY_TOLERANCE)


def losses(lines_a: list[dict[str, Any]], lines_b: list[dict[str, Any]]) -> str:
    """How the losses of epochs in metrics.jsonl agree; empty where there are none."""
    names = ("train_loss", "val_loss")
    both = zip(lines_a, lines_b, strict=False)
    return agreement([(x[n], y[n]) for x, y in both for n in names if n in x and n in y], LOSS_TOLERANCE)


def agreement(pairs: list[tuple[float, float]], tolerance: float) -> str:
    """Whether pairs of figures are equal to the bit, within an absolute tolerance, or different."""
    if not pairs:
        return ""
    largest = max(abs(x - y) for x, y in pairs)
    if largest == 0:
        return "equal to the bit"
    return f"{f'within {tolerance:g}' if largest <= tolerance else 'different'}: at most {largest:.2g} apart"


def compare_runs(folder_a: Path, folder_b: Path, out: Path | None) -> str:
    """The reports of two runs side by side, and how their losses agree; OUT/comparison.md and .json where asked for."""
    reports = {folder.name: read_report(folder) for folder in (folder_a, folder_b)}
    text = comparison(reports[folder_a.name], reports[folder_b.name], folder_a.name, folder_b.name)
    if told := losses(_metrics(folder_a), _metrics(folder_b)):
        text += f"\n\nLosses of the epochs that both have: {told}."
    if out:
        with writing(out):
            write_file(out / "comparison.md", f"# {folder_a.name} and {folder_b.name}\n\n{text}\n".encode())
            _write_result(out / "comparison.json", reports)
    return text


def _metrics(folder: Path) -> list[dict[str, Any]]:
    try:
        return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    except (OSError, ValueError):
        raise UserError(f"{folder}: its metrics.jsonl cannot be read; name the folder of a finished run") from None


def _write_result(path: Path, reports: dict[str, dict[str, Any]]) -> None:
    rows = []
    for name, report in reports.items():
        rows.append(row(f"{name}, {report['num_epochs']} epochs: training time", [report["train_s"]], "s"))
        rows.append(row(f"{name}: throughput", [report["samples_per_s"]], "samples/s"))
        rows.append(row(f"{name}: test accuracy", [100 * report["test_accuracy_fraction"]], "%"))
    facts = Environment(**report["environment"])
    title = (
        f"{path.parent.name}: {' and '.join(reports)}, {report['num_train_samples']:,} training images, one run each"
    )
    write_result(path, title=title, environment=facts, rows=rows, claims=[])


def comparison(a: dict[str, Any], b: dict[str, Any], name_a: str, name_b: str) -> str:
    """Two run reports as a Markdown table; the ratio is told where more is better or less is better."""
    lines = [f"| | {name_a} | {name_b} | {name_b} is |", "|---|--:|--:|---|"]
    measures = [
        ("training time (s)", "train_s", "{:.2f}", -1),
        ("samples/s", "samples_per_s", "{:,.0f}", 1),
        ("test accuracy", "test_accuracy_fraction", "{:.2%}", 0),
        ("best validation accuracy", "val_accuracy_fraction", "{:.2%}", 0),
        ("waiting for data", "data_wait_fraction", "{:.1%}", None),
        ("epochs", "num_epochs", "{}", None),
        ("global batch", "global_batch", "{}", None),
        ("precision", "precision", "{}", None),
        ("feed", "feed", "{}", None),
        ("CUDA graphs", "cuda_graphs", "{}", None),
        ("peak host memory (GiB)", "host_peak_rss_gib", "{:.2f}", None),
        ("peak GPU memory of torch (GiB)", "torch_peak_gib", "{:.2f}", None),
    ]
    flat_a, flat_b = ({**r["config"], **r["effective"], **r} for r in (a, b))
    for title, key, form, better in measures:
        x, y = flat_a[key], flat_b[key]
        if x is None or y is None:
            continue
        verdict = ""
        if better == 0:
            verdict = f"{100 * (y - x):+.2f} points"
        elif better and x and y:
            verdict = f"{(y / x) ** better:.1f} x faster"
        lines.append(f"| {title} | {form.format(x)} | {form.format(y)} | {verdict} |")
    return "\n".join(lines)
