"""Whole trainings, all to their end, seed by seed: recipes, networks and what each part is worth.

A group is a list of sides that are trained in turn with the same seeds; its first side is what the
others are compared with. Each group leaves a file of its own. Where several runs train at once,
which takes less time in all, the file has their accuracies and no times.
"""

import os
import subprocess
import sys
import tempfile
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass, replace
from itertools import combinations, product
from pathlib import Path
from statistics import mean, median

import click

from engine.errors import UserError, exit_on_user_error
from engine.host import ROOT, num_cpus
from engine.report import RunReport, read_report
from tests.bench import OUT
from tools.measure.evaluation import read_evaluation
from tools.measure.merges import ALL
from tools.report.rows import Claim, Row, claim, row, write_result

FAST = ("--recipe=fast", "--amp", "--cuda-graphs")
BEST = ("--recipe=best", "--amp", "--cuda-graphs")
LARGE = ("--recipe=large-batch", "--amp", "--cuda-graphs")
LARGE_FAST = (*FAST, "--batch-size=512", "--set=optim.learning_rate=0.01")
"""Half the time, and still more than the study's accuracy: of all typefaces, not of the sample."""
RESIDUAL = ("--recipe=residual", "--amp", "--cuda-graphs")
VIT = ("--recipe=vit", "--cuda-graphs")
"""In fp32: its many small products take longer in bf16 on a CPU."""
ENSEMBLE = "test accuracy of the ensemble"
MOST_MEMBERS = 4
Reports = dict[str, list[RunReport]]
"""By the side's name, a report for each seed."""


@dataclass(frozen=True)
class Group:
    """Sides that are compared: flags of engine.run by name, and what they must reach."""

    title: str
    sides: dict[str, tuple[str, ...]]
    claims: Callable[[Reports], list[Claim]]
    evaluated: tuple[str, ...] = ()
    """Sides whose runs are also evaluated together; see `together`."""


def train(data: Path, flags: tuple[str, ...], folder: Path, num_threads: int | None) -> RunReport:
    """One run of engine.run, or the one that is in its folder already; its report.

    Args:
        num_threads: None: as the engine chooses.
    """
    command = [
        sys.executable,
        "-m",
        "engine.run",
        "--device=cpu",
        f"--data={data}",
        f"--out={folder}",
        "--resume=auto",
        *flags,
    ]
    threads = {"OMP_NUM_THREADS": str(num_threads)} if num_threads else {}
    subprocess.run(command, cwd=ROOT, env=os.environ | threads, check=True)
    return read_report(folder)


@dataclass(frozen=True)
class Plan:
    """What is trained of a group, and where its runs lie."""

    data: Path
    name: str
    seeds: int
    extra: tuple[str, ...] = ()
    """Flags that shorten a smoke run."""
    at_once: int = 1
    """Runs that train side by side, on equal shares of the cores."""

    def trained(self, place: Path) -> tuple[Reports, dict[str, list[Path]]]:
        """The reports and folders of all sides, trained in turn, seed by seed."""
        sides = GROUPS[self.name].sides
        seeds = range(1, self.seeds + 1)
        num_threads = max(num_cpus() // self.at_once, 1) if self.at_once > 1 else None
        folders = {
            side: [place / self.name / f"{number}-{seed}" for seed in seeds]
            for number, side in enumerate(sides)
        }

        def run(what: tuple[int, str]) -> RunReport:
            seed, side = what
            given = (*sides[side], f"--seed={seed}", *self.extra)
            return train(self.data, given, folders[side][seed - 1], num_threads)

        reports: Reports = {side: [] for side in sides}
        runs = list(product(seeds, sides))
        with ThreadPoolExecutor(self.at_once) as pool:
            for (_, side), report in zip(runs, pool.map(run, runs), strict=True):
                reports[side].append(report)
        _check_commits([run for runs in reports.values() for run in runs], place)
        return reports, folders


def _check_commits(reports: list[RunReport], place: Path) -> None:
    commits = {report.environment.commit for report in reports}
    if len(commits) > 1:
        what = f"holds runs of the commits {', '.join(sorted(commits))}"
        raise UserError(f"{place}: {what}; figures are of one: give another folder as --runs")


def bench(out: Path, plan: Plan, runs: Path | None = None) -> None:
    """Measure a group, write OUT/cpu_<name>.json.

    Args:
        runs: where runs are kept, and found by the next call, which goes on; None: nowhere.
    """
    with ExitStack() as stack:
        place = runs or Path(stack.enter_context(tempfile.TemporaryDirectory()))
        reports, folders = plan.trained(place)
        evaluated = GROUPS[plan.name].evaluated if plan.seeds > 1 else ()
        more = [each for side in evaluated for each in together(side, folders[side])]
    _write(out, plan, reports, more)


def _write(out: Path, plan: Plan, reports: Reports, more: list[Row]) -> None:
    """The result file: figures of each side, comparisons with the first, `more`, claims."""
    group = GROUPS[plan.name]
    first, *others = reports
    alone = plan.at_once == 1
    rows = [each for side, runs in reports.items() for each in rows_of(side, runs, timed=alone)]
    rows += [compared(side, reports[side], first, reports[first]) for side in others]
    one = reports[first][0]
    how = "one seed after another" if alone else f"up to {plan.at_once} runs at once, so no times"
    write_result(
        out / f"cpu_{plan.name}.json",
        title=f"{group.title}: {one.num_train_samples:,} images, two cores, {how}",
        environment=one.environment,
        rows=rows + more,
        claims=group.claims(reports) + ensemble_claims(more),
    )


def together(side: str, folders: list[Path]) -> list[Row]:
    """More figures of a side's first runs, and of the average of their probabilities."""
    command = [sys.executable, "-m", "tools.evaluate", *map(str, folders[:MOST_MEMBERS])]
    out = folders[0].parent / f"evaluated-{folders[0].name}"
    subprocess.run([*command, "--ensemble", "--out", str(out)], cwd=ROOT, check=True)
    found = read_evaluation(out)
    assert found.ensemble is not None
    pooled = {each.name: each for each in found.pooled}
    rows = []
    for name in ("top-2", "top-1, EMNIST ByMerge", f"top-1, {ALL}"):
        if each := pooled.get(name):
            values = (each.low, each.value, each.high)
            figure = row(f"{side}: {name}", [100 * value for value in values], "%")
            rows.append(replace(figure, value=100 * each.value, n=each.num_runs))
    accuracy = 100 * found.ensemble.scores.accuracy_fraction
    return [*rows, row(f"{side}: {ENSEMBLE} of {len(found.runs)}", [accuracy], "%")]


def ensemble_claims(rows: list[Row]) -> list[Claim]:
    """The best ensemble is as right as was asked for."""
    found = [each.value for each in rows if ENSEMBLE in each.name]
    return [claim("the best ensemble's test accuracy (%)", max(found), 91.0)] if found else []


def accuracies(runs: Sequence[RunReport]) -> list[float]:
    """Percent of the test split."""
    return [100 * (run.test_accuracy_fraction or 0.0) for run in runs]


def rows_of(side: str, runs: list[RunReport], *, timed: bool) -> list[Row]:
    """Accuracy of a side, and its time and throughput where nothing ran beside it."""
    one = runs[0]
    plural = "" if one.num_epochs == 1 else "s"
    title = f"{side}, {one.num_epochs} epoch{plural}, batch {one.config.global_batch}"
    val = [100 * (run.val_accuracy_fraction or 0.0) for run in runs]
    times = [
        row(f"{title}: training time", [run.train_s for run in runs], "s"),
        row(f"{title}: throughput", [run.samples_per_s for run in runs], "samples/s"),
    ]
    return [
        *(times if timed else ()),
        row(f"{title}: test accuracy", accuracies(runs), "%"),
        row(f"{title}: best validation accuracy", val, "%"),
    ]


def compared(side: str, runs: list[RunReport], other: str, others: list[RunReport]) -> Row:
    """The chance that the two sides' mean accuracies differ so much if they were one."""
    chance = permutation_p(accuracies(runs), accuracies(others))
    return row(f"{side} against {other}, test accuracy: p", [chance], "")


def permutation_p(ours: Sequence[float], theirs: Sequence[float]) -> float:
    """Two-sided exact permutation test of two means (Fisher, 1935).

    The share of all ways to deal the values into groups of these sizes whose means differ at least
    as much; with 5 and 5 at best 2 of 252.
    """
    pooled, size = [*ours, *theirs], len(ours)
    total = sum(pooled)

    def gap(group: Sequence[float]) -> float:
        return abs(sum(group) / size - (total - sum(group)) / len(theirs))

    measured = gap(ours) - 1e-9
    gaps = [gap(group) for group in combinations(pooled, size)]
    return sum(each >= measured for each in gaps) / len(gaps)


def recipe_claims(reports: Reports) -> list[Claim]:
    """Fast takes a thirtieth of the study's time for its accuracy; best has more than ever."""
    study, fast, best, *_ = reports.values()
    ratio = median(run.train_s for run in study) / median(run.train_s for run in fast)
    more = mean(accuracies(fast)) - mean(accuracies(study))
    return [
        claim("the study's training time over fast's (x)", ratio, 30.0),
        claim("fast's mean test accuracy less the study's (points)", more, 0.0),
        claim("best's mean test accuracy (%)", mean(accuracies(best)), 89.5),
    ]


def network_claims(reports: Reports) -> list[Claim]:
    """A larger network has more accuracy."""
    residual = mean(accuracies(reports["residual"]))
    return [claim("residual's mean test accuracy (%)", residual, 90.5)]


def vit_claims(reports: Reports) -> list[Claim]:
    """A transformer over patches has the study's accuracy, too."""
    vit = mean(accuracies(reports["vit (fp32)"]))
    return [claim("vit's mean test accuracy (%)", vit, 88.5)]


def large_batch_claims(reports: Reports) -> list[Claim]:
    """A ramp to large batches costs little accuracy."""
    small, ramp, *_ = reports.values()
    less = mean(accuracies(small)) - mean(accuracies(ramp))
    return [claim("less test accuracy by the ramp than at 512 (points)", less, 0.3, at_most=True)]


def no_claims(reports: Reports) -> list[Claim]:
    """Nothing must be reached."""
    return []


def settings(*assignments: str) -> tuple[str, ...]:
    """Flags of engine.run."""
    return tuple(f"--set={assignment}" for assignment in assignments)


GROUPS = {
    "fullsize": Group(
        "The recipes and the study's",
        {
            "study": ("--recipe=study",),
            "fast (first layer whitened and frozen)": FAST,
            "best": BEST,
            "fast at batch 512, rate 0.01": LARGE_FAST,
        },
        recipe_claims,
    ),
    "networks": Group(
        "Networks, each with its recipe",
        {"best": BEST, "residual": RESIDUAL},
        network_claims,
        evaluated=("best", "residual"),
    ),
    "vit": Group(
        "A vision transformer beside fast",
        {"fast": FAST, "vit (fp32)": VIT},
        vit_claims,
    ),
    "large_batch": Group(
        "Large batches, 12 epochs each",
        {
            "512": (*LARGE, *settings("optim.batch_schedule=fixed", "optim.batch_ramp=")),
            "512, 2048, 8192, four epochs each": LARGE,
            "8192": (
                *LARGE,
                *settings("optim.batch_schedule=fixed", "optim.batch_ramp="),
                "--batch-size=8192",
                *settings("optim.learning_rate=0.03", "optim.beta2=0.97"),
            ),
        },
        large_batch_claims,
    ),
    "ablations": Group(
        "Fast, and fast with one part otherwise",
        {
            "fast": FAST,
            "first layer trained, rate 0.008": (
                *FAST,
                *settings("model.first_layer=trained", "optim.learning_rate=0.008"),
            ),
            "order exact": (*FAST, "--order=exact"),
            "one_cycle, warm-up 0.2": (
                *FAST,
                *settings("optim.schedule=one_cycle", "optim.warmup_fraction=0.2"),
            ),
            "beta2 0.999": (*FAST, *settings("optim.beta2=0.999")),
            "no label smoothing": (*FAST, *settings("optim.label_smoothing=0.0")),
            "batch 512, rate 0.01": LARGE_FAST,
        },
        no_claims,
    ),
}
"""What can be measured: python -m tests.bench.fullsize --data RECORDS --group NAME."""


@click.command()
@click.option(
    "--data",
    type=click.Path(path_type=Path),
    required=True,
    help="Records of all typefaces, --split random.",
)
@OUT
@click.option(
    "--group",
    "groups",
    type=click.Choice(list(GROUPS)),
    multiple=True,
    help="What to train; all, if it is left out.",
)
@click.option("--seeds", default=5, show_default=True, help="Runs of each side.")
@click.option(
    "--runs",
    type=click.Path(path_type=Path),
    help="Keep the runs there: the same command goes on where one was cut off, or with more seeds.",
)
@click.option(
    "--at-once",
    type=click.IntRange(1),
    default=1,
    show_default=True,
    help="Runs that train side by side, on equal shares of the cores: accuracies and no times.",
)
def main(
    data: Path, out: Path, groups: tuple[str, ...], seeds: int, runs: Path | None, at_once: int
) -> None:
    """Benchmark whole trainings."""
    with exit_on_user_error():
        for name in groups or GROUPS:
            bench(out, Plan(data, name, seeds, at_once=at_once), runs)


if __name__ == "__main__":
    main()
