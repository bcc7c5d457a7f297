"""Where a CSV comes from (file, .gz, .zip member, pipe), as blocks of whole lines. Never blocks on what is no file.

A block is a reused buffer of lines that end with a line feed, with lexer.SLACK_BYTES behind them.
"""

import gzip
import io
import os
import re
import stat
import zipfile
import zlib
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

from engine.errors import UserError
from engine.lexer import LINE_LIMIT_BYTES, SLACK_BYTES

BLOCK_BYTES = 2 * 2**20
"""Fits the second-level cache of one core together with its pixels; 1 to 4 MiB measured alike."""
OPENED = re.compile(r"-|/dev/stdin|/dev/fd/([0-9]{1,9})")
"""Names of what the caller has opened for us."""
_BLANK_LINE = re.compile(rb"(?:\A|\n)(\r?\n)\Z")


class Source:
    """An open CSV."""

    def __init__(self, name: str, raw: io.BufferedReader, stack: ExitStack) -> None:
        """`stack` closes what unpacks the CSV."""
        self.name, self._raw = name, raw
        self._found = os.fstat(raw.fileno())
        self._is_file = stat.S_ISREG(self._found.st_mode)
        self._data, self.size = self._unpack(stack)
        """The size is that of the CSV itself; None if only reading tells."""

    def _unpack(self, stack: ExitStack) -> tuple[Any, int | None]:
        """(stream of the CSV, its size if known), told by the first bytes."""
        magic = self._raw.peek(4)[:4]
        if magic[:2] == b"\x1f\x8b":
            return stack.enter_context(gzip.open(self._raw)), None
        if magic != b"PK\x03\x04":
            return self._raw, self._found.st_size if self._is_file else None
        if not self._is_file:
            raise UserError(
                f"{self.name}: is a zip, which cannot be read from a pipe; name the file"
            )
        archive = stack.enter_context(zipfile.ZipFile(self._raw))
        members = [info for info in archive.infolist() if info.filename.lower().endswith(".csv")]
        if len(members) != 1:
            raise UserError(
                f"{self.name}: holds {len(members)} CSV files, want one; unpack it and name the CSV"
            )
        return stack.enter_context(archive.open(members[0])), members[0].file_size

    @property
    def part(self) -> float:
        """The part (0..1) of the source's bytes that has been read; 0 for a pipe."""
        return min(self._raw.tell() / max(self._found.st_size, 1), 1.0) if self._is_file else 0.0

    def readinto(self, view: memoryview) -> int:
        """Fill `view` as far as the source goes; fewer bytes only at its end."""
        with reading(self.name):
            filled = 0
            # One read a turn, so that a signal is served before the next one: readinto would go on to block.
            while filled < len(view) and (got := self._data.readinto1(view[filled:])):
                filled += got
            return filled

    def check_unchanged(self, path: Path) -> None:
        """Refuse a file that was written to or replaced while it was read."""
        if not self._is_file:
            return
        with reading(self.name):
            now = os.fstat(self._raw.fileno())
            named = now if OPENED.fullmatch(str(path)) else os.stat(path)
        facts = [(s.st_ino, s.st_dev, s.st_size, s.st_mtime_ns) for s in (self._found, now, named)]
        if len(set(facts)) > 1:
            raise UserError(
                f"{self.name}: changed while it was read; pack it again when nothing writes to it"
            )


@contextmanager
def open_source(path: Path) -> Iterator[Source]:
    """Open a .csv, .csv.gz, a .zip that holds one CSV, `-` or /dev/stdin; told by the first bytes, not by the name.

    Raises:
        UserError: it is no regular file (a pipe only as /dev/stdin or /dev/fd/N), or cannot be read.
    """
    name = "standard input" if str(path) == "-" else str(path)
    with ExitStack() as stack:
        with reading(name):
            piped = OPENED.fullmatch(str(path))
            handle = (
                os.dup(int(piped[1] or 0))
                if piped
                else os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
            )
            mode = os.fstat(handle).st_mode
            if not stat.S_ISREG(mode) and not (piped and stat.S_ISFIFO(mode)):
                os.close(handle)
                raise UserError(
                    f"{name}: is not a regular file; give a .csv, .csv.gz or .zip, or - for a pipe"
                )
            source = Source(name, stack.enter_context(open(handle, "rb")), stack)
        yield source


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
    except (
        RuntimeError
    ) as error:  # zipfile's, for encryption, and (NotImplementedError) for rare methods
        raise UserError(
            f"{name}: cannot be unpacked ({error}); unpack it yourself and name the CSV"
        ) from None
    except OSError as error:
        reason = error.strerror or error
        raise UserError(
            f"{name}: cannot be read ({reason}); give a .csv, .csv.gz or the .zip as downloaded"
        ) from None


def buffer_bytes(block_bytes: int = BLOCK_BYTES) -> int:
    """The size of the buffers that `blocks` fills."""
    return LINE_LIMIT_BYTES + block_bytes + 1 + SLACK_BYTES


def blocks(
    source: Source, take: Callable[[], bytearray], block_bytes: int = BLOCK_BYTES
) -> Iterator[tuple[bytearray, int]]:
    """(buffer, stop) of the source's whole lines in order, the last with a line feed even if the source has none there.

    `take` hands out a free buffer; one that is not yielded stays free. A line longer than LINE_LIMIT_BYTES is cut, for
    the lexer to refuse. One blank line at the source's end is dropped.
    """
    carried, at_end = b"", False
    while not at_end:
        buffer = take()
        view = memoryview(buffer)[:-SLACK_BYTES]
        view[: len(carried)] = carried
        cut, stop = 0, len(carried)
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
