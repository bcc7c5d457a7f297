"""The splits, by properties: whole, disjoint, stratified or by family, and drawn by the seed."""

from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as some

from engine.data.split import (
    EVAL_FRACTION,
    SplitMode,
    SplitOptions,
    draw_given,
    draw_splits,
    family,
)
from engine.data.table import Table
from engine.errors import UserError

CLASSES = ("a", "b", "c")
STYLES = ("Bold", "Light", "Italic")
Rows = dict[str, np.ndarray]
SIZES = some.lists(some.integers(3, 60), min_size=3, max_size=3)
SEEDS = some.integers(0, 2**63 - 1)
properties = settings(max_examples=60, deadline=None)


def labels_of(sizes: list[int], order: int = 0) -> np.ndarray:
    """So many rows of each class, in a random order."""
    label_N = np.repeat(np.arange(len(sizes), dtype=np.uint8), sizes)
    return np.random.default_rng(order).permutation(label_N)


def draw(label_N: np.ndarray, **options: Any) -> Rows:
    font_N = np.zeros(len(label_N), np.int32)
    return draw_splits(label_N, font_N, CLASSES, ("Font",), SplitOptions(**options))


def all_rows(rows: Rows) -> np.ndarray:
    """The rows of all splits, sorted; each split ascends, and no row is in two."""
    assert all((np.diff(row_M) > 0).all() for row_M in rows.values())
    together = np.sort(np.concatenate(list(rows.values())))
    assert (np.diff(together) > 0).all()
    return together


@properties
@given(SIZES, SEEDS)
def test_a_random_split_is_stratified_disjoint_and_whole(sizes: list[int], seed: int) -> None:
    label_N = labels_of(sizes)
    rows = draw(label_N, seed=seed)
    assert np.array_equal(all_rows(rows), np.arange(len(label_N)))
    for name, fraction in {"train": 0.7, "val": EVAL_FRACTION, "test": EVAL_FRACTION}.items():
        counts = np.bincount(label_N[rows[name]], minlength=3)
        assert counts.min() >= 1
        assert np.abs(counts - fraction * np.array(sizes)).max() <= 1.2


@properties
@given(SIZES, SEEDS, some.sampled_from(["random", "none"]))
def test_balanced_classes_are_cut_to_the_smallest(
    sizes: list[int], seed: int, split: SplitMode
) -> None:
    label_N = labels_of(sizes)
    rows = all_rows(draw(label_N, split=split, balance=True, seed=seed))
    assert np.bincount(label_N[rows]).tolist() == [min(sizes)] * 3


@properties
@given(SIZES, SEEDS)
def test_a_class_is_split_alike_wherever_its_rows_stand(sizes: list[int], seed: int) -> None:
    """Rows of other classes in between change nothing: the draw is of its name and its rows."""
    found = []
    for order in (0, 1):
        label_N = labels_of(sizes, order)
        split_N = np.full(len(label_N), "train")
        for name, row_M in draw(label_N, seed=seed).items():
            split_N[row_M] = name
        found.append([split_N[label_N == label].tolist() for label in range(3)])
    assert found[0] == found[1]


def test_the_seed_draws() -> None:
    label_N = labels_of([100, 40, 20])
    assert not np.array_equal(draw(label_N)["val"], draw(label_N, seed=2)["val"])


def test_a_class_too_small_for_three_splits_is_refused() -> None:
    with pytest.raises(UserError, match="'b' has 2 rows, want at least 3 to split; use --split"):
        draw(labels_of([5, 2, 5]))


@pytest.mark.parametrize(
    ("font", "wanted"),
    [
        ("RedHatDisplay-Italic[wght]", "redhatdisplay"),
        ("RobotoSerif_Condensed-Light", "robotoserif"),
        ("IBMPlexSansCondensed-SemiBold", "ibmplexsans"),
        ("antpoltcond-bold", "antpolt"),
        ("Courier Prime Bold", "courier"),
        ("ffmr10", "ffmr"),
        ("Black-Regular", "black"),
        ("-x", "-x"),
    ],
)
def test_a_file_name_tells_the_family(font: str, wanted: str) -> None:
    assert family(font) == wanted


def by_font(num_families: int, num_rows: int, seed: int = 1) -> tuple[Rows, list[str]]:
    """The splits of rows of random typefaces, three of each family; and each row's family."""
    rng = np.random.default_rng(seed)
    names = [f"Family{chr(ord('a') + k)}" for k in range(num_families)]
    fonts = tuple(f"{name}-{style}" for name in names for style in STYLES)
    font_N = rng.integers(0, len(fonts), num_rows).astype(np.int32)
    label_N = rng.integers(0, 3, num_rows).astype(np.uint8)
    options = SplitOptions(split="font", seed=seed)
    rows = draw_splits(label_N, font_N, CLASSES, fonts, options)
    return rows, [family(fonts[i]) for i in font_N]


@properties
@given(some.integers(12, 26), SEEDS)
def test_a_font_split_keeps_families_together(num_families: int, seed: int) -> None:
    rows, families = by_font(num_families, 2000, seed)
    assert np.array_equal(all_rows(rows), np.arange(2000))
    found = [name for row_M in rows.values() for name in {families[i] for i in row_M}]
    assert len(found) == len(set(found))
    assert all(0 < len(rows[name]) <= EVAL_FRACTION * 2000 for name in ("val", "test"))


def test_many_families_fill_their_part() -> None:
    rows, _ = by_font(26, 5000)
    assert all(500 <= len(rows[name]) <= 750 for name in ("val", "test"))


@properties
@given(some.integers(8, 26), SEEDS, some.sampled_from(["random", "font", "none"]))
def test_val_is_drawn_from_the_rows_given_for_training(
    num_families: int, seed: int, split: SplitMode
) -> None:
    """Whole and disjoint, test untouched; by families only those of train count."""
    rng = np.random.default_rng(1)
    names = [f"Family{chr(ord('a') + k)}" for k in range(num_families)]
    fonts = tuple(f"{name}-{style}" for name in names for style in STYLES)
    font_N = rng.integers(0, len(fonts), 1000).astype(np.int32)
    label_N = rng.integers(0, 3, 1000).astype(np.uint8)
    zeros_N = np.zeros(1000, np.uint64)
    table = Table(28, CLASSES, fonts, label_N, font_N, zeros_N, zeros_N, zeros_N)
    given_rows = {"train": range(300, 1000), "test": range(300)}
    rows = draw_given(table, given_rows, SplitOptions(split=split, seed=seed))
    assert rows["test"].tolist() == list(range(300))
    assert np.array_equal(all_rows(rows), np.arange(1000))
    if split == "none":
        assert list(rows) == ["train", "test"]
        return
    assert list(rows) == ["train", "val", "test"]
    assert 0 < len(rows["val"]) <= EVAL_FRACTION * 700 + 2
    if split == "font":
        held, used = ({family(fonts[i]) for i in font_N[rows[name]]} for name in ("val", "train"))
        assert not held & used


def test_too_few_or_too_large_families_are_refused() -> None:
    with pytest.raises(UserError, match="of 2 typeface families, want at least 3"):
        by_font(2, 5000)
    with pytest.raises(UserError, match="too large to leave one for val"):
        by_font(3, 5000)
