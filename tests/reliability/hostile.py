"""R6 and R15: files made to do harm, of other kinds and versions; golden records that must open."""

import copy
import gzip
import hashlib
import io
import json
import os
import resource
import shutil
import struct
import tarfile
import warnings
import zipfile
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from engine.data.pack import PackOptions, pack
from engine.data.records import _fingerprint, open_records
from engine.host import ROOT
from tests.reliability.common import Tally, beside, glyph_csv, run, warm

MEMORY_BYTES = 4 * 2**30
REFUSED_S = 5.0
GOLDEN = ROOT / "tests" / "golden" / "records-2"
GOLDEN_FINGERPRINT = "3232cbd50893fc30068a1e35b34db9cfb2d0fd44bb7482eec080a1363750a222"
CANARY = "untouched"
FILE = ("splits", "train", "files", 0)
Changes = tuple[tuple[tuple[Any, ...], Any], ...]
MANIFESTS: dict[str, Changes] = {
    "a name with ../": (((*FILE, "name"), "../canary"),),
    "an absolute name": (((*FILE, "name"), "/etc/passwd"),),
    "a name with a line feed": (((*FILE, "name"), "train-00000.arrow\n"),),
    "a name of other digits": (((*FILE, "name"), "train-٠٠٠٠٠.arrow"),),
    "10^15 rows": (((*FILE, "rows"), 10**15), (("splits", "train", "rows"), 10**15)),
    "2^53 + 1 rows": (((*FILE, "rows"), 2**53 + 1), (("splits", "train", "rows"), 2**53 + 1)),
    "2^62 bytes": (((*FILE, "bytes"), 2**62),),
    "a count of rows below 0": (((*FILE, "rows"), -1), (("splits", "train", "rows"), -1)),
    "a float for a count": (((*FILE, "rows"), 12.0), (("splits", "train", "rows"), 12.0)),
    "true for a count": (((*FILE, "rows"), True), (("splits", "train", "rows"), 1)),
    "rows x H x W = 2^64": (((*FILE, "rows"), 2**40), (("height",), 2**12), (("width",), 2**12)),
    "H x W = 2^64": ((("height",), 2**32), (("width",), 2**32)),
    "10^6 files": ((("splits", "train", "files"), [0] * 10**6),),
    "a million checksums": (((*FILE, "crc32"), [0] * 200_000),),
    "overlapping columns": (((*FILE, "label_offset"), 8),),
    "a column past the end": (((*FILE, "font_offset"), 2**40),),
    "a lone surrogate": ((("classes",), ["\ud800", "NA", ",", '"', "é", "~"]),),
    "257 classes": ((("classes",), [str(i) for i in range(257)]),),
    "a class twice": ((("classes",), ["a"] * 6),),
    "a split ../x": ((("splits", "../x"), {"rows": 0, "files": []}),),
    "fonts of 2^40 bytes": ((("fonts", "bytes"), 2**40),),
}
ZEROS = os.makedev(1, 5)
TRAIN = "train-00000.arrow"
ODD_FILES: dict[str, tuple[str, Callable[[Path], object]]] = {
    "a link": (TRAIN, lambda file: file.symlink_to("/etc/passwd")),
    "a link to a FIFO": (
        TRAIN,
        lambda file: (os.mkfifo(file.parent.parent / "fifo"), file.symlink_to("../fifo")),
    ),
    "a link to itself as fonts": ("fonts.json", lambda file: file.symlink_to(file.name)),
    "a hard link to another file": (
        TRAIN,
        lambda file: file.hardlink_to(file.parent.parent / "canary"),
    ),
    "a FIFO": (TRAIN, os.mkfifo),
    "a directory": (TRAIN, os.mkdir),
    "the device of zeros": (TRAIN, lambda file: os.mknod(file, 0o20666, ZEROS)),
    "a FIFO as manifest": ("manifest.json", os.mkfifo),
    "a link to /dev/zero as manifest": (
        "manifest.json",
        lambda file: file.symlink_to("/dev/zero"),
    ),
    "the device of zeros as hash": (
        "manifest.sha256",
        lambda file: os.mknod(file, 0o20666, ZEROS),
    ),
    "a FIFO as fonts": ("fonts.json", os.mkfifo),
}
"""What stands in a file's place."""
TEXTS = {
    "depth 10^5": lambda text: text.replace('"seed": 42', '"seed": ' + "[" * 100_000),
    "a key twice": lambda text: text.replace('"version": 2', '"version": 2, "version": 2'),
    "a NaN literal": lambda text: text.replace('"version": 2', '"version": NaN'),
    "an integer of 5,000 digits": lambda text: text.replace('"seed": 42', '"seed": ' + "9" * 5000),
    "a manifest of 2 MB": lambda text: text + " " * 2**21,
    "an array": lambda text: f"[{text}]",
    "UTF-16": lambda text: text.encode("utf-16"),
}


def corpus(tally: Tally) -> None:
    """Each hostile file, in little memory and time: one line, exit code 2, nothing touched."""
    warm()
    place = tally.folder / "place"
    canary = place / "canary"
    good = tally.folder / "good"
    pack(glyph_csv(tally.folder / "good.csv", 60, 4), good, PackOptions(split="none"))
    cases: dict[str, Callable[[Path], Any]] = {}
    for name, changes in MANIFESTS.items():
        cases[name] = lambda path, changes=changes: _forge(path, changes)
    for name, change in TEXTS.items():
        cases[name] = lambda path, change=change: _sign(
            path, change((path / "manifest.json").read_text())
        )
    cases |= {f"records: {name}": change for name, change in _odd_files().items()}
    if tally.level == "tiny":
        cases = dict(list(cases.items())[::4])
    for name, change in cases.items():
        _reset(place, canary)
        shutil.copytree(good, place / "records")
        try:
            change(place / "records")
        except OSError as error:
            tally.skip(name, str(error))
            continue
        _try(tally, name, canary, "--verify", place / "records")
    for name, data in _hostile_tables(tally.level).items():
        _reset(place, canary)
        source = place / "table.csv"
        data(source) if callable(data) else source.write_bytes(data)
        _try(tally, name, canary, source, place / "out")
        tally.check(not (place / "out").exists(), f"{name} was published")


def _reset(place: Path, canary: Path) -> None:
    shutil.rmtree(place, ignore_errors=True)
    place.mkdir()
    canary.write_text(CANARY)


def _try(tally: Tally, name: str, canary: Path, *words: object) -> None:
    def limit() -> None:
        resource.setrlimit(resource.RLIMIT_AS, (MEMORY_BYTES, MEMORY_BYTES))

    done = run(*words, before=limit)
    tally.check(done.refused and done.seconds < REFUSED_S, f"{name}: {done}")
    tally.check(canary.read_text() == CANARY, f"{name}: touched the canary")
    left = [found for found in beside(canary) if found.startswith(".")]
    tally.check(not left, f"{name}: left {left}")


def _forge(directory: Path, changes: Changes) -> None:
    """Change a manifest and make its hashes right."""
    manifest = json.loads((directory / "manifest.json").read_text())
    for keys, value in changes:
        node = manifest
        for key in keys[:-1]:
            node = node[key]
        node[keys[-1]] = copy.deepcopy(value)
    if all(
        isinstance(file, dict) for split in manifest["splits"].values() for file in split["files"]
    ):
        manifest["fingerprint"] = _fingerprint(manifest)
    _sign(directory, json.dumps(manifest))


def _sign(directory: Path, text: str | bytes) -> None:
    data = text.encode() if isinstance(text, str) else text
    (directory / "manifest.json").write_bytes(data)
    (directory / "manifest.sha256").write_text(hashlib.sha256(data).hexdigest() + "\n")


def _odd_files() -> dict[str, Callable[[Path], object]]:
    """Changes of a record directory that need more than another manifest."""
    return {what: _instead(name, make) for what, (name, make) in ODD_FILES.items()} | {
        "fonts of 8 GB": lambda path: os.truncate(path / "fonts.json", 8 * 2**30),
        "a label index = number of labels": _column("label_offset", b"\x06"),
        "a font index past the end": _column("font_offset", struct.pack("<i", 2**31 - 1)),
        "a font index below 0": _column("font_offset", struct.pack("<i", -1)),
        "one file listed 100 times": _repeat_file,
    }


def _instead(name: str, make: Callable[[Path], object]) -> Callable[[Path], object]:
    """Delete a file and make something of its name."""
    return lambda path: ((path / name).unlink(), make(path / name))


def _column(key: str, value: bytes) -> Callable[[Path], object]:
    """A right hash over an index that is none."""

    def change(path: Path) -> None:
        entry = _train_of(path)["files"][0]
        data = bytearray((path / entry["name"]).read_bytes())
        data[entry[key] : entry[key] + len(value)] = value
        (path / entry["name"]).write_bytes(data)
        sha256 = hashlib.sha256(data).hexdigest()
        _forge(path, (((*FILE, "crc32"), [zlib.crc32(data)]), ((*FILE, "sha256"), sha256)))

    return change


def _repeat_file(path: Path) -> None:
    train = _train_of(path)
    more = {"rows": 100 * train["rows"], "files": 100 * train["files"]}
    _forge(path, ((("splits", "train"), train | more),))


def _train_of(path: Path) -> dict[str, Any]:
    train: dict[str, Any] = json.loads((path / "manifest.json").read_text())["splits"]["train"]
    return train


def _hostile_tables(level: str) -> dict[str, Any]:
    """What is given as a CSV: its bytes, or what makes it."""
    good = b"names,labels,1\n" + b"F,a,0\n" * 9
    size = 200 * 2**20 if level != "tiny" else 2**20
    lie = zipfile.ZipInfo("a.csv")
    lie.extra = struct.pack("<HHQ", 1, 8, 2**62)
    bad_member = b"the name of this member leads to the canary"
    return {
        "a zip in a zip": _zip([("inner.zip", _zip([("a.csv", good)]))]),
        "a zip in a zip, named .csv": _zip([("a.csv", _zip([("a.csv", good)]))]),
        "a zip member ../canary.csv": _zip(
            [("../canary.csv", bad_member), ("../canary", bad_member)]
        ),
        "a zip member twice": _zip([("a.csv", good), ("a.csv", good)]),
        "a zip64 size of 2^62": _patched(_zip([(lie, good)]), 24, b"\xff" * 4),
        "a zip that says it is shorter": _patched(
            _zip([("a.csv", good)]), 24, struct.pack("<I", 20)
        ),
        "an encrypted zip": _patched(_zip([("a.csv", good)]), 8, b"\x01\x00"),
        "a zip of an unknown method": _patched(_zip([("a.csv", good)]), 10, b"\x63\x00"),
        "a zip whose member begins elsewhere": _patched(
            _zip([("a.csv", good)]), 42, struct.pack("<I", 2**31)
        ),
        "a zip bomb of zeros": _zip([("a.csv", bytes(size))]),
        "a gzip bomb of zeros": gzip.compress(bytes(size), 1),
        "a gzip bomb of one line": gzip.compress(b"names,labels,1\nF,a," + b"1" * size, 1),
        "a gzip bomb of one quoted field": gzip.compress(
            b'names,labels,1\n"' + b"\n" * (size // 64), 1
        ),
        "a gzip cut short": gzip.compress(good)[:-9],
        "a link to /dev/zero": lambda path: path.symlink_to("/dev/zero"),
        "a link to itself": lambda path: path.symlink_to(path.name),
        "a FIFO without a writer": os.mkfifo,
    }


def _zip(members: list[tuple[Any, bytes]]) -> bytes:
    out = io.BytesIO()
    with zipfile.ZipFile(out, "w", zipfile.ZIP_DEFLATED) as archive, warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of a name that occurs twice
        for name, data in members:
            archive.writestr(name, data)
    return out.getvalue()


def _patched(archive: bytes, offset: int, value: bytes) -> bytes:
    """A zip whose directory says something else of its first member."""
    place = archive.index(b"PK\x01\x02") + offset
    return archive[:place] + value + archive[place + len(value) :]


def foreign(tally: Tally) -> None:
    """Files of other kinds and versions are refused by name; the golden records open."""
    table = glyph_csv(tally.folder / "good.csv", 60, 4)
    good = tally.folder / "good"
    pack(table, good)
    for name, data in _foreign_files(table, good).items():
        path = tally.folder / f"foreign {name}"
        path.write_bytes(data)
        _check_refused(tally, path, path, tally.folder / "out")
        _check_refused(tally, path, "--verify", path)
        for inside in ("manifest.json", "train-00000.arrow"):
            records = tally.folder / f"records with {name}"
            shutil.copytree(good, records)
            (records / inside).write_bytes(data)
            _check_refused(tally, records, "--verify", records)
            shutil.rmtree(records)
    _check_refused(tally, tally.folder, "--verify", tally.folder)
    _check_refused(tally, good, good, tally.folder / "out")
    for key, value in (
        ("version", 1),
        ("version", 3),
        ("version", "2"),
        ("format", "other"),
        ("format", None),
    ):
        shutil.copytree(good, tally.folder / "version")
        _forge(tally.folder / "version", (((key,), value),))
        _check_refused(tally, tally.folder / "version", "--verify", tally.folder / "version")
        shutil.rmtree(tally.folder / "version")
    tally.check(open_records(GOLDEN).fingerprint == GOLDEN_FINGERPRINT, "the golden records open")
    done = run("--verify", GOLDEN, "--fingerprint", GOLDEN_FINGERPRINT)
    tally.check(done.code == 0, f"the golden records verify: {done}")
    pack(GOLDEN.with_suffix(".csv"), tally.folder / "golden")
    golden, today = (open_records(path).splits for path in (GOLDEN, tally.folder / "golden"))
    same = all(np.array_equal(golden[name].image_NHW, today[name].image_NHW) for name in golden)
    tally.check(same, "their CSV, packed today, gives the golden pixels")


def _check_refused(tally: Tally, path: Path, *words: object) -> None:
    done = run(*words)
    published = (tally.folder / "out").exists()
    tally.check(
        done.refused and str(path) in done.text and not published,
        f"{path.name}, {words[0]}: {done}",
    )


def _foreign_files(table: Path, records: Path) -> dict[str, bytes]:
    import pyarrow.csv
    import pyarrow.parquet

    def written(write: Callable[[io.BytesIO], object]) -> bytes:
        out = io.BytesIO()
        write(out)
        return out.getvalue()

    header = json.dumps({"x": {"dtype": "U8", "shape": [4], "data_offsets": [0, 4]}}).encode()
    rows = pyarrow.csv.read_csv(table)
    return {
        "empty": b"",
        "TFRecord": struct.pack("<QI", 4, 0x1234) + b"data" + struct.pack("<I", 0x5678),
        "npy": written(lambda out: np.save(out, np.zeros((4, 4), np.uint8))),
        "npz": written(lambda out: np.savez(out, x=np.zeros(4))),
        "tar": written(lambda out: tarfile.open(fileobj=out, mode="w").add(table, "a.csv")),
        "tar.gz": gzip.compress(
            written(lambda out: tarfile.open(fileobj=out, mode="w").add(table, "a.csv"))
        ),
        "safetensors": struct.pack("<Q", len(header)) + header + b"data",
        "zip": _zip([("a.txt", b"text"), ("data.pkl", b"\x80\x02}.")]),
        "gz": gzip.compress(b"text\n"),
        "PNG": b"\x89PNG\r\n\x1a\n" + bytes(99),
        "Parquet": written(lambda out: pyarrow.parquet.write_table(rows, out)),
        "Arrow": (records / "test-00000.arrow").read_bytes(),
        "pickle": b"\x80\x04\x95\x0a\x00\x00\x00\x00\x00\x00\x00]\x94(K\x01K\x02e.",
        "UTF-16": table.read_text().encode("utf-16"),
        "UTF-32": table.read_text().encode("utf-32"),
        "Latin-1": table.read_text().replace("é", "ü").encode("latin-1"),
        "JSON": b'[{"label": "a"}]',
        "HTML": b"<!DOCTYPE html><html>log in</html>",
        "git-lfs": b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 9\n",
    }


ROWS: tuple[tuple[str, str, Callable[[Tally], None]], ...] = (
    ("R6", "hostile manifests, records, zips and tables", corpus),
    ("R15", "foreign files and versions; the golden records", foreign),
)
