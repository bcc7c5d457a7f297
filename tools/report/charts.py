"""The report's charts: horizontal bars, stacked bars, lines, a confusion matrix.

The same input gives the same bytes. Text is never parsed as mathematics, and every label stands
beside what it names. Colours are those of PALETTE; in the page each becomes a CSS variable, so that
one picture serves light and dark.
"""

import io
import re
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from html import escape
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from matplotlib import font_manager, rc_context, rcdefaults, rcParams
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle
from matplotlib.text import Text
from matplotlib.ticker import FuncFormatter, NullLocator, PercentFormatter

from tools.report.captions import characters_of, distinct, pieces, shown
from tools.report.style import INK, MUTED, PALETTE, PAPER, RULE, SERIES

MARKERS = "os^DvPX*"
MOST = len(SERIES)
MONO = "DejaVu Sans Mono"
"""Tells l, I, 1 and | apart."""
WIDTH_IN, BAR_IN = 5.4, 0.36
STYLE: Any = {
    "font.family": ["DejaVu Sans"], "font.size": 9.5, "text.parse_math": False,
    "text.usetex": False, "svg.fonttype": "none", "text.color": INK, "axes.labelcolor": MUTED,
    "axes.edgecolor": RULE, "axes.facecolor": "none", "figure.facecolor": PAPER,
    "savefig.facecolor": PAPER, "xtick.color": MUTED, "ytick.color": MUTED,
    "xtick.labelcolor": MUTED, "grid.color": RULE, "grid.linewidth": 0.8, "axes.spines.top": False,
    "axes.spines.right": False, "axes.spines.left": False, "xtick.major.size": 0,
    "ytick.major.size": 0, "axes.unicode_minus": False, "legend.frameon": False,
    "lines.linewidth": 1.8,
}  # fmt: skip


@dataclass(frozen=True)
class Picture:
    """A drawn chart."""

    svg: str
    png: bytes

    def inline(self, title: str) -> str:
        """The SVG as an element of a page that sets the palette's variables, without its ids."""

        def adapt(tag: re.Match[str]) -> str:
            """Tags only: what data says stands between them, its < and > escaped."""
            text = re.sub(r'<g id="[\w.]+"', "<g", tag[0])
            return re.sub(
                r"#[0-9a-f]{6}",
                lambda m: f"var(--{PALETTE[m[0]]})" if m[0] in PALETTE else m[0],
                text,
            )

        svg = re.sub("<[^>]+>", adapt, self.svg[self.svg.index("<svg") :])
        return svg.replace("<svg ", f'<svg role="img" aria-label="{escape(title)}" ', 1)


def bars(
    names: Sequence[str],
    values: pd.Series,
    texts: Sequence[str],
    xlabel: str,
    spread: Any = None,
    font: Any = None,
) -> Figure:
    """A bar a name, with its text; `spread` is [values - low, high - values], NaN where unknown."""
    figure, axes = _figure(0.75 + BAR_IN * len(names))
    rows = np.arange(len(names))
    axes.barh(rows, values, 0.62, color=SERIES[0])
    ends = np.asarray(values, float)
    if spread is not None and (known := np.isfinite(spread).all(0)).any():
        drawn = {"fmt": "none", "ecolor": INK, "elinewidth": 1.2, "capsize": 2.5}
        axes.errorbar(ends[known], rows[known], xerr=spread[:, known], **drawn)
        ends = ends + np.nan_to_num(spread)[1]
    for row, (end, text) in enumerate(zip(ends, texts, strict=True)):
        axes.annotate(text, (end, row), (5, 0), textcoords="offset points", va="center", fontsize=9)
    axes.set_xlim(0, (float(ends.max()) or 1) * (1.12 + 0.018 * max(map(len, texts))))
    _name_rows(axes, names, xlabel, font)
    return figure


def stacked(frame: pd.DataFrame, xlabel: str) -> Figure:
    """frame: a row a bar, a column a part of it."""
    figure, axes = _figure(1.15 + BAR_IN * len(frame))
    left = np.zeros(len(frame))
    for number, part in enumerate(frame.columns):
        width = frame[part].fillna(0).to_numpy()
        colour = SERIES[number % MOST]
        axes.barh(
            range(len(frame)), width, 0.62, left, color=colour, edgecolor=PAPER, label=f" {part}"
        )
        left = left + width
    # a leading space: matplotlib leaves out labels that begin with an underscore
    figure.legend(loc="outside upper left", ncols=3, fontsize=9, handlelength=1, handleheight=1)
    _name_rows(axes, [str(name) for name in frame.index], xlabel)
    return figure


@dataclass(frozen=True)
class Line:
    """A line, named at its end."""

    name: str
    x: Sequence[float]
    y: Sequence[float]


def lines(
    panels: Sequence[tuple[str, Sequence[Line], str]], xlabel: str, log_x: bool = True
) -> Figure:
    """Panels above one another of (ylabel, lines, ideal), ideal being "linear", "one" or ""."""
    figure, all_axes = _figure(3.0 * len(panels), num=len(panels))
    for axes, (ylabel, drawn, ideal) in zip(
        np.atleast_1d(np.asarray(all_axes)), panels, strict=True
    ):
        x = sorted({value for line in drawn for value in line.x})
        if log_x:
            axes.set_xscale("log", base=2)
            axes.set_xticks(x, [f"{value:g}" for value in x])
            axes.xaxis.set_minor_locator(NullLocator())
        else:
            axes.locator_params(axis="x", nbins=6)
        axes.locator_params(axis="y", nbins=7)
        if ideal:
            y = x if ideal == "linear" else np.ones(len(x))
            axes.plot(x, y, color=MUTED, linestyle=(0, (4, 3)), linewidth=1.2)
            where = {"textcoords": "offset points", "ha": "right", "va": "bottom"}
            axes.annotate("ideal", (x[-1], y[-1]), (-8, 2), color=MUTED, fontsize=9, **where)
        for line, colour, marker in zip(drawn, SERIES, MARKERS, strict=False):
            axes.plot(line.x, line.y, color=colour, marker=marker, markersize=5)
        if not log_x:
            axes.set_xlim(0)  # only now: a limit set before the lines would stay as it was
        low = min(min(line.y) for line in drawn)
        axes.set_ylim(np.floor(low * 5) / 5 - 0.1 if "%" in ylabel and low > 0.3 else 0)
        axes.yaxis.set_major_formatter(
            PercentFormatter(1, 0) if "%" in ylabel else FuncFormatter(short)
        )
        axes.set_title(ylabel, loc="left", fontsize=9.5, color=MUTED)
        axes.grid(axis="y")
        _name_ends(axes, drawn)
    axes.set_xlabel(xlabel)
    return figure


def matrix(share_TR: np.ndarray, names: Sequence[str]) -> Figure:
    """Rows are true classes, columns what was read; the share of the row in percent."""
    figure, axes = _figure(WIDTH_IN)
    for (true, read), share in np.ndenumerate(share_TR):
        if share:
            colour = SERIES[0] if true == read else SERIES[1]
            axes.add_patch(
                Rectangle(
                    (read - 0.48, true - 0.48), 0.96, 0.96, color=colour, alpha=0.12 + 0.5 * share
                )
            )
        if share >= 0.005:
            axes.text(read, true, f"{100 * share:.0f}", ha="center", va="center", fontsize=8)
    axes.set_xlim(-0.5, len(names) - 0.5)
    axes.set_ylim(len(names) - 0.5, -0.5)
    axes.set_aspect("equal")
    cut = short_names(names, 18)
    for set_ticks in (axes.set_xticks, axes.set_yticks):
        set_ticks(range(len(names)), cut, color=INK, fontfamily=MONO)
    mono = characters_of(Path(font_manager.findfont(MONO)))
    if max(len(shown(name, mono)) for name in cut) > 2:
        axes.tick_params("x", labelrotation=90)  # side by side they would cover one another
    axes.set_xlabel("read as (% of the true class)")
    axes.set_ylabel("true class")
    return figure


def draw(name: str, make: Callable[[], Figure]) -> Picture:
    """Draw what `make` builds, in the report's style; `name` keeps the ids of pictures apart."""
    svg, png = io.StringIO(), io.BytesIO()
    with rc_context(), warnings.catch_warnings():
        warnings.filterwarnings(
            "ignore", "Glyph .* missing from font"
        )  # the page's own fonts have more characters
        rcdefaults()
        rcParams.update(STYLE | {"svg.hashsalt": name})
        figure = make()
        figure.savefig(
            svg, format="svg", metadata=dict.fromkeys(("Date", "Creator", "Format", "Type"))
        )
        show_all_characters(figure)  # a page has fonts of its own, a picture has not
        figure.savefig(png, format="png", dpi=144, metadata={"Software": None})
    return Picture(svg.getvalue(), png.getvalue())


def show_all_characters(figure: Figure) -> None:
    """Give each text fonts that have its characters, or code points in their place."""
    for axes in figure.axes:
        for axis in (axes.xaxis, axes.yaxis):
            labels = axis.get_majorticklabels()
            names = [label.get_text() for label in labels]
            adapted = [_adapted(label, name) for label, name in zip(labels, names, strict=True)]
            if adapted != names:
                axis.set_ticklabels(adapted)
    for text in figure.findobj(Text):
        assert isinstance(text, Text)
        text.set_text(_adapted(text, text.get_text()))


def _adapted(drawn: Text, text: str) -> str:
    """`text` as `drawn` can show it once the fonts it lacks are added to its own."""
    families = drawn.get_fontfamily()
    own = font_manager.findfont(font_manager.FontProperties(family=families[:1]))
    parts = [pieces(line, characters_of(Path(own))) for line in text.split("\n")]
    fonts = {font for line in parts for _, font in line if font}
    for font in sorted(fonts):
        font_manager.fontManager.addfont(font)
    names = [font_manager.FontProperties(fname=font).get_name() for font in sorted(fonts)]
    if names:
        drawn.set_fontfamily(list(dict.fromkeys([*families, *names])))
    return "\n".join("".join(part for part, _ in line) for line in parts)


def short(value: float, _: int = 0) -> str:
    """12,300 as 12.3k, for axes."""
    size, letter = (1e6, "M") if abs(value) >= 1e6 else (1e3, "k") if abs(value) >= 1e3 else (1, "")
    return f"{value / size:g}{letter}"


def _figure(height_in: float, num: int = 1) -> tuple[Figure, Any]:
    figure = Figure(figsize=(WIDTH_IN, height_in), layout="constrained")
    return figure, figure.subplots(num, 1)


def _name_rows(axes: Axes, names: Sequence[str], xlabel: str, font: Any = None) -> None:
    axes.set_yticks(range(len(names)), short_names(names, 34), color=INK, fontfamily=font)
    axes.set_ylim(len(names) - 0.4, -0.6)
    axes.xaxis.set_major_formatter(FuncFormatter(short))
    axes.locator_params(axis="x", nbins=5)
    axes.set_xlabel(xlabel)
    axes.grid(axis="x")
    axes.set_axisbelow(True)


def short_names(names: Sequence[str], length: int) -> list[str]:
    """The names in at most `length` characters, told apart."""
    return distinct(list(names), lambda name: len(name) <= length)


def _name_ends(axes: Axes, drawn: Sequence[Line]) -> None:
    """The lines' names to the right of their ends, pushed apart where they would overlap."""
    low, high = axes.get_ylim()
    names = short_names([line.name for line in drawn], 26)
    ends = [
        (line.y[-1], name, colour) for line, name, colour in zip(drawn, names, SERIES, strict=False)
    ]
    top = np.inf
    for y, name, colour in sorted(ends, key=lambda end: -end[0]):
        top = min((y - low) / (high - low), top - 0.085)
        axes.text(
            1.02,
            top,
            name,
            color=colour,
            va="center",
            fontsize=9,
            transform=axes.transAxes,
        )
