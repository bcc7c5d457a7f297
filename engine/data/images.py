"""Sources that hold images as arrays or pictures, not as a CSV: what all of them share.

A source hands out tasks, one for each block of rows in order; threads run them, and `read_images`
collects what they return. A task reads, or only decodes what was read before it was handed out, or
waits for a process that does both.

Does not: know any format; idx.py, npz.py, pictures.py and columns.py do.

Shapes: R images of a block, P pixels, N images of the source.
"""

import math
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Protocol, TypeVar

import numpy as np

from engine.data.collect import Collector, Stored
from engine.data.foreign import listed
from engine.data.lexer import Fault, Rows, check_text
from engine.data.records import MAX_PIXELS
from engine.data.sums import sum_rows
from engine.errors import UserError

BLOCK_BYTES = 2 * 2**20
"""Of pixels that a task returns."""
MAX_SIDE = math.isqrt(MAX_PIXELS)
TO_PREDICT = "without labels only tools/predict takes it: --label-column none"
ANY_LABEL = "?"
"""Of images without labels: each has some label."""
Task = Callable[[], Rows]
Progress = Callable[[int, float], None]
"""Called with the rows read and the part (0..1) of the source that has been read."""


class Images(Protocol):
    """An open source of square images of one size, whose header has been checked."""

    @property
    def name(self) -> str:
        """As sentences call it."""

    @property
    def side(self) -> int:
        """Height and width of the images."""

    @property
    def num_images(self) -> int | None:
        """None where all has to be read to count them."""

    @property
    def found(self) -> str:
        """What was found in it, for whoever packs it to compare with what they meant."""

    def stored(self) -> Stored | None:
        """Where its pixels lie as they are, or None: they have to be unpacked or decoded."""

    def tasks(self) -> Iterator[Task]:
        """Each returns a block of rows; UserError where the source is refused."""

    def places(self) -> Iterator[str] | None:
        """Where each image lies, in order; None: they have numbers only."""

    def check_unchanged(self) -> None:
        """UserError if it was written to while it was read."""


def rows_per_block(num_pixels: int) -> int:
    return max(BLOCK_BYTES // num_pixels, 1)


def check_side(name: str, height: int, width: int) -> int:
    """The side of square images; UserError if they are none, or too large."""
    if height != width:
        raise UserError(
            f"{name}: holds images of {height} x {width} pixels, want square ones; "
            f"pad or cut each to a square"
        )
    if not 0 < height <= MAX_SIDE:
        raise UserError(
            f"{name}: holds images of {height} x {width} pixels, want 1 x 1 to "
            f"{MAX_SIDE} x {MAX_SIDE}; scale them"
        )
    return height


def rows_of(image_RP: np.ndarray, texts: Sequence[str], label_R: np.ndarray) -> Rows:
    """A block of rows: its pixels, its different labels, and each row's index among them."""
    sum_R, squares_R, hash_R = sum_rows(image_RP)
    return Rows(
        image_RP=image_RP,
        labels=list(texts),
        label_R=label_R.astype(np.int32),
        fonts=[""],
        font_R=np.zeros(len(label_R), np.int32),
        sum_R=sum_R,
        squares_R=squares_R,
        hash_R=hash_R,
    )


def unlabelled(image_RP: np.ndarray) -> Rows:
    """A block of rows without labels."""
    return rows_of(image_RP, [ANY_LABEL], np.zeros(len(image_RP), np.int32))


def numbered(value_R: np.ndarray) -> tuple[list[str], np.ndarray]:
    """(Different labels, each row's index among them) of integers."""
    values, index_R = np.unique(value_R, return_inverse=True)
    return [str(value) for value in values.tolist()], index_R


def checked_label(text: str, place: str) -> str:
    """A label that may be one; UserError, begun by `place`, if not."""
    try:
        text.encode()
        return check_text(text, 0)
    except UnicodeEncodeError:
        what = "holds half a surrogate pair, want text that UTF-8 can hold"
    except Fault as fault:
        what = str(fault)
    raise UserError(f"{place}: the label {text[:40]!r} {what}; rename it")


Names = tuple[str, str | None]
"""What the user says of the parts that hold the images and their labels: a name; "": the only one
that may; None: there are no labels."""


class Part(Protocol):
    """What a source holds under a name: an array, a column."""

    @property
    def noun(self) -> str: ...

    @property
    def name(self) -> str: ...


P = TypeVar("P", bound=Part)


def chosen(source: str, parts: Sequence[P], role: str, asked: str, fault: Callable[[P], str]) -> P:
    """The part that is asked for, or the only one that may have the role.

    Args:
        source: as sentences call it.
        role: images or labels.
        asked: the part's name; "": none was given.
        fault: why a part cannot have the role, and what to do; "" if it can.
    Raises:
        UserError: there is no such part, it cannot, or several can.
    """
    flag = f"--{role} NAME"
    noun = parts[0].noun if parts else "part"
    named = [part for part in parts if part.name == asked]
    fit = [part for part in parts if not fault(part)]
    alike = [part for part in parts if role[:-1] in part.name.lower()]
    if asked and not named:
        names = listed([repr(part.name) for part in parts])
        raise UserError(f"{source}: holds no {noun} {asked!r}, but {names}; give another {flag}")
    if asked or (not fit and len(alike) == 1):
        one = named[0] if asked else alike[0]
        if what := fault(one):
            raise UserError(f"{source}: the {noun} {one.name!r} {what}")
        return one
    if not fit:
        why = [f"{part.name!r} {fault(part).partition(';')[0]}" for part in parts]
        hint = f" ({TO_PREDICT})" if role == "labels" else ""
        raise UserError(
            f"{source}: holds no {noun} that may be the {role}: {listed(why) or 'it is empty'}; "
            f"give {flag}{hint}"
        )
    if len(fit) > 1:
        names = listed([repr(part.name) for part in fit])
        raise UserError(f"{source}: {names} may be the {role}; say which with {flag}")
    return fit[0]


def read_images(
    images: Images, collector: Collector, workers: int, show: Callable[[int], None]
) -> None:
    """Run a source's tasks, at most `workers` + 1 ahead of what is collected.

    Args:
        show: called with the rows that have been collected.
    Raises:
        UserError: the source is refused, or holds more or fewer images than it declares.
    """
    pending: deque[Future[Rows]] = deque()

    def collect() -> None:
        collector.add(pending.popleft().result())
        show(collector.row)

    with ThreadPoolExecutor(workers) as pool:
        try:
            for task in images.tasks():
                pending.append(pool.submit(task))
                if len(pending) > workers:
                    collect()
            while pending:
                collect()
        finally:
            pool.shutdown(wait=True, cancel_futures=True)
    found = collector.row - collector.first
    if images.num_images not in (None, found):
        raise UserError(
            f"{images.name}: declares {images.num_images:,} images, but {found:,} are in it; "
            f"write it again"
        )
