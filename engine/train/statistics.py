"""Running statistics of BatchNorm: the same on all ranks, whoever computed which part of a batch.

A step trains on a batch in parts: those of --accumulate, of each rank, the shards of --canonical.
In training BatchNorm normalises each part by its own mean and variance. Its running mean and
variance start from the same numbers in every part, and become the mean of what the parts make of
them; they count a step once. So 2 ranks leave what one leaves with its batch in 2 parts, but for
rounding, and with --canonical to the bit: there train/canonical.py adds them up, shard by shard.

It does not synchronise what training normalises by: a part is a batch of its own.
"""

import torch
from torch.nn.modules.batchnorm import _BatchNorm as BatchNorm

from engine.errors import UserError
from engine.world import World

FEW = 16
"""Samples of a part below which its own mean and variance are worth a note."""


class Statistics:
    """The running statistics of one model; device work only, so that it may be captured."""

    def __init__(self, model: torch.nn.Module, world: World, num_parts: int) -> None:
        """`num_parts`: of this rank's batch."""
        norms = [module for module in model.modules() if isinstance(module, BatchNorm)]
        self.running = [
            tensor
            for norm in norms
            for tensor in (norm.running_mean, norm.running_var)
            if tensor is not None
        ]
        counts = [norm.num_batches_tracked for norm in norms]
        self._counts = [count for count in counts if count is not None]
        self._world = world
        self._num_parts = num_parts
        self._before = [torch.empty_like(tensor) for tensor in self.running + self._counts]
        self._sum = [torch.zeros_like(tensor) for tensor in self.running]

    def start_step(self) -> None:
        """Note where every part of the step begins."""
        if self.running:
            torch._foreach_copy_(self._before, self.running + self._counts)
            torch._foreach_zero_(self._sum)

    def put_back(self) -> None:
        """To where the step began: the next part's beginning, too."""
        if self.running:
            torch._foreach_copy_(self.running + self._counts, self._before)

    def end_part(self) -> None:
        """Add what a part made of them, after its backward."""
        if self.running and self._num_parts > 1:
            torch._foreach_add_(self._sum, self.running)
            self.put_back()

    def end_step(self) -> None:
        """Make them the mean of the parts of all ranks."""
        num_ranks = self._world.size
        if not self.running or self._num_parts * num_ranks == 1:
            return
        ours = self._sum if self._num_parts > 1 else self.running
        flat = torch.cat([tensor.flatten() for tensor in ours])
        if num_ranks > 1:
            flat = self._world.sum(flat)
        self.take(flat.div_(self._num_parts * num_ranks))

    def take(self, mean: torch.Tensor) -> None:
        """Make them `mean`, all of them one behind the other, and count the step once."""
        if not self.running:
            return
        self.put_back()
        parts = mean.split([tensor.numel() for tensor in self.running])
        torch._foreach_copy_(self.running, list(parts))
        if self._counts:
            torch._foreach_add_(self._counts, 1)

    def note(self, part_samples: int, batch_samples: int) -> str:
        """A sentence where a batch is normalised in small parts, or "".

        Raises:
            UserError: a part is one sample, which has no variance.
        """
        if not self.running or part_samples == batch_samples:
            return ""
        parts = f"the network normalises by the mean of {part_samples} samples at a time"
        remedy = "give more samples a rank, or fewer parts"
        if part_samples == 1:
            raise UserError(f"{parts}, which has no variance; {remedy}")
        if part_samples >= FEW:
            return f"{parts}: each part of a batch by its own"
        return f"{parts}, which is few: {remedy}"
