"""R5: mutated manifests that are signed again, and mutated CSVs against an independent oracle."""

import contextlib
import copy
import hashlib
import json
import random
import re
import resource
import time
import zlib
from collections.abc import Callable, Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

import numpy as np

from engine.data.collect import Spool
from engine.data.given import Reading, SourceOptions
from engine.data.pack import check, pack
from engine.data.records import Records, _fingerprint, open_records
from engine.data.source import open_source
from engine.errors import UserError
from tests.reliability.common import Tally, glyph_csv, warm
from tests.reliability.mutants import mutated, row
from tests.reliability.oracle import judge

SLOW_S = 1.0
GROWTH_BYTES = 64 * 2**20
RAW = "@raw@"
VALUES = (
    None, True, False, 0, 1, -1, 2, 255, 256, 257, 2**31, 2**32, 2**53 + 1, 2**62, 2**63, 2**64,
    10**15, 10**30, -(2**63), 0.0, 0.5, 1.0, 2.0, 1e300, -1.5, float("nan"), float("inf"), "", "0",
    "nan", "1e400", "../x.arrow", "/etc/passwd", "train-00001.arrow", "val-00000.arrow",
    "train-٠٠٠٠٠.arrow", "\ud800", "\0", "é", "x" * 5000, [], {}, [[]], [0], [-1], ["a", "a"],
    ["\udfff"], {"train": []}, {"": 0}, [2**40, 1], RAW,
)  # fmt: skip


def manifests(tally: Tally) -> None:
    """Manifests of wrong values with right hashes: refused, or opened to consistent arrays."""
    place = tally.fast / "records"
    pack(glyph_csv(tally.folder / "tiny.csv", 40, 2), place)
    manifest, fonts = (
        json.loads((place / "manifest.json").read_text()),
        json.loads((place / "fonts.json").read_text()),
    )
    train = (place / "train-00000.arrow").read_bytes()
    start = _peak_bytes()
    opened = 0
    for _ in range(tally.count(200, 5_000, 100_000)):
        mutant, table, file = copy.deepcopy(manifest), fonts, train
        kind = tally.rng.random()
        if kind < 0.1:
            table = _mutated(copy.deepcopy(fonts), tally.rng)
        elif kind < 0.2:
            file = _with_bytes(train, tally.rng)
            entry = mutant["splits"]["train"]["files"][0]
            entry |= {"crc32": [zlib.crc32(file)], "sha256": hashlib.sha256(file).hexdigest()}
        else:
            for _ in range(tally.rng.choice((1, 1, 2, 3))):
                mutant = _mutated(mutant, tally.rng)
        _sign(place, mutant, table, file, tally.rng)
        began = time.perf_counter()
        try:
            records = open_records(place, in_memory=tally.rng.random() < 0.5)
            opened += 1
            found = _inconsistency(records)
        except UserError as error:
            found = "" if "\n" not in str(error) else f"an error of several lines: {error}"
        except Exception as error:
            found = f"raised {error!r}"
        if time.perf_counter() - began > SLOW_S:
            found += "; took too long"
        tally.check(not found, found)
    tally.note(f"{opened:,} mutants opened, to consistent arrays")
    tally.check(
        _peak_bytes() - start < GROWTH_BYTES, f"memory grew by {_peak_bytes() - start:,} bytes"
    )


def _mutated(tree: Any, rng: random.Random) -> Any:
    """The tree with one change at a random node."""
    nodes = list(_nodes(tree))
    if not nodes:
        return copy.deepcopy(rng.choice(VALUES))
    parent, key = rng.choice(nodes)
    kind = rng.random()
    if kind < 0.15:
        del parent[key]
    elif kind < 0.3 and isinstance(parent, list):
        parent.extend([copy.deepcopy(parent[key])] * rng.choice((1, 1, 300)))
    elif kind < 0.3:
        parent[rng.choice(("", "extra", "train", "val", "x" * 99, "name"))] = parent.pop(key)
    elif kind < 0.5 and type(parent[key]) is int:
        parent[key] += rng.choice((-1, 1, 4, 2**20, -(2**20), 2**63, 0.5))
    elif kind < 0.6:
        other, place = rng.choice(nodes)
        parent[key] = copy.deepcopy(other[place])
    else:
        parent[key] = copy.deepcopy(rng.choice(VALUES))
    return tree


def _nodes(tree: Any) -> Iterator[tuple[Any, Any]]:
    """Each (container, key) of a tree."""
    items = (
        tree.items()
        if isinstance(tree, dict)
        else enumerate(tree)
        if isinstance(tree, list)
        else ()
    )
    for key, value in items:
        yield tree, key
        yield from _nodes(value)


def _with_bytes(data: bytes, rng: random.Random) -> bytes:
    """The bytes with up to three changed ones."""
    changed = bytearray(data)
    for _ in range(rng.randint(1, 3)):
        changed[rng.randrange(len(data))] = rng.choice((0, 1, 3, 127, 255))
    return bytes(changed)


def _sign(place: Path, manifest: Any, fonts: Any, file: bytes, rng: random.Random) -> None:
    """Write all files so that every hash is right, as a forger would."""
    (place / "train-00000.arrow").write_bytes(file)
    table = _json(fonts, rng)
    (place / "fonts.json").write_bytes(table)
    if isinstance(manifest, dict):
        if rng.random() < 0.95:
            manifest["fonts"] = {"bytes": len(table), "sha256": hashlib.sha256(table).hexdigest()}
        with contextlib.suppress(Exception):  # where it has no such files any more
            manifest["fingerprint"] = _fingerprint(manifest)
    data = _json(manifest, rng)
    (place / "manifest.json").write_bytes(data)
    (place / "manifest.sha256").write_text(hashlib.sha256(data).hexdigest() + "\n")


def _json(tree: Any, rng: random.Random) -> bytes:
    text = json.dumps(tree)
    raw = rng.choice(
        (
            "[" * 100_000,
            "{" * 9,
            "[" * 50 + "]" * 50,
            "1" * 5000,
            "-0",
            "1E400",
            "01",
            '"\\ud800"',
            "{}}",
        )
    )
    if rng.random() < 0.03:
        text = text.replace(
            "{", rng.choice(('{"version": 2, "version": 2, ', '{"name": 1, "name": 1, ', "{,")), 1
        )
    return text.replace(f'"{RAW}"', raw).encode()


def _inconsistency(records: Records) -> str:
    """What cannot be of records that were opened."""
    if not (
        0 <= records.pixel_mean <= 255 and 0 <= records.pixel_std <= 127.5
    ):  # false for NaN, too
        return "opened with an impossible mean or standard deviation"
    for split in records.splits.values():
        images = split.image_NHW[:]
        if images.shape != (len(split), *records.height_width) or images.dtype != np.uint8:
            return f"opened to images of {images.shape}"
        if not len(split.label_N) == len(split.font_N) == len(split):
            return "opened to columns of different lengths"
        if len(split) and (split.label_N.max() >= len(records.classes) or split.font_N.min() < 0):
            return "opened to a label or font that is none"
        if len(split) and split.font_N.max() >= len(records.fonts):
            return "opened to a font past the end"
    return ""


def tables(tally: Tally) -> None:
    """Mutated CSVs: verdict, faulty row, labels, typefaces and pixels as the oracle finds."""
    warm()
    path, spool_folder = tally.fast / "mutant.csv", tally.fast
    start = _peak_bytes()
    accepted = 0
    for number in range(tally.count(300, 5_000, 100_000)):
        data = _table(tally.rng)
        path.write_bytes(data)
        began = time.perf_counter()
        found = _pack_verdict(path, spool_folder, tally.rng.choice((64, 300, 2**16)))
        if number % 10 == 0 and found[0] is not None:
            found = (
                (found[0], found[1])
                if _check_verdict(path) == found[0]
                else ("check and pack disagree", [])
            )
        slow = time.perf_counter() - began > SLOW_S
        want = judge(data)
        accepted += want[0] is None
        same = found == want if want[0] is None else found[0] == want[0]
        tally.check(
            same and not slow,
            f"row {found[0]}, the oracle says {want[0]}{', slow' * slow}: {data!r}",
        )
    tally.note(f"{accepted:,} of the mutants are right")
    tally.check(
        _peak_bytes() - start < GROWTH_BYTES, f"memory grew by {_peak_bytes() - start:,} bytes"
    )


def _table(rng: random.Random) -> bytes:
    """A small CSV, mutated."""
    num = rng.choice((1, 4, 4, 9, 16))
    text = rng.choice(("names,labels", "names,labels", '"names","labels"', "label"))
    first = rng.choice((0, 1))
    pixels = [f"pixel{i + first}" if text == "label" else str(i + 1) for i in range(num)]
    lines = [",".join([text, *pixels])]
    for _ in range(rng.choice((1, 2, 3, 5, 9))):
        lines.append(row(rng, 1 if text == "label" else 2, num))
    end = rng.choice(("\n", "\n", "\r\n"))
    return mutated(rng, (end.join(lines) + rng.choice((end, end, "", end + end))).encode())


def _pack_verdict(path: Path, folder: Path, block_bytes: int) -> tuple[Any, list[Any]]:
    """The packer's own pass over a CSV, as `judge` answers."""
    try:
        with open_source(path) as source, closing(Spool(folder)) as spool:
            options = SourceOptions(workers=1, block_bytes=block_bytes)
            table = Reading(source, options, spool).read().table()
            pixels = spool.take(np.arange(len(table.label_N)))
    except UserError as error:
        return _faulty_row(str(error)), []
    except Exception as error:
        return f"raised {error!r}", []
    fonts, labels = ([names[i] for i in index_N] for names, index_N in
                     ((table.fonts, table.font_N), (table.classes, table.label_N)))  # fmt: skip
    return None, list(zip(fonts, labels, pixels.tolist(), strict=True))


def _check_verdict(path: Path) -> int | None:
    try:
        _, faults, _ = check(path)
    except UserError as error:
        return _faulty_row(str(error))
    return _faulty_row(faults[0]) if faults else None


def _faulty_row(text: str) -> int:
    """The row that an error names; 0 if it is about the header or the whole file."""
    found = re.search(r"\(row (\d+)[,)]", text)
    return int(found[1]) if found else 0


def _peak_bytes() -> int:
    return 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss


ROWS: tuple[tuple[str, str, Callable[[Tally], None]], ...] = (
    ("R5", "mutated manifests, typefaces and files, signed again", manifests),
    ("R5", "mutated CSVs against an independent oracle", tables),
)
