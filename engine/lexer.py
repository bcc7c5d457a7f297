"""CSV bytes -> rows, strict: what is not exactly TMNIST's language is refused with its place.

Accepted: UTF-8 (BOM dropped), RFC 4180 quoting, the header names,labels,1..P with P a square number, and pixels
`0|[1-9][0-9]{0,2}` up to 255 with an optional `.0` (any number of zeros). Pixels are looked up in a table of their
accepted spellings, never parsed as floats: float parsers take ` 5`, `1e2`, `nan` and full-width digits.
"""

import csv
import re
from collections.abc import Iterable, Iterator
from math import isqrt

from engine.errors import UserError

FIELD_LIMIT_BYTES = 4096
_PIXEL = {text: value for value in range(256) for text in (str(value), f"{value}.0")}
_LONGER_PIXEL = re.compile(r"(0|[1-9][0-9]{0,2})\.0+", re.ASCII)

Row = tuple[str, str, bytes]
"""(font name, label, pixels)"""


class CsvRows:
    """The rows of a TMNIST CSV.

    Args:
        lines: decoded lines with their line ends (a text file opened with newline="").
        source: the name that stands in errors.
    Raises:
        UserError: from the constructor for the header, while iterating for a row.
    """

    def __init__(self, lines: Iterable[str], source: str) -> None:
        self.source = source
        csv.field_size_limit(FIELD_LIMIT_BYTES)
        self._reader = csv.reader(lines, strict=True)
        self._row = 0
        header = self._next()
        if header is None:
            raise UserError(f"{source}: is empty; want the header names,labels,1,2,... and rows")
        self.num_pixels = self._check_header(header)
        self.side = isqrt(self.num_pixels)

    def __iter__(self) -> Iterator[Row]:
        while (fields := self._next()) is not None:
            self._row += 1
            if len(fields) != self.num_pixels + 2:
                hint = "; are decimals written with a comma?" if len(fields) == 2 * self.num_pixels + 2 else ""
                raise self._fault(f"got {len(fields)} fields, want {self.num_pixels + 2}{hint}")
            font, label = fields[0], fields[1]
            if not font or not label:
                raise self._fault("is empty, want text", column=1 if not font else 2)
            yield font, label, self._pixels(fields)

    def _pixels(self, fields: list[str]) -> bytes:
        try:
            return bytes([_PIXEL[text] for text in fields[2:]])
        except KeyError:
            return bytes([self._pixel(text, column) for column, text in enumerate(fields[2:], start=3)])

    def _pixel(self, text: str, column: int) -> int:
        value = _PIXEL.get(text)
        if value is None and _LONGER_PIXEL.fullmatch(text):
            value = _PIXEL.get(text.partition(".")[0])
        if value is None:
            hint = "; are the pixels already divided by 255?" if re.fullmatch(r"0\.\d*[1-9]\d*", text) else ""
            raise self._fault(f"got {text[:40]!r}, want an integer 0..255{hint}", column=column)
        return value

    def _next(self) -> list[str] | None:
        first_line = self._reader.line_num + 1
        try:
            fields = next(self._reader, None)
        except csv.Error as error:
            raise self._fault(f"is not CSV ({error})", line=first_line) from None
        except UnicodeDecodeError as error:
            raise self._fault(f"is not UTF-8 ({error.reason}, byte 0x{error.object[error.start]:02x})") from None
        except EOFError:  # what gzip and zipfile raise for a cut file
            raise UserError(f"{self.source}: the compressed file ends too early; download it again") from None
        if fields is not None and self._reader.line_num > first_line:
            raise self._fault("has a line break inside quotes, want one row a line", line=first_line)
        return fields

    def _check_header(self, header: list[str]) -> int:
        if header and header[0].startswith("\ufeff"):
            header[0] = header[0].removeprefix("\ufeff")
        num_pixels = len(header) - 2
        want = ["names", "labels", *map(str, range(1, num_pixels + 1))]
        if num_pixels < 1 or header != want or isqrt(num_pixels) ** 2 != num_pixels:
            got = ",".join(header)[:60]
            hint = "; this is an HTML page: log in and download again" if got.lstrip().startswith("<") else ""
            hint = (
                "; this is a pointer of git-lfs: run git lfs pull"
                if got.startswith("version https://git-lfs")
                else hint
            )
            raise self._fault(f"got the header {got!r}, want names,labels,1,2,...,784{hint}")
        return num_pixels

    def _fault(self, what: str, *, column: int = 0, line: int = 0) -> UserError:
        name = ("names", "labels")[column - 1] if column < 3 else str(column - 2)
        place = f"row {self._row}" + (f", column {column} {name!r}" if column else "")
        return UserError(f"{self.source}:{line or self._reader.line_num or 1} ({place}): {what}")
