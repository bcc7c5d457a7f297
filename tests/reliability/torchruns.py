"""torchrun with two ranks of engine.run, for the rows that kill and stop them.

It is the real one. Where it would execute Python for a rank, it forks itself, which has imported
torch: a rank starts in a tenth of a second. In `literal` tries it starts ranks as users do.
"""

import os
import subprocess
from contextlib import suppress
from importlib import import_module
from pathlib import Path
from typing import Any

from engine.host import ROOT
from tests.reliability.common import fork
from tests.reliability.training import Run, Training, children, until

MODULE = ["-m", "engine.run"]


class Forked(subprocess.Popen[bytes]):
    """python -m and a command of ours as a fork of this process, not an execution."""

    def __init__(self, args: tuple[str, ...], env: dict[str, str], **options: Any) -> None:
        self._module, *self._words = list(args)[list(args).index("-m") + 1 :]
        self._environment = env
        super().__init__(args, env=env, **options)

    def _execute_child(self, *_: Any) -> None:
        self.pid = fork(self._be_rank)
        self._child_created = True

    def _be_rank(self) -> None:
        """What execution does to a process, then the command."""
        os.setsid()
        os.environ.clear()
        os.environ.update(self._environment)
        import_module(self._module).main.main(self._words, self._module)


class Torchrun(Run):
    """torchrun, and the ranks that it starts."""

    @staticmethod
    def main(words: list[str]) -> object:
        from torch.distributed.run import main

        return main(words)

    def ranks(self) -> list[int]:
        """The processes of its ranks, in their order, once both are there."""
        found = [pid for pid in children(self.pid) if not is_helper(pid)]
        return sorted(found) if len(found) == 2 else []

    def started(self) -> list[int]:
        """Its ranks, waited for."""
        until(lambda: len(self.ranks()) == 2, [self])
        return self.ranks()


def torchrun(
    training: Training, *more: object, literal: bool = False, restarts: int = 3
) -> Torchrun:
    """A torchrun of two ranks on the training."""

    def prepare() -> None:
        os.environ |= {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
        if not literal:
            fork_ranks()

    options = ["--nproc-per-node=2", f"--max-restarts={restarts}", "--monitor-interval=0.1"]
    return Torchrun(*options, *MODULE, *training.words(*more), before=prepare)


def fork_ranks() -> None:
    """Let the torchrun that this process becomes fork its ranks."""
    from torch.distributed.elastic.multiprocessing.subprocess_handler import subprocess_handler

    vars(subprocess_handler)["Popen"] = Forked


def is_helper(pid: int) -> bool:
    """Whether it is Python's own, which watches semaphores."""
    try:
        return b"resource_tracker" in Path(f"/proc/{pid}/cmdline").read_bytes()
    except OSError:
        return True


def send(pid: int, number: int) -> None:
    """A signal to a process that may have ended."""
    with suppress(ProcessLookupError):
        os.kill(pid, number)
