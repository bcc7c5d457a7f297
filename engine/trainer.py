"""fit(): the one loop, its warm-up and its clock. Everything slow or fragile (disk, sums, evaluation) is off the clock.

Shapes: B samples of one rank, H x W pixels.
"""

import json
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import torch

from engine import clock
from engine.checkpoint import Position, load_checkpoint, save_checkpoint, save_model
from engine.config import DataConfig, RunConfig, to_toml
from engine.errors import UserError
from engine.feeds import SOURCES, choose_feed, idlog, make_feed, make_source
from engine.feeds.batch import Feed
from engine.feeds.stream import NUM_WINDOWS
from engine.feeds.synthetic import random_batch
from engine.model import make_model
from engine.order import Order
from engine.publish import write_file, writing
from engine.records import Records
from engine.report import Environment, RunReport, environment, write_json
from engine.step import TrainStep
from engine.ui import progress_bar
from engine.world import World, cannot_compile, cannot_fuse, has_fast_bf16

CLOCK_INCLUDES = "every training step with its data; not: start-up, warm-up, capture, evaluation, checkpoints, reports"
AUTO_KERNELS = "no result file of a GPU shows kernels/ ahead of torch.compile yet"
"""To be changed with the first result file that does, and bench_configs/ladder_h100.toml's rungs with it."""
Say = Callable[[str], None]


@dataclass
class Session:
    """Everything a run needs, built once; the profiler and the benchmarks start from here as the trainer does."""

    world: World
    records: Records
    config: RunConfig
    """As effective."""
    requested: dict[str, Any]
    notes: list[str]
    step: TrainStep
    feed: Feed
    environment: Environment
    warmup_s: float

    @property
    def effective(self) -> dict[str, Any]:
        return _switches(self.config)

    def close(self) -> None:
        self.step.close()
        self.feed.close()


def effective_config(config: RunConfig, records: Records, world: World) -> tuple[RunConfig, list[str]]:
    """What can be had of `config` here, and a sentence for each thing that cannot."""
    notes = []
    step, on_cpu = config.step, world.device.type == "cpu"
    if step.precision == "tf32" and (on_cpu or torch.cuda.get_device_capability(world.device) < (8, 0)):
        step = replace(step, precision="fp32")
        notes.append("TF32 is not used: this device has none; fp32 is computed as IEEE has it")
    if step.precision == "bf16" and not has_fast_bf16(world.device):
        step = replace(step, precision="fp32")
        notes.append("bf16 is not used: this device has no bf16 instructions and would be slower than in fp32")
    if step.precision == "fp16" and on_cpu:
        step = replace(step, precision="fp32")
        notes.append("fp16 is not used: CPUs compute it many times slower than fp32; --amp bf16 is the fast one")
    if step.cuda_graphs and on_cpu:
        step = replace(step, cuda_graphs=False)
        notes.append("CUDA graphs are not used: there is no GPU; the same step runs eagerly")
    if step.cuda_graphs and step.precision == "fp16" and not config.optim.fused:
        step = replace(step, cuda_graphs=False)
        notes.append("CUDA graphs are not used: fp16 with an optimiser that is not fused reads the host in each step")
    kernels = config.kernels
    if kernels.use == "auto":
        kernels = replace(kernels, use="off" if on_cpu else "compile")
        where = "on a CPU PyTorch's operations are the fastest" if on_cpu else AUTO_KERNELS
        notes.append(f"the kernels are {kernels.use}: {where}")
    if kernels.use == "triton" and (why := cannot_fuse(world.device)):
        kernels = replace(kernels, use="off")
        notes.append(f"Triton kernels are not used: {why}; PyTorch's operations compute the same")
    if kernels.use == "compile" and step.compile == "off":
        step = replace(step, compile="default")
    if step.compile != "off" and (why := cannot_compile(world.device)):
        step = replace(step, compile="off")
        notes.append(f"torch.compile is not used: {why}")
    steps_per_epoch = len(records.split("train")) // config.global_batch
    if step.steps_per_graph > steps_per_epoch:
        step = replace(step, steps_per_graph=steps_per_epoch)
        notes.append(f"{steps_per_epoch} steps in a launch: an epoch has no more")
    data = config.data
    if data.feed == "auto":
        feed, why = choose_feed(data, records.split("train"), world.device)
        data = replace(data, feed=feed)  # type: ignore[arg-type]
        notes.append(f"the feed is {feed}: {why}")
    if data.feed == "stream":
        window = min(data.block_samples * data.window_blocks, len(records.split("train")))
        window_mb = window * records.height_width[0] * records.height_width[1] / 1e6
        notes.append(f"stream reads ahead in {NUM_WINDOWS} windows of {window_mb:,.0f} MB; evaluation does so, too")
    return replace(config, step=step, data=data, kernels=kernels), notes


def make_order(config: RunConfig, num_samples: int, rank: int, world_size: int, shuffle: bool = True) -> Order:
    """The order of a split's samples; sequential for evaluation."""
    in_blocks = config.data.order == "blocked"
    return Order(
        num_samples=num_samples,
        global_batch=config.global_batch,
        rank=rank,
        world_size=world_size,
        seed=config.seed,
        shuffle=shuffle,
        block_samples=config.data.block_samples if in_blocks else 0,
        window_blocks=config.data.window_blocks if in_blocks else 0,
    )


def check_batch(config: RunConfig, records: Records, world_size: int) -> None:
    """Refuse a global batch that no epoch of these records can serve; needs no process group.

    Raises:
        UserError: it cannot be divided by the ranks, or is larger than the train split.
    """
    batch, num_samples = config.global_batch, len(records.split("train"))
    if batch % world_size:
        raise UserError(
            f"a global batch of {batch} cannot be divided by {world_size} ranks; give --batch-size (samples a rank)"
        )
    if batch // world_size % config.step.accumulate:
        raise UserError(
            f"a rank's batch of {batch // world_size} cannot be divided into {config.step.accumulate} parts; "
            "give an --accumulate that divides it"
        )
    if batch > num_samples:
        raise UserError(
            f"a global batch of {batch} is larger than the train split of {num_samples} samples; "
            f"give a --batch-size of at most {num_samples // world_size}"
        )


def open_session(config: RunConfig, records: Records, world: World) -> Session:
    """Build model, step and feed, warm up (and capture), and only then start a feed that has threads.

    The caller runs inside world.on_stream() and closes the session.

    Raises:
        UserError: the batch cannot be divided or is larger than the split.
    """
    check_batch(config, records, world.size)
    clock.reset_torch_peak(world.device)
    effective, notes = effective_config(config, records, world)
    train, device = records.split("train"), world.device
    order = make_order(config, len(train), world.rank, world.size)
    num_classes = len(records.classes)
    fused = effective.kernels.fused
    start = time.perf_counter()
    model = make_model(config.model, *records.height_width, num_classes, config.seed, fused).to(device)
    static = random_batch(
        order.rank_batch, records.height_width, num_classes, device, copies=effective.step.steps_per_graph
    )
    world.ledger.mark("model and optimiser")
    source = make_source(effective.data, train, order, static, fused) if _gathers(effective) else None
    world.ledger.mark("feed")
    step = TrainStep(model, effective, order, static, world, source)
    try:
        step.prepare()
        world.ledger.mark("graph pool" if effective.step.cuda_graphs else "model and optimiser")
        warmup_s = time.perf_counter() - start
        if step.capture_failure:
            notes.append(f"CUDA graphs are not used: {step.capture_failure}; the same step runs eagerly")
            effective = replace(effective, step=replace(effective.step, cuda_graphs=False))
        feed = source or make_feed(effective.data, train, order, num_classes, device, config.augment, fused)
        world.ledger.mark("feed")
    except BaseException:
        step.close()
        raise
    facts = environment(num_threads=torch.get_num_threads(), allocator=world.allocator, gpu=clock.gpu_facts(device))
    return Session(world, records, effective, _switches(config), notes, step, feed, facts, warmup_s)


def _gathers(config: RunConfig) -> bool:
    """Whether launches gather their batches themselves, on the device; distorted images are handed over."""
    in_launches = config.step.cuda_graphs or config.step.steps_per_graph > 1
    return in_launches and config.data.feed in SOURCES and not config.augment.is_on


def evaluate(session: Session, split_name: str) -> tuple[float, float]:
    """Loss and accuracy (0..1) over a whole split, exact over all ranks: nothing counted twice, nothing left out."""
    world, config = session.world, session.config
    split = session.records.split(split_name)
    order = make_order(config, len(split), world.rank, world.size, shuffle=False)
    data = config.data if config.data.feed == "stream" else DataConfig()
    feed = make_feed(data, split, order, len(session.records.classes), world.device)
    try:
        for batch in feed.batches(0):
            session.step.evaluate(batch)
        loss, accuracy, seen = session.step.read_evaluation()
    finally:
        feed.close()
    assert seen == len(split), f"evaluated {seen} of {len(split)} samples"
    return loss, accuracy


def fit(config: RunConfig, records: Records, world: World, out: Path, *, resume: bool, say: Say) -> RunReport:
    """Train as `config` says and write OUT: report.json, metrics.jsonl, model.safetensors, config.toml, checkpoints/.

    Args:
        resume: go on from OUT's newest checkpoint.
        say: prints a line on rank 0.
    Raises:
        UserError: a checkpoint is missing or foreign, the loss is not finite, or the disk is full.
    """
    with world.on_stream():
        session = open_session(config, records, world)
        try:
            return train(session, config, out, resume=resume, say=say)
        finally:
            session.close()


def train(session: Session, config: RunConfig, out: Path, *, resume: bool, say: Say) -> RunReport:
    """fit() in a session that is open, and stays open; `config` is what was requested."""
    for note in session.notes:
        say(f"note: {note}")
    return _Fit(session, config, out, say).run(resume)


@dataclass
class _Fit:
    """The state of one fit() while it runs."""

    session: Session
    config: RunConfig
    out: Path
    say: Say
    wait_s: float = 0.0
    eval_s: float = 0.0
    num_skipped: int = 0
    best_val: float | None = None
    time_to_target_s: float | None = None
    utilisation_percent: list[float] = field(default_factory=list)
    events: Any = None
    """TensorBoard's writer, on rank 0 and where asked for."""

    def __post_init__(self) -> None:
        self.watch = clock.Stopwatch(self.session.world.device)
        self.nvml = clock.Nvml(self.session.world.device)
        self.steps_per_epoch = self.session.feed.order.steps_per_epoch
        self.has_val = "val" in self.session.records.splits

    def run(self, resume: bool) -> RunReport:
        first_epoch = self._resume() if resume else 0
        resumed_s = self.watch.total_s
        self.session.world.first(lambda: self._start_files(first_epoch))
        energy_j = self.nvml.energy_j()
        epoch = first_epoch
        while epoch < self.config.epochs and not self.time_to_target_s:
            self._epoch(epoch)
            epoch += 1
        energy_end_j = self.nvml.energy_j()
        used_j = None if energy_j is None or energy_end_j is None else energy_end_j - energy_j
        test = self._timed_evaluate("test") if "test" in self.session.records.splits else None
        wait = self.wait_s / max(self.watch.total_s - resumed_s, 1e-9)
        report = self._report(epoch, test, wait, used_j)
        self.session.world.first(lambda: self._end_files(report))
        return report

    def _epoch(self, epoch: int) -> None:
        lap_s = self._train_epoch(epoch)
        if (percent := self.nvml.utilisation_percent()) is not None:
            self.utilisation_percent.append(percent)
        log = self.session.step.read_training()
        self.num_skipped += log.num_skipped
        rate = log.num_samples / lap_s
        metrics: dict[str, Any] = {
            "epoch": epoch + 1,
            "step": (epoch + 1) * self.steps_per_epoch,
            "train_s": self.watch.total_s,
            "train_loss": log.loss,
            "train_accuracy_fraction": log.accuracy,
            "samples_per_s": rate,
        }
        line = f"epoch {epoch + 1:>3}/{self.config.epochs}  loss {log.loss:.4f}  train {log.accuracy:7.2%}"
        if self.has_val:
            val_loss, val = self._timed_evaluate("val")
            metrics |= {"val_loss": val_loss, "val_accuracy_fraction": val}
            line += f"  val {val:7.2%}"
            self.best_val = max(val, self.best_val or 0.0)
            if 0 < self.config.target_accuracy <= val:
                self.time_to_target_s = self.watch.total_s
        self._save(epoch + 1, metrics)
        self.say(f"{line}  {rate:>9,.0f} samples/s  {self.watch.total_s:7.2f} s")

    def _train_epoch(self, epoch: int) -> float:
        """Train one epoch on the clock; returns its seconds."""
        step, world = self.session.step, self.session.world
        world.synchronize()
        with progress_bar(f"epoch {epoch + 1}", self.steps_per_epoch, enabled=world.is_first) as show:
            self.watch.start()
            num_steps = 0
            for launch in step.train_epoch(self.session.feed, epoch):
                self.wait_s += launch.wait_s
                if self.config.log_ids:
                    idlog.append(idlog.path_of(self.out, world.rank, epoch), launch.batch, first=not num_steps)
                num_steps += launch.num_steps
                if num_steps % 50 < launch.num_steps:
                    show(num_steps)
            return self.watch.stop()

    def _timed_evaluate(self, split: str) -> tuple[float, float]:
        start = time.perf_counter()
        result = evaluate(self.session, split)
        self.eval_s += time.perf_counter() - start
        return result

    def _resume(self) -> int:
        step = self.session.step
        position, skipped = load_checkpoint(
            self.out,
            step.model,
            step.optimizer,
            step.scaler,
            digest=self.config.digest(),
            fingerprint=self.session.records.fingerprint,
        )
        for sentence in skipped:
            self.say(f"note: {sentence}")
        step.resume_at(position.num_steps)
        self.watch.total_s = position.train_s
        self.best_val = position.best_val_accuracy_fraction
        self.time_to_target_s = position.time_to_target_s
        self.say(f"resumed after epoch {position.num_epochs} of {self.config.epochs}")
        return position.num_epochs

    def _start_files(self, num_epochs_done: int) -> None:
        """Write config.toml, and cut metrics.jsonl and events back to the epochs that the checkpoint knows."""
        metrics = self.out / "metrics.jsonl"
        with writing(self.out):
            lines = metrics.read_bytes().splitlines(keepends=True)[:num_epochs_done] if metrics.exists() else []
            write_file(metrics, b"".join(lines))
            write_file(self.out / "config.toml", to_toml(self.config).encode())
            if self.config.tensorboard:
                from torch.utils.tensorboard import SummaryWriter

                self.events = SummaryWriter(str(self.out / "tensorboard"), purge_step=num_epochs_done + 1)

    def _end_files(self, report: RunReport) -> None:
        if self.events:
            self.events.close()
        with writing(self.out):
            save_model(self.out / "model.safetensors", self.session.step.model)
            write_json(report, self.out / "report.json")

    def _save(self, num_epochs: int, metrics: dict[str, Any]) -> None:
        def write() -> None:
            step = self.session.step
            position = Position(
                num_epochs=num_epochs,
                num_steps=num_epochs * self.steps_per_epoch,
                train_s=self.watch.total_s,
                best_val_accuracy_fraction=self.best_val,
                time_to_target_s=self.time_to_target_s,
            )
            with writing(self.out):
                with open(self.out / "metrics.jsonl", "a") as file:
                    file.write(json.dumps(metrics, allow_nan=False) + "\n")
                if self.events:
                    for name, value in metrics.items():
                        self.events.add_scalar(name, value, num_epochs)
                    self.events.flush()
                save_checkpoint(
                    self.out,
                    position,
                    step.model,
                    step.optimizer,
                    step.scaler,
                    digest=self.config.digest(),
                    fingerprint=self.session.records.fingerprint,
                )

        self.session.world.first(write)

    def _report(
        self, num_epochs: int, test: tuple[float, float] | None, wait_fraction: float, energy_j: float | None
    ) -> RunReport:
        session, device = self.session, self.session.world.device
        num_steps = num_epochs * self.steps_per_epoch
        utilisation = sorted(self.utilisation_percent)
        return RunReport(
            environment=session.environment,
            config=asdict(self.config),
            config_digest=self.config.digest(),
            dataset_fingerprint=session.records.fingerprint,
            requested=session.requested,
            effective=session.effective,
            notes=session.notes,
            clock_includes=CLOCK_INCLUDES,
            num_ranks=session.world.size,
            num_parameters=sum(p.numel() for p in session.step.model.parameters()),
            num_train_samples=len(session.records.split("train")),
            num_epochs=num_epochs,
            num_steps=num_steps,
            num_skipped_steps=self.num_skipped,
            train_s=self.watch.total_s,
            samples_per_s=num_steps * self.config.global_batch / max(self.watch.total_s, 1e-9),
            data_wait_fraction=wait_fraction,
            order_reach_fraction=session.feed.order.reach_fraction,
            warmup_s=session.warmup_s,
            eval_s=self.eval_s,
            val_accuracy_fraction=self.best_val,
            test_accuracy_fraction=test[1] if test else None,
            test_loss=test[0] if test else None,
            time_to_target_s=self.time_to_target_s,
            host_peak_rss_gib=clock.host_peak_rss_gib(),
            torch_peak_gib=clock.torch_peak_gib(device),
            device_used_gib=self.nvml.used_gib(),
            gpu_utilisation_percent=utilisation[len(utilisation) // 2] if utilisation else None,
            gpu_energy_j=energy_j,
        )


def _switches(config: RunConfig) -> dict[str, Any]:
    return {
        "precision": config.step.precision,
        "channels_last": config.step.channels_last,
        "compile": config.step.compile,
        "accumulate": config.step.accumulate,
        "cuda_graphs": config.step.cuda_graphs,
        "steps_per_launch": config.step.steps_per_graph,
        "kernels": config.kernels.use if not config.kernels.fused else ", ".join(sorted(config.kernels.fused)),
        "feed": config.data.feed,
        "order": config.data.order,
    }
