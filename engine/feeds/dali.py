"""NVIDIA DALI as the road: a pipeline on the GPU where there is one, DALI's CPU pipeline elsewhere.

Our order decides which samples a batch holds; DALI carries them. A batch travels as one DALI sample (a sequence of B
frames), because DALI pays for every sample's descriptor. The only module that imports nvidia.dali.

Sources: external_source with no_copy and DALI's ownership rules (docs, "External Source"; DALI#5617: outputs are valid
until the next run, so they are copied into one batch of ours at once).
"""

from collections.abc import Iterator
from typing import Any

import torch

from engine.errors import UserError
from engine.feeds.batch import Batch
from engine.feeds.resident import Gather, id_blocks
from engine.order import Order
from engine.records import Split

PREFETCH = 2
"""DALI's own queue depth; the ring of host buffers has two more, for the run being filled and the one being read."""


class DaliFeed:
    name = "dali"

    def __init__(self, split: Split, order: Order, device: torch.device) -> None:
        try:
            from nvidia.dali import Pipeline, fn, types
        except ImportError as error:
            raise UserError(f"--feed dali: {error}; install nvidia-dali-cuda120, or use --feed resident") from None
        self.order = order
        self._on_gpu = device.type == "cuda"
        self._gather = Gather(split, torch.device("cpu"))
        size = (order.rank_batch, split.height_width)
        self._ring = [Batch.empty(*size, torch.device("cpu"), pinned=self._on_gpu) for _ in range(PREFETCH + 2)]
        self._out = Batch.empty(*size, device)
        self._source: Iterator[list[Any]] = iter(())
        self._mid_epoch = False
        self._pipe: Any = Pipeline(
            batch_size=1,
            num_threads=1,
            device_id=device.index if self._on_gpu else None,
            prefetch_queue_depth=PREFETCH,
        )
        with self._pipe:
            outputs = fn.external_source(
                source=lambda: next(self._source),
                num_outputs=3,
                batch=True,
                no_copy=True,
                dtype=[types.UINT8, types.UINT8, types.INT64],
                ndim=[3, 1, 1],
            )
            self._pipe.set_outputs(*(output.gpu() for output in outputs) if self._on_gpu else outputs)
        self._pipe.build()

    def batches(self, epoch: int, first_step: int = 0) -> Iterator[Batch]:
        self._discard_prefetched()
        self._source = self._filled(epoch, first_step)
        while (outputs := self._run()) is not None:
            self._copy_out(outputs)
            yield self._out

    def close(self) -> None:
        self._pipe = None

    def _filled(self, epoch: int, first_step: int) -> Iterator[list[Any]]:
        """What DALI takes: arrays of one sample, [1, B, H, W], [1, B] and [1, B], views of the ring's buffers."""
        for number, id_B in enumerate(id_blocks(self.order, epoch, first_step, torch.device("cpu"))):
            batch = self._ring[number % len(self._ring)]
            self._gather(id_B, batch)
            yield [tensor.unsqueeze(0).numpy() for tensor in (batch.image_BHW, batch.label_B, batch.id_B)]

    def _run(self) -> Any | None:
        """The pipeline's next outputs, None at the end of the source; then it is ready for another source."""
        try:
            outputs = self._pipe.run()
        except StopIteration:
            self._pipe.reset()
            self._mid_epoch = False
            return None
        self._mid_epoch = True
        return outputs

    def _discard_prefetched(self) -> None:
        """Run out what DALI still holds of an epoch that was left in the middle."""
        self._source = iter(())
        while self._mid_epoch and self._run() is not None:
            pass

    def _copy_out(self, outputs: Any) -> None:
        from nvidia.dali.plugin.pytorch import feed_ndarray

        stream = torch.cuda.current_stream() if self._on_gpu else None
        for output, tensor in zip(outputs, (self._out.image_BHW, self._out.label_B, self._out.id_B), strict=True):
            feed_ndarray(output[0], tensor, cuda_stream=stream)
