"""tools/render_glyphs FONTS... OUT.csv: the 94 characters of typefaces as a CSV in TMNIST's format.

A glyph is drawn large, cut to its ink, scaled so that its longer side has 20 pixels, and centred in
28 x 28; white on black, anti-aliased. The name is the font file's, without its suffix; of a
collection (.ttc), with the face's number.
"""

import csv
import io
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

import click
import numpy as np
from fontTools.ttLib import TTCollection, TTFont
from PIL import Image, ImageFont

from engine.durable import writing, writing_file
from engine.errors import UserError, exit_on_user_error, printable
from engine.host import prepare_process
from engine.paths import PATH
from engine.ui import guard_outputs, progress_bar

CHARACTERS = [chr(code) for code in range(33, 127)]
SIDE = 28
INK = 20
DRAWN_PX = 96
DRAWN = (".ttf", ".otf", ".ttc", ".otc")
NOT_DRAWN = (".woff", ".woff2", ".pfb", ".pfa", ".eot", ".dfont", ".bdf", ".pcf", ".fon")
"""Found in folders, too, so that they are counted among the skipped."""
HEADER_START = b"names,labels,1,2,"


@click.command(context_settings={"help_option_names": ["-h", "--help"]})
@click.argument("fonts", nargs=-1, required=True, type=PATH)
@click.argument("out", type=PATH)
@click.option("--force", is_flag=True, help="Replace OUT.")
def main(fonts: tuple[Path, ...], out: Path, force: bool) -> None:
    """Draw FONTS, .ttf, .otf and .ttc files or folders of them, into the CSV OUT."""
    with exit_on_user_error():
        prepare_process()
        check_out(out, force)
        files = font_files(fonts)
        with writing(out), writing_file(out) as binary:
            text = io.TextIOWrapper(binary, encoding="utf-8", newline="", write_through=True)
            counts = render(files, text)
            skipped = ", ".join(f"{num:,} {why}" for why, num in counts.items() if why != "drawn")
            if not counts["drawn"]:
                raise UserError(
                    f"none of {len(files)} font files can be drawn ({skipped}); name .ttf or .otf "
                    f"files with all {len(CHARACTERS)} characters"
                )
            text.detach()
        click.echo(
            f"{printable(str(out))}: {counts['drawn']:,} typefaces"
            + (f"; skipped: {skipped}" if skipped else "")
        )


def check_out(out: Path, force: bool) -> None:
    """UserError unless OUT may be written: a font must not be lost because OUT was forgotten."""
    if out.is_dir():
        raise UserError(f"{out}: is a folder; name the CSV to write as the last word")
    if not out.exists():
        if out.suffix.lower() != ".csv":
            raise UserError(f"{out}: want a name that ends in .csv; name it as the last word")
        return
    with writing(out), open(out, "rb") as file:
        head = file.read(len(HEADER_START)) if out.is_file() else b"-"
    if head and head != HEADER_START:
        raise UserError(f"{out}: exists and is no CSV of glyphs; name the CSV as the last word")
    if not force:
        raise UserError(f"{out}: exists; give --force to replace it, or another name")


def font_files(paths: Sequence[Path]) -> list[Path]:
    """The font files named, and those in and below the folders named; UserError if none."""
    if missing := [path for path in paths if not path.exists()]:
        raise UserError(
            f"{missing[0]}: no such file or folder; name .ttf and .otf files or folders of them"
        )
    below = {
        file
        for path in paths
        for file in path.rglob("*")
        if file.suffix.lower() in (*DRAWN, *NOT_DRAWN)
    }
    found = {path for path in (*paths, *below) if path.is_file()}
    if not found:
        raise UserError(f"{paths[0]}: holds no .ttf or .otf file; name another folder")
    return sorted(found, key=lambda file: (file.stem, str(file)))


def render(files: Sequence[Path], out: io.TextIOBase) -> Counter[str]:
    """Write the CSV; how many typefaces were drawn, and how many not and why."""
    writer = csv.writer(out, lineterminator="\n")
    writer.writerow(["names", "labels", *range(1, SIDE * SIDE + 1)])
    counts: Counter[str] = Counter()
    names: set[str] = set()
    with progress_bar("drawing typefaces", len(files)) as show:
        for number, file in enumerate(files):
            show(number, printable(file.name))
            for name, face in faces(file):
                if name in names or not name.isprintable():
                    taken = name in names
                    counts["with the name of another" if taken else "with an unprintable name"] += 1
                    continue
                images, why = draw_typeface(file, face)
                counts[why] += 1
                if images:
                    names.add(name)
                    writer.writerows(
                        [name, c, *image_HW.ravel()]
                        for c, image_HW in zip(CHARACTERS, images, strict=True)
                    )
    return counts


def faces(file: Path) -> list[tuple[str, int]]:
    """(name, number) of each typeface in a file: one, or those of a collection, called NAME-0, ...

    A dash, so that a split by typefaces keeps those of one collection together.
    """
    try:
        with open(file, "rb") as opened:
            if opened.read(4) != b"ttcf":
                return [(file.stem, 0)]
        with TTCollection(file, lazy=True) as collection:
            return [(f"{file.stem}-{number}", number) for number in range(len(collection))]
    except Exception:  # broken: draw_typeface says so
        return [(file.stem, 0)]


def unsupported(file: Path) -> str:
    """What a file of letters is that is not drawn, by its first bytes; "" if it may be drawn."""
    with open(file, "rb") as opened:
        head = opened.read(4)
    if head in (b"wOFF", b"wOF2"):
        return "web fonts, which are not drawn (.woff, .woff2)"
    if head.startswith((b"%!", b"\x80\x01")):
        return "PostScript fonts, which are not drawn (.pfb, .pfa)"
    if file.suffix.lower() in NOT_DRAWN:
        return f"of a format that is not drawn ({file.suffix.lower()})"
    return ""


def draw_typeface(file: Path, face: int = 0) -> tuple[list[np.ndarray], str]:
    """(28 x 28 uint8 images of CHARACTERS, "drawn"), or ([], why not)."""
    try:
        if why := unsupported(file):
            return [], why
        with TTFont(file, lazy=True, fontNumber=face) as tables:
            known = tables.getBestCmap() or {}
        font = ImageFont.truetype(str(file), DRAWN_PX, index=face)
        images = [
            draw_glyph(font, character) for character in CHARACTERS if ord(character) in known
        ]
    except Exception:  # broken files of strangers raise whatever their tables lead to
        return [], "unreadable"
    drawn = [image_HW for image_HW in images if image_HW is not None]
    return (drawn, "drawn") if len(drawn) == len(CHARACTERS) else ([], "lacking characters")


def draw_glyph(font: ImageFont.FreeTypeFont, character: str) -> np.ndarray | None:
    """(28, 28) uint8, or None if there is no ink."""
    mask = font.getmask(character, mode="L")
    glyph = Image.frombytes("L", mask.size, bytes(mask))
    box = glyph.getbbox()
    if box is None:
        return None
    glyph = glyph.crop(box)
    scale = INK / max(glyph.size)
    size = (max(round(glyph.width * scale), 1), max(round(glyph.height * scale), 1))
    image = Image.new("L", (SIDE, SIDE))
    image.paste(
        glyph.resize(size, Image.Resampling.LANCZOS), ((SIDE - size[0]) // 2, (SIDE - size[1]) // 2)
    )
    return np.asarray(image)


if __name__ == "__main__":
    guard_outputs()
    main()
