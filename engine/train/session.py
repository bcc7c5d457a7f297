"""The session: model, step and feed of a run, built once; and evaluation of whole splits.

The trainer, the profiler and the benchmarks start from here.

Shapes: B samples of one rank, H x W pixels.
"""

import time
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass, field, replace
from typing import Any, cast

import numpy as np

from engine import meters
from engine.config import DataConfig, RunConfig
from engine.data.records import Records, Split
from engine.data.sample import ensure_sample
from engine.errors import UserError
from engine.feeds.batch import Feed, Source
from engine.feeds.build import gathers, make_feed, make_order, open_for
from engine.feeds.shared import SharedFeeds
from engine.feeds.synthetic import random_batch
from engine.models import make_model, network_class
from engine.models.network import check_image_size
from engine.order import Order, permute, round_keys
from engine.report import Environment, NetworkFacts, RankBytes
from engine.train.available import effective_config
from engine.train.backends import backends_kept
from engine.train.canonical import check_shards, fixed_arithmetic
from engine.train.schedule import planned_batches
from engine.train.step import TrainStep
from engine.train.weights import network_facts
from engine.world import World

MOST_SEEN = 16_384
"""Training images that `Network.prepare` is shown at most, in runs of NEIGHBOURS."""
NEIGHBOURS = 256


@dataclass
class Session:
    """Everything a run needs."""

    world: World
    records: Records
    requested: RunConfig
    """As asked for."""
    config: RunConfig
    """As effective: what this machine supports of it."""
    notes: list[str]
    step: TrainStep
    feed: Feed
    environment: Environment
    warmup_s: float
    kept: RankBytes
    """On this rank, of rank 0's size at most."""
    kept_under_ddp: RankBytes
    cleanup: ExitStack
    """Closes the step, and puts back what was changed for the whole process."""
    evaluation_feeds: dict[str, Feed] = field(default_factory=dict)
    """By split; made when first asked for, kept until the session is closed."""

    @property
    def effective(self) -> dict[str, Any]:
        return switches(self.config)

    @property
    def network_facts(self) -> NetworkFacts:
        """What the network takes and answers, for its weights' file and the report."""
        return network_facts(self.config.model, self.records, self.environment)

    def close(self) -> None:
        self.cleanup.close()
        for feed in (self.feed, *self.evaluation_feeds.values()):
            feed.close()

    def evaluation_feed(self, split_name: str) -> Feed:
        """A whole split in its own order, on the device."""
        if split_name not in self.evaluation_feeds:
            split = self.records.split(split_name)
            world, config = self.world, self.config
            order = make_order(config, split, world.rank, world.size, shuffle=False)
            plain = RunConfig(data=config.data if config.data.feed == "stream" else DataConfig())
            feed = make_feed(plain, split, order, len(self.records.classes), world.device)
            self.evaluation_feeds[split_name] = feed
        return self.evaluation_feeds[split_name]


def open_run_records(
    config: RunConfig, num_ranks: int, sign: Callable[[], None] = lambda: None
) -> Records:
    """The records that `config` names, or the packaged sample; they can serve its batch.

    Args:
        sign: called about once a second while a URL's records are fetched.
    Raises:
        UserError: they cannot be opened, or the batch does not fit them.
    """
    records = open_for(config.data, config.data.path or ensure_sample(), sign)
    check_batches(config, records, num_ranks)
    return records


def check_batches(config: RunConfig, records: Records, world_size: int) -> None:
    """Refuse records too small to train on with any batch of the run, as `check_batch` does."""
    for batch in planned_batches(config):
        check_batch(replace(config, global_batch=batch), records, world_size)


def check_batch(config: RunConfig, records: Records, world_size: int) -> None:
    """Refuse records too small to train on with this batch; needs no process group.

    Raises:
        UserError: the network's file is not the run's, the images are smaller than the network's
            least, or the global batch cannot be divided by the ranks or into the shards, or is
            larger than the train split.
    """
    check_image_size(network_class(config.model), *records.height_width)
    batch, num_samples = config.global_batch, len(records.split("train"))
    if batch % world_size:
        raise UserError(
            f"a global batch of {batch} cannot be divided by {world_size} ranks; "
            "give --batch-size (samples a rank)"
        )
    rank_batch, num_parts = batch // world_size, config.step.accumulate
    if rank_batch % num_parts:
        raise UserError(
            f"a rank's batch of {rank_batch} cannot be divided into {num_parts} parts; "
            "give an --accumulate that divides it"
        )
    check_shards(config.step.canonical, batch, world_size)
    if batch > num_samples:
        raise UserError(
            f"a global batch of {batch} is larger than the train split of {num_samples} samples; "
            f"give a --batch-size of at most {num_samples // world_size}"
        )


def open_session(
    config: RunConfig, records: Records, world: World, shared: SharedFeeds | None = None
) -> Session:
    """Build model, step and feed, and warm up (and capture) before a feed starts threads.

    The caller runs inside world.on_stream() and closes the session.

    Args:
        shared: makes the feed that batches are handed over by, perhaps one for several sessions.
    Raises:
        UserError: the batch cannot be divided or is larger than the split.
    """
    check_batch(config, records, world.size)
    meters.reset_torch_peak(world.device)
    effective, notes = effective_config(config, records, world)
    train = records.split("train")
    order = make_order(config, train, world.rank, world.size)
    start = time.perf_counter()
    with ExitStack() as stack:
        stack.enter_context(backends_kept())
        if effective.step.canonical:
            stack.enter_context(fixed_arithmetic(world.device))
        step, source = _make_step(effective, records, order, world)
        stack.callback(step.close)
        bn_note = step.statistics.note(step.part_samples, order.global_batch)
        notes += [note for note in (step.layers_note, bn_note) if note]
        step.prepare()
        kept, under_ddp = (step.state.rank_bytes(is_whole=is_whole) for is_whole in (False, True))
        if effective.step.parallel == "fsdp":
            notes.append(_saving(step, kept, under_ddp))
        world.ledger.mark("graph pool" if effective.step.cuda_graphs else "model and optimiser")
        warmup_s = time.perf_counter() - start
        if why := step.capture_failure:
            notes.append(f"CUDA graphs are not used: {why}; the same step runs eagerly")
            effective = replace(effective, step=replace(effective.step, cuda_graphs=False))
        make = shared.make if shared else make_feed
        feed = source or make(effective, train, order, len(records.classes), world.device)
        world.ledger.mark("feed")
        cleanup = stack.pop_all()
    return Session(
        world=world,
        records=records,
        requested=config,
        config=effective,
        notes=notes,
        step=step,
        feed=feed,
        environment=world.environment(),
        warmup_s=warmup_s,
        kept=kept,
        kept_under_ddp=under_ddp,
        cleanup=cleanup,
    )


def _saving(step: TrainStep, kept: RankBytes, under_ddp: RankBytes) -> str:
    """What sharding is worth: at most, since a step gathers parameters for a while."""
    num_parameters = sum(p.numel() for p in step.model.parameters())
    saved_mb = (under_ddp.total_bytes - kept.total_bytes) / 1e6
    return f"at {num_parameters / 1e6:.2f} M parameters FSDP saves at most {saved_mb:.1f} MB a rank"


def _make_step(
    config: RunConfig, records: Records, order: Order, world: World
) -> tuple[TrainStep, Source | None]:
    """The step, and the feed that launches gather from, where they do."""
    height_width, num_classes = records.height_width, len(records.classes)
    fused = frozenset(config.kernels)
    model = make_model(config.model, *height_width, num_classes, config.seed, fused)
    if model.wants_images:
        model.prepare(_some_images(records.split("train")))
    model = model.to(world.device)
    copies = config.step.steps_per_launch
    static = random_batch(order.rank_batch, height_width, num_classes, world.device, copies=copies)
    world.ledger.mark("model and optimiser")
    source = None
    if gathers(config):
        train = records.split("train")
        source = cast(Source, make_feed(config, train, order, num_classes, world.device))
    world.ledger.mark("feed")
    return TrainStep(model, config, order, static, world, source), source


def _some_images(split: Split) -> Any:
    """image_NHW: what the network is shown of a split, the same whatever feed reads it.

    Of many images, runs of neighbours at random places: a split on disk is read by few blocks.
    """
    num = len(split)
    if num <= MOST_SEEN:
        return split.image_NHW[np.arange(num)]
    run_R = permute(np.arange(MOST_SEEN // NEIGHBOURS), num // NEIGHBOURS, round_keys("seen"))
    row_RM = np.sort(run_R)[:, None] * NEIGHBOURS + np.arange(NEIGHBOURS)
    return split.image_NHW[row_RM.ravel()]


def evaluate(session: Session, split_name: str) -> tuple[float, float]:
    """Loss and accuracy (0..1) over a whole split and all ranks; each sample counts once."""
    for batch in session.evaluation_feed(split_name).batches(0):
        session.step.evaluate(batch)
    loss, accuracy, seen = session.step.read_evaluation()
    num_samples = len(session.records.split(split_name))
    assert seen == num_samples, f"evaluated {seen} of {num_samples} samples"
    return loss, accuracy


def switches(config: RunConfig) -> dict[str, Any]:
    """What makes a step fast, as reports show it."""
    return {
        "precision": config.step.precision,
        "channels_last": config.step.channels_last,
        "compile": config.step.compile,
        "triton_conv_backward": config.step.triton_conv_backward,
        "split_under_ddp": config.step.split_under_ddp,
        "cudnn_benchmark": config.step.cudnn_benchmark,
        "accumulate": config.step.accumulate,
        "canonical": config.step.canonical,
        "parallel": config.step.parallel,
        "cuda_graphs": config.step.cuda_graphs,
        "steps_per_launch": config.step.steps_per_launch,
        "kernels": ", ".join(config.kernels) or "off",
        "feed": config.data.feed,
        "order": config.data.order,
    }
