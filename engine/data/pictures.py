"""A folder tree of PNGs: one folder per class, named for it, and nothing else in it.

Grammar: PNGs of one square size, grey, of 1, 2, 4 or 8 bits per pixel (fewer are scaled to 0..255,
as PNG says), without transparency or animation. Classes come in the order of their names' bytes,
and so do the files of each; names of classes are UTF-8. What systems leave in folders
(foreign.is_litter) is passed over.

8-bit PNGs that are not interlaced, nearly all, are decoded here, many at once; Pillow does the
others. Checksums are compared, and no more is unpacked than a picture of that size takes. Many
pictures are read and decoded by processes, few by the threads that run the tasks.

Source: https://www.w3.org/TR/png-3/

Shapes: R images of a block, H x W pixels, V = W + 1 bytes of a scanline, the first its filter.
"""

import io
import os
import struct
import zlib
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Executor
from contextlib import contextmanager
from functools import cache, partial
from itertools import islice
from multiprocessing import current_process
from pathlib import Path
from typing import TypeVar

import numpy as np

from engine.data.collect import Stored
from engine.data.filters import unfiltered
from engine.data.foreign import foreign, is_litter
from engine.data.images import Task, check_side, checked_label, rows_of, rows_per_block
from engine.data.lexer import Rows
from engine.data.records import MAX_CLASSES
from engine.data.source import reading
from engine.durable import Damaged, Disturbed, open_regular
from engine.errors import UserError

SIGNATURE = b"\x89PNG\r\n\x1a\n"
HEADER = struct.Struct(">IIBBBBB")
CHUNK = struct.Struct(">I4s")
CRC = struct.Struct(">I")
KNOWN = (b"PLTE", b"IDAT", b"IEND")
"""Chunks behind the header without which a picture cannot be understood; others begin with a small
letter."""
COLOURS = {2: "RGB", 3: "of a palette", 4: "grey with transparency", 6: "RGB with transparency"}
FILE_LIMIT_BYTES = 16 * 2**20
MANY = 10_000
"""Pictures whose reading takes longer than to start processes."""
AGAIN = "copy or write it again"
BAD_FILTER = f"is damaged (a filter that PNG does not have); {AGAIN}"
TO_GREY = "convert it to 8-bit grey (mogrify -alpha off -colorspace Gray -depth 8)"

T = TypeVar("T")
Picture = tuple[str, Callable[[], bytes]]
"""Where one is, as sentences say it, and what gives its bytes."""


class PngFault(Exception):
    """What is wrong with a file, and what to do."""


class PngFolders:
    """The class folders of one folder; an images.Images."""

    def __init__(self, folder: Path) -> None:
        """UserError if what lies in the folders, by its names, or the first picture is refused."""
        self.name = str(folder)
        self.readers: Executor | None = None
        """What reads the pictures; None: the threads that run the tasks."""
        self._root = os.fsencode(folder)
        with reading(self.name):
            self._classes = _class_folders(self._root)
        self.num_images = sum(len(files) for _, files in self._classes)
        _, self._first = next(self._paths())
        height, width = tried(picture_file(self._first), size_of)
        self.side = check_side(os.fsdecode(self._first), height, width)
        self.found = (
            f"PNG, {self.num_images:,} images of {height} x {width} in the {len(self._classes)} "
            f"class folders of {self.name}"
        )

    def stored(self) -> Stored | None:
        """None: they are packed."""
        return None

    def tasks(self) -> Iterator[Task]:
        paths = self._paths()
        per_block = rows_per_block(self.side**2)
        while block := list(islice(paths, per_block)):
            yield partial(self._rows, block, self._begun([path for _, path in block]))

    def places(self) -> Iterator[str]:
        return (os.fsdecode(path) for _, path in self._paths())

    def check_unchanged(self) -> None:
        """Each file was read once, and whole."""

    def _paths(self) -> Iterator[tuple[int, bytes]]:
        """(Number of its class, path) of each picture."""
        for number, (label, names) in enumerate(self._classes):
            folder = os.path.join(self._root, label.encode())
            for name in names:
                yield number, os.path.join(folder, name)

    def _begun(self, paths: list[bytes]) -> Callable[[], np.ndarray]:
        """What returns the pixels of these pictures, which are being read where processes do."""
        read = partial(_files_decoded, paths, self.side, os.fsdecode(self._first))
        return self.readers.submit(read).result if self.readers else read

    def _rows(self, block: list[tuple[int, bytes]], read: Callable[[], np.ndarray]) -> Rows:
        numbers, label_R = np.unique([number for number, _ in block], return_inverse=True)
        texts = [self._classes[number][0] for number in numbers]
        return rows_of(read(), texts, label_R)


def picture_file(path: bytes) -> Picture:
    """A file, read when its turn comes."""
    return os.fsdecode(path), partial(_file_bytes, path)


def tried(picture: Picture, use: Callable[[bytes], T]) -> T:
    """What `use` makes of a picture's bytes; UserError, with the place, of what it refuses."""
    place, read = picture
    try:
        return use(read())
    except PngFault as fault:
        raise UserError(f"{place}: {fault}") from None
    except OSError as error:
        reason = error.strerror or error
        raise UserError(
            f"{place}: cannot be read ({reason}); look at its rights and its disk"
        ) from None


def decode(pictures: Sequence[Picture], side: int, first: str) -> np.ndarray:
    """The pixels (R, P) of pictures of `side` x `side`.

    Args:
        first: what has that size, for the sentence.
    Raises:
        UserError: one cannot be read, or is refused.
    """
    unpack = partial(scanlines, side=side, first=first)
    image_RP, fault = unfiltered([tried(each, unpack) for each in pictures], side)
    if fault >= 0:
        raise UserError(f"{pictures[fault][0]}: {BAD_FILTER}")
    return image_RP


def _files_decoded(paths: Sequence[bytes], side: int, first: str) -> np.ndarray:
    return decode(list(map(picture_file, paths)), side, first)


def scanlines(data: bytes, side: int, first: str) -> bytes:
    """The unpacked bytes of a PNG of `side` x `side` pixels, H x V; a PngFault if it is none.

    Args:
        first: what has that size, for the sentence.
    """
    if packed := _packed_plainly(data, side):
        return _unpacked(packed, side)
    header, packed = _picture(data)
    width, height, depth, *_, interlaced = header
    if (width, height) != (side, side):
        raise PngFault(
            f"has {height} x {width} pixels, but {first} {side} x {side}; scale or pad all to one "
            f"size"
        )
    if depth < 8 or interlaced:
        return _by_pillow(header, packed)
    return _unpacked(packed, side)


def _unpacked(packed: bytes, side: int) -> bytes:
    num_bytes = side * (side + 1)
    unpacking = zlib.decompressobj()
    try:
        raw = unpacking.decompress(packed, num_bytes + 1)
    except zlib.error as error:
        raise PngFault(f"is damaged ({error}); {AGAIN}") from None
    if len(raw) != num_bytes or not unpacking.eof:
        raise PngFault(f"is damaged (it does not hold {side} rows of {side}); {AGAIN}")
    return raw


def size_of(data: bytes) -> tuple[int, int]:
    """(Height, width) of a grey PNG; a PngFault if it is none."""
    width, height, *_ = _picture(data)[0]
    return height, width


def _class_folders(root: bytes) -> list[tuple[str, list[bytes]]]:
    """(Class, names of its files) of each folder in `root`, in the order of their bytes."""
    with os.scandir(root) as entries:
        found = sorted(entries, key=lambda entry: entry.name)
    classes = []
    for entry in found:
        place = os.fsdecode(entry.path)
        if is_litter(os.fsdecode(entry.name)):
            continue
        if not entry.is_dir():
            raise UserError(f"{place}: lies beside the class folders; move it away")
        try:
            label = checked_label(entry.name.decode(), place)
        except UnicodeDecodeError:
            raise UserError(f"{place}: the name of this class is not UTF-8; rename it") from None
        classes.append((label, png_names(entry.path, "class folder")))
    if not classes:
        raise UserError(f"{os.fsdecode(root)}: holds no class folder; make one per class")
    if len(classes) > MAX_CLASSES:
        raise UserError(
            f"{os.fsdecode(root)}: holds {len(classes):,} folders, want at most {MAX_CLASSES} "
            f"classes; is this the folder that holds the class folders?"
        )
    return classes


def png_names(folder: bytes, kind: str) -> list[bytes]:
    """The names of a folder's pictures, sorted by their bytes; they need not be UTF-8.

    Args:
        kind: of folder, for the sentence.
    """
    place = os.fsdecode(folder)
    names = []
    with os.scandir(folder) as entries:
        for entry in entries:
            if entry.name[-4:].lower() == b".png" and not entry.name.startswith(b"._"):
                names.append(entry.name)
            elif entry.is_dir():
                raise UserError(
                    f"{os.fsdecode(entry.path)}: is a folder in a {kind}; name the folder "
                    f"that holds the class folders, or move it away"
                )
            elif not is_litter(os.fsdecode(entry.name)):
                raise UserError(f"{os.fsdecode(entry.path)}: is no .png; move it away")
    if not names:
        raise UserError(f"{place}: is a {kind} that holds no .png; fill or remove it")
    return sorted(names)


def _file_bytes(path: bytes) -> bytes:
    """All of a regular file, of at most FILE_LIMIT_BYTES."""
    try:
        handle = open_regular(path)
    except Damaged as damaged:
        what = str(damaged).removeprefix(os.fsdecode(os.path.basename(path))).strip()
        if isinstance(damaged, Disturbed):
            raise PngFault(what) from None
        is_there = os.path.lexists(path)
        remedy = "move it away, or make it readable" if is_there else "name a file that is there"
        raise PngFault(f"{what}; {remedy}") from None
    try:
        num_bytes = os.fstat(handle).st_size
        if num_bytes > FILE_LIMIT_BYTES:
            raise PngFault(
                f"has {num_bytes:,} bytes, want at most {FILE_LIMIT_BYTES:,}; "
                f"write it without what is no picture"
            )
        data = os.read(handle, num_bytes + 1)  # an open file would take longer to make
    finally:
        os.close(handle)
    if len(data) != num_bytes:
        raise PngFault("changed while it was read; pack again when nothing writes to it")
    return data


def _picture(data: bytes) -> tuple[tuple[int, ...], bytes]:
    """(Fields of the header, packed scanlines) of a grey PNG; a PngFault if it is none."""
    if not data.startswith(SIGNATURE):
        raise PngFault(
            f"is {foreign(data, '').partition(';')[0] or 'no PNG'}, want a PNG; leave it out"
        )
    header: tuple[int, ...] = ()
    packed = []
    for kind, body in _chunks(data):
        if not header:
            if kind != b"IHDR" or len(body) != HEADER.size:
                raise PngFault(f"is damaged (it begins without a header); {AGAIN}")
            header = HEADER.unpack(body)
            _check_header(header)
        elif kind == b"IDAT":
            packed.append(body)
        elif kind == b"tRNS":
            raise PngFault(f"has a transparent grey value, want none; {TO_GREY}")
        elif kind == b"acTL":
            raise PngFault("is animated, want one picture; write its frames as files")
        elif kind[0] < 96 and kind not in KNOWN:
            raise PngFault(f"is damaged (a chunk {kind!r} that PNG does not have here); {AGAIN}")
    return header, b"".join(packed)


def _packed_plainly(data: bytes, side: int) -> bytes:
    """The packed scanlines of an 8-bit PNG as most programs write it: a header, one chunk of
    scanlines, an end. Nothing where it is another, or damaged: `_picture` reads those."""
    head, end = _plain_ends(side)
    if not (data.startswith(head) and data.endswith(end)):
        return b""
    start = len(head) + CHUNK.size
    stop = len(data) - len(end) - CRC.size
    if CHUNK.unpack_from(data, len(head)) != (stop - start, b"IDAT"):
        return b""
    if CRC.unpack_from(data, stop)[0] != zlib.crc32(data[start - 4 : stop]):
        return b""
    return data[start:stop]


@cache
def _plain_ends(side: int) -> tuple[bytes, bytes]:
    """How an 8-bit grey PNG that is not interlaced begins, with its header, and how it ends."""
    header = _chunk(b"IHDR", HEADER.pack(side, side, 8, 0, 0, 0, 0))
    return SIGNATURE + header, _chunk(b"IEND", b"")


def _chunks(data: bytes) -> Iterator[tuple[bytes, bytes]]:
    """(Kind, content) of each chunk, its checksum compared."""
    place = len(SIGNATURE)
    kind = b""
    while kind != b"IEND":
        if place + 12 > len(data):
            raise PngFault(f"ends too early; {AGAIN}")
        length, kind = CHUNK.unpack_from(data, place)
        stop = place + 8 + length
        if stop + 4 > len(data):
            raise PngFault(f"ends too early; {AGAIN}")
        if zlib.crc32(data[place + 4 : stop]) != CRC.unpack_from(data, stop)[0]:
            raise PngFault(f"is damaged (a wrong checksum); {AGAIN}")
        yield kind, data[place + 8 : stop]
        place = stop + 4


def _check_header(header: tuple[int, ...]) -> None:
    """A PngFault unless it declares a grey picture of at most 8 bits per pixel."""
    _, _, depth, colour, compression, filters, interlaced = header
    if colour in COLOURS:
        raise PngFault(f"is {COLOURS[colour]}, want grey; {TO_GREY}")
    if depth == 16:
        raise PngFault(f"has 16 bits per pixel, want 8; {TO_GREY}")
    if colour or depth not in (1, 2, 4, 8) or compression or filters or interlaced > 1:
        raise PngFault(f"is damaged (a header that PNG does not have); {AGAIN}")


def _by_pillow(header: tuple[int, ...], packed: bytes) -> bytes:
    """The scanlines, without filters, of a picture that is interlaced or has less than 8 bits.

    Pillow sees the checked header and the packed scanlines alone, no other chunk.
    """
    from PIL import Image

    chunks = ((b"IHDR", HEADER.pack(*header)), (b"IDAT", packed), (b"IEND", b""))
    data = SIGNATURE + b"".join(_chunk(kind, body) for kind, body in chunks)
    try:
        with Image.open(io.BytesIO(data), formats=["PNG"]) as picture:
            image_HW = np.asarray(picture.convert("L"))
    except (OSError, SyntaxError, ValueError, EOFError, struct.error) as error:
        raise PngFault(f"is damaged ({str(error).partition(chr(10))[0]}); {AGAIN}") from None
    height, width = image_HW.shape
    raw_HV = np.zeros((height, width + 1), np.uint8)
    raw_HV[:, 1:] = image_HW
    return raw_HV.tobytes()


def _chunk(kind: bytes, body: bytes) -> bytes:
    checksum = zlib.crc32(kind + body)
    return CHUNK.pack(len(body), kind) + body + CRC.pack(checksum)


@contextmanager
def open_pictures(folder: Path, readers: Callable[[], Executor]) -> Iterator[PngFolders]:
    """Open a folder of class folders.

    Args:
        readers: starts the processes that read where there are many pictures.
    Raises:
        UserError: it cannot be read, or holds something else than class folders of grey PNGs.
    """
    pictures = PngFolders(folder)
    # A daemonic process may not start others.
    if pictures.num_images >= MANY and not current_process().daemon:
        pictures.readers = readers()
    yield pictures
