"""What a run with `--serve` leaves for its page beside metrics.jsonl: live.jsonl and glyphs.png.

A line is written where the trainer reads its log anyway, or has evaluated; nothing more waits for
the device. It is not needed to go on, so a disk that refuses ends it and nothing else. Who reads it
is tools/report/live.py.

Shapes: S steps, C classes, M images of one class, H x W pixels.
"""

import io
import json
import math
from collections.abc import Callable
from dataclasses import asdict, dataclass
from itertools import pairwise
from pathlib import Path

import numpy as np

from engine.data.records import Split
from engine.durable import Damaged, parse_json, remove_leftovers, write_file
from engine.train.folder import Position
from engine.typed import typed

LIVE = "live.jsonl"
GLYPHS = "glyphs.png"
MOST_LOSSES = 20
"""Points of the loss curve in a reading."""
MOST_PAIRS = 48
"""Confusions in an evaluation, the most frequent first."""
NUM_SEEN = 16
"""Images of a class of which the most usual one is its glyph."""


@dataclass(frozen=True, kw_only=True)
class Memory:
    """What the machine said at a reading of the log; None: not reported."""

    host_peak_rss_gib: float
    device_used_gib: float | None
    gpu_utilisation_percent: float | None
    power_w: float | None


@dataclass(frozen=True, kw_only=True)
class Reading:
    """Steps trained since the line before."""

    num_steps: int
    samples_per_s: float
    losses: list[float | None]
    """Means of equal parts of these steps; None: no loss in it was finite."""
    memory: Memory


@dataclass(frozen=True, kw_only=True)
class Evaluation:
    """A whole split evaluated, and the most frequent confusions."""

    split: str
    loss: float
    accuracy_fraction: float
    pairs: list[tuple[int, int, int]]
    """True class, class read, times."""


@dataclass(frozen=True, kw_only=True)
class Line:
    """A line of live.jsonl, one of the two; and where the run stood."""

    step: int
    """Steps trained, as in metrics.jsonl."""
    num_epochs: float
    train_s: float
    reading: Reading | None = None
    evaluation: Evaluation | None = None


def parse_line(text: bytes) -> Line | None:
    """A line of live.jsonl; None where it is none, as one that is being written."""
    try:
        return typed(Line, parse_json(text, LIVE), LIVE)
    except Damaged:
        return None


class Live:
    """Writes RUN's lines, on rank 0."""

    def __init__(self, out: Path, steps_per_epoch: int, say: Callable[[str], None]) -> None:
        self._path = out / LIVE
        self._steps_per_epoch = steps_per_epoch
        self._say = say
        self._is_on = True

    def start(self, position: Position, train: Split, num_classes: int) -> None:
        """Keep the lines up to `position`, where a run goes on, and draw a glyph of each class."""

        def write() -> None:
            for name in (LIVE, GLYPHS):
                remove_leftovers(self._path.with_name(name))
            old = self._path.read_bytes().splitlines(keepends=True) if self._path.exists() else []
            read = [(parse_line(text), text) for text in old]
            kept = [text for line, text in read if line and line.step <= position.number]
            write_file(self._path, b"".join(kept))
            write_file(self._path.with_name(GLYPHS), glyphs(train, num_classes))

        self._attempt(write)

    def trained(
        self, position: Position, loss_S: np.ndarray, samples_per_s: float, memory: Memory
    ) -> None:
        """Add what was trained since the last reading, if anything was."""
        if not len(loss_S):
            return
        parts = np.array_split(loss_S, min(MOST_LOSSES, len(loss_S)))
        finite = [part[np.isfinite(part)] for part in parts]
        losses = [float(part.mean()) if len(part) else None for part in finite]
        reading = Reading(
            num_steps=len(loss_S), samples_per_s=samples_per_s, losses=losses, memory=memory
        )
        self._add(position, reading=reading)

    def evaluated(
        self, position: Position, split: str, scores: tuple[float, float], count_CC: np.ndarray
    ) -> None:
        """Add an evaluation; `scores` are loss and accuracy. One that ends the run is left out."""
        if not math.isfinite(scores[0]):
            return
        wrong_CC = count_CC * (1 - np.eye(len(count_CC), dtype=int))
        most = np.argsort(-wrong_CC, axis=None, kind="stable")[:MOST_PAIRS]
        cells = zip(*np.unravel_index(most, wrong_CC.shape), strict=True)
        pairs = [(int(true), int(read), int(wrong_CC[true, read])) for true, read in cells]
        evaluation = Evaluation(
            split=split,
            loss=scores[0],
            accuracy_fraction=scores[1],
            pairs=[pair for pair in pairs if pair[2]],
        )
        self._add(position, evaluation=evaluation)

    def _add(
        self,
        position: Position,
        reading: Reading | None = None,
        evaluation: Evaluation | None = None,
    ) -> None:
        line = Line(
            step=position.number,
            num_epochs=position.epoch + position.step / self._steps_per_epoch,
            train_s=position.train_s,
            reading=reading,
            evaluation=evaluation,
        )
        text = json.dumps(asdict(line), allow_nan=False) + "\n"

        def write() -> None:
            with open(self._path, "a", encoding="ascii") as file:
                file.write(text)

        self._attempt(write)

    def _attempt(self, write: Callable[[], None]) -> None:
        if not self._is_on:
            return
        try:
            write()
        except OSError as error:
            self._is_on = False
            why = f"cannot be written ({error.strerror or error})"
            self._say(f"note: {self._path}: {why}; the page stands still, training goes on")


def glyphs(split: Split, num_classes: int) -> bytes:
    """A PNG of H x (C W) pixels, black on white: a glyph of each class, or nothing."""
    from PIL import Image

    order_N = np.argsort(split.label_N, kind="stable")
    first_C = np.searchsorted(split.label_N[order_N], np.arange(num_classes + 1))
    strip_CHW = np.zeros((num_classes, *split.height_width), np.uint8)
    for number, (start, stop) in enumerate(pairwise(first_C)):
        row_M = np.sort(order_N[start:stop][:NUM_SEEN])
        if len(row_M):
            strip_CHW[number] = _most_usual(split.image_NHW[row_M])
    png = io.BytesIO()
    Image.fromarray(255 - np.concatenate(list(strip_CHW), axis=1)).save(png, "png")
    return png.getvalue()


def _most_usual(image_MHW: np.ndarray) -> np.ndarray:
    """image_HW: of these the nearest to their mean."""
    pixel_MHW = image_MHW.astype(np.float32)
    far_M = np.square(pixel_MHW - pixel_MHW.mean(0)).sum((1, 2))
    usual_HW: np.ndarray = image_MHW[far_M.argmin()]
    return usual_HW
