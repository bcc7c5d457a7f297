"""Networks side by side, the same whichever worker trains them; the vote and its interval."""

import json
import os
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from joblib.externals.loky import get_reusable_executor

from engine.config import RECIPES, override
from engine.data.records import Records
from tests.conftest import Command, assert_refused
from tools.measure.ensemble import Arm, train_all, vote_over_singles


@pytest.fixture(scope="module", autouse=True)
def no_worker_stays() -> Iterator[None]:
    """joblib keeps its workers for five minutes, in which others may want the memory."""
    yield
    get_reusable_executor(reuse=True).shutdown(wait=True)


def test_the_vote_of_a_known_case() -> None:
    """Of three networks each is wrong at another sample: two are right, and so is the vote."""
    label_N = np.array([0, 1, 0])
    probability_MNK = np.zeros((3, 3, 2))
    for network in range(3):
        for sample, label in enumerate(label_N):
            probability_MNK[network, sample, label if sample != network else 1 - label] = 1
    single_M, vote, gain, low, high = vote_over_singles(probability_MNK, label_N)
    assert single_M.tolist() == pytest.approx([2 / 3] * 3) and vote == 1
    assert gain == low == high == pytest.approx(1 / 3), "each sample gains the same"
    same = vote_over_singles(probability_MNK[:1].repeat(3, axis=0), label_N)
    assert same[1] == pytest.approx(2 / 3) and same[2:] == (0, 0, 0)


def test_the_interval_of_the_gain_holds_the_truth() -> None:
    """The vote is right where single networks are right 8 times of 10: the gain is 0.2."""
    rng = np.random.default_rng(0)
    probability_MNK = np.zeros((10, 400, 2))
    for sample in range(400):
        wrong = rng.random(10) < 0.2
        probability_MNK[np.arange(10), sample, wrong.astype(int)] = 1
    *_, gain, low, high = vote_over_singles(probability_MNK, np.zeros(400, int))
    assert low < 0.2 < high and high - low == pytest.approx(
        2 * 1.96 * (0.16 / 10 / 400) ** 0.5, rel=0.3
    )
    assert gain == pytest.approx((low + high) / 2, abs=0.005)


@pytest.mark.slow
def test_each_network_is_the_same_whichever_worker_trains_it(tiny: Records, tiny_dir: Path) -> None:
    config = override(
        RECIPES["study"], {"global_batch": 32, "epochs": 2, "data.path": str(tiny_dir)}, "test"
    )
    config = replace(config, data=replace(config.data, feed="resident"))
    before = os.sched_getaffinity(0)
    one_s, one_MNK, facts = train_all(config, 3, Arm(1, 1))
    two_s, two_MNK, _ = train_all(config, 3, Arm(2, 1))
    assert one_MNK.tobytes() == two_MNK.tobytes(), (
        "networks come back in another order, or with another seed"
    )
    assert (
        one_MNK.shape == (3, len(tiny.split("test")), len(tiny.classes)) and facts.num_threads == 1
    )
    assert not np.allclose(one_MNK[0], one_MNK[1]), "two networks of one seed"
    assert one_s > 0 and two_s > 0 and os.sched_getaffinity(0) == before


def test_the_command_writes_a_result_file(command: Command, tiny_dir: Path, tmp_path: Path) -> None:
    (tmp_path / "recipe.toml").write_text("global_batch = 32\n")
    flags = (
        "--networks",
        2,
        "--epochs",
        1,
        "--config",
        tmp_path / "recipe.toml",
        "--out",
        tmp_path,
    )
    done = command("tools/profile", "ensemble", "--data", tiny_dir, *flags)
    assert done.returncode == 0, done.stderr
    result = json.loads((tmp_path / "ensemble.json").read_text())
    rows = {row["name"]: row for row in result["rows"]}
    assert (
        rows["1 x 1: test accuracy of their vote"]["value"]
        == rows["2 x 1: test accuracy of their vote"]["value"]
    )
    assert rows["2 x 1: efficiency"]["value"] == pytest.approx(
        50 * rows["2 x 1: speed-up over 1 x 1"]["value"]
    )
    assert (
        result["claims"][0]["measured"] == result["rows"][-1]["low"]
        and "2 x 1: time" in done.stdout
    )
    refused = command(
        "tools/profile", "ensemble", "--data", tiny_dir, "--workers", 3, "--networks", 2
    )
    assert_refused(refused, "--workers 3", "give fewer")
