"""Images that a network is asked about: every source gives the same pixels, bad ones a sentence."""

import gzip
import io
import os
import random
import subprocess
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from pyarrow import feather, parquet

from engine.data.given import SourceOptions
from engine.data.inputs import open_inputs
from engine.data.pack import PackOptions, pack
from engine.errors import UserError
from engine.host import ROOT
from tests.glyph_files import Glyphs, glyphs, idx
from tests.reliability.mutants import mutated, row

DRAWN = glyphs(30).by_class()
PLAIN = SourceOptions()
UNLABELLED = SourceOptions(label_column="none")


def read(
    *paths: Path, options: SourceOptions = PLAIN, split: str | None = None
) -> tuple[np.ndarray, list[str], list[str]]:
    """(Pixels, labels or nothing, places) of sources."""
    with open_inputs(paths, options, split) as inputs:
        image_NP = inputs.take(np.arange(inputs.num_images))
        image_NHW = image_NP.reshape(-1, inputs.height, inputs.width)
        labels = [inputs.classes[label] for label in inputs.label_N] if inputs.classes else []
        return image_NHW, labels, list(inputs.places)


def png(image_HW: np.ndarray) -> bytes:
    out = io.BytesIO()
    Image.fromarray(image_HW).save(out, "PNG")
    return out.getvalue()


@contextmanager
def standard_input(data: bytes) -> Iterator[None]:
    """This process's standard input is a pipe that holds `data`."""
    kept = os.dup(0)
    reader, writer = os.pipe()
    os.write(writer, data)
    os.close(writer)
    os.dup2(reader, 0)
    os.close(reader)
    try:
        yield
    finally:
        os.dup2(kept, 0)
        os.close(kept)


def pixels_alone(csv: Path, path: Path, header: bool = True) -> Path:
    """A CSV without its label column."""
    lines = [line.partition(",")[2] for line in csv.read_text().splitlines(keepends=True)]
    path.write_text("".join(lines[not header :]))
    return path


def test_sources_with_labels_give_pixels_labels_and_places(tmp_path: Path) -> None:
    csv, tree = DRAWN.csv(tmp_path / "a.csv"), DRAWN.png(tmp_path / "tree")
    sources = [[csv], [tree], [DRAWN.npz(tmp_path / "a.npz")], DRAWN.idx(tmp_path)]
    places = {}
    for paths in sources:
        image_NHW, labels, found = read(*paths)
        assert np.array_equal(image_NHW, DRAWN.image_NHW)
        assert labels == [str(label) for label in DRAWN.label_N]
        places[str(paths[0])] = found
    assert places[str(csv)] == [f"{csv}:{line}" for line in range(2, 32)]
    assert places[str(tree)][:2] == [f"{tree}/0/00000.png", f"{tree}/0/00001.png"]
    assert places[str(tmp_path / "a.npz")][-1] == f"{tmp_path / 'a.npz'}: image 30"
    assert read(csv, csv)[2][30] == f"{csv}:2", "each file's lines are its own"


def test_pictures_need_no_class_folders(tmp_path: Path) -> None:
    files = sorted(DRAWN.png(tmp_path / "tree").glob("*/*.png"))
    flat = tmp_path / "flat"
    flat.mkdir()
    for number, file in enumerate(files):
        (flat / f"{number:02}.png").write_bytes(file.read_bytes())
    (flat / ".DS_Store").touch()
    for paths in (files, [flat], [*files[:7], *files[7:]]):
        image_NHW, labels, places = read(*paths)
        assert np.array_equal(image_NHW, DRAWN.image_NHW) and labels == []
        assert len(places) == 30 and all(Path(place).is_file() for place in places)


def test_a_pipe_holds_pictures_or_a_csv(tmp_path: Path) -> None:
    csv = DRAWN.csv(tmp_path / "a.csv")
    with standard_input(b"".join(map(png, DRAWN.image_NHW))):
        image_NHW, labels, places = read(Path("-"))
    assert np.array_equal(image_NHW, DRAWN.image_NHW) and labels == []
    assert places[2] == "standard input: image 3"
    with standard_input(csv.read_bytes()):
        assert np.array_equal(read(Path("-"))[0], DRAWN.image_NHW)
    with standard_input(pixels_alone(csv, tmp_path / "b.csv").read_bytes()):
        assert np.array_equal(read(Path("-"), options=UNLABELLED)[0], DRAWN.image_NHW)


def test_a_csv_of_pixels_alone_is_read_where_it_is_asked_for(tmp_path: Path) -> None:
    csv = DRAWN.csv(tmp_path / "a.csv")
    alone = pixels_alone(csv, tmp_path / "b.csv")
    with pytest.raises(
        UserError, match=r"is this a test set\? only tools/predict takes it: --label-column none$"
    ):
        read(alone)
    bare = pixels_alone(csv, tmp_path / "c.csv", header=False)
    numbered = tmp_path / "d.csv"
    lines = alone.read_text().splitlines()
    numbered.write_text("\r\n".join(["," + lines[0], *(f'"1",{line}' for line in lines[1:])]))
    for path, options, first_line in (
        (alone, UNLABELLED, 2),
        (bare, SourceOptions(label_column="none", no_header=True), 1),
        (numbered, SourceOptions(label_column="none", index_column=True), 2),
    ):
        image_NHW, labels, places = read(path, options=options)
        assert np.array_equal(image_NHW, DRAWN.image_NHW) and labels == []
        assert places[0] == f"{path}:{first_line}"
    with pytest.raises(UserError, match="--label-column none: leaves nothing to train on"):
        PackOptions(label_column="none")


def without_labels(folder: Path) -> dict[str, Path]:
    """DRAWN's images in each layout that arrays have, alone."""
    paths = {
        name: folder / name
        for name in ("a.idx", "a.idx.gz", "a.npz", "packed.npz", "a.parquet", "a.arrow")
    }
    paths["a.idx"].write_bytes(idx(DRAWN.image_NHW))
    paths["a.idx.gz"].write_bytes(gzip.compress(idx(DRAWN.image_NHW)))
    np.savez(paths["a.npz"], images=DRAWN.image_NHW)
    np.savez_compressed(paths["packed.npz"], images=DRAWN.image_NHW)
    table = DRAWN.table().select(["image"])
    parquet.write_table(table, paths["a.parquet"])
    feather.write_feather(table, paths["a.arrow"], compression="uncompressed")
    return paths


def test_every_layout_is_read_without_labels(tmp_path: Path) -> None:
    for name, path in without_labels(tmp_path).items():
        image_NHW, labels, places = read(path, path, options=UNLABELLED)
        assert np.array_equal(image_NHW, np.concatenate([DRAWN.image_NHW] * 2)), name
        assert labels == [] and places[-1] == f"{path}: image 30"
        with open_inputs([path], UNLABELLED) as inputs:
            assert inputs.found[0].endswith("without labels")
            assert np.array_equal(inputs.take(np.array([3, 29]))[0], DRAWN.image_NHW[3].ravel())


def test_labels_that_nobody_asks_for_are_passed_over(tmp_path: Path) -> None:
    parquet.write_table(DRAWN.table(), tmp_path / "a.parquet")
    for path in (DRAWN.npz(tmp_path / "a.npz"), tmp_path / "a.parquet"):
        image_NHW, labels, _ = read(path, options=UNLABELLED)
        assert np.array_equal(image_NHW, DRAWN.image_NHW) and labels == []


def test_what_is_refused_without_labels(tmp_path: Path) -> None:
    paths = without_labels(tmp_path)
    tree = DRAWN.png(tmp_path / "tree")
    labels = DRAWN.idx(tmp_path)[1]
    named = SourceOptions(label_column="none", labels="label")
    numbered = SourceOptions(label_column="none", index_column=True)
    cases: list[tuple[Path, SourceOptions, str]] = [
        (paths["a.idx"], PLAIN, r"\(without labels only tools/predict takes it: --label-column"),
        (paths["a.npz"], PLAIN, r"may be the labels: .* \(without labels only tools/predict"),
        (paths["a.parquet"], PLAIN, r"may be the labels: .* \(without labels only tools/predict"),
        (paths["a.npz"], named, "--labels names labels, --label-column none says there are none"),
        (paths["a.idx"], numbered, "is idx, but --label-column, --no-header and --index-column"),
        (tree, numbered, "is png, but --label-column, --no-header and --index-column are of"),
        (labels, UNLABELLED, "of labels where images are expected; leave it out, or give pairs"),
    ]
    for path, options, text in cases:
        with pytest.raises(UserError, match=text):
            read(path, options=options)
    short = tmp_path / "short.idx.gz"
    short.write_bytes(gzip.compress(idx(DRAWN.image_NHW)[:-1]))
    with pytest.raises(UserError, match="ends before the 30 images that its header declares"):
        read(short, options=UNLABELLED)


@pytest.mark.parametrize(
    ("line", "wanted"),
    [
        ("1,2", r"b.csv:32 \(row 31\): got 2 fields, want 64 pixels$"),
        ("0," * 64 + "0", r"\(row 31\): got 65 fields, want 64 pixels$"),
        ("0," * 63 + "256", r"\(row 31, column 64 'pixel63'\): got '256'"),
        ("x," + "0," * 62 + "0", r"\(row 31, column 1 'pixel0'\): got 'x', want an integer"),
        ('"1,2",' + "0," * 62 + "0", r"\(row 31, column 1 'pixel0'\): got '1,2', want an int"),
        ("0," * 63 + '"0', r"\(row 31\): is not CSV"),
    ],
)
def test_a_fault_among_pixels_alone_is_named_with_its_column(
    line: str, wanted: str, tmp_path: Path
) -> None:
    path = pixels_alone(DRAWN.csv(tmp_path / "a.csv"), tmp_path / "b.csv")
    path.write_text(path.read_text() + line + "\n")
    with pytest.raises(UserError, match=wanted):
        read(path, options=UNLABELLED)


def test_pixels_alone_are_accepted_if_and_as_they_are_behind_a_label(tmp_path: Path) -> None:
    """On mutated tables: the verdicts are those on the same rows with a label in front."""
    rng = random.Random(0)
    header = b"pixel0,pixel1,pixel2,pixel3\n"
    verdicts = {"accepted": 0, "refused": 0}
    for _ in range(150):
        rows = "".join(row(rng, 0, 4) + "\n" for _ in range(3)).encode()
        table = mutated(rng, rows)
        labelled = [b"0," + line if line.strip() else line for line in table.split(b"\n")]
        (tmp_path / "a.csv").write_bytes(header + table)
        (tmp_path / "b.csv").write_bytes(b"label," + header + b"\n".join(labelled))
        found: list[bytes | None] = []
        for name, options in (("a", UNLABELLED), ("b", PLAIN)):
            try:
                found.append(read(tmp_path / f"{name}.csv", options=options)[0].tobytes())
            except UserError:
                found.append(None)
        assert found[0] == found[1], table
        verdicts["refused" if found[0] is None else "accepted"] += 1
    assert min(verdicts.values()) > 25


def test_a_split_of_records_is_read(tmp_path: Path) -> None:
    csv, records = DRAWN.csv(tmp_path / "a.csv"), tmp_path / "records"
    pack({"train": [csv], "test": [csv]}, records)
    image_NHW, labels, places = read(records)
    assert np.array_equal(image_NHW, DRAWN.image_NHW) and labels[-1] == "2"
    assert places[0] == f"{records}: test image 1"
    pack(csv, tmp_path / "whole", PackOptions(split="none"))
    with pytest.raises(UserError, match="has no split test, but train; name another --split"):
        read(tmp_path / "whole")
    with pytest.raises(UserError, match="leave options of other sources out"):
        read(records, options=UNLABELLED)
    with pytest.raises(UserError, match="name one record directory alone"):
        read(records, csv)
    with pytest.raises(UserError, match="--split: is of record directories, .*a.csv is none"):
        read(csv, split="test")


def bad_paths(folder: Path) -> dict[str, tuple[Sequence[Path], str]]:
    """Sources that hold no images, and what is said of them."""
    good = folder / "good.png"
    good.write_bytes(png(DRAWN.image_NHW[0]))
    files = {
        "small.png": png(np.zeros((4, 4), np.uint8)),
        "x.jpg": b"\xff\xd8\xff\xe0" + bytes(20),
        "text.png": b"label,pixel0\n",
        "none.png": b"",
    }
    for name, data in files.items():
        (folder / name).write_bytes(data)
    for name in ("empty", "mixed", "deep"):
        (folder / name).mkdir()
    (folder / "mixed" / "a.png").write_bytes(good.read_bytes())
    (folder / "mixed" / "a.txt").touch()
    (folder / "deep" / "a.png").write_bytes(good.read_bytes())
    (folder / "deep" / "b").mkdir()
    return {
        "JPEG": ([folder / "x.jpg"], "x.jpg: is a JPEG picture, want a PNG; leave it out"),
        "JPEG behind": ([good, folder / "x.jpg"], "x.jpg: is a JPEG picture, want a PNG"),
        "text": ([folder / "text.png"], "text.png: is no PNG, want a PNG"),
        "no bytes": ([folder / "none.png"], "none.png: is no PNG, want a PNG"),
        "gone": (
            [folder / "gone.png"],
            r"gone.png: cannot be read \(No such file or directory\); name a file that is there$",
        ),
        "size": ([good, folder / "small.png"], "small.png: has 4 x 4 pixels, but .*good.png 8 x 8"),
        "empty": ([folder / "empty"], "empty: is an empty folder; name one that holds PNGs"),
        "mixed": ([folder / "mixed"], "a.txt: is no .png; move it away"),
        "deep": ([folder / "deep"], "b: is a folder in a folder of PNGs"),
        "several pipes": ([Path("-"), good], "-: stands beside other sources"),
    }


@pytest.mark.parametrize(
    "case",
    ["JPEG", "JPEG behind", "text", "no bytes", "gone", "size", "empty", "mixed", "deep",
     "several pipes"],
)  # fmt: skip
def test_what_holds_no_images_is_refused(case: str, tmp_path: Path) -> None:
    paths, wanted = bad_paths(tmp_path)[case]
    with pytest.raises(UserError, match=wanted):
        read(*paths)


@pytest.mark.parametrize(
    ("data", "wanted"),
    [
        (b"", "standard input: has no data rows"),
        (b"hello\n", "standard input:1: got the header 'hello'"),
        (b"\xff\xd8\xff\xe0" + bytes(20), "standard input: image 1: is a JPEG picture, want a PNG"),
        (png(DRAWN.image_NHW[0])[:-20], "standard input: image 1: ends too early"),
        (png(DRAWN.image_NHW[0]) * 2 + b"x", "standard input: image 3: is no PNG"),
        (png(DRAWN.image_NHW[0])[:33] + b"\xff\xff\xff\xffIDAT", "image 1: has more than 16,777,"),
    ],
)
def test_a_pipe_that_holds_no_images_is_refused(data: bytes, wanted: str) -> None:
    with standard_input(data), pytest.raises(UserError, match=wanted):
        read(Path("-"))


def test_options_of_csvs_are_none_of_pictures(tmp_path: Path) -> None:
    (tmp_path / "a.png").write_bytes(png(DRAWN.image_NHW[0]))
    with pytest.raises(UserError, match="is png, but --label-column, .* are of CSVs"):
        read(tmp_path / "a.png", options=SourceOptions(label_column="last"))


def test_pictures_may_be_said_to_have_no_labels(tmp_path: Path) -> None:
    """A folder or a pipe of PNGs has none anyway; class folders are passed over."""
    tree = DRAWN.png(tmp_path / "tree")
    (tmp_path / "a.png").write_bytes(png(DRAWN.image_NHW[0]))
    assert read(tmp_path / "a.png", options=UNLABELLED)[1] == []
    image_NHW, labels, _ = read(tree, options=UNLABELLED)
    assert np.array_equal(image_NHW, DRAWN.image_NHW) and labels == []
    pictures = b"".join(map(png, DRAWN.image_NHW))
    for layout in ("auto", "png"):
        options = SourceOptions(label_column="none", layout=layout)
        with standard_input(pictures):
            image_NHW, labels, _ = read(Path("-"), options=options)
        assert np.array_equal(image_NHW, DRAWN.image_NHW) and labels == []


def test_folders_of_two_kinds_are_refused(tmp_path: Path) -> None:
    tree = DRAWN.png(tmp_path / "tree")
    flat = tmp_path / "flat"
    flat.mkdir()
    (flat / "a.png").write_bytes(png(DRAWN.image_NHW[0]))
    with pytest.raises(UserError, match="flat: is a folder without class folders, but .*tree is p"):
        read(tree, flat)


def test_no_place_for_pixels_is_one_sentence(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    csv = DRAWN.csv(tmp_path / "a.csv")
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path / "gone"))
    with pytest.raises(UserError, match=r"^the temporary folder \(TMPDIR\): cannot be written "):
        read(csv)


def test_neither_torch_nor_pyarrow_is_imported_to_read_images(tmp_path: Path) -> None:
    lines = """
import sys, pathlib, tools.predict, engine.data.given, engine.data.inputs
options = engine.data.given.SourceOptions()
with engine.data.inputs.open_inputs([pathlib.Path(sys.argv[1])], options):
    assert not {"torch", "pyarrow"} & set(sys.modules)
"""
    words = [sys.executable, "-c", lines, DRAWN.csv(tmp_path / "a.csv")]
    subprocess.run(words, cwd=ROOT, check=True)


def test_a_source_of_many_blocks_keeps_its_order(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("engine.data.images.BLOCK_BYTES", 7 * 64)
    many = glyphs(100)
    with standard_input(b"".join(map(png, many.image_NHW))):
        assert np.array_equal(read(Path("-"))[0], many.image_NHW)
    tree = Glyphs(many.image_NHW, np.zeros(100, np.uint8)).png(tmp_path)
    assert np.array_equal(read(tree / "0")[0], many.image_NHW)
