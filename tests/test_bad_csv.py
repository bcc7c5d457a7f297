"""What a stranger's CSV may hold, by the project's table of bad inputs: taken, or refused by name.

The numbers in the test ids are those of the table. Images are 2 x 2, unless a row needs more.
"""

import gzip
import os
import shutil
import socket
import subprocess
import sys
import tempfile
import threading
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import IO

import numpy as np
import pytest

from engine.data.pack import PackOptions, check, pack
from engine.data.records import Records, open_records
from engine.errors import UserError
from tests.conftest import Command, assert_refused, forked
from tools import pack_tmnist

HEADER = "names,labels,1,2,3,4\n"
ROW = "F,a,0,0,0,0\n"


def packed(data: bytes | str, tmp_path: Path) -> Records:
    source = tmp_path / "in.csv"
    source.write_bytes(data if isinstance(data, bytes) else data.encode())
    pack(source, tmp_path / "out", PackOptions(split="none"))
    return open_records(tmp_path / "out")


def label_row(label: str) -> str:
    return f"F,{label},0,0,0,0\n"


def pixel_row(pixel: str) -> str:
    return f"F,a,0,{pixel},0,0\n"


LABELS = {
    "1": ('","', ","),
    "2": ('""""', '"'),
    "3": ("\\", "\\"),
    "4": ("'", "'"),
    "5": ("#", "#"),
    "6a": ("=", "="),
    "6b": ("+", "+"),
    "6c": ("-", "-"),
    "6d": ("@", "@"),
    "7a": ("0.0", "0.0"),
    "7b": ("01", "01"),
    "8a": ("NA", "NA"),
    "8b": ("nan", "nan"),
    "8c": ("null", "null"),
    "8d": ("None", "None"),
    "8e": ("TRUE", "TRUE"),
    "9a": (" ", " "),
    "9b": ("\t", "\t"),
    "9c": (" a ", " a "),
    "53a": ("<script>alert(1)</script>", "<script>alert(1)</script>"),
    "53b": ("=cmd|' /C calc'!A0", "=cmd|' /C calc'!A0"),
    "53c": ("%n{0}${HOME}", "%n{0}${HOME}"),
    "53d": ("../../etc/passwd", "../../etc/passwd"),
    "54": ("\U0001f600", "\U0001f600"),
}


@pytest.mark.parametrize("case", LABELS)
def test_labels_are_kept_to_the_byte(case: str, tmp_path: Path) -> None:
    written, label = LABELS[case]
    rows = label_row(written) + ROW + f"{written},b,0,0,0,0\n"
    records = packed(HEADER + rows, tmp_path)
    train = records.split("train")
    assert [records.classes[i] for i in train.label_N] == [label, "a", "b"]
    assert [records.fonts[i] for i in train.font_N] == ["F", "F", label]


PIXELS = [
    "0",
    "0.0",
    "0.000",
    "255",
    "255.0",
    "10.0",
    "9",
    '"5"',
    '"5.0"',
    "0." + "0" * 4000,
    "255.00",
]


def test_15_every_accepted_spelling_of_a_pixel(tmp_path: Path) -> None:
    rows = [f"F,a,{pixel},0,{pixel},{pixel}\n" for pixel in PIXELS]
    image_NHW = packed(HEADER + "".join(rows), tmp_path).split("train").image_NHW
    values = [int(float(pixel.strip('"'))) for pixel in PIXELS]
    assert image_NHW.reshape(-1, 4).tolist() == [[v, 0, v, v] for v in values]


OK = {
    "24b": HEADER + ROW + ROW.rstrip("\n"),
    "28": "\ufeff" + HEADER + ROW,
    "30a": (HEADER + ROW).replace("\n", "\r\n"),
    "30c": HEADER + ROW.replace("\n", "\r\n") + ROW,
    "31b": HEADER + ROW + "\n",
    "31c": HEADER + ROW + "\r\n",
    "52": '"names","labels","1","2","3","4"\n"F","a","0","0","0","0"\n',
    "43": HEADER + ROW + ROW + label_row("b"),
    "44": HEADER + ROW + "F,a,255,255,255,255\n",
    "13c": HEADER + label_row("x" * 4096),
    "45b": HEADER + ROW,
}


@pytest.mark.parametrize("case", OK)
def test_what_is_in_order_is_taken(case: str, tmp_path: Path) -> None:
    num_rows = len(OK[case].strip().split("\n")) - 1
    assert len(packed(OK[case], tmp_path).split("train")) == num_rows


WANT_PIXEL = "want an integer 0..255"
REFUSED: dict[str, tuple[bytes | str, str]] = {
    "10a": (HEADER + label_row(""), "in.csv:2 (row 1, column 2 'labels'): is empty"),
    "10b": (HEADER + label_row('""'), "is empty"),
    "11": (HEADER + label_row('"a\nb"'), "is not CSV: a quote is not closed on its line"),
    "12": (HEADER + ROW + label_row("é") + label_row("e\u0301"), "4 (row 3, column 2 'labels')"),
    "12b": (HEADER + ROW + label_row("é") + label_row("e\u0301"), "looks like the label of row 2"),
    "13a": (HEADER + label_row("x" * 200_000), "a field of more than 4096 bytes"),
    "13b": (HEADER + label_row("x" * 4097), "has 4097 bytes, want at most 4096"),
    "13d": (HEADER + "F" * 10_000_000 + ",a,0,0,0,0\n", "is longer than 1048576 bytes"),
    "14a": (HEADER + label_row("a\0"), "holds a NUL byte"),
    "14b": (HEADER + label_row("a\u202e"), "control character U+202E"),
    "14c": (HEADER + label_row("\x1b[31m"), "control character U+001B"),
    "14d": (HEADER + "F\x7f,a,0,0,0,0\n", "column 1 'names'): holds the control character U+007F"),
    **{
        f"16-20 {pixel}": (
            HEADER + ROW + pixel_row(pixel),
            f"3 (row 2, column 4 '2'): got {pixel!r}, {WANT_PIXEL}",
        )
        for pixel in (
            "256", "-1", "-0.0", "1000", "300.0", "12.5", "0.1", "nan", "inf", "-inf", "1e400",
            "1e2", "0x1F", "1_0", "+5", "5.", ".5", "007", "00", "00.0", "１２", "١", "1 2", " 5",
            "5 ", "NULL", "?", "5.01", "1e", "--1", "2.0.0",
        )
    },
    "17b": (HEADER + pixel_row("0.25"), "are the pixels already divided by 255?"),
    "17c": (HEADER + pixel_row(".25"), "are the pixels already divided by 255?"),
    "20": (HEADER + pixel_row(""), f"got '', {WANT_PIXEL}"),
    "20b": (HEADER + pixel_row('""'), f"got '', {WANT_PIXEL}"),
    "19b": (HEADER + pixel_row('"5'), "a quote is not closed"),
    "19c": (HEADER + pixel_row('5"'), "is not CSV"),
    "19d": (HEADER + pixel_row('"5" '), "is not CSV"),
    "19e": (HEADER + pixel_row('"""5"""'), WANT_PIXEL),
    "21a": (HEADER + pixel_row("1" * 5000), "has 5000 characters, want an integer 0..255"),
    "21b": (HEADER + pixel_row("0." + "0" * 5000), "has 5002 characters"),
    "22": (HEADER + "F,a,0,0,0,0,0,0,0,0\n", "want 6; are decimals written with a comma?"),
    "23a": (HEADER + "F,a,0,0,0\n", "got 5 fields, want 6"),
    "23b": (HEADER + "F,a,0,0,0,0,0\n", "got 7 fields, want 6"),
    "23c": (HEADER + "F,a,0,0,0,0,\n", "got 7 fields, want 6"),
    "24a": (HEADER + ROW + "F,a,0,0", "in.csv:3 (row 2): got 4 fields, want 6"),
    "24c": (HEADER + ROW + "F,a,0,0,0,0.", f"got '0.', {WANT_PIXEL}"),
    "24d": (HEADER + ROW + "F", "got 1 fields, want 6"),
    "26a": (HEADER + label_row('"a"x'), "is not CSV"),
    "26b": (HEADER + label_row('a"b'), "is not CSV"),
    "26c": (HEADER + 'F"",a,0,0,0,0\n', "is not CSV"),
    "27a": (b"", "has no data rows"),
    "27b": (b"\xef\xbb\xbf", "got the header ''"),
    "27c": (HEADER, "has no data rows"),
    "27d": ("\n\n\n", "got the header ''"),
    "29a": ((HEADER + ROW).encode("utf-16"), "UTF-16"),
    "29b": ((HEADER + ROW).encode("utf-16-be"), "NUL bytes"),
    "29c": ((HEADER + ROW).encode("utf-32"), "UTF-16 or UTF-32"),
    "29d": (HEADER.encode() + b"F\xe9,a,0,0,0,0\n", "UTF-8 (byte 0xe9 at byte 2 of the line)"),
    "29e": (HEADER.encode() + b"F,\xc0\x80,0,0,0,0\n", "is not UTF-8"),
    "29f": (HEADER.encode() + b"F,\xed\xa0\x80,0,0,0,0\n", "is not UTF-8"),
    "29g": (HEADER.encode() + b"F,a,0,\xff,0,0\n", "is not UTF-8"),
    "30b": ((HEADER + ROW).replace("\n", "\r"), "carriage return"),
    "30d": (HEADER + label_row('"a\r\nb"'), "a quote is not closed"),
    "30e": (HEADER + label_row('"a\rb"'), "carriage return"),
    "30f": (HEADER + "F,a,0,0,0,0\r\r\n", "carriage return"),
    "31a": (HEADER + ROW + "\n" + ROW, "3 (row 2): got 1 fields, want 6; delete the blank line"),
    "31d": (HEADER + ROW + "\n\n", "delete the blank line"),
    "31e": (HEADER + "\n" + ROW, "delete the blank line"),
    "32a": (ROW, "in.csv:1: got the header 'F,a,0,0,0,0' of 6 columns, want names,labels"),
    "32b": (HEADER + ROW + HEADER + ROW, "in.csv:3 (row 2): the header stands here again"),
    "32c": (HEADER.upper() + ROW, "got the header 'NAMES,"),
    "33a": ("labels,names,1,2,3,4\n" + ROW, "got the header"),
    "33b": ("names,labels,2,1,3,4\n" + ROW, "got the header"),
    "34a": ("names,labels,1,1,3,4\n" + ROW, "got the header"),
    "34b": ("names,labels,1,2,3,4,5\n" + ROW, "of 7 columns"),
    "34c": ("names,labels,0,1,2,3\n" + ROW, "got the header"),
    "35a": ((HEADER + ROW).replace(",", ";"), "separated by semicolons, write commas"),
    "35b": ((HEADER + ROW).replace(",", "\t"), "separated by tabs, write commas"),
    "35c": ("sep=,\n" + HEADER + ROW, "Excel separator line; delete"),
    "36a": (HEADER + "# remark\n" + ROW, "got 1 fields, want 6"),
    "36b": ("# remark\n" + HEADER + ROW, "a comment; delete it"),
    "37a": (b"\x89PNG\r\n\x1a\n" + bytes(99), "a PNG picture"),
    "37b": (b"PAR1" + bytes(99), "a Parquet file"),
    "37c": (b"<!DOCTYPE html>\n<title>log in", "an HTML page; log in and download again"),
    "37d": (b"ARROW1\0\0" + bytes(99), "an Arrow file"),
    "37e": (b"\x1f\x8b\x08\x00", "the compressed file ends too early"),
    "37f": (gzip.compress(os.urandom(99_999))[:-50_000], "the compressed file ends too early"),
    "37g": (b"PK\x03\x04rest", "the compressed file is damaged"),
    "38": (b"version https://git-lfs.github.com/spec/v1\noid sha256:0\n", "run git lfs pull"),
    "39a": (HEADER + ROW + "\0" * 5000 + ROW, "(row 2): holds a NUL byte at byte 1"),
    "39b": (bytes(5000), "NUL bytes"),
    "39c": (HEADER + ROW + "\0" * 5_000_000, "(row 2): holds a NUL byte at byte 1"),
    "40": (HEADER + "9" * 3_000_000, "in.csv:2 (row 1): is longer than 1048576 bytes"),
    "40b": (HEADER + ROW + '"' + "9," * 600_000 + "\n", "3 (row 2): is longer than 1048576 bytes"),
}  # fmt: skip


@pytest.mark.parametrize("case", REFUSED)
def test_what_is_refused_and_where(case: str, tmp_path: Path) -> None:
    data, text = REFUSED[case]
    with pytest.raises(UserError) as refused:
        packed(data, tmp_path)
    assert text in str(refused.value)
    assert "\n" not in str(refused.value)
    assert os.listdir(tmp_path) == ["in.csv"]
    try:
        _, faults, _ = check(tmp_path / "in.csv")  # finds the same
    except UserError as error:
        faults = [str(error)]
    assert str(refused.value) == faults[0]


def test_25_an_unclosed_quote_is_named_long_before_the_end(tmp_path: Path) -> None:
    rows = [ROW] * 9 + ['F,"a,0,0,0,0\n'] + [ROW] * 3_000_000
    (tmp_path / "in.csv").write_text(HEADER + "".join(rows))
    read: list[float] = []
    with pytest.raises(UserError, match=r"in.csv:11 \(row 10\): is not CSV: a quote is not closed"):
        pack(tmp_path / "in.csv", tmp_path / "out", progress=lambda _, part: read.append(part))
    assert max(read, default=0.0) < 0.5
    assert os.listdir(tmp_path) == ["in.csv"]


def test_37_archives(tmp_path: Path) -> None:
    def archive(*names: str) -> bytes:
        with zipfile.ZipFile(tmp_path / "z", "w", zipfile.ZIP_DEFLATED) as opened:
            for name in names:
                opened.writestr(name, HEADER + ROW)
        return (tmp_path / "z").read_bytes()

    assert len(packed(archive("../TMNIST.csv", "readme.txt"), tmp_path).split("train")) == 1
    os.rename(tmp_path / "out", tmp_path / "kept")
    for names, text in (
        (("xl/workbook.xml",), r"is an Excel workbook \(.xlsx\); save it as CSV"),
        (("a.csv", "b.csv"), "holds 2 CSV files"),
        (("inner.zip",), "holds 0 CSV files, but inner.zip; unpack"),
    ):
        with pytest.raises(UserError, match=text):
            packed(archive(*names), tmp_path)
    data = bytearray(archive("a.csv"))
    data[data.index(b"a.csv") + 5 + 4] ^= 1
    with pytest.raises(UserError, match="damaged|cannot be unpacked"):
        packed(bytes(data), tmp_path)
    data = bytearray(archive("a.csv"))
    for magic, offset in ((b"PK\x03\x04", 6), (b"PK\x01\x02", 8)):
        data[data.index(magic) + offset] |= 1  # says it is encrypted
    with pytest.raises(UserError, match="cannot be unpacked"):
        packed(bytes(data), tmp_path)


def test_41_42_too_few_or_too_many_classes(tmp_path: Path) -> None:
    (tmp_path / "in.csv").write_text(HEADER + ROW * 5)
    report = pack(tmp_path / "in.csv", tmp_path / "one", PackOptions(split="none"))
    assert "there is one class only" in report.warnings
    with pytest.raises(UserError, match="has 1 labels, want 94"):
        pack(tmp_path / "in.csv", tmp_path / "out", PackOptions(split="none", classes=94))
    (tmp_path / "few.csv").write_text(HEADER + ROW * 5 + label_row("b") * 2)
    with pytest.raises(UserError, match="the class 'b' has 2 rows, want at least 3"):
        pack(tmp_path / "few.csv", tmp_path / "out")
    (tmp_path / "many.csv").write_text(HEADER + "".join(label_row(f"l{i}") for i in range(257)))
    with pytest.raises(
        UserError,
        match=r"many.csv:258 \(row 257, .*\): more than 256 labels; are names and labels swap",
    ):
        pack(tmp_path / "many.csv", tmp_path / "out", PackOptions(split="none"))
    (tmp_path / "edge.csv").write_text(HEADER + "".join(label_row(f"l{i}") for i in range(256)))
    pack(tmp_path / "edge.csv", tmp_path / "edge", PackOptions(split="none"))
    assert open_records(tmp_path / "edge").split("train").label_N.max() == 255
    assert not (tmp_path / "out").exists()


def test_9_43_44_oddities_are_counted(tmp_path: Path) -> None:
    rows = (
        ROW * 3 + label_row("b") + "F,a,1,2,3,4\nG,a,1,2,3,4\nF, a,9,9,9,9\nF,b,255,255,255,255\n"
    )
    (tmp_path / "in.csv").write_text(HEADER + rows)
    report = pack(tmp_path / "in.csv", tmp_path / "out", PackOptions(split="none"))
    assert report.manifest["source_rows"] == {
        "rows": 8,
        "duplicates": 2,
        "under_several_labels": 1,
        "constant": 6,
    }
    assert any("begin or end with a space: ' a'" in warning for warning in report.warnings)
    assert check(tmp_path / "in.csv") == (8, [], report.warnings)


@pytest.mark.parametrize("end", ["", "\n", "\n\n", "\r\n\r\n"])
def test_56_the_end_at_every_place_in_a_block(end: str, tmp_path: Path) -> None:
    """Blocks of every size: the last bytes come alone, together, and not at all."""
    (tmp_path / "in.csv").write_bytes((HEADER + ROW * 3).rstrip("\n").encode() + end.encode())
    for block_bytes in range(1, 90):
        options = PackOptions(split="none", force=True, block_bytes=block_bytes, workers=1)
        report = pack(tmp_path / "in.csv", tmp_path / "out", options)
        assert report.manifest["source_rows"]["rows"] == 3
    (tmp_path / "in.csv").write_bytes((HEADER + ROW * 3 + "\n\n").encode())
    for block_bytes in range(1, 90):
        with pytest.raises(
            UserError, match=r"5 \(row 4\): got 1 fields, want 6; delete the blank line"
        ):
            pack(
                tmp_path / "in.csv",
                tmp_path / "out",
                PackOptions(force=True, block_bytes=block_bytes, workers=1),
            )


@pytest.mark.parametrize("num_rows", [1, 255, 256, 257, 4096])
def test_45_block_edges(num_rows: int, tmp_path: Path) -> None:
    text = HEADER + "".join(f"F,a,{i % 256},{i // 256}.0,0,0\n" for i in range(num_rows))
    image_NHW = packed(text, tmp_path).split("train").image_NHW.reshape(-1, 4).astype(int)
    assert np.array_equal(image_NHW[:, 0] + 256 * image_NHW[:, 1], np.arange(num_rows))


def test_46_a_file_that_changes_while_it_is_read(small_csv: Path, tmp_path: Path) -> None:
    def packs_while(change: Callable[[Path], object]) -> None:
        source = tmp_path / "in.csv"
        source.write_bytes(small_csv.read_bytes())
        with pytest.raises(UserError, match="changed while it was read"):
            pack(source, tmp_path / "out", progress=lambda rows, part: change(source))

    packs_while(lambda source: os.utime(source, ns=(0, 0)))
    packs_while(lambda source: os.truncate(source, source.stat().st_size - 1))
    packs_while(
        lambda source: (
            shutil.copy2(source, tmp_path / "other") and os.replace(tmp_path / "other", source)
        )
    )
    assert os.listdir(tmp_path) == ["in.csv"]


def test_47_what_is_no_file_never_blocks(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "fifo")
    os.symlink(tmp_path / "gone", tmp_path / "dangling")
    os.symlink(tmp_path / "loop", tmp_path / "loop")
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(tmp_path / "socket"))
        for name, text in (
            ("", "is a folder that holds no CSV, but dangling, fifo, loop"),
            ("fifo", "not a regular file but a FIFO"),
            ("socket", "No such device or address"),
            ("dangling", "No such file"),
            ("loop", "Too many levels"),
            ("/dev/zero", "not a regular file"),
            ("/dev/fd/99999999999", "cannot be read"),
            ("/dev/fd/987654", "Bad file descriptor"),
        ):
            with pytest.raises(UserError, match=text):
                pack(tmp_path / name, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def packed_from(name: str, out: Path, stdin: IO[bytes]) -> subprocess.CompletedProcess[str]:
    """The command on its standard input, by one of its names."""
    return forked(lambda: pack_tmnist.main([name, str(out)]), {}, stdin.fileno())


def packed_from_pipe(name: str, out: Path, data: bytes) -> subprocess.CompletedProcess[str]:
    with tempfile.NamedTemporaryFile() as file:
        file.write(data)
        file.flush()
        with subprocess.Popen(["cat", file.name], stdout=subprocess.PIPE) as source:
            assert source.stdout
            return packed_from(name, out, source.stdout)


def test_48_standard_input(small_csv: Path, small_dir: Path, tmp_path: Path) -> None:
    wanted = open_records(small_dir).fingerprint
    data = small_csv.read_bytes()
    for number, (name, content) in enumerate(
        [("-", data), ("-", gzip.compress(data)), ("/dev/stdin", data), ("/dev/fd/0", data)]
    ):
        done = packed_from_pipe(name, tmp_path / f"out{number}", content)
        assert done.returncode == 0, done.stderr
        assert open_records(tmp_path / f"out{number}").fingerprint == wanted
    done = packed_from_pipe("-", tmp_path / "cut", data[:-3000])
    assert done.returncode == 2 and "standard input" in done.stderr
    assert not (tmp_path / "cut").exists()


@pytest.mark.parametrize("name", ["-", "/dev/fd/0"])
def test_48_standard_input_that_is_a_file(
    name: str, small_csv: Path, small_dir: Path, tmp_path: Path
) -> None:
    with open(small_csv, "rb") as redirected:
        done = packed_from(name, tmp_path / "out", redirected)
    assert done.returncode == 0, done.stderr
    found = open_records(tmp_path / "out").fingerprint
    assert found == open_records(small_dir).fingerprint


def test_49_50_51_targets(small_csv: Path, tmp_path: Path, command: Command) -> None:
    (tmp_path / "file").write_text("x")
    for out, text in (
        (tmp_path / "file", "exists; give --force"),
        (tmp_path / "file" / "below", "cannot be written"),
        (tmp_path / "two\nlines", "that can be printed"),
        (tmp_path / ("x" * 255), "at most 200 bytes"),
        (tmp_path / "..", "name a new folder"),
        (Path("/proc/nowhere"), "cannot be written"),
    ):
        with pytest.raises(UserError, match=text):
            pack(small_csv, out)
    with pytest.raises(UserError, match="is no record directory"):
        pack(small_csv, tmp_path / "file", PackOptions(force=True))
    assert_refused(command("tools/pack_tmnist", small_csv), "name the record directory")
    assert_refused(
        command("tools/pack_tmnist", tmp_path / "gone.csv", tmp_path / "out"),
        "gone.csv: cannot be read",
    )
    assert os.listdir(tmp_path) == ["file"]
    pack(small_csv, tmp_path / "new" / "folder" / "-rf")
    assert open_records(tmp_path / "new" / "folder" / "-rf")


def test_55_56_60_neither_blocks_nor_workers_nor_surroundings_show(
    small_csv: Path, tmp_path: Path
) -> None:
    text = (
        small_csv.read_text()
        .replace("Font01-Bold[wght]", '"Fo,nt""é\U0001f600"')
        .replace("Font02-Bold[wght]", '"0,2"')
    )
    source = tmp_path / "in.csv"
    source.write_bytes(text.replace("\n", "\r\n").encode())

    def content(folder: Path) -> dict[str, bytes]:
        return {file.name: file.read_bytes() for file in sorted(folder.iterdir())}

    pack(source, tmp_path / "whole", PackOptions(workers=1, block_bytes=2**24))
    wanted = content(tmp_path / "whole")
    for number, (workers, block_bytes) in enumerate(
        [(1, 4096), (8, 4097), (3, 5001), (8, 100_000)]
    ):
        pack(source, tmp_path / f"{number}", PackOptions(workers=workers, block_bytes=block_bytes))
        assert content(tmp_path / f"{number}") == wanted
    code = (
        "import sys, pathlib; from engine.data.pack import pack; "
        "pack(*map(pathlib.Path, sys.argv[1:]))"
    )
    os.utime(source, (0, 0))
    for number, variables in enumerate(
        [
            {"LC_ALL": "de_DE.UTF-8", "PYTHONHASHSEED": "1"},
            {"LC_ALL": "C", "PYTHONHASHSEED": "2", "PYTHONUTF8": "0"},
        ]
    ):
        out = tmp_path / f"process{number}"
        line = f"umask 0{number}77; exec {sys.executable} -c '{code}' '{source}' '{out}'"
        subprocess.run(["sh", "-c", line], env=os.environ | variables, check=True, timeout=60)
        assert content(out) == wanted
        assert (out / "manifest.json").stat().st_mode & 0o777 == 0o666 & ~int(f"0{number}77", 8)


def test_57_58_spelling_does_not_change_the_records_and_order_does(
    small_csv: Path, tmp_path: Path
) -> None:
    floats = small_csv.read_text()
    (tmp_path / "int.csv").write_text(floats.replace(".0,", ",").replace(".0\n", "\n"))
    lines = floats.splitlines(keepends=True)
    (tmp_path / "other.csv").write_text("".join(lines[:1] + lines[:0:-1]))
    first, same, other = (
        pack(source, tmp_path / source.stem).manifest
        for source in (small_csv, tmp_path / "int.csv", tmp_path / "other.csv")
    )
    assert same == first
    assert other["fingerprint"] != first["fingerprint"]
    assert all(
        other["splits"][n]["rows_per_class"] == s["rows_per_class"]
        for n, s in first["splits"].items()
    )


def test_check_lists_every_fault_up_to_a_hundred(tmp_path: Path, command: Command) -> None:
    source = tmp_path / "in.csv"
    source.write_text(
        HEADER + ROW + pixel_row("256") + ROW + label_row("") + ROW + "\n" + label_row("\x07")
    )
    done = command("tools/pack_tmnist", "--check", source)
    assert done.returncode == 2
    places = [line.split("):")[0].split("in.csv:")[1] for line in done.stdout.splitlines()[:4]]
    assert places == [
        "3 (row 2, column 4 '2'",
        "5 (row 4, column 2 'labels'",
        "7 (row 6",
        "8 (row 7, column 2 'labels'",
    ]
    assert done.stdout.endswith("7 rows, 4 faults\n")
    source.write_text(HEADER + pixel_row("256") * 300)
    _, faults, notes = check(source)
    assert len(faults) == 100 and notes == ["only the first 100 faults are listed"]
    source.write_text(HEADER + ROW)
    assert command("tools/pack_tmnist", "--check", source).returncode == 0


def test_two_threads_may_pack_at_once(small_csv: Path, tmp_path: Path) -> None:
    outs = [tmp_path / name for name in "abc"]
    threads = [threading.Thread(target=pack, args=(small_csv, out)) for out in outs]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len({open_records(out).fingerprint for out in outs}) == 1
