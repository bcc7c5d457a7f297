"""Cells measured in turn, A B C A B C, so that drift favours none; their seeds differ.

A measurement is made in processes of its own (`in_child`), or in this one (in_process.py: the GPU
round's way). Either way it starts from a Job and gives a Repetition; one that fails is reported,
and the others go on. What is measured stands in OUT/profile.json after each repetition.
"""

import hashlib
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path

import click

from engine.config import RunConfig, override
from engine.durable import Damaged, writing
from engine.errors import printable
from engine.report import command_line, without_folders, write_json
from engine.typed import read_as
from engine.ui import progress_bar
from tools.measure.matrix import Cell
from tools.measure.results import CellResult, Profile, Repetition, Settings

LIMIT_S = 2 * 3600.0
"""No repetition may take longer: the study's baseline trains 12 epochs in less on two cores."""


@dataclass(frozen=True, kw_only=True)
class Job:
    """All that a measurement is told."""

    settings: Settings
    accuracy: bool
    num_steps: int
    first: bool
    """Whether it is the cell's first, which is traced, too."""
    data: str
    device: str
    ranks: int
    num_threads: int

    @property
    def digest(self) -> str:
        return hashlib.sha256(json.dumps(asdict(self), sort_keys=True).encode()).hexdigest()[:16]

    @property
    def seed(self) -> int:
        return int(self.settings["seed"])

    def failed(self, why: str) -> Repetition:
        """The repetition that came of it when it failed."""
        return Repetition(seed=self.seed, digest=self.digest, failed=why)


Measure = Callable[[Job], Repetition]


def in_turn(cells: list[Cell]) -> Iterator[tuple[Cell, int]]:
    """Cells with the number of their repetition: A B C A B C."""
    for number in range(max(cell.repetitions for cell in cells)):
        yield from ((cell, number) for cell in cells if number < cell.repetitions)


@dataclass(frozen=True, kw_only=True)
class Run:
    """Cells measured on this machine, and the folder where they leave their figures."""

    title: str
    cells: list[Cell]
    out: Path
    kept: Path | None = None
    """The folder of the repetitions; None: OUT/cells."""
    data: str = ""
    """Record directory of all cells that name none; empty: the sample."""
    device: str = ""
    num_gpus: int = 0
    lacking: Mapping[str, str] = field(default_factory=dict)
    """By id, why a cell that could be measured here was not."""

    def measure(self, todo: list[tuple[Cell, int]], how: Measure) -> None:
        """Measure these; after each, OUT/profile.json holds what there is."""
        with writing(self.out):
            self.folder.mkdir(parents=True, exist_ok=True)
        self.write()
        with progress_bar("measuring", len(todo)) as show:
            for done, (cell, number) in enumerate(todo):
                show(done, cell.name)
                found = how(self.job(cell, number))
                with writing(self.out):
                    write_json(found, self._file(cell, number))
                self.write()
                if not sys.stderr.isatty():
                    said = found.failed or f"{found.rate:,.0f} samples/s"
                    click.echo(printable(f"{done + 1}/{len(todo)} {cell.id} {cell.name}: {said}"))

    def write(self) -> None:
        """Write OUT/profile.json from the repetitions that there are."""
        with writing(self.out):
            write_json(self.profile(), self.out / "profile.json")

    @property
    def folder(self) -> Path:
        """Where the repetitions are, a file each."""
        return self.kept or self.out / "cells"

    def missing(self, resume: bool) -> list[tuple[Cell, int]]:
        """What this machine can measure, in turn.

        To resume: what failed, or was not measured as it would be now.
        """
        todo = [
            (cell, number)
            for cell, number in in_turn(self.cells)
            if not cell.not_measured(self.num_gpus)
        ]
        return [job for job in todo if not (resume and self._is_done(*job))]

    def _is_done(self, cell: Cell, number: int) -> bool:
        found = self._read(cell, number)
        return found is not None and not found.failed

    def profile(self) -> Profile:
        """What there is of this run."""
        cells = [self._result(cell) for cell in self.cells]
        return Profile(title=self.title, command=command_line(), cells=cells)

    def _result(self, cell: Cell) -> CellResult:
        found = [self._read(cell, number) for number in range(cell.repetitions)]
        repetitions = [repetition for repetition in found if repetition]
        reason = cell.not_measured(self.num_gpus)
        if not repetitions and not reason:
            reason = self.lacking.get(cell.id, "")
        return CellResult(
            id=cell.id,
            name=cell.name,
            rung=cell.rung,
            base=cell.base,
            ladder=cell.ladder,
            axes=cell.axes,
            settings=without_folders(cell.settings),
            published=cell.published,
            not_measured=reason,
            repetitions=repetitions,
        )

    def keep(self, profile: Profile) -> None:
        """Take over what an earlier profile of the same cells holds."""
        self.folder.mkdir(parents=True, exist_ok=True)
        earlier = {r.digest: r for cell in profile.cells for r in cell.repetitions}
        for cell, number in in_turn(self.cells):
            found = earlier.get(self.job(cell, number).digest)
            if found:
                write_json(found, self._file(cell, number))

    def job(self, cell: Cell, number: int) -> Job:
        """What a measurement is told."""
        seed = override(RunConfig(), cell.settings, cell.name).seed + number
        return Job(
            settings=cell.settings | {"seed": seed},
            accuracy=cell.accuracy,
            num_steps=cell.num_steps,
            first=not number,
            data=self.data,
            device=self.device,
            ranks=cell.num_ranks,
            num_threads=cell.num_threads,
        )

    def _file(self, cell: Cell, number: int) -> Path:
        return self.folder / f"{cell.id}-{number}.json"

    def _read(self, cell: Cell, number: int) -> Repetition | None:
        """A repetition that was measured as it would be now."""
        try:
            found = read_as(Repetition, self._file(cell, number))
        except (OSError, Damaged):
            return None
        return found if found.digest == self.job(cell, number).digest else None


def in_child(job: Job, limit_s: float = LIMIT_S) -> Repetition:
    """Measure in processes of their own, one a rank: no cell inherits another's heap."""
    with tempfile.TemporaryDirectory() as folder:
        job_file, result = Path(folder) / "job.json", Path(folder) / "repetition.json"
        write_json(job, job_file)
        failed = _run_child(job, [str(job_file), str(result)], Path(folder) / "log.txt", limit_s)
        if failed:
            return job.failed(failed)
        try:
            return replace(read_as(Repetition, result), digest=job.digest)
        except (OSError, Damaged) as error:
            return job.failed(f"left no figures ({error})")


def module_on_ranks(num_ranks: int, module: str, *words: str) -> list[str]:
    """The command that starts a module under torchrun, on this machine."""
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    return [*torchrun, f"--nproc-per-node={num_ranks}", "-m", module, *words]


def _run_child(job: Job, files: list[str], log: Path, limit_s: float) -> str:
    """Run tools.measure.cell on the job's ranks; one line if that failed, else nothing."""
    command = [sys.executable, "-m", "tools.measure.cell", *files]
    if job.ranks > 1:
        command = module_on_ranks(job.ranks, "tools.measure.cell", *files)
    return run_command(command, log, limit_s, job.num_threads)


def run_command(command: list[str], log: Path, limit_s: float, num_threads: int = 0) -> str:
    """Run a command of ours; one line if that failed, else nothing.

    Args:
        log: the file that gets what it says.
        num_threads: of each process; 0: as many as torch takes.
    """
    threads = {"OMP_NUM_THREADS": str(num_threads)} if num_threads else {}
    variables = os.environ | threads
    with open(log, "wb") as file:
        child = subprocess.Popen(command, env=variables, stdout=subprocess.DEVNULL, stderr=file)
        try:
            code = child.wait(limit_s)
        except subprocess.TimeoutExpired:
            return f"did not end within {limit_s:g} s"
        finally:
            child.terminate()  # torchrun kills ranks that have not ended within 30 s
            child.wait()
    return _reason(code, log) if code else ""


def _reason(code: int, log: Path) -> str:
    """What a child said last before it failed, in one line."""
    text = log.read_text(encoding="utf-8", errors="replace")
    lines = [line for line in text.splitlines() if line.strip()]
    last = lines[-1] if lines else ""
    said = next((line for line in lines if line.startswith("error: ")), last)
    return printable(without_folders(f"exit code {code}: {said.removeprefix('error: ')}"))
