"""TrainStep, the one place that trains: forward, loss, backward, update.

The trainer, the profiler, the benchmarks and the tests call this; nobody types the loop again.
It runs eagerly, or in graphs of 1 and K steps. Everything that changes lives on the device:
counters, learning rate, loss scale, random state, the log. A launch runs K steps without the host,
whether it is captured (GPU) or not (CPU): its batches are gathered from the resident table or
copied in before, and the step counters index the tables of learning rates and ids.

It does not evaluate whole splits, measure time, or touch files.

Shapes: K steps of a launch, S of an epoch, B samples of one rank in a step, H x W pixels, C
classes.
"""

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from functools import partial
from typing import NamedTuple

import numpy as np
import torch
from torch.nn import functional

from engine.config import NO_PAGE, RunConfig
from engine.errors import UserError, first_cause, sentence
from engine.feeds.batch import Batch, Feed, Source
from engine.feeds.shared import GatheredOnce
from engine.heart import EVALUATING, TRAINING, WAITING
from engine.meters import span
from engine.models import Network
from engine.order import PADDING_ID, Order, round_keys
from engine.train.backends import check_fp32_precision, compile_arguments, use_backends
from engine.train.canonical import Shards
from engine.train.capture import Graph, Replay, check_like
from engine.train.flat import FlatAdamW, why_not_rounded
from engine.train.objective import Objective
from engine.train.optim import lr_table, make_optimizer
from engine.train.parallel import apart, let_go, recover, replicated, shard, whole
from engine.train.precision import use_fp8
from engine.train.state import RandomState, Tensors, TrainState
from engine.train.statistics import Statistics
from engine.world import World

WARMUP_STEPS = 3
DDP_WARMUP_STEPS = 11
"""DDP's reducer rebuilds its buckets after iteration 1 and takes timings in iterations 1 to 10."""
MAX_SKIPPED = 20
"""Steps in a row that fp16 may skip before the run ends: gradients overflowed although each
halved the loss scale."""
LOSS, CORRECT, BAD, SMALL, WHOLE = range(5)
"""Rows of the log: a step's mean loss, its right answers, and 1 where a gradient was not finite;
with step.noise_scale the squared norms of its first part's gradient and of the whole batch's."""


class Launch(NamedTuple):
    """What one launch trained on."""

    batch: Batch
    """The samples of its steps, one step after the other; valid until the next launch."""
    num_steps: int
    wait_s: float
    """Seconds the host waited for the feed before it."""


@dataclass(frozen=True, kw_only=True)
class TrainLog:
    """Results of the steps since the last reading, over all ranks."""

    loss_S: np.ndarray
    """Mean loss of each step, float64; a skipped step's may be infinite."""
    num_correct: int
    num_samples: int
    num_skipped: int
    """Steps whose fp16 gradients overflowed; the optimiser left the parameters as they were."""
    norm_2S: np.ndarray = field(default_factory=lambda: np.zeros((2, 0)))
    """Squared norms of gradients, as NoiseScale takes them, of the steps that this process trained;
    of none without step.noise_scale."""

    @staticmethod
    def of_part(loss_S: np.ndarray, num_correct: int, global_batch: int) -> "TrainLog":
        """The log of steps that an earlier process trained."""
        return TrainLog(
            loss_S=loss_S,
            num_correct=num_correct,
            num_samples=len(loss_S) * global_batch,
            num_skipped=0,
        )

    @staticmethod
    def empty() -> "TrainLog":
        """The log of no step."""
        return TrainLog.of_part(np.zeros(0), 0, 0)

    def and_then(self, later: "TrainLog") -> "TrainLog":
        """Of these steps and those after them."""
        return TrainLog(
            loss_S=np.concatenate([self.loss_S, later.loss_S]),
            num_correct=self.num_correct + later.num_correct,
            num_samples=self.num_samples + later.num_samples,
            num_skipped=self.num_skipped + later.num_skipped,
            norm_2S=np.concatenate([self.norm_2S, later.norm_2S], axis=1),
        )

    @property
    def accuracy(self) -> float:
        """0..1."""
        return self.num_correct / max(self.num_samples, 1)

    @property
    def loss(self) -> float:
        """Mean over the steps where it is finite.

        Raises:
            UserError: it is finite in none: fp16, and fewer steps than MAX_SKIPPED.
        """
        finite_S = self.loss_S[np.isfinite(self.loss_S)]
        if not len(finite_S):
            raise UserError("the loss was not finite in any step of the epoch; use --amp bf16")
        return float(finite_S.mean())


def gives_root_gradient(device: torch.device) -> bool:
    """Whether a backward pass is given the 1 that it starts from.

    On a GPU: that is a launch less. torch then compares shapes by sympy, whose import a CPU's run
    can do without.
    """
    return device.type == "cuda"


class TrainStep:
    """Training and evaluation steps of a fixed batch size.

    Args:
        model: on the world's device.
        config: what is *effective*; `prepare` captures if config.step.cuda_graphs.
        order: of the training split; tells the batch size and the steps of an epoch.
        static: K times B random samples on the device, K = config.step.steps_per_launch. Warm-up
            trains on them, and their addresses are baked into the graphs.
        source: the feed whose batches a launch gathers itself; None: batches are handed over.
    """

    def __init__(
        self,
        model: Network,
        config: RunConfig,
        order: Order,
        static: Batch,
        world: World,
        source: Source | None = None,
    ) -> None:
        self._config = config
        self._order = order
        self._static = static
        self._world = world
        self._source = source
        self.use_backends()
        self._is_sharded = config.step.parallel == "fsdp"
        if config.step.channels_last:
            model.use_channels_last(weights=not self._is_sharded)
        self.layers_note = use_fp8(model) if config.step.precision == "fp8" else ""
        """Which layers are computed in which precision, where some are in fp8."""
        self.model = model.train()
        if self._is_sharded:
            self.objective = Objective(model, config, world.device)
            shard(self.objective, config.step, world)
        self.steps_per_launch = config.step.steps_per_launch
        self.capture_failure = ""
        """Why the step runs eagerly although a graph was asked for."""
        self._host_step = self._in_epoch = self._read_from = 0
        self.num_skipped_in_a_row = 0
        """The last steps before the last reading, if fp16 skipped them."""
        self.draws_random = False
        """Whether warm-up drew from torch's random numbers, which a process has once."""
        self._graphs: dict[int | str, Replay] = {}
        self._epoch = 0
        self._keep_on_device()
        self._make_optimizer()
        num_shards = config.step.canonical
        self._num_parts = num_shards // world.size if num_shards else config.step.accumulate
        self._keeps_gradients = self._is_sharded and config.step.cuda_graphs
        """Whether they stay where they are from step to step: FSDP adds to those of a replay."""
        self._measures_noise = config.step.noise_scale
        assert not self._measures_noise or self._num_parts > 1 or num_shards > 1
        self.statistics = Statistics(model, world, self._num_parts)
        self._shards = Shards(model, num_shards, world, self.statistics) if num_shards else None
        self._wrap()

    def _keep_on_device(self) -> None:
        """What a step reads and writes beside the network: counters, learning rates, the log."""
        config, order, device = self._config, self._order, self._world.device
        num_steps = (config.schedule_epochs or config.epochs) * order.steps_per_epoch
        self.counter_21 = torch.zeros(2, 1, dtype=torch.int64, device=device)
        """Steps done in the run, and in the epoch."""
        self._last_21 = torch.tensor([[num_steps], [order.steps_per_epoch - 1]], device=device)
        self._offset_K = torch.arange(self.steps_per_launch, device=device)
        self._rate_host = lr_table(config.optim, num_steps)
        self._rate_table = torch.from_numpy(self._rate_host).to(device)
        self._rate_K = self._rate_table.new_zeros(self.steps_per_launch)
        self._log_5K = torch.zeros(5, self.steps_per_launch, device=device)
        self._log_5S = torch.zeros(5, order.steps_per_epoch, device=device)
        self._one = torch.ones((), device=device)
        self._root_gradient = self._one if gives_root_gradient(device) else None
        num_rows = max(config.step.canonical, 1)
        self._eval_N3 = torch.zeros(num_rows, 3, dtype=torch.float64, device=device)
        self._confusion_CC: torch.Tensor | None = None
        """What evaluation read in place of what, where a page shows it; made in warm-up."""

    def _make_optimizer(self) -> None:
        config, is_flat = self._config, "adamw" in self._config.kernels
        self._rate_on_device = config.optim.fused or config.step.cuda_graphs or is_flat
        self.optimizer = make_optimizer(
            config.optim,
            self.model,
            self._rate_K[0] if self._rate_on_device else config.optim.learning_rate,
            capturable=config.step.cuda_graphs,
            flat=is_flat,
            rounded=() if why_not_rounded(config, self._world.size) else self.model.rounded(),
        )

    def _wrap(self) -> None:
        """The parts that a failed capture leaves in the middle of an iteration, made anew."""
        device = self._world.device
        self.scaler = torch.amp.GradScaler(
            device.type, enabled=self._config.step.precision == "fp16"
        )
        if self._is_sharded:
            self._net: torch.nn.Module | None = self.objective
            return
        self.objective = Objective(self.model, self._config, device)
        if isinstance(self.optimizer, FlatAdamW):
            shadows = self.optimizer.shadows
            named = self.model.named_parameters()
            self.objective.rounded = {name: shadows[p] for name, p in named if p in shadows}
        self._net = None  # the old DDP's hooks go with it
        if self._config.step.compile != "off":
            self.objective.compile(**compile_arguments(self._config.step))
        self._net = self.objective
        if self._world.size > 1 and not self._shards:
            self._net = replicated(self.objective, device)

    def use_backends(self) -> None:
        """Make precision, cuDNN and the compiler what this step's config says, process-wide.

        A new step does so itself. Of two that take turns, each must call it when its turn comes.
        """
        use_backends(self._config.step)

    @property
    def part_samples(self) -> int:
        """What the network sees at once; the small batch of the noise scale."""
        return self._order.rank_batch // self._num_parts

    @property
    def state(self) -> TrainState:
        """Every tensor that the run keeps."""
        counters = {"counters": self.counter_21, "evaluation sums": self._eval_N3}
        return TrainState(self.model, self.optimizer, self.scaler, counters)

    def gradients(self) -> Tensors:
        """Those of the last step, whole and fp32, by parameter's name. Collective under FSDP."""
        leaves = dict(self.model.named_parameters()) | self.objective.rounded
        return {name: whole(p.grad).float() for name, p in leaves.items() if p.grad is not None}

    @contextmanager
    def eagerly(self) -> Iterator[None]:
        """Without the graphs while this is entered, so that a profiler sees each operation."""
        graphs, self._graphs = self._graphs, {}
        try:
            yield
        finally:
            self._graphs = graphs

    def prepare(self) -> None:
        """Warm up on the static batch and, where asked for, capture; all state is put back.

        Where a rank cannot capture, all run eagerly, and `capture_failure` says why.
        """
        if self._source:
            self._source.load_epoch(0)
        random = RandomState.now()
        with self.state.kept():
            for _ in range(DDP_WARMUP_STEPS if self._net is not self.objective else WARMUP_STEPS):
                self._run(self._slots(1), 1)
                self._evaluate(self._slots(1))
            if self.steps_per_launch > 1:
                self._run(self._static, self.steps_per_launch)
            self.draws_random = not random.is_now()
            if self._config.step.cuda_graphs:
                self._world.ledger.mark("model and optimiser")
                self._capture()
            self._world.synchronize()
        if self._confusion_CC is not None:
            self._confusion_CC.zero_()
        if self.capture_failure:
            self.close()
            self._wrap()

    def _capture(self) -> None:
        failure, pool = "", None
        works: dict[int | str, Callable[[], None]] = {
            num_steps: partial(self._run, self._slots(num_steps), num_steps)
            for num_steps in (self.steps_per_launch, 1)
        }
        works["evaluation"] = partial(self._evaluate, self._slots(1))
        try:
            for name, work in works.items():
                graph = Graph(work, pool)
                self._graphs[name] = graph
                pool = graph.pool
        except Exception as error:  # any: the run can go on without graphs, then on all ranks
            failure = sentence(first_cause(error))
        self.capture_failure = self._world.first_reason(failure)
        if self.capture_failure and self._is_sharded:
            recover(self.objective)

    @property
    def gathers(self) -> bool:
        """Whether launches gather their batches themselves."""
        return self._source is not None

    def gathered(self, num_steps: int) -> GatheredOnce:
        """What a launch of this step gathers, for others of the same order, too."""
        assert self._source is not None
        return GatheredOnce(self._source, self._slots(num_steps))

    def work(self, num_steps: int, gathered: GatheredOnce) -> None:
        """A launch's device work, as a part of a larger one (train/joint.py)."""
        self._run(gathered.batch, num_steps, gathered)

    def join(self, launches: dict[int, Replay]) -> None:
        """Let these, by their number of steps, stand for launches of its own."""
        for num_steps, launch in launches.items():
            if graph := self._graphs.get(num_steps):
                graph.reset()
            self._graphs[num_steps] = launch

    def follow(self, other: "TrainStep") -> None:
        """Gather where `other` of the same order does, though this step's training has ended."""
        assert self._source
        if self._epoch != other._epoch:
            self._epoch = other._epoch
            self._source.load_epoch(self._epoch)
        self.counter_21.copy_(other.counter_21)

    def train_epoch(self, feed: Feed, epoch: int, first_step: int = 0) -> Iterator[Launch]:
        """Train an epoch from `first_step` on, a launch at each iteration.

        Nothing waits for the device.

        Raises:
            RuntimeError: the feed hands out fewer or more batches than its order has.
        """
        torch.manual_seed(round_keys(self._config.seed, epoch, "random", self._world.rank)[0])
        self._epoch = epoch
        self.counter_21[1] = first_step
        self._in_epoch = self._read_from = first_step
        start = time.perf_counter()
        missing = self._order.steps_per_epoch - first_step
        self._world.at(self._host_step, WAITING)
        batches = iter(()) if self._source else feed.batches(epoch, first_step)
        if self._source:
            self._source.load_epoch(epoch)
        while missing:
            num_steps = self.steps_per_launch if missing >= self.steps_per_launch else 1
            missing -= num_steps
            batch = self._slots(num_steps) if self._source else self._filled(batches, num_steps)
            wait_s = time.perf_counter() - start
            self._world.at(self._host_step, TRAINING)
            self._launch(batch, num_steps)
            self._world.at(self._host_step, WAITING)
            yield Launch(batch, num_steps, wait_s)
            start = time.perf_counter()
        if next(batches, None) is not None:
            raise RuntimeError("the feed goes on after the epoch's last step")
        if self._source:
            self._source.draw_ahead(epoch + 1)

    def time_steps(self, num_launches: int) -> list[float]:
        """Seconds per step of so many launches on the static batch; all state is put back.

        Collective; before the epoch's first step.
        """
        num_steps, found = self.steps_per_launch, []
        run = partial(self._run, self._slots(num_steps), num_steps)
        work: Callable[[], None] = self._graphs.get(num_steps, run)
        with self.state.kept():
            for _ in range(num_launches):
                self._world.synchronize()
                start = time.perf_counter()
                work()
                self._world.synchronize()
                found.append((time.perf_counter() - start) / num_steps)
        return found

    def train(self, batch: Batch) -> None:
        """One optimiser step on a batch that is handed over."""
        assert self._source is None, "this step gathers its batches itself; use train_epoch"
        if self._in_epoch == self._order.steps_per_epoch:
            self.counter_21[1] = self._in_epoch = self._read_from = 0
        self._launch(self._filled(iter([batch]), 1), 1)

    def evaluate(self, batch: Batch) -> None:
        """Add the batch's loss and correct answers to the evaluation sums, without padding rows."""
        self._world.at(self._host_step, EVALUATING)
        if graph := self._graphs.get("evaluation"):
            check_like(batch, self._slots(1))
            self._slots(1).copy_(batch)
            graph()
        else:
            self._evaluate(batch)

    def read_training(self) -> TrainLog:
        """What the epoch's steps since the last reading did, on all ranks.

        Collective; synchronises.

        Raises:
            UserError: a loss or gradient was not finite; names the step. With fp16: MAX_SKIPPED
                steps in a row were skipped.
        """
        ours_5S = self._log_5S[:, self._read_from : self._in_epoch]
        sums_5S = ours_5S if self._shards else self._world.sum(ours_5S)
        log_5S = sums_5S.double().cpu().numpy()
        num_logs = 1 if self._shards else self._world.size
        first_step = self._host_step - log_5S.shape[1]
        self._read_from = self._in_epoch
        num_samples = log_5S.shape[1] * self._order.global_batch
        self._refuse_nonfinite(log_5S, first_step)
        return TrainLog(
            loss_S=log_5S[LOSS] / num_logs,
            num_correct=int(log_5S[CORRECT].sum()),
            num_samples=num_samples,
            num_skipped=int((log_5S[BAD] > 0).sum()),
            norm_2S=log_5S[SMALL:] / num_logs if self._measures_noise else log_5S[SMALL:, :0],
        )

    def _refuse_nonfinite(self, log_5S: np.ndarray, first_step: int) -> None:
        rows = log_5S[[LOSS, BAD]].T.tolist()
        for step, (loss, bad) in enumerate(rows, start=first_step + 1):
            if not self.scaler.is_enabled() and (bad or not np.isfinite(loss)):
                what = "a gradient" if np.isfinite(loss) else "the loss"
                remedy = "lower optim.learning_rate or use --amp bf16"
                raise UserError(f"{what} was not finite in step {step}; {remedy}")
            self.num_skipped_in_a_row = self.num_skipped_in_a_row + 1 if bad else 0
            if self.num_skipped_in_a_row >= MAX_SKIPPED:
                raise UserError(
                    f"fp16 gradients overflowed in {MAX_SKIPPED} steps in a row, the last of them "
                    f"step {step}; use --amp bf16 or lower optim.learning_rate"
                )

    def read_evaluation(self) -> tuple[float, float, int]:
        """Mean loss, accuracy (0..1) and samples seen over all ranks since the last call.

        Collective; synchronises.
        """
        rows = self._world.sum(self._eval_N3).tolist()
        loss, correct, seen = (sum(column) for column in zip(*rows, strict=True))
        self._eval_N3.zero_()
        return loss / max(seen, 1), correct / max(seen, 1), int(seen)

    def read_confusion(self) -> np.ndarray:
        """count_CC of true and read classes over all ranks since the last call; with `serve` only.

        Collective; synchronises.
        """
        assert self._confusion_CC is not None
        count_CC: np.ndarray = self._world.sum(self._confusion_CC).cpu().numpy()
        self._confusion_CC.zero_()
        return count_CC

    def resume_at(self, step: int, num_skipped_in_a_row: int = 0) -> None:
        """Go on at global step `step`, before which fp16 had skipped so many in a row."""
        self._host_step = step
        self.num_skipped_in_a_row = num_skipped_in_a_row
        self.counter_21[0] = step

    def close(self) -> None:
        """Destroy the graphs; call before the process group ends, also on errors."""
        for graph in self._graphs.values():
            graph.reset()
        self._graphs.clear()

    def _slots(self, num_steps: int) -> Batch:
        return self._static.rows(0, num_steps * self._order.rank_batch)

    def _filled(self, batches: Iterator[Batch], num_steps: int) -> Batch:
        """The next batches, where the launch reads them: in the static slots, or where they are."""
        size = self._order.rank_batch
        for number in range(num_steps):
            batch = next(batches, None)
            if batch is None:
                done = self._in_epoch + number
                raise RuntimeError(
                    f"the feed ended after {done} of {self._order.steps_per_epoch} steps"
                )
            slot = self._static.rows(number * size, (number + 1) * size)
            check_like(batch, slot)
            if num_steps == 1 and not self._graphs:
                return batch
            slot.copy_(batch)
        return self._slots(num_steps)

    def _launch(self, batch: Batch, num_steps: int) -> None:
        if graph := self._graphs.get(num_steps):
            graph()
        else:
            self._run(batch, num_steps)
        self._host_step += num_steps
        self._in_epoch += num_steps

    def _run(
        self, batch: Batch, num_steps: int, source: Source | GatheredOnce | None = None
    ) -> None:
        """`num_steps` optimiser steps: device work only, so that it may be captured.

        `source`: fills `batch`; None: this step's own, if it has one.
        """
        check_fp32_precision(self._config.step.precision)
        index_2K = torch.minimum(self.counter_21 + self._offset_K[:num_steps], self._last_21)
        torch.index_select(self._rate_table, 0, index_2K[0], out=self._rate_K[:num_steps])
        if source := source or self._source:
            with span("copy"):
                source.gather(index_2K[1], batch)
        self._log_5K.zero_()
        size = self._order.rank_batch
        for k in range(num_steps):
            self._step(batch.rows(k * size, (k + 1) * size), k)
        self._log_5S.index_copy_(1, index_2K[1], self._log_5K[:, :num_steps])
        self.counter_21 += num_steps

    def _step(self, batch: Batch, k: int) -> None:
        assert self._net is not None
        for group in self.optimizer.param_groups:
            group["lr"] = self._rate_K[k] if self._rate_on_device else self._host_rate(k)
        self.optimizer.zero_grad(set_to_none=not self._keeps_gradients)
        num_parts = self._num_parts
        divisor = 1 if self._shards else num_parts
        self.statistics.start_step()
        for number, part in enumerate(self._parts(batch, num_parts)):
            with apart(self._net) if number < num_parts - 1 else nullcontext():
                with span("forward"):
                    loss, correct = self._net(part.image_BHW, part.label_B)
                with span("backward"):
                    part_loss = loss / divisor if divisor > 1 else loss
                    self.scaler.scale(part_loss).backward(self._root_gradient)
            if self._shards:
                self._shards.keep(number, loss.detach(), correct)
                continue
            if self._measures_noise and number == 0:  # before any rank adds another's
                self._keep_norm(self._log_5K[SMALL, k], num_parts**2)
            self.statistics.end_part()
            into = [self._log_5K[LOSS, k], self._log_5K[CORRECT, k]]
            torch._foreach_add_(into, [part_loss.detach(), correct])  # one launch of a GPU
        if self._shards:
            with span("gather"):
                self._log_5K[: CORRECT + 1, k].copy_(self._shards.add_up())
                if self._measures_noise:
                    self._log_5K[SMALL, k].copy_(self._shards.mean_squared_norm())
        else:
            self.statistics.end_step()
        if self._measures_noise:
            self._keep_norm(self._log_5K[WHOLE, k], 1)
        with span("optimiser"):
            self._update(self._log_5K[BAD, k])

    def _keep_norm(self, into: torch.Tensor, factor: int) -> None:
        """The squared norm of the gradients as they are, times `factor`, without the loss's scale.

        Device work only.
        """
        norms = torch._foreach_norm([p.grad for p in self.model.parameters() if p.grad is not None])
        into.copy_(torch.stack(norms).square().sum() * factor)
        if self.scaler.is_enabled() and self.scaler._scale is not None:
            into.div_(self.scaler._scale.square())

    def _parts(self, batch: Batch, num_parts: int) -> Iterator[Batch]:
        """Contiguous slices of a rank's batch, of one size."""
        size = self._order.rank_batch // num_parts
        for number in range(num_parts):
            yield batch.rows(number * size, (number + 1) * size)

    def _update(self, bad: torch.Tensor) -> None:
        """The optimiser's step.

        Where a gradient is not finite, `bad` is set, and only a plain optimiser steps.
        """
        if self.scaler.is_enabled():
            self.scaler.unscale_(self.optimizer)
            (found,) = self.scaler._found_inf_per_device(self.optimizer).values()
            bad.copy_(found)
            self.scaler.step(self.optimizer)
            self.scaler.update()
            return
        if isinstance(self.optimizer, FlatAdamW):  # looks by itself
            self.optimizer.found_inf = bad
            self.optimizer.step()
            return
        gradients = [p.grad for p in self.model.parameters() if p.grad is not None]
        # GradScaler's own check, one kernel; and its way to tell a fused optimiser
        torch._amp_foreach_non_finite_check_and_unscale_(gradients, bad, self._one)
        if self._config.optim.fused:
            self.optimizer.found_inf = bad  # type: ignore[attr-defined]
        self.optimizer.step()

    def _host_rate(self, k: int) -> float:
        return float(self._rate_host[min(self._host_step + k, len(self._rate_host) - 1)])

    @torch.no_grad()
    def _evaluate(self, batch: Batch) -> None:
        check_fp32_precision(self._config.step.precision)
        first, num_parts = 0, 1
        if self._shards:
            first, num_parts = self._shards.first, self._shards.num_of_rank
        for number, part in enumerate(self._parts(batch, num_parts), start=first):
            self._eval_N3[number].add_(self._evaluated(part))
        let_go(self.objective)

    def _evaluated(self, batch: Batch) -> torch.Tensor:
        """Sum of the losses, right answers, and samples; padding rows do not count."""
        logits_BC = self.objective.logits(batch.image_BHW)
        real_B, label_B = batch.id_B != PADDING_ID, batch.label_B.long()
        loss_B = functional.cross_entropy(logits_BC, label_B, reduction="none").where(real_B, 0.0)
        answer_B = logits_BC.argmax(1)
        correct = ((answer_B == label_B) & real_B).sum()
        if self._config.serve != NO_PAGE:
            self._count(label_B, answer_B, real_B, logits_BC.shape[1])
        return torch.stack((loss_B.sum(dtype=torch.float64), correct, real_B.sum()))

    def _count(
        self, label_B: torch.Tensor, answer_B: torch.Tensor, real_B: torch.Tensor, num_classes: int
    ) -> None:
        """Add a batch's answers to the confusion; padding rows add nothing."""
        if self._confusion_CC is None:
            self._confusion_CC = label_B.new_zeros(num_classes, num_classes)
        self._confusion_CC.view(-1).index_add_(0, label_B * num_classes + answer_B, real_B.long())
