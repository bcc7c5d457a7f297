"""The rows of all blocks, collected in order: texts in one index, pixels in a spool.

Shapes: N rows of the CSV, M of them, R rows of a block, P pixels, W rows of a window.
"""

import os
import shutil
import tempfile
import unicodedata
from pathlib import Path

import numpy as np

from engine.data.lexer import Fault, Layout, Lexer, Rows, read_header, read_row
from engine.data.records import FONTS_LIMIT_BYTES, MAX_CLASSES
from engine.data.source import Source
from engine.data.table import Table
from engine.errors import UserError

MAX_FAULTS = 100
SPOOL_WINDOW_BYTES = 8 * 2**20


class Spool:
    """Rows of pixels in an unnamed file on the target's disk."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._file = tempfile.TemporaryFile(dir=folder, buffering=0)  # noqa: SIM115
        self._num_pixels = 0

    def append(self, image_RP: np.ndarray) -> None:
        self._num_pixels = image_RP.shape[1]
        view = image_RP.reshape(-1).data
        while len(view):
            view = view[self._file.write(view) :]

    def take(self, row_M: np.ndarray) -> np.ndarray:
        """The pixels (M, P) of ascending row numbers; may be called from several threads."""
        out_MP = np.empty((len(row_M), self._num_pixels), np.uint8)
        window_WP = np.empty(
            (max(SPOOL_WINDOW_BYTES // self._num_pixels, 1), self._num_pixels), np.uint8
        )
        start = 0
        while start < len(row_M):
            first = int(row_M[start])
            stop = int(np.searchsorted(row_M, first + len(window_WP)))
            num_rows = int(row_M[stop - 1]) - first + 1
            got = os.preadv(
                self._file.fileno(), [window_WP[:num_rows].data], first * self._num_pixels
            )
            assert got == num_rows * self._num_pixels, "the spool ended early"
            np.take(
                window_WP, row_M[start:stop] - first, axis=0, out=out_MP[start:stop], mode="clip"
            )
            start = stop
        return out_MP

    def check_space(self, source: Source, layout: Layout, line_bytes: float) -> None:
        """Refuse what will not fit, by its first lines, before a byte is written."""
        free = shutil.disk_usage(self.folder).free
        needed = int(2 * source.size / line_bytes * layout.num_pixels) if source.size else 0
        if needed > free:
            raise UserError(
                f"{self.folder}: has {free:,} bytes free, want {needed:,} "
                f"for the records and a copy"
            )

    def close(self) -> None:
        self._file.close()


class Collector:
    """The rows of all blocks in order: texts in one index, pixels in the spool; the first fault
    is an error, or the first MAX_FAULTS go into `faults`."""

    def __init__(
        self, source: str, header: bytes, spool: Spool | None, faults: list[str] | None
    ) -> None:
        try:
            self.layout = read_header(header)
        except Fault as fault:
            raise UserError(f"{source}:1: {fault}") from None
        self.row = 0
        """Rows so far, with those that were refused."""
        self._source = source
        self._spool = spool
        self._faults = faults
        self._labels: dict[str, int] = {}
        self._fonts: dict[str, int] = {}
        self._looks: dict[str, tuple[str, int]] = {}
        self._font_bytes = 0
        self._parts: list[tuple[np.ndarray, ...]] = []

    def add_block(
        self, rows: Rows, lex: Lexer, buffer: bytearray, stop: int, image_RP: np.ndarray
    ) -> bool:
        """Take a block's rows; where faults are listed, those behind each faulty line, too.
        Whether to go on."""
        while True:
            after = buffer.index(b"\n", rows.fault) + 1 if rows.fault >= 0 else stop
            try:
                self.add(rows, bytes(buffer[rows.fault : after]) if rows.fault >= 0 else b"")
            except UserError as error:
                if self._faults is None:
                    raise
                self._faults.append(str(error))
                if len(self._faults) == MAX_FAULTS:
                    return False
            if after == stop:
                return True
            rows = lex(self.layout, np.frombuffer(buffer, np.uint8), after, stop, image_RP)

    def add(self, rows: Rows, faulty_line: bytes) -> None:
        """Take a block's rows; UserError if one, or `faulty_line` after them, is refused."""
        first = self.row
        self.row += len(rows.label_R) + bool(faulty_line)
        label_R, new_labels = _merge(self._labels, rows.labels, rows.label_R)
        font_R, new_fonts = _merge(self._fonts, rows.fonts, rows.font_R)
        for label in new_labels:
            self._check_label(label, first + int((label_R == self._labels[label]).argmax()) + 1)
        self._font_bytes += sum(len(font.encode()) for font in new_fonts)
        if self._font_bytes > FONTS_LIMIT_BYTES:
            raise UserError(
                f"{self._source}: holds more than {FONTS_LIMIT_BYTES} bytes of names; "
                f"are they typefaces?"
            )
        self._parts.append((label_R, font_R, rows.sum_R, rows.squares_R, rows.hash_R))
        if self._spool is not None:
            self._spool.append(rows.image_RP)
        if faulty_line:
            try:
                read_row(faulty_line, self.layout)
            except Fault as fault:
                raise self._refusal(self.row, fault) from None
            raise AssertionError(
                f"{self._source}: the lexers disagree on row {self.row}: {faulty_line[:99]!r}"
            )

    def table(self) -> Table:
        """All rows, with labels and fonts sorted by code point."""
        label_N, font_N, *numbers = (
            np.concatenate(part) for part in zip(*self._parts, strict=True)
        )
        classes, label_rank = _sorted(self._labels)
        fonts, font_rank = _sorted(self._fonts)
        label_N = label_rank[label_N].astype(np.uint8)
        font_N = font_rank[font_N]
        return Table(self.layout.side, classes, fonts, label_N, font_N, *numbers)

    def _check_label(self, label: str, row: int) -> None:
        column = self.layout.num_text
        other, other_row = self._looks.setdefault(unicodedata.normalize("NFC", label), (label, row))
        if other != label:
            what = (
                f"{label!r} looks like the label of row {other_row} but has other code points; "
                f"write one of them"
            )
            raise self._refusal(row, Fault(what, column))
        if self._labels[label] >= MAX_CLASSES:
            hint = (
                "are names and labels swapped?"
                if self.layout.has_fonts
                else "is the column an id, a row number, or a value to predict (regression)?"
            )
            raise self._refusal(row, Fault(f"more than {MAX_CLASSES} labels; {hint}", column))

    def _refusal(self, row: int, fault: Fault) -> UserError:
        column = (
            f", column {fault.column} {self.layout.columns[fault.column - 1]!r}"
            if fault.column
            else ""
        )
        return UserError(f"{self._source}:{row + 1} (row {row}{column}): {fault}")


def _merge(
    index: dict[str, int], texts: list[str], id_R: np.ndarray
) -> tuple[np.ndarray, list[str]]:
    """A block's ids as ids of `index`, and the texts that are new to it."""
    known = len(index)
    used = texts[: id_R.max(initial=-1) + 1]
    ids = np.array([index.setdefault(text, len(index)) for text in used], np.int32)
    return ids[id_R], [text for text in used if index[text] >= known]


def _sorted(index: dict[str, int]) -> tuple[tuple[str, ...], np.ndarray]:
    """The texts by code point, and each id's place among them."""
    texts = sorted(index)
    return tuple(texts), np.argsort([index[text] for text in texts]).astype(np.int32)
