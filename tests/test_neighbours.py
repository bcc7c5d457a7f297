"""Twins and nearest neighbours, where the right answer is known by hand or by another way."""

from pathlib import Path

import numpy as np
import pytest
import torch

from engine.data.records import Records, Split
from engine.errors import UserError
from engine.report import environment
from tests.conftest import Command
from tools.measure import neighbours
from tools.measure.neighbours import Twins, ceiling, data_facts, nearest_images, read_facts

CPU = torch.device("cpu")


def split_of(values: list[int], labels: list[int], side: int = 2) -> Split:
    """Images of one grey value each: their RMS distance is the difference of the values."""
    image_NHW = np.repeat(np.array(values, np.uint8), side * side).reshape(-1, side, side)
    return Split(
        image_NHW=image_NHW,
        label_N=np.array(labels, np.uint8),
        font_N=np.zeros(len(values), np.int32),
    )


def test_six_images_and_their_neighbours() -> None:
    """Train: 10 and 100 of class 0, 12, 200, 201, 202, 203, 204 of class 1.

    11 (class 0) is as near to both classes; 13 (class 0) nearer to the other; 200 (class 1) has its
    twin; 205 (class 0) has five of the other before its own; 100 (class 0) is a twin; 60 (class 0)
    is nearest to 100.
    """
    train = split_of([10, 100, 12, 200, 201, 202, 203, 204], [0, 0, 1, 1, 1, 1, 1, 1])
    test = split_of([11, 13, 200, 205, 100, 60], [0, 0, 1, 0, 0, 0])
    nearest, twins = nearest_images(test, train, CPU)
    assert (nearest.num_own_nearer, nearest.num_other_nearer, nearest.num_tied) == (3, 2, 1)
    assert nearest.accuracy_fraction == pytest.approx(3.5 / 6)
    assert nearest.num_own_in_five == 5
    one, sixteen = twins
    assert (one.below_rms, one.num_with_twins, one.num_with_other_label) == (1, 2, 0)
    assert (sixteen.below_rms, sixteen.num_with_twins) == (16, 5)
    assert sixteen.num_with_other_label == 3, "11, 13 and 205"
    assert sixteen.num_mostly_other_label == 1, "205; of 11 and 13 half of the twins are"


def test_blocks_change_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    """Against every distance at once, with pixels of the largest sums."""
    rng = np.random.default_rng(0)

    def drawn(num: int) -> Split:
        return Split(
            image_NHW=rng.integers(200, 256, (num, 28, 28)).astype(np.uint8),
            label_N=rng.integers(0, 3, num).astype(np.uint8),
            font_N=np.zeros(num, np.int32),
        )

    test, train = drawn(23), drawn(101)
    difference = test.image_NHW[:, None].astype(int) - train.image_NHW[None]
    square_NB = (difference**2).sum((2, 3))
    is_own_NB = test.label_N[:, None] == train.label_N[None]
    own_N = np.where(is_own_NB, square_NB, 10**9).min(1)
    other_N = np.where(is_own_NB, 10**9, square_NB).min(1)
    fifth_N = np.sort(square_NB, 1)[:, 4]
    near_NB = square_NB < 22.0**2 * 784
    monkeypatch.setattr(neighbours, "BLOCK_ROWS", 7)
    monkeypatch.setattr(neighbours, "BLOCK_COLUMNS", 11)
    monkeypatch.setattr(neighbours, "NEAR_RMS", (22.0,))
    nearest, (twins,) = nearest_images(test, train, CPU)
    assert nearest.num_own_nearer == (own_N < other_N).sum() > 0
    assert nearest.num_other_nearer == (own_N > other_N).sum() > 0
    assert nearest.num_own_in_five == (own_N <= fifth_N).sum()
    assert 0 < twins.num_with_twins == near_NB.any(1).sum() < 23
    assert twins.num_with_other_label == (near_NB & ~is_own_NB).any(1).sum()


def test_equal_images_under_several_labels_are_a_ceiling() -> None:
    """Of 5, 5, 5 under 0, 0, 1 two can be right, of 7, 7 under 0, 1 one, 9 is alone."""
    test = split_of([5, 5, 5, 7, 7, 9], [0, 0, 1, 0, 1, 1])
    assert ceiling(test) == pytest.approx(4 / 6)
    val = split_of([5, 8], [1, 1])
    train = split_of([5, 5, 7, 1], [1, 0, 0, 0])
    records = Records(
        splits={"train": train, "val": val, "test": test}, classes=("a", "b"), fonts=("",),
        fingerprint="f" * 64, pixel_mean=0.0, pixel_std=0.0,
    )  # fmt: skip
    facts = data_facts(records, environment(num_threads=1, allocator="", gpu={}), CPU)
    identical = {(each.split, each.among): each for each in facts.twins if not each.below_rms}
    assert set(identical) == {("val", "train"), ("test", "train"), ("test", "val")}

    def counts(twins: Twins) -> tuple[int, int, int]:
        return twins.num_with_twins, twins.num_with_other_label, twins.num_mostly_other_label

    assert counts(identical["test", "train"]) == (5, 4, 1), "half of the twins are not most"
    assert counts(identical["test", "val"]) == (3, 2, 2)
    assert counts(identical["val", "train"]) == (1, 1, 0)


def test_facts_of_records_are_printed_and_read_back(
    small_dir: Path, command: Command, tmp_path: Path
) -> None:
    words = ("tools/evaluate", "--data-facts", "--data", small_dir, "--out", tmp_path)
    done = command(*words, "--max-train", 100)
    assert done.returncode == 0, done.stderr
    facts = read_facts(tmp_path)
    assert facts.nearest.num_train == 100 and facts.num_images["test"] == 48
    assert facts.ceiling_fraction == 1 and "5 nearest" in done.stdout
    (tmp_path / "data_facts.json").write_text("{}", encoding="utf-8")
    with pytest.raises(UserError, match=r"is no file of facts .* make it with"):
        read_facts(tmp_path)
