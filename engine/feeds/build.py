"""The feed of a run and its order, chosen, opened and made.

A new feed: a Feed, and a line in `make_feed`.
"""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch

from engine.config import DataConfig, RunConfig
from engine.data.records import Records, Split, StoredImages, open_records
from engine.data.remote import local
from engine.errors import UserError
from engine.feeds.augment import AugmentedFeed, make_ready
from engine.feeds.batch import Feed
from engine.feeds.resident import ResidentFeed
from engine.feeds.synthetic import SyntheticFeed, random_batch
from engine.host import free_memory_bytes
from engine.order import Order, Strata

SOURCES = ("resident", "synthetic")
"""Those that are a Source: the step can gather their batches itself, inside a launch."""
MEMORY_SHARE = 0.5
"""Part of the free memory, the GPU's or the host's, that pixels may take under --feed auto."""


def open_for(
    config: DataConfig, path: str | Path, sign: Callable[[], None] = lambda: None
) -> Records:
    """The records of a run: in memory, or on disk for the stream feed.

    Args:
        sign: called about once a second while a URL's records are fetched.
    Raises:
        UserError: they cannot be opened.
    """
    path = local(path, config.cache_gib, sign)
    if config.feed == "auto":
        num_bytes = sum(file.stat().st_size for file in path.glob("*.arrow"))
        return open_records(path, in_memory=num_bytes < MEMORY_SHARE * free_memory_bytes())
    return open_records(path, in_memory=config.feed != "stream")


def choose_feed(config: DataConfig, split: Split, device: torch.device) -> tuple[str, str]:
    """(the feed that --feed auto means, why); it never changes the order.

    Raises:
        UserError: the images do not fit into memory, and the order is exact.
    """
    gib = len(split) * float(np.prod(split.height_width)) / 2**30
    if isinstance(split.image_NHW, StoredImages):
        if config.order != "blocked":
            share = f"{MEMORY_SHARE:.0%} of the host's free memory"
            raise UserError(
                f"the images, {gib:.2f} GiB, are read from the disk (they take more than {share}, "
                f"or were opened so); set data.order=blocked to stream them"
            )
        return "stream", f"the images take {gib:.2f} GiB and stay on disk"
    if device.type == "cpu":
        return "resident", f"the images take {gib:.2f} GiB of host memory"
    free_gib = torch.cuda.mem_get_info(device)[0] / 2**30
    if gib < MEMORY_SHARE * free_gib:
        return "resident", f"the images take {gib:.2f} of {free_gib:.1f} GiB free on the GPU"
    return "dali", f"the images take {gib:.2f} GiB, too much for {free_gib:.1f} GiB free on the GPU"


def make_order(
    config: RunConfig, split: Split, rank: int, world_size: int, shuffle: bool = True
) -> Order:
    """The order of a split's samples; sequential for evaluation."""
    in_blocks = config.data.order == "blocked"
    in_strata = config.data.order == "stratified" and shuffle
    return Order(
        num_samples=len(split),
        global_batch=config.global_batch,
        rank=rank,
        world_size=world_size,
        seed=config.seed,
        shuffle=shuffle,
        block_samples=config.data.block_samples if in_blocks else 0,
        window_blocks=config.data.window_blocks if in_blocks else 0,
        strata=Strata(split.label_N) if in_strata else None,
    )


def gathers(config: RunConfig) -> bool:
    """Whether launches gather their batches themselves; distorted images are handed over."""
    in_launches = config.step.cuda_graphs or config.step.steps_per_launch > 1
    return in_launches and config.data.feed in SOURCES and not config.augment.is_on


def make_feed(
    config: RunConfig, split: Split, order: Order, num_classes: int, device: torch.device
) -> Feed:
    """The feed that `config` names, with its distortion and its kernels.

    Raises:
        UserError: what the feed needs is not installed, or (auto) none is possible.
    """
    name: str = config.data.feed
    if name == "auto":
        name, _ = choose_feed(config.data, split, device)
    augment = config.augment if config.augment.is_on else None
    if name == "dali":
        from engine.feeds.dali import DaliFeed

        return DaliFeed(split, order, device, augment, config.step.steps_per_launch)
    if augment:
        make_ready(device, split.height_width)
    if name == "resident":
        return ResidentFeed(split, order, device, frozenset(config.kernels), augment)
    if name in ("loader", "loader_batched"):
        from engine.feeds.loader import LoaderFeed

        workers = config.data.loader_workers
        feed: Feed = LoaderFeed(split, order, device, workers, batched=name == "loader_batched")
    elif name == "stream":
        from engine.feeds.stream import StreamFeed

        feed = StreamFeed(split, order, device)
    else:
        assert name == "synthetic", name
        batch = random_batch(order.rank_batch, split.height_width, num_classes, device)
        feed = SyntheticFeed(batch, order)
    return AugmentedFeed(feed, augment) if augment else feed
