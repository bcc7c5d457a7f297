"""The parts of the GPU round, what is wanted most first; tools/gpu.py runs each in a process.

A part gets the Round and leaves its figures in OUT as they come: rows in a result file, or cells in
profile.json. It returns a sentence for everything that failed.
"""

import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import click
import torch

from engine import meters
from engine.config import NOT_IN_ALL, RunConfig, override, recipe_settings
from engine.data.records import Records
from engine.errors import first_cause, sentence
from engine.feeds.batch import Feed
from engine.host import ROOT
from engine.report import Environment, RunReport, read_report
from engine.train.members import Crew
from engine.train.session import open_session
from engine.train.sweep import Axis, Sweep
from engine.train.trainer import fit
from engine.world import World, start_world
from tools.measure.cell import timed
from tools.measure.in_process import InProcess
from tools.measure.kernels import cases, measure_case, setting
from tools.measure.matrix import Cell, read_cells
from tools.measure.results import Settings
from tools.measure.runner import Run
from tools.report.rows import Row, row, write_result

LADDER = ROOT / "bench_configs" / "ladder_h100.toml"
FIRST = ("fused AdamW, the eager fast step", "one graph a step", "16 steps a graph")
"""Rungs that are wanted most, at FIRST_BATCHES."""
FIRST_BATCHES = (64, 2048)
QUICK_BATCH = 64
QUICK_STEPS = 2
STUDY_ACCURACY = 0.8765
"""What the study's recipe reaches on typefaces.npz in 12 epochs (random split, two CPU cores)."""
FAST: Settings = {
    "step.precision": "bf16",
    "step.cuda_graphs": True,
    "step.steps_per_launch": 16,
    "data.feed": "resident",
}
LARGE: Settings = {"global_batch": 8192, "optim.learning_rate": 0.04, "epochs": 12}
"""The recipe at a global batch of 8192.

Of the rates 0.02, 0.04 and 0.08 the best on two cores: 88.12 %, against 88.7 % at 512.
"""

NUM_MEMBERS = 8
MEMBERS: Settings = {"global_batch": 256, "epochs": 12}
"""Small steps, which leave most of a GPU idle: eight shall be 4 times as fast as one."""
RECORD: Settings = recipe_settings("fast", "tools.gpu") | {
    "global_batch": 512,
    "optim.learning_rate": 0.012,
    "evaluate_every": 32,
}
"""The recipe fast in few steps, for a GPU, whose steps cost launches more than arithmetic."""


@dataclass(frozen=True, kw_only=True)
class Round:
    """What the parts share."""

    records: Records
    device: str
    out: Path
    kept: Path
    """The folder of the ladder's repetitions."""
    quick: bool

    @contextmanager
    def world(self) -> Iterator[World]:
        """This process on the device, on its side stream."""
        with start_world(self.device) as world, world.on_stream():
            yield world

    @property
    def cells(self) -> list[Cell]:
        """The ladder's; in a dry run each rung once, small, and nothing compiled."""
        cells = read_cells([LADDER])[1]
        if not self.quick:
            return cells
        small: dict[str, Cell] = {}
        for cell in cells:
            settings = cell.settings | {"global_batch": QUICK_BATCH, "step.compile": "off"}
            if settings.get("step.steps_per_launch", 1) > QUICK_STEPS:
                settings["step.steps_per_launch"] = QUICK_STEPS
            small.setdefault(cell.rung, replace(
                cell, name=cell.rung, settings=settings, axes={"batch": QUICK_BATCH, "ranks": 1},
                repetitions=1))  # fmt: skip
        return list(small.values())

    def run(self, cells: list[Cell] | None = None, lacking: dict[str, str] | None = None) -> Run:
        """The ladder as a profile in OUT."""
        return Run(
            title=f"{read_cells([LADDER])[0]}{' (dry run)' * self.quick}",
            cells=cells or self.cells,
            out=self.out,
            kept=self.kept,
            data=self.records.fingerprint,
            device=self.device,
            num_gpus=int(self.device == "cuda"),
            lacking=lacking or {},
        )


Work = Callable[[Round], list[str]]


@dataclass(frozen=True)
class Part:
    """A group of measurements that lives and dies alone."""

    name: str
    work: Work
    limit_s: float
    """After so many seconds it is ended."""


class Sheet:
    """A result file that is written anew with every row, so that what was measured stays."""

    def __init__(self, shared: Round, name: str, title: str, facts: Environment) -> None:
        self._path = shared.out / f"{name}.json"
        machine = facts.gpu_name or "CPU"
        self._title = f"{title} on one {machine}{' (dry run)' * shared.quick}"
        self._facts = facts
        self._rows: list[Row] = []

    def add(self, *rows: Row) -> None:
        self._rows += rows
        write_result(self._path, title=self._title, environment=self._facts, rows=self._rows,
                     claims=[])  # fmt: skip


def part_of(cell: Cell) -> str:
    """The name of the part that measures a cell."""
    config = override(RunConfig(), cell.settings, cell.name)
    if new := [name for name in config.kernels if name in NOT_IN_ALL]:
        return new[0]
    if len(config.kernels) > 1:
        return "all_kernels"
    if config.kernels:
        return config.kernels[0]
    if config.step.compile != "off":
        return "compile"
    batch = config.global_batch
    return "first" if cell.rung in FIRST and batch in FIRST_BATCHES else "ladder"


def measure_cells(shared: Round, name: str) -> list[str]:
    """The part's cells in turn, into profile.json."""
    run = shared.run()
    todo = [job for job in run.missing(resume=False) if part_of(job[0]) == name]
    todo.sort(key=lambda job: (job[1], _has_threads(job[0])))
    seconds = 0.02 if shared.quick else 0.3
    long = 4 if name == "first" and not shared.quick else 0
    with shared.world() as world:
        measure = InProcess(shared.records, world, seconds=seconds, long=long)
        with closing(measure):
            run.measure(todo, measure)
    mine = {cell.id for cell, _ in todo}
    return [
        f"{cell.name}: {reason}"
        for cell in run.profile().cells
        if cell.id in mine
        for reason in dict.fromkeys(r.failed for r in cell.repetitions if r.failed)
    ]


def _has_threads(cell: Cell) -> bool:
    """Whether its feed has threads of its own: they would disturb a capture, so it comes last."""
    return cell.settings.get("data.feed", "resident") not in ("resident", "synthetic")


def train(shared: Round) -> list[str]:
    """The defaults and RECORD until the study's accuracy, then 12 epochs of them and of LARGE."""
    accuracy = {}
    with shared.world() as world:
        size = f"{len(shared.records.split('train')):,} images"
        sheet = Sheet(shared, "gpu_training", f"Training on {size}", world.environment())
        goal = {"target_accuracy": STUDY_ACCURACY}
        sheet.add(_goal("defaults", _fit(shared, world, goal)))
        sheet.add(_goal("fast at batch 512", _fit(shared, world, RECORD | goal)))
        for name, recipe in (("512", {"epochs": 12}), ("8192", LARGE)):
            report = _fit(shared, world, recipe)
            accuracy[name] = 100 * (report.test_accuracy_fraction or 0.0)
            title = f"batch {name}, {report.num_epochs} epochs"
            sheet.add(
                row(f"{title}: training time", [report.train_s], "s"),
                row(f"{title}: samples/s", [report.samples_per_s], "samples/s"),
                row(f"{title}: test accuracy", [accuracy[name]], "%"),
            )
        less = accuracy["8192"] - accuracy["512"]
        sheet.add(row("test accuracy at batch 8192 less at 512", [less], "points"))
    return []


def _goal(name: str, report: RunReport) -> Row:
    goal = f"{name}: time to {100 * STUDY_ACCURACY:.2f} % validation accuracy"
    if report.time_to_target_s:
        return row(goal, [report.time_to_target_s], "s")
    return row(f"{goal}: not reached", [report.train_s], "s")


def _fit(shared: Round, world: World, settings: Settings) -> RunReport:
    if shared.quick:
        settings = settings | {"epochs": 1, "global_batch": 512}
    config = override(RunConfig(), FAST | settings, "tools.gpu")
    with tempfile.TemporaryDirectory() as folder:
        return fit(config, shared.records, world, Path(folder), resume=False, say=click.echo)[0]


def train_members(shared: Round) -> list[str]:
    """One network alone, then eight in one process: samples/s of all together."""
    settings, most = FAST | MEMBERS, NUM_MEMBERS
    if shared.quick:
        settings, most = settings | {"epochs": 1, "global_batch": QUICK_BATCH}, 2
    config = override(RunConfig(), settings, "tools.gpu")
    found = {}
    with shared.world() as world:
        size = f"{len(shared.records.split('train')):,} images"
        title = f"Members of a sweep, batch {config.global_batch}, {size}"
        sheet = Sheet(shared, "gpu_members", title, world.environment())
        for num in (1, most):
            sweep = Sweep.of(config, (Axis("seed", tuple(range(1, num + 1))),))
            with tempfile.TemporaryDirectory() as folder:
                found[num], launches = _train_sweep(sweep, shared.records, world, Path(folder))
            sheet.add(row(f"{num} together, {launches}", [found[num]], "samples/s"))
        sheet.add(row(f"{most} together over one", [found[most] / found[1]], "x"))
    return []


def _train_sweep(sweep: Sweep, records: Records, world: World, out: Path) -> tuple[float, str]:
    """samples/s of all members, whose clocks run at the same time; how they were launched."""
    crew = Crew(sweep, records, world, out, click.echo)
    for member in sweep.members:
        (out / member.folder).mkdir()
    crew.train()
    reports = [read_report(out / member.folder) for member in sweep.members]
    return sum(report.samples_per_s for report in reports), crew.launches


def bench_kernels(shared: Round) -> list[str]:
    """Each Triton kernel against PyTorch's operations; if one fails, the others still run."""
    failures = []
    batch, repetitions = (QUICK_BATCH, 1) if shared.quick else (8192, 20)
    with shared.world() as world:
        sheet = Sheet(shared, "gpu_kernels", f"Kernels at batch {batch}", world.environment())
        flush, bandwidth = setting(world.device)
        if bandwidth:
            sheet.add(row("copy within the memory", [bandwidth / 1e9], "GB/s"))
        for case in cases(world.device, batch, compiled=not shared.quick):
            measured = measure_case(case, flush, bandwidth, repetitions)
            sheet.add(*measured.rows)
            failures += measured.failures
    return failures


def measure_feeds(shared: Round) -> list[str]:
    """The feeds without a step; last the step fed by DALI, whose threads disturb a capture."""
    failures = []
    with shared.world() as world:
        facts = world.environment()
        sheet = Sheet(shared, "gpu_feeds", "Feeds", facts)
        ways = [
            ("resident", "resident alone", _carried),
            ("loader_batched", "loader_batched alone", _carried),
        ]
        if facts.dali:
            ways += [("dali", "dali alone", _carried), ("dali", "the step fed by dali", _fed)]
        for feed, title, measure in ways:
            try:
                sheet.add(measure(shared, world, feed, title))
            except Exception as error:  # one feed less
                failures.append(f"{title}: {sentence(first_cause(error))}")
    return failures


def _carried(shared: Round, world: World, feed: str, title: str) -> Row:
    """samples/s of three epochs' batches, ready on the device, without a step."""
    batch = QUICK_BATCH if shared.quick else 2048
    settings = {"step.precision": "bf16", "data.feed": feed, "global_batch": batch}
    config = override(RunConfig(), settings, feed)
    with closing(open_session(config, shared.records, world)) as session:
        rates = [_epoch_rate(session.feed, world.device) for _ in range(3)]
    return row(f"{title}, batch {batch}", rates, "samples/s")


def _epoch_rate(feed: Feed, device: torch.device) -> float:
    watch = meters.Stopwatch(device)
    watch.start()
    seen = sum(len(batch.id_B) for batch in feed.batches(0))
    return seen / watch.stop()


def _fed(shared: Round, world: World, feed: str, title: str) -> Row:
    batch, num_steps = (QUICK_BATCH, 16) if shared.quick else (2048, 320)
    config = override(RunConfig(), FAST | {"data.feed": feed, "global_batch": batch}, feed)
    with closing(open_session(config, shared.records, world)) as session:
        done = [timed(session, num_steps, lambda _: None) for _ in range(3)]
    steps = f"{done[0].steps_per_launch:g} steps per launch"
    return row(f"{title}, batch {batch}, {steps}", [r.rate for r in done], "samples/s")


def run_tests(shared: Round) -> list[str]:
    """The tests that need a GPU."""
    return _command(
        shared.out / "tests.txt", "pytest", "-q", "-m", "gpu", "-rs", "tests/test_gpu.py"
    )


def verify(shared: Round) -> list[str]:
    """tools/verify; in a dry run its doctor alone."""
    few = ("doctor",) if shared.quick else ()
    return _command(shared.out / "verify.txt", "tools.verify", *few, f"--device={shared.device}")


def _command(log: Path, module: str, *words: str) -> list[str]:
    """Run a module in a process of its own; what it prints goes to `log` as it comes."""
    with open(log, "wb") as file:
        command = [sys.executable, "-u", "-m", module, *words]
        done = subprocess.run(command, cwd=ROOT, stdout=file, stderr=subprocess.STDOUT)
    return [] if done.returncode == 0 else [f"exit code {done.returncode}, see {log.name}"]


def _cells(name: str, limit_s: float) -> Part:
    return Part(name, partial(measure_cells, name=name), limit_s)


PARTS = (
    _cells("first", 120),
    Part("training", train, 120),
    _cells("ladder", 170),
    _cells("compile", 120),
    _cells("gather_warp", 60),
    _cells("conv_pool_relu", 60),
    _cells("bias_pool_relu", 60),
    _cells("softmax_cross_entropy", 60),
    _cells("linear_cross_entropy", 60),
    _cells("adamw", 60),
    _cells("all_kernels", 120),
    _cells("conv2_pool_relu", 60),
    Part("kernels", bench_kernels, 120),
    Part("members", train_members, 90),
    Part("feeds", measure_feeds, 60),
    Part("tests", run_tests, 170),
    Part("verify", verify, 170),
)
