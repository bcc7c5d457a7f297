"""CSV -> published records. The command tools/pack_tmnist is a front of `pack` and `check`.

One pass lexes blocks on all cores and spools the pixels to an unnamed file beside the target; then
the splits are drawn from the labels (split.py), and a second pass copies rows from the spool to the
record files. Memory does not grow with the pixels.

Shapes: N rows of the CSV, M of them, R rows of a block, P pixels.
"""

import os
import warnings
from collections import deque
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import closing
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import Any

import numpy as np

from engine.data.collect import MAX_FAULTS, Collector, Spool
from engine.data.foreign import HEAD_BYTES
from engine.data.lexer import Lexer, Rows, lex_plainly
from engine.data.records import write_records
from engine.data.source import BLOCK_BYTES, Source, blocks, buffer_bytes, open_source
from engine.data.split import SplitOptions, draw_splits
from engine.data.table import Table, odd_counts, warnings_of
from engine.durable import MANIFEST, locked, publish_directory, remove_leftovers, writing
from engine.errors import UserError
from engine.host import num_cpus

NAME_LIMIT_BYTES = 200
"""Of the target's name: temporary names are some 20 bytes longer, and file systems end at 255."""
MAX_WORKERS = 8

Progress = Callable[[int, float], None]
"""Called with the rows read and the part (0..1) of the source's bytes."""


@dataclass(frozen=True)
class PackReport:
    """What a pack did; `manifest` holds the counts per class and split."""

    manifest: dict[str, Any]
    warnings: list[str]


@dataclass(frozen=True, kw_only=True)
class PackOptions(SplitOptions):
    """What the command's flags of the same names say."""

    force: bool = False
    classes: int | None = None
    """Refuse a CSV with another number of labels."""
    workers: int | None = None
    """Lexing threads; by default one for each core this process may use."""
    block_bytes: int = BLOCK_BYTES
    """What is lexed at once."""

    def for_manifest(self) -> dict[str, Any]:
        return {"split": self.split, "balance": self.balance, "seed": self.seed}


def pack(
    source: Path,
    out: Path,
    options: PackOptions = PackOptions(),
    progress: Progress = lambda rows, part: None,
) -> PackReport:
    """Read a CSV (plain, .gz, a .zip holding one, or a pipe) and publish it as a record directory.

    The same rows and options give the same bytes, whatever the container, workers and machine.

    Raises:
        UserError: the source is refused, or `out` may not be replaced; nothing was published.
    """
    _check_name(out)
    out = Path(os.path.realpath(out))
    with writing(out), open_source(source) as opened, locked(out, wait=False):
        try:
            _check_target(out, options.force)
        except UserError:
            # Another name for OUT would not help a wrong source.
            _check_head(opened, options.block_bytes)
            raise
        remove_leftovers(out)
        with closing(Spool(out.parent)) as spool:
            table = _read(opened, options, spool, progress).table()
            opened.check_unchanged(source)
            return _publish(source, out, options, table, spool)


def _publish(
    source: Path, out: Path, options: PackOptions, table: Table, spool: Spool
) -> PackReport:
    """Split the rows, and publish them as records."""
    num = len(table.classes)
    if options.classes not in (None, num):
        raise UserError(
            f"{source}: has {num} labels, want {options.classes}; give another --classes"
        )
    rows = draw_splits(table.label_N, table.font_N, table.classes, table.fonts, options)
    counts = odd_counts(table)
    facts = {"options": options.for_manifest(), "source_rows": counts}
    with publish_directory(out) as directory:
        manifest = write_records(directory, table, spool.take, rows, facts)
    return PackReport(manifest, warnings_of(table, counts))


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
    return collector.row, [], warnings_of(table, odd_counts(table))


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
    options: PackOptions = PackOptions(),
    spool: Spool | None = None,
    progress: Progress = lambda rows, part: None,
    faults: list[str] | None = None,
) -> Collector:
    """The whole source: blocks are lexed by several threads, and collected in order."""
    workers = options.workers or min(num_cpus(), MAX_WORKERS)
    buffers = deque(bytearray(buffer_bytes(options.block_bytes)) for _ in range(workers + 2))
    images: deque[np.ndarray] = deque()
    pending: deque[tuple[bytearray, int, np.ndarray, Future[Rows]]] = deque()
    lex = find_lexer()
    collector = None

    def collect(collector: Collector) -> bool:
        """Take the oldest block; whether to go on."""
        buffer, stop, image_RP, future = pending.popleft()
        goes_on = collector.add_block(future.result(), lex, buffer, stop, image_RP)
        progress(collector.row, source.part)
        buffers.append(buffer)
        images.append(image_RP)
        return goes_on

    with ThreadPoolExecutor(workers) as pool:
        if spool is not None:  # for the second pass, while nobody waits for it
            pool.submit(import_module, "pyarrow")
        for buffer, stop in blocks(source, lambda: buffers[0], options.block_bytes):
            start = 0
            if collector is None:
                source.refuse_foreign(bytes(buffer[:HEAD_BYTES][:stop]))
                start = buffer.index(b"\n") + 1
                collector = Collector(source.name, bytes(buffer[:start]), spool, faults)
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
            Collector(source.name, bytes(buffer[: buffer.index(b"\n") + 1]), None, None)
            break


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
