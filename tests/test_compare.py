"""Comparing runs and profiles: the interval, by a known case and by simulation; what is said."""

import json
from copy import deepcopy
from math import inf
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from engine.errors import UserError
from tests.conftest import Command, assert_refused
from tests.profiles import make_profile
from tools.measure.results import Epoch
from tools.report.compare import NO_DIFFERENCE, agreement, compare_profiles, losses
from tools.report.statistics import paired_ratio


def test_the_interval_of_a_known_case() -> None:
    """Log-ratios 1, 2, 3: mean 2, standard deviation 1, t of 2 degrees of freedom 4.303."""
    ratio, low, high = paired_ratio([1, 2, 4], [np.e, 2 * np.e**2, 4 * np.e**3])
    half = 4.303 / 3**0.5
    assert np.log([ratio, low, high]) == pytest.approx([2, 2 - half, 2 + half])
    assert paired_ratio([2.0], [3.0]) == (pytest.approx(1.5), 0, inf)
    assert paired_ratio([2.0, 4.0], [2.0, 4.0]) == (1, 1, 1)


@pytest.mark.parametrize("num_pairs", [2, 3, 5, 20])
def test_the_interval_holds_the_truth_19_times_of_20(num_pairs: int) -> None:
    """Pairs share a drift that is much larger than their noise; the true ratio is 1.1."""
    rng = np.random.default_rng(num_pairs)
    num, held = 3000, 0
    for _ in range(num):
        a = rng.lognormal(8, 0.3, num_pairs)
        _, low, high = paired_ratio(
            a.tolist(), (1.1 * a * rng.lognormal(0, 0.03, num_pairs)).tolist()
        )
        held += low <= 1.1 <= high
    assert held / num == pytest.approx(0.95, abs=0.015)


def test_figures_agree_to_the_bit_within_a_tolerance_or_not() -> None:
    assert agreement([], 1) == ""
    assert agreement([(0.1, 0.1)], 1e-3) == "equal to the bit"
    assert agreement([(0.1, 0.1), (0.1, np.nextafter(0.1, 1))], 1e-3).startswith(
        "within 0.001: at most 1.4e-17"
    )
    assert agreement([(0.1, 0.1), (0.5, 0.4)], 1e-3) == "different: at most 0.1 apart"
    a, b = (
        [Epoch(epoch=1, train_s=1, train_loss=1.0, val_loss=2.0)],
        [
            Epoch(epoch=1, train_s=1, train_loss=1.0, val_loss=2.5),
            Epoch(epoch=2, train_s=2, train_loss=9.0),
        ],
    )
    assert losses(a, b) == "different: at most 0.5 apart"
    assert losses(a, [Epoch(epoch=1, train_s=1, train_loss=1.0)]) == "equal to the bit"


def folder(path: Path, profile: dict[str, Any]) -> Path:
    path.mkdir()
    (path / "profile.json").write_text(json.dumps(profile))
    return path


def test_profiles_are_paired_cell_by_cell(tmp_path: Path) -> None:
    a = make_profile(num=8)
    b = deepcopy(a)
    for cell, factor in zip(b["cells"], (1.0, 1.5, 1.0, 1.0), strict=False):
        for number, repetition in enumerate(cell["repetitions"]):
            repetition["samples_per_s"] *= factor * (1 + 0.001 * (number - 1))
    for repetition in b["cells"][2]["repetitions"]:
        repetition["environment"] = repetition["environment"] | {"gpu_name": "P100 | `x`"}
    b["cells"][3]["repetitions"][0] = {
        "failed": "out of memory",
        "seed": 0,
        "environment": {},
        "notes": [],
    }
    b["cells"][4]["settings"] = {"step.precision": "fp16"}
    a["cells"][0]["name"] = b["cells"][0]["name"] = "odd\x1b[31m <b>"
    text = compare_profiles(folder(tmp_path / "a", a), folder(tmp_path / "b", b), tmp_path / "out")
    rows = json.loads((tmp_path / "out" / "comparison.json").read_text())["cells"]
    assert len(rows) == 7 and rows[0]["cell"] == "odd\\x1b[31m <b>" and "\x1b" not in text
    assert rows[0]["speed"] == NO_DIFFERENCE and rows[0]["low95"] < 1 < rows[0]["high95"]
    assert rows[1]["speed"] == "B is 1.5 x as fast" and rows[1]["ratio"] == pytest.approx(
        1.5, rel=1e-3
    )
    assert rows[2]["speed"].startswith("not comparable") and rows[2]["ratio"] is None, (
        "a ratio across devices"
    )
    assert rows[3]["pairs"] == 2
    assert any(row["speed"] == "not measured in both" for row in rows)
    markdown = (tmp_path / "out" / "comparison.md").read_text().splitlines()
    assert all(line.startswith("    ") or not line for line in markdown[1:]), (
        "text of a profile outside of the block"
    )
    for cell in b["cells"]:
        cell["repetitions"] = cell["repetitions"][:1]
    compare_profiles(tmp_path / "a", folder(tmp_path / "one", b), tmp_path / "alone")
    (row, *_) = json.loads((tmp_path / "alone" / "comparison.json").read_text())["cells"]
    assert row["pairs"] == 1 and row["low95"] is None and row["high95"] is None
    b["cells"] = b["cells"][4:5]
    with pytest.raises(UserError, match="no cell in common"):
        compare_profiles(tmp_path / "a", folder(tmp_path / "c", b), None)


def test_the_command_tells_profiles_from_runs(command: Command, tmp_path: Path) -> None:
    same = folder(tmp_path / "a", make_profile(num=4))
    done = command("tools/profile", "compare", same, same, "--out", tmp_path)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count(NO_DIFFERENCE) >= 2 and "equal to the bit" in done.stdout
    assert_refused(
        command("tools/profile", "compare", same, tmp_path), "profile.json", "tools/profile run"
    )
