"""A run's folder as the live page shows it: figures, curves, confusions; it may still be training.

Files may be a stranger's, and half-written ones are met all the time: what is no line is left out.
"""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path
from typing import TypeVar

from engine.durable import Damaged, parse_json
from engine.errors import UserError, printable
from engine.report import RunReport, read_report
from engine.train.folder import METRICS, REPORT, holds_run
from engine.train.live import GLYPHS, LIVE, Line, parse_line
from engine.typed import typed

MOST_POINTS = 400
"""Of a curve; of a longer one every second, third, ... is shown."""
MOST_EVALUATIONS = 60
MOST_RUNS = 300
"""That a page offers."""
KEPT_LINES = 16_384
"""That are not parsed again when a file has grown."""
Stamp = tuple[tuple[int, int, int], ...]
"""Of the files that a run is read from: equal where nothing was written."""
T = TypeVar("T")


@dataclass(frozen=True, kw_only=True)
class Epoch:
    """A line of metrics.jsonl, as far as it is shown."""

    epoch: int
    step: int
    train_s: float
    train_loss: float
    train_accuracy_fraction: float
    samples_per_s: float
    val_loss: float | None = None
    val_accuracy_fraction: float | None = None


@dataclass(frozen=True)
class Point:
    """Of a curve."""

    num_epochs: float
    train_s: float
    value: float


@dataclass(frozen=True)
class Confusions:
    """Of an evaluation, the most frequent first."""

    title: str
    pairs: list[tuple[int, int, int]]
    """True class, class read, times."""


@dataclass(frozen=True, kw_only=True)
class Shown:
    """A run on the page."""

    name: str
    changed_s: float
    """When one of its files was written last, seconds since 1970."""
    figures: dict[str, str]
    curves: dict[str, list[Point]] = field(default_factory=dict)
    classes: list[str] = field(default_factory=list)
    height_pixels: int = 0
    width_pixels: int = 0
    confusions: list[Confusions] = field(default_factory=list)
    has_glyphs: bool = False


def runs_in(folders: Iterable[Path]) -> dict[str, Path]:
    """The runs that are these folders or lie in them, by names that may be shown."""
    found: dict[str, Path] = {}
    for folder in folders:
        for run in _runs_of(folder):
            name = printable(run.name)
            if name in found and found[name] != run:
                name = printable(f"{run.parent.name}/{run.name}")
            if run not in found.values() and len(found) < MOST_RUNS:
                found[name] = run
    return found


def _runs_of(folder: Path) -> list[Path]:
    if holds_run(folder):
        return [folder]
    try:
        return sorted(inner for inner in folder.iterdir() if holds_run(inner))
    except OSError:  # it has gone, or may not be read
        return []


def stamp_of(run: Path) -> Stamp:
    """Changes whenever one of the run's files does."""
    return tuple(_stamps(run))


def _stamps(run: Path) -> Iterator[tuple[int, int, int]]:
    for name in (METRICS, LIVE, REPORT):
        try:
            facts = (run / name).stat()
            yield facts.st_ino, facts.st_size, facts.st_mtime_ns
        except OSError:
            yield 0, 0, 0


def read_run(name: str, run: Path, stamp: Stamp) -> Shown:
    """What there is to show of a run."""
    epochs = [epoch for text in _lines(run / METRICS) if (epoch := _parse_epoch(text))]
    lines = [line for text in _lines(run / LIVE) if (line := _parse_line(text))]
    try:
        report = read_report(run) if (run / REPORT).is_file() else None
    except UserError:
        report = None
    network = report.network if report else None
    evaluations = _thinned([line for line in lines if line.evaluation], MOST_EVALUATIONS)
    return Shown(
        name=name,
        changed_s=max(mtime_ns for _, _, mtime_ns in stamp) / 1e9,
        figures=_figures(report, epochs, lines),
        curves=_curves(epochs, lines),
        classes=[printable(label) for label in network.classes] if network else [],
        height_pixels=network.height_pixels if network else 0,
        width_pixels=network.width_pixels if network else 0,
        confusions=[_confusions(line) for line in evaluations],
        has_glyphs=(run / GLYPHS).is_file(),
    )


def _lines(path: Path) -> list[bytes]:
    try:
        return path.read_bytes().splitlines() if path.is_file() else []
    except OSError:
        return []


@lru_cache(KEPT_LINES)
def _parse_line(text: bytes) -> Line | None:
    return parse_line(text)


@lru_cache(KEPT_LINES)
def _parse_epoch(text: bytes) -> Epoch | None:
    try:
        return typed(Epoch, parse_json(text, METRICS), METRICS)
    except Damaged:
        return None


def _confusions(line: Line) -> Confusions:
    assert line.evaluation
    pairs = line.evaluation.pairs
    return Confusions(f"{line.evaluation.split} after {line.num_epochs:.4g} epochs", pairs)


def _figures(report: RunReport | None, epochs: list[Epoch], lines: list[Line]) -> dict[str, str]:
    """A run's row of the table, by heading."""
    if report is None:
        return {"status": "starting"}
    is_over = report.status != "unfinished"
    done = max([report.num_epochs, *(e.epoch for e in epochs), *(x.num_epochs for x in lines)])
    rate = epochs[-1].samples_per_s if epochs and not is_over else report.samples_per_s
    train_s = max([report.train_s, *(e.train_s for e in epochs), *(x.train_s for x in lines)])
    device_gib, test = report.device_used_gib, report.test_accuracy_fraction
    accuracies = [e.val_accuracy_fraction for e in epochs if e.val_accuracy_fraction is not None]
    return {
        "status": report.status if is_over else "not finished",
        "epochs": f"{done:.4g} of {report.config.epochs}",
        "best val": f"{max(accuracies):.2%}" if accuracies else "",
        "test": "" if test is None else f"{test:.2%}",
        "samples/s": f"{rate:,.0f}",
        "training": f"{train_s:,.1f} s",
        "host": f"{report.host_peak_rss_gib:.2f} GiB",
        "device": "" if device_gib is None else f"{device_gib:.2f} GiB",
        "network": printable(report.config.model.name),
        "batch": f"{report.config.global_batch:,}",
        "seed": str(report.config.seed),
        "on": printable(report.environment.gpu_name or report.environment.cpu_name),
    }


def _curves(epochs: list[Epoch], lines: list[Line]) -> dict[str, list[Point]]:
    """By name; of what both files say at a step, the finer one is taken."""
    found: dict[str, dict[float, Point]] = {}

    def add(name: str, step: float, num_epochs: float, train_s: float, value: float | None) -> None:
        if value is not None:
            found.setdefault(name, {})[step] = Point(num_epochs, train_s, value)

    for each in epochs:
        at: tuple[float, float, float] = (each.step, each.epoch, each.train_s)
        add("train loss", *at, each.train_loss)
        add("train accuracy", *at, each.train_accuracy_fraction)
        add("samples/s", *at, each.samples_per_s)
        add("val loss", *at, each.val_loss)
        add("val accuracy", *at, each.val_accuracy_fraction)
    before = Line(step=0, num_epochs=0, train_s=0)
    for line in lines:
        at = (line.step, line.num_epochs, line.train_s)
        if line.evaluation:
            add(f"{line.evaluation.split} loss", *at, line.evaluation.loss)
            add(f"{line.evaluation.split} accuracy", *at, line.evaluation.accuracy_fraction)
        if line.reading:
            memory, losses = line.reading.memory, line.reading.losses
            for number, loss in enumerate(losses, start=1):
                add("train loss", *_between(before, line, number / len(losses)), loss)
            add("samples/s", *at, line.reading.samples_per_s)
            add("host GiB", *at, memory.host_peak_rss_gib)
            add("device GiB", *at, memory.device_used_gib)
            add("GPU %", *at, memory.gpu_utilisation_percent)
            add("GPU W", *at, memory.power_w)
            before = line
    return {
        name: _thinned([points[step] for step in sorted(points)], MOST_POINTS)
        for name, points in found.items()
    }


def _between(before: Line, line: Line, share: float) -> tuple[float, float, float]:
    """Step, epochs and seconds at this share of the way from one line to the next."""
    assert line.reading
    first = line.step - line.reading.num_steps
    pairs = (
        (first, line.step),
        (before.num_epochs, line.num_epochs),
        (before.train_s, line.train_s),
    )
    step, num_epochs, train_s = (a + share * (b - a) for a, b in pairs)
    return step, num_epochs, train_s


def _thinned(values: Sequence[T], most: int) -> list[T]:
    """At most `most` and one, evenly, the last among them."""
    stride = -(-len(values) // most) or 1
    return list(values[::-1][::stride][::-1])
