"""R3 and R4: flipped bits, files cut, exchanged and foreign, and changed under their reader."""

import os
import shutil
import time
from collections.abc import Callable
from itertools import permutations
from pathlib import Path

import numpy as np

from engine.data.pack import PackOptions, pack
from engine.data.records import open_records
from engine.errors import UserError
from tests.reliability.common import Tally, fork, glyph_csv, verdict

READER_S = 10.0
WRONG_DATA, NEVER_NOTICED = 3, 4


def flips(tally: Tally) -> None:
    """Bits of a tiny record directory; in larger ones bits, pairs, zeroed and exchanged blocks."""
    tiny, small, large = tally.fast / "tiny", tally.fast / "small", tally.fast / "large"
    pack(glyph_csv(tally.folder / "tiny.csv", 12, 2), tiny, PackOptions(split="none"))
    pack(glyph_csv(tally.folder / "small.csv", 300, 28), small)
    pack(glyph_csv(tally.folder / "large.csv", 3500, 28), large, PackOptions(split="none"))
    for file in sorted(tiny.iterdir()):
        for bit in range(0, 8 * file.stat().st_size, tally.count(97, 5, 1)):
            _flip(tally, tiny, [(file, bit)], in_memory=bit % 2 == 0)
    arrows = sorted(small.glob("*.arrow"))
    bits = [(file, 8 * file.stat().st_size) for file in arrows]
    for number in range(tally.count(50, 3000, 10_000)):
        file, size = tally.rng.choices(bits, [size for _, size in bits])[0]
        _flip(tally, small, [(file, tally.rng.randrange(size))], in_memory=number % 2 == 0)
    for number in range(tally.count(20, 500, 1000)):
        file, size = tally.rng.choice(bits)
        pair = [(file, bit) for bit in tally.rng.sample(range(size), 2)]
        _flip(tally, small, pair, in_memory=number % 2 == 0)
    file = large / "train-00000.arrow"
    for number in range(tally.count(10, 300, 600)):
        size = 2**20 if number % 3 == 2 else 4096
        first, second = (
            size * place for place in tally.rng.sample(range(file.stat().st_size // size), 2)
        )
        before = file.read_bytes()
        data = bytearray(before)
        data[first : first + size] = before[second : second + size] if number % 3 else bytes(size)
        if number % 3:
            data[second : second + size] = before[first : first + size]
        _replaced(
            tally,
            large,
            file,
            data,
            f"blocks {first} and {second} of {size} bytes",
            in_memory=number % 2 == 0,
        )


def cuts(tally: Tally) -> None:
    """Files cut at any length, made longer, exchanged, of other records, missing and added."""
    tiny, other = tally.fast / "tiny", tally.fast / "other"
    pack(glyph_csv(tally.folder / "tiny.csv", 60, 4), tiny)
    pack(glyph_csv(tally.folder / "other.csv", 60, 4, seed=1), other)
    files = sorted(tiny.iterdir())
    fingerprint = open_records(tiny).fingerprint
    lengths = []
    for file in files:
        size = file.stat().st_size
        lengths += [(file, length) for length in range(0, size, tally.count(97, 5, 1))]
        lengths += [(file, size + more) for more in range(1, 4097, tally.count(999, 17, 3))]
    for file, length in lengths:
        data = file.read_bytes()
        os.truncate(file, length)
        _refused(tally, tiny, f"{file.name} cut or extended to {length} bytes")
        file.write_bytes(data)
    for first, second in permutations(files, 2):
        _replaced(tally, tiny, first, second.read_bytes(), f"{first.name} holds {second.name}")
    for file in files:
        _replaced(
            tally, tiny, file, (other / file.name).read_bytes(), f"{file.name} of other records"
        )
        for name in (file.name + "~", "train-00001.arrow", ".hidden", "notes.txt"):
            shutil.copy(file, tiny / name)
            _refused(tally, tiny, f"{name} added")
            (tiny / name).unlink()
        file.rename(tally.fast / "away")
        _refused(tally, tiny, f"{file.name} missing")
        (tally.fast / "away").rename(file)
    tally.check(verdict(tiny) == fingerprint, "the records, put in order again, do not open")


def live(tally: Tally) -> None:
    """A file is cut, overwritten or extended while it is read: right pixels or a refusal."""
    whole, copy = tally.fast / "whole", tally.fast / "copy"
    pack(glyph_csv(tally.folder / "large.csv", 3500, 28), whole, PackOptions(split="none"))
    images = open_records(whole).split("train").image_NHW
    file = copy / "train-00000.arrow"
    for number in range(tally.count(4, 20, 50)):
        shutil.rmtree(copy, ignore_errors=True)
        shutil.copytree(whole, copy)
        pid = fork(lambda number=number: _read_until_refused(copy, images, number))
        time.sleep(tally.rng.random() * 0.05)
        size = file.stat().st_size
        how = ("cut", "overwritten", "extended", "cut to nothing")[number % 4]
        if how == "overwritten":
            with open(file, "r+b") as opened:
                opened.seek(tally.rng.randrange(size // 2))
                opened.write(tally.rng.randbytes(size // 3))
        else:
            os.truncate(
                file, {"cut": tally.rng.randrange(size), "extended": size + 4096}.get(how, 0)
            )
        code = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
        tally.check(code == 0, f"{how} under its reader, which ended with {code}")


def _read_until_refused(directory: Path, images: np.ndarray, seed: int) -> int:
    """Open and read again and again until the damage is refused; returns an exit code."""
    rng = np.random.default_rng(seed)
    stop = time.perf_counter() + READER_S
    while time.perf_counter() < stop:
        try:
            found = (
                open_records(directory, in_memory=bool(rng.integers(2))).split("train").image_NHW
            )
            for _ in range(8):
                rows = np.sort(rng.integers(0, len(images), 20))
                if not np.array_equal(found[rows], images[rows]):
                    return WRONG_DATA
        except UserError:
            return 0
    return NEVER_NOTICED


def _flip(tally: Tally, directory: Path, bits: list[tuple[Path, int]], in_memory: bool) -> None:
    """Flip bits of one file in place, open, and flip them back."""
    with open(bits[0][0], "r+b", buffering=0) as file:
        for again in (False, True):
            for _, bit in bits:
                byte = os.pread(file.fileno(), 1, bit // 8)[0] ^ 1 << bit % 8
                os.pwrite(file.fileno(), bytes([byte]), bit // 8)
            if not again:
                _refused(tally, directory, f"bits {bits}", in_memory)


def _replaced(
    tally: Tally,
    directory: Path,
    file: Path,
    data: bytes | bytearray,
    what: str,
    in_memory: bool = True,
) -> None:
    """Open with other bytes in a file, and put the right ones back; the same bytes do not count."""
    before = file.read_bytes()
    if data != before:
        file.write_bytes(data)
        _refused(tally, directory, what, in_memory)
        file.write_bytes(before)


def _refused(tally: Tally, directory: Path, what: str, in_memory: bool = True) -> None:
    found = verdict(directory, in_memory)
    tally.check(found == "refused", f"{what}: {found}")


ROWS: tuple[tuple[str, str, Callable[[Tally], None]], ...] = (
    ("R3", "bits flipped, blocks zeroed and exchanged", flips),
    ("R4", "files cut, extended, exchanged, added, removed", cuts),
    ("R4", "files cut and overwritten under their reader", live),
)
