"""Which rows of a CSV go to train, val and test: functions of labels, typefaces and a seed.

Shapes: N rows of the CSV, M of them.
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Literal

import numpy as np

from engine.data.table import Table
from engine.errors import UserError
from engine.order import permute, round_keys

SplitMode = Literal["random", "font", "none"]
SplitRows = dict[str, np.ndarray]
"""Row numbers of each split, ascending."""
HELD_OUT = ("val", "test")
"""The splits beside train."""
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
    held_out: tuple[str, ...] = HELD_OUT,
) -> SplitRows:
    """Row numbers of each split, ascending.

    `random` is stratified: within each class the rows stand in the order of a keyed bijection of
    (seed, class name); its head is val, then test, the rest train. `font` deals whole families
    (see `family`) to val and test, in such an order, as long as they fit into their part.

    Args:
        held_out: the splits that are drawn beside train, in this order.
    Raises:
        UserError: a class, or the number of families, is too small for so many splits.
    """
    num_splits = len(held_out) + 1
    counts = np.bincount(label_N, minlength=len(classes))
    rows_by_class = np.split(np.argsort(label_N, kind="stable"), np.cumsum(counts)[:-1])
    kept = []
    for name, row_M in zip(classes, rows_by_class, strict=True):
        num = int(counts.min()) if options.balance else len(row_M)
        if options.split == "random" and num < num_splits:
            raise UserError(
                f"the class {name!r} has {num} rows, want at least {num_splits} to split; use "
                f"--split none"
            )
        key = round_keys(options.seed, "split", name)
        kept.append(row_M[permute(np.arange(len(row_M)), len(row_M), key)[:num]])
    if options.split == "random":
        return _draw_random(kept, held_out)
    row_M = np.sort(np.concatenate(kept))
    if options.split == "none":
        return {"train": row_M}
    return _draw_fonts(row_M, font_N[row_M], fonts, options.seed, held_out)


def _draw_random(kept: list[np.ndarray], held_out: tuple[str, ...]) -> SplitRows:
    parts = []
    for row_M in kept:
        num = max(1, round(len(row_M) * EVAL_FRACTION))
        parts.append(np.split(row_M, [num * place for place in range(1, len(held_out) + 1)]))
    *drawn, train = (np.sort(np.concatenate(part)) for part in zip(*parts, strict=True))
    return {"train": train, **dict(zip(held_out, drawn, strict=True))}


def draw_given(table: Table, given: Mapping[str, range], options: SplitOptions) -> SplitRows:
    """Row numbers of each split, ascending, where the source says them; val, where it is not
    given, is drawn from train as `draw_splits` draws it, unless `split` is none.

    Args:
        given: all rows, by split; of train and others. Those of the others are kept as they are.
    Raises:
        UserError: a class or the families of train are too few to draw val.
    """
    start, stop = given["train"].start, given["train"].stop
    label_M, font_M = table.label_N[start:stop], table.font_N[start:stop]
    used, font_M = np.unique(font_M, return_inverse=True)
    fonts = tuple(table.fonts[number] for number in used)
    drawn_too = () if "val" in given or options.split == "none" else ("val",)
    if not drawn_too:
        options = replace(options, split="none")
    drawn = draw_splits(label_M, font_M, table.classes, fonts, options, drawn_too)
    rows = {split: row_M + start for split, row_M in drawn.items()}
    rows |= {split: np.arange(r.start, r.stop) for split, r in given.items() if split != "train"}
    return {split: rows[split] for split in ("train", *HELD_OUT) if split in rows}


def family(font: str) -> str:
    """The family that a font file's name shows: what stands before a dash, underscore, bracket
    or space, without words of weight, width and slope at its end:
    `RobotoSerifCondensed-Light[wght]` is of `robotoserif`."""
    stem = re.split(r"[-_\[ ]", font, maxsplit=1)[0]
    return (_STYLE.sub("", stem) or stem or font).lower()


def _draw_fonts(
    row_M: np.ndarray,
    font_M: np.ndarray,
    fonts: tuple[str, ...],
    seed: int,
    held_out: tuple[str, ...],
) -> SplitRows:
    families = sorted({family(font) for font in fonts})
    num = len(families)
    least = len(held_out) + 1
    if num < least:
        raise UserError(
            f"the rows are of {num} typeface families, want at least {least}; use --split random"
        )
    number_of = {name: number for number, name in enumerate(families)}
    family_M = np.array([number_of[family(font)] for font in fonts])[font_M]
    sizes = np.bincount(family_M, minlength=num)
    split_of = np.full(num, "train")
    room = {split: EVAL_FRACTION * len(row_M) for split in held_out} | {"train": np.inf}
    for number in permute(np.arange(num), num, round_keys(seed, "split", "fonts")):
        split = next(name for name, rows in room.items() if sizes[number] <= rows)
        split_of[number] = split
        room[split] -= sizes[number]
    rows = {name: row_M[(split_of == name)[family_M]] for name in ("train", *held_out)}
    for name, drawn in rows.items():
        if not len(drawn):
            raise UserError(
                f"the typeface families are too large to leave one for {name}; use --split random"
            )
    return rows
