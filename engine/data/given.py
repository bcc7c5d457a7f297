"""What is given to be packed: CSVs, or files of images, opened and read into a Collector.

Does not: split or write (pack.py), nor know a format (lexer.py, idx.py, ...).

Shapes: R rows of a block, P pixels.
"""

import warnings
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Executor, Future, ThreadPoolExecutor
from contextlib import AbstractContextManager, ExitStack, contextmanager
from dataclasses import dataclass
from functools import cache, partial
from itertools import islice
from pathlib import Path

import numpy as np

from engine.data.arrange import NO_LABEL, ArrangedSource, Asked
from engine.data.collect import Collector, CsvCollector, Spool, Stored, header_of
from engine.data.foreign import HEAD_BYTES, idx_contents
from engine.data.idx import USAGE, open_idx
from engine.data.images import TO_PREDICT, Images, Progress, read_images
from engine.data.layouts import Layouts, first_bytes, layout_of
from engine.data.lexer import MAX_FAULTS, Layout, Lexer, Rows, lex_plainly
from engine.data.npz import open_npz
from engine.data.source import BLOCK_BYTES, Make, Source, blocks, buffer_bytes, open_source
from engine.errors import UserError
from engine.host import num_cpus

MAX_WORKERS = 8
NAMED = ("npz", "parquet", "arrow")
"""Layouts whose parts have names."""


def silent(rows: int, part: float) -> None:
    """The Progress that nobody watches."""


@dataclass(frozen=True, kw_only=True)
class SourceOptions(Asked):
    """How a source is read, as the command's flags of the same names say."""

    layout: Layouts = "auto"
    images: str = ""
    """The array or column that holds the images; "": the only one that may."""
    labels: str = ""
    """Likewise of their labels."""
    workers: int | None = None
    """Threads; by default one for each core this process may use."""
    block_bytes: int = BLOCK_BYTES
    """What is lexed at once."""

    @property
    def num_workers(self) -> int:
        return self.workers or min(num_cpus(), MAX_WORKERS)

    def check(self, layout: Layouts, name: str) -> None:
        """UserError if an option is given that a source of this layout has no use for."""
        if layout != "csv" and self._are_of_csvs:
            flags = "--label-column, --no-header and --index-column"
            raise UserError(f"{name}: is {layout}, but {flags} are of CSVs; leave them out")
        if layout not in NAMED and (self.images or self.labels):
            named = f"{', '.join(NAMED[:-1])} and {NAMED[-1]}"
            raise UserError(
                f"{name}: is {layout}, but --images and --labels are of {named}; leave them out"
            )
        if self.labels and not self.has_labels:
            raise UserError(
                f"{name}: --labels names labels, --label-column {NO_LABEL} says there are none; "
                f"leave one out"
            )

    @property
    def _are_of_csvs(self) -> bool:
        """Whether an option is given that no other layout has a use for."""
        return self.changes_anything if self.has_labels else self.no_header or self.index_column


Groups = Mapping[str, Sequence[Path]]
"""Files by the split that they are given for; those whose rows are yet to be split under ""."""


class Grouped:
    """Sources whose rows follow each other, and how many of them each group has."""

    def __init__(self, num_sources: Mapping[str, int]) -> None:
        self._num_sources = num_sources

    def rows(self, collector: Collector) -> dict[str, range]:
        """Which rows, from 0 on, are those of each group."""
        stretches = iter(collector.stretches())
        found = {}
        for group, num in self._num_sources.items():
            own = [rows for _, rows in islice(stretches, num)]
            found[group] = range(own[0].start, own[-1].stop)
        return found


class CsvFiles(Grouped):
    """CSVs of one header."""

    def __init__(
        self, sources: Sequence[Source], options: SourceOptions, num_sources: Mapping[str, int]
    ) -> None:
        super().__init__(num_sources)
        self.name = sources[0].name
        self._sources = sources
        self._options = options
        self.found: list[str] = []
        """What was found in each, once it has been read."""

    def check_head(self) -> None:
        """UserError if the first file is no CSV or has no header of ours, by its first block."""
        source = self._sources[0]
        if source.is_file:
            room = bytearray(buffer_bytes(self._options.block_bytes))
            for buffer, stop in blocks(source, lambda: room, self._options.block_bytes):
                source.refuse_foreign(bytes(buffer[:HEAD_BYTES][:stop]))
                header_of(source.name, bytes(buffer[: buffer.index(b"\n") + 1]))
                break

    def read(
        self,
        spool: Spool | None = None,
        progress: Progress = silent,
        faults: list[str] | None = None,
    ) -> CsvCollector:
        """All rows; the first fault is an error, or they go into `faults`."""
        collector = None
        for number, source in enumerate(self._sources):

            def show(rows: int, part: float, number: int = number) -> None:
                progress(rows, (number + part) / len(self._sources))

            rows = Reading(source, self._options, spool, faults)
            collector = rows.read(show, collector)
            found = collector.arrangement or _said(collector.layout)
            self.found.append(f"{found}: {source.name}")
            if faults is not None and len(faults) >= MAX_FAULTS:
                break
        assert collector is not None, "no source was given"
        return collector

    def places(self, collector: Collector) -> Iterator[str]:
        """Where each row stands, `file:line`."""
        for source, rows in collector.stretches():
            yield from (collector.place(source, number) for number in range(1, len(rows) + 1))

    def stored(self) -> Stored | None:
        """None: pixels are text here."""
        return None

    def check_unchanged(self) -> None:
        for source in self._sources:
            source.check_unchanged()


def _said(layout: Layout) -> str:
    """A header, for whoever packs it to compare with what they meant."""
    texts = ", ".join(layout.columns[: layout.num_text])
    pixels = f"{layout.columns[layout.num_text]}..{layout.columns[-1]}"
    return f"CSV, columns {texts} and {pixels}, images of {layout.side} x {layout.side}"


class ImageFiles(Grouped):
    """Sources of images of one size."""

    def __init__(
        self, sources: Sequence[Images], options: SourceOptions, num_sources: Mapping[str, int]
    ) -> None:
        """UserError if their images are of several sizes."""
        super().__init__(num_sources)
        self.name = sources[0].name
        self._sources = sources
        self._options = options
        self.found = [source.found for source in sources]
        first = sources[0]
        for source in sources:
            if source.side != first.side:
                raise UserError(
                    f"{source.name}: holds images of {source.side} x {source.side} pixels, "
                    f"but {first.name} of {first.side} x {first.side}; pack images of one size"
                )

    def check_head(self) -> None:
        """Opening them has checked their headers."""

    def read(
        self,
        spool: Spool | None = None,
        progress: Progress = silent,
        faults: list[str] | None = None,
    ) -> Collector:
        """All rows; the first fault is an error, or the only one that goes into `faults`."""
        counts = [source.num_images for source in self._sources]
        num_images = sum(filter(None, counts))
        is_stored = self.stored() is not None
        if spool is not None and None not in counts:
            spool.check_space(num_images * self._sources[0].side ** 2, is_stored=is_stored)
        collector = Collector(self._sources[0].side, None if is_stored else spool)

        def show(rows: int) -> None:
            progress(rows, 0.0 if None in counts else min(rows / max(num_images, 1), 1.0))

        try:
            for source in self._sources:
                collector.begin(source.name)
                read_images(source, collector, self._options.num_workers, show)
        except UserError as error:
            if faults is None:
                raise
            faults.append(str(error))
        return collector

    def places(self, collector: Collector) -> Iterator[str]:
        """Where each image lies: its file, or the source and its number there from 1 on."""
        for source, (name, rows) in zip(self._sources, collector.stretches(), strict=True):
            numbered = (collector.place(name, number) for number in range(1, len(rows) + 1))
            yield from source.places() or numbered

    def stored(self) -> Stored | None:
        """Where all pixels lie as they are, if they lie in one file."""
        return self._sources[0].stored() if len(self._sources) == 1 else None

    def check_unchanged(self) -> None:
        for source in self._sources:
            source.check_unchanged()


@contextmanager
def open_given(groups: Groups, options: SourceOptions) -> Iterator[CsvFiles | ImageFiles]:
    """Open all files that are to be packed together, in this order.

    Raises:
        UserError: one cannot be read, they have several layouts, or a header is refused.
    """
    all_paths = [path for paths in groups.values() for path in paths]
    layout = layout_of(all_paths, options.layout)
    options.check(layout, str(all_paths[0]))
    with ExitStack() as stack:
        if layout == "csv":
            kind = csv_kind(options)
            sources = [stack.enter_context(open_source(path, kind)) for path in all_paths]
            num_sources = {group: len(paths) for group, paths in groups.items()}
            yield CsvFiles(sources, options, num_sources)
        else:
            readers = _readers(stack, options.num_workers, str(all_paths[0]))
            opening = {
                group: _open_images(layout, paths, options, readers)
                for group, paths in groups.items()
            }
            images = [stack.enter_context(each) for group in opening.values() for each in group]
            num_sources = {group: len(each) for group, each in opening.items()}
            yield ImageFiles(images, options, num_sources)


def csv_kind(options: SourceOptions) -> Make:
    """What makes a Source of an open CSV."""
    return partial(ArrangedSource, asked=options) if options.changes_anything else Source


def _readers(stack: ExitStack, num: int, name: str) -> Callable[[], Executor]:
    """What starts processes that read, at the first call, and gives these."""

    @cache
    def readers() -> Executor:
        from engine.data.processes import processes

        return stack.enter_context(processes(num, name))

    return readers


def _open_images(
    layout: Layouts,
    paths: Sequence[Path],
    options: SourceOptions,
    readers: Callable[[], Executor],
) -> list[AbstractContextManager[Images]]:
    """What opens each source of images when it is entered."""
    # What reads them is imported here: numba and pyarrow would delay every start.
    names = options.images, options.labels if options.has_labels else None
    if layout == "idx":
        if not options.has_labels:
            return [open_idx(path) for path in paths]
        return [open_idx(*pair) for pair in _pairs(paths)]
    if layout == "npz":
        return [open_npz(path, names) for path in paths]
    if layout == "png":
        from engine.data.pictures import open_pictures

        return [open_pictures(path, readers) for path in paths]
    from engine.data.columns import open_columns

    return [open_columns(path, layout, names) for path in paths]


def _pairs(paths: Sequence[Path]) -> list[tuple[Path, Path]]:
    """IDX files in twos."""
    if len(paths) == 1:
        what = idx_contents(first_bytes(paths[0])[0]) or "no IDX file"
        raise UserError(f"{paths[0]}: is {what}; {USAGE} ({TO_PREDICT})")
    if len(paths) % 2:
        raise UserError(f"{paths[-1]}: is the last of {len(paths)} IDX files; {USAGE}")
    return list(zip(paths[::2], paths[1::2], strict=True))


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


class Reading:
    """One CSV being read: blocks are lexed by several threads, and collected in order."""

    def __init__(
        self,
        source: Source,
        options: SourceOptions = SourceOptions(),
        spool: Spool | None = None,
        faults: list[str] | None = None,
    ) -> None:
        self._source = source
        self._options = options
        self._spool = spool
        self._faults = faults
        self._lex = find_lexer()
        room = buffer_bytes(options.block_bytes)
        self._buffers = deque(bytearray(room) for _ in range(options.num_workers + 2))
        self._images: deque[np.ndarray] = deque()
        self._pending: deque[tuple[bytearray, int, np.ndarray, Future[Rows]]] = deque()

    def read(
        self, progress: Progress = silent, collector: CsvCollector | None = None
    ) -> CsvCollector:
        """The whole source; its rows come behind those that `collector` has."""
        source = self._source
        is_open = False
        before = collector.row if collector else 0
        with ThreadPoolExecutor(self._options.num_workers) as pool:
            block_bytes = self._options.block_bytes
            for buffer, stop in blocks(source, lambda: self._buffers[0], block_bytes):
                start = 0
                if not is_open:
                    start = buffer.index(b"\n") + 1
                    collector = self._begin(buffer, start, stop, collector)
                    is_open = True
                assert collector is not None
                block = np.frombuffer(buffer, np.uint8)
                image_RP = self._images.popleft()
                future = pool.submit(self._lex, collector.layout, block, start, stop, image_RP)
                self._pending.append((self._buffers.popleft(), stop, image_RP, future))
                if not self._buffers and not self._collect(collector, progress):
                    return collector
            while collector and self._pending and self._collect(collector, progress):
                pass
        if collector is None or collector.row == before:
            raise UserError(f"{source.name}: has no data rows; want a header and rows after it")
        return collector

    def _begin(
        self, buffer: bytearray, start: int, stop: int, collector: CsvCollector | None
    ) -> CsvCollector:
        """The collector for the source's rows, by its header, which ends at `start`."""
        source = self._source
        source.refuse_foreign(bytes(buffer[:HEAD_BYTES][:stop]))
        header = bytes(buffer[:start])
        if collector is None:
            collector = CsvCollector(source.name, header, self._spool, self._faults)
        else:
            layout = header_of(source.name, header)
            if layout.columns != collector.layout.columns:
                raise UserError(
                    f"{source.name}:1: has another header than {collector.source}; "
                    f"pack files of one header"
                )
            collector.begin(source.name)
        arranged = source if isinstance(source, ArrangedSource) else None
        collector.arrangement = arranged.arrangement if arranged else None
        collector.arranging_faults = arranged.faults if arranged else {}
        self._images.extend(collector.layout.images(len(buffer)) for _ in self._buffers)
        if self._spool is not None and source.size:
            line_bytes = stop / buffer.count(b"\n", 0, stop)
            self._spool.check_space(int(source.size / line_bytes * collector.layout.num_pixels))
        return collector

    def _collect(self, collector: CsvCollector, progress: Progress) -> bool:
        """Take the oldest block; whether to go on."""
        buffer, stop, image_RP, future = self._pending.popleft()
        goes_on = collector.add_block(future.result(), self._lex, buffer, stop, image_RP)
        progress(collector.row, self._source.part)
        self._buffers.append(buffer)
        self._images.append(image_RP)
        return goes_on
