"""Where bytes come from (file, .gz, .zip member, pipe); of a CSV, as blocks of whole lines.

Never waits for what is no file. A block is a reused buffer of lines that end with a line feed, with
lexer.SLACK_BYTES behind them.
"""

import gzip
import io
import os
import re
import stat
import struct
import sys
import zipfile
import zlib
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

from engine.data.foreign import folder_contents, foreign, is_litter, listed, zip_contents
from engine.data.lexer import LINE_LIMIT_BYTES, SLACK_BYTES
from engine.errors import UserError

BLOCK_BYTES = 2 * 2**20
"""Fits the second-level cache of one core together with its pixels; 1 to 4 MiB measured alike."""
OPENED = re.compile(r"-|/dev/stdin|/dev/fd/([0-9]{1,9})")
"""Names of what the caller has opened for us."""
_BLANK_LINE = re.compile(rb"(?:\A|\n)(\r?\n)\Z")


class File:
    """An open file, or a pipe that the caller has opened for us."""

    def __init__(self, path: Path, name: str, raw: io.BufferedReader) -> None:
        self.path = path
        self.name = name
        """As sentences call it."""
        self.raw = raw
        self._found = os.fstat(raw.fileno())
        self.is_file = stat.S_ISREG(self._found.st_mode)
        """Whether it is no pipe."""

    @property
    def part(self) -> float:
        """The part (0..1) of the file's bytes that has been read; 0 for a pipe."""
        if not self.is_file:
            return 0.0
        return min(self.raw.tell() / max(self._found.st_size, 1), 1.0)

    def check_unchanged(self) -> None:
        """Refuse a file that was written to or replaced while it was read."""
        if not self.is_file:
            return
        with reading(self.name):
            now = os.fstat(self.raw.fileno())
            named = now if OPENED.fullmatch(str(self.path)) else os.stat(self.path)
        facts = [(s.st_ino, s.st_dev, s.st_size, s.st_mtime_ns) for s in (self._found, now, named)]
        if len(set(facts)) > 1:
            raise changed(self.name)


class Source(File):
    """An open CSV, or another file that may be a gzip: a stream of bytes."""

    def __init__(self, path: Path, name: str, raw: io.BufferedReader, stack: ExitStack) -> None:
        """`stack` closes what unpacks it."""
        super().__init__(path, name, raw)
        self._inside = ""
        """What the CSV is unpacked from, as the beginning of a sentence."""
        self._data, self.size = self._unpack(stack)
        """The size is that of what is unpacked; None if it is known only when all is read."""

    def _unpack(self, stack: ExitStack) -> tuple[Any, int | None]:
        """(stream of the CSV, its size if known); the first bytes say what it is packed in."""
        magic = self.raw.peek(4)[:4]
        if magic[:2] == b"\x1f\x8b":
            self._inside = "is a gzip of"
            return stack.enter_context(gzip.open(self.raw)), None
        if magic not in (b"PK\x03\x04", b"PK\x05\x06"):
            return self.raw, self._found.st_size if self.is_file else None
        if not self.is_file:
            raise UserError(
                f"{self.name}: is a zip, which cannot be read from a pipe; name the file"
            )
        archive = stack.enter_context(zipfile.ZipFile(self.raw))
        member = self._member(archive)
        self._inside = f"its member {member.filename} is"
        return stack.enter_context(archive.open(member)), member.file_size

    def _member(self, archive: zipfile.ZipFile) -> zipfile.ZipInfo:
        """The one CSV of a zip, whatever the system that made the zip has put beside it."""
        members = [
            info
            for info in archive.infolist()
            if not info.is_dir() and not is_litter(info.filename)
        ]
        tables = [info for info in members if info.filename.lower().endswith(".csv")]
        if not tables:
            raise UserError(f"{self.name}: {zip_contents(archive, members)}")
        if len(tables) > 1:
            names = listed([info.filename for info in tables])
            raise UserError(
                f"{self.name}: holds {len(tables)} CSV files ({names}), want one; "
                f"unpack it and pack the one to train on"
            )
        return tables[0]

    @property
    def is_packed(self) -> bool:
        """Whether its bytes are not those of the file."""
        return self._data is not self.raw

    def refuse_foreign(self, head: bytes) -> None:
        """UserError if what begins with `head` is of a kind that is known, and no CSV."""
        what = foreign(head, self.name, self.size)
        if what:
            raise UserError(f"{self.name}: {self._inside or 'is'} {what}")

    def readinto(self, view: memoryview) -> int:
        """Fill `view` as far as the source goes; fewer bytes only at its end."""
        with reading(self.name):
            filled = 0
            # One read per turn, so that a signal is served in between: readinto would wait on.
            while filled < len(view) and (got := self._data.readinto1(view[filled:])):
                filled += got
            return filled


Make = Callable[[Path, str, io.BufferedReader, ExitStack], Source]


def changed(name: str) -> UserError:
    """The refusal of a file that did not stay as it was."""
    return UserError(f"{name}: changed while it was read; pack it again when nothing writes to it")


@contextmanager
def open_source(path: Path, make: Make = Source) -> Iterator[Source]:
    """Open a .csv, .csv.gz, a .zip that holds one CSV, `-` or /dev/stdin, whatever its name.

    Args:
        make: what makes a Source of the open file.
    Raises:
        UserError: it is no regular file (a pipe only as /dev/stdin or /dev/fd/N), or cannot be
            read.
    """
    name = said_name(path)
    with ExitStack() as stack:
        with reading(name):
            raw = stack.enter_context(open(_open(path, name), "rb"))
            source = make(path, name, raw, stack)
        yield source


@contextmanager
def open_file(path: Path) -> Iterator[File]:
    """As `open_source`, but nothing is unpacked."""
    name = said_name(path)
    with ExitStack() as stack:
        with reading(name):
            file = File(path, name, stack.enter_context(open(_open(path, name), "rb")))
        yield file


def said_name(path: Path) -> str:
    """What sentences call a source."""
    return "standard input" if str(path) == "-" else str(path)


def _open(path: Path, name: str) -> int:
    """A descriptor of a file, or of a pipe that the caller has opened for us."""
    piped = OPENED.fullmatch(str(path))
    if piped:
        number = int(piped[1] or 0)
        if number == 0 and sys.__stdin__ is None:  # another file may have got its number since
            raise UserError(f"{name}: is closed; pipe a CSV into it, or name a file")
        handle = os.dup(number)
    else:
        handle = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    mode = os.fstat(handle).st_mode
    if stat.S_ISREG(mode) or (piped and stat.S_ISFIFO(mode)):
        return handle
    what = _irregular(path, mode, os.isatty(handle))
    os.close(handle)
    raise UserError(f"{name}: {what}")


def _irregular(path: Path, mode: int, is_terminal: bool) -> str:
    """What is no regular file, and what to do."""
    if stat.S_ISDIR(mode) and not OPENED.fullmatch(str(path)):
        return folder_contents(path)
    if is_terminal:
        return "is a terminal; pipe a CSV into it, or name a file"
    kind = "special"
    if stat.S_ISFIFO(mode):
        kind = "a FIFO"
    elif stat.S_ISCHR(mode):
        kind = "a device"
    if OPENED.fullmatch(str(path)):
        return f"is {kind}; pipe a CSV into it, or name a file"
    return f"is not a regular file but {kind}; give a .csv, .csv.gz or .zip, or - for a pipe"


@contextmanager
def reading(name: str) -> Iterator[None]:
    """Turn what the system and the decompressors raise into a UserError."""
    try:
        yield
    except EOFError:
        raise UserError(f"{name}: the compressed file ends too early; download it again") from None
    except (zipfile.BadZipFile, gzip.BadGzipFile, zlib.error) as error:
        raise UserError(
            f"{name}: the compressed file is damaged ({error}); download it again"
        ) from None
    except RuntimeError as error:
        # zipfile's, for encryption, and its subclass NotImplementedError, for rare methods.
        raise UserError(
            f"{name}: cannot be unpacked ({error}); unpack it yourself and name what was inside"
        ) from None
    except OSError as error:
        reason = error.strerror or error
        raise UserError(
            f"{name}: cannot be read ({reason}); name a file that is there and may be read"
        ) from None


@contextmanager
def unzipping(name: str) -> Iterator[None]:
    """As `reading`, and what zipfile raises where the numbers of a zip's directory are wrong."""
    try:
        with reading(name):
            yield
    except (ValueError, OverflowError, struct.error) as error:
        raise UserError(f"{name}: the zip is damaged ({error}); download it again") from None


def buffer_bytes(block_bytes: int = BLOCK_BYTES) -> int:
    """The size of the buffers that `blocks` fills."""
    return LINE_LIMIT_BYTES + block_bytes + 1 + SLACK_BYTES


def blocks(
    source: Source, take: Callable[[], bytearray], block_bytes: int = BLOCK_BYTES
) -> Iterator[tuple[bytearray, int]]:
    """(buffer, stop) of the source's whole lines in order, the last with a line feed even if the
    source has none there.

    `take` hands out a free buffer; one that is not yielded stays free. A line longer than
    LINE_LIMIT_BYTES is cut, for the lexer to refuse. One blank line at the source's end is dropped.
    """
    carried = b""
    at_end = False
    while not at_end:
        buffer = take()
        view = memoryview(buffer)[:-SLACK_BYTES]
        view[: len(carried)] = carried
        cut = 0
        stop = len(carried)
        while not (cut or at_end or stop > LINE_LIMIT_BYTES):
            got = source.readinto(view[stop : stop + block_bytes])
            at_end = got < block_bytes
            cut = buffer.rfind(b"\n", stop, stop + got) + 1
            stop += got
        if (at_end and cut < stop) or not cut:
            if not buffer.endswith(
                b"\n", 0, stop
            ):  # it does if all of it is a blank line that was carried over
                view[stop : stop + 1] = b"\n"
                stop += 1
            cut = stop
        if blank := _BLANK_LINE.search(buffer, max(cut - 3, 0), cut):
            cut = blank.start(1)
        carried = bytes(view[cut:stop])
        buffer[cut : cut + SLACK_BYTES] = bytes(SLACK_BYTES)
        if cut:
            yield buffer, cut
