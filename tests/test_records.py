"""The record files: others can read them, and damage of any kind is refused."""

import ctypes
import hashlib
import json
import os
import random
import shutil
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import duckdb
import numpy as np
import pandas as pd
import polars
import pyarrow as pa
import pytest
from hypothesis import given
from hypothesis import strategies as some

from engine import durable
from engine.data import record_file
from engine.data import records as records_module
from engine.data.pack import PackOptions, pack
from engine.data.records import Records, Split, open_records, verify_records
from engine.durable import Damaged, parse_json, write_manifest
from engine.errors import UserError
from tests.conftest import write_csv


def test_pandas_polars_and_duckdb_find_the_same_pixels(small_dir: Path, small: Records) -> None:
    file, train = small_dir / "train-00000.arrow", small.split("train")
    labels, fonts = (
        [small.classes[i] for i in train.label_N],
        [small.fonts[i] for i in train.font_N],
    )
    frame = pd.read_feather(file)
    assert np.array_equal(np.stack(frame["image"]).reshape(-1, 28, 28), train.image_NHW)
    assert list(frame["label"]) == labels and list(frame["font"]) == fonts
    table = polars.read_ipc(file)
    assert np.array_equal(table["image"].to_numpy().reshape(-1, 28, 28), train.image_NHW)
    assert table["label"].to_list() == labels and table["font"].to_list() == fonts
    arrow = pa.ipc.open_file(file).read_all()
    arrow.validate(full=True)
    assert (
        arrow.schema.metadata == {b"height": b"28", b"width": b"28"}
        and arrow.column("image").num_chunks == 1
    )
    rows = duckdb.sql("select label, font, list_sum(image::INT[]) as ink from arrow").fetchall()
    assert rows == list(zip(labels, fonts, train.image_NHW.sum((1, 2)), strict=True))


@pytest.fixture
def in_many_files(small_csv: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(records_module, "FILE_LIMIT_BYTES", 2**16 + 50_000)
    pack(small_csv, tmp_path / "many")
    assert len(list((tmp_path / "many").glob("train-*.arrow"))) > 3
    assert all(file.stat().st_size < 2**16 + 50_000 for file in (tmp_path / "many").iterdir())
    return tmp_path / "many"


@pytest.mark.parametrize("in_memory", [True, False])
def test_a_split_may_span_files(in_many_files: Path, in_memory: bool, small: Records) -> None:
    again = open_records(in_many_files, in_memory=in_memory)
    assert list(again.splits) == ["train", "val", "test"] and again.fingerprint != small.fingerprint
    for name, split in small.splits.items():
        assert np.array_equal(again.split(name).image_NHW[:], split.image_NHW)
        assert np.array_equal(again.split(name).label_N, split.label_N)
        assert np.array_equal(again.split(name).font_N, split.font_N)


def test_images_on_disk_are_indexed_like_an_array(
    small_csv: Path, small: Records, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(record_file, "BLOCK_BYTES", 5_000)  # rows lie across blocks
    pack(small_csv, tmp_path / "out")
    stored = open_records(tmp_path / "out", in_memory=False).split("train")
    image_NHW, wanted = stored.image_NHW, small.split("train").image_NHW
    assert (image_NHW.shape, image_NHW.dtype, len(image_NHW)) == (
        wanted.shape,
        wanted.dtype,
        len(wanted),
    )
    rng = np.random.default_rng(0)
    for rows in (
        slice(3, 150),
        slice(200, 20, -7),
        rng.integers(0, len(wanted), 99),
        np.arange(0),
        7,
        np.int64(9),
    ):
        assert np.array_equal(image_NHW[rows], wanted[rows])
    assert np.array_equal(stored.take(np.array([5, 2])).image_NHW, wanted[[5, 2]])
    with pytest.raises(IndexError):
        image_NHW[np.array([len(wanted)])]
    with pytest.raises(IndexError):
        image_NHW[np.array([-1])]


def test_images_on_disk_are_verified_when_they_are_read(tmp_path: Path) -> None:
    """Blocks of labels and fonts are read at opening, those of pixels when asked for."""
    rows = [
        ["F", "a", *(str((i + j) % 256) for j in range(1024))] for i in range(3000)
    ]  # 3 MB, three blocks
    pack(write_csv(tmp_path / "in.csv", rows, side=32), tmp_path / "out", PackOptions(split="none"))
    images = open_records(tmp_path / "out", in_memory=False).split("train").image_NHW
    with open(tmp_path / "out" / "train-00000.arrow", "r+b") as file:
        file.seek(2**20 + 12345)
        file.write(b"\xff\xfe")
    assert images[10:20][1, 0, :3].tolist() == [11, 12, 13]
    with pytest.raises(UserError, match="train-00000.arrow: the block at byte 1048576 has CRC32"):
        images[1000:1100]
    open_records(tmp_path / "out", in_memory=False)
    for refuses in (open_records, verify_records):
        with pytest.raises(UserError, match="damaged: train-00000.arrow"):
            refuses(tmp_path / "out")
    images = open_records(tmp_path / "out", in_memory=False).split("train").image_NHW
    os.truncate(tmp_path / "out" / "train-00000.arrow", 2**20)
    with pytest.raises(UserError, match="ended while it was read"):
        images[2000:]


def test_a_replaced_directory_is_read_as_it_was(
    small_csv: Path, small: Records, tmp_path: Path
) -> None:
    pack(small_csv, tmp_path / "out")
    images = open_records(tmp_path / "out", in_memory=False).split("train").image_NHW
    pack(small_csv, tmp_path / "out", PackOptions(seed=7, force=True))
    assert np.array_equal(images[:], small.split("train").image_NHW)
    assert not np.array_equal(open_records(tmp_path / "out").split("train").image_NHW, images[:])


def test_every_flipped_bit_is_refused(small_dir: Path, tmp_path: Path) -> None:
    """200 random bits of all files; the manifest's first and last 40 bytes, and its hash."""
    copy = tmp_path / "copy"
    shutil.copytree(small_dir, copy)
    rng = random.Random(0)
    files = sorted(copy.iterdir())
    places = [(file, rng.randrange(file.stat().st_size)) for file in rng.choices(files, k=200)]
    for name in ("manifest.json", "manifest.sha256"):
        size = (copy / name).stat().st_size
        places += [
            (copy / name, i) for i in [*range(min(40, size)), *range(max(0, size - 40), size)]
        ]
    for file, place in places:
        data = file.read_bytes()
        bit = 1 << rng.randrange(8)
        file.write_bytes(data[:place] + bytes([data[place] ^ bit]) + data[place + 1 :])
        with pytest.raises(UserError, match="pack the CSV again"):
            open_records(copy)
        file.write_bytes(data)
    open_records(copy)


@pytest.mark.parametrize(
    "fault", ["cut", "longer", "gone", "extra", "swapped", "no manifest", "no hash"]
)
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
    with pytest.raises(UserError, match="copy: (damaged|incomplete|notes.txt is not listed)"):
        open_records(copy)


def test_what_others_put_there_is_refused_with_what_to_do(small_dir: Path, tmp_path: Path) -> None:
    copy = tmp_path / "copy"
    shutil.copytree(small_dir, copy)
    for name, text in {
        ".DS_Store": "macOS has left it there; delete it",
        "._val-00000.arrow": "macOS has left it there; delete it",
        "Thumbs.db": "Windows has left it there; delete it",
        "desktop.ini": "delete it",
        ".nfs0000000001": "end that process",
        ".ipynb_checkpoints": "delete it",
        "notes~": "an editor has left it there; delete it",
        ".gitkeep": "it is git's; move it to the folder above",
        "notes.txt": "move it away",
    }.items():
        (copy / name).write_text("")
        with pytest.raises(UserError) as refused:
            open_records(copy)
        assert f"copy: {name} is not listed in manifest.json; " in str(refused.value)
        assert text in str(refused.value) and "pack" not in str(refused.value)
        (copy / name).unlink()
    open_records(copy)


def test_links_to_the_right_bytes_are_followed(
    small_dir: Path, small: Records, tmp_path: Path
) -> None:
    """As dvc, git-annex, nix and the cache of Hugging Face lay out a directory."""
    linked = tmp_path / "linked"
    linked.mkdir()
    for file in small_dir.iterdir():
        (linked / file.name).symlink_to(file)
    assert open_records(linked).fingerprint == small.fingerprint
    assert verify_records(linked)["fingerprint"] == small.fingerprint
    os.mkfifo(tmp_path / "fifo")
    for target, text in (
        (tmp_path / "gone", "is a link to .*gone, which is gone; fetch the file"),
        (linked / "fonts.json", "is a link that leads in a circle"),
        (tmp_path / "fifo", "fonts.json is not a regular file"),
        (Path("/dev/zero"), "fonts.json is not a regular file"),
        (Path("/etc/passwd"), "fonts.json has not the SHA-256"),
    ):
        (linked / "fonts.json").unlink()
        (linked / "fonts.json").symlink_to(target)
        with pytest.raises(UserError, match=text):
            open_records(linked)


def test_a_pointer_of_git_lfs_is_named(small_dir: Path, tmp_path: Path) -> None:
    pointer = "version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 9\n"
    for name in ("manifest.json", "fonts.json", "val-00000.arrow"):
        shutil.copytree(small_dir, tmp_path / name)
        (tmp_path / name / name).write_text(pointer)
        with pytest.raises(UserError, match=f"{name} is a pointer of git-lfs; run git lfs pull"):
            open_records(tmp_path / name)


def first_file(manifest: dict[str, Any]) -> dict[str, Any]:
    entry: dict[str, Any] = manifest["splits"]["val"]["files"][0]
    return entry


FOREIGN: dict[str, tuple[Callable[[dict[str, Any]], object], str]] = {
    "version": (lambda m: m.update(version=1), "this engine reads"),
    "format": (lambda m: m.update(format="mds"), "is of a 'mds', not of a"),
    "fingerprint": (lambda m: m.update(fingerprint="0" * 64), "fingerprint does not belong"),
    "no splits": (lambda m: m.update(splits=None), "malformed"),
    "no train": (lambda m: m["splits"].pop("train"), "want train"),
    "other split": (lambda m: m["splits"].update(holdout=m["splits"].pop("val")), "want train"),
    "height": (lambda m: m.update(height=10**9), "pixels cannot be"),
    "height 0": (lambda m: m.update(height=0), "pixels cannot be"),
    "a class twice": (lambda m: m["classes"].__setitem__(0, m["classes"][1]), "different texts"),
    "no class": (lambda m: m.update(classes=[]), "different texts"),
    "a number as class": (lambda m: m["classes"].__setitem__(0, 1), "different texts"),
    "surrogate": (lambda m: m["classes"].__setitem__(0, "\ud800"), "malformed"),
    "extra key": (lambda m: first_file(m).update(more=1), "malformed"),
    "up": (lambda m: first_file(m).update(name="../val-00000.arrow"), "leads out"),
    "absolute": (lambda m: first_file(m).update(name="/etc/passwd"), "leads out"),
    "other split's": (lambda m: first_file(m).update(name="test-00000.arrow"), "none of split val"),
    "rows": (lambda m: first_file(m).update(rows=10**15), "overlap or do not fit"),
    "too few rows": (
        lambda m: first_file(m).update(rows=first_file(m)["rows"] - 1),
        "do not add up",
    ),
    "negative": (lambda m: first_file(m).update(image_offset=-8), "not numbers from 0 on"),
    "float": (lambda m: first_file(m).update(bytes=1e6), "not numbers from 0 on"),
    "true": (lambda m: first_file(m).update(rows=True), "not numbers from 0 on"),
    "overlap": (
        lambda m: first_file(m).update(label_offset=first_file(m)["image_offset"] + 8),
        "overlap",
    ),
    "past the end": (
        lambda m: first_file(m).update(font_offset=first_file(m)["bytes"] - 8),
        "do not fit",
    ),
    "size": (lambda m: first_file(m).update(bytes=first_file(m)["bytes"] + 1), "bytes, want"),
    "no checksum": (lambda m: first_file(m).update(crc32=[]), "has 0 checksums"),
    "checksum": (lambda m: first_file(m)["crc32"].__setitem__(0, 0), "want 00000000"),
    "fonts": (lambda m: m["fonts"].update(bytes=1), "fonts.json has not the SHA-256"),
    "mean": (lambda m: m["train_pixels"].update(mean="x"), "malformed"),
    "nan": (lambda m: m["train_pixels"].update(std="nan"), "pixels cannot have a mean of"),
    "infinite": (lambda m: m["train_pixels"].update(std="inf"), "pixels cannot have a mean of"),
    "twice": (
        lambda m: m["splits"]["val"].update(files=2 * m["splits"]["val"]["files"], rows=96),
        "listed twice",
    ),
}


@pytest.mark.parametrize("case", FOREIGN)
def test_a_manifest_that_is_whole_but_lies_is_refused(
    case: str, small_dir: Path, tmp_path: Path
) -> None:
    """Signed anew, so that only the check in question can refuse it."""
    change, text = FOREIGN[case]
    copy = tmp_path / "copy"
    shutil.copytree(small_dir, copy)
    manifest = json.loads((copy / "manifest.json").read_text())
    change(manifest)
    if case != "fingerprint" and isinstance(manifest["splits"], dict):
        manifest["fingerprint"] = records_module._fingerprint(manifest)
    data = json.dumps(manifest).encode()
    (copy / "manifest.json").write_bytes(data)
    (copy / "manifest.sha256").write_text(hashlib.sha256(data).hexdigest() + "\n")
    for in_memory in (True, False):
        with pytest.raises(UserError, match=text):
            open_records(copy, in_memory=in_memory)


@pytest.mark.parametrize(
    ("data", "text"),
    [
        (b'{"a": 1, "a": 2}', "a key occurs twice"),
        (b"[" * 100_000, "is not JSON"),
        (b"[1]", "is not a JSON object"),
        (b"\xff", "is not JSON"),
        (b"{" + b" " * 2**20 + b"}", "is larger than"),
    ],
)
def test_what_is_no_manifest(data: bytes, text: str, tmp_path: Path) -> None:
    (tmp_path / "manifest.json").write_bytes(data)
    (tmp_path / "manifest.sha256").write_text(hashlib.sha256(data).hexdigest() + "\n")
    with pytest.raises(UserError, match=text):
        open_records(tmp_path)


HOLE = "@hole@"
leaves = some.none() | some.booleans() | some.integers() | some.text()
leaves |= some.floats(allow_nan=False, allow_infinity=False)
trees = some.recursive(
    leaves, lambda inner: some.lists(inner) | some.dictionaries(some.text(), inner)
)
with_a_hole = some.recursive(
    some.just(HOLE),
    lambda inner: (
        some.builds(lambda items, hole: [*items, hole], some.lists(trees, max_size=3), inner)
        | some.dictionaries(some.text(), inner, min_size=1, max_size=1)
    ),
)


@given(trees)
def test_strict_json_takes_what_json_can_say(tree: Any) -> None:
    assert parse_json(json.dumps(tree).encode(), "x") == tree


@given(with_a_hole, some.sampled_from(["NaN", "-Infinity", '{"a": 1, "a": 1}', "01", "'a'", "1 2"]))
def test_strict_json_refuses_what_is_none_wherever_it_stands(tree: Any, wrong: str) -> None:
    with pytest.raises(Damaged, match="x is not JSON"):
        parse_json(json.dumps(tree).replace(json.dumps(HOLE), wrong, 1).encode(), "x")


@given(some.binary())
def test_strict_json_raises_nothing_else_whatever_the_bytes(data: bytes) -> None:
    with suppress(Damaged):
        parse_json(data, "x")


def test_a_label_outside_the_table_is_refused(small_dir: Path, tmp_path: Path) -> None:
    copy = tmp_path / "copy"
    shutil.copytree(small_dir, copy)
    manifest = json.loads((copy / "manifest.json").read_text())
    manifest["classes"].pop()
    manifest["fingerprint"] = records_module._fingerprint(manifest)
    write_manifest(copy, manifest)
    with pytest.raises(UserError, match="index lies outside its table"):
        open_records(copy)


def test_a_missing_directory_or_split_is_named(tmp_path: Path, small: Records) -> None:
    with pytest.raises(UserError, match="no such record directory"):
        open_records(tmp_path / "nothing")
    with pytest.raises(UserError, match="there is no split 'holdout'; choose one of train, val"):
        small.split("holdout")
    file = tmp_path / "a.csv"
    file.touch()
    with pytest.raises(UserError, match="is a file, want a record directory; make one of it: tool"):
        open_records(file)


@pytest.mark.parametrize(
    ("number", "text"), [(5, "Input/output"), (22, "cannot exchange two names")]
)
def test_a_failed_exchange_keeps_the_old(
    number: int,
    text: str,
    small_csv: Path,
    small: Records,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    pack(small_csv, tmp_path / "out")

    def refuses(*_: object) -> int:
        ctypes.set_errno(number)
        return -1

    monkeypatch.setattr(durable, "_LIBC", SimpleNamespace(renameat2=refuses))
    with pytest.raises(UserError, match=text):
        pack(small_csv, tmp_path / "out", PackOptions(seed=1, force=True))
    assert open_records(tmp_path / "out").fingerprint == small.fingerprint
    assert os.listdir(tmp_path) == ["out"]


def test_publishing_leaves_the_umask_of_the_process_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two threads that set it and set it back could leave every later file open to all."""
    before = os.umask(0o027)
    try:
        monkeypatch.setattr(
            os, "umask", lambda mask: pytest.fail("the umask belongs to the whole process")
        )
        durable.write_file(tmp_path / "file", b"x")
        with durable.publish_directory(tmp_path / "folder") as folder:
            (folder / "file").write_bytes(b"x")
    finally:
        monkeypatch.undo()
        os.umask(before)
    modes = [(tmp_path / name).stat().st_mode & 0o777 for name in ("file", "folder", "folder/file")]
    assert modes == [0o640, 0o750, 0o640]


def test_a_split_of_wrong_arrays_cannot_be_built() -> None:
    image = np.zeros((2, 4, 4), np.uint8)
    with pytest.raises(AssertionError):
        Split(image_NHW=image, label_N=np.zeros(3, np.uint8), font_N=np.zeros(2, np.int32))
