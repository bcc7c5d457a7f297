"""The session: model, step and feed of a run, built once from what can be had here; and evaluation of whole splits.

The trainer, the profiler and the benchmarks start from here.

Shapes: B samples of one rank, H x W pixels.
"""

import time
from contextlib import closing
from dataclasses import dataclass, replace
from typing import Any

import torch

from engine import clock
from engine.config import DataConfig, RunConfig
from engine.errors import UserError
from engine.feeds import SOURCES, choose_feed, make_feed, make_source
from engine.feeds.batch import Feed
from engine.feeds.stream import NUM_WINDOWS
from engine.feeds.synthetic import random_batch
from engine.model import check_image_size, make_model
from engine.order import Order
from engine.records import Records
from engine.report import Environment, environment
from engine.step import TrainStep
from engine.world import World, cannot_compile, cannot_fuse, has_fast_bf16

AUTO_KERNELS = "no result file of a GPU shows kernels/ ahead of torch.compile yet"
"""To be changed with the first result file that does, and bench_configs/ladder_h100.toml's rungs with it."""


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


def effective_config(
    config: RunConfig, records: Records, world: World
) -> tuple[RunConfig, list[str]]:
    """What can be had of `config` here, and a sentence for each thing that cannot."""
    notes = []
    step, on_cpu = config.step, world.device.type == "cpu"
    if step.precision == "tf32" and (
        on_cpu or torch.cuda.get_device_capability(world.device) < (8, 0)
    ):
        step = replace(step, precision="fp32")
        notes.append("TF32 is not used: this device has none; fp32 is computed as IEEE has it")
    if step.precision == "bf16" and not has_fast_bf16(world.device):
        step = replace(step, precision="fp32")
        notes.append(
            "bf16 is not used: this device has no bf16 instructions and would be slower than in fp32"
        )
    if step.precision == "fp16" and on_cpu:
        step = replace(step, precision="fp32")
        notes.append(
            "fp16 is not used: CPUs compute it many times slower than fp32; --amp bf16 is the fast one"
        )
    if step.cuda_graphs and on_cpu:
        step = replace(step, cuda_graphs=False)
        notes.append("CUDA graphs are not used: there is no GPU; the same step runs eagerly")
    if step.cuda_graphs and step.precision == "fp16" and not config.optim.fused:
        step = replace(step, cuda_graphs=False)
        notes.append(
            "CUDA graphs are not used: fp16 with an optimiser that is not fused reads the host in each step"
        )
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
        notes.append(
            f"stream reads ahead in {NUM_WINDOWS} windows of {window_mb:,.0f} MB; evaluation does so, too"
        )
    return replace(config, step=step, data=data, kernels=kernels), notes


def make_order(
    config: RunConfig, num_samples: int, rank: int, world_size: int, shuffle: bool = True
) -> Order:
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
    """Refuse records too small to train on with this batch; needs no process group.

    Raises:
        UserError: the images are smaller than the network's least, or the global batch cannot be
            divided by the ranks, or is larger than the train split.
    """
    check_image_size(*records.height_width)
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
    model = make_model(config.model, *records.height_width, num_classes, config.seed, fused).to(
        device
    )
    static = random_batch(
        order.rank_batch,
        records.height_width,
        num_classes,
        device,
        copies=effective.step.steps_per_graph,
    )
    world.ledger.mark("model and optimiser")
    source = (
        make_source(effective.data, train, order, static, fused) if _gathers(effective) else None
    )
    world.ledger.mark("feed")
    step = TrainStep(model, effective, order, static, world, source)
    try:
        step.prepare()
        world.ledger.mark("graph pool" if effective.step.cuda_graphs else "model and optimiser")
        warmup_s = time.perf_counter() - start
        if step.capture_failure:
            notes.append(
                f"CUDA graphs are not used: {step.capture_failure}; the same step runs eagerly"
            )
            effective = replace(effective, step=replace(effective.step, cuda_graphs=False))
        feed = source or make_feed(
            effective.data, train, order, num_classes, device, config.augment, fused
        )
        world.ledger.mark("feed")
    except BaseException:
        step.close()
        raise
    facts = environment(
        num_threads=torch.get_num_threads(), allocator=world.allocator, gpu=clock.gpu_facts(device)
    )
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
    with closing(make_feed(data, split, order, len(session.records.classes), world.device)) as feed:
        for batch in feed.batches(0):
            session.step.evaluate(batch)
        loss, accuracy, seen = session.step.read_evaluation()
    assert seen == len(split), f"evaluated {seen} of {len(split)} samples"
    return loss, accuracy


def _switches(config: RunConfig) -> dict[str, Any]:
    return {
        "precision": config.step.precision,
        "channels_last": config.step.channels_last,
        "compile": config.step.compile,
        "accumulate": config.step.accumulate,
        "cuda_graphs": config.step.cuda_graphs,
        "steps_per_launch": config.step.steps_per_graph,
        "kernels": config.kernels.use
        if not config.kernels.fused
        else ", ".join(sorted(config.kernels.fused)),
        "feed": config.data.feed,
        "order": config.data.order,
    }
