"""An .npz becomes the records that a CSV of the same rows becomes, or is refused by name."""

import io
import os
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from engine.data import images
from engine.data.pack import PackOptions, check, pack
from engine.data.records import open_records
from engine.errors import UserError
from tests.conftest import Command, assert_refused
from tests.glyph_files import Glyphs, content, glyphs

DRAWN = glyphs()
IMAGES, LABELS = DRAWN.image_NHW, DRAWN.label_N


def npz(**arrays: Any) -> bytes:
    out = io.BytesIO()
    np.savez(out, **arrays)
    return out.getvalue()


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("labels", [LABELS, LABELS[:, None].astype(">i8"), LABELS.astype("S1")])
def test_arrays_give_the_records_of_their_csv(
    packed: bool, labels: np.ndarray, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(images, "BLOCK_BYTES", 7 * 64)
    pack(DRAWN.csv(tmp_path / "a.csv"), tmp_path / "wanted")
    source = Glyphs(IMAGES, labels).npz(tmp_path / "a.npz", packed)
    report = pack(source, tmp_path / "out", PackOptions(workers=2))
    assert content(tmp_path / "out") == content(tmp_path / "wanted")
    assert report.found == [
        f"npz, 60 images of 8 x 8 in 'images' of {source}, their labels in 'labels'"
    ]


def test_texts_are_labels_and_several_files_follow_each_other(tmp_path: Path) -> None:
    names = np.array(["é", "a,b", "-1"])
    for name, start in (("a.npz", 0), ("b.npz", 30)):
        part = slice(start, start + 30)
        Glyphs(IMAGES[part], names[LABELS[part]]).npz(tmp_path / name)
    pack([tmp_path / "a.npz", tmp_path / "b.npz"], tmp_path / "out", PackOptions(split="none"))
    records = open_records(tmp_path / "out")
    train = records.split("train")
    assert np.array_equal(train.image_NHW, IMAGES)
    assert [records.classes[label] for label in train.label_N] == names[LABELS].tolist()


def test_names_choose_among_several_arrays(tmp_path: Path) -> None:
    path = tmp_path / "mnist.npz"
    path.write_bytes(npz(x_test=IMAGES[:9], y_test=LABELS[:9], x_train=IMAGES, y_train=LABELS))
    with pytest.raises(UserError, match="'x_test', 'x_train' may be the images; .* --images NAME"):
        check(path)
    assert check(path, PackOptions(images="x_test"))[0] == 9
    assert check(path, PackOptions(images="x_train", labels="y_train"))[0] == 60
    with pytest.raises(UserError, match=r"the array 'y_test' has the shape \(9,\), want \(60,\)"):
        check(path, PackOptions(images="x_train", labels="y_test"))
    with pytest.raises(UserError, match="holds no array 'x', but 'x_test', 'y_test', 'x_train' an"):
        check(path, PackOptions(images="x"))


def with_member(data: bytes, name: str = "images.npy") -> bytes:
    """An .npz whose member is replaced."""
    out = io.BytesIO()
    with zipfile.ZipFile(out, "w") as archive:
        archive.writestr(name, data)
        archive.writestr("labels.npy", npy(LABELS))
    return out.getvalue()


def npy(array: np.ndarray) -> bytes:
    out = io.BytesIO()
    np.lib.format.write_array(out, array)
    return out.getvalue()


def with_header(**changes: Any) -> bytes:
    """The images under a header that says something else of them."""
    header: Mapping[str, Any] = {"descr": "|u1", "fortran_order": False, "shape": IMAGES.shape}
    out = io.BytesIO()
    np.lib.format.write_array_header_1_0(out, dict(header) | changes)
    return with_member(out.getvalue() + IMAGES.tobytes())


OBJECTS = np.array([{"a": 1}] * 60, object)
GOOD = npz(images=IMAGES, labels=LABELS)
REFUSED: dict[str, tuple[bytes, str]] = {
    "objects": (npz(images=OBJECTS, labels=LABELS), "no array that may be the images|objects"),
    "object labels": (npz(images=IMAGES, labels=OBJECTS), "'labels' holds Python objects, which"),
    "floats": (npz(images=IMAGES / 255, labels=LABELS), "'images' is of float64, want uint8"),
    "flat": (npz(images=IMAGES.reshape(60, 64), labels=LABELS), "has the shape (60, 64), want"),
    "colour": (npz(images=np.stack([IMAGES] * 3, 3), labels=LABELS), "shape (60, 8, 8, 3), want"),
    "oblong": (npz(images=IMAGES[:, :7], labels=LABELS), "holds images of 7 x 8 pixels, want sq"),
    "fortran": (npz(images=np.asfortranarray(IMAGES), labels=LABELS), "in Fortran's order; save"),
    "none": (npz(images=IMAGES[:0], labels=LABELS[:0]), "holds no images"),
    "counts": (npz(images=IMAGES, labels=LABELS[:59]), "'labels' has the shape (59,), want (60,)"),
    "one-hot": (npz(images=IMAGES, labels=np.eye(60)), "'labels' is of float64, want integers"),
    "booleans": (npz(images=IMAGES, labels=LABELS > 1), "'labels' is of bool, want integers or"),
    "no labels": (npz(images=IMAGES), "no array that may be the labels: 'images' has the shape"),
    "neither": (
        npz(img=np.asfortranarray(IMAGES), y=LABELS),
        "may be the images: 'img' is in Fortran's order, 'y' has the",
    ),
    "nameless": (npz(images=IMAGES, labels=np.full(60, "")), "is of <U0|the label '' is empty"),
    "control": (npz(images=IMAGES, labels=np.full(60, "a\x07")), "holds the control character"),
    "no text": (npz(images=IMAGES, labels=np.full(60, b"\xff")), "a label is not UTF-8"),
    "no code point": (
        npz(images=IMAGES, labels=np.full(60, 0x110000, "<u4").view("<U1")),
        "a label is not Unicode",
    ),
    "257 classes": (
        npz(images=np.zeros((300, 4, 4), np.uint8), labels=np.arange(300)),
        "image 257: more than 256 labels; are they row numbers",
    ),
    "long texts": (npz(images=IMAGES, labels=np.full(60, "a" * 4097)), "holds texts of <U4097, wa"),
    "half a pair": (
        npz(images=IMAGES, labels=np.full(60, 0xD800, "<u4").view("<U1")),
        "holds half a surrogate pair, want text",
    ),
    "many members": (
        npz(images=IMAGES, labels=LABELS, **{f"x{i}": 0 for i in range(999)}),
        "holds 1,001 arrays, want at most 1,000; save the images alone",
    ),
    "cut": (GOOD[:-100], "the compressed file is damaged"),
    "damaged": (GOOD[:2000] + bytes([GOOD[2000] ^ 1]) + GOOD[2001:], "damaged (Bad CRC-32"),
    "no array": (with_member(b"label\n1\n"), "member images.npy is no NumPy array"),
    "cut member": (with_member(npy(IMAGES)[:-1]), "images.npy has 3,967 bytes, want 3,968 for"),
    "more": (with_member(npy(IMAGES) + b"x"), "images.npy has 3,969 bytes, want 3,968 for"),
    "negative": (with_header(shape=(-60, 8, -8)), "is no NumPy array (shape (-60, 8, -8))"),
    "boolean shape": (with_header(shape=(True, 8, 480)), "is no NumPy array (shape (True"),
    "huge": (with_header(shape=(2**40, 8, 8)), "want 70,368,744,177,792 for"),
    "a header of code": (
        with_member(b"\x93NUMPY\x01\0\x76\0" + b"__import__('os').abort()".ljust(117) + b"\n"),
        "is no NumPy array",
    ),
    "a long header": (with_member(b"\x93NUMPY\x02\0\xff\xff\xff\x7f" + bytes(99)), "no NumPy arr"),
    "nested": (with_member(b"\x93NUMPY\x01\0\x10\x27" + b"(" * 10_000), "is no NumPy array"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_is_refused_and_where(case: str, tmp_path: Path, command: Command) -> None:
    data, texts = REFUSED[case]
    (tmp_path / "in.npz").write_bytes(data)
    done = command("tools/pack_tmnist", "--layout=npz", tmp_path / "in.npz", tmp_path / "out")
    assert_refused(done, "in.npz")
    assert any(text in done.stderr for text in texts.split("|")), done.stderr
    assert os.listdir(tmp_path) == ["in.npz"]


@settings(max_examples=100, deadline=None)
@given(place=st.integers(0, len(GOOD) - 1), noise=st.binary(min_size=1, max_size=8))
def test_changed_bytes_are_refused_or_change_nothing(
    place: int, noise: bytes, tmp_path_factory: pytest.TempPathFactory
) -> None:
    """The zip's checksums cover what is read; elsewhere a byte may be of no meaning."""
    path = tmp_path_factory.mktemp("changed") / "in.npz"
    path.write_bytes(GOOD[:place] + noise + GOOD[place + len(noise) :])
    out = path.with_name("out")
    try:
        pack(path, out, PackOptions(split="none", layout="npz"))
    except UserError as error:
        assert "\n" not in str(error)
        assert not out.exists()
    else:
        train = open_records(out).split("train")
        assert np.array_equal(train.image_NHW, IMAGES)
        assert np.array_equal(train.label_N, LABELS)
