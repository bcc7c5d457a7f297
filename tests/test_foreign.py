"""What is given as a CSV and is none: other files, headers of other tables, folders, pipes."""

import bz2
import gzip
import io
import lzma
import os
import pickle
import sqlite3
import struct
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
from PIL import Image
from pyarrow import feather, parquet

from engine.data.lexer import Fault, read_header
from engine.data.pack import PackOptions, check, pack
from engine.errors import UserError
from engine.host import ROOT

TABLE = b"label,pixel0,pixel1,pixel2,pixel3\n1,0,0,0,0\n"


def said(path: Path) -> str:
    """The one line that refuses `path`."""
    with pytest.raises(UserError) as refused:
        check(path)
    assert "\n" not in str(refused.value)
    return str(refused.value)


def archive(*names: str, data: bytes = TABLE) -> bytes:
    out = io.BytesIO()
    with zipfile.ZipFile(out, "w") as opened:
        for name in names:
            opened.writestr(name, data)
    return out.getvalue()


def files(folder: Path) -> dict[str, bytes]:
    """Real files of each kind, and the words that their refusal holds."""
    pixels, table = np.zeros((3, 28, 28), np.uint8), pa.table({"label": [1, 2]})
    made: dict[str, bytes] = {}
    for name, write in {
        "a NumPy array": lambda out: np.save(out, pixels),
        "a Parquet file": lambda out: parquet.write_table(table, out),
        "an Arrow file": lambda out: feather.write_feather(table, out),
        "a PNG picture": lambda out: Image.new("L", (28, 28)).save(out, "PNG"),
        "a JPEG picture": lambda out: Image.new("L", (28, 28)).save(out, "JPEG"),
        "a GIF picture": lambda out: Image.new("L", (28, 28)).save(out, "GIF"),
        "a BMP picture": lambda out: Image.new("L", (28, 28)).save(out, "BMP"),
        "a TIFF picture": lambda out: Image.new("L", (28, 28)).save(out, "TIFF"),
        "a PDF document": lambda out: Image.new("L", (28, 28)).save(out, "PDF"),
    }.items():
        out = io.BytesIO()
        write(out)
        made[name] = out.getvalue()
    with sqlite3.connect(folder / "db") as database:
        database.execute("create table glyphs (label)")
    tar = io.BytesIO()
    with tarfile.open(fileobj=tar, mode="w") as opened:
        info = tarfile.TarInfo("a.csv")
        info.size = len(TABLE)
        opened.addfile(info, io.BytesIO(TABLE))
    return made | {
        "an SQLite database": (folder / "db").read_bytes(),
        "a tar archive; unpack it (tar xf": tar.getvalue(),
        "MNIST's binary format (3 images of 28x28)": struct.pack(">4I", 2051, 3, 28, 28),
        "MNIST's binary format (9 labels)": struct.pack(">2I", 2049, 9) + bytes(9),
        "xz-compressed; unpack it (xz -d": lzma.compress(TABLE),
        "bzip2-compressed; unpack it": bz2.compress(TABLE),
        "zstd-compressed": b"\x28\xb5\x2f\xfd" + bytes(20),
        "a safetensors file": struct.pack("<Q", 60) + b'{"x":{}}'.ljust(60),
        "a 7z archive": b"7z\xbc\xaf\x27\x1c" + bytes(20),
        "a RAR archive": b"Rar!\x1a\x07\x01\0",
        "a Feather file of version 1": b"FEA1" + bytes(20),
        "an HDF5 file": b"\x89HDF\r\n\x1a\n" + bytes(20),
        "a MATLAB file": b"MATLAB 5.0 MAT-file, Platform: GLNXA64",
        "run git lfs pull": b"version https://git-lfs.github.com/spec/v1\n",
        "a JSON file": b' [{"label": 1}]\n',
        "an HTML page": b"\n<!doctype html>\n",
        "an XML file": b"\xef\xbb\xbf<?xml version='1.0'?>\n",
    }


def test_a_file_is_named_for_what_it_is_also_in_a_gzip_or_a_zip(tmp_path: Path) -> None:
    for text, data in files(tmp_path).items():
        for content in (data, gzip.compress(data), archive("a.csv", data=data)):
            (tmp_path / "in.csv").write_bytes(content)
            assert text in said(tmp_path / "in.csv")
        (tmp_path / "in.csv").write_bytes(archive("a.dat", data=data))
        found = said(tmp_path / "in.csv")
        assert "holds 0 CSV files, only a.dat, which is" in found and text.split(";")[0] in found


@pytest.mark.parametrize("protocol", range(6))
def test_a_pickle_of_any_protocol_is_named(protocol: int, tmp_path: Path) -> None:
    for value in ([1, 2], {"label": 1}, np.zeros((2, 2), np.uint8), (1, "a"), "text"):
        (tmp_path / "in.csv").write_bytes(pickle.dumps(value, protocol))
        assert "is a Python pickle" in said(tmp_path / "in.csv")


def test_zips_say_what_they_hold(tmp_path: Path) -> None:
    source = tmp_path / "in.zip"
    source.write_bytes(archive("a.csv", "__MACOSX/._a.csv", "._b.csv", ".DS_Store", "folder/"))
    assert check(source)[0] == 1
    for names, text in {
        ("x/a.csv", "b.csv"): "holds 2 CSV files (x/a.csv, b.csv), want one; unpack it and pack",
        ("xl/workbook.xml", "a.xml"): "is an Excel workbook",
        ("train.npy", "test.npy"): "its member train.npy is no NumPy array",
        (
            "a.png",
            "b.png",
            "c.png",
            "d.png",
        ): "holds 0 CSV files, but a.png, b.png, c.png and 1 more",
        ("__MACOSX/._a.csv",): "is a zip that holds no file",
        (): "is a zip that holds no file",
    }.items():
        source.write_bytes(archive(*names))
        assert text in said(source)


def test_folders_say_what_they_are(small_dir: Path, tmp_path: Path) -> None:
    assert "is a record directory, packed already" in said(small_dir)
    assert "is an empty folder" in said(tmp_path)
    (tmp_path / "A").mkdir()
    (tmp_path / "A" / "1.PNG").write_bytes(b"")
    assert "A/1.PNG: is no PNG, want a PNG" in said(tmp_path)
    os.rename(tmp_path / "A" / "1.PNG", tmp_path / "A" / "1.jpg")
    assert "is a folder of pictures (.jpg); write grey PNGs into a folder per" in said(tmp_path)
    (tmp_path / "loop").symlink_to("loop")
    (tmp_path / "a.csv").write_bytes(TABLE)
    assert "is a folder that holds a.csv; name one of them" in said(tmp_path)


def test_what_could_be_packed_says_how(tmp_path: Path) -> None:
    for text, data in files(tmp_path).items():
        if text.startswith(("a Parquet", "an Arrow", "MNIST")):
            (tmp_path / "in").write_bytes(data)
            with pytest.raises(UserError, match="; name the file itself, not a pipe or"):
                check(tmp_path / "in", PackOptions(layout="csv"))
    (tmp_path / "in").write_bytes(archive("x.npy", "y.npy"))
    with pytest.raises(UserError, match=r"\(.npz: x.npy, y.npy\); pack it without --layout csv, "):
        check(tmp_path / "in", PackOptions(layout="csv"))


def test_the_parent_of_class_folders_is_told_to_name_one(tmp_path: Path) -> None:
    for name in ("training/0", "testing/0", "other"):
        (tmp_path / name).mkdir(parents=True)
    (tmp_path / "training/0/1.png").touch()
    (tmp_path / "testing/0/1.png").touch()
    found = said(tmp_path)
    assert "holds testing, training; name the folder that holds the class folders" in found


@pytest.mark.parametrize("beside", ["manifest.json", "a.csv.gz"])
def test_class_folders_beside_something_else_are_not_read(beside: str, tmp_path: Path) -> None:
    (tmp_path / "0").mkdir()
    (tmp_path / "0" / "1.png").touch()
    assert "0/1.png: is no PNG" in said(tmp_path)
    (tmp_path / beside).touch()
    assert "is a folder" in said(tmp_path)


def test_a_closed_standard_input_is_one_line(tmp_path: Path) -> None:
    line = f"exec {sys.executable} -m tools.pack_tmnist - {tmp_path / 'out'} <&-"
    done = subprocess.run(["sh", "-c", line], cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert done.returncode == 2
    assert done.stderr == "error: standard input: is closed; pipe a CSV into it, or name a file\n"


def pixels(prefix: str, first: int, number: int = 16) -> list[str]:
    return [f"{prefix}{i}" for i in range(first, first + number)]


RESHAPED = [f"{row}x{column}" for row in range(1, 5) for column in range(1, 5)]
ROW = ["0"] * 12 + ["7"] * 4
HEADERS: dict[str, tuple[list[str], str]] = {
    "no header": (["5", *ROW], "put the line label,pixel0,...,pixel15 first"),
    "no header, a letter": (["A", *ROW], "put the line label,pixel0,...,pixel15 first"),
    "no header, names": (["Face", "A", *ROW], "put the line names,labels,1,...,16 first"),
    "no header, digits": (["Face-1", "3", *ROW], "put the line names,labels,1,...,16 first"),
    "no label": (pixels("pixel", 0), "there is no label column; is this a test set"),
    "an id": (["id", *pixels("pixel", 0)], "there is no label column ('id' is none)"),
    "saved again": (["0", *(f"0.{i}" for i in range(1, 17))], "pandas took a row for names"),
    "numbered": (pixels("", 0, 17), "rename 0..16 to label,pixel0,...,pixel15"),
    "row numbers": (["", "names", "labels", *pixels("", 1)], "drop the first column"),
    "row numbers, too": (["Unnamed: 0", "label", *RESHAPED], "first column, pandas' row numbers"),
    "1x1": (["class", *RESHAPED], "rename 'class' to label"),
    "label last": (
        [*pixels("pixel", 0), "label"],
        "; give --label-column last, or move 'label' to the front",
    ),
    "class last": (
        [*pixels("pixel", 0), "class"],
        "; give --label-column last, or move 'class' to the front and call it label",
    ),
    "label last, numbers": (
        [*pixels("", 0), "label"],
        "last, or move 'label' to the front and rename 0..15 to pixel0..pixel15",
    ),
    "class within": (
        [*pixels("p", 0, 8), "n", *pixels("p", 8, 8)],
        "give --label-column 9, or move 'n' to the front and call it label; rename p0..p15 to",
    ),
    "case": (["Label", *pixels("pixel", 0)], "write the names in lower case"),
    "spaces": (["label", *pixels(" pixel", 0)], "delete the spaces"),
    "other name": (["class", *pixels("pixel", 0)], "rename 'class' to label"),
    "swapped": (["labels", "names", *pixels("", 1)], "must be names, then labels"),
    "from 0": (["names", "labels", *pixels("", 0)], "rename 0..15 to 1..16"),
    "another column": (["label", "writer", *pixels("pixel", 0)], "drop 'writer'"),
    "no square": (["label", *pixels("pixel", 0, 20)], "20 pixels are no square; pad or cut"),
    "colour": (["label", *pixels("pixel", 0, 48)], "4 x 4 in 3 colours"),
    "sorted as text": (["label", *sorted(pixels("pixel", 0))], "in another order; sort them"),
    "twice": (["label", *pixels("pixel", 0, 15), "pixel3"], "'pixel3' occurs twice"),
    "FER": (["emotion", "pixels", "Usage"], "the pixels stand in one column, 'pixels'"),
    "comma at the end": (["label", *pixels("pixel", 0), ""], "delete the empty last column"),
    "semicolons": (["label;pixel0;pixel1;pixel2;pixel3"], "separated by semicolons"),
    "in quotes": (["label,pixel0,pixel1,pixel2,pixel3"], "delete the outer quotes"),
    "another table": (["name", "age", "sex"], "no columns of pixels"),
    "blank": ([""], "the first line is blank"),
}


@pytest.mark.parametrize("case", HEADERS)
def test_a_header_of_another_table_gets_a_hint_that_fits(case: str) -> None:
    columns, text = HEADERS[case]
    line = ",".join(f'"{column}"' if "," in column else column for column in columns)
    with pytest.raises(Fault) as refused:
        read_header(line.encode())
    assert text in str(refused.value) and len(str(refused.value)) <= 220


def test_the_hint_counts_columns_as_each_flag_does() -> None:
    columns = ["", *pixels("pixel", 0, 8), "class", *pixels("pixel", 8, 8)]
    with pytest.raises(Fault, match=r"give --label-column 9 \(10 with --index-column\), or move"):
        read_header(",".join(columns).encode())


def test_more_labels_than_classes_without_names_and_images_too_small(tmp_path: Path) -> None:
    header, rest = TABLE.decode().splitlines(keepends=True)[0], ",0,0,0,0\n"
    (tmp_path / "in.csv").write_text(header + "".join(f"{i}{rest}" for i in range(257)))
    with pytest.raises(UserError, match=r"more than 256 labels; is the column an id, a row num"):
        pack(tmp_path / "in.csv", tmp_path / "out", PackOptions(split="none"))
    (tmp_path / "in.csv").write_bytes(TABLE)
    report = pack(tmp_path / "in.csv", tmp_path / "out", PackOptions(split="none"))
    assert any("images of 2 x 2 pixels cannot be trained on" in text for text in report.warnings)


def test_what_a_file_is_comes_before_what_its_target_is(small_csv: Path, tmp_path: Path) -> None:
    """Whoever is told to name another OUT would only then hear that the file is none to pack."""
    pack(small_csv, tmp_path / "r")
    (tmp_path / "x.csv").write_bytes(b"PAR1" + bytes(100))
    with pytest.raises(UserError, match="Parquet"):
        pack(tmp_path / "x.csv", tmp_path / "r")
    (tmp_path / "x.csv").write_text("label,pixel1,pixel3\n")
    with pytest.raises(UserError, match="header"):
        pack(tmp_path / "x.csv", tmp_path / "r")
    with pytest.raises(UserError, match="exists; give --force"):
        pack(small_csv, tmp_path / "r")
