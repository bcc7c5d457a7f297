"""Captions: drawn in a font that has the characters or shown as code points, and told apart."""

import unicodedata
import warnings
from functools import partial
from pathlib import Path

import numpy as np
import pytest
from matplotlib.figure import Figure
from matplotlib.text import Text
from PIL import Image, ImageDraw, ImageFont

from tools.report import captions, charts
from tools.report.captions import code_points, distinct, font_with, installed_fonts, pieces, shown
from tools.report.sheet import (
    BLACK,
    MAX_CAPTION,
    _own_characters,
    _width,
    class_captions,
    draw_sheet,
)

ASCII = frozenset(range(32, 127))
LABELS = ("೧", "ಕ", "字", "あ", "😀", "ب", "é", "Ж")


def old_sheet(image_MHW: np.ndarray, names: list[str]) -> Image.Image:
    """The layout that short labels have always had."""
    height, width = (2 * side for side in image_MHW.shape[1:])
    num_rows = -(-len(image_MHW) // 16)
    sheet = Image.new("RGB", (16 * (width + 4), num_rows * (height + 22)), "white")
    pen, font = ImageDraw.Draw(sheet), ImageFont.load_default(16)
    for number, name in enumerate(names):
        row, column = divmod(number, 16)
        x, y = column * (width + 4) + 2, row * (height + 22)
        picture = Image.fromarray(255 - image_MHW[number]).resize((width, height))
        sheet.paste(picture, (x, y))
        pen.text((x + width // 2, y + height + 11), name, BLACK, font, anchor="mm")
    return sheet


def test_short_labels_stand_where_they_stood() -> None:
    names = [chr(code) for code in range(33, 127)] + ["W  (@)", "10"]
    image_MHW = np.random.default_rng(0).integers(0, 256, (len(names), 28, 28), np.uint8)
    drawn = draw_sheet(image_MHW, class_captions(names), [BLACK] * len(names))
    assert drawn.tobytes() == old_sheet(image_MHW, names).tobytes()


@pytest.mark.parametrize("label", LABELS)
def test_a_character_is_drawn_where_a_font_has_it(label: str) -> None:
    """What is asserted depends on the fonts of this machine; é and Ж are in matplotlib's."""
    font = font_with(label)
    if label in "éЖ":
        assert font is not None
    if font is None:
        assert pieces(label, ASCII) == [(code_points(label), None)]
        return
    assert pieces(f"a{label}b", ASCII) == [("a", None), (label, font), ("b", None)]
    drawn = ImageFont.truetype(font, 40).getmask(label)
    none = ImageFont.truetype(font, 40).getmask("\U0010fffe")
    assert bytes(drawn) != bytes(none), "the font's box for missing characters"


@pytest.mark.parametrize(
    ("label", "text"),
    [
        ("\U0010fffe", "\\U0010fffe"),
        ("\uf8f0", "\\uf8f0"),
        ("سلام", "U+0633 U+0644 U+0627 U+0645"),
        ("a\u0301", "aU+0301"),
        ("\u0cc1", "U+0CC1"),
        ("\x1b[31m", "\\x1b[31m"),
        ("\u202ex", "\\u202ex"),
        (" ", "U+0020"),
        ("\u00ad", "\\xad"),
        ("plain", "plain"),
    ],
)
def test_what_cannot_be_drawn_is_named(label: str, text: str) -> None:
    assert shown(label, ASCII) == text


def test_without_any_font_code_points_remain(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(captions, "font_with", lambda text: None)
    assert shown("digit_೧", ASCII) == "digit_U+0CE7"


def test_the_choice_of_a_font_is_the_same_each_time() -> None:
    first = [font_with(label) for label in LABELS]
    for cached in (font_with, installed_fonts, captions.characters_of):
        cached.cache_clear()
    assert [font_with(label) for label in LABELS] == first
    assert installed_fonts()[0].name == "DejaVuSans.ttf"


def test_a_damaged_font_is_passed_over(tmp_path: Path) -> None:
    for number, data in enumerate((b"", b"OTTO", b"\0\1\0\0" + b"\xff" * 100)):
        (tmp_path / f"{number}.ttf").write_bytes(data)
        assert captions.characters_of(tmp_path / f"{number}.ttf") == frozenset()
    assert captions.characters_of(tmp_path / "none.ttf") == frozenset()


@pytest.mark.parametrize(
    "names",
    [
        [f"character_{number:02}_ka" for number in range(46)],
        ["x" * 299 + end for end in "abc"],
        ["x" * 150 + middle + "x" * 149 for middle in "abc"],
        ["abcdefgh", "abcdefgi", "abcde", "ab…gh"],
    ],
)
def test_cut_names_are_told_apart(names: list[str]) -> None:
    for length in (6, 10, 300):
        short = distinct(names, lambda name, length=length: len(name) <= length)
        assert len(set(short)) == len(names) and max(map(len, short)) <= max(length, 6)
    assert distinct([*names, names[0]], lambda name: True) == [*names, names[0]]


def test_a_name_that_looks_like_another_ones_code_point_is_told_apart() -> None:
    several = ["\u0cc1", "U+0CC1", "\x1b", "\\x1b"]
    assert len(set(class_captions(several))) == 4


@pytest.mark.parametrize("side", [4, 8, 28])
def test_neighbours_never_touch(side: int) -> None:
    """Between two long captions there is a column of white."""
    names = class_captions([f"{'W' * 40}{number}" for number in range(16)])
    assert max(map(_width, names)) <= MAX_CAPTION
    sheet = draw_sheet(np.zeros((16, side, side), np.uint8), names, [BLACK] * 16)
    pixels = np.asarray(sheet)
    cell = pixels.shape[1] // 16
    assert (pixels[2 * side :, [n * cell for n in range(16)]] == 255).all()
    assert (pixels[2 * side :, [n * cell + cell - 1 for n in range(16)]] == 255).all()
    assert (pixels[2 * side :] < 128).any()


def test_two_lines_stand_below_one_another() -> None:
    one, two = (
        draw_sheet(np.zeros((1, 28, 28), np.uint8), [name], [BLACK]) for name in ("ka", "ka\n(kha)")
    )
    assert two.height == one.height + 22
    assert (np.asarray(two)[-22:] < 128).any()


def test_a_chart_draws_no_box() -> None:
    """matplotlib warns of each character that a text's fonts lack."""
    names = [*LABELS, "\u0cc1", "سلام", "plain"]
    assert all(unicodedata.normalize("NFC", name) == name for name in names)
    share = np.eye(len(names))
    figures: list[Figure] = []

    def make() -> Figure:
        figures.append(charts.matrix(share, names))
        return figures[0]

    picture = charts.draw("x", make)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        figures[0].canvas.draw()
    texts = {t.get_text() for t in figures[0].findobj(Text) if isinstance(t, Text)}
    assert "U+0CC1" in texts and "plain" in texts
    assert all(name in texts or code_points(name) in texts for name in LABELS)
    assert "\u0cc1" in picture.svg, "a page has fonts of its own"
    assert charts.draw("x", partial(charts.matrix, share, names)) == picture


def test_a_chart_of_plain_names_is_not_touched() -> None:
    names = ["a", "b"]
    before = charts.draw("x", partial(charts.matrix, np.eye(2), names))
    charts.draw("y", partial(charts.matrix, np.eye(1), ["೧"]))
    assert charts.draw("x", partial(charts.matrix, np.eye(2), names)) == before


def test_names_of_rows_and_lines_are_told_apart() -> None:
    assert len(set(charts.short_names(["x" * 50 + end for end in "ab"], 34))) == 2
    assert charts.short_names(["a" * 40, "b"], 34) == ["a" * 33 + "…", "b"]
    assert _own_characters() >= ASCII


def test_names_that_begin_alike_are_cut_in_the_middle() -> None:
    names = [f"a name that is too long {end}" for end in ("ka", "kha")]
    assert distinct(names, lambda name: len(name) <= 9) == ["a na…g ka", "a na… kha"]
    alike = ["long" * 5 + middle + "long" * 5 for middle in "ab"]
    assert distinct(alike, lambda name: len(name) <= 9) == ["longlo…#1", "longlo…#2"]
