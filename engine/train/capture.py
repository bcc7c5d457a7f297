"""Device work as a CUDA graph.

The contract (PyTorch's CUDA notes, "CUDA Graphs"; NVIDIA's guide to CUDA graphs for PyTorch):
- everything runs on one side stream: building the model and DDP, warm-up, capture and replay;
- the inputs have static addresses; a batch of another shape, type, stride or device is refused;
- what outlives a replay (parameters, optimiser state, counters, logs) is allocated before capture,
  outside the pool;
- a replay overwrites what the last one left; graphs that share a pool never run at once;
- no other thread uses the device meanwhile: feeds with threads are built after capture;
- graphs die before the process group, since NCCL waits for them (pytorch#115388): call reset(), on
  errors too.
"""

from collections.abc import Callable
from typing import Protocol

import torch

from engine.feeds.batch import Batch


class Replay(Protocol):
    """What stands for device work that was captured."""

    def __call__(self) -> None:
        """Let the device do it."""

    def reset(self) -> None:
        """Give its memory back; it cannot be called any more."""


class Graph:
    """Captured device work; calling it replays the work.

    Args:
        work: launches device work and reads nothing back; it was warmed up on the current stream.
        pool: memory pool shared with other graphs, or None for a new one.
    """

    def __init__(self, work: Callable[[], None], pool: "torch.cuda._POOL_HANDLE | None") -> None:
        self._graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(self._graph, pool=pool, stream=torch.cuda.current_stream()):
            work()

    @property
    def pool(self) -> "torch.cuda._POOL_HANDLE":
        return self._graph.pool()

    def __call__(self) -> None:
        self._graph.replay()

    def reset(self) -> None:
        self._graph.reset()


def check_like(batch: Batch, static: Batch) -> None:
    """Raise ValueError with a sentence unless `batch` may stand for `static` in a replay."""
    for name in ("image_BHW", "label_B", "id_B"):
        got, want = getattr(batch, name), getattr(static, name)
        for what in ("shape", "dtype", "device"):
            found, wanted = getattr(got, what), getattr(want, what)
            if found != wanted:
                raise ValueError(
                    f"{name} has {what} {found} but the step was built for {wanted}; "
                    "build the step anew for another batch"
                )
        if got.stride() != want.stride():
            raise ValueError(
                f"{name} has strides {got.stride()}, the step wants {want.stride()}; "
                "make it contiguous"
            )
