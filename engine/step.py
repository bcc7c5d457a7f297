"""TrainStep: the one place where this project trains. Autocast, forward, loss, backward, update; eager or captured.

The trainer, the profiler, the benchmarks and the tests call this; nobody types the loop again.

Shapes: B samples of one rank, H x W pixels, K classes.
"""

import torch
from torch.nn import functional
from torch.nn.parallel import DistributedDataParallel

from engine.capture import Graph, state_kept
from engine.config import RunConfig
from engine.feeds.batch import Batch
from engine.model import GlyphNet
from engine.optim import lr_table, make_optimizer
from engine.order import PADDING_ID
from engine.world import World

WARMUP_STEPS = 3
DDP_WARMUP_STEPS = 11
"""DDP's reducer rebuilds its buckets after iteration 1 and takes timings in iterations 1 to 10."""
BUCKET_CAP_MIB = 32
"""More than the baseline's 1.7 MB of gradients: one all-reduce a step."""
_AUTOCAST = {"bf16": torch.bfloat16, "fp16": torch.float16}


class TrainStep:
    """One training step, and one evaluation step, of a fixed batch size.

    Results are added to device sums of [loss, correct, seen] (float64, exact for counts to 2^53), which `take_sums`
    reads and clears; reading synchronises, so do it at log points only.

    Args:
        model: on the world's device.
        config: what is *effective*; the graph is captured by `prepare` if config.step.cuda_graphs.
        num_steps: of the whole run, for the learning-rate table.
        static: a batch of the run's shape on the device; warm-up trains on it, and the graph bakes in its addresses.
    """

    def __init__(self, model: GlyphNet, config: RunConfig, num_steps: int, static: Batch, world: World) -> None:
        self._config = config
        self._static = static
        self._world = world
        device = world.device
        if config.step.channels_last:
            model = model.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
        self.model = model
        self.optimizer = make_optimizer(config.optim, model, device, capturable=config.step.cuda_graphs)
        self.scaler = torch.amp.GradScaler(device.type, enabled=config.step.precision == "fp16")
        self.step_index = torch.zeros(1, dtype=torch.int64, device=device)
        self._host_step = 0
        self._lr_host = lr_table(config.optim, num_steps)
        self._lr_device = torch.from_numpy(self._lr_host).to(device)
        self._train_sums = torch.zeros(3, dtype=torch.float64, device=device)
        self._eval_sums = torch.zeros(3, dtype=torch.float64, device=device)
        self._train_graph: Graph | None = None
        self._eval_graph: Graph | None = None
        self._net: torch.nn.Module = model
        if world.size > 1:
            self._net = DistributedDataParallel(
                model,
                device_ids=[device.index] if device.type == "cuda" else None,
                bucket_cap_mb=BUCKET_CAP_MIB,
                gradient_as_bucket_view=True,
            )

    def prepare(self) -> None:
        """Warm up on the static batch and, where asked for, capture; every state is put back in place."""
        num_warmups = DDP_WARMUP_STEPS if self._world.size > 1 else WARMUP_STEPS
        counters = [self.step_index, self._train_sums, self._eval_sums]
        with state_kept(self.model, self.optimizer, self.scaler, counters):
            for _ in range(num_warmups):
                self._train_eagerly(self._static)
                self._evaluate_eagerly(self._static)
            if self._config.step.cuda_graphs:
                self._train_graph = Graph(self._train_eagerly, self._static, pool=None)
                self._eval_graph = Graph(self._evaluate_eagerly, self._static, pool=self._train_graph.pool)
            self._world.synchronize()

    def train(self, batch: Batch) -> None:
        """One optimiser step on the batch; no host synchronisation with a fused or captured optimiser."""
        if self._train_graph:
            self._train_graph(batch)
        else:
            self._set_host_lr()
            self._train_eagerly(batch)
        self._host_step += 1

    def evaluate(self, batch: Batch) -> None:
        """Add the batch's loss and correct answers to the evaluation sums; padding rows count nothing."""
        if self._eval_graph:
            self._eval_graph(batch)
        else:
            self._evaluate_eagerly(batch)

    def take_sums(self, *, training: bool) -> tuple[float, float, int]:
        """Mean loss, accuracy (0..1) and samples seen over all ranks since the last call. Collective; synchronises."""
        local = self._train_sums if training else self._eval_sums
        loss, correct, seen = self._world.sum(local).tolist()
        local.zero_()
        return loss / max(seen, 1), correct / max(seen, 1), int(seen)

    def resume_at(self, step: int) -> None:
        """Go on at global step `step`."""
        self._host_step = step
        self.step_index.fill_(step)

    def close(self) -> None:
        """Destroy the graphs; call before the process group ends, also on errors."""
        for graph in (self._eval_graph, self._train_graph):
            if graph:
                graph.reset()
        self._train_graph = self._eval_graph = None

    def _train_eagerly(self, batch: Batch) -> None:
        self.optimizer.zero_grad(set_to_none=True)
        self._set_device_lr()
        with self._autocast():
            logits_BK = self._net(self._normalised(batch.image_BHW)).float()
            label_B = batch.label_B.long()
            loss = functional.cross_entropy(logits_BK, label_B, label_smoothing=self._config.optim.label_smoothing)
        self.scaler.scale(loss).backward()
        self.scaler.step(self.optimizer)
        self.scaler.update()
        with torch.no_grad():
            correct = (logits_BK.argmax(1) == label_B).sum()
            self._train_sums += torch.stack(
                (loss.double() * len(label_B), correct, torch.full_like(correct, len(label_B)))
            )
            self.step_index += 1

    @torch.no_grad()
    def _evaluate_eagerly(self, batch: Batch) -> None:
        with self._autocast():
            logits_BK = self.model(self._normalised(batch.image_BHW)).float()
        real_B = batch.id_B != PADDING_ID
        label_B = batch.label_B.long()
        loss_B = functional.cross_entropy(logits_BK, label_B, reduction="none").where(real_B, 0.0)
        correct = ((logits_BK.argmax(1) == label_B) & real_B).sum()
        self._eval_sums += torch.stack((loss_B.sum(dtype=torch.float64), correct, real_B.sum()))

    def _normalised(self, image_BHW: torch.Tensor) -> torch.Tensor:
        """uint8 -> fp32 0..1 in the step's memory format."""
        image_B1HW = image_BHW.unsqueeze(1).to(torch.float32).mul_(1 / 255)
        if self._config.step.channels_last:
            image_B1HW = image_B1HW.contiguous(memory_format=torch.channels_last)
        return image_B1HW

    def _autocast(self) -> torch.autocast:
        dtype = _AUTOCAST.get(self._config.step.precision)
        return torch.autocast(self._world.device.type, dtype=dtype or torch.bfloat16, enabled=dtype is not None)

    def _set_device_lr(self) -> None:
        rate = self.optimizer.param_groups[0]["lr"]  # one tensor, shared by all groups
        if isinstance(rate, torch.Tensor):
            step = self.step_index.clamp(max=len(self._lr_device) - 1)  # warm-up may run past a short table
            rate.copy_(self._lr_device.index_select(0, step).squeeze(0))

    def _set_host_lr(self) -> None:
        for group in self.optimizer.param_groups:
            if not isinstance(group["lr"], torch.Tensor):
                group["lr"] = float(self._lr_host[min(self._host_step, len(self._lr_host) - 1)])
