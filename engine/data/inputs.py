"""Images that a network is asked about: all that can be packed, and what has no labels.

Beside the sources of given.py these are PNGs by name or in a folder of their own, PNGs or a CSV
piped in, files of other layouts without labels (`--label-column none`), and record directories.
They are read by the same readers, as strictly. Pixels are spooled to an unnamed temporary file,
unless they lie somewhere as they are: memory grows by some bytes per image, not by its pixels.

Does not: ask a network; tools/predict does.

Shapes: N images, M of them, P pixels of each.
"""

import io
import os
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, closing, contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np

from engine.data.arrange import ArrangedSource
from engine.data.collect import Spool, check_space
from engine.data.foreign import HEAD_BYTES, has_class_folders, is_litter, is_picture
from engine.data.given import CsvFiles, ImageFiles, SourceOptions, csv_kind, open_given
from engine.data.layouts import first_bytes
from engine.data.records import Take, open_records
from engine.data.source import OPENED, Source, open_source, reading
from engine.durable import MANIFEST, writing
from engine.errors import UserError


@dataclass(frozen=True)
class Inputs:
    """Images in order, and what is known of them."""

    name: str
    """As sentences call them."""
    num_images: int
    height: int
    width: int
    take: Take
    places: Iterator[str]
    """Where each image is; for one passage."""
    classes: tuple[str, ...]
    """Of the labels; none where there are no labels."""
    label_N: np.ndarray
    """uint8, into `classes`; empty where there are no labels."""
    found: list[str]
    """Of each source, what it was read as."""
    check_unchanged: Callable[[], None] = lambda: None
    """UserError if a source was written to since it was opened. `take` may read from it, so it is
    to be called behind the last `take`; records verify what they give."""


class _Pixels(Spool):
    """Nothing but the pixels is written."""

    def check_space(self, num_pixels: int, *, is_stored: bool = False) -> None:
        if not is_stored:
            check_space(self.folder, num_pixels, "a copy of the pixels")


@contextmanager
def open_inputs(
    paths: Sequence[Path], options: SourceOptions, split: str | None = None
) -> Iterator[Inputs]:
    """Read images from sources of one layout.

    Args:
        split: the one of record directories; None: test.
    Raises:
        UserError: a source is refused.
    """
    with ExitStack() as stack:
        if any(_is_published(path) for path in paths):
            yield _of_records(paths, options, split or "test")
            return
        if split:
            raise UserError(f"--split: is of record directories, {paths[0]} is none; leave it out")
        given, has_labels = _open(paths, options, stack)
        with writing(Path("the temporary folder (TMPDIR)")):
            spool = stack.enter_context(closing(_Pixels(Path(tempfile.gettempdir()))))
        with writing(spool.folder):
            collector = given.read(spool)
        given.check_unchanged()
        table = collector.table()
        yield Inputs(
            name=given.name,
            num_images=collector.row,
            height=collector.side,
            width=collector.side,
            take=(given.stored() or spool).take,
            places=given.places(collector),
            classes=table.classes if has_labels else (),
            label_N=table.label_N if has_labels else table.label_N[:0],
            found=given.found,
            check_unchanged=given.check_unchanged,
        )


def _open(
    paths: Sequence[Path], options: SourceOptions, stack: ExitStack
) -> tuple[CsvFiles | ImageFiles, bool]:
    """(Sources that are opened, whether they have labels)."""
    if any(OPENED.fullmatch(str(path)) for path in paths):
        return _open_pipe(paths, options, stack)
    if _is_unlabelled(paths[0], options):
        from engine.data.unlabelled import files_of

        options.check("png", str(paths[0]))
        return ImageFiles([files_of(paths)], options, {"": 1}), False
    given = stack.enter_context(open_given({"": paths}, options))
    return given, options.has_labels


def _open_pipe(
    paths: Sequence[Path], options: SourceOptions, stack: ExitStack
) -> tuple[CsvFiles | ImageFiles, bool]:
    if len(paths) > 1:
        raise UserError("-: stands beside other sources; pipe all of them, or name all of them")
    source = stack.enter_context(open_source(paths[0], partial(_pipe, options)))
    if options.layout not in ("auto", "csv", "png"):
        raise UserError(
            f"{source.name}: is read as PNGs or a CSV, not as {options.layout}; name a file"
        )
    if _is_of_pictures(source, options):
        from engine.data.unlabelled import piped

        options.check("png", source.name)
        return ImageFiles([piped(source)], options, {"": 1}), False
    return CsvFiles([source], options, {"": 1}), options.has_labels


def _pipe(
    options: SourceOptions, path: Path, name: str, raw: io.BufferedReader, stack: ExitStack
) -> Source:
    """An open pipe: of pictures as it is, of a CSV as it is to be arranged."""
    make = Source if _holds_pictures(raw, options) else csv_kind(options)
    return make(path, name, raw, stack)


def _is_of_pictures(source: Source, options: SourceOptions) -> bool:
    """As `_pipe` found; of a CSV that is arranged, the first bytes have been read."""
    if isinstance(source, ArrangedSource):
        return False
    with reading(source.name):
        return _holds_pictures(source.raw, options)


def _holds_pictures(raw: io.BufferedReader, options: SourceOptions) -> bool:
    """Whether a pipe that nothing was read from is one of PNGs."""
    if options.layout != "auto":
        return options.layout == "png"
    return is_picture(raw.peek(HEAD_BYTES)[:HEAD_BYTES])


def _is_unlabelled(path: Path, options: SourceOptions) -> bool:
    """Whether a path is a picture, or a folder of pictures and not of class folders."""
    if options.layout not in ("auto", "png"):
        return False
    if not os.path.isdir(path):
        return path.suffix.lower() == ".png" or is_picture(first_bytes(path)[0])
    with reading(str(path)), os.scandir(path) as entries:
        names = [entry.name for entry in entries if not is_litter(entry.name)]
    if not names:
        raise UserError(f"{path}: is an empty folder; name one that holds PNGs")
    return any(name.lower().endswith(".png") for name in names) and not has_class_folders(path)


def _is_published(path: Path) -> bool:
    return os.path.isdir(path) and os.path.exists(path / MANIFEST)


def _of_records(paths: Sequence[Path], options: SourceOptions, name: str) -> Inputs:
    """A split of a record directory."""
    if len(paths) > 1:
        raise UserError(f"{paths[0]}: stands beside other sources; name one record directory alone")
    if options != SourceOptions():
        raise UserError(f"{paths[0]}: is a record directory; leave options of other sources out")
    records = open_records(paths[0], in_memory=False)
    split = records.asked(name)
    height, width = records.height_width

    def take(row_M: np.ndarray) -> np.ndarray:
        image_MHW: np.ndarray = split.image_NHW[row_M]
        return image_MHW.reshape(len(row_M), height * width)

    return Inputs(
        name=records.path,
        num_images=len(split),
        height=height,
        width=width,
        take=take,
        places=(f"{records.path}: {name} image {number}" for number in range(1, len(split) + 1)),
        classes=records.classes,
        label_N=split.label_N,
        found=[f"records, {len(split):,} images of {height} x {width} of {name}: {records.path}"],
    )
