"""One Arrow file of a record directory: written with its hashes, read by its entry in the manifest.

Arrow itself does not notice damage. So sizes and the CRC32 of every 1 MiB block are compared with the entry, and the
columns are taken from the offsets it gives: no parser ever sees a stranger's bytes, and pixels go from the file
straight to where they are wanted. Nothing is memory-mapped: a file that is cut under a map kills its reader.

Shapes: M rows of the file, H x W pixels, P = H * W.
"""

import errno
import hashlib
import os
import re
import stat
import zlib
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from engine.publish import Damaged, fsync

BLOCK_BYTES = 2**20


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
        if not isinstance(self.name, str) or not re.fullmatch(rf"{split}-[0-9]{{5,9}}\.arrow", self.name, re.ASCII):
            raise Damaged(f"the file name {self.name!r} leads out of the directory or is none of split {split}")
        offsets = (self.image_offset, self.label_offset, self.font_offset)
        if not are_counts(self.rows, self.bytes, *offsets):
            raise Damaged(f"the counts and offsets of {self.name} are not numbers from 0 on")
        ends = (offsets[0] + self.rows * num_pixels, offsets[1] + self.rows, offsets[2] + 4 * self.rows)
        if max(ends) > self.bytes or min(offsets[1:]) < ends[0]:
            raise Damaged(f"the columns of {self.name} overlap or do not fit its size")
        if not isinstance(self.crc32, list) or not are_counts(*self.crc32):
            raise Damaged(f"the checksums of {self.name} are not numbers")
        if len(self.crc32) != -(-self.bytes // BLOCK_BYTES):
            raise Damaged(f"{self.name} has {len(self.crc32)} checksums, want one for each MiB")

    def open(self, directory: Path) -> int:
        """A descriptor of the file, which is regular, no link, and of the right size."""
        try:
            handle = os.open(directory / self.name, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
        except OSError as error:
            raise Damaged(f"{self.name} cannot be read ({error.strerror})") from None
        found = os.fstat(handle)
        if not stat.S_ISREG(found.st_mode) or found.st_size != self.bytes:
            os.close(handle)
            raise Damaged(f"{self.name} has {found.st_size} bytes, want {self.bytes}")
        return handle

    def read_block(self, handle: int, number: int, pieces: Iterable[memoryview]) -> None:
        """Read block `number` into `pieces`, which together have its size, and compare its checksum.

        Raises:
            Damaged: the file was cut or changed.
        """
        offset, crc = number * BLOCK_BYTES, 0
        for piece in pieces:
            if os.preadv(handle, [piece], offset) != len(piece):
                raise Damaged(f"{self.name} ended while it was read")
            offset += len(piece)
            crc = zlib.crc32(piece, crc)
        if crc != self.crc32[number]:
            where = f"{self.name}: the block at byte {number * BLOCK_BYTES}"
            raise Damaged(f"{where} has CRC32 {crc:08x}, want {self.crc32[number]:08x}")


def read_file(
    file: FileEntry,
    handle: int,
    image_MHW: np.ndarray | None,
    label_M: np.ndarray,
    font_M: np.ndarray,
    height_width: tuple[int, int],
) -> None:
    """Fill the columns from one file, verified; without `image_MHW` only the blocks of the others are read.

    Raises:
        Damaged: it was cut or changed.
    """
    image_stop = file.image_offset + file.rows * height_width[0] * height_width[1]
    if image_MHW is None:
        start = tail_start = image_stop // BLOCK_BYTES * BLOCK_BYTES
        pieces = []
    else:
        start, tail_start = 0, image_stop
        pieces = [memoryview(bytearray(file.image_offset)), image_MHW.reshape(-1).data]
    tail = bytearray(file.bytes - tail_start)
    pieces.append(memoryview(tail))
    for number in range(start // BLOCK_BYTES, len(file.crc32)):
        first = number * BLOCK_BYTES - start
        file.read_block(handle, number, _window(pieces, first, first + BLOCK_BYTES))
    label_M[:] = np.frombuffer(tail, np.uint8, file.rows, file.label_offset - tail_start)
    font_M[:] = np.frombuffer(tail, "<i4", file.rows, file.font_offset - tail_start)


def _window(pieces: list[memoryview], start: int, stop: int) -> Iterator[memoryview]:
    """The parts of `pieces`, laid end to end, that lie in [start, stop)."""
    for piece in pieces:
        part = piece[max(start, 0) : max(stop, 0)]
        if len(part):
            yield part
        start, stop = start - len(piece), stop - len(piece)


def write_file(
    path: Path,
    image_MP: np.ndarray,
    label_M: np.ndarray,
    font_M: np.ndarray,
    classes: Sequence[str],
    fonts: Sequence[str],
    height_width: tuple[int, int],
) -> dict[str, Any]:
    """Write and fsync one Arrow file of pixels (M, P) uint8, labels and fonts; returns its entry in the manifest.

    Raises:
        OSError: the disk refused.
    """
    import pyarrow as pa

    height, width = height_width
    pixels = pa.Array.from_buffers(pa.uint8(), image_MP.size, [None, pa.py_buffer(image_MP)])
    columns = {
        "image": pa.FixedSizeListArray.from_arrays(pixels, height * width),
        "label": pa.DictionaryArray.from_arrays(pa.array(label_M), pa.array(list(classes), pa.string())),
        "font": pa.DictionaryArray.from_arrays(pa.array(font_M), pa.array(list(fonts), pa.string())),
    }
    schema = pa.schema([(name, column.type) for name, column in columns.items()])
    schema = schema.with_metadata({"height": str(height), "width": str(width)})
    sink = _HashingFile(path)
    with pa.PythonFile(sink, "w") as target, pa.ipc.new_file(target, schema) as writer:
        writer.write_batch(pa.record_batch(list(columns.values()), schema=schema))
    fsync(path)
    offset = {name: sink.offsets.get(array.ctypes.data, 0) for name, array in
              (("image", image_MP), ("label", label_M), ("font", font_M))}  # fmt: skip
    assert len(image_MP) == 0 or all(offset.values()), "Arrow copied a column"
    return asdict(
        FileEntry(
            name=path.name,
            rows=len(image_MP),
            bytes=sink.tell(),
            sha256=sink.sha256.hexdigest(),
            crc32=sink.crcs(),
            image_offset=offset["image"],
            label_offset=offset["label"],
            font_offset=offset["font"],
        )
    )


class _HashingFile:
    """A file for pyarrow that hashes what it writes and knows where each buffer went; it copies nothing."""

    closed = False

    def __init__(self, path: Path) -> None:
        self._file = open(path, "wb", buffering=0)  # noqa: SIM115
        self.sha256 = hashlib.sha256()
        self.offsets: dict[int, int] = {}
        """Of buffers, by their address in memory."""
        self._crcs, self._size = [0], 0

    def write(self, data: Any) -> None:
        if hasattr(data, "address"):
            self.offsets[data.address] = self._size
        view = memoryview(data).cast("B")
        while len(view):
            part = view[: BLOCK_BYTES - self._size % BLOCK_BYTES]
            if self._file.write(part) != len(part):
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            self.sha256.update(part)
            self._crcs[-1] = zlib.crc32(part, self._crcs[-1])
            self._size += len(part)
            if self._size % BLOCK_BYTES == 0:
                self._crcs.append(0)
            view = view[len(part) :]

    def crcs(self) -> list[int]:
        """The CRC32 of each block."""
        return self._crcs[: -(-self._size // BLOCK_BYTES)]

    def tell(self) -> int:
        return self._size

    def flush(self) -> None:
        """Nothing is held back."""

    def close(self) -> None:
        self._file.close()
        self.closed = True

    def readable(self) -> bool:
        return False

    def writable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return False


def are_counts(*values: Any) -> bool:
    """Integers from 0 on that any field of 64 bits holds."""
    return all(type(value) is int and 0 <= value < 2**63 for value in values)
