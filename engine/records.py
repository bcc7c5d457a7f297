"""The record files: Arrow IPC files of uint8 images per split, under a manifest that covers every byte.

A record directory holds `<split>-00000.arrow` ..., `manifest.json` (written last) and `manifest.sha256`. Each file is
one record batch with the columns image (fixed-size list of H*W uint8), label (dictionary of class names) and font
(dictionary of typeface names), so pandas, polars and DuckDB open it as it is. Arrow itself does not notice damage;
therefore sizes and the CRC32 of every 1 MiB block are checked here before anything is parsed.

Does not: split, shuffle or augment (pack.py, order.py, feeds/), nor touch torch.

Shapes: N images of a split, H x W pixels.
"""

import hashlib
import json
import os
import zlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from engine.errors import UserError
from engine.publish import (
    MANIFEST,
    Damaged,
    publish_directory,
    read_manifest,
    refuse_unknown_files,
    write_manifest,
)

FORMAT = "glyph-records"
VERSION = 1
MAX_CLASSES = 256
BLOCK_BYTES = 2**20
FILE_LIMIT_BYTES = 64 * 2**20
ROW_OVERHEAD_BYTES = 8  # label index 1, font index 4, Arrow's padding
REMEDY = "pack the CSV again with tools/pack_tmnist"


@dataclass(frozen=True, kw_only=True)
class Split:
    """One split in memory: contiguous arrays of equal length N."""

    image_NHW: np.ndarray
    """uint8."""
    label_N: np.ndarray
    """uint8, index into Records.classes."""
    font_N: np.ndarray
    """int32, index into Records.fonts."""

    def __post_init__(self) -> None:
        n = len(self.image_NHW)
        assert self.image_NHW.dtype == np.uint8 and self.image_NHW.ndim == 3 and self.image_NHW.flags.c_contiguous
        assert self.label_N.dtype == np.uint8 and self.label_N.shape == (n,)
        assert self.font_N.dtype == np.int32 and self.font_N.shape == (n,)

    def __len__(self) -> int:
        return len(self.image_NHW)

    @property
    def height_width(self) -> tuple[int, int]:
        _, height, width = self.image_NHW.shape
        return height, width

    def take(self, rows: np.ndarray) -> "Split":
        return Split(image_NHW=self.image_NHW[rows], label_N=self.label_N[rows], font_N=self.font_N[rows])


@dataclass(frozen=True, kw_only=True)
class Records:
    """A data set: its splits, the names behind the indices, and the fingerprint that checkpoints carry."""

    splits: dict[str, Split]
    classes: tuple[str, ...]
    fonts: tuple[str, ...]
    fingerprint: str
    pixel_mean: float
    """Mean of the train split's pixels, 0..255."""
    pixel_std: float
    path: str = ""

    @property
    def height_width(self) -> tuple[int, int]:
        return self.splits["train"].height_width

    def split(self, name: str) -> Split:
        """The split called `name`.

        Raises:
            UserError: the records were packed without it.
        """
        if name not in self.splits:
            raise UserError(f"{self.path}: has no {name} split; pack it again with --split random")
        return self.splits[name]


def pixel_statistics(image_NHW: np.ndarray) -> tuple[float, float]:
    """Mean and standard deviation of uint8 pixels, exact (from the histogram), in 0..255."""
    counts = np.bincount(image_NHW.reshape(-1), minlength=256).astype(np.int64)
    value = np.arange(256)
    total = int(counts.sum())
    mean = int((counts * value).sum()) / total
    return mean, max(int((counts * value**2).sum()) / total - mean**2, 0.0) ** 0.5


def write_records(
    out: Path,
    splits: dict[str, Split],
    *,
    classes: Sequence[str],
    fonts: Sequence[str],
    options: dict[str, Any],
) -> dict[str, Any]:
    """Publish a record directory; returns its manifest. The same arguments give the same bytes.

    Raises:
        OSError: the disk refused; nothing was published.
    """
    height, width = splits["train"].height_width
    rows_per_file = FILE_LIMIT_BYTES // (height * width + ROW_OVERHEAD_BYTES)
    manifest: dict[str, Any] = {"format": FORMAT, "version": VERSION, "height": height, "width": width}
    manifest |= {"classes": list(classes), "options": options, "splits": {}}
    mean, std = pixel_statistics(splits["train"].image_NHW)
    manifest["train_pixels"] = {"mean": mean, "std": std}
    with publish_directory(out) as directory:
        for name, split in splits.items():
            starts = range(0, max(len(split), 1), rows_per_file)
            files = [
                _write_file(
                    directory / f"{name}-{number:05}.arrow",
                    split.take(np.arange(start, min(start + rows_per_file, len(split)))),
                    classes,
                    fonts,
                )
                for number, start in enumerate(starts)
            ]
            per_class = np.bincount(split.label_N, minlength=len(classes)).tolist()
            manifest["splits"][name] = {"rows": len(split), "rows_per_class": per_class, "files": files}
        manifest["fingerprint"] = _fingerprint(manifest)
        write_manifest(directory, manifest)
    return manifest


def open_records(path: str | Path) -> Records:
    """Read a record directory into memory, verified to the last byte.

    Raises:
        UserError: not a record directory, incomplete, damaged, or of another version.
    """
    directory = Path(path)
    if not directory.is_dir():
        raise UserError(f"{path}: no such record directory; {REMEDY}")
    try:
        return _open(directory)
    except Damaged as error:
        kind = "damaged" if (directory / MANIFEST).exists() else "incomplete or not a record directory"
        raise UserError(f"{path}: {kind}: {error}; {REMEDY}") from None
    except (AttributeError, KeyError, TypeError, ValueError, pa.ArrowException) as error:
        raise UserError(f"{path}: {MANIFEST} or a record file is malformed ({error!r}); {REMEDY}") from None


def _open(directory: Path) -> Records:
    manifest = read_manifest(directory)
    found = (manifest.get("format"), manifest.get("version"))
    if found != (FORMAT, VERSION):
        raise Damaged(f"format and version are {found}, this engine reads {(FORMAT, VERSION)}")
    if manifest["fingerprint"] != _fingerprint(manifest):
        raise Damaged("the fingerprint does not belong to the files listed")
    listed = [file["name"] for split in manifest["splits"].values() for file in split["files"]]
    if any(os.path.basename(name) != name for name in listed):
        raise Damaged("a file name leads out of the directory")
    refuse_unknown_files(directory, set(listed))
    fonts: list[str] = []
    splits = {name: _read_split(directory, entry, manifest, fonts) for name, entry in manifest["splits"].items()}
    pixels = manifest["train_pixels"]
    return Records(
        splits=splits,
        classes=tuple(manifest["classes"]),
        fonts=tuple(fonts),
        fingerprint=manifest["fingerprint"],
        pixel_mean=pixels["mean"],
        pixel_std=pixels["std"],
        path=str(directory),
    )


def _write_file(path: Path, split: Split, classes: Sequence[str], fonts: Sequence[str]) -> dict[str, Any]:
    n, height, width = split.image_NHW.shape
    pixels = pa.Array.from_buffers(pa.uint8(), n * height * width, [None, pa.py_buffer(split.image_NHW)])
    columns = {
        "image": pa.FixedSizeListArray.from_arrays(pixels, height * width),
        "label": pa.DictionaryArray.from_arrays(pa.array(split.label_N), pa.array(list(classes), pa.string())),
        "font": pa.DictionaryArray.from_arrays(pa.array(split.font_N), pa.array(list(fonts), pa.string())),
    }
    schema = pa.schema([(name, column.type) for name, column in columns.items()])
    schema = schema.with_metadata({"height": str(height), "width": str(width)})
    sink = pa.BufferOutputStream()
    with pa.ipc.new_file(sink, schema) as writer:
        writer.write_batch(pa.record_batch(list(columns.values()), schema=schema))
    data = memoryview(sink.getvalue())
    path.write_bytes(data)
    checks = {"sha256": hashlib.sha256(data).hexdigest(), "crc32": _block_crcs(data)}
    return {"name": path.name, "rows": n, "bytes": len(data), **checks}


def _read_split(directory: Path, entry: dict[str, Any], manifest: dict[str, Any], fonts: list[str]) -> Split:
    rows, height, width = int(entry["rows"]), int(manifest["height"]), int(manifest["width"])
    if sum(file["rows"] for file in entry["files"]) != rows or rows * height * width > sum(
        file["bytes"] for file in entry["files"]
    ):
        raise Damaged(f"the row counts of {entry['files'][0]['name']} and its like do not add up")
    image_NHW = np.empty((rows, height, width), np.uint8)
    label_N, font_N = np.empty(rows, np.uint8), np.empty(rows, np.int32)
    start = 0
    for file in entry["files"]:
        batch = _read_file(directory / file["name"], file)
        stop = start + batch.num_rows
        image_NHW[start:stop] = batch["image"].flatten().to_numpy().reshape(-1, height, width)
        label_N[start:stop] = batch["label"].indices.to_numpy()
        font_N[start:stop] = batch["font"].indices.to_numpy()
        fonts[:] = batch["font"].dictionary.to_pylist()
        start = stop
    if rows and (label_N.max() >= len(manifest["classes"]) or not 0 <= font_N.min() <= font_N.max() < len(fonts)):
        raise Damaged("a label or font index lies outside its table")
    return Split(image_NHW=image_NHW, label_N=label_N, font_N=font_N)


def _read_file(path: Path, entry: dict[str, Any]) -> pa.RecordBatch:
    """One file's record batch, its bytes compared with the manifest before they are parsed."""
    try:
        with open(os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK), "rb", buffering=0) as file:
            if (size := os.fstat(file.fileno()).st_size) != entry["bytes"]:
                raise Damaged(f"{path.name} has {size} bytes, want {entry['bytes']}")
            data = memoryview(bytearray(size))
            if file.readinto(data) != size:
                raise Damaged(f"{path.name} ended while it was read")
    except OSError as error:
        raise Damaged(f"{path.name} cannot be read ({error.strerror})") from None
    crcs = _block_crcs(data)
    for block, (got, want) in enumerate(zip(crcs, entry["crc32"], strict=True)):
        if got != want:
            raise Damaged(f"{path.name}: the block at byte {block * BLOCK_BYTES} has CRC32 {got:08x}, want {want:08x}")
    batch = pa.ipc.open_file(pa.py_buffer(data)).get_batch(0)
    if batch.num_rows != entry["rows"]:
        raise Damaged(f"{path.name} holds {batch.num_rows} rows, want {entry['rows']}")
    return batch


def _block_crcs(data: memoryview) -> list[int]:
    return [zlib.crc32(data[start : start + BLOCK_BYTES]) for start in range(0, len(data), BLOCK_BYTES)]


def _fingerprint(manifest: dict[str, Any]) -> str:
    """SHA-256 over everything that decides what is trained on: size, classes, and each file's own SHA-256."""
    files = {name: [file["sha256"] for file in split["files"]] for name, split in manifest["splits"].items()}
    content = [manifest["height"], manifest["width"], manifest["classes"], files]
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()
