"""Typefaces -> CSV: characters in place and size, unusable files counted; the packer takes it."""

import io
import shutil
from pathlib import Path

import numpy as np
import pytest
from fontTools import subset
from fontTools.ttLib import TTCollection, TTFont
from PIL import ImageFont

from engine.data.pack import PackOptions, pack
from engine.data.records import open_records
from engine.errors import UserError
from tests.conftest import Command, assert_refused
from tools.render_glyphs import CHARACTERS, check_out, draw_typeface, font_files, render


@pytest.fixture
def fonts(tmp_path: Path) -> Path:
    """A folder with a typeface (the one inside Pillow), and with all that cannot be used."""
    folder = tmp_path / "fonts"
    (folder / "below").mkdir(parents=True)
    aileron = ImageFont.load_default(20).path
    (folder / "Aileron-Regular.ttf").write_bytes(aileron.getvalue())  # type: ignore[union-attr]
    shutil.copy(folder / "Aileron-Regular.ttf", folder / "below" / "Other,Name-Bold.OTF")
    shutil.copy(folder / "Aileron-Regular.ttf", folder / "below" / "Aileron-Regular.ttf")
    (folder / "broken.ttf").write_bytes((folder / "Aileron-Regular.ttf").read_bytes()[:5000])
    (folder / "empty.otf").write_bytes(b"")
    (folder / "readme.txt").write_text("no font")
    with TTFont(folder / "Aileron-Regular.ttf") as font:
        cutter = subset.Subsetter()
        cutter.populate(text="".join(CHARACTERS[:-1]))
        cutter.subset(font)
        font.save(folder / "NoTilde.ttf")
    return folder


def test_a_folder_becomes_a_csv_that_packs(fonts: Path, tmp_path: Path, command: Command) -> None:
    done = command("tools/render_glyphs", fonts, tmp_path / "out.csv")
    assert done.returncode == 0, done.stderr
    head, _, skipped = done.stdout.strip().partition("; skipped: ")
    assert head.endswith("out.csv: 2 typefaces")
    assert sorted(skipped.split(", ")) == [
        "1 lacking characters",
        "1 with the name of another",
        "2 unreadable",
    ]
    pack(tmp_path / "out.csv", tmp_path / "records", PackOptions(split="none"))
    records = open_records(tmp_path / "records")
    assert records.fonts == ("Aileron-Regular", "Other,Name-Bold")
    assert records.classes == tuple(CHARACTERS) and len(records.split("train")) == 2 * 94
    assert_refused(
        command("tools/render_glyphs", fonts, tmp_path / "out.csv"), "exists; give --force"
    )


def test_glyphs_are_twenty_pixels_long_centred_and_smooth(fonts: Path) -> None:
    images, why = draw_typeface(fonts / "Aileron-Regular.ttf")
    assert why == "drawn"
    for image_HW in images:
        rows, columns = (np.flatnonzero(image_HW.max(axis)) for axis in (1, 0))
        assert max(len(rows), np.ptp(rows) + 1, np.ptp(columns) + 1) in (19, 20)
        assert abs(rows[0] - (27 - rows[-1])) <= 1 and abs(columns[0] - (27 - columns[-1])) <= 1
        assert image_HW.dtype == np.uint8 and image_HW.max() > 150
    glyph = dict(zip(CHARACTERS, images, strict=True))
    assert len({image_HW.tobytes() for image_HW in images}) > 85
    assert len(np.unique(glyph["O"])) > 20  # anti-aliased
    assert glyph["|"].sum() < glyph["#"].sum() and np.ptp(np.flatnonzero(glyph["-"].max(0))) > 15
    upper, lower = glyph["L"][4:12].sum(), glyph["L"][16:24].sum()
    assert lower > 1.3 * upper  # the right way up


def test_what_cannot_be_drawn_is_said(fonts: Path, tmp_path: Path, command: Command) -> None:
    out = tmp_path / "out.csv"
    assert_refused(
        command("tools/render_glyphs", tmp_path / "gone", out), "gone: no such file or folder"
    )
    assert_refused(
        command("tools/render_glyphs", fonts / "NoTilde.ttf", out),
        "none of 1 font files can be drawn (1 lacking characters)",
    )
    (tmp_path / "none").mkdir()
    assert_refused(
        command("tools/render_glyphs", tmp_path / "none", out), "holds no .ttf or .otf file"
    )
    assert_refused(
        command("tools/render_glyphs", fonts, tmp_path / "no" / "folder.csv"), "cannot be written"
    )
    assert sorted(path.name for path in tmp_path.iterdir()) == ["fonts", "none"]


def test_every_face_of_a_collection_is_drawn(fonts: Path) -> None:
    collection = TTCollection()
    collection.fonts = [TTFont(fonts / "Aileron-Regular.ttf") for _ in range(2)]
    collection.save(fonts / "both.ttc")
    text = io.StringIO()
    assert render([fonts / "both.ttc"], text) == {"drawn": 2}
    names = {line.split(",")[0] for line in text.getvalue().splitlines()[1:]}
    assert names == {"both-0", "both-1"}


def test_fonts_that_are_not_drawn_are_counted(fonts: Path) -> None:
    (fonts / "web.woff2").write_bytes(b"wOF2" + bytes(99))
    (fonts / "type1.pfb").write_bytes(b"\x80\x01" + bytes(99))
    (fonts / "disguised.ttf").write_bytes(b"wOFF" + bytes(99))
    files = [file for file in font_files([fonts]) if file.parent == fonts]
    counts = render(files, io.StringIO())
    assert counts["web fonts, which are not drawn (.woff, .woff2)"] == 2
    assert counts["PostScript fonts, which are not drawn (.pfb, .pfa)"] == 1


@pytest.mark.parametrize("force", [True, False])
def test_a_font_is_not_overwritten_when_the_csv_is_forgotten(force: bool, fonts: Path) -> None:
    font = fonts / "Aileron-Regular.ttf"
    before = font.read_bytes()
    (fonts / "other.csv").write_text("my,own,table\n")
    for out in (font, fonts, fonts / "new.ttf", fonts / "other.csv"):
        with pytest.raises(UserError, match="as the last word"):
            check_out(out, force)
    assert font.read_bytes() == before
    check_out(fonts / "new.csv", force)
    (fonts / "ours.csv").write_text("names,labels,1,2,3\n")
    check_out(fonts / "ours.csv", True)
