"""One contract for every feed: the very same batches, at the same addresses, from any step of any epoch."""

from collections.abc import Iterator
from itertools import islice
from typing import Any

import numpy as np
import pytest
import torch

from engine.config import DataConfig
from engine.errors import UserError
from engine.feeds import choose_feed, make_feed
from engine.feeds.batch import Batch, Feed
from engine.feeds.dali import DaliFeed
from engine.order import PADDING_ID, Order
from engine.records import Records

CPU = torch.device("cpu")
FEEDS = ["resident", "dali", "loader"]


def build(name: Any, records: Records, split: str = "train", **order: Any) -> Feed:
    data = records.split(split)
    settings = {"num_samples": len(data), "global_batch": 32, "seed": 3} | order
    config = DataConfig(feed=name, loader_workers=1)
    return make_feed(config, data, Order(**settings), len(records.classes), CPU)


def copies(batches: Iterator[Batch]) -> list[tuple[np.ndarray, np.ndarray, np.ndarray]]:
    return [(b.image_BHW.numpy().copy(), b.label_B.numpy().copy(), b.id_B.numpy().copy()) for b in batches]


@pytest.fixture(params=FEEDS)
def feed(request: pytest.FixtureRequest, small: Records) -> Iterator[Feed]:
    feed = build(request.param, small)
    yield feed
    feed.close()


def test_batches_are_the_orders_and_the_records(feed: Feed, small: Records) -> None:
    train = small.split("train")
    for epoch in (0, 1):
        batches = copies(feed.batches(epoch))
        assert len(batches) == feed.order.steps_per_epoch == len(train) // 32
        ids = np.stack([id_B for _, _, id_B in batches])
        assert np.array_equal(ids, feed.order.ids(epoch, 0, len(batches)))
        for image_BHW, label_B, id_B in batches:
            assert np.array_equal(image_BHW, train.image_NHW[id_B])
            assert np.array_equal(label_B, train.label_N[id_B])


def test_an_epoch_can_be_left_and_entered_anywhere(feed: Feed) -> None:
    whole = copies(feed.batches(1))
    assert len(copies(islice(feed.batches(0), 2))) == 2
    rest = copies(feed.batches(1, first_step=3))
    assert len(rest) == len(whole) - 3
    for got, wanted in zip(rest, whole[3:], strict=True):
        assert all(np.array_equal(a, b) for a, b in zip(got, wanted, strict=True))


def test_the_addresses_stay_the_same(feed: Feed) -> None:
    assert len({b.image_BHW.data_ptr() for b in feed.batches(0)}) == 1
    assert len({b.id_B.data_ptr() for b in feed.batches(0)}) == 1


@pytest.mark.parametrize("name", FEEDS)
@pytest.mark.parametrize("world_size", [2, 4])
def test_ranks_together_see_what_one_rank_sees(name: str, world_size: int, small: Records) -> None:
    alone = build("resident", small)
    ranks = [build(name, small, rank=r, world_size=world_size) for r in range(world_size)]
    parts = [copies(feed.batches(1)) for feed in ranks]
    for step, wanted in enumerate(copies(alone.batches(1))):
        for field in range(3):
            assert np.array_equal(np.concatenate([part[step][field] for part in parts]), wanted[field])
    for feed in ranks:
        feed.close()


@pytest.mark.parametrize("name", FEEDS)
def test_evaluation_pads_only_the_last_batch(name: str, small: Records) -> None:
    feed = build(name, small, "val", shuffle=False)
    ids = np.concatenate([id_B for _, _, id_B in copies(feed.batches(0))])
    num = len(small.split("val"))
    assert ids[:num].tolist() == list(range(num))
    assert (ids[num:] == PADDING_ID).all() and len(ids) % 32 == 0
    feed.close()


def test_a_failing_source_reaches_the_consumer_of_dali(small: Records) -> None:
    feed = build("dali", small)
    assert isinstance(feed, DaliFeed)

    def fails(id_B: torch.Tensor, out: Batch) -> None:
        raise RuntimeError("disk on fire")

    feed._gather = fails  # type: ignore[assignment]
    with pytest.raises(RuntimeError, match="disk on fire"):
        next(feed.batches(0))


def test_auto_is_resident_on_a_cpu(small: Records) -> None:
    assert choose_feed(small.split("train"), CPU) == "resident"


def test_synthetic_has_the_epochs_length(small: Records) -> None:
    batches = list(build("synthetic", small).batches(0, first_step=1))
    assert len(batches) == len(small.split("train")) // 32 - 1
    assert int(batches[0].label_B.max()) < len(small.classes)


def test_dali_missing_is_told(small: Records, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(__import__("sys").modules, "nvidia.dali", None)
    with pytest.raises(UserError, match="use --feed resident"):
        build("dali", small)
