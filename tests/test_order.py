"""order.py, by properties: its formula is never typed again here."""

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from engine.order import PADDING_ID, Order, Strata, permute, round_keys

EPOCHS = st.integers(0, 10**6)
SEEDS = st.integers(0, 2**63 - 1)
KEYS = st.builds(round_keys, SEEDS, EPOCHS)


@given(n=st.integers(1, 3000), keys=KEYS)
def test_is_a_bijection_and_the_same_on_torch(n: int, keys: tuple[int, ...]) -> None:
    position = np.arange(n)
    sample = permute(position, n, keys)
    assert np.array_equal(np.sort(sample), np.arange(n))
    assert np.array_equal(position, np.arange(n)), "the positions given to it were changed"
    assert np.array_equal(permute(torch.arange(n), n, keys).numpy(), sample)


@given(n=st.integers(1, 2**40), keys=KEYS, data=st.data())
def test_any_position_of_a_huge_set_is_found_alone(
    n: int, keys: tuple[int, ...], data: st.DataObject
) -> None:
    some = np.array(data.draw(st.lists(st.integers(0, n - 1), min_size=1, unique=True)))
    together = permute(some, n, keys)
    assert ((together >= 0) & (together < n)).all()
    assert len(np.unique(together)) == len(some)
    alone = [permute(one, n, keys) for one in some.reshape(-1, 1)]
    assert np.array_equal(np.concatenate(alone), together)


def test_the_order_of_a_published_version_never_changes() -> None:
    """Checkpoints and splits depend on it: these values are version 0.1's."""
    assert permute(np.arange(5), 1000, round_keys(42, 0)).tolist() == GOLDEN_1000
    assert (
        Order(num_samples=274_093, global_batch=4, seed=7).ids(3, 1000, 1).tolist() == GOLDEN_STEP
    )


def test_epochs_and_seeds_differ_and_look_random() -> None:
    n = 20_000
    orders = [
        permute(np.arange(n), n, round_keys(seed, epoch))
        for seed, epoch in ((0, 0), (0, 1), (1, 0))
    ]
    position = np.arange(n)
    for sample in orders:
        assert abs(np.corrcoef(position, sample)[0, 1]) < 5 / np.sqrt(n)
        distance = np.abs(np.diff(sample)).mean()
        assert abs(distance - n / 3) < 5 * n / np.sqrt(18 * n)  # mean and spread of |U - V|
    for first, second in ((0, 1), (0, 2), (1, 2)):
        assert (orders[first] == orders[second]).sum() < 12  # Poisson(1)


def drawn_classes(num_samples: int, num_classes: int) -> np.ndarray:
    """Of uneven sizes; some may have no sample."""
    drawn = np.random.default_rng(num_samples).random(num_samples) ** 2
    return np.floor(num_classes * drawn).astype(np.uint8)


@st.composite
def ranks(draw: st.DrawFn, shuffle: bool) -> list[Order]:
    """The orders of all ranks of a run, of every kind, for sets down to a single sample."""
    num_ranks = draw(st.integers(1, 4))
    common: dict[str, Any] = {
        "num_samples": draw(st.integers(1, 2000)),
        "global_batch": num_ranks * draw(st.integers(1, 100)),
        "seed": draw(SEEDS),
        "shuffle": shuffle,
    }
    kind = draw(st.sampled_from(["exact", "blocked", "stratified"] if shuffle else ["exact"]))
    if kind == "blocked" or (draw(st.booleans()) and not shuffle):
        common["block_samples"] = draw(st.integers(1, 3000))
        common["window_blocks"] = draw(st.integers(1, 20))
    if kind == "stratified":
        common["strata"] = Strata(drawn_classes(common["num_samples"], draw(st.integers(1, 99))))
    return [Order(**common, rank=rank, world_size=num_ranks) for rank in range(num_ranks)]


def global_order(orders: list[Order], epoch: int) -> np.ndarray:
    """The ids of an epoch, a row per step, over all ranks."""
    return np.concatenate([order.ids(epoch, 0, order.steps_per_epoch) for order in orders], axis=1)


@settings(deadline=None)
@given(orders=ranks(shuffle=True), epoch=EPOCHS)
def test_an_epoch_takes_no_sample_twice_and_leaves_out_less_than_a_batch(
    orders: list[Order], epoch: int
) -> None:
    ids = global_order(orders, epoch)
    num_samples, global_batch = orders[0].num_samples, orders[0].global_batch
    assert len(np.unique(ids)) == ids.size and 0 <= num_samples - ids.size < global_batch
    assert ((ids >= 0) & (ids < num_samples)).all()


@settings(deadline=None)
@given(orders=ranks(shuffle=False), epoch=EPOCHS)
def test_evaluation_leaves_out_none_and_counts_none_twice(orders: list[Order], epoch: int) -> None:
    ids = global_order(orders, epoch)
    assert np.array_equal(ids[ids != PADDING_ID], np.arange(orders[0].num_samples))


@settings(deadline=None)
@given(orders=st.one_of(ranks(shuffle=True), ranks(shuffle=False)), epoch=EPOCHS, data=st.data())
def test_the_global_order_is_the_same_on_any_number_of_ranks_and_from_any_step(
    orders: list[Order], epoch: int, data: st.DataObject
) -> None:
    ids = global_order(orders, epoch)
    facts = {name: getattr(orders[0], name) for name in Order.__dataclass_fields__}
    alone = Order(**(facts | {"rank": 0, "world_size": 1}))
    first = data.draw(st.integers(0, alone.steps_per_epoch))
    assert np.array_equal(alone.ids(epoch, first, alone.steps_per_epoch - first), ids[first:])


@settings(deadline=None)
@given(
    orders=st.one_of(ranks(shuffle=True), ranks(shuffle=False)),
    batch=st.integers(1, 300),
    epoch=EPOCHS,
    data=st.data(),
)
def test_an_epoch_goes_on_from_any_position_with_any_batch(
    orders: list[Order], batch: int, epoch: int, data: st.DataObject
) -> None:
    """It sees what the epoch has from there on, whatever the batches before it were."""
    one_by_one = replace(orders[0], rank=0, world_size=1, global_batch=1)
    whole = one_by_one.ids(epoch, 0, one_by_one.steps_per_epoch).ravel()
    start = data.draw(st.integers(0, len(whole)))
    rest = replace(one_by_one, global_batch=batch, start=start)
    ids = rest.ids(epoch, 0, rest.steps_per_epoch).ravel()
    ids = ids[ids != PADDING_ID]
    assert np.array_equal(ids, whole[start : start + len(ids)])
    assert 0 <= len(whole) - start - len(ids) < (batch if rest.shuffle else 1)


@settings(deadline=None)
@given(num=st.integers(1, 5000), classes=st.integers(1, 99), batch=st.integers(1, 600), seed=SEEDS)
def test_a_stratified_batch_holds_every_class_by_its_share(
    num: int, classes: int, batch: int, seed: int
) -> None:
    label_N = drawn_classes(num, classes)
    batch = min(batch, num)
    order = Order(num_samples=num, global_batch=batch, seed=seed, strata=Strata(label_N))
    share_K = np.bincount(label_N, minlength=classes) / num
    for id_B in order.ids(3, 0, order.steps_per_epoch):
        count_K = np.bincount(label_N[id_B], minlength=classes)
        assert (np.abs(count_K - share_K * batch) <= 2 + 2 * classes * share_K).all()


def test_a_stratified_order_mixes_the_classes() -> None:
    """Each comes at a random place of its part: not one class after the other, again and again."""
    label_N = np.arange(9400) % 94
    order = Order(num_samples=9400, global_batch=94, strata=Strata(label_N))
    rounds = label_N[order.ids(0, 0, 100)]
    assert len(np.unique(rounds, axis=0)) == 100


def test_a_stratified_order_mixes_within_the_classes() -> None:
    """Which samples meet in a batch is random: of a class, any may come at any place."""
    label_N = np.arange(9400) % 94
    orders = [
        Order(num_samples=9400, global_batch=94, seed=s, strata=Strata(label_N)) for s in (0, 1)
    ]
    first, second, other = (
        order.ids(epoch, 0, 100).ravel()
        for order, epoch in zip((*orders, orders[0]), (0, 0, 1), strict=False)
    )
    place = np.argsort(first)
    for ids in (second, other):
        assert abs(np.corrcoef(place, np.argsort(ids))[0, 1]) < 0.05
    assert abs(np.corrcoef(place, np.arange(9400))[0, 1]) < 0.05


BLOCKS: dict[str, Any] = {"block_samples": 40, "window_blocks": 4}


@pytest.mark.parametrize("blocks", [{}, BLOCKS, {"strata": Strata(drawn_classes(1003, 9))}])
def test_another_tail_is_left_out_in_another_epoch(blocks: dict[str, Any]) -> None:
    order = Order(num_samples=1003, global_batch=64, seed=9, **blocks)
    first, second = (
        set(range(1003)) - set(order.ids(epoch, 0, 15).ravel().tolist()) for epoch in (0, 1)
    )
    assert len(first) == len(second) == 43 and first != second


def test_a_batch_that_cannot_be_divided_is_refused() -> None:
    with pytest.raises(ValueError, match="cannot be divided"):
        Order(num_samples=10, global_batch=5, world_size=2)


GOLDEN_1000 = [620, 307, 924, 30, 500]
GOLDEN_STEP = [[138065, 182037, 261936, 163326]]


def test_the_blocked_order_stays_in_its_windows_and_mixes_there() -> None:
    order = Order(
        num_samples=100_000, global_batch=500, seed=1, block_samples=500, window_blocks=20
    )
    assert order.reach_fraction == 0.1 and Order(num_samples=10, global_batch=1).reach_fraction == 1
    for epoch in (0, 1):
        sample = order.ids(epoch, 0, 200).reshape(10, 10_000)
        for window in sample:
            assert len(np.unique(window // 500)) == 20
            place = np.argsort(np.argsort(window))
            assert abs(np.corrcoef(np.arange(10_000), place)[0, 1]) < 0.05
        assert abs(np.corrcoef(np.arange(100_000), sample.ravel())[0, 1]) < 0.3
    windows = [set(np.unique(order.ids(epoch, 0, 20) // 500).tolist()) for epoch in (0, 1)]
    assert windows[0] != windows[1]


def test_the_classes_of_a_batch_are_balanced_as_in_an_exact_random_shuffle() -> None:
    """Counts of one class spread as in drawing without replacement, in either order."""
    label = np.random.default_rng(0).integers(0, 10, 50_000)
    share = (label == 3).mean()
    wanted = 500 * share * (1 - share) * (1 - 500 / 50_000)
    for blocks in ({}, {"block_samples": 250, "window_blocks": 20}):
        order = Order(num_samples=50_000, global_batch=500, seed=5, **blocks)
        counts = np.concatenate([(label[order.ids(e, 0, 100)] == 3).sum(1) for e in range(10)])
        assert abs(counts.mean() - 500 * share) < 4 * (wanted / 1000) ** 0.5
        assert abs(counts.var() / wanted - 1) < 4 * (2 / 1000) ** 0.5
