"""The record files: others can read them, and damage of any kind is refused."""

import json
import os
import random
import shutil
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from engine import records as records_module
from engine.errors import UserError
from engine.publish import write_manifest
from engine.records import Records, Split, open_records, write_records


def test_pandas_and_polars_find_the_same_pixels(small_dir: Path, small: Records) -> None:
    file, train = small_dir / "train-00000.arrow", small.split("train")
    frame = pd.read_feather(file)
    assert np.array_equal(np.stack(frame["image"]).reshape(-1, 28, 28), train.image_NHW)
    assert list(frame["label"]) == [small.classes[i] for i in train.label_N]
    table = pytest.importorskip("polars").read_ipc(file)
    assert np.array_equal(table["image"].to_numpy().reshape(-1, 28, 28), train.image_NHW)
    assert table["font"].to_list() == [small.fonts[i] for i in train.font_N]


def test_a_split_may_span_files(tmp_path: Path, small: Records, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(records_module, "FILE_LIMIT_BYTES", 50_000)
    write_records(tmp_path / "out", small.splits, classes=small.classes, fonts=small.fonts, options={})
    assert len(list((tmp_path / "out").glob("train-*.arrow"))) > 3
    again = open_records(tmp_path / "out")
    for name, split in small.splits.items():
        assert np.array_equal(again.split(name).image_NHW, split.image_NHW)
        assert np.array_equal(again.split(name).font_N, split.font_N)


def test_every_flipped_bit_is_refused(small_dir: Path, tmp_path: Path) -> None:
    """200 random bits over all files, and each byte of the manifest's first and last 40 and of its hash."""
    copy = tmp_path / "copy"
    shutil.copytree(small_dir, copy)
    rng = random.Random(0)
    files = sorted(copy.iterdir())
    places = [(file, rng.randrange(file.stat().st_size)) for file in rng.choices(files, k=200)]
    for name in ("manifest.json", "manifest.sha256"):
        size = (copy / name).stat().st_size
        places += [(copy / name, i) for i in [*range(min(40, size)), *range(max(0, size - 40), size)]]
    for file, place in places:
        data = file.read_bytes()
        bit = 1 << rng.randrange(8)
        file.write_bytes(data[:place] + bytes([data[place] ^ bit]) + data[place + 1 :])
        if file.read_bytes().strip() == data.strip():
            continue  # the hash file's final newline carries nothing
        with pytest.raises(UserError, match="pack the CSV again"):
            open_records(copy)
        file.write_bytes(data)
    open_records(copy)


@pytest.mark.parametrize("fault", ["cut", "longer", "gone", "extra", "swapped", "no manifest", "no hash", "link"])
def test_other_damage_is_refused(fault: str, small_dir: Path, tmp_path: Path) -> None:
    copy = tmp_path / "copy"
    shutil.copytree(small_dir, copy)
    val, test = copy / "val-00000.arrow", copy / "test-00000.arrow"
    data = val.read_bytes()
    if fault == "cut":
        val.write_bytes(data[:-1])
    if fault == "longer":
        val.write_bytes(data + b"\0")
    if fault == "gone":
        val.unlink()
    if fault == "extra":
        (copy / "notes.txt").write_text("")
    if fault == "swapped":
        val.write_bytes(test.read_bytes())
        test.write_bytes(data)
    if fault == "no manifest":
        (copy / "manifest.json").unlink()
    if fault == "no hash":
        (copy / "manifest.sha256").unlink()
    if fault == "link":
        shutil.move(val, tmp_path / "elsewhere")
        os.symlink(tmp_path / "elsewhere", val)
    with pytest.raises(UserError, match="copy: (damaged|incomplete)"):
        open_records(copy)


@pytest.mark.parametrize(
    ("key", "value", "text"),
    [
        ("version", 2, "this engine reads"),
        ("format", "something", "this engine reads"),
        ("fingerprint", "0" * 64, "fingerprint"),
        ("splits", None, "malformed"),
        ("height", 10**9, "fingerprint"),
    ],
)
def test_a_consistent_but_foreign_manifest_is_refused(
    key: str, value: object, text: str, small_dir: Path, tmp_path: Path
) -> None:
    copy = tmp_path / "copy"
    shutil.copytree(small_dir, copy)
    manifest = json.loads((copy / "manifest.json").read_text())
    write_manifest(copy, manifest | {key: value})
    with pytest.raises(UserError, match=text):
        open_records(copy)


def test_a_file_name_cannot_lead_out_of_the_directory(small_dir: Path, tmp_path: Path) -> None:
    copy = tmp_path / "copy"
    shutil.copytree(small_dir, copy)
    manifest = json.loads((copy / "manifest.json").read_text())
    manifest["splits"]["val"]["files"][0]["name"] = "../val-00000.arrow"
    write_manifest(copy, manifest)
    with pytest.raises(UserError, match="leads out"):
        open_records(copy)


def test_a_missing_directory_or_split_is_named(tmp_path: Path, small: Records) -> None:
    with pytest.raises(UserError, match="no such record directory"):
        open_records(tmp_path / "nothing")
    with pytest.raises(UserError, match="has no holdout split"):
        small.split("holdout")


def test_a_full_disk_keeps_what_was_there(small: Records, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def options(seed: int) -> dict[str, object]:
        return {"splits": small.splits, "classes": small.classes, "fonts": small.fonts, "options": {"seed": seed}}

    write_records(tmp_path / "out", **options(1))  # type: ignore[arg-type]
    before = open_records(tmp_path / "out").fingerprint
    written = Path.write_bytes

    def fails(self: Path, data: bytes) -> int:
        if self.name.startswith("val"):
            raise OSError(28, "No space left on device")
        return written(self, data)

    monkeypatch.setattr(Path, "write_bytes", fails)
    with pytest.raises(OSError, match="No space"):
        write_records(tmp_path / "out", **options(2))  # type: ignore[arg-type]
    assert open_records(tmp_path / "out").fingerprint == before
    assert [p.name for p in tmp_path.iterdir()] == ["out"]


def test_a_failed_last_rename_brings_the_old_back(
    small: Records, small_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shutil.copytree(small_dir, tmp_path / "out")
    rename = os.rename

    def fails(source: Path, target: Path) -> None:
        if ".out.tmp-" in str(source):
            raise OSError(5, "Input/output error")
        rename(source, target)

    monkeypatch.setattr(os, "rename", fails)
    with pytest.raises(OSError, match="Input/output"):
        write_records(tmp_path / "out", small.splits, classes=small.classes, fonts=small.fonts, options={})
    assert open_records(tmp_path / "out").fingerprint == small.fingerprint
    assert [p.name for p in tmp_path.iterdir()] == ["out"]


def test_a_split_of_wrong_arrays_cannot_be_built() -> None:
    image = np.zeros((2, 4, 4), np.uint8)
    with pytest.raises(AssertionError):
        Split(image_NHW=image, label_N=np.zeros(3, np.uint8), font_N=np.zeros(2, np.int32))
