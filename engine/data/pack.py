"""Sources -> published records. The command tools/pack_tmnist is a front of `pack` and `check`.

One pass reads blocks on all cores (given.py) and spools the pixels to an unnamed file beside the
target, unless they lie in the source as they are; then the splits are drawn from the labels
(split.py), and a second pass copies rows from there to the record files. Memory does not grow with
the pixels.

Shapes: N rows of the source, M of them.
"""

import os
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, closing
from dataclasses import dataclass
from importlib import import_module
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np

from engine.data.arrange import NO_LABEL
from engine.data.collect import Collector, Spool
from engine.data.given import CsvFiles, Groups, ImageFiles, SourceOptions, open_given, silent
from engine.data.images import Progress
from engine.data.lexer import MAX_FAULTS
from engine.data.record_file import SPLITS
from engine.data.records import GIVEN, Take, write_records
from engine.data.split import SplitOptions, draw_given, draw_splits
from engine.data.table import Table, odd_counts, warnings_of
from engine.durable import MANIFEST, locked, publish_directory, remove_leftovers, writing
from engine.errors import UserError

NAME_LIMIT_BYTES = 200
"""Of the target's name: temporary names are some 20 bytes longer, and file systems end at 255."""
Given = Path | Sequence[Path] | Groups
"""A source, or several of one layout whose rows follow each other; or such by split: train, and
test, val or both."""


@dataclass(frozen=True)
class PackReport:
    """What a pack did; `manifest` holds the counts per class and split."""

    manifest: dict[str, Any]
    warnings: list[str]
    found: list[str]
    """Of each source, what it was read as."""


@dataclass(frozen=True, kw_only=True)
class PackOptions(SplitOptions, SourceOptions):
    """What the command's flags of the same names say."""

    force: bool = False
    classes: int | None = None
    """Refuse a source with another number of labels."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.has_labels:
            raise UserError(
                f"--label-column {NO_LABEL}: leaves nothing to train on; name the labels' column "
                f"(tools/predict reads sources without labels)"
            )

    def for_manifest(self) -> dict[str, Any]:
        return {"split": self.split, "balance": self.balance, "seed": self.seed}


def pack(
    source: Given,
    out: Path,
    options: PackOptions = PackOptions(),
    progress: Progress = silent,
) -> PackReport:
    """Read a CSV (plain, .gz, a .zip holding one, or a pipe) or images, and publish their records.

    The same rows and options give the same bytes, whatever the container, workers and machine.

    Raises:
        UserError: the source is refused, or `out` may not be replaced; nothing was published.
    """
    _check_name(out)
    out = Path(os.path.realpath(out))
    with writing(out), ExitStack() as stack:
        groups = _groups(source)
        given = stack.enter_context(open_given(groups, options))
        stack.enter_context(locked(out, wait=False))
        try:
            _check_target(out, options.force)
        except UserError:
            # Another name for OUT would not help a wrong source.
            given.check_head()
            raise
        remove_leftovers(out)
        # For the second pass, while nobody waits for it.
        stack.enter_context(ThreadPoolExecutor(1)).submit(import_module, "pyarrow")
        with closing(Spool(out.parent)) as spool:
            collector = given.read(spool, progress)
            given.check_unchanged()
            pixels = given.stored() or spool
            return _publish(given, out, options, collector, pixels.take)


def _groups(source: Given) -> dict[str, list[Path]]:
    """The files by the split that they are given for, in the order of SPLITS; else under ""."""
    if not isinstance(source, Mapping):
        paths = _listed(source)
        if not paths:
            raise UserError("there is no source; name a file to pack")
        return {"": paths}
    if unknown := sorted(source.keys() - set(SPLITS)):
        raise UserError(f"{unknown[0]!r} is no split; name {', '.join(SPLITS)}")
    given = {split: source[split] for split in SPLITS if source.get(split)}
    groups = {split: _listed(paths) for split, paths in given.items()}
    if "train" not in groups:
        raise UserError("--train: is missing; name the files to train on, too")
    if len(groups) < 2:
        raise UserError("--train: is given alone; give --test or --val, too, or name it as SOURCE")
    return groups


def _listed(paths: Path | Sequence[Path]) -> list[Path]:
    return [paths] if isinstance(paths, Path) else list(paths)


def _publish(
    given: CsvFiles | ImageFiles, out: Path, options: PackOptions, collector: Collector, take: Take
) -> PackReport:
    """Split the rows, and publish them as records."""
    table = collector.table()
    num = len(table.classes)
    if options.classes not in (None, num):
        raise UserError(
            f"{given.name}: has {num} labels, want {options.classes}; give another --classes"
        )
    groups = given.rows(collector)
    _check_known_classes(given, collector, table, groups)
    counts = odd_counts(table)
    facts: dict[str, Any] = {"options": options.for_manifest(), "source_rows": counts}
    if "train" in groups:
        rows = draw_given(table, groups, options)
        facts[GIVEN] = list(groups)
    else:
        rows = draw_splits(table.label_N, table.font_N, table.classes, table.fonts, options)
    with publish_directory(out) as directory:
        manifest = write_records(directory, table, take, rows, facts)
        given.check_unchanged()  # pixels may have come from it only now
    warnings = [*warnings_of(table, counts), *_seen_warnings(table, groups)]
    return PackReport(manifest, warnings, given.found)


def _check_known_classes(
    given: CsvFiles | ImageFiles, collector: Collector, table: Table, groups: Mapping[str, range]
) -> None:
    """UserError if a split that is given has a class that train has not."""
    if "train" not in groups:
        return
    start, stop = groups["train"].start, groups["train"].stop
    is_known = np.bincount(table.label_N[start:stop], minlength=len(table.classes)) > 0
    for split, rows in groups.items():
        unknown_M = np.flatnonzero(~is_known[table.label_N[rows.start : rows.stop]])
        if len(unknown_M):
            row = rows.start + int(unknown_M[0])
            place = next(islice(given.places(collector), row, None))
            label = table.classes[table.label_N[row]]
            raise UserError(
                f"{place}: has the class {label!r}, which no row of train has; leave such rows "
                f"out of {split}, or give train some"
            )


def _seen_warnings(table: Table, groups: Mapping[str, range]) -> list[str]:
    """How many images of the given splits are in train, too; pixels are compared by hashes."""
    if "train" not in groups:
        return []
    found = []
    train = table.hash_N[groups["train"].start : groups["train"].stop]
    for split, rows in groups.items():
        num = np.count_nonzero(np.isin(table.hash_N[rows.start : rows.stop], train))
        if num and split != "train":
            found.append(f"{num:,} images of {split} are in train, too")
    return found


def check(
    source: Given, options: SourceOptions = PackOptions()
) -> tuple[int, list[str], list[str]]:
    """Read a source without packing it: (rows, its first MAX_FAULTS faults, warnings).

    Of images, the first fault ends it. UserError if it cannot be read, or its header is refused.
    """
    faults: list[str] = []
    with open_given(_groups(source), options) as given:
        collector = given.read(faults=faults)
    if faults:
        note = f"only the first {MAX_FAULTS} faults are listed"
        return collector.row, faults, [note] if len(faults) == MAX_FAULTS else []
    table = collector.table()
    groups = given.rows(collector)
    try:
        _check_known_classes(given, collector, table, groups)
    except UserError as error:
        return collector.row, [str(error)], []
    seen = _seen_warnings(table, groups)
    return collector.row, [], [*warnings_of(table, odd_counts(table)), *seen]


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
