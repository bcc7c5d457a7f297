"""NVIDIA DALI as a feed: a pipeline on the GPU where there is one, DALI's CPU pipeline elsewhere.

Our order decides which samples a batch holds; DALI carries them, and warps them if augmentation is
on. A thread of ours gathers ahead: DALI calls an external source on the consumer's thread, so by
itself nothing would overlap. Several batches travel in one run, as one DALI sample (a sequence of
frames): DALI pays for every run and every sample. The only module that imports nvidia.dali.

Sources: external_source with no_copy and DALI's ownership rules (docs, "External Source";
DALI#5617: outputs are valid until the next run); warp_affine and per_frame (docs, "Sequences").

Shapes: F frames of a run, B of a batch, H x W pixels.
"""

from collections.abc import Iterator
from typing import Any

import torch

from engine.config import AugmentConfig
from engine.data.records import Split
from engine.errors import UserError
from engine.feeds.ahead import Ahead
from engine.feeds.augment import matrices
from engine.feeds.batch import Batch
from engine.feeds.resident import Gather, id_batches
from engine.order import Order

PREFETCH = 2
"""DALI's own queue depth."""
HELD = PREFETCH + 2
"""Runs whose buffers DALI may still read: its queue, the one being filled, the one handed out."""
NUM_RUNS = HELD + 3
"""With two that are ready, and the one that is gathered."""
FRAMES = 8192
"""Frames of a run, at least one batch."""
MOST_FRAMES = 65_536
"""Of a run that holds all batches of a launch: 50 MB of 28x28 pixels, NUM_RUNS times."""


def batches_of_run(order: Order, steps_per_launch: int) -> int:
    """Whole launches, FRAMES at least if the epoch has them.

    Between two runs the host waits for the device. Between two launches it may, since the device
    has the next one to do; amid the batches of one, the device would have nothing.
    """
    size = order.rank_batch
    num = max(FRAMES // (size * steps_per_launch), 1) * steps_per_launch
    if num * size > max(MOST_FRAMES, size):
        num = max(FRAMES // size, 1)
    return min(num, order.steps_per_epoch)


def presize(backend: Any, num_bytes: int, device_index: int) -> None:
    """Let DALI's pools take their memory before the first run, rather than amid training.

    An older DALI lacks the functions; its pools grow as they are used.
    """
    if hasattr(backend, "PreallocateDeviceMemory"):
        backend.PreallocateDeviceMemory(num_bytes, device_index)
    if hasattr(backend, "PreallocatePinnedMemory"):
        backend.PreallocatePinnedMemory(num_bytes)


class DaliFeed:
    name = "dali"

    def __init__(
        self,
        split: Split,
        order: Order,
        device: torch.device,
        augment: AugmentConfig | None = None,
        steps_per_launch: int = 1,
    ) -> None:
        self.order = order
        self._augment = augment
        self._device = device
        self._height_width = split.height_width
        self._on_gpu = device.type == "cuda"
        self._gather = Gather(split, torch.device("cpu"), one_thread=not self._on_gpu)
        num = batches_of_run(order, steps_per_launch) * order.rank_batch
        frames = (
            Batch.empty(num, split.height_width, torch.device("cpu"), self._on_gpu)
            for _ in range(NUM_RUNS)
        )
        self._ring = [
            (batch, torch.empty(num if augment else 1, 2, 3, pin_memory=self._on_gpu))
            for batch in frames
        ]
        """The host's buffers of each run: frames, and matrix_F23."""
        self._out = (
            Batch.empty(order.rank_batch, split.height_width, device) if self._on_gpu else None
        )
        self._copied = torch.cuda.Event() if self._on_gpu else None
        self._ahead: Ahead[list[Any]] | None = None
        self._mid_epoch = False
        self._pipe = self._build()

    def _build(self) -> Any:
        try:
            from nvidia.dali import Pipeline, backend, fn, types
        except ImportError as error:
            raise UserError(
                f"--feed dali: {error}; install nvidia-dali-cuda120, or use --feed resident"
            ) from None
        num_inputs = 4 if self._augment else 3
        if self._on_gpu:
            presize(backend, (PREFETCH + 1) * self._run_bytes(), self._device.index or 0)
        pipe = Pipeline(
            batch_size=1,
            num_threads=2 if self._augment else 1,
            device_id=self._device.index if self._on_gpu else None,
            prefetch_queue_depth=PREFETCH,
        )
        with pipe:
            image, label, sample_id, *matrix = fn.external_source(
                source=lambda: next(self._ahead or iter(())),
                num_outputs=num_inputs,
                batch=True,
                no_copy=True,
                dtype=[types.UINT8, types.UINT8, types.INT64, types.FLOAT][:num_inputs],
                ndim=[4, 1, 1, 3][:num_inputs],
                layout=["FHWC", "F", "F", "F**"][:num_inputs],
            )
            if self._on_gpu:
                image = image.gpu()
                label = label.gpu()
                sample_id = sample_id.gpu()
            if self._augment:
                image = fn.warp_affine(
                    image, fn.per_frame(matrix[0]), fill_value=0, interp_type=types.INTERP_LINEAR
                )
            pipe.set_outputs(image, label, sample_id)
        pipe.build()
        return pipe

    def _run_bytes(self) -> int:
        """Of the tensors of a run; distorted images are there twice."""
        frames, matrix_F23 = self._ring[0]
        tensors = [frames.image_BHW, frames.label_B, frames.id_B]
        tensors += [frames.image_BHW, matrix_F23] if self._augment else []
        return sum(tensor.nbytes for tensor in tensors)

    def batches(self, epoch: int, first_step: int = 0) -> Iterator[Batch]:
        self._stop(to_restart=True)
        self._ahead = Ahead(self._filled(epoch, first_step), slots=len(self._ring), held=HELD)
        while (outputs := self._run()) is not None:
            for start in range(0, outputs[1].shape()[0][0], self.order.rank_batch):
                yield self._batch(outputs, start)
            if self._copied:
                # From its next run on DALI may reuse the outputs, whatever our stream waits for.
                self._copied.synchronize()

    def close(self) -> None:
        self._stop()
        self._pipe = None

    def _filled(self, epoch: int, first_step: int) -> Iterator[list[Any]]:
        """What DALI takes: arrays of one sample, views of the ring's buffers."""
        size = self.order.rank_batch
        turn = 0
        filled = 0
        for step, id_B in enumerate(
            id_batches(self.order, epoch, first_step, torch.device("cpu")), start=first_step
        ):
            frames, matrix_F23 = self._ring[turn]
            rows = slice(filled, filled + size)
            self._gather(
                id_B, Batch(frames.image_BHW[rows], frames.label_B[rows], frames.id_B[rows])
            )
            if self._augment:
                matrix_F23[rows] = matrices(
                    self._augment, id_B, self.order.seed, epoch, self._height_width
                )
            filled += size
            if filled + size > len(frames.id_B) or step == self.order.steps_per_epoch - 1:
                image_FHW1 = frames.image_BHW[:filled].unsqueeze(-1)
                tensors = [
                    image_FHW1,
                    frames.label_B[:filled],
                    frames.id_B[:filled],
                    matrix_F23[:filled],
                ]
                yield [
                    tensor.unsqueeze(0).numpy() for tensor in tensors[: 4 if self._augment else 3]
                ]
                turn = (turn + 1) % len(self._ring)
                filled = 0

    def _run(self) -> Any | None:
        """The pipeline's next outputs; None at the source's end, then it can take another."""
        self._mid_epoch = True
        try:
            return self._pipe.run()
        except StopIteration:
            self._pipe.reset()
            self._mid_epoch = False
            return None

    def _stop(self, to_restart: bool = False) -> None:
        """End the thread, and run out what DALI still holds of an epoch that was left."""
        if self._ahead is not None:
            self._ahead.close(to_restart)
        while self._mid_epoch and self._run() is not None:
            pass

    def _batch(self, outputs: Any, start: int) -> Batch:
        """One batch of a run's frames: copied on a GPU, left where it is on a CPU."""
        rows = slice(start, start + self.order.rank_batch)
        image_FHW1, label_F, id_F = (
            torch.utils.dlpack.from_dlpack(output[0]) for output in outputs
        )
        batch = Batch(image_FHW1[rows].squeeze(-1), label_F[rows], id_F[rows])
        if self._out is None or self._copied is None:
            return batch
        self._out.copy_(batch)
        self._copied.record()
        return self._out
