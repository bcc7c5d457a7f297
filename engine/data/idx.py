"""IDX, MNIST's binary format: a file of images and one of their labels, each perhaps a gzip; or
images alone.

Grammar: two zero bytes, the type (8: uint8, the only one taken), the number of axes (3 of images, 1
of labels), each axis' length as a big-endian uint32, then the values and nothing behind them.

Source: http://yann.lecun.com/exdb/mnist, "the IDX file format".

Shapes: R images of a block, P pixels.
"""

import math
import struct
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from functools import partial
from pathlib import Path

import numpy as np

from engine.data.collect import Stored
from engine.data.foreign import IDX_TYPES, is_idx
from engine.data.images import (
    Task,
    check_side,
    numbered,
    rows_of,
    rows_per_block,
    unlabelled,
)
from engine.data.lexer import Rows
from engine.data.source import Source, open_source
from engine.errors import UserError

UINT8 = 8
KINDS = {1: "labels", 2: "vectors", 3: "images", 4: "images of several colours"}
"""What a file of so many axes holds."""
IMAGE_AXES, LABEL_AXES = 3, 1
USAGE = "give pairs, images then labels: tools/pack_tmnist IMAGES LABELS OUT"
USAGE_ALONE = "leave it out, or give pairs of images and labels without --label-column none"
AGAIN = "download or write it again"


class IdxFile:
    """One file: its header read and checked, its values next."""

    def __init__(self, source: Source, num_axes: int, usage: str = USAGE) -> None:
        """
        Args:
            usage: what to give instead, for the sentences.
        Raises:
            UserError: it is no IDX file of so many axes of uint8, or, where that is known from its
                size, it is longer or shorter than its header says.
        """
        self.source = source
        head = self._read(4)
        if not is_idx(head):
            source.refuse_foreign(head + self._read(508))
            raise UserError(
                f"{source.name}: is no IDX file of {KINDS[num_axes]} "
                f"(it begins with {head.hex(' ') or 'nothing'}); {usage}"
            )
        found = KINDS[head[3]]
        if head[3] != num_axes:
            raise UserError(
                f"{source.name}: is an IDX file of {found} where {KINDS[num_axes]} are expected; "
                f"{usage}"
            )
        if head[2] != UINT8:
            raise UserError(
                f"{source.name}: holds {found} of {IDX_TYPES[head[2]]}, want uint8 (0..255); "
                f"write it as uint8"
            )
        self.offset = 4 + 4 * num_axes
        lengths = self._read(4 * num_axes)
        if len(lengths) < 4 * num_axes:
            raise UserError(f"{source.name}: ends within its header; {AGAIN}")
        self.shape: tuple[int, ...] = struct.unpack(f">{num_axes}I", lengths)
        self._check_size()

    def fill(self, values: np.ndarray) -> None:
        """Read the next values into `values`, uint8; UserError where the file ends."""
        if self.source.readinto(values.reshape(-1).data) < values.size:
            raise UserError(
                f"{self.source.name}: ends before the {self.shape[0]:,} {KINDS[len(self.shape)]} "
                f"that its header declares; {AGAIN}"
            )

    def check_end(self) -> None:
        """UserError if anything stands behind the last value."""
        if self._read(1):
            raise UserError(
                f"{self.source.name}: goes on behind the {self.shape[0]:,} "
                f"{KINDS[len(self.shape)]} that its header declares; {AGAIN}"
            )

    def _read(self, num_bytes: int) -> bytes:
        data = bytearray(num_bytes)
        return bytes(data[: self.source.readinto(memoryview(data))])

    def _check_size(self) -> None:
        want = self.offset + math.prod(self.shape)
        got = self.source.size
        if got is not None and got != want:
            axes = " x ".join(f"{length:,}" for length in self.shape)
            raise UserError(
                f"{self.source.name}: has {got:,} bytes, want {want:,} for the "
                f"{axes} values that its header declares; {AGAIN}"
            )


class IdxImages:
    """Images, and their labels where there are any; an images.Images."""

    def __init__(self, images: Source, labels: Source | None) -> None:
        """UserError if the headers are refused, or do not fit each other."""
        self._images = IdxFile(images, IMAGE_AXES, USAGE if labels else USAGE_ALONE)
        self._labels = IdxFile(labels, LABEL_AXES) if labels else None
        self.name = images.name
        self.num_images, height, width = self._images.shape
        if not self.num_images:
            raise UserError(f"{images.name}: holds no images; {AGAIN}")
        if self._labels and self._labels.shape != (self.num_images,):
            raise UserError(
                f"{self._labels.source.name}: holds {self._labels.shape[0]:,} labels, but "
                f"{images.name} {self.num_images:,} images; give files that belong together"
            )
        self.side = check_side(images.name, height, width)
        where = f"their labels in {labels.name}" if labels else "without labels"
        self.found = (
            f"IDX, {self.num_images:,} images of {height} x {width} in {images.name}, {where}"
        )

    def stored(self) -> Stored | None:
        source = self._images.source
        if source.is_packed or not source.is_file:
            return None
        return Stored(source.name, source.raw.fileno(), self._images.offset, self.side**2)

    def tasks(self) -> Iterator[Task]:
        stored = self.stored()
        per_block = rows_per_block(self.side**2)
        for first in range(0, self.num_images, per_block):
            num = min(per_block, self.num_images - first)
            label_R = self._next_labels(num)
            image_RP = np.empty((num, self.side**2), np.uint8)
            if stored:
                yield partial(_read_rows, stored, first, image_RP, label_R)
            else:
                self._images.fill(image_RP)
                yield partial(_rows, image_RP, label_R)
        if self._labels:
            self._labels.check_end()
        if not stored:
            self._images.check_end()

    def _next_labels(self, num: int) -> np.ndarray | None:
        if self._labels is None:
            return None
        label_R = np.empty(num, np.uint8)
        self._labels.fill(label_R)
        return label_R

    def places(self) -> Iterator[str] | None:
        """None: they have numbers."""
        return None

    def check_unchanged(self) -> None:
        self._images.source.check_unchanged()
        if self._labels:
            self._labels.source.check_unchanged()


def _read_rows(
    stored: Stored, first: int, image_RP: np.ndarray, label_R: np.ndarray | None
) -> Rows:
    stored.read(first, image_RP)
    return _rows(image_RP, label_R)


def _rows(image_RP: np.ndarray, label_R: np.ndarray | None) -> Rows:
    return unlabelled(image_RP) if label_R is None else rows_of(image_RP, *numbered(label_R))


@contextmanager
def open_idx(images: Path, labels: Path | None = None) -> Iterator[IdxImages]:
    """Open a pair of files, or images alone.

    Raises:
        UserError: one cannot be read, is no IDX file of its kind, or they do not fit each other.
    """
    with ExitStack() as stack:
        opened = stack.enter_context(open_source(images))
        opened_labels = stack.enter_context(open_source(labels)) if labels else None
        yield IdxImages(opened, opened_labels)
