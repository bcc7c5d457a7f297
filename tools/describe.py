"""tools/pack_tmnist --describe: what a record directory holds, in words and as a sheet."""

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

import numpy as np

from engine.data.records import Records, open_records
from engine.data.split import family
from engine.errors import printable

SHEET_IMAGES = 192


def describe(path: Path, sheet: Path) -> str:
    """Text about the records at `path`; draws examples of each class to `sheet`.

    Raises:
        UserError: the records cannot be opened, or the sheet not be written.
    """
    from tools.report import sheet as picture  # not above: packing needs no Pillow

    picture.check_picture(sheet)
    records = open_records(path)
    splits = records.splits
    num_images = sum(map(len, splits.values()))
    height, width = records.height_width
    deviation = f"standard deviation {records.pixel_std:.3f}"
    lines = [
        f"{printable(str(path))}: {num_images:,} images of {height} x {width} pixels, "
        f"{len(records.classes)} classes",
        f"fingerprint {records.fingerprint}",
        f"train pixels: mean {records.pixel_mean:.3f}, {deviation} (0..255)",
        _typefaces(records),
        f"images that occur more than once: {_repeated(records):,}",
    ]
    counts = {
        name: np.bincount(s.label_N, minlength=len(records.classes)) for name, s in splits.items()
    }
    lines += class_table(records.classes, counts)
    lines += given_lines(records.given, splits)
    image_MHW, label_M = _examples(records)
    by_class = picture.class_captions(records.classes)
    captions = [by_class[label] for label in label_M]
    drawn = picture.draw_sheet(image_MHW, captions, [picture.BLACK] * len(captions))
    picture.save_picture(drawn, sheet)
    return "\n".join([*lines, f"sheet of glyphs: {printable(str(sheet))}"])


def given_lines(given: Sequence[str], splits: Iterable[str]) -> list[str]:
    """That splits were given; none where all were drawn."""
    if not given:
        return []
    drawn = [split for split in splits if split not in given]
    rest = f"; {' and '.join(drawn)} drawn from train" if drawn else ""
    return [f"splits as given: {', '.join(given)}{rest}"]


def class_table(classes: Sequence[str], counts: Mapping[str, Iterable[int]]) -> list[str]:
    """Lines of how many rows of each class each split has."""
    names = [printable(label) for label in classes]
    width = max(6, *(len(name) + 1 for name in names))
    lines = [f"{'class':<{width}}" + "".join(f"{name:>9}" for name in counts)]
    for name, row in zip(names, zip(*counts.values(), strict=True), strict=True):
        lines.append(f"{name:<{width}}" + "".join(f"{count:>9,}" for count in row))
    return [*lines, f"{'all':<{width}}" + "".join(f"{sum(split):>9,}" for split in counts.values())]


def _typefaces(records: Records) -> str:
    if records.fonts == ("",):
        return "typefaces: not named in the CSV"
    used = {name: np.unique(split.font_N) for name, split in records.splits.items()}
    _, num_splits = np.unique(np.concatenate(list(used.values())), return_counts=True)
    parts = ", ".join(f"{len(fonts):,} in {name}" for name, fonts in used.items())
    families = len({family(font) for font in records.fonts})
    shared = int((num_splits > 1).sum())
    counted = f"{len(records.fonts):,} of {families:,} families"
    return f"typefaces: {counted}; {parts}; {shared:,} in several splits"


def _repeated(records: Records) -> int:
    """Images whose pixels an earlier one has, over all splits."""
    contents = [
        hash(image_HW.tobytes())
        for split in records.splits.values()
        for image_HW in split.image_NHW
    ]
    return len(contents) - len(set(contents))


def _examples(records: Records) -> tuple[np.ndarray, np.ndarray]:
    """(image_MHW, label_M) of train, class by class, the same number of each."""
    train = records.split("train")
    num = max(SHEET_IMAGES // len(records.classes), 1)
    rows = []
    for label in range(len(records.classes)):
        row_M = np.flatnonzero(train.label_N == label)
        rows.append(row_M[np.linspace(0, len(row_M) - 1, min(num, len(row_M))).astype(int)])
    shown = train.take(np.concatenate(rows))
    return shown.image_NHW, shown.label_N
