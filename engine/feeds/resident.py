"""All pixels on the device (in host memory on a CPU) as uint8; a batch is a gather into one buffer.

The feed hands batches out, distorted if asked to, or a launch of the step gathers those of its K
steps itself, inside a graph: the ids of an epoch are then a table on the device, indexed by the
device's step counter. With the kernel gather_warp either is one launch, the distortion included; on
a CPU gather and distortion are one pass over the pixels with or without it.

Shapes: N images of the split, S steps of a block or an epoch, K of a launch, B samples of one rank,
P = H W pixels.
"""

from collections.abc import Iterator
from weakref import WeakValueDictionary

import numpy as np
import torch

from engine.config import AugmentConfig
from engine.data.records import Split
from engine.feeds.augment import matrices, warp
from engine.feeds.batch import Batch
from engine.order import Order

IDS_PER_BLOCK = 65_536
"""Ids are drawn in blocks: each of the bijection's array operations costs microseconds to start."""


class Pixels:
    """A split's images and labels on a device: one copy for all that gather from it meanwhile."""

    def __init__(self, split: Split, device: torch.device) -> None:
        num, height, width = split.image_NHW.shape
        self.split = split
        """Kept as long as this, so that no other split gets its id."""
        self.image_NP = torch.from_numpy(split.image_NHW).view(num, height * width).to(device)
        self.label_N = torch.from_numpy(split.label_N).to(device)

    @staticmethod
    def of(split: Split, device: torch.device) -> "Pixels":
        """Those in use, else new ones; nobody writes to them."""
        key = (id(split), str(device))
        found = _IN_USE.get(key)
        if found is None:
            found = Pixels(split, device)
            _IN_USE[key] = found
        return found


_IN_USE: WeakValueDictionary[tuple[int, str], Pixels] = WeakValueDictionary()
"""By split and device; a copy goes with the last feed that reads from it."""


class Gather:
    """Rows of a split, gathered by id into a batch; used by every feed that reads from memory."""

    def __init__(
        self,
        split: Split,
        device: torch.device,
        one_thread: bool = False,
        fused: frozenset[str] = frozenset(),
    ) -> None:
        """Put the split on the device.

        Args:
            one_thread: for a thread beside the consumer's; where both wait for OpenMP's team, each
                slows the other.
            fused: names of kernels; with gather_warp, it gathers and warps.
        """
        self._fused = "gather_warp" in fused
        self._one_thread = one_thread
        self._pixels_in_use = Pixels.of(split, device)
        self._image_NP = self._pixels_in_use.image_NP
        self._label_N = self._pixels_in_use.label_N
        self._only_step = torch.zeros(1, dtype=torch.int64, device=device)

    def __call__(
        self, id_B: torch.Tensor, out: Batch, matrix_B23: torch.Tensor | None = None
    ) -> None:
        """Fill `out`, through the matrices if there are any.

        A padding id gathers row 0, which nothing counts.
        """
        if self._fused:
            self._launch(id_B[None], self._only_step, matrix_B23, out)
            return
        row_B = id_B.clamp(min=0)
        if matrix_B23 is not None:
            image_NHW = self._image_NP.view(-1, *out.image_BHW.shape[1:])
            warp(image_NHW, matrix_B23, out.image_BHW, row_B)
        else:
            self._pixels(row_B, out.image_BHW.view(len(row_B), -1))
        torch.index_select(self._label_N, 0, row_B, out=out.label_B)
        out.id_B.copy_(id_B)

    def _pixels(self, row_B: torch.Tensor, out_BP: torch.Tensor) -> None:
        if self._one_thread:
            image_NP = self._image_NP.numpy()
            np.take(image_NP, row_B.numpy(), axis=0, out=out_BP.numpy(), mode="clip")
        else:
            torch.index_select(self._image_NP, 0, row_B, out=out_BP)

    def steps(self, table_SB: torch.Tensor, step_K: torch.Tensor, out: Batch) -> None:
        """Fill `out` with the K * B samples of some steps."""
        if self._fused:
            self._launch(table_SB, step_K, None, out)
            return
        torch.index_select(table_SB, 0, step_K, out=out.id_B.view(len(step_K), -1))
        self(out.id_B, out)

    def _launch(
        self,
        table_SB: torch.Tensor,
        step_K: torch.Tensor,
        matrix_M23: torch.Tensor | None,
        out: Batch,
    ) -> None:
        """Fill `out` with the M = K * B samples of some steps, by one kernel."""
        from kernels.gather_warp import gather_warp

        image_NHW = self._image_NP.view(-1, *out.image_BHW.shape[1:])
        inputs = (image_NHW, self._label_N, table_SB, step_K, matrix_M23)
        gather_warp(*inputs, out.image_BHW, out.label_B, out.id_B)


def id_blocks(
    order: Order, epoch: int, first_step: int, device: torch.device
) -> Iterator[torch.Tensor]:
    """An epoch's ids on `device`, a tensor id_SB of some steps at a time.

    They are drawn on the CPU in blocks of at least 64k ids, not on the GPU: cycle walking asks
    whether an id is outside, and the host would wait for all queued steps.
    """
    steps_per_block = -(-IDS_PER_BLOCK // order.rank_batch)
    for step in range(first_step, order.steps_per_epoch, steps_per_block):
        num_steps = min(steps_per_block, order.steps_per_epoch - step)
        id_SB = torch.from_numpy(order.ids(epoch, step, num_steps))
        if device.type == "cuda":
            id_SB = id_SB.pin_memory().to(device, non_blocking=True)
        yield id_SB


def id_batches(
    order: Order, epoch: int, first_step: int, device: torch.device
) -> Iterator[torch.Tensor]:
    """An epoch's ids on `device`, a tensor id_B per step."""
    for id_SB in id_blocks(order, epoch, first_step, device):
        yield from id_SB


class ResidentFeed:
    name = "resident"

    def __init__(
        self,
        split: Split,
        order: Order,
        device: torch.device,
        fused: frozenset[str] = frozenset(),
        augment: AugmentConfig | None = None,
    ) -> None:
        """`fused`: names of kernels. `augment`: distorts the batches that are handed out."""
        self.order = order
        self._device = device
        self._augment = augment
        self._gather = Gather(split, device, fused=fused)
        self._out = Batch.empty(order.rank_batch, split.height_width, device)
        self._table_SB: torch.Tensor | None = None
        self._drawn: tuple[int, torch.Tensor] | None = None
        self._loaded: int | None = None
        """The epoch whose ids the table holds."""

    def batches(self, epoch: int, first_step: int = 0) -> Iterator[Batch]:
        for id_SB in id_blocks(self.order, epoch, first_step, self._device):
            matrix_SB23 = self._matrices(id_SB, epoch)
            for step, id_B in enumerate(id_SB):
                matrix_B23 = None if matrix_SB23 is None else matrix_SB23[step]
                self._gather(id_B, self._out, matrix_B23)
                yield self._out

    def _matrices(self, id_SB: torch.Tensor, epoch: int) -> torch.Tensor | None:
        """Those of some steps at once: their array operations cost microseconds to start, too."""
        if self._augment is None:
            return None
        _, height, width = self._out.image_BHW.shape
        found = matrices(self._augment, id_SB.flatten(), self.order.seed, epoch, (height, width))
        return found.view(*id_SB.shape, 2, 3)

    def load_epoch(self, epoch: int) -> None:
        if self._loaded == epoch:  # the first is loaded before the clock starts
            return
        if self._drawn and self._drawn[0] == epoch:
            id_SB = self._drawn[1]
        else:
            id_SB = self._draw(epoch)
        self._drawn = None
        if self._table_SB is None:
            self._table_SB = torch.empty_like(id_SB, device=self._device)
        self._table_SB.copy_(id_SB, non_blocking=True)
        self._loaded = epoch

    def draw_ahead(self, epoch: int) -> None:
        self._drawn = (epoch, self._draw(epoch))

    def gather(self, step_K: torch.Tensor, out: Batch) -> None:
        assert self._table_SB is not None, "load_epoch comes first"
        assert self._augment is None, "distorted batches are handed out, not gathered in a launch"
        self._gather.steps(self._table_SB, step_K, out)

    def _draw(self, epoch: int) -> torch.Tensor:
        id_SB = torch.from_numpy(self.order.ids(epoch, 0, self.order.steps_per_epoch))
        return id_SB.pin_memory() if self._device.type == "cuda" else id_SB

    def close(self) -> None:
        pass
