"""CSV -> published records. The command tools/pack_tmnist is a front of `pack` and `check`.

One pass lexes blocks on all cores and spools the pixels to an unnamed file beside the target; then
the splits are drawn from the labels (split.py), and a second pass copies rows from the spool to the
record files. Memory does not grow with the pixels.

Shapes: N rows of the CSV, M of them, R rows of a block, P pixels.
"""

import os
import shutil
import tempfile
import unicodedata
import warnings
from collections import deque
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from engine.data.foreign import HEAD_BYTES
from engine.data.lexer import Fault, Layout, Rows, lex_plainly, read_header, read_row
from engine.data.record_file import Table
from engine.data.records import FONTS_LIMIT_BYTES, MAX_CLASSES, write_records
from engine.data.source import BLOCK_BYTES, Source, blocks, buffer_bytes, open_source
from engine.data.split import SplitMode, draw_splits
from engine.durable import MANIFEST, locked, publish_directory, remove_leftovers, writing
from engine.errors import UserError
from engine.host import num_cpus

SPOOL_WINDOW_BYTES = 8 * 2**20
NAME_LIMIT_BYTES = 200
"""Of the target's name: temporary names are some 20 bytes longer, and file systems end at 255."""
MAX_FAULTS = 100
LEAST_SIDE = 4
"""Of images: two poolings leave a quarter of it. Smaller ones are packed with a warning."""
MAX_WORKERS = 8

Progress = Callable[[int, float], None]
"""Called with the rows read and the part (0..1) of the source's bytes."""
Lexer = Callable[[Layout, np.ndarray, int, int, np.ndarray], Rows]
"""lex_plainly or its compiled twin."""


@dataclass(frozen=True)
class PackReport:
    """What a pack did; `manifest` holds the counts per class and split."""

    manifest: dict[str, Any]
    warnings: list[str]


def pack(
    source: Path,
    out: Path,
    *,
    mode: SplitMode = "random",
    balance: bool = False,
    seed: int = 42,
    force: bool = False,
    num_classes: int | None = None,
    workers: int | None = None,
    block_bytes: int = BLOCK_BYTES,
    progress: Progress = lambda rows, part: None,
) -> PackReport:
    """Read a CSV (plain, .gz, a .zip holding one, or a pipe) and publish it as a record directory.

    The same rows and options give the same bytes, whatever the container, workers and machine.

    Args:
        num_classes: refuse a CSV with another number of labels.
        workers: lexing threads; by default one for each core this process may use.
        block_bytes: what is lexed at once.
    Raises:
        UserError: the source is refused, or `out` may not be replaced; nothing was published.
    """
    _check_name(out)
    out = Path(os.path.realpath(out))
    with writing(out), open_source(source) as opened, locked(out, wait=False):
        try:
            _check_target(out, force)
        except UserError:
            _check_head(opened, block_bytes)  # another name for OUT would not help a wrong source
            raise
        remove_leftovers(out)
        with closing(_Spool(out.parent)) as spool:
            table = _read(opened, spool, workers, block_bytes, progress).table()
            opened.check_unchanged(source)
            num = len(table.classes)
            if num_classes not in (None, num):
                raise UserError(
                    f"{source}: has {num} labels, want {num_classes}; give another --classes"
                )
            rows = draw_splits(
                table.label_N,
                table.font_N,
                table.classes,
                table.fonts,
                mode=mode,
                balance=balance,
                seed=seed,
            )
            facts = {
                "options": {"split": mode, "balance": balance, "seed": seed},
                "source_rows": _count(table),
            }
            with publish_directory(out) as directory:
                manifest = write_records(directory, table, spool.take, rows, facts)
    return PackReport(manifest, _warnings(table, manifest["source_rows"]))


def check(source: Path) -> tuple[int, list[str], list[str]]:
    """Read a CSV without packing it: (rows, its first MAX_FAULTS faults, warnings).

    UserError if it cannot be read, or its header declares no layout.
    """
    faults: list[str] = []
    with open_source(source) as opened:
        collector = _read(opened, faults=faults)
    if faults:
        note = f"only the first {MAX_FAULTS} faults are listed"
        return collector.row, faults, [note] if len(faults) == MAX_FAULTS else []
    table = collector.table()
    return collector.row, [], _warnings(table, _count(table))


def find_lexer() -> Lexer:
    """The compiled lexer, or the plain one where numba, which lags behind NumPy, is missing."""
    try:
        from engine.data.lexer_jit import lex
    except ImportError as error:
        warnings.warn(
            f"numba cannot be imported ({error}): reading some 8,000 rows/s",
            RuntimeWarning,
            stacklevel=2,
        )
        return lex_plainly
    return lex


def _read(
    source: Source,
    spool: "_Spool | None" = None,
    workers: int | None = None,
    block_bytes: int = BLOCK_BYTES,
    progress: Progress = lambda rows, part: None,
    faults: list[str] | None = None,
) -> "_Collector":
    """The whole source: blocks are lexed by several threads, and collected in order."""
    workers = workers or min(num_cpus(), MAX_WORKERS)
    buffers = deque(bytearray(buffer_bytes(block_bytes)) for _ in range(workers + 2))
    images: deque[np.ndarray] = deque()
    pending: deque[tuple[bytearray, int, np.ndarray, Future[Rows]]] = deque()
    lex = find_lexer()
    collector = None

    def collect(collector: _Collector) -> bool:
        """Take the oldest block; whether to go on."""
        buffer, stop, image_RP, future = pending.popleft()
        goes_on = collector.add_block(future.result(), lex, buffer, stop, image_RP)
        progress(collector.row, source.part)
        buffers.append(buffer)
        images.append(image_RP)
        return goes_on

    with ThreadPoolExecutor(workers) as pool:
        for buffer, stop in blocks(source, lambda: buffers[0], block_bytes):
            start = 0
            if collector is None:
                source.refuse_foreign(bytes(buffer[:HEAD_BYTES][:stop]))
                start = buffer.index(b"\n") + 1
                collector = _Collector(source.name, bytes(buffer[:start]), spool, faults)
                images.extend(collector.layout.images(len(buffer)) for _ in buffers)
                if spool is not None:
                    spool.check_space(source, collector.layout, stop / buffer.count(b"\n", 0, stop))
            block = np.frombuffer(buffer, np.uint8)
            image_RP = images.popleft()
            future = pool.submit(lex, collector.layout, block, start, stop, image_RP)
            pending.append((buffers.popleft(), stop, image_RP, future))
            if not buffers and not collect(collector):
                return collector
        while collector and pending and collect(collector):
            pass
    if collector is None or not collector.row:
        raise UserError(f"{source.name}: has no data rows; want a header and rows after it")
    return collector


def _check_head(source: Source, block_bytes: int) -> None:
    """Refuse a file that is no CSV or has no header of ours, by its first block."""
    if source.is_file:
        room = bytearray(buffer_bytes(block_bytes))
        for buffer, stop in blocks(source, lambda: room, block_bytes):
            source.refuse_foreign(bytes(buffer[:HEAD_BYTES][:stop]))
            _Collector(source.name, bytes(buffer[: buffer.index(b"\n") + 1]), None, None)
            break


class _Collector:
    """The rows of all blocks in order: texts in one index, pixels in the spool; the first fault
    is an error, or the first MAX_FAULTS go into `faults`."""

    def __init__(
        self, source: str, header: bytes, spool: "_Spool | None", faults: list[str] | None
    ) -> None:
        try:
            self.layout = read_header(header)
        except Fault as fault:
            raise UserError(f"{source}:1: {fault}") from None
        self.row = 0
        """Rows so far, with those that were refused."""
        self._source = source
        self._spool = spool
        self._faults = faults
        self._labels: dict[str, int] = {}
        self._fonts: dict[str, int] = {}
        self._looks: dict[str, tuple[str, int]] = {}
        self._font_bytes = 0
        self._parts: list[tuple[np.ndarray, ...]] = []

    def add_block(
        self, rows: Rows, lex: Lexer, buffer: bytearray, stop: int, image_RP: np.ndarray
    ) -> bool:
        """Take a block's rows; where faults are listed, those behind each faulty line, too.
        Whether to go on."""
        while True:
            after = buffer.index(b"\n", rows.fault) + 1 if rows.fault >= 0 else stop
            try:
                self.add(rows, bytes(buffer[rows.fault : after]) if rows.fault >= 0 else b"")
            except UserError as error:
                if self._faults is None:
                    raise
                self._faults.append(str(error))
                if len(self._faults) == MAX_FAULTS:
                    return False
            if after == stop:
                return True
            rows = lex(self.layout, np.frombuffer(buffer, np.uint8), after, stop, image_RP)

    def add(self, rows: Rows, faulty_line: bytes) -> None:
        """Take a block's rows; UserError if one, or `faulty_line` after them, is refused."""
        first = self.row
        self.row += len(rows.label_R) + bool(faulty_line)
        label_R, new_labels = _merge(self._labels, rows.labels, rows.label_R)
        font_R, new_fonts = _merge(self._fonts, rows.fonts, rows.font_R)
        for label in new_labels:
            self._check_label(label, first + int((label_R == self._labels[label]).argmax()) + 1)
        self._font_bytes += sum(len(font.encode()) for font in new_fonts)
        if self._font_bytes > FONTS_LIMIT_BYTES:
            raise UserError(
                f"{self._source}: holds more than {FONTS_LIMIT_BYTES} bytes of names; "
                f"are they typefaces?"
            )
        self._parts.append((label_R, font_R, rows.sum_R, rows.squares_R, rows.hash_R))
        if self._spool is not None:
            self._spool.append(rows.image_RP)
        if faulty_line:
            try:
                read_row(faulty_line, self.layout)
            except Fault as fault:
                raise self._refusal(self.row, fault) from None
            raise AssertionError(
                f"{self._source}: the lexers disagree on row {self.row}: {faulty_line[:99]!r}"
            )

    def table(self) -> Table:
        """All rows, with labels and fonts sorted by code point."""
        label_N, font_N, *numbers = (
            np.concatenate(part) for part in zip(*self._parts, strict=True)
        )
        classes, label_rank = _sorted(self._labels)
        fonts, font_rank = _sorted(self._fonts)
        label_N = label_rank[label_N].astype(np.uint8)
        font_N = font_rank[font_N]
        return Table(self.layout.side, classes, fonts, label_N, font_N, *numbers)

    def _check_label(self, label: str, row: int) -> None:
        column = self.layout.num_text
        other, other_row = self._looks.setdefault(unicodedata.normalize("NFC", label), (label, row))
        if other != label:
            what = (
                f"{label!r} looks like the label of row {other_row} but has other code points; "
                f"write one of them"
            )
            raise self._refusal(row, Fault(what, column))
        if self._labels[label] >= MAX_CLASSES:
            hint = (
                "are names and labels swapped?"
                if self.layout.has_fonts
                else "is the column an id, a row number, or a value to predict (regression)?"
            )
            raise self._refusal(row, Fault(f"more than {MAX_CLASSES} labels; {hint}", column))

    def _refusal(self, row: int, fault: Fault) -> UserError:
        column = (
            f", column {fault.column} {self.layout.columns[fault.column - 1]!r}"
            if fault.column
            else ""
        )
        return UserError(f"{self._source}:{row + 1} (row {row}{column}): {fault}")


def _merge(
    index: dict[str, int], texts: list[str], id_R: np.ndarray
) -> tuple[np.ndarray, list[str]]:
    """A block's ids as ids of `index`, and the texts that are new to it."""
    known = len(index)
    used = texts[: id_R.max(initial=-1) + 1]
    ids = np.array([index.setdefault(text, len(index)) for text in used], np.int32)
    return ids[id_R], [text for text in used if index[text] >= known]


def _sorted(index: dict[str, int]) -> tuple[tuple[str, ...], np.ndarray]:
    """The texts by code point, and each id's place among them."""
    texts = sorted(index)
    return tuple(texts), np.argsort([index[text] for text in texts]).astype(np.int32)


class _Spool:
    """Rows of pixels in an unnamed file on the target's disk."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._file = tempfile.TemporaryFile(dir=folder, buffering=0)  # noqa: SIM115
        self._num_pixels = 0

    def append(self, image_RP: np.ndarray) -> None:
        self._num_pixels = image_RP.shape[1]
        view = image_RP.reshape(-1).data
        while len(view):
            view = view[self._file.write(view) :]

    def take(self, row_M: np.ndarray) -> np.ndarray:
        """The pixels (M, P) of ascending row numbers; may be called from several threads."""
        out_MP = np.empty((len(row_M), self._num_pixels), np.uint8)
        window_WP = np.empty(
            (max(SPOOL_WINDOW_BYTES // self._num_pixels, 1), self._num_pixels), np.uint8
        )
        start = 0
        while start < len(row_M):
            first = int(row_M[start])
            stop = int(np.searchsorted(row_M, first + len(window_WP)))
            num_rows = int(row_M[stop - 1]) - first + 1
            got = os.preadv(
                self._file.fileno(), [window_WP[:num_rows].data], first * self._num_pixels
            )
            assert got == num_rows * self._num_pixels, "the spool ended early"
            np.take(
                window_WP, row_M[start:stop] - first, axis=0, out=out_MP[start:stop], mode="clip"
            )
            start = stop
        return out_MP

    def check_space(self, source: Source, layout: Layout, line_bytes: float) -> None:
        """Refuse what will not fit, by its first lines, before a byte is written."""
        free = shutil.disk_usage(self.folder).free
        needed = int(2 * source.size / line_bytes * layout.num_pixels) if source.size else 0
        if needed > free:
            raise UserError(
                f"{self.folder}: has {free:,} bytes free, want {needed:,} "
                f"for the records and a copy"
            )

    def close(self) -> None:
        self._file.close()


def _check_name(out: Path) -> None:
    if not out.name or out.name == "..":
        raise UserError(f"{out}: cannot become a record directory; name a new folder")
    if len(os.fsencode(out.name)) > NAME_LIMIT_BYTES or not out.name.isprintable():
        raise UserError(
            f"{out}: want a name of at most {NAME_LIMIT_BYTES} bytes that can be printed; "
            f"name another"
        )


def _check_target(out: Path, force: bool) -> None:
    if not os.path.lexists(out):
        return
    if not force:
        raise UserError(f"{out}: exists; give --force to replace it, or another name")
    if not out.is_dir() or (any(out.iterdir()) and not (out / MANIFEST).exists()):
        raise UserError(
            f"{out}: is no record directory, so --force does not replace it; give another name"
        )


def _count(table: Table) -> dict[str, int]:
    """What is odd about the rows; their pixels are compared by 64-bit hashes."""
    labelled_N = table.hash_N + table.label_N.astype(np.uint64) * np.uint64(0x9E3779B97F4A7C15)
    whole_N = labelled_N + table.font_N.astype(np.uint64) * np.uint64(0xC2B2AE3D27D4EB4F)
    return {
        "rows": len(whole_N),
        "duplicates": len(whole_N) - len(np.unique(whole_N)),
        "under_several_labels": len(np.unique(labelled_N)) - len(np.unique(table.hash_N)),
        "constant": int((table.side**2 * table.squares_N == table.sum_N**2).sum()),
    }


def _warnings(table: Table, counts: dict[str, int]) -> list[str]:
    texts = []
    if len(table.classes) == 1:
        texts.append("there is one class only")
    if table.side < LEAST_SIDE:
        size = f"{table.side} x {table.side}"
        texts.append(
            f"images of {size} pixels cannot be trained on: networks halve them twice; "
            f"pad them to {LEAST_SIDE} x {LEAST_SIDE} or more"
        )
    if edged := [label for label in table.classes if label != label.strip()]:
        texts.append(f"labels that begin or end with a space: {', '.join(map(repr, edged[:5]))}")
    odd = {
        "duplicates": "rows repeat another one's typeface, label and pixels",
        "under_several_labels": "images occur under another label, too",
        "constant": "images have a single grey value",
    }
    return texts + [f"{counts[key]:,} {text}" for key, text in odd.items() if counts[key]]
