"""Device work as a CUDA graph, and the state that warm-up must not change.

The contract (PyTorch's CUDA notes, "CUDA Graphs"; NVIDIA's guide to CUDA graphs for PyTorch):
- everything runs on one side stream: building the model and DDP, warm-up, capture and replay;
- the inputs have static addresses; a batch of another shape, type, stride or device is refused with a sentence;
- what outlives a replay (parameters, optimiser state, counters, logs) is allocated before capture, outside the pool;
- what the work leaves is overwritten by the next replay; graphs that share a pool never run at once;
- nothing allocates on the device or asks it in another thread meanwhile: feeds with threads are built after capture;
- graphs die before the process group (NCCL waits for them, pytorch#115388): call reset(), on errors too.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch

from engine.feeds.batch import Batch


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
            if getattr(got, what) != getattr(want, what):
                raise ValueError(
                    f"{name} has {what} {getattr(got, what)} but the step was built for {getattr(want, what)}; "
                    "build the step anew for another batch"
                )
        if got.stride() != want.stride():
            raise ValueError(
                f"{name} has strides {got.stride()}, the step wants {want.stride()}; make it contiguous"
            )


@contextmanager
def state_kept(
    model: torch.nn.Module,
    optimizer: torch.optim.Optimizer,
    scaler: torch.amp.GradScaler,
    counters: list[torch.Tensor],
) -> Iterator[None]:
    """Let warm-up train, then put parameters, buffers, optimiser, scaler, counters and random state back *in place*.

    Optimiser state that warm-up created (Adam's moments and step) is set to zero, which is where it starts.
    """
    tensors = [*model.parameters(), *model.buffers(), *counters]
    known = {id(t) for t in optimizer_tensors(optimizer)}
    tensors += optimizer_tensors(optimizer)
    saved = [t.detach().clone() for t in tensors]
    scaler_state = scaler.state_dict()
    cpu_rng = torch.get_rng_state()
    cuda_rng = torch.cuda.get_rng_state() if torch.cuda.is_initialized() else None
    try:
        yield
    finally:
        with torch.no_grad():
            for tensor, value in zip(tensors, saved, strict=True):
                tensor.copy_(value)
            for tensor in optimizer_tensors(optimizer):
                if id(tensor) not in known:
                    tensor.zero_()
        scaler.load_state_dict(scaler_state)
        torch.set_rng_state(cpu_rng)
        if cuda_rng is not None:
            torch.cuda.set_rng_state(cuda_rng)


def optimizer_tensors(optimizer: torch.optim.Optimizer) -> list[torch.Tensor]:
    """Every tensor of the optimiser's state."""
    return [
        t
        for values in optimizer.state.values()
        for t in values.values()
        if isinstance(t, torch.Tensor)
    ]
