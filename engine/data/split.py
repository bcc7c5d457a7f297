"""Which rows of a CSV go to train, val and test: functions of labels, typefaces and a seed.

Shapes: N rows of the CSV, M of them.
"""

import re
from dataclasses import dataclass
from typing import Literal

import numpy as np

from engine.errors import UserError
from engine.order import permute, round_keys

SplitMode = Literal["random", "font", "none"]
EVAL_FRACTION = 0.15
"""Part of each class (split font: of all rows) in val, and again in test: 70/15/15."""
_STYLE = re.compile(
    r"(thin|extra|ultra|light|semi|demi|book|regular|roman|text|medium|bold|black|heavy"
    r"|italic|ital|oblique|slanted"
    r"|condensed|cond|compressed|narrow|expanded|expd|extended|wide|caps|variable|vf|[0-9])+$",
    re.IGNORECASE,
)


@dataclass(frozen=True, kw_only=True)
class SplitOptions:
    """How rows are dealt to splits; the records' manifest holds it."""

    split: SplitMode = "random"
    balance: bool = False
    """First cut each class to the smallest one's size."""
    seed: int = 42


def draw_splits(
    label_N: np.ndarray,
    font_N: np.ndarray,
    classes: tuple[str, ...],
    fonts: tuple[str, ...],
    options: SplitOptions,
) -> dict[str, np.ndarray]:
    """Row numbers of each split, ascending.

    `random` is stratified: within each class the rows stand in the order of a keyed bijection of
    (seed, class name); its head is val, then test, the rest train. `font` deals whole families
    (see `family`) to val and test, in such an order, as long as they fit into their part.

    Raises:
        UserError: a class, or the number of families, is too small for three splits.
    """
    counts = np.bincount(label_N, minlength=len(classes))
    rows_by_class = np.split(np.argsort(label_N, kind="stable"), np.cumsum(counts)[:-1])
    kept = []
    for name, row_M in zip(classes, rows_by_class, strict=True):
        num = int(counts.min()) if options.balance else len(row_M)
        if options.split == "random" and num < 3:
            raise UserError(
                f"the class {name!r} has {num} rows, want at least 3 to split; use --split none"
            )
        key = round_keys(options.seed, "split", name)
        kept.append(row_M[permute(np.arange(len(row_M)), len(row_M), key)[:num]])
    if options.split == "random":
        return _draw_random(kept)
    row_M = np.sort(np.concatenate(kept))
    if options.split == "none":
        return {"train": row_M}
    return _draw_fonts(row_M, font_N, fonts, options.seed)


def _draw_random(kept: list[np.ndarray]) -> dict[str, np.ndarray]:
    parts = []
    for row_M in kept:
        held_out = max(1, round(len(row_M) * EVAL_FRACTION))
        parts.append(np.split(row_M, [held_out, 2 * held_out]))
    val, test, train = (np.sort(np.concatenate(part)) for part in zip(*parts, strict=True))
    return {"train": train, "val": val, "test": test}


def family(font: str) -> str:
    """The family that a font file's name shows: what stands before a dash, underscore, bracket
    or space, without words of weight, width and slope at its end:
    `RobotoSerifCondensed-Light[wght]` is of `robotoserif`."""
    stem = re.split(r"[-_\[ ]", font, maxsplit=1)[0]
    return (_STYLE.sub("", stem) or stem or font).lower()


def _draw_fonts(
    row_M: np.ndarray, font_N: np.ndarray, fonts: tuple[str, ...], seed: int
) -> dict[str, np.ndarray]:
    families = sorted({family(font) for font in fonts})
    num = len(families)
    if num < 3:
        raise UserError(
            f"the rows are of {num} typeface families, want at least 3; use --split random"
        )
    number_of = {name: number for number, name in enumerate(families)}
    family_M = np.array([number_of[family(font)] for font in fonts])[font_N[row_M]]
    sizes = np.bincount(family_M, minlength=num)
    split_of = np.full(num, "train")
    room = {"val": EVAL_FRACTION * len(row_M), "test": EVAL_FRACTION * len(row_M), "train": np.inf}
    for number in permute(np.arange(num), num, round_keys(seed, "split", "fonts")):
        split = next(name for name, rows in room.items() if sizes[number] <= rows)
        split_of[number] = split
        room[split] -= sizes[number]
    rows = {name: row_M[(split_of == name)[family_M]] for name in ("train", "val", "test")}
    for name, drawn in rows.items():
        if not len(drawn):
            raise UserError(
                f"the typeface families are too large to leave one for {name}; use --split random"
            )
    return rows
