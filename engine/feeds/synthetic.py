"""One random batch on the device, again and again: what if data cost nothing?"""

from collections.abc import Iterator

import torch

from engine.feeds.batch import Batch
from engine.order import Order


def random_batch(
    batch_size: int,
    height_width: tuple[int, int],
    num_classes: int,
    device: torch.device,
    copies: int = 1,
) -> Batch:
    """Random pixels and labels, `copies` times; the global random state is not touched."""
    generator = torch.Generator().manual_seed(0)
    image_BHW = torch.randint(
        256, (batch_size, *height_width), dtype=torch.uint8, generator=generator
    )
    label_B = torch.randint(num_classes, (batch_size,), dtype=torch.uint8, generator=generator)
    tensors = (
        image_BHW.repeat(copies, 1, 1),
        label_B.repeat(copies),
        torch.arange(batch_size).repeat(copies),
    )
    return Batch(*(tensor.to(device) for tensor in tensors))


class SyntheticFeed:
    name = "synthetic"

    def __init__(self, batch: Batch, order: Order) -> None:
        self.order = order
        self._batch = batch

    def batches(self, epoch: int, first_step: int = 0) -> Iterator[Batch]:
        for _ in range(first_step, self.order.steps_per_epoch):
            yield self._batch

    def load_epoch(self, epoch: int) -> None:
        pass

    def draw_ahead(self, epoch: int) -> None:
        pass

    def gather(self, step_K: torch.Tensor, out: Batch) -> None:
        """What `out` holds is as good."""

    def close(self) -> None:
        pass
