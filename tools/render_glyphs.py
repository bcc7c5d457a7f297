"""tools/render_glyphs FONTS... OUT.csv: the 94 characters of typefaces as a CSV in TMNIST's format.

A glyph is drawn large, cut to its ink, scaled so that its longer side has 20 pixels, and centred in 28 x 28; white on
black, anti-aliased. The name is the font file's, without its suffix.
"""

import csv
import io
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

import click
import numpy as np
from fontTools.ttLib import TTFont
from PIL import Image, ImageFont

from engine.errors import UserError, exit_on_user_error, printable
from engine.publish import writing, writing_file
from engine.ui import guard_outputs, progress_bar

CHARACTERS = [chr(code) for code in range(33, 127)]
SIDE, INK, DRAWN_PX = 28, 20, 96


@click.command(context_settings={"help_option_names": ["-h", "--help"]})
@click.argument("fonts", nargs=-1, required=True, type=click.Path(path_type=Path))
@click.argument("out", type=click.Path(path_type=Path))
@click.option("--force", is_flag=True, help="Replace OUT.")
def main(fonts: tuple[Path, ...], out: Path, force: bool) -> None:
    """Draw FONTS, .ttf and .otf files or folders of them, into the CSV OUT."""
    with exit_on_user_error():
        if out.exists() and not force:
            raise UserError(f"{out}: exists; give --force to replace it, or another name")
        files = font_files(fonts)
        with writing(out), writing_file(out) as binary:
            text = io.TextIOWrapper(binary, encoding="utf-8", newline="", write_through=True)
            counts = render(files, text)
            if not counts["drawn"]:
                raise UserError(
                    f"none of {len(files)} font files has all {len(CHARACTERS)} characters; name others"
                )
            text.detach()
        skipped = ", ".join(f"{count:,} {why}" for why, count in counts.items() if why != "drawn")
        click.echo(
            f"{printable(str(out))}: {counts['drawn']:,} typefaces"
            + (f"; skipped: {skipped}" if skipped else "")
        )


def font_files(paths: Sequence[Path]) -> list[Path]:
    """The font files named, and those in the folders named and below, by name; UserError if there is none."""
    if missing := [path for path in paths if not path.exists()]:
        raise UserError(
            f"{missing[0]}: no such file or folder; name .ttf and .otf files or folders of them"
        )
    below = {
        file
        for path in paths
        for file in path.rglob("*")
        if file.suffix.lower() in (".ttf", ".otf")
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
            if file.stem in names or not file.stem.isprintable():
                counts[
                    "with the name of another" if file.stem in names else "with an unprintable name"
                ] += 1
                continue
            images, why = draw_typeface(file)
            counts[why] += 1
            if images:
                names.add(file.stem)
                writer.writerows(
                    [file.stem, c, *image_HW.ravel()]
                    for c, image_HW in zip(CHARACTERS, images, strict=True)
                )
    return counts


def draw_typeface(file: Path) -> tuple[list[np.ndarray], str]:
    """(28 x 28 uint8 images of CHARACTERS, "drawn"), or ([], why not)."""
    try:
        with TTFont(file, lazy=True) as tables:
            known = tables.getBestCmap() or {}
        font = ImageFont.truetype(str(file), DRAWN_PX)
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
