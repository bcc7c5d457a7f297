"""Rows -> splits -> published records. The command tools/pack_tmnist is a front of `pack`.

Does not yet bound its memory: all pixels of the CSV are held once (215 MB for the full set), and once more per split.

Shapes: N rows of the CSV, H x W pixels.
"""

import gzip
import io
import os
import stat
import time
import zipfile
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any, Literal

import numpy as np

from engine.errors import UserError
from engine.lexer import CsvRows
from engine.order import permute, round_keys
from engine.publish import MANIFEST, locked, writing
from engine.records import MAX_CLASSES, Split, write_records

SplitMode = Literal["random", "none"]
EVAL_FRACTION = 0.15
"""Part of each class in val, and again in test; train has the rest (the study's 70/15/15)."""
PROGRESS_ROWS = 2000

Progress = Callable[[int, float], None]
"""Called with the rows read and the part (0..1) of the source's bytes."""


@dataclass(frozen=True, kw_only=True)
class PackReport:
    """What a pack did; `manifest` holds the counts per class and split."""

    manifest: dict[str, Any]
    rows_read: int
    out_bytes: int
    seconds: float


def pack(
    source: Path,
    out: Path,
    *,
    mode: SplitMode = "random",
    balance: bool = False,
    seed: int = 42,
    force: bool = False,
    progress: Progress = lambda rows, part: None,
) -> PackReport:
    """Read a TMNIST CSV (plain, .gz, or a .zip holding one) and publish it as a record directory.

    Raises:
        UserError: the source is refused, or `out` exists and may not be replaced; nothing was published.
    """
    start = time.perf_counter()
    _check_target(out, force)
    everything, classes, fonts = _read(source, progress)
    options = {"split": mode, "balance": balance, "seed": seed}
    rows = draw_splits(everything.label_N, classes, mode=mode, balance=balance, seed=seed)
    with writing(out), locked(out):
        _check_target(out, force)
        splits = {name: everything.take(rows_M) for name, rows_M in rows.items()}
        manifest = write_records(out, splits, classes=classes, fonts=fonts, options=options)
    out_bytes = sum(file.stat().st_size for file in out.iterdir())
    return PackReport(
        manifest=manifest, rows_read=len(everything), out_bytes=out_bytes, seconds=time.perf_counter() - start
    )


def draw_splits(
    label_N: np.ndarray, classes: tuple[str, ...], *, mode: SplitMode, balance: bool, seed: int
) -> dict[str, np.ndarray]:
    """Row numbers of each split, ascending.

    Within each class the rows are put into the order of a keyed bijection of (seed, class name); its head is val, then
    test, the rest train. So the draw is stratified and equal on every platform.

    Raises:
        UserError: a class is too small to stand in all three splits.
    """
    counts = np.bincount(label_N, minlength=len(classes))
    drawn: dict[str, list[np.ndarray]] = {"train": []} if mode == "none" else {"train": [], "val": [], "test": []}
    for label, name in enumerate(classes):
        count = int(counts[label])
        kept = int(counts.min()) if balance else count
        if mode == "random" and kept < 3:
            raise UserError(f"the class {name!r} has {kept} rows, want at least 3 to split; use --split none")
        shuffled = permute(np.arange(count), count, round_keys(seed, "split", name))[:kept]
        row_M = np.flatnonzero(label_N == label)[shuffled]
        held_out = 0 if mode == "none" else max(1, round(kept * EVAL_FRACTION))
        drawn["train"].append(row_M[2 * held_out :])
        if mode == "random":
            drawn["val"].append(row_M[:held_out])
            drawn["test"].append(row_M[held_out : 2 * held_out])
    return {split: np.sort(np.concatenate(parts)) for split, parts in drawn.items()}


def _check_target(out: Path, force: bool) -> None:
    if not out.name or out.name == "..":
        raise UserError(f"{out}: cannot become a record directory; name a new folder")
    if not (out.exists() or out.is_symlink()):
        return
    if not force:
        raise UserError(f"{out}: exists; give --force to replace it, or another name")
    if not out.is_dir() or (any(out.iterdir()) and not (out / MANIFEST).exists()):
        raise UserError(f"{out}: is no record directory, so --force does not replace it; give another name")


def _read(source: Path, progress: Progress) -> tuple[Split, tuple[str, ...], tuple[str, ...]]:
    pixels, labels, fonts = bytearray(), [], []
    label_index: dict[str, int] = {}
    font_index: dict[str, int] = {}
    with _open_text(source) as (lines, part):
        rows = CsvRows(lines, str(source))
        for number, (font, label, row_pixels) in enumerate(rows, start=1):
            pixels += row_pixels
            labels.append(label_index.setdefault(label, len(label_index)))
            fonts.append(font_index.setdefault(font, len(font_index)))
            if len(label_index) > MAX_CLASSES:
                raise UserError(
                    f"{source} (row {number}): more than {MAX_CLASSES} labels; are names and labels swapped?"
                )
            if number % PROGRESS_ROWS == 0:
                progress(number, part())
    if not labels:
        raise UserError(f"{source}: has no data rows; want rows after the header")
    progress(len(labels), 1.0)
    classes, label_N = _sorted_table(label_index, labels, np.uint8)
    font_names, font_N = _sorted_table(font_index, fonts, np.int32)
    image_NHW = np.frombuffer(pixels, np.uint8).reshape(-1, rows.side, rows.side)
    return Split(image_NHW=image_NHW, label_N=label_N, font_N=font_N), classes, font_names


def _sorted_table(index: dict[str, int], seen: list[int], dtype: type) -> tuple[tuple[str, ...], np.ndarray]:
    """Names sorted by code point, and the rows' indices into them."""
    names = sorted(index)
    rank: np.ndarray = np.empty(len(names), dtype)
    rank[[index[name] for name in names]] = np.arange(len(names))
    return tuple(names), rank[seen]


@contextmanager
def _open_text(source: Path) -> Iterator[tuple[IO[str], Callable[[], float]]]:
    """The CSV's text, and a function that tells which part of the source's bytes has been read."""
    try:
        with open(os.open(source, os.O_RDONLY | os.O_NONBLOCK), "rb") as raw:
            found = os.fstat(raw.fileno())
            if not stat.S_ISREG(found.st_mode):
                raise UserError(f"{source}: is not a regular file; give a .csv, .csv.gz or .zip")
            size = found.st_size
            with _decompressed(raw, source) as binary:
                text = io.TextIOWrapper(binary, encoding="utf-8", newline="")
                yield text, lambda: raw.tell() / max(size, 1)
    except (OSError, zipfile.BadZipFile, zlib.error) as error:
        reason = getattr(error, "strerror", None) or str(error)
        raise UserError(
            f"{source}: cannot be read ({reason}); give a .csv, .csv.gz or the .zip as downloaded"
        ) from None


def _decompressed(raw: IO[bytes], source: Path) -> Any:
    """Told by the file's first bytes, not by its name."""
    magic = raw.read(4)
    raw.seek(0)
    if magic[:2] == b"\x1f\x8b":
        return gzip.open(raw)
    if magic == b"PK\x03\x04":
        archive = zipfile.ZipFile(raw)
        members = [name for name in archive.namelist() if name.lower().endswith(".csv")]
        if len(members) != 1:
            raise UserError(f"{source}: holds {len(members)} CSV files, want one; unpack it and name the CSV")
        return archive.open(members[0])
    return raw
