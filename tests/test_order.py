"""order.py, by properties: its formula is never typed again here."""

import numpy as np
import pytest
import torch

from engine.order import PADDING_ID, Order, permute, round_keys


@pytest.mark.parametrize("n", [1, 2, 3, 7, 97, 1000, 12_032, 65_537])
def test_is_a_bijection_and_the_same_on_torch(n: int) -> None:
    keys = round_keys(1, 2)
    sample = permute(np.arange(n), n, keys)
    assert np.array_equal(np.sort(sample), np.arange(n))
    assert np.array_equal(permute(torch.arange(n), n, keys).numpy(), sample)


def test_does_not_change_the_positions_given_to_it() -> None:
    position = np.arange(1000)
    permute(position, 1000, round_keys(0))
    assert np.array_equal(position, np.arange(1000))


def test_any_position_of_a_huge_set_is_found_alone() -> None:
    n = 10**12
    some = np.array([0, 123_456_789_012, n - 1])
    together = permute(some, n, round_keys(5, 6))
    assert ((together >= 0) & (together < n)).all()
    assert [
        int(permute(some[i : i + 1], n, round_keys(5, 6))[0]) for i in range(3)
    ] == together.tolist()


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


@pytest.mark.parametrize("world_size", [1, 2, 4])
def test_ranks_share_each_step_without_overlap_and_in_the_same_global_order(
    world_size: int,
) -> None:
    common = {"num_samples": 1003, "global_batch": 64, "seed": 9}
    alone = Order(**common).ids(2, 0, 15)
    ranks = [Order(**common, rank=r, world_size=world_size) for r in range(world_size)]
    assert {order.steps_per_epoch for order in ranks} == {15}
    together = np.concatenate([order.ids(2, 0, 15) for order in ranks], axis=1)
    assert np.array_equal(together, alone)
    assert len(np.unique(together)) == 15 * 64


def test_resuming_in_the_middle_gives_the_rest_of_the_epoch() -> None:
    order = Order(num_samples=1003, global_batch=64, rank=1, world_size=2, seed=9)
    assert np.array_equal(order.ids(4, 0, 15)[6:], order.ids(4, 6, 9))


def test_another_tail_is_left_out_in_another_epoch() -> None:
    order = Order(num_samples=1003, global_batch=64, seed=9)
    left_out = [
        set(range(1003)) - set(order.ids(epoch, 0, 15).ravel().tolist()) for epoch in (0, 1)
    ]
    assert [len(samples) for samples in left_out] == [43, 43]
    assert left_out[0] != left_out[1]


@pytest.mark.parametrize(("num_samples", "world_size"), [(1003, 4), (64, 2), (3, 4)])
def test_evaluation_leaves_out_none_and_counts_none_twice(
    num_samples: int, world_size: int
) -> None:
    ids = [
        Order(
            num_samples=num_samples, global_batch=64, rank=r, world_size=world_size, shuffle=False
        )
        for r in range(world_size)
    ]
    seen = np.concatenate([order.ids(0, 0, order.steps_per_epoch).ravel() for order in ids])
    assert np.array_equal(np.sort(seen[seen != PADDING_ID]), np.arange(num_samples))


def test_a_batch_that_cannot_be_divided_is_refused() -> None:
    with pytest.raises(ValueError, match="cannot be divided"):
        Order(num_samples=10, global_batch=5, world_size=2)


GOLDEN_1000 = [620, 307, 924, 30, 500]
GOLDEN_STEP = [[138065, 182037, 261936, 163326]]


BLOCKED = {
    "num_samples": 1003,
    "global_batch": 64,
    "seed": 9,
    "block_samples": 40,
    "window_blocks": 4,
}


@pytest.mark.parametrize("world_size", [1, 2, 4])
@pytest.mark.parametrize(
    "change", [{}, {"num_samples": 1000}, {"block_samples": 1}, {"block_samples": 2000}]
)
def test_the_blocked_order_keeps_the_promises_of_the_exact_one(
    world_size: int, change: dict[str, int]
) -> None:
    settings = BLOCKED | change
    alone = Order(**settings)
    whole = alone.ids(2, 0, 15)
    assert (
        whole.min() >= 0
        and whole.max() < settings["num_samples"]
        and len(np.unique(whole)) == 15 * 64
    )
    ranks = [
        Order(**settings, rank=r, world_size=world_size).ids(2, 0, 15) for r in range(world_size)
    ]
    assert np.array_equal(np.concatenate(ranks, axis=1), whole)
    assert np.array_equal(alone.ids(2, 6, 9), whole[6:])
    left_out = [
        set(range(settings["num_samples"])) - set(alone.ids(e, 0, 15).ravel().tolist())
        for e in (0, 1)
    ]
    assert (
        all(len(samples) == settings["num_samples"] - 960 for samples in left_out)
        and left_out[0] != left_out[1]
    )


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
    """Counts of one class in a batch spread as in drawing without replacement, in the exact and the blocked order."""
    label = np.random.default_rng(0).integers(0, 10, 50_000)
    share = (label == 3).mean()
    wanted = 500 * share * (1 - share) * (1 - 500 / 50_000)
    for blocks in ({}, {"block_samples": 250, "window_blocks": 20}):
        order = Order(num_samples=50_000, global_batch=500, seed=5, **blocks)
        counts = np.concatenate([(label[order.ids(e, 0, 100)] == 3).sum(1) for e in range(10)])
        assert abs(counts.mean() - 500 * share) < 4 * (wanted / 1000) ** 0.5
        assert abs(counts.var() / wanted - 1) < 4 * (2 / 1000) ** 0.5
