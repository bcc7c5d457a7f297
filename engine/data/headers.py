"""Why a first line is no header of ours, and what to do: the tables people have, by their columns.

Only the sentence is made here; lexer.py decides what is read. P is the number of pixel columns.
"""

import re
from collections.abc import Sequence
from math import isqrt

_NUMBER = re.compile(r"-?[0-9]*\.?[0-9]+(?:[eE][-+]?[0-9]+)?", re.ASCII)
_MANGLED = re.compile(r"[0-9]+(?:\.0)?\.[1-9][0-9]*", re.ASCII)
"""What pandas makes of a number that occurs again among the names of columns."""
_PIXEL_NAME = re.compile(r"[^0-9]*[0-9]+(?:[^0-9]+[0-9]+)?[^0-9]?", re.ASCII)
"""`1x1`, `pixel_0001`, `px(0, 1)`, `12`, and kin."""
UNLABELLED = "--label-column none"
_COLUMN = re.compile("--label-column ([0-9]+)")
_SEPARATORS = (("semicolons", ";"), ("tabs", "\t"), ("vertical bars", "|"), ("spaces", " "))
_IDS = ("", "id", "imageid", "image_id", "index", "unnamed: 0", "filename", "file", "image", "row")
_PIXELS_IN_ONE = ("pixels", "pixel", "image", "img", "image_data", "data", "features")
_MOST_NAMED = 3
_LAYOUTS = ((["names", "labels"], 1, ""), (["label"], 0, "pixel"), (["label"], 1, "pixel"))
"""(Columns before the pixels, the first pixel's number, what stands before the numbers)."""
INDEX_NAMES = ("", "unnamed: 0", "index")
"""What the column of a table's row numbers is called, in lower case."""


def header_hint(columns: Sequence[str]) -> str:
    """What to do with a table whose columns are called so; "" if it is like none that is known."""
    first = columns[0]
    if first.startswith("sep="):
        return "this is an Excel separator line; delete the first line"
    if first.startswith("#"):
        return "this is a comment; delete it"
    if all(not column.strip() for column in columns):
        return "the first line is blank; delete it"
    if len(columns) < 3:
        return _too_few(columns)
    if all(_NUMBER.fullmatch(column) for column in columns):
        return _numbers(columns)
    return _spelling(columns) or _names(columns)


def _square(number: int) -> int:
    """The side of a square of so many pixels, or 0."""
    side = isqrt(max(number, 0))
    return side if side**2 == number else 0


def _header(num_pixels: int) -> str:
    return f"label,pixel0,...,pixel{num_pixels - 1}"


def _too_few(columns: Sequence[str]) -> str:
    text = ",".join(columns)
    for name, separator in _SEPARATORS:
        if text.count(separator) > 2:
            return f"it is separated by {name}, write commas"
    if any(column.count(",") > 1 for column in columns):
        return "the whole line stands in quotes; delete the outer quotes in every line"
    return _in_one_column(columns)


def _in_one_column(columns: Sequence[str]) -> str:
    for column in columns:
        if column.strip().lower() in _PIXELS_IN_ONE:
            return f"the pixels stand in one column, {column!r}; write a column for each"
    return "there are no columns of pixels; is this another table?"


def _numbers(columns: Sequence[str]) -> str:
    """The first line is a row, or pandas has numbered the columns."""
    num = len(columns)
    if not _square(num - 1) and not _square(num):
        return (
            f"the first line is a row, and {num - 1} pixels behind a label are no square; "
            f"write a header first, and pad the images"
        )
    if len(set(columns)) == num and any(_MANGLED.fullmatch(column) for column in columns):
        header = _header(num - 1)
        return f"pandas took a row for names; read it with header=None, and write {header}"
    if not _square(num - 1):
        what = f"there is no label column, only {num} numbers; is this a test set?"
        return f"{what} only tools/predict takes it: {UNLABELLED} --no-header"
    if list(columns) in ([str(i) for i in range(num)], [str(i) for i in range(1, num + 1)]):
        return f"the columns are numbers; rename {columns[0]}..{columns[-1]} to {_header(num - 1)}"
    return f"the first line is a row; put the line {_header(num - 1)} first, or give --no-header"


def _spelling(columns: Sequence[str]) -> str:
    """Names that are ours but for spaces, case, a last comma, or row numbers in front."""
    stripped = [column.strip() for column in columns]
    if stripped != list(columns) and is_layout(stripped):
        return "delete the spaces around the names of the columns"
    if is_layout([column.lower() for column in stripped]):
        return "write the names in lower case"
    if not columns[-1]:
        return "the line ends in a comma; delete the empty last column in every line"
    if columns[0].lower() in INDEX_NAMES:
        rest = columns[1:]
        then = "" if is_layout(rest) else _COLUMN.sub(_with_index, header_hint(rest))
        flag = "" if "names" in rest else ", or give --index-column"
        hint = f"drop the first column, pandas' row numbers (index=False){flag}"
        return f"{hint}; then {then}" if then else hint
    return ""


def _with_index(found: re.Match[str]) -> str:
    """The flag that counts without the row numbers, and its number with them."""
    return f"{found[0]} ({int(found[1]) + 1} with --index-column)"


def is_layout(columns: Sequence[str]) -> bool:
    return num_texts(columns) > 0


def num_texts(columns: Sequence[str]) -> int:
    """Of a header of ours, of any square, the columns before the pixels; 0 of another."""
    for texts, first, prefix in _LAYOUTS:
        num = len(columns) - len(texts)
        pixels = [f"{prefix}{number}" for number in range(first, first + num)]
        if _square(num) and list(columns) == texts + pixels:
            return len(texts)
    grid = _grid(len(columns) - 1)
    return 1 if grid and list(columns) == ["label", *grid] else 0


def _grid(num: int) -> list[str]:
    """`1x1` (row and column) and so on, for a square of so many pixels."""
    numbers = range(1, _square(num) + 1)
    return [f"{row}x{column}" for row in numbers for column in numbers]


def are_pixels(names: Sequence[str]) -> bool:
    """Whether a square's pixels are called so: pixel0.., pixel1.., 0.., 1.. or 1x1.., in order."""
    num = len(names)
    runs = [
        [f"{prefix}{first + i}" for i in range(num)] for prefix in ("pixel", "") for first in (0, 1)
    ]
    return bool(_square(num)) and list(names) in [*runs, _grid(num)]


def _names(columns: Sequence[str]) -> str:
    """Columns of other names or in another order."""
    texts = [column for column in columns if not _PIXEL_NAME.fullmatch(column)]
    pixels = [column for column in columns if _PIXEL_NAME.fullmatch(column)]
    if not pixels or len(pixels) < len(texts):
        if _is_row_of_tmnist(columns):
            return _row_of_tmnist(len(columns) - 2)
        return _in_one_column(columns)
    if all(map(_NUMBER.fullmatch, columns[1:])) and (hint := _row_with_text(columns)):
        return hint
    if _is_row_of_tmnist(columns):
        return _row_of_tmnist(len(columns) - 2)
    if len(set(columns)) < len(columns):
        seen = next(column for column in columns if list(columns).count(column) > 1)
        return f"the column {seen!r} occurs twice; were files joined side by side?"
    if not _square(len(pixels)):
        return _no_square(len(pixels))
    return _texts(columns, texts, pixels)


def _is_row_of_tmnist(columns: Sequence[str]) -> bool:
    """Name, label and numbers that are grey values: some repeat, and they do not count up."""
    pixels = columns[2:]
    return (
        bool(_square(len(pixels)))
        and all(map(_NUMBER.fullmatch, pixels))
        and (len(set(pixels)) < len(pixels) or len(pixels) == 1)
        and "labels" not in columns[:2]
    )


def _row_of_tmnist(num_pixels: int) -> str:
    return f"the first line is a row, not names; put the line names,labels,1,...,{num_pixels} first"


def _row_with_text(columns: Sequence[str]) -> str:
    """A row whose label is a text, or columns that are numbered behind a name."""
    if not _square(len(columns) - 1) or _is_run(columns[1:]):
        return ""
    if len(set(columns[1:])) == len(columns) - 1:
        return ""
    header = _header(len(columns) - 1)
    return f"the first line is a row; put the line {header} first, or give --no-header"


def _is_run(pixels: Sequence[str]) -> bool:
    """0, 1, 2, ... or 1, 2, 3, ..."""
    first = 0 if pixels[0] == "0" else 1
    return list(pixels) == [str(number) for number in range(first, first + len(pixels))]


def _no_square(num: int) -> str:
    if num % 3 == 0 and _square(num // 3):
        side = _square(num // 3)
        return f"{num} pixels are {side} x {side} in 3 colours; write grey images"
    return f"{num} pixels are no square; pad or cut each image to one"


def _texts(columns: Sequence[str], texts: list[str], pixels: list[str]) -> str:
    """By the columns that are no pixels; `pixels` are a square."""
    lower = [text.strip().lower() for text in texts]
    if not texts or (len(texts) == 1 and lower[0] in _IDS):
        only = f" ({texts[0]!r} is none)" if texts else ""
        what = f"there is no label column{only}; is this a test set?"
        if texts:
            return f"{what} name the file with labels"
        return f"{what} only tools/predict takes it: {UNLABELLED}"
    if sorted(lower) in (["labels", "names"], ["label", "name"], ["label", "names"]):
        return _of_tmnist(columns, pixels)
    if len(texts) > 1:
        keep = next((text for text in texts if text.lower() in ("label", "labels")), None)
        drop = [text for text in texts if text != keep]
        dropped = ", ".join(map(repr, drop[:_MOST_NAMED])) + (", ..." if drop[_MOST_NAMED:] else "")
        if keep is None:
            return f"keep one column, the label, and call it label; the others are {dropped}"
        rest = [column for column in columns if column not in drop]
        then = "" if is_layout(rest) else header_hint(rest)
        return f"drop {dropped}" + (f"; then {then}" if then else "")
    return _of_mnist(columns, texts[0], pixels)


def _of_mnist(columns: Sequence[str], label: str, pixels: list[str]) -> str:
    """With one column beside the pixels."""
    rename = "" if is_layout(["label", *pixels]) else _rename(pixels, "pixel", 0)
    if columns[0] == label:
        call = "" if label == "label" else f"rename {label!r} to label"
        return "; ".join(filter(None, (call, rename)))
    move = f"move {label!r} to the front" + ("" if label == "label" else " and call it label")
    hint = f"give --label-column {_place(columns, label)}, or {move}"
    if not rename:
        return hint
    return f"{hint} and {rename}" if are_pixels(pixels) else f"{hint}; {rename}"


def _place(columns: Sequence[str], name: str) -> str:
    """Where a column stands, as --label-column takes it."""
    return "last" if columns[-1] == name else str(list(columns).index(name) + 1)


def _of_tmnist(columns: Sequence[str], pixels: list[str]) -> str:
    steps = []
    if list(columns[:2]) != ["names", "labels"]:
        steps.append("the first two columns must be names, then labels; re-order or rename them")
    if not is_layout(["names", "labels", *pixels]):
        steps.append(_rename(pixels, "", 1))
    return "; ".join(steps)


def _rename(pixels: list[str], prefix: str, first: int) -> str:
    want = [f"{prefix}{number}" for number in range(first, first + len(pixels))]
    if sorted(pixels) == sorted(want):
        return f"the pixels are in another order; sort them {want[0]}, {want[1]}, {want[2]}, ..."
    return f"rename {pixels[0]}..{pixels[-1]} to {want[0]}..{want[-1]}"
