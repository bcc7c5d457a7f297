"""A picture of many glyphs with captions. Shapes: M images of H x W."""

import io
from collections.abc import Sequence
from functools import cache
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from engine.durable import writing, writing_file
from engine.errors import UserError
from tools.report.captions import Piece, distinct, pieces, shown
from tools.report.outputs import check_file

COLUMNS, SCALE, CAPTION, GAP = 16, 2, 22, 4
FONT_PX, MAX_CAPTION = 16, 150
FORMATS = {".png": "PNG", ".jpg": "JPEG", ".jpeg": "JPEG", ".webp": "WEBP", ".bmp": "BMP"}
BLACK, RED = (60, 60, 60), (200, 0, 0)
Font = ImageFont.FreeTypeFont | ImageFont.ImageFont
Colour = tuple[int, int, int]


def draw_sheet(
    image_MHW: np.ndarray, captions: Sequence[str], colours: Sequence[Colour]
) -> Image.Image:
    """At least one image, black on white, in rows of COLUMNS, each with its caption.

    Cells are as wide as the images, or wider than the widest caption: neighbours never touch.
    """
    height, width = (side * SCALE for side in image_MHW.shape[1:])
    lines = [caption.split("\n") for caption in captions]
    widest = max(_width(line) for parts in lines for line in parts)
    cell = width if widest < width + GAP else widest + GAP
    below = CAPTION * max(map(len, lines))
    num_rows = -(-len(image_MHW) // COLUMNS)
    sheet = Image.new("RGB", (COLUMNS * (cell + GAP), num_rows * (height + below)), "white")
    pen = ImageDraw.Draw(sheet)
    for number, (image_HW, parts, colour) in enumerate(zip(image_MHW, lines, colours, strict=True)):
        row, column = divmod(number, COLUMNS)
        x, y = column * (cell + GAP) + GAP // 2, row * (height + below)
        picture = Image.fromarray(255 - image_HW).resize((width, height))
        sheet.paste(picture, (x + (cell - width) // 2, y))
        for place, line in enumerate(parts):
            centre = y + height + CAPTION // 2 + place * CAPTION
            _write(pen, (x + cell // 2, centre), line, colour)
    return sheet


def class_captions(classes: Sequence[str]) -> list[str]:
    """The classes' names as they can be drawn: short enough for a cell, and no two the same."""
    names = [shown(name, _own_characters()) for name in classes]
    if len(set(names)) < len(set(classes)):  # one is called as another is shown
        names = [f"{name} #{number}" for number, name in enumerate(names, 1)]
    return distinct(names, lambda name: _width(name) <= MAX_CAPTION)


def check_picture(path: Path) -> None:
    """UserError if `path` is no picture's name, or cannot be written; call it before the work."""
    check_file(path)
    if path.suffix.lower() not in FORMATS:
        raise UserError(f"{path}: is no picture's name; let it end in {', '.join(FORMATS)}")


def save_picture(picture: Image.Image, path: Path) -> None:
    """Write the picture, whole or not at all, in the format that its name ends in."""
    with writing(path), writing_file(path) as file:
        picture.save(file, FORMATS[path.suffix.lower()])


def _write(pen: ImageDraw.ImageDraw, centre: tuple[int, int], line: str, colour: Colour) -> None:
    """The line around `centre`, each part in the font that has its characters."""
    parts = pieces(line, _own_characters())
    if [font for _, font in parts] == [None]:
        pen.text(centre, parts[0][0], colour, _font(parts[0]), anchor="mm")
        return
    x = centre[0] - _width(line) / 2
    for part in parts:
        pen.text((x, centre[1] + FONT_PX * 0.35), part[0], colour, _font(part), anchor="ls")
        x += _font(part).getlength(part[0])


def _width(line: str) -> int:
    """Pixels the line takes at most."""
    return -int(-sum(_font(part).getlength(part[0]) for part in pieces(line, _own_characters())))


def _font(piece: Piece) -> Font:
    return _opened(piece[1])


@cache
def _opened(file: Path | None) -> Font:
    return ImageFont.truetype(file, FONT_PX) if file else ImageFont.load_default(FONT_PX)


@cache
def _own_characters() -> frozenset[int]:
    """Code points of Pillow's own font."""
    font = ImageFont.load_default(FONT_PX)
    data = getattr(font, "font_bytes", b"")
    if not data:  # Pillow without FreeType has an ASCII bitmap font
        return frozenset(range(32, 127))
    from fontTools.ttLib import TTFont

    with TTFont(io.BytesIO(data)) as opened:
        return frozenset(opened.getBestCmap())
