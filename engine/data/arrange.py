"""CSVs with the label elsewhere, with row numbers, or without a header: brought into the order of
the lexer's language, line by line, before the lexer sees them.

Grammar: --index-column drops the first column, row numbers of digits; --label-column says which of
the columns holds the label, if any; all others are pixels, a square number of them. The header,
unless --no-header says that there is none, calls them pixel0.., pixel1.., 0.., 1.. or 1x1..; what
the label is called does not matter. Everything else of a line is the lexer's language.

A line that is no CSV goes on as it is: the lexer refuses it. One whose row number is none becomes a
line that the lexer refuses, and why is kept for whoever collects the rows.

Shapes: P pixels of a row.
"""

import io
import re
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from math import isqrt
from pathlib import Path

from engine.data.foreign import HEAD_BYTES
from engine.data.headers import INDEX_NAMES, are_pixels
from engine.data.lexer import FIELDS, LINE_LIMIT_BYTES, MAX_FAULTS, Fault, split_fields
from engine.data.source import Source
from engine.errors import UserError

CHUNK_BYTES = 2**20
NO_LABEL = "none"
"""As a --label-column: all columns are pixels."""
MADE_LABEL = b"0,"
"""Put before the pixels of a row without a label: the lexer's rows have one."""
ROW_NUMBER = -1
"""A Fault's column: the row number, which the lexer does not see."""
REFUSED_LINE = b'"'
"""Of no CSV: stands for a line whose fault is known."""
_INDEX = re.compile(rb'([0-9]+|"[0-9]+"),')
_LINE = re.compile(FIELDS.pattern.encode())
_TOKENS = re.compile(rb'(?:"(?:[^"]|"")*"|[^",]*)(?:,|\Z)')
"""A field as it is written, with the comma behind it; of a line that is CSV."""


@dataclass(frozen=True, kw_only=True)
class Asked:
    """What the command's flags of the same names say of a CSV's columns."""

    label_column: str = "first"
    """first, last, a number from 1 on, as the columns stand in the file, or none; which is also
    said of files of other layouts that hold no labels."""
    no_header: bool = False
    index_column: bool = False
    """Whether the first column holds row numbers, which are left out."""

    def __post_init__(self) -> None:
        number = self.label_column
        if number not in ("first", "last", NO_LABEL) and not re.fullmatch(
            "[1-9][0-9]{0,6}", number, re.ASCII
        ):
            raise UserError(
                f"--label-column: got {number!r}, want first, last or a number from 1 on "
                f"(or {NO_LABEL}, to tools/predict)"
            )

    @property
    def has_labels(self) -> bool:
        return self.label_column != NO_LABEL

    @property
    def changes_anything(self) -> bool:
        asked = (self.label_column, self.no_header, self.index_column)
        return asked != ("first", False, False)


@dataclass(frozen=True)
class Arrangement:
    """Where the columns of one CSV stand."""

    num_columns: int
    """Of the file."""
    label: int | None
    """The label's place, from 0 on, behind the index column; None: there is no label."""
    has_index: bool
    names: tuple[str, ...]
    """Of the columns as they stand; none without a header."""

    @property
    def num_pixels(self) -> int:
        return self.num_columns - self.has_index - (self.label is not None)

    def header(self) -> bytes:
        """The first line that the lexer sees."""
        pixels = (f"pixel{number}" for number in range(self.num_pixels))
        return ",".join(["label", *pixels]).encode() + b"\n"

    def column_of(self, column: int) -> str:
        """Where the lexer's column stands in the file, from 1 on, with its name."""
        if column == ROW_NUMBER:
            return "1"
        place = column - 2
        if self.label is not None:
            place = self.label if column == 1 else place + (place >= self.label)
        place += self.has_index
        return f"{place + 1} {self.names[place]!r}" if self.names else f"{place + 1}"

    def __str__(self) -> str:
        side = isqrt(self.num_pixels)
        header = "a header" if self.names else "no header"
        index = ", the first column left out" if self.has_index else ""
        if self.label is None:
            return f"CSV with {header}{index}, without labels, images of {side} x {side}"
        return (
            f"CSV with {header}{index}, labels in column {self.column_of(1)}, "
            f"images of {side} x {side} in the others"
        )


class ArrangedSource(Source):
    """A CSV whose lines come in the order of the lexer's language, under a header of it."""

    def __init__(
        self, path: Path, name: str, raw: io.BufferedReader, stack: ExitStack, asked: Asked
    ) -> None:
        """UserError if the first line does not fit what is asked for, or the file is no CSV."""
        super().__init__(path, name, raw, stack)
        self.faults: dict[int, Fault] = {}
        """By row, from 1 on: why REFUSED_LINE stands in its place; the first MAX_FAULTS."""
        self._row = 0
        self._rest = b""
        """Of a line whose end has not been read."""
        self._ready = memoryview(b"")
        self._at_end = False
        data = self._chunk()
        super().refuse_foreign(data[:HEAD_BYTES])
        self._rest = data.removeprefix(b"\xef\xbb\xbf")
        while b"\n" not in self._rest and len(self._rest) <= LINE_LIMIT_BYTES:
            if not (more := self._chunk()):
                break
            self._rest += more
        first, _, rest = self._rest.partition(b"\n")
        try:
            self.arrangement = arrange(split_fields(first), asked)
        except Fault as fault:
            raise UserError(f"{name}:1: {fault}") from None
        if not asked.no_header:
            self._rest = rest
        self._ready = memoryview(self.arrangement.header())

    def refuse_foreign(self, head: bytes) -> None:
        """Its own first bytes have been looked at."""

    def readinto(self, view: memoryview) -> int:
        filled = 0
        while filled < len(view) and (len(self._ready) or self._advance()):
            part = self._ready[: len(view) - filled]
            view[filled : filled + len(part)] = part
            self._ready = self._ready[len(part) :]
            filled += len(part)
        return filled

    def _chunk(self) -> bytes:
        room = bytearray(CHUNK_BYTES)
        got = super().readinto(memoryview(room))
        self._at_end = got < CHUNK_BYTES
        return bytes(room[:got])

    def _advance(self) -> bool:
        """Arrange the next lines; whether there are any."""
        if self._at_end and not self._rest:
            return False
        data = self._rest
        if not self._at_end:
            data += self._chunk()
        *lines, self._rest = data.split(b"\n")
        arranged = [self._arranged(line) for line in lines]
        text = b"\n".join([*arranged, b""])
        if self._at_end or len(self._rest) > LINE_LIMIT_BYTES:
            text += self._arranged(self._rest) if self._rest else b""
            self._rest = b""
        self._ready = memoryview(text)
        return bool(text) or self._advance()

    def _arranged(self, line: bytes) -> bytes:
        self._row += 1
        where = self.arrangement
        if b"\0" in line or b"\r" in line[:-1] or not _is_utf8(line):
            return line  # the lexer says at which byte
        if where.has_index and line.strip():
            index = _INDEX.match(line)
            if not index:
                text = line.partition(b",")[0].removesuffix(b"\r")[:40].decode(errors="replace")
                what = f"got {text!r}, want a row number; is there no index column?"
                return self._refused(Fault(what, ROW_NUMBER))
            line = line[index.end() :]
        if where.label is None:
            return self._labelled(line)
        return moved_first(line, where.label, where.num_pixels) if where.label else line

    def _labelled(self, line: bytes) -> bytes:
        """A row of pixels alone, with a label in front."""
        if not line.strip():
            return line  # the lexer says that it is blank
        num, want = line.count(b",") + 1, self.arrangement.num_pixels
        if num != want and b'"' not in line:
            return self._refused(Fault(f"got {num} fields, want {want} pixels"))
        return MADE_LABEL + line

    def _refused(self, fault: Fault) -> bytes:
        """The line in a refused one's place.

        Why is kept until its turn comes: lines are arranged ahead of it.
        """
        if len(self.faults) < MAX_FAULTS:  # none behind these will be listed
            self.faults[self._row] = fault
        return REFUSED_LINE


def arrange(fields: Sequence[str], asked: Asked) -> Arrangement:
    """Where the columns stand, by a CSV's first line; a Fault if it does not fit `asked`."""
    place = _label_place(len(fields), asked)
    first = int(asked.index_column)
    pixels = [name for number, name in enumerate(fields) if number >= first and number != place]
    if not pixels or isqrt(len(pixels)) ** 2 != len(pixels):
        raise _no_square(len(fields), len(pixels), asked)
    if not asked.no_header:
        _check_names(fields, place, pixels, asked.index_column)
    label = None if place is None else place - first
    names = () if asked.no_header else tuple(fields)
    return Arrangement(len(fields), label, asked.index_column, names)


def _label_place(num: int, asked: Asked) -> int | None:
    """The label's column of `num`, from 0 on; None: there is none. A Fault if it cannot be."""
    if not asked.has_labels:
        return None
    first = int(asked.index_column)
    places = {"first": first, "last": num - 1}
    place = places.get(asked.label_column, -1)
    if place < 0:
        place = int(asked.label_column) - 1
    if not first <= place < num:
        raise Fault(f"got {num} columns, want a label in column {place + 1}; give another number")
    return place


def _no_square(num: int, num_pixels: int, asked: Asked) -> Fault:
    """Of `num` columns, so many that hold pixels."""
    if not asked.has_labels:
        return Fault(
            f"got {num_pixels} columns of pixels, want a square number of them; pad or cut the "
            f"images, or leave --label-column {NO_LABEL} out if one holds labels"
        )
    index = "the row number, " if asked.index_column else ""
    return Fault(
        f"got {num} columns, of them {index}the label and {num_pixels} pixels, want a square "
        f"number of pixels; pad or cut the images, or drop other columns"
    )


def _check_names(
    names: Sequence[str], place: int | None, pixels: Sequence[str], has_index: bool
) -> None:
    """A Fault unless a header calls the columns what they are to be."""
    if has_index and names[0].lower() not in INDEX_NAMES:
        raise Fault(
            f"the first column is called {names[0][:40]!r}, want row numbers without a name"
        )
    if not are_pixels(pixels):
        beside = "" if place is None else f" beside the label {names[place][:40]!r}"
        raise Fault(
            f"the columns{beside} are called {pixels[0][:40]!r} to {pixels[-1][:40]!r}, want "
            f"pixel0.., pixel1.., 0.., 1.. or 1x1.. in this order; rename them, or give "
            f"--no-header if there is none"
        )


def _is_utf8(line: bytes) -> bool:
    try:
        line.decode()
    except UnicodeDecodeError:
        return False
    return True


def moved_first(line: bytes, place: int, last: int) -> bytes:
    """A line with its field number `place`, from 0 on, in front; as it is if it has fewer.

    Args:
        last: the number of the last field of a line that is in order.
    """
    end = b"\r" if line.endswith(b"\r") else b""
    body = line.removesuffix(b"\r")
    if b'"' not in body:
        if place == last:
            before, comma, field = body.rpartition(b",")
            return field + b"," + before + end if comma else line
        fields = body.split(b",", place + 1)
        if len(fields) <= place:
            return line
    elif not _LINE.fullmatch(body):
        return line
    else:
        fields = [token.removesuffix(b",") for token in _TOKENS.findall(body)]
        if body and not body.endswith(b","):
            fields.pop()  # the empty match at the end
        if len(fields) <= place:
            return line
        if place == last:
            place = len(fields) - 1
    return b",".join([fields.pop(place), *fields]) + end
