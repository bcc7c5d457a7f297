"""What a CSV must come to, by other means than the product's: csv.reader over the whole text."""

import csv
import io
import re
import unicodedata
from math import isqrt

PIXEL = re.compile(r"(0|[1-9][0-9]{0,2})(\.0+)?", re.ASCII)
BIDI_CONTROLS = {"LRE", "RLE", "LRO", "RLO", "PDF", "LRI", "RLI", "FSI", "PDI"}
FIELD_BYTES = 4096
MAX_LABELS = 256
Row = tuple[str, str, list[int]]


def judge(data: bytes) -> tuple[int | None, list[Row]]:
    """(first faulty row, the rows before it); None: all is well, 0: the header, or no rows."""
    text = data.removeprefix(b"\xef\xbb\xbf").decode(
        errors="surrogateescape"
    )  # a bad byte is a lone surrogate
    lines = list(io.StringIO(text, newline=""))
    reader = csv.reader(iter(lines), strict=True)
    records: list[tuple[list[str], str] | None] = []
    taken = 0
    while True:
        try:
            fields = next(reader)
        except StopIteration:
            break
        except csv.Error:
            records.append(None)
            break
        raw, taken = "".join(lines[taken : reader.line_num]), reader.line_num
        bare = raw.endswith("\r") and taken < len(
            lines
        )  # a CR that ends the file is half of a CRLF
        records.append(None if bare else (fields, raw))
    if records and records[-1] is not None and records[-1][0] == []:
        records.pop()  # one blank line at the end
    if not records or records[0] is None or not _is_whole(*records[0]):
        return 0, []
    header = records[0][0]
    num_text = 2 if header[:2] == ["names", "labels"] else 1
    if not _is_header(header, num_text):
        return 0, []
    rows: list[Row] = []
    labels: dict[str, str] = {}
    for number, record in enumerate(records[1:], start=1):
        row = (
            None if record is None or not _is_whole(*record) else _row(record[0], header, num_text)
        )
        if row is None or labels.setdefault(unicodedata.normalize("NFC", row[1]), row[1]) != row[1]:
            return number, rows
        if len(labels) > MAX_LABELS:
            return number, rows
        rows.append(row)
    return (None, rows) if rows else (0, [])


def _is_header(fields: list[str], num_text: int) -> bool:
    num = len(fields) - num_text
    if num < 1 or isqrt(num) ** 2 != num:
        return False
    if num_text == 2:
        return fields[2:] == [str(i + 1) for i in range(num)]
    return fields[0] == "label" and fields[1:] in (
        [f"pixel{i + k}" for i in range(num)] for k in (0, 1)
    )


def _is_whole(fields: list[str], raw: str) -> bool:
    """Whether it is one line, and each quote in it encloses a field or is doubled there."""
    line = raw.removesuffix("\n").removesuffix("\r")
    if "\n" in line or "\r" in line:
        return False
    place = 0
    for field in fields:
        quoted = line.startswith('"', place)
        token = '"' + field.replace('"', '""') + '"' if quoted else field
        if (not quoted and '"' in token) or not line.startswith(token, place):
            return False
        place += len(token) + 1
    return place == len(line) + 1


def _row(fields: list[str], header: list[str], num_text: int) -> Row | None:
    if len(fields) != len(header) or fields[:num_text] == header[:num_text]:
        return None
    text, pixels = fields[:num_text], fields[num_text:]
    if not all(map(_is_text, text)):
        return None
    if not all(
        PIXEL.fullmatch(pixel) and len(pixel) <= FIELD_BYTES and float(pixel) <= 255
        for pixel in pixels
    ):
        return None
    return text[0] if num_text == 2 else "", text[-1], [int(float(pixel)) for pixel in pixels]


def _is_text(text: str) -> bool:
    """Neither empty nor long, without controls but the tab, and what changes lines or direction."""
    for char in text:
        kind = unicodedata.category(char)
        if kind in ("Cs", "Zl", "Zp") or (kind == "Cc" and char != "\t") or char in "\u200e\u200f":
            return False
        if unicodedata.bidirectional(char) in BIDI_CONTROLS:
            return False
    return 0 < len(text.encode()) <= FIELD_BYTES
