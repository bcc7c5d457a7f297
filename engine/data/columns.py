"""Parquet and Arrow files: tables of which one column holds images, one their labels.

Grammar: an image is a cell of bytes (its pixels row by row, or a grey PNG), of a struct with a
field `bytes` (as Hugging Face writes pictures), or a list of integers 0..255, perhaps of lists, one
per row; all of one square size. A label is an integer or a text. No cell is null. Where no name is
given, the only column that may be the images is taken, and the only one that may be their labels.

pyarrow parses these files: they are the one kind of source that a library written in C++ reads.
Arrow's data is validated before a value is looked at; nothing is memory-mapped.

Shapes: R images of a block, P pixels.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from math import isqrt
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import pyarrow as pa
from pyarrow import parquet, types

from engine.data.collect import Stored
from engine.data.filters import unfiltered
from engine.data.images import (
    MAX_SIDE,
    Names,
    Task,
    check_side,
    checked_label,
    chosen,
    rows_of,
    rows_per_block,
    unlabelled,
)
from engine.data.lexer import Rows
from engine.data.pictures import BAD_FILTER, SIGNATURE, PngFault, scanlines, size_of
from engine.data.source import File, open_file
from engine.errors import UserError

KINDS = {"parquet": "a Parquet file", "arrow": "an Arrow file"}
BUFFER_BYTES = 2**20
"""Of a column of Parquet, what is read at once."""


@dataclass(frozen=True)
class Column:
    """A column, as the file's schema describes it; an images.Part."""

    noun: ClassVar[str] = "column"
    name: str
    type: Any
    """A pyarrow.DataType."""

    def image_fault(self) -> str:
        """Why it cannot be the images, and what to do; "" if it can."""
        kind = _cell(self.type)
        if _are_bytes(kind):
            return ""
        if not _is_list(kind):
            return f"is of {self.type}, want bytes or lists of integers 0..255; write it as such"
        item = kind.value_type
        item = item.value_type if _is_list(item) else item
        if types.is_integer(item):
            return ""
        return f"is of {self.type}, want integers 0..255 in the lists; write it as such"

    def label_fault(self) -> str:
        """Why it cannot be the labels, and what to do; "" if it can."""
        kind = self.type.value_type if types.is_dictionary(self.type) else self.type
        is_text = types.is_string(kind) or types.is_large_string(kind) or types.is_string_view(kind)
        if types.is_integer(kind) or is_text:
            return ""
        return f"is of {self.type}, want integers or texts; write it as such"


class ColumnFile:
    """Images of one file, and their labels where there are any; an images.Images."""

    def __init__(self, file: File, layout: str, names: Names) -> None:
        """
        Args:
            layout: parquet or arrow.
            names: of the columns.
        Raises:
            UserError: the columns are not there, not clear, or not of the grammar, or there is no
                row.
        """
        self.name = file.name
        self._file = file
        self._kind = KINDS[layout]
        with self._parsing():
            self._table = _Parquet(file) if layout == "parquet" else _Arrow(file)
            columns = [Column(field.name, field.type) for field in self._table.schema]
        said = f"{file.name} ({self._kind})"
        images = chosen(said, columns, "images", names[0], Column.image_fault)
        self._names = [images.name]
        if names[1] is not None:
            labels = chosen(said, columns, "labels", names[1], Column.label_fault)
            self._names.append(labels.name)
        twice = [name for name in self._names if sum(c.name == name for c in columns) > 1]
        if twice:
            raise UserError(f"{said}: holds the column {twice[0]!r} twice; rename one")
        with self._parsing():
            batches = (batch for batch in self._table.batches(self._names, 1) if len(batch))
            first = next(batches, None)
        if first is None:
            raise UserError(f"{file.name}: is {self._kind} without a row; write some")
        self.side = self._side(first.column(0).slice(0, 1))
        self.num_images: int | None = self._table.num_rows
        count = "" if self.num_images is None else f"{self.num_images:,} "
        where = f"their labels in {self._names[1]!r}" if self._names[1:] else "without labels"
        self.found = (
            f"{layout}, {count}images of {self.side} x {self.side} in the column "
            f"{images.name!r} of {file.name}, {where}"
        )

    def stored(self) -> Stored | None:
        """None: they are packed, or in several places."""
        return None

    def tasks(self) -> Iterator[Task]:
        per_block = rows_per_block(self.side**2)
        first = 0
        with self._parsing():
            for batch in self._table.batches(self._names, per_block):
                for start in range(0, len(batch), per_block):
                    part = batch.slice(start, per_block)
                    yield partial(self._rows, part, first)
                    first += len(part)

    def places(self) -> Iterator[str] | None:
        """None: they have numbers."""
        return None

    def check_unchanged(self) -> None:
        self._file.check_unchanged()

    @contextmanager
    def _parsing(self) -> Iterator[None]:
        """Turn what pyarrow raises into a UserError."""
        try:
            yield
        except (pa.ArrowException, OSError, ValueError, OverflowError) as error:
            reason = str(error).partition("\n")[0][:120]
            raise UserError(
                f"{self.name}: is {self._kind} that cannot be read ({reason}); write it again"
            ) from None

    def _rows(self, batch: Any, first: int) -> Rows:
        with self._parsing():
            batch.validate(full=True)
            image_RP = self._pixels(_bare(batch.column(0)), first)
            if batch.num_columns == 1:
                return unlabelled(image_RP)
            texts, label_R = self._labels(batch.column(1), first)
        return rows_of(image_RP, texts, label_R)

    def _refusal(self, row: int, what: str) -> UserError:
        return UserError(f"{self.name}: image {row + 1}: {what}")

    def _refuse_nulls(self, column: Any, first: int, what: str) -> None:
        if column.null_count:
            place = int(np.argmin(np.asarray(column.is_valid())))
            raise self._refusal(first + place, f"{what} is null; drop the row or fill it")

    def _side(self, cell: Any) -> int:
        """The side of the images, by the first."""
        with self._parsing():
            cell.validate(full=True)
            cell = _bare(cell)
            self._refuse_nulls(cell, 0, "it")
            if _are_bytes(cell.type) and (data := cell[0].as_py()).startswith(SIGNATURE):
                try:
                    return check_side(f"{self.name}: image 1", *size_of(data))
                except PngFault as fault:
                    raise self._refusal(0, str(fault)) from None
            num_pixels = int(_lengths(cell)[0])
            if _are_nested(cell):
                height = num_pixels
                self._refuse_null_rows(cell, 0)
                _, _, width = _another_shape(cell, height) or (0, height, height)
                return check_side(f"{self.name}: image 1", height, width)
        side = isqrt(num_pixels)
        if side * side != num_pixels or not 0 < side <= MAX_SIDE:
            raise self._refusal(
                0, f"has {num_pixels:,} pixels, want a square number; pad or cut the images"
            )
        return side

    def _pixels(self, cells: Any, first: int) -> np.ndarray:
        """(R, P) uint8 of a column of images."""
        self._refuse_nulls(cells, first, "it")
        if _are_bytes(cells.type) and cells[0].as_py().startswith(SIGNATURE):
            return self._decoded(cells.to_pylist(), first)
        if _are_nested(cells):
            return self._pixels(self._joined(cells, first), first)
        length_R = _lengths(cells)
        wrong_R = length_R != self.side**2
        if wrong_R.any():
            place = int(wrong_R.argmax())
            raise self._refusal(
                first + place,
                f"has {length_R[place]:,} pixels, but the first image {self.side**2:,}; scale or "
                f"pad all to one size",
            )
        if _are_bytes(cells.type):
            return _bytes_of(cells).reshape(len(cells), -1)
        values = cells.flatten()
        if values.null_count:
            place = int(np.argmin(np.asarray(values.is_valid())))
            raise self._refusal(first + place // self.side**2, "holds a null; write a pixel")
        value_RP: np.ndarray = values.to_numpy().reshape(len(cells), -1)
        if value_RP.dtype == np.uint8:
            return value_RP
        wrong_R = (value_RP.min(1) < 0) | (value_RP.max(1) > 255)
        if wrong_R.any():
            place = int(wrong_R.argmax())
            raise self._refusal(
                first + place,
                f"holds pixels from {value_RP[place].min()} to {value_RP[place].max()}, "
                f"want 0..255; scale them",
            )
        return np.ascontiguousarray(value_RP, np.uint8)

    def _joined(self, cells: Any, first: int) -> Any:
        """Lists of pixels of lists of rows, each of `side` rows of as many."""
        self._refuse_null_rows(cells, first)
        if found := _another_shape(cells, self.side):
            place, height, width = found
            raise self._refusal(
                first + place,
                f"has {height} x {width} pixels, but the first image {self.side} x {self.side}; "
                f"scale or pad all to one size",
            )
        return pa.FixedSizeListArray.from_arrays(cells.flatten().flatten(), self.side**2)

    def _refuse_null_rows(self, cells: Any, first: int) -> None:
        rows = cells.flatten()
        if rows.null_count:
            place = int(np.argmin(np.asarray(rows.is_valid())))
            image = int(np.searchsorted(_edges(_lengths(cells)), place, "right")) - 1
            raise self._refusal(first + image, "a row of it is null; fill it")

    def _decoded(self, cells: Sequence[bytes], first: int) -> np.ndarray:
        """(R, P) uint8 of PNGs."""
        raw = []
        for place, data in enumerate(cells):
            try:
                raw.append(scanlines(data, self.side, "image 1"))
            except PngFault as fault:
                raise self._refusal(first + place, str(fault)) from None
        image_RP, wrong = unfiltered(raw, self.side)
        if wrong >= 0:
            raise self._refusal(first + wrong, BAD_FILTER)
        return image_RP

    def _labels(self, column: Any, first: int) -> tuple[list[str], np.ndarray]:
        """(Different labels, each row's index among them)."""
        encoded = column if types.is_dictionary(column.type) else column.dictionary_encode()
        self._refuse_nulls(encoded, first, "its label")
        used, label_R = np.unique(encoded.indices.to_numpy(), return_inverse=True)
        values = [encoded.dictionary[int(index)].as_py() for index in used]
        if None in values:  # a dictionary may hold one
            place = int(np.argmax(label_R == values.index(None)))
            raise self._refusal(first + place, "its label is null; drop the row or fill it")
        where = f"{self.name}: {self._names[1]!r}"
        return [checked_label(str(value), where) for value in values], label_R


class _Parquet:
    """A Parquet file's schema and batches."""

    def __init__(self, file: File) -> None:
        self._file = parquet.ParquetFile(
            file.raw,
            buffer_size=BUFFER_BYTES,
            pre_buffer=False,
            page_checksum_verification=True,
        )
        self.schema = self._file.schema_arrow
        self.num_rows: int | None = self._file.metadata.num_rows

    def batches(self, names: Sequence[str], num_rows: int) -> Iterator[Any]:
        """Batches, of at most so many rows, of these columns, the images first."""
        image, *others = names
        leaf = f"{image}.bytes" if types.is_struct(self.schema.field(image).type) else image
        columns = [leaf, *others]
        for batch in self._file.iter_batches(num_rows, columns=columns, use_threads=False):
            yield batch.select(list(names))


class _Arrow:
    """An Arrow file's or stream's schema and batches."""

    def __init__(self, file: File) -> None:
        self._file = file
        file.raw.seek(0)
        self._is_stream = file.raw.peek(6)[:6] != b"ARROW1"
        self.schema = self._open().schema
        self.num_rows: int | None = None

    def batches(self, names: Sequence[str], num_rows: int) -> Iterator[Any]:
        """Its own batches, of these columns; `num_rows` is not heeded."""
        opened = self._open(names)
        if self._is_stream:
            yield from (batch.select(list(names)) for batch in opened)
        else:
            for number in range(opened.num_record_batches):
                yield opened.get_batch(number).select(list(names))

    def _open(self, names: Sequence[str] = ()) -> Any:
        """A reader, of those columns alone if any are named."""
        fields = [self.schema.get_field_index(name) for name in names] or None
        options = pa.ipc.IpcReadOptions(included_fields=fields)
        self._file.raw.seek(0)
        opened = pa.ipc.open_stream if self._is_stream else pa.ipc.open_file
        return opened(pa.PythonFile(self._file.raw, "r"), options=options)


def _cell(kind: Any) -> Any:
    """The type of a picture's cell: of a struct, its field `bytes`."""
    if types.is_struct(kind):
        index = kind.get_field_index("bytes")
        return kind.field(index).type if index >= 0 else kind
    return kind


def _bare(cells: Any) -> Any:
    """The cells of a column, views of bytes (as polars writes them) as bytes; of structs, their
    fields `bytes`, null where a struct is."""
    if types.is_struct(cells.type):
        inside = cells.flatten()  # as field, but with the structs' own nulls
        cells = inside[cells.type.get_field_index("bytes")]
    return cells.cast(pa.large_binary()) if types.is_binary_view(cells.type) else cells


def _are_bytes(kind: Any) -> bool:
    are = (
        types.is_binary,
        types.is_large_binary,
        types.is_fixed_size_binary,
        types.is_binary_view,
    )
    return any(each(kind) for each in are)


def _is_list(kind: Any) -> bool:
    return bool(types.is_list(kind) or types.is_large_list(kind) or types.is_fixed_size_list(kind))


def _offsets(cells: Any) -> np.ndarray:
    """Where bytes begin and end in their buffer: one more than there are cells."""
    if types.is_fixed_size_binary(cells.type):
        return np.arange(cells.offset, cells.offset + len(cells) + 1) * int(cells.type.byte_width)
    kind = np.int64 if types.is_large_binary(cells.type) else np.int32
    edges: np.ndarray = np.frombuffer(cells.buffers()[1], kind)
    return edges[cells.offset : cells.offset + len(cells) + 1]


def _bytes_of(cells: Any) -> np.ndarray:
    """All bytes of cells without nulls."""
    offsets = _offsets(cells)
    data = np.frombuffer(cells.buffers()[-1], np.uint8)
    return data[int(offsets[0]) : int(offsets[-1])]


def _lengths(cells: Any) -> np.ndarray:
    """How many pixels, or rows of them, each cell without nulls holds."""
    if _are_bytes(cells.type):
        return np.diff(_offsets(cells))
    return np.asarray(cells.value_lengths())


def _are_nested(cells: Any) -> bool:
    """Whether cells are lists of rows."""
    return _is_list(cells.type) and _is_list(cells.type.value_type)


def _edges(length_R: np.ndarray) -> np.ndarray:
    """Where lists begin and end among all their items: one more than there are lists."""
    return np.concatenate([[0], np.cumsum(length_R)])


def _another_shape(cells: Any, side: int) -> tuple[int, int, int] | None:
    """(Place, height, width) of the first of lists of rows, none null, that is not side x side; a
    width is that of its first row of another length."""
    height_R = _lengths(cells)
    width_Q = _lengths(cells.flatten())  # Q rows of all images
    edges = _edges(height_R)
    wrong_R = height_R != side
    wrong_R[np.searchsorted(edges, np.flatnonzero(width_Q != side), "right") - 1] = True
    if not wrong_R.any():
        return None
    place = int(wrong_R.argmax())
    widths = width_Q[edges[place] : edges[place + 1]].tolist()
    width = next((width for width in widths if width != side), side if widths else 0)
    return place, int(height_R[place]), width


@contextmanager
def open_columns(path: Path, layout: str, names: Names) -> Iterator[ColumnFile]:
    """Open a Parquet or Arrow file.

    Args:
        layout: parquet or arrow.
        names: of the columns.
    Raises:
        UserError: it cannot be read, or its columns are refused.
    """
    with open_file(path) as file:
        yield ColumnFile(file, layout, names)
