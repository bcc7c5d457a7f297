"""NumPy's .npz: a zip of arrays, of which one holds images and one their labels.

Grammar: a member NAME.npy of format 1 or 2, of uint8, in C's order, with the axes images, rows,
columns; and one of as many integers or texts, with one axis or a second of length 1. Where no name
is given, the only array that may be the images is taken, and the only one that may be their labels;
two are refused. Arrays of Python objects are pickles, and never opened.

Source: https://numpy.org/doc/stable/reference/generated/numpy.lib.format.html

Shapes: R images of a block, P pixels.
"""

import io
import math
import struct
import sys
import zipfile
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from tokenize import TokenError
from typing import IO, ClassVar, NamedTuple

import numpy as np
from numpy.lib import format as npy

from engine.data.collect import Stored
from engine.data.images import (
    Names,
    Task,
    check_side,
    checked_label,
    chosen,
    numbered,
    rows_of,
    rows_per_block,
    unlabelled,
)
from engine.data.lexer import FIELD_LIMIT_BYTES, Rows
from engine.data.source import File, open_file, unzipping
from engine.errors import UserError

MOST_MEMBERS = 1000
HEAD_BYTES = 12_000
"""Of a member: NumPy itself takes headers of at most 10,000 characters."""
LOCAL_HEADER = struct.Struct("<26xHH")
"""Of a zip's member, before its name: the lengths of the name and of extras."""
USE_SAVEZ = "write it again with np.savez"


@dataclass(frozen=True)
class Array:
    """A member of the zip, as its header describes it; an images.Part."""

    noun: ClassVar[str] = "array"

    name: str
    """Without .npy."""
    info: zipfile.ZipInfo
    shape: tuple[int, ...]
    dtype: np.dtype
    in_c_order: bool
    offset: int
    """Of its first value, in the member."""

    def image_fault(self) -> str:
        """Why it cannot be the images, and what to do; "" if it can."""
        if self.dtype.hasobject:
            return "holds Python objects, which are pickles that could run code; save numbers"
        if self.dtype != np.uint8:
            scaled = " (0..1 times 255)" if self.dtype.kind == "f" else ""
            return f"is of {self.dtype}, want uint8 (0..255); save it as uint8{scaled}"
        if len(self.shape) != 3:
            return f"has the shape {self.shape}, want (images, rows, columns); reshape it"
        if not self.in_c_order:
            return "is in Fortran's order; save np.ascontiguousarray of it"
        return "" if self.shape[0] else "holds no images; save some"

    def label_fault(self, num_images: int) -> str:
        """Why it cannot be the labels of so many images, and what to do; "" if it can."""
        if self.dtype.hasobject:
            return "holds Python objects, which are pickles that could run code; save texts (str)"
        if self.dtype.kind not in "iuUS" or not self.dtype.itemsize:
            return f"is of {self.dtype}, want integers or texts; save it as such"
        if self.dtype.itemsize > 4 * FIELD_LIMIT_BYTES:
            return f"holds texts of {self.dtype}, want at most {FIELD_LIMIT_BYTES} bytes"
        if self.shape not in ((num_images,), (num_images, 1)):
            return f"has the shape {self.shape}, want ({num_images},), a label per image"
        return ""


class Values(NamedTuple):
    """An array, and the open member that its next values are read from."""

    array: Array
    member: IO[bytes]


class Npz:
    """Images of one .npz, and their labels where there are any; an images.Images."""

    def __init__(
        self, file: File, archive: zipfile.ZipFile, stack: ExitStack, names: Names
    ) -> None:
        """
        Args:
            stack: closes its members.
            names: of the arrays.
        Raises:
            UserError: the arrays are not there, not clear, or not of the grammar.
        """
        self.name = file.name
        self._file = file
        with unzipping(file.name):
            arrays = _arrays(file.name, archive)
        images = chosen(file.name, arrays, "images", names[0], Array.image_fault)
        num_images, height, width = images.shape
        self.num_images: int = num_images
        self.side = check_side(f"{file.name}: {images.name!r}", height, width)
        where = "without labels"
        self._labels: Values | None = None
        if names[1] is not None:
            labels = chosen(
                file.name, arrays, "labels", names[1], lambda array: array.label_fault(num_images)
            )
            where = f"their labels in {labels.name!r}"
            self._labels = _values(file.name, archive, labels, stack)
        self._images = _values(file.name, archive, images, stack)
        self.found = (
            f"npz, {num_images:,} images of {height} x {width} in {images.name!r} of "
            f"{file.name}, {where}"
        )

    def stored(self) -> Stored | None:
        info = self._images.array.info
        if info.compress_type != zipfile.ZIP_STORED:
            return None
        with unzipping(self.name):
            handle = self._file.raw.fileno()
            self._file.raw.seek(info.header_offset)
            name_bytes, extra_bytes = LOCAL_HEADER.unpack(self._file.raw.read(LOCAL_HEADER.size))
        start = info.header_offset + LOCAL_HEADER.size + name_bytes + extra_bytes
        return Stored(self.name, handle, start + self._images.array.offset, self.side**2)

    def tasks(self) -> Iterator[Task]:
        label_bytes = self._labels.array.dtype.itemsize if self._labels else 0
        per_block = rows_per_block(max(self.side**2, label_bytes))
        for first in range(0, self.num_images, per_block):
            num = min(per_block, self.num_images - first)
            image_RP = np.empty((num, self.side**2), np.uint8)
            self._fill(self._images, image_RP.reshape(-1).data)
            if self._labels is None:
                yield partial(unlabelled, image_RP)
                continue
            label_R = np.empty(num * label_bytes, np.uint8)
            self._fill(self._labels, label_R.data)
            labels = self._labels.array
            place = f"{self.name}: {labels.name!r}"
            yield partial(_rows, place, image_RP, label_R.view(labels.dtype))
        for values in (self._images, self._labels):
            if values:
                with unzipping(self.name):  # its checksum is compared at its end
                    values.member.read(1)

    def places(self) -> Iterator[str] | None:
        """None: they have numbers."""
        return None

    def check_unchanged(self) -> None:
        self._file.check_unchanged()

    def _fill(self, values: Values, view: memoryview) -> None:
        """Read an array's next values into `view`."""
        array, member = values
        with unzipping(self.name):
            filled = 0
            while filled < len(view) and (data := member.read(len(view) - filled)):
                view[filled : filled + len(data)] = data
                filled += len(data)
        if filled < len(view):
            raise UserError(
                f"{self.name}: {array.name!r} ends before its {array.shape[0]:,} values; "
                f"{USE_SAVEZ}"
            )


def _arrays(name: str, archive: zipfile.ZipFile) -> list[Array]:
    infos = archive.infolist()
    if len(infos) > MOST_MEMBERS:
        raise UserError(
            f"{name}: holds {len(infos):,} arrays, want at most {MOST_MEMBERS:,}; "
            f"save the images alone"
        )
    return [_array(name, archive, info) for info in infos]


def _array(name: str, archive: zipfile.ZipFile, info: zipfile.ZipInfo) -> Array:
    with archive.open(info) as member:
        head = io.BytesIO(member.read(HEAD_BYTES))  # what a header declares must not fill memory
    try:
        shape, is_fortran, dtype = _header(head)
    except (ValueError, SyntaxError, TypeError, TokenError, RecursionError, MemoryError) as error:
        reason = str(error).partition("\n")[0][:80]
        raise UserError(
            f"{name}: its member {info.filename} is no NumPy array ({reason}); {USE_SAVEZ}"
        ) from None
    array = Array(
        name=info.filename.removesuffix(".npy"),
        info=info,
        shape=shape,
        dtype=dtype,
        in_c_order=not is_fortran or len(shape) < 2,
        offset=head.tell(),
    )
    want = array.offset + math.prod(shape) * dtype.itemsize
    if not dtype.hasobject and info.file_size != want:
        raise UserError(
            f"{name}: its member {info.filename} has {info.file_size:,} bytes, want {want:,} for "
            f"{shape} of {dtype}; {USE_SAVEZ}"
        )
    return array


def _header(head: IO[bytes]) -> tuple[tuple[int, ...], bool, np.dtype]:
    """(shape, whether in Fortran's order, type) of an array; ValueError and kin if it is none."""
    version = npy.read_magic(head)
    readers = {(1, 0): npy.read_array_header_1_0, (2, 0): npy.read_array_header_2_0}
    if version not in readers:
        raise ValueError(f"format {version[0]}.{version[1]}, want 1.0 or 2.0")
    shape, is_fortran, dtype = readers[version](head)
    if not all(type(length) is int and length >= 0 for length in shape):
        raise ValueError(f"shape {shape}")
    return shape, is_fortran, dtype


def _values(name: str, archive: zipfile.ZipFile, array: Array, stack: ExitStack) -> Values:
    """The member, opened, behind its header."""
    with unzipping(name):
        member = stack.enter_context(archive.open(array.info))
        member.read(array.offset)
    return Values(array, member)


def _rows(place: str, image_RP: np.ndarray, label_R: np.ndarray) -> Rows:
    if label_R.dtype.kind in "iu":
        return rows_of(image_RP, *numbered(label_R))
    if label_R.dtype.kind == "U":
        code = np.dtype(np.uint32).newbyteorder(label_R.dtype.byteorder)
        if label_R.view(code).max() > sys.maxunicode:  # Python itself would give up
            raise UserError(f"{place}: a label is not Unicode; save texts")
    values, index_R = np.unique(label_R, return_inverse=True)
    return rows_of(image_RP, [_text(value, place) for value in values], index_R)


def _text(value: np.str_ | np.bytes_, place: str) -> str:
    try:
        text = value.decode() if isinstance(value, bytes) else str(value)
    except UnicodeDecodeError:
        raise UserError(f"{place}: a label is not UTF-8; save texts") from None
    return checked_label(text, place)


@contextmanager
def open_npz(path: Path, names: Names) -> Iterator[Npz]:
    """Open an .npz.

    Args:
        names: of the arrays.
    Raises:
        UserError: it cannot be read, or its arrays are refused.
    """
    with ExitStack() as stack:
        file = stack.enter_context(open_file(path))
        with unzipping(file.name):
            archive = stack.enter_context(zipfile.ZipFile(file.raw))
        yield Npz(file, archive, stack, names)
