"""One Arrow file of a record directory: written with its hashes, read by its entry in the manifest.

Arrow itself does not notice damage. So sizes and the CRC32 of every 1 MiB block are compared with
the entry, and the columns are taken from the offsets it gives: no parser ever sees a stranger's
bytes, and pixels go from the file straight to where they are wanted. Nothing is memory-mapped: a
file that is cut under a map kills its reader.

Shapes: N rows of a CSV, M of a file, H x W pixels, P = H * W.
"""

import errno
import hashlib
import io
import os
import re
import zlib
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from engine.data.table import Table
from engine.durable import Damaged, Disturbed, begin_writeback, fsync, open_regular

FORMAT = "glyph-records"
VERSION = 2
SPLITS = ("train", "val", "test")
FONTS = "fonts.json"
FONTS_LIMIT_BYTES = 16 * 2**20
"""Each Arrow file repeats the typefaces' names, so they must leave room for images."""
BLOCK_BYTES = 2**20
WRITEBACK_BYTES = 8 * 2**20
"""Written bytes that the disk is told to begin with, while the next are hashed."""


@dataclass(frozen=True)
class FileEntry:
    """The manifest's entry for one Arrow file; the offsets are those of its columns' buffers."""

    name: str
    rows: int
    bytes: int
    sha256: str
    crc32: list[int]
    image_offset: int
    label_offset: int
    font_offset: int

    def check(self, split: str, num_pixels: int) -> None:
        """Raise Damaged unless all numbers of this entry, a stranger's, agree with each other."""
        if not isinstance(self.name, str) or not re.fullmatch(
            rf"{split}-[0-9]{{5,9}}\.arrow", self.name, re.ASCII
        ):
            raise Damaged(
                f"the file name {self.name!r} leads out of the directory "
                f"or is none of split {split}"
            )
        offsets = (self.image_offset, self.label_offset, self.font_offset)
        if not are_counts(self.rows, self.bytes, *offsets):
            raise Damaged(f"the counts and offsets of {self.name} are not numbers from 0 on")
        ends = (
            offsets[0] + self.rows * num_pixels,
            offsets[1] + self.rows,
            offsets[2] + 4 * self.rows,
        )
        if max(ends) > self.bytes or min(offsets[1:]) < ends[0]:
            raise Damaged(f"the columns of {self.name} overlap or do not fit its size")
        if not isinstance(self.crc32, list) or not are_counts(*self.crc32):
            raise Damaged(f"the checksums of {self.name} are not numbers")
        if len(self.crc32) != -(-self.bytes // BLOCK_BYTES):
            raise Damaged(f"{self.name} has {len(self.crc32)} checksums, want one for each MiB")

    def block_bytes(self, offset: int) -> int:
        """How long the block that begins at `offset` is."""
        return min(BLOCK_BYTES, self.bytes - offset)

    def open(self, directory: Path) -> int:
        """A descriptor of the file: regular, perhaps behind a link, and of the right size."""
        handle = open_regular(directory / self.name)
        if (found := os.fstat(handle).st_size) != self.bytes:
            is_pointer = os.pread(handle, 23, 0) == b"version https://git-lfs"
            os.close(handle)
            if is_pointer:
                raise Disturbed(f"{self.name} is a pointer of git-lfs; run git lfs pull")
            raise Damaged(f"{self.name} has {found} bytes, want {self.bytes}")
        return handle

    def read(self, handle: int, offset: int, out: memoryview) -> None:
        """Fill `out` with the bytes from `offset` on; Damaged if a block it touches has changed."""
        spare = np.empty(BLOCK_BYTES, np.uint8).data
        while len(out):
            number, within = divmod(offset, BLOCK_BYTES)
            block_bytes = self.block_bytes(number * BLOCK_BYTES)
            size = min(block_bytes - within, len(out))
            pieces = [spare[:within], out[:size], spare[within + size : block_bytes]]
            if os.preadv(handle, pieces, number * BLOCK_BYTES) != block_bytes:
                raise Damaged(f"{self.name} ended while it was read")
            want = self.crc32[number]
            crc = 0
            for piece in pieces:
                crc = zlib.crc32(piece, crc)
            if crc != want:
                where = f"{self.name}: the block at byte {number * BLOCK_BYTES}"
                raise Damaged(f"{where} has CRC32 {crc:08x}, want {want:08x}")
            out = out[size:]
            offset += size

    def read_columns(self, handle: int, num_pixels: int) -> tuple[np.ndarray, np.ndarray]:
        """label_M uint8 and font_M int32, verified as by `read`, like all that is no pixels."""
        start = self.image_offset + self.rows * num_pixels
        tail = bytearray(self.bytes - start)
        self.read(handle, 0, memoryview(bytearray(self.image_offset)))
        self.read(handle, start, memoryview(tail))
        label_M = np.frombuffer(tail, np.uint8, self.rows, self.label_offset - start)
        return label_M, np.frombuffer(tail, "<i4", self.rows, self.font_offset - start)


def entries_of(split: str, listed: list[dict[str, Any]], num_pixels: int) -> list[FileEntry]:
    """A split's files as the manifest lists them, checked; what is no such list raises, too."""
    entries = [FileEntry(**file) for file in listed]
    for entry in entries:
        entry.check(split, num_pixels)
    return entries


def write_file(path: Path, table: Table, row_M: np.ndarray, image_MP: np.ndarray) -> dict[str, Any]:
    """Write and fsync an Arrow file of some rows and their pixels, uint8; its manifest's entry."""
    import pyarrow as pa

    label_M = table.label_N[row_M]
    font_M = table.font_N[row_M]
    pixels = _column(pa.uint8(), image_MP)
    classes, fonts = _texts(table.classes), _texts(table.fonts)
    columns = {
        "image": pa.FixedSizeListArray.from_arrays(pixels, table.side**2),
        "label": pa.DictionaryArray.from_arrays(_column(pa.uint8(), label_M), classes),
        "font": pa.DictionaryArray.from_arrays(_column(pa.int32(), font_M), fonts),
    }
    batch = pa.record_batch(columns).replace_schema_metadata(
        {"height": str(table.side), "width": str(table.side)}
    )
    sink = _HashingFile(path)
    with pa.PythonFile(sink, "w") as target, pa.ipc.new_file(target, batch.schema) as writer:
        writer.write_batch(batch)
    fsync(path)
    offsets = [sink.offsets.get(column.ctypes.data, 0) for column in (image_MP, label_M, font_M)]
    assert len(image_MP) == 0 or all(offsets), "Arrow copied a column"
    return asdict(
        FileEntry(
            path.name, len(image_MP), sink.size, sink.sha256.hexdigest(), sink.crc32, *offsets
        )
    )


def _column(kind: Any, values: np.ndarray) -> Any:
    """An Arrow array in the memory of `values`; pyarrow.array would import pandas, 0.4 s."""
    import pyarrow as pa

    return pa.Array.from_buffers(kind, values.size, [None, pa.py_buffer(values)])


def _texts(texts: tuple[str, ...]) -> Any:
    """An Arrow array of texts."""
    import pyarrow as pa

    encoded = [text.encode() for text in texts]
    ends = np.cumsum([0, *map(len, encoded)], dtype=np.int32)
    buffers = map(pa.py_buffer, (ends, b"".join(encoded)))
    return pa.StringArray.from_buffers(len(texts), *buffers)


class _HashingFile(io.FileIO):
    """A new file that hashes what pyarrow writes, copies nothing, and knows where buffers went."""

    def __init__(self, path: Path) -> None:
        super().__init__(path, "w")
        self.sha256 = hashlib.sha256()
        self.crc32: list[int] = []
        """Of each block."""
        self.offsets: dict[int, int] = {}
        """Of buffers, by their address in memory."""
        self.size = 0

    def write(self, data: Any) -> int:
        if hasattr(data, "address"):
            self.offsets[data.address] = self.size
        view = memoryview(data).cast("B")
        num_bytes = len(view)
        while len(view):
            within = self.size % BLOCK_BYTES
            if not within:
                self.crc32.append(0)
            part = view[: BLOCK_BYTES - within]
            if super().write(part) != len(part):
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            self.sha256.update(part)
            self.crc32[-1] = zlib.crc32(part, self.crc32[-1])
            self.size += len(part)
            view = view[len(part) :]
            if self.size % WRITEBACK_BYTES == 0:
                begin_writeback(self.fileno(), self.size - WRITEBACK_BYTES, WRITEBACK_BYTES)
        return num_bytes


def are_counts(*values: Any) -> bool:
    """Integers from 0 on that any field of 64 bits holds."""
    return all(type(value) is int and 0 <= value < 2**63 for value in values)
