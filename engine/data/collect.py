"""The rows of all blocks, collected in order: texts in one index, pixels in a spool.

Does not: read a file; blocks come as lexer.Rows, of a CSV or of a file of images.

Shapes: N rows of the source, M of them, R rows of a block, P pixels, W rows of a window.
"""

import os
import shutil
import tempfile
import unicodedata
from pathlib import Path

import numpy as np

from engine.data.arrange import REFUSED_LINE, Arrangement
from engine.data.lexer import MAX_FAULTS, Fault, Layout, Lexer, Rows, read_header, read_row
from engine.data.record_file import FONTS_LIMIT_BYTES
from engine.data.records import MAX_CLASSES
from engine.data.source import changed, reading
from engine.data.table import Table
from engine.errors import UserError

SPOOL_WINDOW_BYTES = 8 * 2**20


class Stored:
    """Rows of pixels in an open file, one behind the other."""

    def __init__(self, name: str, handle: int, offset: int, num_pixels: int) -> None:
        """`offset`: of the first pixel. `handle` stays its opener's."""
        self.name = name
        self._handle = handle
        self._offset = offset
        self._num_pixels = num_pixels

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
            self.read(first, window_WP[:num_rows])
            np.take(
                window_WP, row_M[start:stop] - first, axis=0, out=out_MP[start:stop], mode="clip"
            )
            start = stop
        return out_MP

    def read(self, row: int, out_MP: np.ndarray) -> None:
        """Fill `out_MP` from `row` on; UserError where the file cannot be read, or ends."""
        view = out_MP.reshape(-1).data
        place = self._offset + row * self._num_pixels
        with reading(self.name):
            while len(view):
                if not (got := os.preadv(self._handle, [view], place)):
                    raise changed(self.name)
                view = view[got:]
                place += got


class Spool(Stored):
    """Rows of pixels in an unnamed file on the target's disk."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._file = tempfile.TemporaryFile(dir=folder, buffering=0)  # noqa: SIM115
        super().__init__(str(folder), self._file.fileno(), 0, 0)

    def append(self, image_RP: np.ndarray) -> None:
        self._num_pixels = image_RP.shape[1]
        view = image_RP.reshape(-1).data
        while len(view):
            view = view[self._file.write(view) :]

    def check_space(self, num_pixels: int, *, is_stored: bool = False) -> None:
        """Refuse what will not fit, by its first lines or its header, before a byte is written.

        Args:
            is_stored: the source holds the pixels as they are: none will be spooled.
        """
        if is_stored:
            check_space(self.folder, num_pixels, "the records")
        else:
            check_space(self.folder, 2 * num_pixels, "the records and a copy")

    def close(self) -> None:
        self._file.close()


def check_space(folder: Path, needed: int, what: str) -> None:
    """Refuse to write so many bytes into `folder` where the disk has fewer."""
    free = shutil.disk_usage(folder).free
    if needed > free:
        raise UserError(f"{folder}: has {free:,} bytes free, want {needed:,} for {what}")


class Collector:
    """The rows of all blocks in order: texts in one index, pixels in the spool."""

    unit = "image"
    """What sentences call a row."""

    def __init__(self, side: int, spool: Spool | None) -> None:
        """`side`: of the images, once it is known."""
        self.side = side
        self.source = ""
        """The file whose rows come now."""
        self.row = 0
        """Rows so far, with those that were refused."""
        self.first = 0
        """Of them, those of files before this one."""
        self.starts: list[tuple[str, int]] = []
        """Each file so far, and the rows before it."""
        self._spool = spool
        self._labels: dict[str, int] = {}
        self._fonts: dict[str, int] = {}
        self._looks: dict[str, tuple[str, str, str]] = {}
        """By its normal form, the first such label: as it is, its row, its source."""
        self._font_bytes = 0
        self._parts: list[tuple[np.ndarray, ...]] = []

    def begin(self, source: str) -> None:
        """The rows that come next are those of this file."""
        self.source = source
        self.first = self.row
        self.starts.append((source, self.row))

    def stretches(self) -> list[tuple[str, range]]:
        """Each file in turn, and which of all rows, from 0 on, are its own."""
        stops = [first for _, first in self.starts[1:]]
        return [
            (source, range(first, stop))
            for (source, first), stop in zip(self.starts, [*stops, self.row], strict=True)
        ]

    def add(self, rows: Rows) -> None:
        """Take a block's rows; UserError if a label of theirs is refused."""
        first = self.row
        self.row += len(rows.label_R)
        label_R, new_labels = _merge(self._labels, rows.labels, rows.label_R)
        font_R, new_fonts = _merge(self._fonts, rows.fonts, rows.font_R)
        for label in new_labels:
            self._check_label(label, first + int((label_R == self._labels[label]).argmax()) + 1)
        self._font_bytes += sum(len(font.encode()) for font in new_fonts)
        if self._font_bytes > FONTS_LIMIT_BYTES:
            raise UserError(
                f"{self.source}: holds more than {FONTS_LIMIT_BYTES} bytes of names; "
                f"are they typefaces?"
            )
        self._parts.append((label_R, font_R, rows.sum_R, rows.squares_R, rows.hash_R))
        if self._spool is not None:
            self._spool.append(rows.image_RP)

    def table(self) -> Table:
        """All rows, with labels and fonts sorted by code point."""
        label_N, font_N, *numbers = (
            np.concatenate(part) for part in zip(*self._parts, strict=True)
        )
        classes, label_rank = _sorted(self._labels)
        fonts, font_rank = _sorted(self._fonts)
        label_N = label_rank[label_N].astype(np.uint8)
        font_N = font_rank[font_N]
        return Table(self.side, classes, fonts, label_N, font_N, *numbers)

    def place(self, source: str, row: int) -> str:
        """Where a row of a file, from 1 on, stands."""
        return f"{source}: {self.unit} {row}"

    def refusal(self, row: int, fault: Fault) -> UserError:
        """Of a row, counted from 1 over all files."""
        return UserError(f"{self.place(self.source, row - self.first)}: {fault}")

    def _check_label(self, label: str, row: int) -> None:
        there = f"{self.unit} {row - self.first}"
        look = unicodedata.normalize("NFC", label)
        other, place, source = self._looks.setdefault(look, (label, there, self.source))
        if other != label:
            place += f" of {source}" if source != self.source else ""
            what = (
                f"{label!r} looks like the label of {place} but has other code points; "
                f"write one of them"
            )
            raise self.refusal(row, Fault(what, self._label_column()))
        if self._labels[label] >= MAX_CLASSES:
            what = f"more than {MAX_CLASSES} labels; {self._hint_of_many()}"
            raise self.refusal(row, Fault(what, self._label_column()))

    def _label_column(self) -> int:
        """Where in a row the label stands, from 1 on; 0: rows have no columns."""
        return 0

    def _hint_of_many(self) -> str:
        """Why there may be too many labels."""
        return "are they row numbers, or values to predict (regression)?"


class CsvCollector(Collector):
    """Of a CSV's blocks; the first fault is an error, or the first MAX_FAULTS go into `faults`."""

    unit = "row"

    def __init__(
        self, source: str, header: bytes, spool: Spool | None, faults: list[str] | None
    ) -> None:
        self.layout = header_of(source, header)
        super().__init__(self.layout.side, spool)
        self.begin(source)
        self.arrangement: Arrangement | None = None
        """Of this file's columns, where they stand otherwise than the lexer sees them."""
        self.arranging_faults: dict[int, Fault] = {}
        """By row of this file: why REFUSED_LINE stands in its place."""
        self._faults = faults

    def add_block(
        self, rows: Rows, lex: Lexer, buffer: bytearray, stop: int, image_RP: np.ndarray
    ) -> bool:
        """Take a block's rows; where faults are listed, those behind each faulty line, too.
        Whether to go on."""
        while True:
            after = buffer.index(b"\n", rows.fault) + 1 if rows.fault >= 0 else stop
            try:
                self.add_rows(rows, bytes(buffer[rows.fault : after]) if rows.fault >= 0 else b"")
            except UserError as error:
                if self._faults is None:
                    raise
                self._faults.append(str(error))
                if len(self._faults) == MAX_FAULTS:
                    return False
            if after == stop:
                return True
            rows = lex(self.layout, np.frombuffer(buffer, np.uint8), after, stop, image_RP)

    def add_rows(self, rows: Rows, faulty_line: bytes) -> None:
        """Take a block's rows; UserError if one, or `faulty_line` after them, is refused."""
        try:
            self.add(rows)
        finally:  # a refused label is a fault of its own: the faulty line is counted all the same
            self.row += bool(faulty_line)
        if faulty_line:
            known = self.arranging_faults.get(self.row - self.first)
            if known and faulty_line == REFUSED_LINE + b"\n":
                raise self.refusal(self.row, known)
            try:
                read_row(faulty_line, self.layout)
            except Fault as fault:
                raise self.refusal(self.row, fault) from None
            raise AssertionError(
                f"{self.source}: the lexers disagree on row {self.row}: {faulty_line[:99]!r}"
            )

    def place(self, source: str, row: int) -> str:
        has_header = self.arrangement is None or bool(self.arrangement.names)
        return f"{source}:{row + has_header}"

    def refusal(self, row: int, fault: Fault) -> UserError:
        row -= self.first
        column = ""
        if self.arrangement is None and fault.column:
            column = f", column {fault.column} {self.layout.columns[fault.column - 1]!r}"
        elif self.arrangement is not None and fault.column:
            column = f", column {self.arrangement.column_of(fault.column)}"
        return UserError(f"{self.place(self.source, row)} (row {row}{column}): {fault}")

    def _label_column(self) -> int:
        return self.layout.num_text

    def _hint_of_many(self) -> str:
        if self.layout.has_fonts:
            return "are names and labels swapped?"
        return "is the column an id, a row number, or a value to predict (regression)?"


def header_of(source: str, line: bytes) -> Layout:
    """The layout that a CSV's first line declares; UserError if it is no header of ours."""
    try:
        return read_header(line)
    except Fault as fault:
        raise UserError(f"{source}:1: {fault}") from None


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
