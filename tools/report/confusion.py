"""What a network reads in place of what: counted over the test split, and as tables for the report.

Shapes: N samples, T x R true and read classes, H x W pixels. torch is imported only to count.
"""

import base64
import io
import string
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import pandas as pd
from PIL import Image

from tools.measure.results import Confusion, Example

if TYPE_CHECKING:
    from engine.train.session import Session

LOOKALIKES = ("O0o", "lI1|", *(c + c.upper() for c in string.ascii_lowercase if c not in "ilo"))
NUM_EXAMPLES = 24


def confusion_of(session: "Session") -> Confusion:
    """What is read in place of what in the test split, and a glyph of each frequent confusion.

    By the step's own logits, in the order of the split, on one rank, which reads all of it.
    """
    from engine.train.answers import answers

    split, classes = session.records.split("test"), session.records.classes
    answer_N = answers(session.step.objective.logits, split.image_NHW, session.world.device)
    count_TR = np.zeros((len(classes), len(classes)), int)
    np.add.at(count_TR, (split.label_N, answer_N), 1)
    wrong = [(-count_TR[t, r], t, r) for t, r in np.argwhere(count_TR) if t != r]
    rows = [
        np.argmax((split.label_N == t) & (answer_N == r))
        for _, t, r in sorted(wrong)[:NUM_EXAMPLES]
    ]
    return Confusion(
        classes=list(classes),
        counts=[(int(t), int(r), int(count_TR[t, r])) for t, r in np.argwhere(count_TR)],
        examples=[
            _example(split.image_NHW[row], split.label_N[row], answer_N[row]) for row in rows
        ],
    )


def _example(image_HW: np.ndarray, true: int, read: int) -> Example:
    height, width = image_HW.shape
    pixels = base64.b64encode(image_HW.tobytes()).decode()
    return Example(true=int(true), read=int(read), height=height, width=width, pixels=pixels)


def matrices(confusion: Confusion) -> tuple[np.ndarray, np.ndarray]:
    """count_TR, and share_TR of the true class."""
    count_TR = np.zeros([len(confusion.classes)] * 2, int)
    for true, read, count in confusion.counts:
        count_TR[true, read] = count
    return count_TR, count_TR / np.maximum(count_TR.sum(1, keepdims=True), 1)


def class_table(classes: list[str], count_TR: np.ndarray) -> pd.DataFrame:
    """A row a class that was seen, the lowest accuracy first."""
    table = pd.DataFrame(
        {"class": classes, "test images": count_TR.sum(1), "right": count_TR.diagonal()}
    )
    table = table[table["test images"] > 0]
    table["accuracy_fraction"] = table["right"] / table["test images"]
    return table.sort_values("accuracy_fraction", kind="stable")


def lookalikes(
    classes: list[str], count_TR: np.ndarray, most: int
) -> tuple[pd.DataFrame, list[int]]:
    """Confusions within LOOKALIKES, most frequent first, and the most confused groups' classes."""
    index = {label: number for number, label in enumerate(classes)}
    groups = [[index[label] for label in group if label in index] for group in LOOKALIKES]
    inner = [
        [(t, r) for t in group for r in group if t != r and count_TR[t, r]] for group in groups
    ]
    rows = [
        (classes[t], classes[r], count_TR[t, r], count_TR[t, r] / count_TR[t].sum())
        for i in inner
        for t, r in i
    ]
    table = pd.DataFrame(rows, columns=["true", "read as", "times", "share_fraction"])
    confused = sorted(range(len(groups)), key=lambda g: -sum(count_TR[pair] for pair in inner[g]))
    chosen = [number for g in confused if inner[g] for number in groups[g]]
    return table.sort_values("times", ascending=False, kind="stable"), chosen[:most]


@dataclass(frozen=True)
class Glyph:
    """An example as the page shows it: labels, how often, and a PNG in base64, black on white."""

    true: str
    read: str
    count: int
    png: str


def glyph(example: Example, classes: list[str], count_TR: np.ndarray) -> Glyph:
    """An example for the page."""
    png = io.BytesIO()
    pixels = np.frombuffer(base64.b64decode(example.pixels), np.uint8)
    Image.fromarray(255 - pixels.reshape(example.height, example.width)).save(png, "png")
    return Glyph(
        true=classes[example.true],
        read=classes[example.read],
        count=int(count_TR[example.true, example.read]),
        png=base64.b64encode(png.getvalue()).decode(),
    )
