"""The record files: Arrow IPC files of uint8 images, under a manifest that covers every byte.

A record directory holds `<split>-00000.arrow` ..., `fonts.json` (typeface names), `manifest.json`
(written last) and `manifest.sha256`. Each Arrow file is one record batch with the columns image
(fixed-size list of H*W uint8), label (dictionary of class names) and font (dictionary of typeface
names), so pandas, polars and DuckDB open it as it is.

Opening verifies every byte against the manifest before it means anything (record_file.py).

Does not: split, shuffle or augment (pack.py, order.py, feeds/), nor touch torch.

Shapes: N images of a split, M of them, H x W pixels, P = H * W.
"""

import errno
import hashlib
import json
import os
from bisect import bisect_right
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import accumulate, count, pairwise, repeat
from pathlib import Path
from typing import Any

import numpy as np

from engine.data.record_file import (
    FONTS,
    FONTS_LIMIT_BYTES,
    FORMAT,
    SPLITS,
    VERSION,
    FileEntry,
    are_counts,
    entries_of,
    write_file,
)
from engine.data.remote import is_copy, local
from engine.data.table import Table
from engine.durable import (
    MANIFEST,
    Damaged,
    Disturbed,
    Foreign,
    parse_json,
    read_manifest,
    read_small,
    refuse_unknown_files,
    write_manifest,
)
from engine.errors import UserError

MAX_CLASSES = 256
MAX_PIXELS = 2**24
FILE_LIMIT_BYTES = 64 * 2**20
GIVEN = "given_splits"
"""The manifest's key of the splits that the source gave; it is there only where it did."""
ROW_OVERHEAD_BYTES = 5  # label index 1, font index 4
ARROW_OVERHEAD_BYTES = 2**16  # schema, messages, the classes, paddings
WRITERS = 2
READERS = 4
REMEDY = "pack the CSV again with tools/pack_tmnist"
READ_AGAIN = "the disk fails: look at the system's log, and bring the records to another disk"
Take = Callable[[np.ndarray], np.ndarray]
"""Row numbers (M,), ascending -> their pixels (M, P) uint8; called from several threads."""


@dataclass(frozen=True, kw_only=True)
class Split:
    """One split in memory: contiguous arrays of equal length N."""

    image_NHW: np.ndarray
    """uint8; or StoredImages, which are indexed alike."""
    label_N: np.ndarray
    """uint8, index into Records.classes."""
    font_N: np.ndarray
    """int32, index into Records.fonts."""

    def __post_init__(self) -> None:
        n = len(self.image_NHW)
        assert self.image_NHW.dtype == np.uint8 and self.image_NHW.ndim == 3
        assert isinstance(self.image_NHW, StoredImages) or self.image_NHW.flags.c_contiguous
        assert self.label_N.dtype == np.uint8 and self.label_N.shape == (n,)
        assert self.font_N.dtype == np.int32 and self.font_N.shape == (n,)

    def __len__(self) -> int:
        return len(self.image_NHW)

    @property
    def height_width(self) -> tuple[int, int]:
        _, height, width = self.image_NHW.shape
        return height, width

    def take(self, rows: np.ndarray) -> "Split":
        return Split(
            image_NHW=self.image_NHW[rows], label_N=self.label_N[rows], font_N=self.font_N[rows]
        )


@dataclass(frozen=True, kw_only=True)
class Records:
    """A data set: its splits, the names behind indices, and the fingerprint checkpoints carry."""

    splits: dict[str, Split]
    classes: tuple[str, ...]
    fonts: tuple[str, ...]
    fingerprint: str
    pixel_mean: float
    """Mean of the train split's pixels, 0..255."""
    pixel_std: float
    given: tuple[str, ...] = ()
    """The splits that their source gave; the others were drawn from it, as all are where none."""
    path: str = ""

    @property
    def height_width(self) -> tuple[int, int]:
        return self.splits["train"].height_width

    def split(self, name: str) -> Split:
        """The split called `name`; UserError if the records were packed without it."""
        if name not in SPLITS:
            raise UserError(f"there is no split {name!r}; choose one of {', '.join(SPLITS)}")
        if name not in self.splits:
            raise UserError(f"{self.path}: has no {name} split; pack it again with --split random")
        return self.splits[name]

    def asked(self, name: str) -> Split:
        """The split that a command's --split names; UserError if it is not there, or is empty."""
        filled = [split for split, content in self.splits.items() if len(content)]
        if name not in filled:
            what = "has no image in" if name in self.splits else "has no split"
            raise UserError(
                f"{self.path}: {what} {name}, but {', '.join(filled)}; name another --split"
            )
        return self.splits[name]


def write_records(
    directory: Path,
    table: Table,
    take: Take,
    rows: dict[str, np.ndarray],
    facts: dict[str, Any],
) -> dict[str, Any]:
    """Write a record directory's files into the empty `directory`; returns its manifest.

    The same arguments give the same bytes. Memory: WRITERS files of at most 64 MiB at a time.

    Args:
        rows: each split's row numbers, ascending.
        facts: what else the manifest says.
    Raises:
        OSError: the disk refused.
    """
    fonts_json = json.dumps(table.fonts, ensure_ascii=False).encode()
    (directory / FONTS).write_bytes(fonts_json)
    room = FILE_LIMIT_BYTES - ARROW_OVERHEAD_BYTES - 2 * len(fonts_json)
    rows_per_file = max(room // (table.side**2 + ROW_OVERHEAD_BYTES), 1)

    manifest = facts | {
        "format": FORMAT,
        "version": VERSION,
        "height": table.side,
        "width": table.side,
        "classes": list(table.classes),
        "fonts": {"bytes": len(fonts_json), "sha256": hashlib.sha256(fonts_json).hexdigest()},
        "train_pixels": table.pixels(rows["train"]),
        "splits": _write_splits(directory, table, take, rows, rows_per_file),
    }
    manifest["fingerprint"] = _fingerprint(manifest)
    write_manifest(directory, manifest)
    return manifest


def _write_splits(
    directory: Path, table: Table, take: Take, rows: dict[str, np.ndarray], rows_per_file: int
) -> dict[str, Any]:
    """Write the Arrow files; what the manifest says of each split."""

    def write(name: str, number: int, row_M: np.ndarray) -> dict[str, Any]:
        return write_file(directory / f"{name}-{number:05}.arrow", table, row_M, take(row_M))

    with ThreadPoolExecutor(WRITERS) as pool:
        files = {}
        for name, row_M in rows.items():
            parts = np.split(row_M, range(rows_per_file, len(row_M), rows_per_file))
            files[name] = pool.map(write, repeat(name), count(), parts)
        return {
            name: {
                "rows": len(row_M),
                "rows_per_class": table.rows_per_class(row_M),
                "files": list(files[name]),
            }
            for name, row_M in rows.items()
        }


def open_records(path: str | Path, *, in_memory: bool = True) -> Records:
    """Open a record directory, verified to the last byte.

    Args:
        path: or its URL (s3://...), whose records are fetched into the user's cache.
        in_memory: read all pixels into one array per split. Otherwise they stay on disk, and a
            block is read and verified when it is indexed; labels and fonts (5 bytes per image) are
            read in any case.
    Raises:
        UserError: not a record directory, incomplete, damaged, or of another version.
    """
    directory = local(path)
    if directory.is_file():
        what = "is a file, want a record directory"
        raise UserError(f"{path}: {what}; make one of it: tools/pack_tmnist {path} RECORDS")
    if not directory.is_dir():
        raise UserError(f"{path}: no such record directory; {REMEDY}")
    with _refusing(directory):
        return _open(directory, in_memory)


def verify_records(path: str | Path, fingerprint: str = "") -> dict[str, Any]:
    """Check the SHA-256 of every file besides all that `open_records` checks; returns the manifest.

    Raises:
        UserError: damaged in any way, or not the records of `fingerprint` (its beginning, in
            hexadecimal).
    """
    records = open_records(path, in_memory=False)
    if not records.fingerprint.startswith(fingerprint.lower()):
        raise UserError(
            f"{path}: its fingerprint is {records.fingerprint}, not {fingerprint}; "
            f"these are other records"
        )
    directory = Path(records.path)
    with _refusing(directory):
        manifest = read_manifest(directory, FORMAT, VERSION)
        for file in (file for split in manifest["splits"].values() for file in split["files"]):
            with open(directory / file["name"], "rb") as opened:
                found = hashlib.file_digest(opened, "sha256").hexdigest()
            if found != file["sha256"]:
                raise Damaged(f"{file['name']} has SHA-256 {found}, want {file['sha256']}")
    return manifest


@contextmanager
def _refusing(directory: Path) -> Iterator[None]:
    try:
        yield
    except Disturbed as error:
        raise UserError(f"{directory}: {error}") from None
    except Foreign as error:
        raise UserError(f"{directory}: is no record directory: {error}; name one") from None
    except Damaged as error:
        is_there = (directory / MANIFEST).exists()
        kind = "damaged" if is_there else "incomplete or not a record directory"
        raise UserError(f"{directory}: {kind}: {error}; {_remedy(directory)}") from None
    except OSError as error:
        reason = error.strerror or error
        remedy = READ_AGAIN if error.errno == errno.EIO else _remedy(directory)
        raise UserError(f"{directory}: cannot be read ({reason}); {remedy}") from None


def _remedy(directory: Path) -> str:
    return "delete this copy; it is fetched again" if is_copy(directory) else REMEDY


class StoredImages:
    """The images of a split on disk, (N, H, W) uint8; indexing reads and verifies blocks.

    Ascending runs of rows are read as wholes, and of each block they touch, all. The files stay
    open, so a directory that is replaced meanwhile is read as it was. May be used from several
    threads.

    Raises:
        UserError: from indexing, when a block is damaged or its file was cut.
    """

    dtype = np.dtype(np.uint8)
    ndim = 3

    def __init__(
        self, directory: Path, files: list[FileEntry], height_width: tuple[int, int]
    ) -> None:
        self._directory = directory
        self.files = files
        self.handles: list[int] = []
        for file in files:  # one by one: where one cannot be opened, the others are closed
            self.handles.append(file.open(directory))
        self.edges = [0, *accumulate(file.rows for file in files)]
        """The first row of each file, and N."""
        self.shape = (self.edges[-1], *height_width)

    def __len__(self) -> int:
        return self.shape[0]

    def read_into(self, row: int, out_MP: np.ndarray) -> None:
        """Fill `out_MP` (M, P) with the pixels of the rows from `row` on."""
        with _refusing(self._directory):
            while len(out_MP):
                number = bisect_right(self.edges, row) - 1
                file = self.files[number]
                first = row - self.edges[number]
                out = out_MP[: file.rows - first]
                out_MP = out_MP[file.rows - first :]
                file.read(
                    self.handles[number],
                    file.image_offset + first * out.shape[1],
                    out.reshape(-1).data,
                )
                row += len(out)

    def __getitem__(self, rows: Any) -> np.ndarray:
        if isinstance(rows, (int, np.integer)):
            image_HW: np.ndarray = self[np.array([rows])][0]
            return image_HW
        row_M = np.arange(*rows.indices(len(self))) if isinstance(rows, slice) else np.asarray(rows)
        if len(row_M) and not 0 <= row_M.min() <= row_M.max() < len(self):
            raise IndexError(f"rows {row_M.min()} to {row_M.max()} of {len(self)}")
        out_MP = np.empty((len(row_M), self.shape[1] * self.shape[2]), np.uint8)
        jumps = (np.flatnonzero(np.diff(row_M) != 1) + 1).tolist()
        for start, stop in pairwise([0, *jumps, len(row_M)]):
            if start < stop:
                self.read_into(int(row_M[start]), out_MP[start:stop])
        return out_MP.reshape(len(row_M), *self.shape[1:])

    def __del__(self) -> None:
        for handle in self.handles:
            os.close(handle)


def _open(directory: Path, in_memory: bool) -> Records:
    manifest = read_manifest(directory, FORMAT, VERSION)
    try:
        files = _checked_files(manifest)
        mean, std = _checked_pixels(manifest)
        names = [file.name for split in files.values() for file in split]
        if len(set(names)) < len(names):
            raise Damaged("a file is listed twice")
        refuse_unknown_files(directory, {FONTS, *names})
        fonts = _read_fonts(directory, manifest["fonts"])
    except (AttributeError, KeyError, OverflowError, TypeError, ValueError) as error:
        raise Damaged(f"{MANIFEST} is malformed ({error!r})") from None
    height_width = manifest["height"], manifest["width"]
    classes = tuple(manifest["classes"])
    splits = {}
    for name, entries in files.items():
        splits[name] = split = _read_split(directory, entries, height_width, in_memory)
        if not _lie_in(split.label_N, classes) or not _lie_in(split.font_N, fonts):
            raise Damaged(f"split {name}: a label or font index lies outside its table")
    return Records(
        splits=splits,
        classes=classes,
        fonts=fonts,
        fingerprint=manifest["fingerprint"],
        pixel_mean=mean,
        pixel_std=std,
        given=tuple(manifest.get(GIVEN, ())),
        path=str(directory),
    )


def _checked_files(manifest: dict[str, Any]) -> dict[str, list[FileEntry]]:
    """Each split's files, where all that the manifest says of them agrees."""
    height_width = manifest["height"], manifest["width"]
    classes = manifest["classes"]
    splits = manifest["splits"]
    if not are_counts(*height_width) or not 0 < height_width[0] * height_width[1] <= MAX_PIXELS:
        raise Damaged(f"images of {height_width} pixels cannot be")
    if not _are_texts(classes) or not 0 < len(classes) <= MAX_CLASSES:
        raise Damaged(f"the classes are not 1 to {MAX_CLASSES} different texts")
    if "train" not in splits or not set(splits) <= set(SPLITS):
        raise Damaged(f"the splits are {sorted(splits)}, want train, or {', '.join(SPLITS)}")
    if GIVEN in manifest and not _are_given(manifest[GIVEN], splits):
        raise Damaged(f"the given splits are {str(manifest[GIVEN])[:40]}, want some of the splits")
    files = {}
    for name in SPLITS:
        if name in splits:
            num_pixels = height_width[0] * height_width[1]
            files[name] = entries_of(name, splits[name]["files"], num_pixels)
            if sum(file.rows for file in files[name]) != splits[name]["rows"]:
                raise Damaged(f"the files of split {name} do not add up to its rows")
    if manifest["fingerprint"] != _fingerprint(manifest):
        raise Damaged("the fingerprint does not belong to the files listed")
    return files


def _are_given(names: Any, splits: dict[str, Any]) -> bool:
    """Whether these may be the splits that a source gave: train and others of the splits."""
    if not _are_texts(names) or len(names) < 2:
        return False
    return "train" in names and set(names) <= set(splits)


def _checked_pixels(manifest: dict[str, Any]) -> tuple[float, float]:
    mean, std = (float(manifest["train_pixels"][key]) for key in ("mean", "std"))
    if not (0 <= mean <= 255 and 0 <= std <= 127.5):  # also of NaN
        raise Damaged(f"pixels cannot have a mean of {mean} and a standard deviation of {std}")
    return mean, std


def _lie_in(index_N: np.ndarray, names: tuple[str, ...]) -> bool:
    return not len(index_N) or 0 <= index_N.min() <= index_N.max() < len(names)


def _read_split(
    directory: Path, files: list[FileEntry], height_width: tuple[int, int], in_memory: bool
) -> Split:
    # Every size is compared before anything is allocated.
    stored = StoredImages(directory, files, height_width)
    num_pixels = height_width[0] * height_width[1]
    image_NHW: Any = np.empty(stored.shape, np.uint8) if in_memory else stored
    label_N = np.empty(len(stored), np.uint8)
    font_N = np.empty(len(stored), np.int32)

    def read(number: int) -> None:
        rows = slice(*stored.edges[number : number + 2])
        label_N[rows], font_N[rows] = files[number].read_columns(stored.handles[number], num_pixels)
        if in_memory:
            stored.read_into(rows.start, image_NHW[rows].reshape(-1, num_pixels))

    with ThreadPoolExecutor(READERS) as pool:
        list(pool.map(read, range(len(files))))
    return Split(image_NHW=image_NHW, label_N=label_N, font_N=font_N)


def _read_fonts(directory: Path, entry: dict[str, Any]) -> tuple[str, ...]:
    data = read_small(directory / FONTS, FONTS_LIMIT_BYTES)
    if (len(data), hashlib.sha256(data).hexdigest()) != (entry["bytes"], entry["sha256"]):
        raise Damaged(f"{FONTS} has not the SHA-256 that {MANIFEST} gives")
    fonts = parse_json(data, FONTS)
    if not _are_texts(fonts):
        raise Damaged(f"{FONTS} is not a list of different texts")
    return tuple(fonts)


def _are_texts(values: Any) -> bool:
    """A list of different strings; ValueError if one cannot be written as UTF-8."""
    if not isinstance(values, list) or not all(isinstance(value, str) for value in values):
        return False
    return len({value.encode() for value in values}) == len(values)


def _fingerprint(manifest: dict[str, Any]) -> str:
    """SHA-256 over what decides what is trained on: size, classes, and each file's SHA-256; and
    which splits the source gave, where it did."""
    files = {
        name: [file["sha256"] for file in split["files"]]
        for name, split in manifest["splits"].items()
    }
    content = [manifest["height"], manifest["width"], manifest["classes"], files]
    content += [manifest[GIVEN]] if GIVEN in manifest else []
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()
