"""Runs of the real engine.run for the rows that disturb them: started, killed, gone on, compared.

A run is forked from this process, which has imported torch, so that it starts in a tenth of a
second. Its records are small images, its batch is tiny, so that an epoch has many steps.
"""

import functools
import hashlib
import importlib
import json
import os
import re
import shutil
import signal
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from engine.config import RunConfig
from engine.config_text import load_toml
from engine.data.pack import pack
from engine.data.records import open_records
from engine.durable import Damaged
from engine.errors import UserError
from engine.host import prepare_process
from engine.train import idlog
from engine.train.folder import checkpoints
from tests.reliability.common import Child, Done, Tally, glyph_csv
from tests.reliability.ranks import free_port

NUM_ROWS = 320
SIDE = 12
BATCH = 8
EPOCHS = 3
STEPS = 28
"""Of an epoch: 224 of the rows are its train split."""
RUN_S = 60.0
"""No run takes a tenth of that."""
LEFTOVER = re.compile(r"\..*\.tmp-\w+|\.lock|preempted")
OTHERWISE = re.compile(r".*_s")
"""Figures of metrics.jsonl that are times."""
Before = Callable[[], object]


class Run(Child):
    """engine.run, alone or as one rank."""

    @staticmethod
    def warm() -> None:
        warm()

    @staticmethod
    def main(words: list[str]) -> object:
        from engine.run import main

        return main.main(words, "engine.run")

    def signal(self, number: int) -> None:
        with suppress(ProcessLookupError):
            os.kill(self.pid, number)

    def is_running(self) -> bool:
        return Path(f"/proc/{self.pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"


@functools.cache
def warm() -> None:
    """Import what a run imports, its optimiser's parts of torch too, and load its layers."""
    os.environ["OMP_NUM_THREADS"] = "1"
    prepare_process()
    for name in ("torch._dynamo", "torch.distributed.run", "engine.run", "engine.train.trainer"):
        importlib.import_module(name)
    import torch

    from kernels.bias_pool_relu import bias_pool_relu
    from kernels.conv_pool_relu import conv_pool_relu

    torch.set_num_threads(1)
    weight, bias = torch.ones(32, 1, 3, 3).requires_grad_(), torch.ones(32).requires_grad_()
    y = conv_pool_relu(torch.ones(1, 4, 4, dtype=torch.uint8), weight, bias, torch.float32)
    bias_pool_relu(y, bias).sum().backward()


@dataclass
class Training:
    """One training, undisturbed, and a folder for those that are disturbed."""

    folder: Path
    flags: tuple[str, ...] = ()
    num_ranks: int = 1
    log_ids: bool = True
    num_epochs: int = EPOCHS
    records: Path = field(init=False)
    whole: Path = field(init=False)
    """The folder of the undisturbed run."""
    seconds: float = field(init=False)
    """What it took."""

    def __post_init__(self) -> None:
        self.folder.mkdir(exist_ok=True)
        self.records = self.folder / "records"
        self.whole, self.out = self.folder / "whole", self.folder / "out"
        pack(glyph_csv(self.folder / "some.csv", NUM_ROWS, SIDE), self.records)
        done = self.run(out=self.whole)
        assert done[0].code == 0, done
        self.seconds = max(each.seconds for each in done)

    def words(self, *more: object, out: Path | None = None) -> list[str]:
        """The command line, the same at every start."""
        line: list[object] = ["--device=cpu", f"--data={self.records}"]
        line += [f"--epochs={self.num_epochs}", f"--set=global_batch={BATCH}"]
        line += ["--checkpoint-every=5steps"]
        line += ["--set=log_ids=true"] if self.log_ids else []
        line += ["--resume=auto", f"--out={out or self.out}", *self.flags, *more]
        return [str(word) for word in line]

    def start(
        self,
        *more: object,
        out: Path | None = None,
        num_ranks: int = 0,
        strace: tuple[str, ...] = (),
        before: Before = lambda: None,
    ) -> list[Run]:
        """The ranks of a run."""
        size = num_ranks or self.num_ranks
        words = self.words(*more, out=out)
        if size == 1:
            return [Run(*words, strace=strace, before=before)]
        port = free_port()
        return [
            Run(*words, strace=strace, before=functools.partial(_be_rank, rank, size, port, before))
            for rank in range(size)
        ]

    def run(self, *more: object, **options: Any) -> list[Done]:
        """A run from its start to its end."""
        return wait(self.start(*more, **options))

    def reset(self) -> None:
        shutil.rmtree(self.out, ignore_errors=True)

    def faults(self) -> list[str]:
        """How the disturbed run's end differs from the undisturbed one's; nothing should."""
        return [*self._other_files(), *self._other_metrics(), *self._other_ids(), *self._left()]

    def _other_files(self) -> list[str]:
        first, second = checkpoints(self.whole)[:1], checkpoints(self.out)[:1]
        names = [Path("model.safetensors")]
        names += [path.relative_to(self.whole) / "optim.safetensors" for path in first]
        found = [
            f"{name} differs"
            for name in names
            if not same_tensors(self.whole / name, self.out / name)
        ]
        if [path.name for path in first] != [path.name for path in second]:
            found.append(f"the newest checkpoint is {[path.name for path in second]}")
        return found

    def _other_metrics(self) -> list[str]:
        return [] if metrics(self.whole) == metrics(self.out) else ["metrics.jsonl differs"]

    def _other_ids(self) -> list[str]:
        from tools.checks.order import check_order

        if not self.log_ids:
            return []
        try:
            checked, found = check_order(self.out, None)
        except UserError as error:
            return [str(error)]
        if checked != self.num_epochs * STEPS * BATCH:
            found.append(f"{checked} samples in all")
        for epoch in range(self.num_epochs):
            if not np.array_equal(global_ids(self.whole, epoch), global_ids(self.out, epoch)):
                found.append(f"epoch {epoch}: other ids than the undisturbed run's")
        return found

    def _left(self) -> list[str]:
        return [f"left {name}" for name in leftovers(self.out)]


def wait(runs: list[Run], seconds: float = RUN_S) -> list[Done]:
    """How the ranks of a run ended."""
    return [run.wait(seconds) for run in runs]


def kill(runs: list[Run]) -> list[Done]:
    """SIGKILL of all ranks at once."""
    for run in runs:
        run.signal(signal.SIGKILL)
    return wait(runs)


def text_of(done: list[Done]) -> str:
    return "; ".join(str(each) for each in done)


def refused(done: Done) -> bool:
    """Exit code 2 and, beside what it said before, one sentence."""
    said = [line for line in done.text.splitlines() if line.startswith("error: ")]
    return done.code == 2 and len(said) == 1 and "Traceback" not in done.text


def _be_rank(rank: int, size: int, port: int, before: Before) -> None:
    """What torchrun tells a rank."""
    os.environ |= {
        "RANK": str(rank),
        "LOCAL_RANK": str(rank),
        "WORLD_SIZE": str(size),
        "LOCAL_WORLD_SIZE": str(size),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
    }
    before()


def same_tensors(first: Path, second: Path) -> bool:
    """Whether two files of tensors hold the same names and numbers.

    Their metadata may differ: they name the code's commit, where git could be asked for it.
    """
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    with suppress(OSError, SafetensorError):
        return digest(load_file(first)) == digest(load_file(second))
    return False


def metrics(out: Path) -> list[dict[str, Any]]:
    """The lines of metrics.jsonl without their times."""
    path = out / "metrics.jsonl"
    lines = path.read_text().splitlines() if path.exists() else []
    found = [json.loads(line) for line in lines]
    return [{k: v for k, v in line.items() if not OTHERWISE.fullmatch(k)} for line in found]


def global_ids(out: Path, epoch: int) -> np.ndarray:
    """(steps, global batch): an epoch's ids in order, rank after rank in each step."""
    steps = []
    for piece in idlog.pieces(out, epoch):
        last = piece.last_step or STEPS
        size = BATCH // piece.num_ranks
        ranks = [idlog.read(path, size)[0][: last - piece.first_step] for path in piece.paths]
        shortest = min(map(len, ranks))  # of a run that has not ended
        steps.append(np.concatenate([rank[:shortest] for rank in ranks], axis=1))
    return np.concatenate(steps) if steps else np.empty((0, BATCH), np.int64)


def num_logged(out: Path, epoch: int) -> int:
    """Steps of an epoch that the log of ids holds, in its newest file; 0: none."""
    files = sorted((out / "ids").glob(f"epoch{epoch}-*"), key=lambda path: path.stat().st_mtime_ns)
    if not files:
        return 0
    name = idlog.NAME.fullmatch(files[-1].name)
    assert name
    return int(name[2]) + files[-1].stat().st_size // (16 * BATCH // int(name[4]))


def leftovers(out: Path) -> list[str]:
    """Temporary files, locks and markers in a run's folder: a finished run has none."""
    return [path.name for path in out.rglob("*") if LEFTOVER.fullmatch(path.name)]


def newest(out: Path) -> int:
    """The step of the newest checkpoint's folder, sound or not; 0 if there is none."""
    found = checkpoints(out)
    return int(found[0].name.removeprefix("step-")) if found else 0


def newest_sound(out: Path) -> tuple[int, str]:
    """(step, SHA-256 of all weights) of the newest checkpoint that verifies; 0 if there is none."""
    from engine.train.checkpoint import MODEL, read_checkpoint

    for path in checkpoints(out):
        with suppress(Damaged, OSError):
            manifest, files = read_checkpoint(path)
            return manifest.position.num_steps, digest(files[MODEL])
    return 0, ""


def digest(tensors: dict[str, Any]) -> str:
    """SHA-256 over the names and numbers of tensors."""
    found = hashlib.sha256()
    for name in sorted(tensors):
        found.update(name.encode() + tensors[name].contiguous().numpy().tobytes())
    return found.hexdigest()


def weights_by_step(training: Training) -> dict[int, str]:
    """The digest of the weights after each step, by the step itself: no checkpoint is involved."""
    import torch

    from engine.train.session import open_session
    from engine.world import World

    config = load_toml(RunConfig(), training.whole / "config.toml")
    world = World(rank=0, size=1, device=torch.device("cpu"), stream=None)
    session = open_session(config, open_records(training.records), world)
    found, step = {}, 0
    for epoch in range(EPOCHS):
        for launch in session.step.train_epoch(session.feed, epoch):
            step += launch.num_steps
            found[step] = digest(session.step.state.model_tensors())
    session.close()
    return found


def until(condition: Callable[[], bool], runs: list[Run], pause_s: float = 0.0005) -> bool:
    """Wait for something that a run does; false if it ended before."""
    end_s = time.perf_counter() + RUN_S
    while not condition():
        if time.perf_counter() > end_s or not all(run.is_running() for run in runs):
            return False
        time.sleep(pause_s)
    return True


def children(pid: int) -> list[int]:
    """Living children of a process."""
    found = []
    for path in Path("/proc").glob("[0-9]*/stat"):
        with suppress(OSError):
            state, parent = path.read_text().rpartition(")")[2].split()[:2]
            if state != "Z" and int(parent) == pid:
                found.append(int(path.parent.name))
    return found


def descendants() -> list[int]:
    """Living processes that this one or its children started, orphans too."""
    found = [os.getpid()]
    for pid in found:  # grows as it goes
        found += children(pid)
    return found[1:]


def check_nothing_left(tally: Tally, what: str) -> None:
    """No process of an ended run is alive; what is gets a moment, then is ended."""
    end_s = time.perf_counter() + 2
    while (left := descendants()) and time.perf_counter() < end_s:
        time.sleep(0.01)
    tally.check(not left, f"{len(left)} processes were left running: {what}")
    for pid in left:
        os.kill(pid, signal.SIGKILL)


def memory_files() -> set[str]:
    """What lies in /dev/shm, but for the rows' own folders and semaphores.

    A torchrun that is forked here has this process's resource tracker, which removes the semaphores
    of one that was killed when the rows end.
    """
    names = os.listdir("/dev/shm")
    return {name for name in names if not name.startswith(("reliability-", "sem.mp-"))}


def check_memory(tally: Tally, before: set[str]) -> None:
    """Nothing more lies in /dev/shm; another row's run may have something there for a moment."""
    end_s = time.perf_counter() + 10
    while (left := memory_files() - before) and time.perf_counter() < end_s:
        time.sleep(0.1)
    tally.check(not left, f"/dev/shm has {sorted(left)}")
