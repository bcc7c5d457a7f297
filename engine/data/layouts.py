"""Which layout a file or folder has: decided by its bytes, never by its name.

A gzip is looked into; of a folder, names are looked at. What is none of these is read as a CSV,
which says what it is instead.
"""

import gzip
import zipfile
from collections.abc import Sequence
from pathlib import Path
from typing import Literal, get_args

from engine.data.foreign import HEAD_BYTES, has_class_folders, is_idx
from engine.data.source import OPENED, open_file, reading, unzipping
from engine.errors import UserError

Layouts = Literal["auto", "csv", "idx", "npz", "png", "parquet", "arrow"]
LAYOUTS: tuple[Layouts, ...] = get_args(Layouts)
_MAGIC: tuple[tuple[bytes, Layouts], ...] = (
    (b"PAR1", "parquet"),
    (b"ARROW1", "arrow"),
    (b"\xff\xff\xff\xff", "arrow"),
)
"""Of files that are not looked for in a gzip."""


def layout_of(paths: Sequence[Path], asked: Layouts = "auto") -> Layouts:
    """The one layout of all `paths`; UserError if they have several.

    Args:
        asked: the layout to take whatever the bytes say; auto: what they say.
    """
    if asked != "auto":
        return asked
    found = [_layout(path) for path in paths]
    for path, layout in zip(paths, found, strict=True):
        if layout != found[0]:
            if path.is_dir() and layout == "csv":
                what = f"is a folder without class folders, but {paths[0]} is {found[0]}"
                raise UserError(f"{path}: {what}; name sources of one layout")
            if layout == "csv" and not OPENED.fullmatch(str(path)):
                first_bytes(path)  # says why, where it cannot be read
            raise UserError(
                f"{path}: has the layout {layout}, but {paths[0]} {found[0]}; "
                f"pack files of one layout, or say which with --layout"
            )
    return found[0]


def _layout(path: Path) -> Layouts:
    if OPENED.fullmatch(str(path)):
        return "csv"
    try:
        if path.is_dir():
            return "png" if has_class_folders(path) else "csv"
        head, is_packed = first_bytes(path)
        if is_idx(head):
            return "idx"
        if head.startswith(b"PK"):
            return "npz" if not is_packed and _holds_arrays(path) else "csv"
        if is_packed:
            return "csv"
        found = [layout for magic, layout in _MAGIC if head.startswith(magic)]
        return found[0] if found else "csv"
    except (OSError, UserError):
        return "csv"


def first_bytes(path: Path) -> tuple[bytes, bool]:
    """(First HEAD_BYTES of a file or of what a gzip holds, whether it is a gzip); UserError if it
    cannot be read."""
    with open_file(path) as file, reading(file.name):
        if file.raw.peek(2)[:2] != b"\x1f\x8b":
            return file.raw.read(HEAD_BYTES), False
        with gzip.open(file.raw) as unpacked:
            return unpacked.read(HEAD_BYTES), True


def _holds_arrays(path: Path) -> bool:
    """Whether a zip holds NumPy's arrays and nothing else."""
    with open_file(path) as file, unzipping(file.name), zipfile.ZipFile(file.raw) as archive:
        names = archive.namelist()
    return bool(names) and all(name.endswith(".npy") for name in names)
