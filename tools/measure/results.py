"""What measuring leaves, typed: cells, their repetitions, and the profile.json that holds them.

Written by tools/measure/runner.py and cell.py, read by tools/report. Names end in their unit, and
None means: not asked for, or the machine does not tell. Shapes: C classes.
"""

import base64
import binascii
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from engine.durable import Damaged, parse_json
from engine.errors import UserError, printable
from engine.report import Environment, RankBytes
from engine.typed import typed

FORMAT = 1
RATE = "samples_per_s"
LARGEST_SIDE = 4096
Settings = dict[str, Any]
"""RunConfig's settings by dotted name, each of its own kind."""


@dataclass(frozen=True, kw_only=True)
class Example:
    """A glyph of the test split that was read as another class."""

    true: int
    read: int
    height: int
    width: int
    pixels: str
    """uint8 in base64."""

    def __post_init__(self) -> None:
        if not (0 < self.height <= LARGEST_SIDE and 0 < self.width <= LARGEST_SIDE):
            raise ValueError(f"{self.height} x {self.width} is no size of an image")
        try:
            pixels = base64.b64decode(self.pixels, validate=True)
        except binascii.Error as error:
            raise ValueError(f"pixels are no base64 ({error})") from None
        if len(pixels) != self.height * self.width:
            raise ValueError(f"{len(pixels)} pixels for {self.height} x {self.width}")


@dataclass(frozen=True, kw_only=True)
class Confusion:
    """What was read in place of what, over the test split."""

    classes: list[str]
    counts: list[tuple[int, int, int]]
    """All nonzero ones, as (true class, read class, how often)."""
    examples: list[Example]

    def __post_init__(self) -> None:
        known = range(len(self.classes))
        pairs = [(true, read) for true, read, _ in self.counts]
        pairs += [(example.true, example.read) for example in self.examples]
        if not all(true in known and read in known for true, read in pairs):
            raise ValueError(f"a class is not one of the {len(known)} named ones")
        if not all(count > 0 for _, _, count in self.counts):
            raise ValueError("a count is not above 0")


@dataclass(frozen=True, kw_only=True)
class Epoch:
    """A line of metrics.jsonl."""

    epoch: int
    step: int | None = None
    train_s: float
    train_loss: float | None = None
    train_accuracy_fraction: float | None = None
    samples_per_s: float | None = None
    val_loss: float | None = None
    val_accuracy_fraction: float | None = None


@dataclass(frozen=True, kw_only=True)
class Repetition:
    """One measurement of a cell: why it failed, or its figures, those of rank 0."""

    seed: int
    digest: str = ""
    """Of all that the measurement was told: it is not made again while this stays the same."""
    failed: str = ""
    environment: Environment | None = None
    effective: Settings = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)
    num_ranks: int | None = None
    global_batch: int | None = None
    num_steps: int | None = None
    steps_per_launch: float | None = None
    """As they were launched on the clock: an epoch's last steps go one by one."""
    samples_per_s: float | None = None
    """Over all ranks."""
    step_ms: float | None = None
    """Median, and the 10th and 90th percentile."""
    step_p10_ms: float | None = None
    step_p90_ms: float | None = None
    data_wait_fraction: float | None = None
    host_peak_rss_gib: float | None = None
    torch_peak_gib: float | None = None
    device_used_gib: float | None = None
    gpu_utilisation_percent: float | None = None
    power_w: float | None = None
    energy_j_per_ksample: float | None = None
    memory_gib_by_owner: dict[str, float] | None = None
    roofline_fraction: float | None = None
    kept: RankBytes | None = None
    """On rank 0 between two steps."""
    train_s: float | None = None
    time_to_target_s: float | None = None
    val_accuracy_fraction: float | None = None
    test_accuracy_fraction: float | None = None
    epochs: list[Epoch] = field(default_factory=list)
    confusion: Confusion | None = None
    stage_ms: dict[str, float] | None = None
    """Of the traced steps, which only the first repetition has."""

    def __post_init__(self) -> None:
        if not self.failed and (self.environment is None or not (self.samples_per_s or 0) > 0):
            raise ValueError("neither failed nor has a throughput and an environment")

    @property
    def rate(self) -> float:
        """samples/s of one that did not fail."""
        assert self.samples_per_s is not None
        return self.samples_per_s

    @property
    def facts(self) -> Environment:
        """Where one that did not fail was made."""
        assert self.environment is not None
        return self.environment


@dataclass(frozen=True, kw_only=True)
class Published:
    """Someone's figures; they are shown beside ours, and enter no ratio."""

    samples_per_s: float | None = None
    train_s: float | None = None
    test_accuracy_fraction: float | None = None
    gpu: str
    source: str


@dataclass(frozen=True, kw_only=True)
class CellResult:
    """A cell, and what was measured of it."""

    id: str
    name: str
    rung: str = ""
    base: str = ""
    """The rung that a rung's gain is over, where it names one; else it is the rung before."""
    ladder: bool
    axes: Settings
    """batch, ranks, and the settings that vary."""
    settings: Settings
    published: Published | None = None
    not_measured: str = ""
    """Why there are no repetitions."""
    repetitions: list[Repetition]

    def __post_init__(self) -> None:
        for axis, value in self.axes.items():
            if axis in ("batch", "ranks") and not (type(value) is int and 0 < value < 2**40):
                raise ValueError(f"{axis} is {value!r}, not a whole number from 1")
            if axis in RESERVED:
                raise ValueError(f"{axis} is no axis but a figure")

    @property
    def good(self) -> list[Repetition]:
        """The repetitions that did not fail."""
        return [repetition for repetition in self.repetitions if not repetition.failed]


RESERVED = {"id", "name", "ladder", "device", "num", "base", "gain", "speedup", "efficiency",
            "published", *Repetition.__dataclass_fields__} - {"seed"}  # fmt: skip
"""Columns of the tables that an axis must not take."""


@dataclass(frozen=True, kw_only=True)
class Profile:
    """All cells of a command: profile.json."""

    format: int = FORMAT
    title: str
    command: str
    cells: list[CellResult]

    def __post_init__(self) -> None:
        if self.format != FORMAT:
            raise ValueError(f"format {self.format}, this engine reads {FORMAT}")
        if not self.cells or len({cell.id for cell in self.cells}) < len(self.cells):
            raise ValueError("there are no cells, or two with the same id")


def read_profile(folder: Path) -> Profile:
    """FOLDER/profile.json, control characters of its texts shown as \\xNN.

    Raises:
        UserError: it is missing, of another format, or not as it is written.
    """
    path = folder / "profile.json"
    try:
        return typed(Profile, clean(parse_json(path.read_bytes(), path.name)), "")
    except OSError as error:
        raise UserError(
            f"{path}: cannot be read ({error.strerror}); name a folder of `tools/profile run`"
        ) from None
    except (Damaged, RecursionError) as error:
        raise UserError(
            f"{path}: is no profile of format {FORMAT} ({error}); "
            "make it anew with `tools/profile run`"
        ) from None


def read_epochs(run_folder: Path) -> list[Epoch]:
    """The lines of a run's metrics.jsonl.

    Raises:
        UserError: it is missing, or not as a run writes it.
    """
    path = run_folder / "metrics.jsonl"
    try:
        lines = path.read_bytes().splitlines()
        return [typed(Epoch, parse_json(line, path.name), path.name) for line in lines]
    except (OSError, Damaged) as error:
        raise UserError(
            f"{path}: cannot be read ({error}); name the folder of a finished run"
        ) from None


def clean(tree: Any) -> Any:
    """A tree of JSON with control characters of all its texts shown as \\xNN."""
    if isinstance(tree, dict):
        return {clean(key): clean(value) for key, value in tree.items()}
    if isinstance(tree, list):
        return [clean(value) for value in tree]
    return printable(tree) if isinstance(tree, str) else tree
