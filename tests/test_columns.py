"""Parquet and Arrow become the records that a CSV of the same rows becomes, or are refused."""

import io
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from pyarrow import feather, parquet

from engine.data import images
from engine.data.pack import PackOptions, check, pack
from engine.data.records import open_records
from engine.errors import UserError
from tests.conftest import Command, assert_refused
from tests.glyph_files import content, glyphs

DRAWN = glyphs()
LABELS = DRAWN.label_N
NUM = len(LABELS)
FLAT = DRAWN.image_NHW.reshape(NUM, -1)


def as_png(image_HW: np.ndarray) -> bytes:
    out = io.BytesIO()
    Image.fromarray(image_HW).save(out, "PNG")
    return out.getvalue()


CELLS = [row.tobytes() for row in FLAT]
PNGS = [as_png(image_HW) for image_HW in DRAWN.image_NHW]
COLUMNS: dict[str, pa.Array] = {
    "binary": pa.array(CELLS, pa.binary()),
    "large binary": pa.array(CELLS, pa.large_binary()),
    "binary view": pa.array(CELLS, pa.binary_view()),  # as polars writes bytes
    "fixed binary": pa.array(CELLS, pa.binary(64)),
    "list of uint8": pa.array(FLAT.tolist(), pa.list_(pa.uint8())),
    "list of int64": pa.array(FLAT.tolist(), pa.list_(pa.int64())),
    "large list": pa.array(FLAT.tolist(), pa.large_list(pa.int16())),
    "fixed list": pa.array(FLAT.tolist(), pa.list_(pa.uint8(), 64)),
    "lists of rows": pa.array(DRAWN.image_NHW.tolist(), pa.list_(pa.list_(pa.uint8()))),
    "PNGs": pa.array(PNGS, pa.binary()),
    "Hugging Face's": pa.array([{"bytes": png, "path": "x.png"} for png in PNGS]),
}
LABEL_COLUMNS: dict[str, pa.Array] = {
    "uint8": pa.array(LABELS),
    "int64": pa.array(LABELS.astype(int)),
    "text view": pa.array([str(label) for label in LABELS], pa.string_view()),
    "text": pa.array([str(label) for label in LABELS]),
    "dictionary": pa.DictionaryArray.from_arrays(
        pa.array((LABELS + 1).astype(np.int8)), pa.array(["unused", "0", "1", "2"])
    ),
}
WRITERS: dict[str, Callable[[pa.Table, Path], object]] = {
    "parquet": lambda table, path: parquet.write_table(table, path, row_group_size=25),
    "arrow": lambda table, path: feather.write_feather(table, path, chunksize=25),
    "stream": lambda table, path: stream(table, path),
}


def stream(table: pa.Table, path: Path) -> None:
    with pa.ipc.new_stream(path, table.schema) as writer:
        writer.write_table(table, max_chunksize=25)


@pytest.fixture(scope="module")
def wanted(tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    folder = tmp_path_factory.mktemp("wanted")
    pack(DRAWN.csv(folder / "a.csv"), folder / "out")
    return content(folder / "out")


@pytest.mark.parametrize("writer", WRITERS)
def test_every_column_gives_the_records_of_its_csv(
    writer: str, wanted: dict[str, bytes], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(images, "BLOCK_BYTES", 7 * 64)
    pairs = [(column, LABEL_COLUMNS["uint8"]) for column in COLUMNS.values()]
    pairs += [(COLUMNS["binary"], column) for column in LABEL_COLUMNS.values()]
    for number, (image, label) in enumerate(pairs):
        WRITERS[writer](pa.table({"id": np.ones(NUM), "x": image, "y": label}), tmp_path / "in")
        pack(tmp_path / "in", tmp_path / f"{number}", PackOptions(workers=2))
        assert content(tmp_path / f"{number}") == wanted, (image.type, label.type)


def test_what_was_taken_is_said_and_several_files_follow_each_other(tmp_path: Path) -> None:
    paths = [tmp_path / "a", tmp_path / "b"]
    parquet.write_table(DRAWN.table().slice(0, 31), paths[0])
    parquet.write_table(DRAWN.table().slice(31), paths[1])
    report = pack(paths, tmp_path / "out", PackOptions(split="none"))
    said = "images of 8 x 8 in the column 'image' of"
    assert report.found[0] == f"parquet, 31 {said} {paths[0]}, their labels in 'label'"
    assert np.array_equal(open_records(tmp_path / "out").split("train").image_NHW, DRAWN.image_NHW)
    feather.write_feather(DRAWN.table(), tmp_path / "c")
    found = pack(tmp_path / "c", tmp_path / "out2").found
    assert found == [f"arrow, {said} {tmp_path / 'c'}, their labels in 'label'"]


def test_names_choose_among_several_columns(tmp_path: Path) -> None:
    table = DRAWN.table().append_column("writer", pa.array(np.arange(NUM) % 5))
    parquet.write_table(table, tmp_path / "in")
    with pytest.raises(UserError, match="'label', 'writer' may be the labels; say which with --l"):
        check(tmp_path / "in")
    pack(tmp_path / "in", tmp_path / "out", PackOptions(labels="writer"))
    assert open_records(tmp_path / "out").classes == ("0", "1", "2", "3", "4")


def test_files_of_records_are_sources_too(tmp_path: Path, small_dir: Path) -> None:
    source = small_dir / "val-00000.arrow"
    pack(source, tmp_path / "out", PackOptions(split="none", labels="label"))
    found, wanted = open_records(tmp_path / "out"), open_records(small_dir)
    assert found.classes == wanted.classes
    for name in ("image_NHW", "label_N"):
        arrays = [getattr(found.split("train"), name), getattr(wanted.split("val"), name)]
        assert np.array_equal(*arrays)


def table(image: Any = COLUMNS["binary"], label: Any = LABELS, **more: Any) -> pa.Table:
    return pa.table({"image": image, "label": label, **more})


def with_cell(column: str, cell: Any) -> pa.Array:
    """A column whose 41st cell is replaced."""
    cells = COLUMNS[column].to_pylist()
    cells[40] = cell
    return pa.array(cells, COLUMNS[column].type)


ROW = FLAT[0].tolist()
REFUSED: dict[str, tuple[pa.Table, str]] = {
    "no images": (pa.table({"label": LABELS}), "that may be the images: 'label' is of"),
    "no labels": (table().select(["image"]), "that may be the labels: 'image' is of"),
    "texts": (table(pa.array(["x"] * NUM)), "the column 'image' is of string, want bytes or lists"),
    "floats": (table(pa.array((FLAT / 255).tolist())), "want integers 0..255 in the lists"),
    "a struct": (table(pa.array([{"path": "x"}] * NUM)), "is of struct<path: string>, want bytes"),
    "float labels": (table(label=LABELS / 2), "'label' is of double, want integers or texts"),
    "a null image": (table(with_cell("binary", None)), "image 41: it is null; drop the row"),
    "a null struct": (table(with_cell("Hugging Face's", None)), "image 41: it is null; drop"),
    "null bytes": (
        table(with_cell("Hugging Face's", {"bytes": None, "path": "x"})),
        "image 41: it is null; drop",
    ),
    "a null pixel": (table(with_cell("list of uint8", [None] * 64)), "image 41: holds a null"),
    "a null label": (
        table(label=pa.array([1] * 40 + [None] + [1] * (NUM - 41))),
        "image 41: its label is null",
    ),
    "null in a dictionary": (
        table(label=pa.DictionaryArray.from_arrays(LABELS.astype(np.int8), ["a", "b", None])),
        "image 3: its label is null",
    ),
    "only nulls": (table(pa.nulls(NUM, pa.binary())), "image 1: it is null"),
    "a short image": (table(with_cell("binary", b"x" * 63)), "image 41: has 63 pixels, but the fi"),
    "a short list": (table(with_cell("list of uint8", ROW[:9])), "image 41: has 9 pixels, but"),
    "a short row": (
        table(with_cell("lists of rows", [ROW[:8]] * 7 + [ROW[:7]])),
        "image 41: has 8 x 7 pixels, but the first image 8 x 8; scale or pad all",
    ),
    "a null row": (
        table(with_cell("lists of rows", [ROW[:8]] * 7 + [None])),
        "image 41: a row of it is null; fill it",
    ),
    "an oblong of lists": (
        table(with_cell("lists of rows", [ROW[:4]] * 16)),
        "image 41: has 16 x 4 pixels, but the first image 8 x 8",
    ),
    "too many rows": (
        table(with_cell("lists of rows", [ROW[:8]] * 9)),
        "image 41: has 9 x 8 pixels, but the first image 8 x 8",
    ),
    "no rows of pixels": (table(with_cell("lists of rows", [])), "41: has 0 x 0 pixels, but the f"),
    "oblongs of lists": (
        table(pa.array(DRAWN.image_NHW.reshape(NUM, 16, 4).tolist())),
        "image 1: holds images of 16 x 4 pixels, want square ones; pad or cut each",
    ),
    "no square": (table(pa.array([b"x" * 60] * NUM)), "image 1: has 60 pixels, want a square"),
    "empty": (table(pa.array([b""] * NUM)), "image 1: has 0 pixels, want a square number"),
    "large values": (
        table(with_cell("list of int64", [256, *ROW[1:]])),
        "to 256, want 0..255; scale them",
    ),
    "negative values": (
        table(with_cell("list of int64", [-1, *ROW[1:]])),
        "image 41: holds pixels from -1 to",
    ),
    "RGB": (table(with_cell("PNGs", as_png(np.zeros((8, 8, 3), np.uint8)))), "41: is RGB, want"),
    "another size": (table(with_cell("PNGs", as_png(FLAT[:9, :9]))), "41: has 9 x 9 pixels, but i"),
    "a JPEG": (table(with_cell("PNGs", b"\xff\xd8\xff" + bytes(50))), "41: is a JPEG picture"),
    "257 labels": (
        pa.table({"image": [b"x" * 16] * 300, "label": np.arange(300)}),
        "image 257: more than 256 labels; are they row numbers",
    ),
    "an empty label": (table(label=pa.array([""] * NUM)), "the label '' is empty, want text"),
    "a control": (table(label=pa.array(["a\x07"] * NUM)), "holds the control character U+0007"),
    "no rows": (table().slice(0, 0), "without a row; write some"),
    "a label twice": (
        pa.Table.from_arrays([COLUMNS["binary"], pa.array(LABELS), pa.array(LABELS)],
                             ["image", "label", "label"]),
        "may be the labels; say which",
    ),
}  # fmt: skip


CASES = [(case, writer) for case in REFUSED for writer in ("parquet", "arrow")]
CASES.remove(("null in a dictionary", "parquet"))  # pyarrow does not write it


@pytest.mark.parametrize(("case", "writer"), CASES)
def test_what_is_refused_and_where(case: str, writer: str, tmp_path: Path) -> None:
    rows, text = REFUSED[case]
    WRITERS[writer](rows, tmp_path / "in")
    with pytest.raises(UserError) as refused:
        pack(tmp_path / "in", tmp_path / "out")
    assert text in str(refused.value) and "\n" not in str(refused.value)
    assert os.listdir(tmp_path) == ["in"]


GOOD: dict[str, bytes] = {}
for writer in ("parquet", "arrow"):
    out = pa.BufferOutputStream()
    WRITERS[writer](table(), out)
    GOOD[writer] = out.getvalue().to_pybytes()


@pytest.mark.parametrize("writer", GOOD)
@settings(max_examples=120, deadline=None)
@given(data=st.data())
def test_damaged_files_end_in_one_line(
    writer: str, data: st.DataObject, tmp_path_factory: pytest.TempPathFactory
) -> None:
    """Cut anywhere, or bytes written over: refused, or read without a crash."""
    good = GOOD[writer]
    place = data.draw(st.integers(0, len(good) - 1))
    noise = data.draw(st.binary(max_size=6))
    damaged = good[:place] + noise + good[place + len(noise) :] if noise else good[:place]
    path = tmp_path_factory.mktemp("damaged") / "in"
    path.write_bytes(damaged)
    try:
        num_rows, faults, _ = check(path, PackOptions(layout=writer))
    except UserError as error:
        assert "\n" not in str(error)
    else:
        assert num_rows <= NUM or faults


def test_a_column_that_is_there_twice_is_refused(tmp_path: Path) -> None:
    """Also where a name says which of several is meant."""
    parquet.write_table(REFUSED["a label twice"][0], tmp_path / "in")
    with pytest.raises(UserError, match="holds the column 'label' twice; rename one"):
        pack(tmp_path / "in", tmp_path / "out", PackOptions(labels="label"))


def declaring(total: int, group: int) -> bytes:
    """A Parquet file of 60 rows whose footer says `total`, and of its one group of rows `group`."""
    out = pa.BufferOutputStream()
    parquet.write_table(table(), out)
    data = out.getvalue().to_pybytes()
    stop = len(data) - 8
    start = stop - int.from_bytes(data[stop : stop + 4], "little")
    footer = data[start:stop]
    said = b"\x16" + bytes([2 * NUM])  # a 64-bit integer of Thrift's compact protocol
    first, last = footer.index(said) + 1, footer.rindex(said) + 1
    changed = bytearray(footer)
    changed[first] = 2 * total
    changed[last] = 2 * group
    return data[:start] + bytes(changed) + data[stop:]


@pytest.mark.parametrize(("total", "group"), [(0, 60), (60, 16), (16, 60)])
def test_a_footer_that_counts_wrong_is_refused(total: int, group: int, tmp_path: Path) -> None:
    (tmp_path / "in").write_bytes(declaring(NUM, NUM))
    assert check(tmp_path / "in")[0] == NUM
    (tmp_path / "in").write_bytes(declaring(total, group))
    with pytest.raises(UserError, match=rf"declares {total} images, but \d+ are in it; write it"):
        pack(tmp_path / "in", tmp_path / "out")


def test_a_flipped_pixel_of_a_page_with_a_checksum_is_seen(tmp_path: Path) -> None:
    parquet.write_table(
        table(), tmp_path / "in", write_page_checksum=True, compression="none", use_dictionary=False
    )
    data = bytearray((tmp_path / "in").read_bytes())
    data[data.index(CELLS[40]) + 9] ^= 1
    (tmp_path / "in").write_bytes(data)
    with pytest.raises(UserError, match="is a Parquet file that cannot be read .*CRC"):
        pack(tmp_path / "in", tmp_path / "out")


def test_the_command_refuses_in_one_line(tmp_path: Path, command: Command) -> None:
    parquet.write_table(REFUSED["a null image"][0], tmp_path / "in.parquet")
    done = command("tools/pack_tmnist", tmp_path / "in.parquet", tmp_path / "out")
    assert_refused(done, "in.parquet: image 41: it is null")
    parquet.write_table(table(), tmp_path / "in.parquet")
    done = command("tools/pack_tmnist", tmp_path / "in.parquet", tmp_path / "out")
    assert done.returncode == 0 and "read as parquet, 60 images of 8 x 8 in" in done.stdout
