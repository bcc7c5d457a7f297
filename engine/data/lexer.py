"""The language of the CSV, defined line by line in plain Python; lexer_jit.py compiles it.

Accepted: UTF-8, one row per line (LF or CRLF), RFC 4180 quoting, a header `names,labels,1..P`
(TMNIST), `label,pixel0..`, `label,pixel1..P` or `label,1x1..` (MNIST-like), P a square number, and
pixels `0|[1-9][0-9]{0,2}` up to 255 with an optional `.0` (any number of zeros). Pixels are
compared with their accepted spellings, never parsed as floats: float parsers take ` 5`, `1e2`,
`nan`, `1_0` and full-width digits. Names and labels are text, kept to the byte, without controls.
Columns in another order are brought into this one before (arrange.py).

This definition decides what an error says, is the oracle of the compiled lexer's tests, and its
stand-in (some 8,000 rows/s) where numba cannot be imported. Shapes: R rows of a block, P pixels of
a row.
"""

import csv
import io
import re
from collections.abc import Callable
from dataclasses import dataclass
from math import isqrt

import numpy as np

from engine.data.headers import header_hint, num_texts
from engine.data.sums import sum_rows

FIELD_LIMIT_BYTES = 4096
LINE_LIMIT_BYTES = 2**20
MAX_FAULTS = 100
"""That are listed of a CSV."""
SLACK_BYTES = 64
"""Behind a block's last line: the compiled lexer compares 32 bytes at once."""

_PIXEL = {text: value for value in range(256) for text in (str(value), f"{value}.0")}
_PIXEL_SPELLING = re.compile(r"(0|[1-9][0-9]{0,2})(\.0+)?", re.ASCII)
FIELDS = re.compile(r'(?:"(?:[^"]|"")*"|[^",]*)(?:,(?:"(?:[^"]|"")*"|[^",]*))*')
"""A line that is CSV; it takes no longer than the line is long."""
_UNSEEN = re.compile("[\x00-\x08\x0a-\x1f\x7f-\x9f\u200e\u200f\u2028-\u202e\u2066-\u2069]")
"""Controls but the tab, and what changes the direction or the lines of the text around it."""


class Fault(Exception):
    """A line is not in the language; `column` counts from 1, 0 is the whole line."""

    def __init__(self, what: str, column: int = 0) -> None:
        super().__init__(what)
        self.column = column


@dataclass(frozen=True)
class Layout:
    """What the header says of every row."""

    columns: tuple[str, ...]
    has_fonts: bool
    num_text: int
    """Of the columns, those before the pixels."""
    num_pixels: int
    side: int
    """Height and width of the images."""

    def most_rows(self, num_bytes: int) -> int:
        """Rows that so many bytes can hold: one character per field, and a comma or line end."""
        return num_bytes // (2 * len(self.columns)) + 1

    def images(self, num_bytes: int) -> np.ndarray:
        """Room for their pixels, (R, P) uint8."""
        return np.empty((self.most_rows(num_bytes), self.num_pixels), np.uint8)


@dataclass(frozen=True)
class Rows:
    """The rows at the head of a block, and where the first line that is none begins, or -1.

    `labels` and `fonts` are the block's different ones as they come, and some, perhaps, of what
    stands behind its rows; label_R and font_R are int32 indices of them. sum_R and squares_R,
    int64, are sums of a row's pixels and of their squares; hash_R, uint64, is equal for equal
    pixels.
    """

    image_RP: np.ndarray
    labels: list[str]
    label_R: np.ndarray
    fonts: list[str]
    font_R: np.ndarray
    sum_R: np.ndarray
    squares_R: np.ndarray
    hash_R: np.ndarray
    fault: int = -1


def read_header(line: bytes) -> Layout:
    """The layout that a first line declares; a Fault if it is no header of TMNIST or MNIST."""
    columns = tuple(split_fields(line.removeprefix(b"\xef\xbb\xbf")))
    if num_text := num_texts(columns):
        num_pixels = len(columns) - num_text
        return Layout(columns, num_text == 2, num_text, num_pixels, isqrt(num_pixels))
    got = ",".join(columns)
    got = got if len(got) <= 40 else f"{got[:24]}...{got[-13:]}"
    hint = header_hint(columns) or "with as many pixels as a square has"
    raise Fault(
        f"got the header {got!r} of {len(columns)} columns, "
        f"want names,labels,1,2,... or label,pixel0,...; {hint}"
    )


def read_row(line: bytes, layout: Layout) -> tuple[str, str, bytes]:
    """(font name or "", label, pixels) of a line; a Fault if it is not in the language."""
    fields = split_fields(line)
    if tuple(fields[: layout.num_text]) == layout.columns[: layout.num_text]:
        raise Fault("the header stands here again, want a row; were files joined?")
    want = len(layout.columns)
    if len(fields) != want:
        decimals = len(fields) == 2 * layout.num_pixels + layout.num_text
        hint = "; are decimals written with a comma?" if decimals else ""
        if fields == [""]:
            hint = "; delete the blank line"
        raise Fault(f"got {len(fields)} fields, want {want}{hint}")
    columns = list(enumerate(fields, start=1))
    text = [check_text(field, column) for column, field in columns[: layout.num_text]]
    pixels = bytes(_pixel(field, column) for column, field in columns[layout.num_text :])
    return text[0] if layout.has_fonts else "", text[-1], pixels


def check_text(text: str, column: int) -> str:
    """`text`, if it may be a name or a label; a Fault if empty, too long, or not printable."""
    if not text:
        raise Fault("is empty, want text", column)
    if (size := len(text.encode())) > FIELD_LIMIT_BYTES:
        raise Fault(f"has {size} bytes, want at most {FIELD_LIMIT_BYTES}", column)
    if unseen := _UNSEEN.search(text):
        raise Fault(
            f"holds the control character U+{ord(unseen[0]):04X}, want text that can be seen",
            column,
        )
    return text


def split_fields(line: bytes) -> list[str]:
    """The fields of a line, unquoted; a Fault if it is not CSV."""
    if (place := line.find(0)) >= 0:
        raise Fault(
            f"holds a NUL byte at byte {place + 1} of the line; copy or download the file again"
        )
    if len(line) > LINE_LIMIT_BYTES:
        raise Fault(f"is longer than {LINE_LIMIT_BYTES} bytes, want one row per line")
    line = line.removesuffix(b"\n").removesuffix(b"\r")
    try:
        text = line.decode()
    except UnicodeDecodeError as error:
        where = f"byte 0x{line[error.start]:02x} at byte {error.start + 1} of the line"
        raise Fault(f"is not UTF-8 ({where}); save the file as UTF-8") from None
    if "\r" in text:
        raise Fault("holds a carriage return, want LF or CRLF at the end of the line")
    if not FIELDS.fullmatch(text):
        raise Fault(
            "is not CSV: a quote is not closed on its line, "
            "or stands inside a field that is not quoted"
        )
    try:
        return next(csv.reader([text], strict=True), []) or [""]
    except csv.Error:  # its own limit of 131,072 characters
        raise Fault(f"holds a field of more than {FIELD_LIMIT_BYTES} bytes") from None


def _pixel(text: str, column: int) -> int:
    value = _PIXEL.get(text)
    if value is not None:
        return value
    if len(text) > FIELD_LIMIT_BYTES:
        raise Fault(f"has {len(text)} characters, want an integer 0..255", column)
    if (spelling := _PIXEL_SPELLING.fullmatch(text)) and int(spelling[1]) <= 255:
        return int(spelling[1])
    scaled = re.fullmatch(r"0?\.[0-9]*[1-9][0-9]*", text, re.ASCII)
    hint = "; are the pixels already divided by 255?" if scaled else ""
    raise Fault(f"got {text[:40]!r}, want an integer 0..255{hint}", column)


def lex_plainly(
    layout: Layout, block: np.ndarray, start: int, stop: int, image_RP: np.ndarray
) -> Rows:
    """The rows of block[start:stop], which ends in a line feed; pixels are left in `image_RP`."""
    rows: list[tuple[str, str, bytes]] = []
    fault = -1
    for line in io.BytesIO(block[start:stop].tobytes()):
        try:
            rows.append(read_row(line, layout))
        except Fault:
            fault = start
            break
        image_RP[len(rows) - 1] = np.frombuffer(rows[-1][2], np.uint8)
        start += len(line)
    image_RP = image_RP[: len(rows)]
    sum_R, squares_R, hash_R = sum_rows(image_RP)
    labels, label_R = _encoded([label for _, label, _ in rows])
    fonts, font_R = _encoded([font for font, _, _ in rows])
    return Rows(
        image_RP=image_RP,
        labels=labels,
        label_R=label_R,
        fonts=fonts,
        font_R=font_R,
        sum_R=sum_R,
        squares_R=squares_R,
        hash_R=hash_R,
        fault=fault,
    )


def _encoded(texts: list[str]) -> tuple[list[str], np.ndarray]:
    """The different texts as they come, and each one's index among them."""
    index = {text: number for number, text in enumerate(dict.fromkeys(texts))}
    return list(index), np.array([index[text] for text in texts], np.int32)


Lexer = Callable[[Layout, np.ndarray, int, int, np.ndarray], Rows]
"""lex_plainly or its compiled twin."""
