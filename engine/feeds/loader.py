"""The plain PyTorch DataLoader in worker processes: sample by sample, as the study has it.

Or batched, by a `__getitems__` that indexes all of a batch. It shuffles by our order, so that
baseline and fast runs see the same batches; otherwise it is what a tutorial writes.
"""

import gc
import multiprocessing
import signal
import threading
import time
from collections.abc import Iterator
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

import torch
from torch.utils.data import DataLoader, Dataset, Sampler

from engine.data.records import Split
from engine.errors import UserError, sentence
from engine.feeds.ahead import DEADLINE_S, late
from engine.feeds.batch import Batch
from engine.feeds.resident import id_batches
from engine.order import Order

ENDS_S = 1.0
"""How long killed workers may take to be gone; one that waits for a disk takes longer."""
SHARED_MEMORY = Path("/dev/shm")


class _Samples(Dataset[tuple[torch.Tensor, torch.Tensor, int]]):
    def __init__(self, split: Split) -> None:
        self._image_NHW = torch.from_numpy(split.image_NHW)
        self._label_N = torch.from_numpy(split.label_N)

    def __getitem__(self, sample_id: int) -> tuple[torch.Tensor, torch.Tensor, int]:
        row = max(sample_id, 0)
        return self._image_NHW[row], self._label_N[row], sample_id


class _Batches(_Samples):
    """A batch is one item: `__getitems__` gets all its indices, and nothing is collated."""

    def __getitems__(
        self, sample_ids: list[int]
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        id_B = torch.tensor(sample_ids)
        row_B = id_B.clamp(min=0)
        return self._image_NHW[row_B], self._label_N[row_B], id_B


class _Steps(Sampler[list[int]]):
    """The order as a batch sampler; `start` names the epoch and step of the next iteration."""

    def __init__(self, order: Order) -> None:
        self._order = order
        self.start = (0, 0)

    def __iter__(self) -> Iterator[list[int]]:
        epoch, first_step = self.start
        for id_B in id_batches(self._order, epoch, first_step, torch.device("cpu")):
            yield id_B.tolist()


class LoaderFeed:
    def __init__(
        self, split: Split, order: Order, device: torch.device, num_workers: int, batched: bool
    ) -> None:
        self.name = "loader_batched" if batched else "loader"
        self.order = order
        self._steps = _Steps(order)
        self._workers: list[BaseProcess] = []
        self._out = Batch.empty(order.rank_batch, split.height_width, device)
        gc.collect()  # a pipeline of DALI that a forked worker collects waits there for its threads
        self._loader: DataLoader[tuple[torch.Tensor, torch.Tensor, int]] | None = DataLoader(
            _Batches(split) if batched else _Samples(split),
            batch_sampler=self._steps,
            collate_fn=tuple if batched else None,
            num_workers=num_workers,
            persistent_workers=num_workers > 0,
            pin_memory=device.type == "cuda",
            generator=torch.Generator(),  # it draws one number, not one of the network's
        )

    def batches(self, epoch: int, first_step: int = 0) -> Iterator[Batch]:
        assert self._loader is not None, "the feed is closed"
        self._steps.start = (epoch, first_step)
        others = multiprocessing.active_children()
        batches = iter(self._loader)
        self._workers += [each for each in multiprocessing.active_children() if each not in others]
        deadline = _Deadline(self._workers)
        _translate_deaths(self.name, deadline)
        try:
            while batch := self._next(batches, deadline):
                self._out.copy_(Batch(*batch))
                yield self._out
        finally:
            deadline.close()

    def _next(self, batches: Iterator[Any], deadline: "_Deadline") -> tuple[Any, ...] | None:
        deadline.since_s = time.monotonic()
        try:
            return next(batches, None)
        except (RuntimeError, OSError, EOFError) as error:  # a worker died, or was ended
            raise _ended(self.name, error, deadline) from None
        finally:
            deadline.since_s = None

    def close(self) -> None:
        self._loader = None


class _Deadline:
    """Ends the workers where a batch takes too long.

    Reading what a worker sent waits without a limit, DataLoader's time-out or not, if that worker
    was stopped in the middle of it; once it has ended, the reading breaks.
    """

    def __init__(self, workers: list[BaseProcess]) -> None:
        self.workers = workers
        self.since_s: float | None = None
        """When the batch was asked for (time.monotonic); None: nobody waits for one."""
        self.has_passed = False
        self._over = threading.Event()
        threading.Thread(target=self._work, name="feed", daemon=True).start()

    def close(self) -> None:
        self._over.set()

    def _work(self) -> None:
        while not self._over.wait(1.0):
            since_s = self.since_s
            if since_s is not None and time.monotonic() - since_s > DEADLINE_S:
                self.has_passed = True
                return _end(self.workers)


def _end(workers: list[BaseProcess]) -> None:
    """At once: one that is stopped would outlive the run.

    torch gives a batch's memory a name for a moment; a worker that ends in it leaves an empty file.
    """
    for worker in workers:
        worker.kill()
    end_s = time.monotonic() + ENDS_S
    for worker in workers:
        worker.join(max(0.0, end_s - time.monotonic()))
        for left in SHARED_MEMORY.glob(f"torch_{worker.pid}_*"):
            left.unlink(missing_ok=True)


def _ended(name: str, error: Exception, deadline: _Deadline) -> UserError:
    """The sentence; what is left of the workers is ended."""
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)  # torch's handler would raise for each of them
    _end(deadline.workers)
    if deadline.has_passed:
        return late(DEADLINE_S)
    what = f"the {name} feed cannot go on ({sentence(error)})"
    return UserError(
        f"{what}; look at the memory of this machine, then go on from the last checkpoint"
    )


def _translate_deaths(name: str, deadline: _Deadline) -> None:
    """Where a worker dies, torch's handler of SIGCHLD raises; let it raise our error."""
    usual = signal.getsignal(signal.SIGCHLD)
    usual = getattr(usual, "usual", usual)  # of an earlier epoch
    if not callable(usual):
        return

    def handle(number: int, frame: Any) -> None:
        try:
            usual(number, frame)
        except RuntimeError as error:
            raise _ended(name, error, deadline) from None

    vars(handle)["usual"] = usual
    signal.signal(signal.SIGCHLD, handle)
