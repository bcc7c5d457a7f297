"""A sweep: settings that are varied, the members that follow, and its folder; without torch.

    OUT/sweep.toml              the config that all members share, and what is swept
    OUT/001_seed=1/ ...         a member: a run's folder like any other
    OUT/sweep.json              what became of the members, and what their vote is worth

Members differ in what is trained; where and how the work is done is the same for all. It trains
nothing (train/members.py, train/outcome.py).
"""

import math
import re
import tomllib
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from typing import Any, Literal

import tomli_w

from engine.config import OWN, RunConfig, override, settings_of
from engine.config_text import config_of, parse_value, to_toml
from engine.durable import write_file
from engine.errors import UserError, printable
from engine.report import SWEEP, Environment
from engine.train.folder import check_same_training, newest_manifest

RESULT = "sweep.json"
TABLE = "sweep"
"""Of sweep.toml: each swept setting with its values."""
FORMAT = 1
MOST_MEMBERS = 256
RANGE = re.compile(r"([+-]?[0-9]{1,19})\.\.([+-]?[0-9]{1,19})")
EXAMPLE = "write --sweep optim.learning_rate=0.003,0.01 or --sweep seed=1..4"
MOST_LETTERS = 100
"""Of a member's folder."""


@dataclass(frozen=True, kw_only=True)
class Setting:
    """A setting and its value."""

    name: str
    """Dotted."""
    value: Any

    def __str__(self) -> str:
        return f"{self.name.rpartition('.')[2]}={printable(str(self.value))}"


@dataclass(frozen=True)
class Axis:
    """A setting, and the values that members have of it."""

    name: str
    values: tuple[Any, ...]


@dataclass(frozen=True, kw_only=True)
class Member:
    """One of the trainings of a sweep."""

    number: int
    """From 1."""
    settings: tuple[Setting, ...]
    """Those that are swept."""
    config: RunConfig

    @property
    def name(self) -> str:
        """What its lines begin with: 3 seed=1."""
        return " ".join([str(self.number), *map(str, self.settings)])

    @property
    def folder(self) -> str:
        """Within the sweep's."""
        text = "_".join([f"{self.number:03}", *map(str, self.settings)])
        return re.sub(r"[^\w.+=-]", "_", text, flags=re.ASCII)[:MOST_LETTERS]


@dataclass(frozen=True)
class Sweep:
    """What is to be trained."""

    config: RunConfig
    """What all members share."""
    axes: tuple[Axis, ...]
    members: list[Member]

    @staticmethod
    def of(config: RunConfig, axes: tuple[Axis, ...]) -> "Sweep":
        """Every combination of the values, the last axis varying fastest.

        Raises:
            UserError: there are too many; a setting is unknown, its value out of bounds, or it
                cannot be swept; two members are the same.
        """
        return Sweep(config, axes, _members_of(config, axes))


@dataclass(frozen=True, kw_only=True)
class MemberResult:
    """What became of a member."""

    number: int
    folder: str
    settings: list[Setting]
    status: Literal["finished", "stopped", "failed"]
    failure: str | None = None
    """Why it failed."""
    num_epochs: int
    train_s: float
    """On a CPU its own; on a GPU members train at the same time, and this is the time of all."""
    val_accuracy_fraction: float | None = None
    """The best that its training saw."""
    test_accuracy_fraction: float | None = None
    temperature: float | None = None
    """What its logits are to be divided by for the least loss on val; None: not asked."""


@dataclass(frozen=True, kw_only=True)
class Vote:
    """The mean of the finished members' probabilities, in fp32."""

    num_members: int
    is_calibrated: bool
    """Whether each has its logits divided by its own temperature first."""
    val_accuracy_fraction: float | None
    test_accuracy_fraction: float | None


@dataclass(frozen=True, kw_only=True)
class SweepResult:
    """sweep.json."""

    format: int = FORMAT
    status: Literal["finished", "stopped"]
    environment: Environment
    dataset_fingerprint: str
    launches: str
    """How the members' launches went together."""
    wall_s: float
    """Of this process, from the first member's opening to the last one's end."""
    members: list[MemberResult]
    votes: list[Vote]

    def __post_init__(self) -> None:
        if self.format != FORMAT:
            raise ValueError(f"format {self.format}, this reader knows {FORMAT}")
        if not self.members:
            raise ValueError("it has no member")


def parse_sweeps(texts: Sequence[str]) -> tuple[Axis, ...]:
    """["seed=1..4", "optim.learning_rate=0.003,0.01"] -> axes.

    Values are those of --set, with commas between; whole numbers A..B; or a list of TOML.

    Raises:
        UserError: it is none of these, or a range makes too many members.
    """
    axes: list[Axis] = []
    for text in texts:
        where = f"--sweep {text}"
        name, equals, values = (part.strip() for part in text.partition("="))
        if not equals or not name:
            raise UserError(f"{where}: has no '='; {EXAMPLE}")
        if name in (axis.name for axis in axes):
            raise UserError(f"{where}: {name} is swept twice; give all its values in one --sweep")
        axes.append(Axis(name, _values(values, where)))
    return tuple(axes)


def _values(text: str, where: str) -> tuple[Any, ...]:
    if found := RANGE.fullmatch(text):
        first, last = int(found[1]), int(found[2])
        if last < first:
            raise UserError(f"{where}: runs backwards; write the lower number first")
        _check_number(last - first + 1, where)
        return tuple(range(first, last + 1))
    listed = parse_value(text)
    values = listed if isinstance(listed, list) else [parse_value(p) for p in text.split(",")]
    if not values or "" in values:
        raise UserError(f"{where}: a value is missing; {EXAMPLE}")
    return tuple(values)


def _check_number(num_members: int, where: str) -> None:
    if num_members > MOST_MEMBERS:
        what = f"makes {num_members:,} members, a sweep has at most {MOST_MEMBERS}"
        raise UserError(f"{where}: {what}; give fewer values, or several sweeps")


def _members_of(config: RunConfig, axes: Sequence[Axis]) -> list[Member]:
    _check_number(math.prod(len(axis.values) for axis in axes), "--sweep")
    if config.step.canonical:
        why = "fixes the arithmetic of a whole process, and is for one run"
        raise UserError(f"--sweep: step.canonical {why}; leave one of the two out")
    for axis in axes:
        _check_axis(axis)
    members = []
    for number, values in enumerate(product(*(axis.values for axis in axes)), start=1):
        pairs = list(zip(axes, values, strict=True))
        settings = tuple(Setting(name=axis.name, value=value) for axis, value in pairs)
        given = {setting.name: setting.value for setting in settings}
        members.append(
            Member(number=number, settings=settings, config=override(config, given, "--sweep"))
        )
    _check_different(members)
    return members


def _check_axis(axis: Axis) -> None:
    """UserError where members would not differ by it, or could not share a process."""
    found = [each for name, each, *_ in settings_of(RunConfig()) if name == axis.name]
    where = f"--sweep {axis.name}"
    if found and found[0].metadata["environment"]:
        why = "says where or how the work is done, not what is trained"
        raise UserError(f"{where}: {why}; set it for all members with --set")
    if axis.name == "step.canonical":
        raise UserError(f"{where}: fixes a whole process's arithmetic; start a run for each value")
    if axis.name == "model.name" and any(OWN.fullmatch(str(value)) for value in axis.values):
        what = "a class of your own is of all members"
        raise UserError(f"{where}: {what}; name it with --model, and sweep another setting")


def _check_different(members: Sequence[Member]) -> None:
    seen: dict[str, Member] = {}
    for member in members:
        other = seen.setdefault(member.config.digest(), member)
        if other is not member:
            what = f"members {other.number} and {member.number} are the same training"
            raise UserError(f"--sweep: {what}, {member.name}; give each value once")


def write_sweep(out: Path, sweep: Sweep) -> None:
    """Write sweep.toml: from then on OUT is a sweep."""
    table = tomli_w.dumps({TABLE: {axis.name: list(axis.values) for axis in sweep.axes}})
    write_file(out / SWEEP, f"{to_toml(sweep.config)}\n{table}".encode())


def read_sweep(out: Path) -> tuple[RunConfig, tuple[Axis, ...]]:
    """What `write_sweep` wrote.

    Raises:
        UserError: it cannot be read, or is damaged.
    """
    file = out / SWEEP
    remedy = "start anew with another --out"
    try:
        tree = tomllib.loads(file.read_text(encoding="utf-8"))
        table = dict(tree.pop(TABLE))
        axes = tuple(Axis(name, tuple(values)) for name, values in table.items())
    except (OSError, UnicodeDecodeError, KeyError, TypeError, ValueError) as error:
        raise UserError(f"{file}: cannot be read ({error}); {remedy}") from None
    return config_of(tomli_w.dumps(tree), str(file)), axes


def check_goes_on(out: Path, members: Sequence[Member]) -> None:
    """UserError if a member that was started would go on as another training."""
    for member in members:
        run = out / member.folder
        if manifest := newest_manifest(run):
            check_same_training(run, manifest, member.config)


def ranked(result: SweepResult) -> list[MemberResult]:
    """The members by validation accuracy, those without one last."""

    def place(member: MemberResult) -> tuple[bool, float]:
        accuracy = member.val_accuracy_fraction
        return accuracy is None, -(accuracy or 0.0)

    return sorted(result.members, key=place)


def result_text(result: SweepResult) -> str:
    """The members by validation accuracy, and their vote, as a table of text."""
    names = [printable(setting.name) for setting in result.members[0].settings]
    head = ["member", *names, "val", "test", "epochs", "train", ""]
    rows = [head, *map(_cells, ranked(result))]
    widths = [max(len(row[column]) for row in rows) for column in range(len(head))]
    lines = ["  ".join(map(str.rjust, row, widths)).rstrip() for row in rows]
    return "\n".join([*lines, *map(_vote_text, result.votes)])


def _cells(member: MemberResult) -> list[str]:
    values = [printable(str(setting.value)) for setting in member.settings]
    accuracies = map(_percent, (member.val_accuracy_fraction, member.test_accuracy_fraction))
    end = {"finished": "", "stopped": "stopped", "failed": f"failed: {member.failure}"}
    done = [str(member.num_epochs), f"{member.train_s:.2f} s", end[member.status]]
    return [str(member.number), *values, *accuracies, *done]


def _vote_text(vote: Vote) -> str:
    kind = "each calibrated on val" if vote.is_calibrated else "mean of probabilities"
    val, test = map(_percent, (vote.val_accuracy_fraction, vote.test_accuracy_fraction))
    return f"vote of {vote.num_members}, {kind}: val {val}, test {test}"


def _percent(fraction: float | None) -> str:
    return "-" if fraction is None else f"{fraction:.2%}"
