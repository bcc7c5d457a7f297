"""`tools/profile report` of a sweep: its members by validation accuracy, and their vote.

What DIR's sweep.json holds as a chart, sweep.svg and .png, and as a table, sweep.md. Texts from
the file are shown as text alone.
"""

from functools import partial
from pathlib import Path

import pandas as pd

from engine.durable import write_file, writing
from engine.errors import printable
from engine.train.sweep import RESULT, MemberResult, SweepResult, Vote, ranked
from engine.typed import read_result_as
from tools.report import charts
from tools.report.figures import percent
from tools.report.page import markdown_text
from tools.report.rows import markdown_table

NAME = "sweep.md"


def read_sweep_result(folder: Path) -> SweepResult:
    """FOLDER/sweep.json.

    Raises:
        UserError: it is missing, damaged or of another format.
    """
    remedy = "make it with engine.run --sweep"
    return read_result_as(SweepResult, folder / RESULT, "result of a sweep", remedy)


def write_sweep_report(folder: Path, out: Path) -> Path:
    """Write OUT/sweep.md, and sweep.svg and .png where there are accuracies; the table's path.

    Raises:
        UserError: FOLDER holds no result of a sweep, or OUT cannot be written.
    """
    result = read_sweep_result(folder)
    picture = _picture(result)
    with writing(out):
        out.mkdir(parents=True, exist_ok=True)
        if picture:
            write_file(out / "sweep.svg", picture.svg.encode())
            write_file(out / "sweep.png", picture.png)
        write_file(out / NAME, _page(result, has_picture=picture is not None).encode())
    return out / NAME


def _picture(result: SweepResult) -> charts.Picture | None:
    """Bars of validation accuracy: the votes', then the members'."""
    named = [(_vote_name(vote), vote.val_accuracy_fraction) for vote in result.votes]
    named += [(_name(member), member.val_accuracy_fraction) for member in ranked(result)]
    known = [(name, value) for name, value in named if value is not None]
    if not known:
        return None
    names = [name for name, _ in known]
    percents = pd.Series([100 * value for _, value in known])
    texts = [f"{value:.2f}" for value in percents]
    make = partial(charts.bars, names, percents, texts, "validation accuracy (%)")
    return charts.draw("sweep", make)


def _name(member: MemberResult) -> str:
    return printable(" ".join([str(member.number), *map(str, member.settings)]))


def _vote_name(vote: Vote) -> str:
    return f"vote of {vote.num_members}{', calibrated' * vote.is_calibrated}"


def _page(result: SweepResult, has_picture: bool) -> str:
    head = "| member | val | test | epochs | training | |"
    rows = [[_name(m), *_figures(m), m.failure or m.status] for m in ranked(result)]
    rows += [
        [_vote_name(vote), *map(_accuracy, _accuracies(vote)), "", "", ""] for vote in result.votes
    ]
    texts = [[markdown_text(printable(cell)) for cell in row] for row in rows]
    picture = ["![Validation accuracy of the members](sweep.svg)", ""] if has_picture else []
    how = f"{len(result.members)} members, {markdown_text(printable(result.launches))}."
    lines = ["# Sweep", "", how, "", *picture, *markdown_table(head, "lrrrrl", texts)]
    return "\n".join(lines) + "\n"


def _figures(member: MemberResult) -> list[str]:
    accuracies = map(_accuracy, _accuracies(member))
    return [*accuracies, str(member.num_epochs), f"{member.train_s:.2f} s"]


def _accuracies(of: MemberResult | Vote) -> tuple[float | None, float | None]:
    return of.val_accuracy_fraction, of.test_accuracy_fraction


def _accuracy(fraction: float | None) -> str:
    return "-" if fraction is None else percent(fraction)
