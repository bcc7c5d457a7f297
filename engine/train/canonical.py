"""Canonical training: the same weights to the bit on every number of ranks that divides N.

A global batch is N shards, contiguous slices of it; of w ranks, rank r computes shards r * N / w to
(r + 1) * N / w - 1, one after the other. Each has the same shape and its own gradient wherever it
is computed. All gradients are gathered on all ranks and added there in the order of the shards, so
that neither a shard's sum nor the sum of the shards knows how many ranks there are. With them go
each shard's loss and right answers: the log is the same on all ranks, too.

What BatchNorm made of its running statistics goes with them, too: each shard starts from the same
and normalises by its own samples, and what is left is the shards' mean.

It costs memory for N gradients and their traffic, which nothing overlaps with the backward.
Networks that draw random numbers would have to draw them per shard; none of ours does.

Shapes: N shards of all ranks, R of this one; P numbers of a shard: its gradients, its running
statistics, its loss, its right answers.
"""

from collections.abc import Iterable, Iterator
from contextlib import contextmanager, nullcontext
from itertools import chain

import torch
from torch import distributed
from torch.nn.attention import SDPBackend, sdpa_kernel

from engine.config import MOST_SHARDS
from engine.errors import UserError
from engine.train.statistics import Statistics
from engine.world import World

NUM_RESULTS = 2
"""A row's last numbers: the shard's mean loss, and its right answers."""


class Shards:
    """The gradients of one step, shard by shard; device work only, so that it may be captured."""

    def __init__(
        self, model: torch.nn.Module, num_shards: int, world: World, statistics: Statistics
    ) -> None:
        """The parameters become rank 0's on all ranks. Collective."""
        for tensor in chain(model.parameters(), model.buffers()):
            world.copy_from_first(tensor)
        self._world = world
        self._parameters = [p for p in model.parameters() if p.requires_grad]
        self._statistics = statistics
        self._num_statistics = sum(tensor.numel() for tensor in statistics.running)
        self.num_of_rank = num_shards // world.size
        size = sum(p.numel() for p in self._parameters) + self._num_statistics + NUM_RESULTS
        self._mine_RP = torch.zeros(self.num_of_rank, size, device=world.device)
        self._all_NP = self._mine_RP
        if world.size > 1:
            self._all_NP = torch.zeros(num_shards, size, device=world.device)
        self._mean_P = torch.zeros(size, device=world.device)
        self._slots_R = [self._gradients(row_P) for row_P in self._mine_RP]
        self._means = self._gradients(self._mean_P)

    @property
    def first(self) -> int:
        """The number of this rank's first shard."""
        return self._world.rank * self.num_of_rank

    def keep(self, number: int, loss: torch.Tensor, correct: torch.Tensor) -> None:
        """Move what the backward of this rank's shard `number` left into its row."""
        gradients = [p.grad for p in self._parameters if p.grad is not None]
        torch._foreach_copy_(self._slots_R[number], gradients)
        for parameter in self._parameters:
            parameter.grad = None
        if running := self._statistics.running:
            torch.cat(
                [t.flatten() for t in running], out=self._statistics_of(self._mine_RP[number])
            )
            self._statistics.put_back()
        loss_row, correct_row = self._mine_RP[number, -NUM_RESULTS:]
        loss_row.copy_(loss)
        correct_row.copy_(correct)

    def add_up(self) -> torch.Tensor:
        """Make the mean of all shards' gradients the parameters' gradient, on every rank.

        Returns:
            The mean loss, and the number of right answers, of the global batch.
        """
        if self._world.size > 1:
            distributed.all_gather_into_tensor(self._all_NP, self._mine_RP)
        self._mean_P.copy_(self._all_NP[0])
        for row_P in self._all_NP[1:]:  # one after the other: sum(0) promises no order
            self._mean_P.add_(row_P)
        self._mean_P[:-1].div_(len(self._all_NP))
        for parameter, mean in zip(self._parameters, self._means, strict=True):
            parameter.grad = mean
        self._statistics.take(self._statistics_of(self._mean_P))
        return self._mean_P[-NUM_RESULTS:]

    def mean_squared_norm(self) -> torch.Tensor:
        """Of the shards' gradients, as they were gathered: the same on every rank."""
        gradient_NP = self._all_NP[:, : sum(p.numel() for p in self._parameters)]
        return gradient_NP.square().sum(1).mean()

    def _gradients(self, row_P: torch.Tensor) -> list[torch.Tensor]:
        """A row's views that are laid out as the parameters are."""
        sizes = [p.numel() for p in self._parameters]
        parts = row_P[: sum(sizes)].split(sizes)
        return [
            part.as_strided(p.shape, p.stride())
            for part, p in zip(parts, self._parameters, strict=True)
        ]

    def _statistics_of(self, row_P: torch.Tensor) -> torch.Tensor:
        """A row's view of the running statistics."""
        return row_P[-NUM_RESULTS - self._num_statistics : -NUM_RESULTS]


@contextmanager
def fixed_arithmetic(device: torch.device) -> Iterator[None]:
    """Let no result depend on how many cores this process has, or on timings, while entered.

    On a CPU, convolutions and products add in another order with another number of threads: one is
    what every machine has. On a GPU, cuDNN would choose by timings, also algorithms that add in
    random order, and the fused attentions' backward adds in random order: plain products do not.
    """
    num_threads, cudnn = torch.get_num_threads(), torch.backends.cudnn
    before = cudnn.deterministic, cudnn.benchmark
    attention = nullcontext() if device.type == "cpu" else sdpa_kernel(SDPBackend.MATH)
    if device.type == "cpu":
        torch.set_num_threads(1)
    cudnn.deterministic, cudnn.benchmark = True, False
    try:
        with attention:
            yield
    finally:
        cudnn.deterministic, cudnn.benchmark = before
        torch.set_num_threads(num_threads)


def check_shards(num_shards: int, global_batch: int, num_ranks: int) -> None:
    """UserError, naming what is possible, if the shards cannot be divided among the ranks."""
    if not num_shards:
        return
    if num_shards % num_ranks:
        possible = _texts(n for n in range(1, num_shards + 1) if num_shards % n == 0)
        raise UserError(
            f"--canonical {num_shards} cannot be divided by {num_ranks} ranks; "
            f"start {possible} ranks, or start anew with a --canonical that {num_ranks} divides"
        )
    if global_batch % num_shards:
        most = min(MOST_SHARDS, global_batch)
        possible = _texts(n for n in range(num_ranks, most + 1, num_ranks) if global_batch % n == 0)
        raise UserError(
            f"a global batch of {global_batch} cannot be divided into {num_shards} shards; "
            f"give --canonical {possible}, or a --batch-size whose sum over the ranks "
            f"{num_shards} divides"
        )


def _texts(numbers: Iterable[int]) -> str:
    """As "1, 2 or 4"."""
    *others, last = map(str, numbers)
    return f"{', '.join(others)} or {last}" if others else last
