"""Checkpoints written while training goes on: copied in the step's shadow, written by a thread."""

import queue
import threading
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch

from engine.errors import UserError
from engine.report import NetworkFacts
from engine.train.checkpoint import (
    LOG,
    OPTIM,
    checkpoint_tensors,
    prune,
    whole_tensors,
    write_checkpoint,
)
from engine.train.folder import Manifest
from engine.train.state import Tensors, TrainState

DEADLINE_S = 120.0
"""How long the end of a run waits for a disk that does not answer."""
JOIN_S = 5.0
"""How long the thread is waited for, whose work is done or given up."""


Whole = Iterator[tuple[str, str, torch.Tensor]]
"""What `whole_tensors` gives."""


@dataclass(frozen=True)
class _Job:
    manifest: Manifest
    loss_S: torch.Tensor
    copied: "torch.cuda.Event | None"


class Saver:
    """Writes one checkpoint at a time, from buffers of its own, on rank 0.

    A disk that refuses does not end the training: `failure` says why the last checkpoint is
    missing, and the next is tried all the same. Numbers that are not finite do end it.
    """

    def __init__(self, run: Path, state: TrainState, facts: NetworkFacts | None = None) -> None:
        self._run = run
        self._state = state
        self._facts = facts
        self._buffers: dict[str, Tensors] | None = None
        self._sound: set[Path] = set()
        self._jobs: queue.SimpleQueue[_Job | None] = queue.SimpleQueue()
        self._idle = threading.Event()
        self._idle.set()
        self._error: Exception | None = None
        self.failure: OSError | None = None
        """Why the last checkpoint was not written; None if it was."""
        # A daemon: nobody waits at exit for a disk that does not answer.
        self._thread = threading.Thread(target=self._work, name="saver", daemon=True)
        self._thread.start()

    def trust(self, checkpoint: Path) -> None:
        """`checkpoint` was read, so it verifies."""
        self._sound.add(checkpoint)

    def save(self, manifest: Manifest, loss_S: torch.Tensor, tensors: Whole | None = None) -> bool:
        """Copy the state and let the thread write it; device work that nothing waits for.

        Args:
            tensors: the state's `whole_tensors`, where other ranks take part in gathering them.
                What is left of them is the caller's to gather.
        Returns:
            Whether it will be written: not while an earlier one still is.
        Raises:
            UserError: a number of an earlier one was not finite.
            Exception: what else broke the thread's work on an earlier one.
        """
        self._raise_error()
        if not self._idle.is_set():
            return False
        self._idle.clear()
        if self._buffers is None:
            live = checkpoint_tensors(self._state)
            self._buffers = {file: _buffers(of_file) for file, of_file in live.items()}
        for file, name, tensor in tensors or whole_tensors(self._state):
            self._buffers[file][name].copy_(tensor, non_blocking=True)
        copied = None
        if torch.cuda.is_initialized():
            copied = torch.cuda.Event()
            copied.record()
        self._jobs.put(_Job(manifest, loss_S, copied))
        return True

    def wait(self) -> None:
        """Wait until what was begun is on the disk, or refused.

        Raises:
            UserError: a number was not finite, or the disk does not answer.
        """
        if not self._idle.wait(DEADLINE_S):
            what = f"the disk has not answered for {DEADLINE_S:.0f} s"
            raise UserError(
                f"{self._run}: {what}; look at it, then go on with --resume {self._run}"
            )
        self._raise_error()

    def close(self) -> None:
        """End the thread, once it has written what was begun.

        It is waited for: one that still lets go of tensors while the interpreter ends would abort
        the process.
        """
        self._jobs.put(None)
        self._thread.join(JOIN_S)

    def _raise_error(self) -> None:
        if self._error:
            raise self._error

    def _work(self) -> None:
        while job := self._jobs.get():
            try:
                self._write(job)
                self.failure = None
            except OSError as error:
                self.failure = error
            except Exception as error:  # raised in the main thread; this one works on
                self._error = error
            finally:
                self._idle.set()

    def _write(self, job: _Job) -> None:
        if job.copied:
            job.copied.synchronize()
        assert self._buffers is not None
        files = {name: self._state.in_files(tensors) for name, tensors in self._buffers.items()}
        files[OPTIM][LOG] = job.loss_S
        self._sound.add(write_checkpoint(self._run, job.manifest, files, self._facts))
        prune(self._run, self._sound, job.manifest.position.best_number)


def _buffers(tensors: Tensors) -> Tensors:
    """Host memory for copies, pinned where they come from a GPU."""
    return {
        name: torch.empty(t.shape, dtype=t.dtype, pin_memory=t.is_cuda)
        for name, t in tensors.items()
    }
