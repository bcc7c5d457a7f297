"""The roads batches take from records to the step. To add one: a module with a Feed, and a line in `make_feed`."""

import torch

from engine.config import DataConfig
from engine.feeds.batch import Feed
from engine.order import Order
from engine.records import Split

DEVICE_SHARE = 0.5
"""Part of the GPU's free memory that resident pixels may take under --feed auto."""


def choose_feed(split: Split, device: torch.device) -> str:
    """What --feed auto means: resident where the pixels fit, else DALI."""
    if device.type == "cpu" or split.image_NHW.nbytes < DEVICE_SHARE * torch.cuda.mem_get_info(device)[0]:
        return "resident"
    return "dali"


def make_feed(config: DataConfig, split: Split, order: Order, num_classes: int, device: torch.device) -> Feed:
    """The feed that `config.feed` names.

    Raises:
        UserError: what the feed needs is not installed.
    """
    name = choose_feed(split, device) if config.feed == "auto" else config.feed
    if name == "dali":
        from engine.feeds.dali import DaliFeed

        return DaliFeed(split, order, device)
    if name == "loader":
        from engine.feeds.loader import LoaderFeed

        return LoaderFeed(split, order, device, config.loader_workers)
    if name == "synthetic":
        from engine.feeds.synthetic import SyntheticFeed, random_batch

        return SyntheticFeed(random_batch(order.rank_batch, split.height_width, num_classes, device), order)
    from engine.feeds.resident import ResidentFeed

    return ResidentFeed(split, order, device)
