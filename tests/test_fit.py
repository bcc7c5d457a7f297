"""Alpha and beta: found again in times that they made; what they say of other ranks and bytes."""

import numpy as np
import pytest

from engine.errors import UserError
from tools.measure.fit import (
    KINDS,
    Kind,
    Link,
    Point,
    fitted_link,
    given_link,
    ring_parts,
    two_numbers,
)

SIZES = (2**12, 2**16, 2**20, 2**24)
RING = given_link(20.0, 8.0, "gloo")
"""8 Gbit/s are 1,000 bytes a microsecond."""


def points(kind: Kind, num_ranks: int, odd: float = 1.0) -> list[Point]:
    """What a ring takes, the second size `odd` times as long."""
    times = [RING.fitted_us(kind, size, num_ranks) for size in SIZES]
    times[1] *= odd
    return [
        Point(kind=kind, num_ranks=num_ranks, num_bytes=size, us=us)
        for size, us in zip(SIZES, times, strict=True)
    ]


def test_a_ring_passes_each_part_once_for_every_other_rank() -> None:
    assert ring_parts("all-reduce", 1000, 2) == (2, 1000)
    assert ring_parts("all-reduce", 1000, 4) == (6, 1500)
    assert ring_parts("all-gather", 1000, 4) == ring_parts("reduce-scatter", 1000, 4) == (3, 750)
    assert RING.us("all-reduce", 1000, 4) == pytest.approx(6 * 20 + 1.5)
    assert RING.us("all-reduce", 1000, 1) == 0


@pytest.mark.parametrize("odd", [1.0, 0.05, 7.0])
def test_the_two_numbers_are_found_again_though_one_point_is_odd(odd: float) -> None:
    found = fitted_link(points("all-reduce", 2, odd) + points("all-reduce", 4), "a test", "gloo")
    assert (found.alpha_us, found.beta_gbps) == (pytest.approx(20), pytest.approx(8))
    missed = found.missed()
    assert missed[1] == pytest.approx(1 / odd - 1) and max(map(abs, missed[2:])) < 1e-9


def test_neither_number_is_below_zero() -> None:
    """A link whose first bytes are free: the line through large sizes starts below zero."""
    bytes_N = np.array([2.0**16, 2.0**20, 2.0**24])
    alpha, beta = two_numbers(np.ones(3), bytes_N, bytes_N * 0.08 - 5000)
    assert alpha == 0 and beta == pytest.approx(0.08, rel=0.06)
    flat = [Point(kind="all-reduce", num_ranks=2, num_bytes=n, us=50.0) for n in SIZES]
    with pytest.raises(UserError, match="more bytes took no more time"):
        fitted_link(flat, "a test", "gloo")


def test_what_was_measured_goes_before_the_two_numbers() -> None:
    """Only of as many ranks and the same kind, and up to the most bytes."""
    slow = [
        Point(kind=p.kind, num_ranks=2, num_bytes=p.num_bytes, us=3 * p.us)
        for p in points("all-gather", 2)
    ]
    link = fitted_link(points("all-reduce", 2) + slow, "a test", "gloo")
    for size in (*SIZES, 3 * SIZES[-1]):
        assert link.us("all-reduce", size, 2) == pytest.approx(RING.us("all-reduce", size, 2))
        assert link.us("all-gather", size, 2) == pytest.approx(3 * RING.us("all-gather", size, 2))
        assert link.us("all-gather", size, 8) == pytest.approx(RING.us("all-gather", size, 8))
        assert link.us("reduce-scatter", size, 2) == pytest.approx(RING.us("all-gather", size, 2))
    between = link.us("all-reduce", 2**18, 2)
    assert link.us("all-reduce", 2**16, 2) < between < link.us("all-reduce", 2**20, 2)
    assert link.us("all-reduce", 1, 2) == pytest.approx(slow[0].us * 2 / 3), "that of the least"


def test_many_ranks_of_nccl_take_a_tree_where_it_is_sooner() -> None:
    trees = given_link(20.0, 8.0, "nccl")
    assert trees.us("all-reduce", 10_000, 1024) == pytest.approx(20 * 20 + 20)
    assert RING.us("all-reduce", 10_000, 1024) == pytest.approx(2046 * 20 + 20, rel=1e-3)
    assert trees.us("all-reduce", 10**9, 4) == RING.us("all-reduce", 10**9, 4), "a ring sends less"
    assert trees.us("all-gather", 10_000, 1024) == RING.us("all-gather", 10_000, 1024)


def test_a_link_is_sensible_or_refused() -> None:
    for alpha_us, beta_gbps in ((-1.0, 1.0), (1.0, 0.0)):
        with pytest.raises(ValueError, match="below"):
            Link(source="", backend="gloo", alpha_us=alpha_us, beta_gbps=beta_gbps)
    for change in ({"num_ranks": 1}, {"num_bytes": 0}, {"us": 0.0}):
        with pytest.raises(ValueError, match="at least"):
            Point(**({"kind": KINDS[0], "num_ranks": 2, "num_bytes": 1, "us": 1.0} | change))
