"""PNGs without labels: files, folders of them, and PNGs one behind the other in a pipe.

Grammar: PNGs as pictures.py takes them, all of one size. A folder holds `.png` files and nothing
else but what systems leave in folders; they come in the order of their names' bytes. In a pipe one
begins where the one before it ends.

Shapes: R images of a block.
"""

import os
from collections.abc import Iterator, Sequence
from functools import partial
from itertools import chain, islice
from pathlib import Path

from engine.data.collect import Stored
from engine.data.images import Task, check_side, rows_per_block, unlabelled
from engine.data.lexer import Rows
from engine.data.pictures import (
    CHUNK,
    CRC,
    FILE_LIMIT_BYTES,
    SIGNATURE,
    Picture,
    decode,
    picture_file,
    png_names,
    size_of,
    tried,
)
from engine.data.source import Source, reading
from engine.errors import UserError


class Unlabelled:
    """Pictures of one size, in order; an images.Images."""

    def __init__(self, name: str, pictures: Iterator[Picture], files: Sequence[bytes] = ()) -> None:
        """UserError if the first picture is refused.

        Args:
            files: their paths, where they are files.
        """
        self.name = name
        self._files = files
        self.num_images = len(files) or None
        first = next(pictures, None)
        if first is None:
            raise UserError(f"{name}: is empty; give it PNGs")
        self._first = first[0]
        self._pictures = chain([first], pictures)
        height, width = tried(first, size_of)
        self.side = check_side(self._first, height, width)
        count = f"{len(files):,} images" if files else "images one behind the other"
        self.found = f"PNG, {count} of {height} x {width} without labels: {name}"

    def stored(self) -> Stored | None:
        """None: they are packed."""
        return None

    def tasks(self) -> Iterator[Task]:
        per_block = rows_per_block(self.side**2)
        while block := list(islice(self._pictures, per_block)):
            yield partial(self._decode, block)

    def places(self) -> Iterator[str] | None:
        return map(os.fsdecode, self._files) if self._files else None

    def check_unchanged(self) -> None:
        """Each was read once, and whole."""

    def _decode(self, block: list[Picture]) -> Rows:
        return unlabelled(decode(block, self.side, self._first))


def files_of(paths: Sequence[Path]) -> Unlabelled:
    """Files, and all files of folders, in this order; UserError if they cannot be pictures."""
    files = [file for path in paths for file in _files_of(path)]
    more = f" and {len(paths) - 1:,} more" if len(paths) > 1 else ""
    return Unlabelled(f"{paths[0]}{more}", map(picture_file, files), files)


def _files_of(path: Path) -> list[bytes]:
    place = os.fsencode(path)
    if not os.path.isdir(path):
        return [place]
    with reading(str(path)):
        return [os.path.join(place, name) for name in png_names(place, "folder of PNGs")]


def piped(source: Source) -> Unlabelled:
    """The pictures of a pipe, which are read as their turn comes."""
    return Unlabelled(source.name, _pictures(source))


def _pictures(source: Source) -> Iterator[Picture]:
    number = 1
    while data := _next_picture(source, f"{source.name}: image {number}"):
        yield f"{source.name}: image {number}", partial(bytes, data)
        number += 1


def _next_picture(source: Source, place: str) -> bytearray:
    """The bytes up to the end of the next picture, or of what is none; none at the pipe's end.

    Only lengths are looked at: what it is, pictures.py says.
    """
    data = _taken(source, len(SIGNATURE))
    kind = b""
    while data.startswith(SIGNATURE) and kind != b"IEND":
        head = _taken(source, CHUNK.size)
        data += head
        if len(head) < CHUNK.size:
            break
        length, kind = CHUNK.unpack(head)
        if len(data) + length > FILE_LIMIT_BYTES:
            raise UserError(f"{place}: has more than {FILE_LIMIT_BYTES:,} bytes; write it smaller")
        data += _taken(source, length + CRC.size)
    return data


def _taken(source: Source, num_bytes: int) -> bytearray:
    """So many bytes of the pipe, fewer only at its end."""
    data = bytearray(num_bytes)
    del data[source.readinto(memoryview(data)) :]
    return data
