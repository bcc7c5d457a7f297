"""IDX pairs become the records that a CSV of the same rows becomes, or are refused by name."""

import gzip
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from engine.data import images
from engine.data import pack as packing
from engine.data.collect import Stored
from engine.data.pack import PackOptions, check, pack
from engine.data.records import open_records
from engine.data.split import draw_splits
from engine.errors import UserError
from tests.conftest import Command, assert_refused
from tests.glyph_files import content, glyphs, idx


@pytest.fixture
def small_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Blocks of a few images: 60 images take many."""
    monkeypatch.setattr(images, "BLOCK_BYTES", 7 * 64)


@pytest.mark.usefixtures("small_blocks")
@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("workers", [1, 3])
def test_a_pair_gives_the_records_of_its_csv(packed: bool, workers: int, tmp_path: Path) -> None:
    drawn = glyphs()
    pack(drawn.csv(tmp_path / "a.csv"), tmp_path / "wanted")
    pair = drawn.idx(tmp_path, packed=packed)
    report = pack(pair, tmp_path / "out", PackOptions(workers=workers))
    assert content(tmp_path / "out") == content(tmp_path / "wanted")
    assert report.found == [f"IDX, 60 images of 8 x 8 in {pair[0]}, their labels in {pair[1]}"]
    assert check(pair) == (60, [], [])


@pytest.mark.usefixtures("small_blocks")
def test_repeats_and_constant_images_are_counted_as_of_a_csv(tmp_path: Path) -> None:
    drawn = glyphs()
    drawn.image_NHW[3:6] = drawn.image_NHW[0]
    drawn.image_NHW[10] = 7
    wanted = pack(drawn.csv(tmp_path / "a.csv"), tmp_path / "wanted").manifest["source_rows"]
    assert wanted == {"rows": 60, "duplicates": 1, "under_several_labels": 2, "constant": 1}
    found = pack(drawn.idx(tmp_path), tmp_path / "out").manifest["source_rows"]
    assert found == wanted


def test_several_pairs_follow_each_other(tmp_path: Path) -> None:
    drawn, more = glyphs(), glyphs(num=12, seed=1)
    pairs = (*drawn.idx(tmp_path), *more.idx(tmp_path, "more", packed=True))
    pack(pairs, tmp_path / "out", PackOptions(split="none"))
    train = open_records(tmp_path / "out").split("train")
    assert np.array_equal(train.image_NHW, np.concatenate([drawn.image_NHW, more.image_NHW]))
    assert np.array_equal(train.label_N, np.concatenate([drawn.label_N, more.label_N]))


IMAGES, LABELS = idx(glyphs().image_NHW), idx(glyphs().label_N)
REFUSED: dict[str, tuple[bytes, bytes, str]] = {
    "empty": (b"", LABELS, "images: is no IDX file of images (it begins with nothing)"),
    "cut header": (IMAGES[:11], LABELS, "images: ends within its header"),
    "cut images": (IMAGES[:-1], LABELS, "images: has 3,855 bytes, want 3,856 for the 60 x 8 x 8"),
    "cut labels": (IMAGES, LABELS[:-1], "labels: has 67 bytes, want 68"),
    "trailing": (IMAGES + b"\n", LABELS, "images: has 3,857 bytes, want 3,856"),
    "trailing labels": (IMAGES, LABELS + b"\0\0", "labels: has 70 bytes, want 68"),
    "packed, cut": (gzip.compress(IMAGES[:-1]), LABELS, "images: ends before the 60 images"),
    "packed, more": (gzip.compress(IMAGES + b"x"), LABELS, "goes on behind the 60 images"),
    "packed labels, cut": (IMAGES, gzip.compress(LABELS[:-1]), "labels: ends before the 60 lab"),
    "packed labels, more": (IMAGES, gzip.compress(LABELS + b"x"), "goes on behind the 60 labels"),
    "cut gzip": (gzip.compress(IMAGES)[:-20], LABELS, "the compressed file ends too early"),
    "damaged gzip": (gzip.compress(IMAGES)[:-6] + bytes(6), LABELS, "compressed file is damaged"),
    "swapped": (LABELS, IMAGES, "images: is an IDX file of labels where images are expected"),
    "twice": (IMAGES, IMAGES, "labels: is an IDX file of images where labels are expected"),
    "vectors": (idx(np.zeros((60, 64), np.uint8)), LABELS, "of vectors where images are expected"),
    "colour": (idx(np.zeros((60, 8, 8, 3), np.uint8)), LABELS, "images of several colours where"),
    "floats": (idx(glyphs().image_NHW, kind=13), LABELS, "images of float32, want uint8 (0..255)"),
    "integers": (IMAGES, idx(glyphs().label_N, kind=12), "labels of int32, want uint8"),
    "counts": (IMAGES, idx(glyphs(59).label_N), "holds 59 labels, but"),
    "none": (idx(np.zeros((0, 8, 8), np.uint8)), idx(np.zeros(0, np.uint8)), "holds no images"),
    "oblong": (idx(np.zeros((60, 8, 9), np.uint8)), LABELS, "8 x 9 pixels, want square ones; pad"),
    "no pixels": (idx(np.zeros((60, 0, 0), np.uint8)), LABELS, "images of 0 x 0 pixels, want 1 x"),
    "huge": (IMAGES[:4] + b"\xff" * 12, LABELS, "images: has 16 bytes, want 79,228,162"),
    "a table": (IMAGES, b"label\n1\n", "labels: is no IDX file of labels (it begins with 6c 61"),
    "a picture": (IMAGES, b"\x89PNG\r\n\x1a\n" + bytes(50), "labels: is a PNG picture"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_is_refused_and_where(case: str, tmp_path: Path, command: Command) -> None:
    *contents, text = REFUSED[case]
    paths = [tmp_path / "images", tmp_path / "labels"]
    for path, data in zip(paths, contents, strict=True):
        path.write_bytes(data)
    done = command("tools/pack_tmnist", "--layout=idx", *paths, tmp_path / "out")
    assert_refused(done, text)
    assert sorted(os.listdir(tmp_path)) == ["images", "labels"]


def test_files_that_are_no_pairs(tmp_path: Path) -> None:
    pair = glyphs().idx(tmp_path)
    csv = glyphs().csv(tmp_path / "a.csv")
    for paths, text in (
        ([pair[0]], r"MNIST's binary format \(60 images of 8x8\); give pairs, images then labels"),
        ([*pair, pair[0]], "is the last of 3 IDX files; give pairs"),
        ([pair[0], csv], "a.csv: has the layout csv, but .*idx-images idx; pack files of one"),
        ([pair[0], tmp_path / "gone"], "gone: cannot be read"),
        ([*pair, *glyphs(side=9).idx(tmp_path, "other")], "9 x 9 pixels, but .* of 8 x 8; pack"),
    ):
        with pytest.raises(UserError, match=text):
            pack(paths, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_pair_that_changes_while_it_is_read(tmp_path: Path) -> None:
    def packs_while(change: Callable[[Path], object]) -> None:
        pair = glyphs().idx(tmp_path)
        with pytest.raises(UserError, match="changed while it was read"):
            pack(pair, tmp_path / "out", progress=lambda rows, part: change(pair[0]))

    packs_while(lambda path: os.utime(path, ns=(0, 0)))
    packs_while(lambda path: os.truncate(path, path.stat().st_size - 1))
    assert sorted(os.listdir(tmp_path)) == ["idx-images", "idx-labels"]


@pytest.mark.parametrize(("packed", "copies"), [(False, 1), (True, 2)])
def test_too_little_space_is_refused_before_the_first_byte(
    packed: bool, copies: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pair = glyphs().idx(tmp_path, packed=packed)
    free = copies * 60 * 64 - 1
    found = shutil._ntuple_diskusage(10**9, 10**9, free)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: found)
    with pytest.raises(UserError, match=f"has {free:,} bytes free, want {free + 1:,} for the rec"):
        pack(pair, tmp_path / "out")
    found = shutil._ntuple_diskusage(10**9, 10**9, free + 1)
    pack(pair, tmp_path / "out")


def test_a_pair_that_changes_between_the_passes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The second pass takes pixels from the file itself."""

    def packs_while(change: Callable[[Path], object]) -> None:
        pair = glyphs().idx(tmp_path)

        def draw(*args: Any) -> Any:
            change(pair[0])
            return draw_splits(*args)

        monkeypatch.setattr(packing, "draw_splits", draw)
        with pytest.raises(UserError, match="idx-images: changed while it was read"):
            pack(pair, tmp_path / "out")

    packs_while(lambda path: os.utime(path, ns=(0, 0)))
    packs_while(lambda path: os.truncate(path, path.stat().st_size - 1))
    assert sorted(os.listdir(tmp_path)) == ["idx-images", "idx-labels"]


def test_a_source_that_cannot_be_read_again_is_named(tmp_path: Path) -> None:
    """A folder stands for a disk that fails: the system refuses to read it."""
    handle = os.open(tmp_path, os.O_RDONLY)
    with pytest.raises(UserError, match="x: cannot be read"):
        Stored("x", handle, 0, 4).take(np.arange(2))
    os.close(handle)


@settings(max_examples=60, deadline=None)
@given(noise=st.binary(max_size=40), place=st.integers(0, 40), packed=st.booleans())
def test_a_damaged_header_is_refused_or_means_what_it_says(
    noise: bytes, place: int, packed: bool, tmp_path_factory: pytest.TempPathFactory
) -> None:
    """Bytes written over the beginning: one line, or as many rows as the file then declares."""
    folder = tmp_path_factory.mktemp("damaged")
    data = bytearray(IMAGES)
    data[place : place + len(noise)] = noise
    (folder / "images").write_bytes(gzip.compress(data, 1) if packed else data)
    (folder / "labels").write_bytes(LABELS)
    try:
        num_rows, faults, _ = check([folder / "images", folder / "labels"])
    except UserError as error:
        assert "\n" not in str(error)
    else:
        assert num_rows == 60 or faults
