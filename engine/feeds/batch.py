"""What every feed hands to the step, and the promises it keeps.

Shapes: B samples of one rank, H x W pixels.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import torch

from engine.order import Order


@dataclass(frozen=True)
class Batch:
    """B samples on the run's device."""

    image_BHW: torch.Tensor
    """uint8, contiguous."""
    label_B: torch.Tensor
    """uint8, index into the class table."""
    id_B: torch.Tensor
    """int64 rows of the split, read together with the pixels, so they prove which sample this is.

    order.PADDING_ID marks a row that holds no sample.
    """

    def __post_init__(self) -> None:
        batch_size = len(self.image_BHW)
        assert self.image_BHW.dtype == torch.uint8 and self.image_BHW.dim() == 3, (
            "image_BHW must be uint8 [B, H, W]"
        )
        assert self.label_B.dtype == torch.uint8 and self.label_B.shape == (batch_size,), (
            "label_B must be uint8 [B]"
        )
        assert self.id_B.dtype == torch.int64 and self.id_B.shape == (batch_size,), (
            "id_B must be int64 [B]"
        )

    @staticmethod
    def empty(
        batch_size: int, height_width: tuple[int, int], device: torch.device, pinned: bool = False
    ) -> "Batch":
        """An uninitialised batch, to be filled again and again."""
        if device.type == "cpu" and not pinned:
            # NumPy asks for huge pages, torch does not: the dali feed gains 10 %.
            image_BHW = torch.from_numpy(np.empty((batch_size, *height_width), np.uint8))
        else:
            image_BHW = torch.empty(
                batch_size, *height_width, dtype=torch.uint8, device=device, pin_memory=pinned
            )
        return Batch(
            image_BHW,
            torch.empty(batch_size, dtype=torch.uint8, device=device, pin_memory=pinned),
            torch.empty(batch_size, dtype=torch.int64, device=device, pin_memory=pinned),
        )

    def rows(self, start: int, stop: int) -> "Batch":
        """A part of the samples, as views."""
        if stop - start == len(self.id_B):
            return self
        return Batch(self.image_BHW[start:stop], self.label_B[start:stop], self.id_B[start:stop])

    def copy_(self, other: "Batch") -> None:
        """Overwrite this batch, ordered on the current stream, without host synchronisation."""
        self.image_BHW.copy_(other.image_BHW, non_blocking=True)
        self.label_B.copy_(other.label_B, non_blocking=True)
        self.id_B.copy_(other.id_B, non_blocking=True)


class Upload:
    """Host batches on their way to the device: pinned ones in turn, reused when copied.

    On a CPU nothing is copied.
    """

    def __init__(
        self, batch_size: int, height_width: tuple[int, int], device: torch.device, num: int = 4
    ) -> None:
        self._out = Batch.empty(batch_size, height_width, device)
        self._on_gpu = device.type == "cuda"
        self._turn = 0
        if self._on_gpu:
            cpu = torch.device("cpu")
            self._hosts = [
                Batch.empty(batch_size, height_width, cpu, pinned=True) for _ in range(num)
            ]
            self._copied = [torch.cuda.Event() for _ in range(num)]

    def host(self) -> Batch:
        """A batch to fill; waits until its last copy is done."""
        if not self._on_gpu:
            return self._out
        self._turn = (self._turn + 1) % len(self._hosts)
        self._copied[self._turn].synchronize()
        return self._hosts[self._turn]

    def __call__(self, batch: Batch) -> Batch:
        """The device's batch, after `batch`, the last from `host`, on the current stream."""
        if self._on_gpu:
            self._out.copy_(batch)
            self._copied[self._turn].record()
        return self._out


class Feed(Protocol):
    """What supplies batches. For the same order every feed but synthetic supplies the same."""

    name: str
    order: Order

    def batches(self, epoch: int, first_step: int = 0) -> Iterator[Batch]:
        """The batches of an epoch from `first_step` on.

        A batch is ready on the current stream and valid until the next is asked for; on a GPU all
        are at the same addresses.
        """

    def close(self) -> None:
        """Stop threads and processes; the feed is unusable afterwards."""


class Source(Feed, Protocol):
    """A feed whose batches the step can also gather itself, within a captured launch."""

    def load_epoch(self, epoch: int) -> None:
        """Put what `gather` needs on the device, on the current stream, at the same addresses."""

    def draw_ahead(self, epoch: int) -> None:
        """Do the host's part of the next `load_epoch` while the device is busy with this one's."""

    def gather(self, step_K: torch.Tensor, out: Batch) -> None:
        """Fill `out` with the K * B samples of some steps of the epoch; device work only."""
