"""CSVs with columns elsewhere give the records of the same rows in the lexer's own order."""

import gzip
import random
import time
from pathlib import Path

import pytest

from engine.data import arrange as arranging
from engine.data.arrange import moved_first
from engine.data.lexer import Fault, read_header, read_row, split_fields
from engine.data.pack import PackOptions, check, pack
from engine.errors import UserError
from tests.conftest import Command, assert_refused
from tests.glyph_files import content, glyphs
from tests.reliability.mutants import mutated, row

LABELS = ("a", '"b,c"', '"d""e"', "é")
GRID = [f"{row}x{column}" for row in range(1, 9) for column in range(1, 9)]


def table(place: int, index: bool = False, header: list[str] | None = None) -> str:
    """60 rows with the label in this place, from 0 on; 64: behind the pixels."""
    drawn = glyphs()
    lines = []
    if header is not None:
        names = [*header[:place], "digit", *header[place:]]
        lines.append(",".join(["", *names] if index else names))
    for number, (label, image_HW) in enumerate(zip(drawn.label_N, drawn.image_NHW, strict=True)):
        fields = [str(pixel) for pixel in image_HW.ravel().tolist()]
        fields.insert(place, LABELS[label])
        lines.append(",".join([str(number), *fields] if index else fields))
    return "\n".join(lines) + "\n"


@pytest.fixture(scope="module")
def wanted(tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    """The records of the rows in the lexer's own order."""
    folder = tmp_path_factory.mktemp("wanted")
    header = ",".join(["label", *(f"pixel{p}" for p in range(64))])
    (folder / "a.csv").write_text(header + "\n" + table(0))
    pack(folder / "a.csv", folder / "out")
    return content(folder / "out")


def pixels(prefix: str, first: int) -> list[str]:
    return [f"{prefix}{first + i}" for i in range(64)]


FORMS: dict[str, tuple[str, PackOptions]] = {
    "no header": (table(0), PackOptions(no_header=True)),
    "last": (table(64, header=pixels("pixel", 0)), PackOptions(label_column="last")),
    "last, no header": (table(64), PackOptions(label_column="last", no_header=True)),
    "last by number": (table(64), PackOptions(label_column="65", no_header=True)),
    "third": (table(2, header=pixels("", 1)), PackOptions(label_column="3")),
    "index": (table(0, True, pixels("", 0)), PackOptions(index_column=True)),
    "index, last": (
        table(64, True, GRID),
        PackOptions(index_column=True, label_column="last"),
    ),
    "index, no header": (table(0, True), PackOptions(index_column=True, no_header=True)),
    "index, third": (
        table(1, True),
        PackOptions(index_column=True, no_header=True, label_column="3"),
    ),
}


@pytest.mark.parametrize("chunk_bytes", [97, 2**20])
@pytest.mark.parametrize("form", FORMS)
def test_every_form_gives_the_same_records(
    form: str,
    chunk_bytes: int,
    wanted: dict[str, bytes],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Lines that end anywhere in a chunk, CRLF, a byte order mark, no line end at last, in gzip."""
    monkeypatch.setattr(arranging, "CHUNK_BYTES", chunk_bytes)
    text, options = FORMS[form]
    spellings = (
        text.encode(),
        b"\xef\xbb\xbf" + text[:-1].replace("\n", "\r\n").encode(),
        gzip.compress(text.encode() + b"\n"),
    )
    for number, data in enumerate(spellings):
        (tmp_path / "a.csv").write_bytes(data)
        pack(tmp_path / "a.csv", tmp_path / f"{number}", options)
        assert content(tmp_path / f"{number}") == wanted


def test_a_header_of_rows_and_columns_needs_no_flag(
    wanted: dict[str, bytes], tmp_path: Path
) -> None:
    (tmp_path / "a.csv").write_text(",".join(["label", *GRID]) + "\n" + table(0))
    report = pack(tmp_path / "a.csv", tmp_path / "out")
    assert content(tmp_path / "out") == wanted
    assert report.found == [
        f"CSV, columns label and 1x1..8x8, images of 8 x 8: {tmp_path / 'a.csv'}"
    ]


def test_what_was_taken_is_said(tmp_path: Path) -> None:
    (tmp_path / "a.csv").write_text(table(64, True, GRID))
    options = PackOptions(index_column=True, label_column="last")
    assert pack(tmp_path / "a.csv", tmp_path / "out", options).found == [
        "CSV with a header, the first column left out, labels in column 66 'digit', "
        f"images of 8 x 8 in the others: {tmp_path / 'a.csv'}"
    ]


def test_a_moved_field_is_the_one_that_the_language_sees() -> None:
    """On mutated lines: a moved line is accepted if, and as, its fields in the other order are."""
    rng = random.Random(0)
    layout = read_header(b"label,pixel0,pixel1,pixel2,pixel3\n")
    verdicts = {"accepted": 0, "refused": 0}
    for _ in range(20_000):
        place = rng.randrange(5)
        fields = row(rng, 0, 4).split(",")
        fields.insert(place, rng.choice((*LABELS, "7", '"7"')))
        line = mutated(rng, ",".join(fields).encode() + rng.choice((b"", b"\r")))
        line = line.partition(b"\n")[0]
        try:
            moved = split_fields(line)
            moved.insert(0, moved.pop(place) if place < len(moved) else "")
            plain = ",".join('"' + field.replace('"', '""') + '"' for field in moved)
            wanted = read_row(plain.encode(), layout)
        except Fault:
            wanted = None
        try:
            found = read_row(moved_first(line, place, 4), layout)
        except Fault:
            found = None
        assert found == wanted, (line, place)
        verdicts["accepted" if found else "refused"] += 1
    assert min(verdicts.values()) > 4000


def test_a_line_of_quotes_takes_no_longer_than_another() -> None:
    line = b'"' + b'""' * 2**14 + b"x"
    start = time.perf_counter()
    assert moved_first(line, 1, 4) == line
    assert time.perf_counter() - start < 2


LAST = PackOptions(label_column="last", no_header=True)
BOTH = PackOptions(label_column="last", index_column=True)
FAULTS: dict[str, tuple[str, PackOptions, str]] = {
    "a pixel": ("0,0,0,0,a\n0,0,256,0,a\n", LAST, "a.csv:2 (row 2, column 3): got '256', want an"),
    "a label": ("0,0,0,0,a\n0,0,0,0,\n", LAST, "a.csv:2 (row 2, column 5): is empty, want text"),
    "a named pixel": (
        ",0,1,2,3,digit\n0,0,0,0,0,a\n1,0,0,0,x,a\n",
        BOTH,
        "a.csv:3 (row 2, column 5 '3'): got 'x', want",
    ),
    "a header": ("0,1,2,3,label\n0,0,0,0,a\n", LAST, "a.csv:1 (row 1): the header stands here"),
    "another header": ("a,b,c,d,e\n0,0,0,0,a\n", LAST, "a.csv:1 (row 1, column 1): got 'a', want"),
    "a field less": ("0,0,0,0,a\n0,0,0,a\n", LAST, "a.csv:2 (row 2): got 4 fields, want 5"),
    "a pixel less": (",0,1,2,3,n\n0,0,0,0,a\n", BOTH, "a.csv:2 (row 1): got 4 fields, want 5"),
    "no row number": (",0,1,2,3,n\n0,0,0,0,0,a\nx,0,0,0,0,a\n", BOTH, "3 (row 2, column 1): got"),
    "only a row number": (",0,1,2,3,n\n0\n", BOTH, "got '0', want a row number; is there no"),
    "a NUL": ("0,0,0,0,a\n0,0\0,0,0,a\n", LAST, "(row 2): holds a NUL byte at byte 4 of the line"),
    "a quote": ('0,0,0,0,a\n0,0,0,0,"a\n', LAST, "(row 2): is not CSV: a quote is not closed"),
    "a blank line": ("0,0,0,0,a\n\n0,0,0,0,a\n", LAST, "(row 2): got 1 fields, want 5; delete"),
    "a long line": ("0,0,0,0,a\n" + "9" * 3_000_000, LAST, "(row 2): is longer than 1048576 bytes"),
    "no rows": (",0,1,2,3,n\n", BOTH, "has no data rows"),
    "nothing": ("", LAST, "a.csv:1: got 1 columns, of them the label and 0 pixels"),
    "no square": ("0,0,0,a\n", LAST, "got 4 columns, of them the label and 3 pixels, want"),
    "too far": ("0,0,0,0,a\n", PackOptions(label_column="6", no_header=True), "label in column 6"),
    "the index": (",0,1,2,3,n\n", PackOptions(index_column=True, label_column="1"), "in column 1"),
    "other names": ("a,b,c,d,n\n", PackOptions(label_column="last"), "are called 'a' to 'd', want"),
    "another order": ("1,0,2,3,n\n", PackOptions(label_column="last"), "in this order; rename"),
    "no index": ("id,0,1,2,3,n\n", BOTH, "the first column is called 'id', want row numbers"),
    "many labels": (
        "".join(f"0,0,0,0,{i}\n" for i in range(257)),
        LAST,
        "a.csv:257 (row 257, column 5): more than 256 labels; is the column an id",
    ),
    "alike": ("0,0,0,0,é\n0,0,0,0,e\u0301\n", LAST, "(row 2, column 5): 'é' looks like"),
}  # fmt: skip


@pytest.mark.parametrize("case", FAULTS)
def test_a_fault_is_named_where_it_stands_in_the_file(case: str, tmp_path: Path) -> None:
    text, options, wanted = FAULTS[case]
    (tmp_path / "a.csv").write_text(text, newline="")
    with pytest.raises(UserError) as refused:
        pack(tmp_path / "a.csv", tmp_path / "out", options)
    assert wanted in str(refused.value).replace("e\u0301", "é")
    assert not (tmp_path / "out").exists()


def test_check_lists_faults_by_line_and_goes_on_behind_them(tmp_path: Path) -> None:
    (tmp_path / "a.csv").write_text("0,0,0,0,a\n0,0,x,0,a\n0,0,0,0,b\n0,y,0,0,a\n")
    num_rows, faults, _ = check(tmp_path / "a.csv", LAST)
    places = [fault.split("):")[0].split("a.csv:")[1] for fault in faults]
    assert (num_rows, places) == (4, ["2 (row 2, column 3", "4 (row 4, column 2"])


NUMBERED = PackOptions(index_column=True, no_header=True)


def test_a_wrong_row_number_is_a_fault_of_its_row(tmp_path: Path) -> None:
    """What is read ahead is reported in its place, and a quoted number is one."""
    lines = ["0,a,0,0,0,256", '"1",a,0,0,0,0', "x,a,0,0,0,0", "3,a,0,0,0,-1", '"4,a,0,0,0,0', "5"]
    (tmp_path / "a.csv").write_text("\n".join(lines) + "\n")
    wanted = [
        "1 (row 1, column 6): got '256', want an integer",
        "3 (row 3, column 1): got 'x', want a row number; is there no index column?",
        "4 (row 4, column 6): got '-1', want an integer",
        "5 (row 5, column 1): got '\"4', want a row number",
        "6 (row 6, column 1): got '5', want a row number",
    ]
    num_rows, faults, _ = check(tmp_path / "a.csv", NUMBERED)
    assert num_rows == 6 and len(faults) == 5
    for fault, text in zip(faults, wanted, strict=True):
        assert fault.startswith(f"{tmp_path / 'a.csv'}:{text}")
    with pytest.raises(UserError, match="row 1, column 6"):
        pack(tmp_path / "a.csv", tmp_path / "out", NUMBERED)
    (tmp_path / "b.csv").write_text("0,a,0,0,0,0\n" + "x,a,0,0,0,0\n" * 300_000)
    num_rows, faults, notes = check(tmp_path / "b.csv", NUMBERED)
    assert (num_rows, len(faults), len(notes)) == (101, 100, 1)
    assert "(row 101, column 1): got 'x'" in faults[-1]


def test_foreign_files_and_needless_flags_are_named(tmp_path: Path, command: Command) -> None:
    out = tmp_path / "out"
    (tmp_path / "a.csv").write_bytes(b"%PDF-1.7\n")
    flags = ["--no-header", "--label-column=last"]
    assert_refused(command("tools/pack_tmnist", *flags, tmp_path / "a.csv", out), "a PDF document")
    pair = glyphs().idx(tmp_path)
    assert_refused(command("tools/pack_tmnist", *flags, *pair, out), "is idx, but --label-column")
    csv = glyphs().csv(tmp_path / "b.csv")
    for words, text in (
        (["--label-column=0"], "--label-column: got '0', want first, last or a number"),
        (["--images=x"], "is csv, but --images and --labels are of npz"),
    ):
        assert_refused(command("tools/pack_tmnist", *words, csv, out), text)
