"""Batches from disk, for sets larger than memory: windows of blocks, read ahead and verified.

Serves the blocked and the sequential order (order.Windows): any other would read a block for each
sample. Memory: two windows, one being read while the other is served; `memory_bytes` says it before
anything is read.

Shapes: N samples of the split, M of a window, B of a batch, H x W pixels, P = H * W.
"""

import itertools
from collections.abc import Iterator

import numpy as np
import torch

from engine.data.records import Split
from engine.feeds.ahead import DEADLINE_S, Ahead
from engine.feeds.batch import Batch, Upload
from engine.order import PADDING_ID, Order

NUM_WINDOWS = 2
SLOWEST_BYTES_PER_S = 20e6
"""A disk that is slower counts as dead."""
Window = tuple[np.ndarray, np.ndarray, np.ndarray]
"""(pixels_MP in the order of its blocks, rows and ids of this rank's samples in their order)"""


class StreamFeed:
    name = "stream"

    def __init__(self, split: Split, order: Order, device: torch.device) -> None:
        assert order.block_samples, "the stream feed serves the blocked order only"
        self.order = order
        self._split = split
        num_rows = min(order.block_samples * order.window_blocks, len(split))
        num_pixels = int(np.prod(split.height_width))
        self._buffers = [np.empty((num_rows, num_pixels), np.uint8) for _ in range(NUM_WINDOWS)]
        self.memory_bytes = NUM_WINDOWS * num_rows * num_pixels
        self._deadline_s = DEADLINE_S + self.memory_bytes / SLOWEST_BYTES_PER_S
        self._upload = Upload(order.rank_batch, split.height_width, device)
        self._ahead: Ahead[Window] | None = None
        self._turn = 0
        self._next = (-1, -1)
        """The epoch and step that the thread goes on with."""

    def batches(self, epoch: int, first_step: int = 0) -> Iterator[Batch]:
        goes_on = self._next == (epoch, first_step)
        self._next = (-1, -1)
        windows = self._ahead if self._ahead and goes_on else self._restart(epoch, first_step)
        size = self.order.rank_batch
        missing = self.order.steps_per_epoch - first_step
        batch = self._upload.host()
        filled = 0
        while missing and (window := next(windows, None)):
            pixel_MP, row_M, id_M = window
            start = 0
            while start < len(row_M):
                stop = min(start + size - filled, len(row_M))
                into = slice(filled, filled + stop - start)
                image_BP = batch.image_BHW.view(size, -1)[into].numpy()
                # One thread: beside the readers, those of OpenMP would wait for each other.
                np.take(pixel_MP, row_M[start:stop], axis=0, out=image_BP, mode="clip")
                np.take(
                    self._split.label_N,
                    id_M[start:stop],
                    out=batch.label_B[into].numpy(),
                    mode="clip",
                )
                batch.id_B[into].numpy()[:] = id_M[start:stop]
                start = stop
                filled = into.stop
                if filled == size:
                    yield self._upload(batch)
                    batch = self._upload.host()
                    filled = 0
                    missing -= 1
        if self.order.shuffle:
            self._next = (epoch + 1, 0)
            return
        # The end of a sequential order: what pads it must still be an image and a label.
        for _ in range(missing):
            batch.image_BHW[filled:] = 0
            batch.label_B[filled:] = 0
            batch.id_B[filled:] = PADDING_ID
            yield self._upload(batch)
            batch = self._upload.host()
            filled = 0

    def close(self) -> None:
        if self._ahead is not None:
            self._ahead.close()
        self._ahead = None

    def _restart(self, epoch: int, first_step: int) -> Ahead[Window]:
        """Read from a step on, and ahead into the next epochs."""
        if self._ahead is not None:
            self._ahead.close(to_restart=True)
        starts = itertools.chain(
            [(epoch, first_step)], ((later, 0) for later in itertools.count(epoch + 1))
        )
        plan = (
            self._read_epoch(*start)
            for start in itertools.islice(starts, None if self.order.shuffle else 1)
        )
        self._ahead = Ahead(
            itertools.chain.from_iterable(plan), slots=NUM_WINDOWS, deadline_s=self._deadline_s
        )
        return self._ahead

    def _read_epoch(self, epoch: int, first_step: int) -> Iterator[Window]:
        order = self.order
        windows = order.windows(epoch)
        for window, (start, stop) in enumerate(itertools.pairwise(windows.edges.tolist())):
            first = max((start - order.start) // order.global_batch, first_step)
            last = min(-((order.start - stop) // order.global_batch), order.steps_per_epoch)
            position = order.positions(first, max(last - first, 0)).reshape(-1)
            position = position[(position >= start) & (position < stop)]
            if not len(position):
                continue
            pixel_MP = self._buffers[self._turn]
            self._turn = (self._turn + 1) % NUM_WINDOWS
            self._read(windows.runs(window), pixel_MP)
            row_M = windows.rows(window, position)
            yield pixel_MP, row_M, windows.ids(window, row_M)

    def _read(self, runs: list[tuple[int, int]], pixel_MP: np.ndarray) -> None:
        """Fill a window with its blocks, end to end; a thread beside this one takes its share.

        Both are threads that nobody waits for, should a read never return.
        """
        ends = np.cumsum([num_samples for _, num_samples in runs])
        parts = np.split(pixel_MP[: ends[-1]], ends[:-1])
        jobs = [(first, part) for (first, _), part in zip(runs, parts, strict=True)]
        shared = iter(jobs)  # whoever is free takes the next
        beside = Ahead(self._blocks_read(shared), slots=len(jobs) + 1, deadline_s=self._deadline_s)
        for _ in itertools.chain(self._blocks_read(shared), beside):
            pass

    def _blocks_read(self, jobs: Iterator[tuple[int, np.ndarray]]) -> Iterator[int]:
        """Read each (first row, memory to fill); the first rows, as they are done."""
        for first, part_MP in jobs:
            self._split.image_NHW.read_into(first, part_MP)  # type: ignore[attr-defined]
            yield first
