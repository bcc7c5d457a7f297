"""`tools/profile report`: what DIR holds as one page, as pictures, and as Markdown.

All that comes from data passes `clean` when it is read (controls as \\xNN) and is escaped where it
is written: by Jinja's autoescape in the page, by matplotlib in pictures, by `markdown_text` and
`csv_text`. It names no file.
"""

import json
import re
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from matplotlib.figure import Figure

from engine.durable import Damaged, parse_json, write_file, writing
from engine.errors import UserError
from engine.typed import typed
from tools.measure.results import RATE, Profile, clean, read_profile
from tools.report import charts, style
from tools.report.ceiling import distances
from tools.report.charts import Line, Picture
from tools.report.confusion import Glyph, class_table, glyph, lookalikes, matrices
from tools.report.figures import MEDIANS, heading, show
from tools.report.rows import markdown_table, number
from tools.report.tables import cells_frame, epochs_frame, parts_frame

EXTRA = {
    "ensemble": ("Ensemble", "ensemble.json", "rows"),
    "kernels": ("Kernels", "gpu_kernels.json", "rows"),
    "trace": ("What a step runs", "tables.json", "operators"),
}  # fmt: skip
"""Sections from files of other commands: title, file, and the table's key in it."""
STACKED = {
    "memory": (
        "Memory by owner", "memory_gib_by_owner", "GiB",
        "Device memory by what made it grow: the difference around the creation of each owner.",
    ),
    "stages": (
        "Stage times", "stage_ms", "ms a step, traced",
        "From a separate traced pass, not from the timed steps: tracing slows it; read the shares. "
        "The step's time stands in the table of all cells.",
    ),
}  # fmt: skip
"""Sections of stacked bars: title, field of a repetition, unit, what is seen."""
ALL_CELLS = "Medians of n repetitions, made in turn so that drift favours none."
NUM_WORST, NUM_MATRIX, NUM_BARS = 20, 16, 12
LOW, HIGH = f"{RATE}_low95", f"{RATE}_high95"


@dataclass(frozen=True)
class Section:
    """A part of the report: what is seen and how it was measured, a table, perhaps a picture."""

    key: str
    title: str
    seen: str
    frame: pd.DataFrame
    """Where it is empty, there is no section."""
    make: Callable[[], Figure] | None = None
    glyphs: list[Glyph] = field(default_factory=list)

    @cached_property
    def picture(self) -> Picture | None:
        return charts.draw(self.key, self.make) if self.make else None

    @property
    def rows(self) -> Iterator[list[str]]:
        for values in self.frame.itertuples(index=False, name=None):
            yield [
                show(column, value)
                for column, value in zip(self.frame.columns, values, strict=True)
            ]

    @cached_property
    def columns(self) -> list[tuple[str, bool]]:
        """Headings, each with whether the column is one of numbers."""
        frame = self.frame.infer_objects()
        return [(heading(c), frame[c].dtype.kind in "iuf") for c in frame.columns]


def write_report(folder: Path, out: Path) -> Path:
    """Write OUT/report.html, report.md, figures/cells.csv, and figures/<section>.svg and .png.

    Returns the page's path.

    Raises:
        UserError: FOLDER holds no profile, or OUT cannot be written.
    """
    profile = read_profile(folder)
    extras = [*_ceiling(folder, profile), *_extras(folder)]
    sections = [section for section in (*make_sections(profile), *extras) if len(section.frame)]
    page_text, markdown_page = page(profile, sections), markdown(profile, sections)
    figures = out / "figures"
    with writing(out):
        figures.mkdir(parents=True, exist_ok=True)
        write_file(figures / "cells.csv", csv_text(cells_frame(profile)).encode())
        for section in sections:
            if section.picture:
                write_file(figures / f"{section.key}.svg", section.picture.svg.encode())
                write_file(figures / f"{section.key}.png", section.picture.png)
        write_file(out / "report.md", markdown_page.encode())
        write_file(out / "report.html", page_text.encode())
    return out / "report.html"


def make_sections(profile: Profile) -> list[Section]:
    """All sections, those without data with an empty table."""
    frame = cells_frame(profile)
    axes = [c for c in frame.columns if c in {axis for cell in profile.cells for axis in cell.axes}]
    others = [axis for axis in axes if axis not in ("batch", "ranks")] + ["device"]
    figures = [RATE, f"{RATE}_p10", f"{RATE}_p90", *MEDIANS]
    table = frame.loc[frame["num"] > 0, ["name", *axes, "num", *figures]]
    return [
        _ladder(frame),
        _batches(frame, others),
        _ranks(frame, others),
        _stacked("memory", profile, frame),
        _roofline(frame),
        _stacked("stages", profile, frame),
        _learning(profile),
        _target(frame),
        *_confusion(profile),
        _published(profile, frame),
        Section("cells", "All cells", ALL_CELLS, table.dropna(axis="columns", how="all")),
        _failures(profile),
        _circumstances(profile),
    ]


def _ladder(frame: pd.DataFrame) -> Section:
    rungs = frame[frame["ladder"] & frame[RATE].notna()]
    gains = ["" if np.isnan(gain) else f" ({gain:.2f} x)" for gain in rungs["gain"]]
    texts = [number(rate) + gain for rate, gain in zip(rungs[RATE], gains, strict=True)]
    seen = (
        "Each rung adds one change to its base, which is the rung before unless it names another: "
        "median throughput of whole training steps, its 95 % interval (bootstrap over 3 "
        "repetitions or more) and the gain over the base."
    )
    spread = rungs[[LOW, HIGH]].sub(rungs[RATE], axis=0).abs().to_numpy().T
    make = partial(
        charts.bars, rungs["name"], rungs[RATE], texts, "samples/s over all ranks", spread
    )
    return Section(
        "ladder", "The ladder", seen, rungs[["name", "num", RATE, LOW, HIGH, "base", "gain"]], make
    )


def _batches(frame: pd.DataFrame, others: list[str]) -> Section:
    known = frame[frame[RATE].notna() & ~frame["ladder"]]
    known = known[known["ranks"] == known["ranks"].min()]
    drawn = _lines(known, "batch", RATE, others)
    seen = (
        "Median throughput of training steps over the samples in a rank's batch, at the smallest "
        "number of ranks."
    )
    table = known[["name", "batch", "ranks", "num", RATE, f"{RATE}_p10", f"{RATE}_p90"]].head(
        len(drawn) and len(known)
    )
    make = partial(
        charts.lines, [("samples/s over all ranks", drawn, "")], "samples in a rank's batch"
    )
    return Section("batches", "Throughput over batch size", seen, table, make)


def _ranks(frame: pd.DataFrame, others: list[str]) -> Section:
    known = frame[frame["speedup"].notna()].sort_values("batch", ascending=False, kind="stable")
    speedups, shares = (
        _lines(known, "ranks", y, [*others, "batch"]) for y in ("speedup", "efficiency")
    )
    seen = (
        "Speed-up over the cell that has one rank and is the same in all else, batch per rank and "
        "device included (on a CPU also threads per rank), and the efficiency it means; dashed is "
        "the ideal."
    )
    panels = [("speed-up over 1 rank (x)", speedups, "linear"), ("efficiency (%)", shares, "one")]
    columns = ["name", "batch", "ranks", RATE, "speedup", "efficiency"]
    make = partial(charts.lines, panels, "ranks")
    return Section(
        "ranks",
        "Speed-up over ranks",
        seen,
        known[columns].head(len(speedups) and len(known)),
        make,
    )


def _stacked(key: str, profile: Profile, frame: pd.DataFrame) -> Section:
    title, field, unit, seen = STACKED[key]
    parts = parts_frame(profile, field)
    wide = parts.pivot(index="id", columns="part", values="value")[
        list(dict.fromkeys(parts["part"]))
    ]
    cells = frame[frame["id"].isin(wide.index)].set_index("id")
    bars = wide.loc[_few(cells).index].set_axis(_few(cells)["name"])
    table = cells[["name"]].join(wide.add_suffix(f" ({unit.split()[0]})"))
    return Section(key, title, seen, table, partial(charts.stacked, bars, unit))


def _roofline(frame: pd.DataFrame) -> Section:
    known = frame[frame["roofline_fraction"].notna()]
    table = known[["name", RATE, "roofline_fraction"]]
    table.insert(1, "roofline samples/s", known[RATE] / known["roofline_fraction"])
    seen = (
        "What the device's memory and arithmetic allow by the model of the step, what was "
        "measured, and its share."
    )
    make = partial(_bars, _few(known), "roofline_fraction", "% of the roofline")
    return Section("roofline", "Roofline", seen, table, make)


def _learning(profile: Profile) -> Section:
    epochs = epochs_frame(profile)
    groups = [group for _, group in epochs.groupby("id", sort=False)]
    drawn = [
        Line(g["name"].iloc[0], list(g["train_s"]), list(g["val_accuracy_fraction"]))
        for g in groups
    ]
    seen = (
        "Accuracy on the validation split after each epoch over training time without evaluation; "
        "first repetition."
    )
    panels = [("validation accuracy (%)", drawn[: charts.MOST], "")]
    make = partial(charts.lines, panels, "training time (s)", log_x=False)
    return Section("learning", "Learning curves", seen, epochs.drop(columns="id"), make)


def _target(frame: pd.DataFrame) -> Section:
    known = frame[frame["time_to_target_s"].notna()]
    table = known[
        ["name", "num", "time_to_target_s", "val_accuracy_fraction", "test_accuracy_fraction"]
    ]
    seen = (
        "Training time until the validation split first reached the accuracy asked for; median of "
        "the repetitions."
    )
    make = partial(_bars, _few(known), "time_to_target_s", "training time (s)")
    return Section("target", "Time to accuracy", seen, table, make)


def _confusion(profile: Profile) -> Iterator[Section]:
    """Of the first cell that has one."""
    found = ((c.name, r.confusion) for c in profile.cells for r in c.good if r.confusion)
    for name, confusion in [*found][:1]:
        classes = confusion.classes
        count_TR, share_TR = matrices(confusion)
        table = class_table(classes, count_TR)
        seen = (
            f"Test accuracy of each class in the first repetition of “{name}”; "
            f"drawn are the {NUM_WORST} lowest."
        )
        make = partial(_bars, table.head(NUM_WORST), "accuracy_fraction", "% read rightly")
        yield Section("classes", "Per-class accuracy", seen, table, make)
        table, chosen = lookalikes(classes, count_TR, NUM_MATRIX)
        seen = (
            f"What the first repetition of “{name}” read in place of characters that look alike; "
            "below, test images."
        )
        make = partial(
            charts.matrix, share_TR[np.ix_(chosen, chosen)], [classes[number] for number in chosen]
        )
        glyphs = [glyph(example, classes, count_TR) for example in confusion.examples]
        yield Section("lookalikes", "Look-alikes", seen, table, make, glyphs)


def _published(profile: Profile, frame: pd.DataFrame) -> Section:
    theirs = pd.DataFrame(
        [asdict(cell.published) if cell.published else {} for cell in profile.cells]
    ).add_prefix("published ")
    theirs = theirs.dropna(axis="columns", how="all")
    ours = frame[["name", "device", RATE, "train_s", "test_accuracy_fraction"]]
    table = ours.replace({"device": {"": "not measured here"}}).join(theirs)[
        theirs.notna().any(axis=1)
    ]
    seen = (
        "Published figures as their source gives them, beside ours; the hardware differs, so no "
        "ratio is drawn."
    )
    return Section("published", "Published figures", seen, table)


def _failures(profile: Profile) -> Section:
    cells = profile.cells
    rows = [
        (c.name, f"seed {r.seed}: {r.failed}") for c in cells for r in c.repetitions if r.failed
    ]
    rows += [(c.name, c.not_measured) for c in cells if c.not_measured]
    seen = "Repetitions that failed, and cells that cannot be measured here."
    return Section("failures", "Not measured", seen, pd.DataFrame(rows, columns=["name", "why"]))


def _circumstances(profile: Profile) -> Section:
    done = [repetition for cell in profile.cells for repetition in cell.good]
    distinct = {json.dumps(asdict(r.facts) | {"command": None}, sort_keys=True) for r in done}
    notes = sorted({note for r in done for note in r.notes})
    rows = [("command", profile.command), *(("note", note) for note in notes)]
    for place, facts in enumerate(map(json.loads, sorted(distinct)), 1):
        which = f" of machine {place}" if len(distinct) > 1 else ""
        rows += [(name + which, str(value)) for name, value in facts.items() if value is not None]
    seen = "The command, what the runs noted, and machine and versions of the repetitions."
    return Section(
        "circumstances",
        "Circumstances",
        seen,
        pd.DataFrame(rows, columns=["circumstance", "value"]),
    )


def _ceiling(folder: Path, profile: Profile) -> Iterator[Section]:
    if found := distances(folder, cells_frame(profile)):
        seen, table = found
        make = partial(_bars, table.head(NUM_BARS), "test_accuracy_fraction", "% read rightly")
        yield Section("ceiling", "The ceiling", seen, table, make)


def _extras(folder: Path) -> Iterator[Section]:
    """Sections of the tables that other commands left in the folder."""
    for key, (title, name, rows) in EXTRA.items():
        path = folder / name
        if path.exists():
            try:
                content = clean(parse_json(path.read_bytes(), name))
                table = typed(list[dict[str, Any]], content[rows], rows)
            except (OSError, Damaged, LookupError, TypeError, RecursionError):
                raise UserError(
                    f"{path}: holds no table `{rows}`; make it anew, or remove it"
                ) from None
            yield Section(key, title, f"{content.get('title', title)}.", pd.DataFrame(table))


def _few(cells: pd.DataFrame) -> pd.DataFrame:
    """The cells a chart shows: the ladder's, else the first; its table has all."""
    return cells[cells["ladder"]] if cells["ladder"].any() else cells.head(NUM_BARS)


def _bars(frame: pd.DataFrame, column: str, xlabel: str) -> Figure:
    """A bar a row, a cell or a class; fractions are drawn in percent."""
    scale = 100 if column.endswith("fraction") else 1
    names, font = (frame["name"], None) if "name" in frame else (frame["class"], charts.MONO)
    texts = [show(column, value) for value in frame[column]]
    return charts.bars(names, scale * frame[column], texts, xlabel, font=font)


def _lines(frame: pd.DataFrame, x: str, y: str, keys: list[str]) -> list[Line]:
    """A line for each combination of `keys` that has two points, named by the keys that vary."""
    varying = [key for key in keys if frame[key].nunique(dropna=False) > 1]
    drawn = []
    for _, group in frame.groupby(keys, dropna=False, sort=False):
        points = group.groupby(x)[y].median()
        values = [(key.rpartition(".")[2], group[key].iloc[0]) for key in varying]
        name = ", ".join(
            value if isinstance(value, str) else f"{key} {show(key, value)}"
            for key, value in values
        )
        if len(points) > 1:
            drawn.append(Line(name, list(points.index), list(points)))
    return drawn[: charts.MOST]


def page(profile: Profile, sections: list[Section]) -> str:
    """The report as one HTML page that loads nothing and runs nothing."""
    facts = _facts(cells_frame(profile))
    return style.render("page.html", title=profile.title, facts=facts, sections=sections)


def _facts(frame: pd.DataFrame) -> list[tuple[str, str]]:
    """The few figures to see first."""
    known = frame[frame[RATE].notna()]
    rungs, several = (
        known[known["ladder"]],
        known[(known["ranks"] > 1) & known["efficiency"].notna()],
    )
    best, facts = known.nlargest(1, RATE), []
    facts += [
        (number(rate), f"samples/s at most: {name}")
        for rate, name in zip(best[RATE], best["name"], strict=True)
    ]
    if len(rungs) > 1 and rungs["device"].nunique() == 1:
        gain = rungs[RATE].iloc[-1] / rungs[RATE].iloc[0]
        facts.append((f"{gain:.2f} x", "from the ladder's first rung to its last"))
    for _, cell in several.nlargest(1, ["ranks", "efficiency"]).iterrows():
        facts.append(
            (f"{100 * cell['efficiency']:.0f} %", f"best efficiency of {cell['ranks']} ranks")
        )
    if known["test_accuracy_fraction"].notna().any():
        facts.append(
            (
                f"{100 * known['test_accuracy_fraction'].max():.2f} %",
                "test accuracy of the best cell",
            )
        )
    return facts


def markdown(profile: Profile, sections: list[Section]) -> str:
    """The report's tables for a README."""
    lines = [f"# {markdown_text(profile.title)}", ""]
    for section in sections:
        lines += [f"## {section.title}", "", markdown_text(section.seen), ""]
        if section.picture:
            lines += [f"![{section.title}](figures/{section.key}.svg)", ""]
        head = f"| {' | '.join(markdown_text(name) for name, _ in section.columns)} |"
        align = "".join("r" if is_number else "l" for _, is_number in section.columns)
        lines += [
            *markdown_table(head, align, (map(markdown_text, row) for row in section.rows)),
            "",
        ]
    return "\n".join(lines)


def markdown_text(text: str) -> str:
    """`text`, what Markdown or HTML would read as more than text as character references."""
    return re.sub(r"[^\w\s.,%/()+=“”-]|_|(?<=www)\.", lambda m: f"&#{ord(m[0])};", text)


def csv_text(frame: pd.DataFrame) -> str:
    """The table as CSV; a text that a spreadsheet would take for a formula gets a ' before it."""

    def guard(value: Any) -> Any:
        return (
            f"'{value}"
            if isinstance(value, str) and value.startswith(("=", "+", "-", "@"))
            else value
        )

    guarded = frame.map(guard).rename(columns=guard)
    return str(guarded.to_csv(index=False, lineterminator="\n"))
