"""Captions that can be read in a picture, whatever the labels are.

A character that a picture's own font lacks is drawn in the first installed font that has it, else
shown as its code point (U+0CE7): a reader can look that up, but not a box. So are marks that have
no letter to stand on, and words written from right to left, which pictures do not lay out. Names
that are too long are cut such that no two of them become equal.
"""

import unicodedata
from collections.abc import Callable, Sequence
from functools import cache
from itertools import groupby
from pathlib import Path

from engine.errors import printable

Fits = Callable[[str], bool]
Piece = tuple[str, Path | None]
"""Text, and the font to draw it in; None is the picture's own."""


def pieces(text: str, own: frozenset[int]) -> list[Piece]:
    """`text` as it can be drawn, in parts of one font each; `own`: code points of the own font."""
    found: list[Piece] = []
    kinds = groupby(printable(text), lambda letter: (ord(letter) in own, _is_leftward(letter)))
    for (is_own, _), letters in kinds:
        part = "".join(letters)
        font = None if is_own else font_with(part)
        if not _can_be_drawn(part) or not (is_own or font):
            part, font = code_points(part), None
        if found and found[-1][1] == font:
            part = found.pop()[0] + part
        found.append((part, font))
    return found


def shown(text: str, own: frozenset[int]) -> str:
    """`text` with what cannot be drawn as code points."""
    if text and text.isspace():
        return code_points(text)
    return "".join(part for part, _ in pieces(text, own))


def code_points(text: str) -> str:
    return " ".join(f"U+{ord(letter):04X}" for letter in text)


def _can_be_drawn(part: str) -> bool:
    """It begins with no mark, which needs a letter, and is no word written from right to left."""
    is_word = len(part) > 1 and _is_leftward(part[0])
    return not is_word and not unicodedata.category(part[0]).startswith("M")


def _is_leftward(letter: str) -> bool:
    return unicodedata.bidirectional(letter) in ("R", "AL", "AN")


@cache
def font_with(text: str) -> Path | None:
    """The first installed font that has all characters; the same each time on one machine."""
    wanted = {ord(letter) for letter in text}
    return next((font for font in installed_fonts() if wanted <= characters_of(font)), None)


@cache
def installed_fonts() -> tuple[Path, ...]:
    """DejaVu, which comes with matplotlib, then the system's, upright normal ones first."""
    from matplotlib import font_manager  # here: it takes longer to import than most commands

    dejavu = Path(font_manager.findfont("DejaVu Sans"))
    styles = ("bold", "italic", "oblique", "black", "light", "thin", "medium", "condensed", "mono")

    def rank(font: Path) -> tuple[bool, str, str]:
        name = font.name.lower()
        return any(style in name for style in styles), name, str(font)

    return dejavu, *sorted(map(Path, font_manager.findSystemFonts()), key=rank)


@cache
def characters_of(font: Path) -> frozenset[int]:
    """Code points that the font draws as outlines; none of what only stands in for missing ones."""
    from fontTools.ttLib import TTFont, TTLibError

    if font.name.lower().startswith(("lastresort", "adobeblank", "notocoloremoji")):
        return frozenset()
    try:
        with TTFont(font, fontNumber=0, lazy=True) as opened:
            has_outlines = "glyf" in opened or "CFF " in opened
            return frozenset(opened.getBestCmap() or ()) if has_outlines else frozenset()
    except (OSError, TTLibError, AssertionError, LookupError, ValueError):
        return frozenset()  # a damaged font is as good as none


def distinct(names: Sequence[str], fits: Fits) -> list[str]:
    """The names, those that do not fit cut by an ellipsis; names that differ stay different.

    Cut at the end where that tells all of them apart, else in the middle, else numbered.
    """
    several = list(dict.fromkeys(names))
    at_end = [_cut(name, fits, lambda name, keep: f"{name[:keep]}…") for name in several]
    in_middle = [_cut(name, fits, _without_middle) for name in several]
    for short in (at_end, in_middle):
        if len(set(short)) == len(several):
            break
    else:
        short = [_cut(name, fits, _numbered(number)) for number, name in enumerate(several, 1)]
    return [dict(zip(several, short, strict=True))[name] for name in names]


def _numbered(number: int) -> Callable[[str, int], str]:
    return lambda name, keep: f"{name[:keep]}…#{number}"


def _without_middle(name: str, keep: int) -> str:
    return f"{name[: (keep + 1) // 2]}…{name[len(name) - keep // 2 :]}"


def _cut(name: str, fits: Fits, shorten: Callable[[str, int], str]) -> str:
    """The name if it fits, else the longest that `shorten` makes of it and fits."""
    if fits(name):
        return name
    shorter = (shorten(name, keep) for keep in range(len(name) - 1, 0, -1))
    return next((short for short in shorter if fits(short)), shorten(name, 1))
