"""CSV -> records: right on good input, and nothing published on bad."""

import csv
import gzip
import os
import signal
import subprocess
import sys
import time
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from engine.errors import UserError
from engine.pack import pack
from engine.records import open_records
from engine.report import ROOT
from engine.split import draw_splits, family
from tests.conftest import CLASSES, NUM_FONTS, Command, assert_refused, glyph_rows, write_csv


def test_pixels_labels_and_fonts_arrive_unchanged(small_csv: Path, tmp_path: Path) -> None:
    pack(small_csv, tmp_path / "out", mode="none")
    records = open_records(tmp_path / "out")
    with open(small_csv, newline="", encoding="utf-8") as file:
        rows = list(csv.reader(file))[1:]
    train = records.split("train")
    assert list(records.splits) == ["train"]
    assert [records.fonts[i] for i in train.font_N] == [row[0] for row in rows]
    assert [records.classes[i] for i in train.label_N] == [row[1] for row in rows]
    wanted = np.array([[float(v) for v in row[2:]] for row in rows]).reshape(-1, 28, 28)
    assert np.array_equal(train.image_NHW, wanted)
    assert records.pixel_mean == pytest.approx(wanted.mean()) and records.pixel_std == pytest.approx(wanted.std())
    assert records.classes == tuple(sorted(CLASSES))


def test_every_container_and_spelling_gives_the_same_records(small_csv: Path, tmp_path: Path) -> None:
    text = small_csv.read_bytes()
    variants = {
        "gz": gzip.compress(text),
        "int": text.replace(b".0,", b",").replace(b".0\n", b"\n"),
        "zeros": text.replace(b".0,", b".000,"),
        "crlf": text.replace(b"\n", b"\r\n"),
        "bom": b"\xef\xbb\xbf" + text,
        "no_end": text[:-1],
    }
    with zipfile.ZipFile(tmp_path / "kaggle.zip", "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("94_character_TMNIST.csv", text)
    variants["zip"] = (tmp_path / "kaggle.zip").read_bytes()
    fingerprints = {pack(small_csv, tmp_path / "plain").manifest["fingerprint"]}
    for name, data in variants.items():
        (tmp_path / name).write_bytes(data)
        fingerprints.add(pack(tmp_path / name, tmp_path / f"{name}_out").manifest["fingerprint"])
    assert len(fingerprints) == 1
    files = [{f.name: f.read_bytes() for f in (tmp_path / d).iterdir()} for d in ("plain", "zip_out")]
    assert files[0] == files[1]


def draw(label_N: np.ndarray, mode: str = "random", **options: Any) -> dict[str, np.ndarray]:
    font_N = np.zeros(len(label_N), np.int32)
    options = {"balance": False, "seed": 1} | options
    return draw_splits(label_N, font_N, ("a", "b", "c"), ("Font",), mode=mode, **options)


def test_the_split_is_stratified_disjoint_and_whole() -> None:
    label_N = np.random.default_rng(0).permutation(np.repeat(np.arange(3, dtype=np.uint8), [100, 40, 20]))
    rows = draw(label_N)
    counts = {name: np.bincount(label_N[row_M]).tolist() for name, row_M in rows.items()}
    assert counts == {"train": [70, 28, 14], "val": [15, 6, 3], "test": [15, 6, 3]}
    assert np.array_equal(np.sort(np.concatenate(list(rows.values()))), np.arange(160))
    assert not np.array_equal(rows["val"], draw(label_N, seed=2)["val"])
    balanced = draw(label_N, balance=True)
    assert np.bincount(label_N[np.concatenate(list(balanced.values()))]).tolist() == [20, 20, 20]
    assert np.bincount(label_N[draw(label_N, "none", balance=True)["train"]]).tolist() == [20, 20, 20]


@pytest.mark.parametrize(
    ("font", "wanted"),
    [
        ("RedHatDisplay-Italic[wght]", "redhatdisplay"),
        ("RobotoSerif_Condensed-Light", "robotoserif"),
        ("IBMPlexSansCondensed-SemiBold", "ibmplexsans"),
        ("antpoltcond-bold", "antpolt"),
        ("Courier Prime Bold", "courier"),
        ("ffmr10", "ffmr"),
        ("Black-Regular", "black"),
        ("-x", "-x"),
    ],
)
def test_a_file_name_tells_the_family(font: str, wanted: str) -> None:
    assert family(font) == wanted


def test_a_font_split_keeps_families_together() -> None:
    rng = np.random.default_rng(1)
    fonts = tuple(
        f"Family{'abcdefghijklmnopqrstuvwxyz'[i // 3]}-{('Bold', 'Light', 'Italic')[i % 3]}" for i in range(78)
    )
    font_N = rng.integers(0, 78, 5000).astype(np.int32)
    label_N = rng.integers(0, 3, 5000).astype(np.uint8)
    rows = draw_splits(label_N, font_N, ("a", "b", "c"), fonts, mode="font", balance=False, seed=1)
    assert np.array_equal(np.sort(np.concatenate(list(rows.values()))), np.arange(5000))
    families = {name: {family(fonts[i]) for i in font_N[row_M]} for name, row_M in rows.items()}
    assert not families["train"] & families["val"] and not families["test"] & (families["train"] | families["val"])
    assert all(500 <= len(rows[name]) <= 750 for name in ("val", "test"))
    with pytest.raises(UserError, match="of 2 typeface families, want at least 3"):
        draw_splits(label_N, font_N % 6, ("a", "b", "c"), fonts[:6], mode="font", balance=False, seed=1)
    with pytest.raises(UserError, match="too large to leave one for val"):
        draw_splits(label_N, font_N % 9, ("a", "b", "c"), fonts[:9], mode="font", balance=False, seed=1)


@pytest.mark.parametrize("fault", ["pixel", "fields", "quote", "utf8", "break"])
def test_a_bad_row_is_named_and_nothing_is_published(fault: str, tmp_path: Path) -> None:
    rows = glyph_rows()
    if fault == "pixel":
        rows[5][2 + 99] = "256"
    if fault == "fields":
        rows[5].append("0")
    if fault == "break":
        rows[5][0] = "two\nlines"
    source = write_csv(tmp_path / "bad.csv", rows)
    lines = source.read_bytes().splitlines(keepends=True)
    if fault == "quote":
        lines[6] = b'"x"y' + lines[6]
    if fault == "utf8":
        lines[6] = b"\xe9" + lines[6]
    source.write_bytes(b"".join(lines))
    with pytest.raises(UserError) as refused:
        pack(source, tmp_path / "out")
    wanted = {
        "pixel": "bad.csv:7 (row 6, column 102 '100'): got '256', want an integer 0..255",
        "fields": "bad.csv:7 (row 6): got 787 fields, want 786",
        "quote": "bad.csv:7 (row 5): is not CSV",
        "utf8": "is not UTF-8",
        "break": "bad.csv:7 (row 5): has a line break inside quotes",
    }[fault]
    assert wanted in str(refused.value)
    assert sorted(os.listdir(tmp_path)) == ["bad.csv"]


@pytest.mark.parametrize(
    "pixel",
    ["-1", "300", "12.5", "nan", "1e2", " 5", "5 ", "0x1F", "1_0", "+5", "5.", ".5", "007", "１２", "١", "", "-0.0"],
)
def test_what_float_parsers_take_is_refused(pixel: str, tmp_path: Path) -> None:
    rows = glyph_rows()[:3]
    rows[1][2] = pixel
    with pytest.raises(UserError, match=r"row 2, column 3 '1'\): got .* want an integer 0..255"):
        pack(write_csv(tmp_path / "bad.csv", rows), tmp_path / "out", mode="none")


@pytest.mark.parametrize(
    ("content", "remedy"),
    [
        (b"", "is empty"),
        (b"names,labels,1,2,3,4\n", "has no data rows"),
        (b"<!DOCTYPE html>\n<html>", "log in and download again"),
        (b"version https://git-lfs.github.com/spec/v1\n", "git lfs pull"),
        (b"labels,names,1,2,3,4\n", "want names,labels"),
        (b"names,labels,1,2,3\n", "want names,labels"),
        (b"\x1f\x8b\x08\x00", "ends too early"),
        (gzip.compress(b"names,labels,1\n" + os.urandom(99999))[:-50000], "ends too early"),
        (b"PK\x03\x04rest", "cannot be read"),
    ],
)
def test_files_that_are_no_tmnist_csv(content: bytes, remedy: str, tmp_path: Path) -> None:
    (tmp_path / "in.csv").write_bytes(content)
    with pytest.raises(UserError, match="in.csv") as refused:
        pack(tmp_path / "in.csv", tmp_path / "out")
    assert remedy in str(refused.value) or "UTF-8" in str(refused.value)
    assert not (tmp_path / "out").exists()


def test_too_many_or_too_few(tmp_path: Path) -> None:
    many = [[f"f{i}", f"label {i}", *["0"] * 4] for i in range(257)]
    with pytest.raises(UserError, match="are names and labels swapped"):
        pack(write_csv(tmp_path / "many.csv", many, side=2), tmp_path / "out", mode="none")
    pack(write_csv(tmp_path / "edge.csv", many[:256], side=2), tmp_path / "edge", mode="none")
    assert open_records(tmp_path / "edge").split("train").label_N.max() == 255
    with pytest.raises(UserError, match="the class 'label 0' has 1 rows, want at least 3 to split"):
        pack(tmp_path / "edge.csv", tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_an_existing_target_is_kept_unless_forced(small_csv: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    before = pack(small_csv, out, seed=1).manifest["fingerprint"]
    with pytest.raises(UserError, match="give --force"):
        pack(small_csv, out, seed=2)
    assert open_records(out).fingerprint == before
    assert pack(small_csv, out, seed=2, force=True).manifest["fingerprint"] == open_records(out).fingerprint != before
    (tmp_path / "precious").mkdir()
    (tmp_path / "precious" / "thesis.txt").write_text("x")
    with pytest.raises(UserError, match="no record directory"):
        pack(small_csv, tmp_path / "precious", force=True)
    assert (tmp_path / "precious" / "thesis.txt").exists()
    assert {p.name for p in tmp_path.iterdir()} == {"out", "precious", ".out.lock"}


def test_a_killed_packer_leaves_nothing_that_opens(small_csv: Path, tmp_path: Path) -> None:
    """Real SIGKILLs spread over the packer's whole life; before publishing there is nothing, after it everything."""
    code = (
        "import sys, pathlib; from engine.pack import pack; print(flush=True); pack(*map(pathlib.Path, sys.argv[1:]))"
    )

    def start(out: Path) -> "subprocess.Popen[bytes]":
        child = subprocess.Popen([sys.executable, "-c", code, small_csv, out], cwd=ROOT, stdout=subprocess.PIPE)
        assert child.stdout
        child.stdout.readline()
        return child

    child, began = start(tmp_path / "undisturbed"), time.perf_counter()
    assert child.wait() == 0
    whole_s = time.perf_counter() - began
    wanted = open_records(tmp_path / "undisturbed").fingerprint
    for attempt in range(12):
        out = tmp_path / f"out{attempt}"
        child = start(out)
        time.sleep(min(attempt, 10) / 10 * whole_s)
        while attempt == 11 and not out.exists():  # the last is killed when it has published
            assert child.poll() is None or out.exists()
        child.send_signal(signal.SIGKILL)
        child.wait()
        if out.exists():
            assert open_records(out).fingerprint == wanted
        else:
            assert pack(small_csv, out).manifest["fingerprint"] == wanted


def test_the_command_by_path_and_as_a_module(small_csv: Path, tmp_path: Path, command: Command) -> None:
    by_path = command("tools/pack_tmnist", small_csv, tmp_path / "a")
    assert by_path.returncode == 0, by_path.stderr
    assert f"{NUM_FONTS * len(CLASSES)} rows read" in by_path.stdout and "fingerprint" in by_path.stdout
    module = command("python", "-m", "tools.pack_tmnist", small_csv, tmp_path / "b", "--split=none", "--balance")
    assert module.returncode == 0 and "train" in module.stdout and "val" not in module.stdout
    assert_refused(command("tools/pack_tmnist", "nowhere.csv", tmp_path / "c"), "nowhere.csv", "cannot be read")
    assert_refused(command("tools/pack_tmnist", "/dev/zero", tmp_path / "c"), "not a regular file")
    assert_refused(command("tools/pack_tmnist", small_csv, tmp_path / "a"), "--force")
