"""All rows of a CSV but their pixels, and what is odd about them.

Shapes: N rows of the CSV, M of them.
"""

from dataclasses import dataclass

import numpy as np

LEAST_SIDE = 4
"""Of images: two poolings leave a quarter of it. Smaller ones are packed with a warning."""


@dataclass(frozen=True)
class Table:
    """All rows of a CSV but their pixels: label_N uint8 into `classes`, font_N int32 into
    `fonts`, the others as in lexer.Rows; `side` is the images' height and width."""

    side: int
    classes: tuple[str, ...]
    fonts: tuple[str, ...]
    label_N: np.ndarray
    font_N: np.ndarray
    sum_N: np.ndarray
    squares_N: np.ndarray
    hash_N: np.ndarray

    def rows_per_class(self, row_M: np.ndarray) -> list[int]:
        count_C = np.bincount(self.label_N[row_M], minlength=len(self.classes))
        return list(count_C.tolist())

    def pixels(self, row_M: np.ndarray) -> dict[str, float]:
        """Mean and standard deviation (0..255) of some rows' pixels, from exact sums."""
        num = len(row_M) * self.side**2
        mean = int(self.sum_N[row_M].sum()) / num
        return {
            "mean": mean,
            "std": max(int(self.squares_N[row_M].sum()) / num - mean**2, 0.0) ** 0.5,
        }


def odd_counts(table: Table) -> dict[str, int]:
    """What is odd about the rows; their pixels are compared by 64-bit hashes."""
    labelled_N = table.hash_N + table.label_N.astype(np.uint64) * np.uint64(0x9E3779B97F4A7C15)
    whole_N = labelled_N + table.font_N.astype(np.uint64) * np.uint64(0xC2B2AE3D27D4EB4F)
    return {
        "rows": len(whole_N),
        "duplicates": len(whole_N) - _num_different(whole_N),
        "under_several_labels": _num_different(labelled_N) - _num_different(table.hash_N),
        "constant": int((table.side**2 * table.squares_N == table.sum_N**2).sum()),
    }


def _num_different(value_N: np.ndarray) -> int:
    """How many values differ; np.unique takes many times as long."""
    sorted_N = np.sort(value_N)
    return int(np.count_nonzero(sorted_N[1:] != sorted_N[:-1])) + min(len(sorted_N), 1)


def warnings_of(table: Table, counts: dict[str, int]) -> list[str]:
    texts = []
    if len(table.classes) == 1:
        texts.append("there is one class only")
    if table.side < LEAST_SIDE:
        size = f"{table.side} x {table.side}"
        texts.append(
            f"images of {size} pixels cannot be trained on: networks halve them twice; "
            f"pad them to {LEAST_SIDE} x {LEAST_SIDE} or more"
        )
    if edged := [label for label in table.classes if label != label.strip()]:
        texts.append(f"labels that begin or end with a space: {', '.join(map(repr, edged[:5]))}")
    odd = {
        "duplicates": "rows repeat another one's typeface, label and pixels",
        "under_several_labels": "images occur under another label, too",
        "constant": "images have a single grey value",
    }
    return texts + [f"{counts[key]:,} {text}" for key, text in odd.items() if counts[key]]
