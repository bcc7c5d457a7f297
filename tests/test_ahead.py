"""The thread behind the feeds: in order, within its buffers, and no fault of it goes unheard."""

import os
import subprocess
import sys
import threading
import time
from collections.abc import Iterator

import pytest

from engine.errors import UserError
from engine.feeds import ahead
from engine.feeds.ahead import Ahead
from engine.host import ROOT


def counted(made: list[int], stop: int = 10**9) -> Iterator[int]:
    for number in range(stop):
        made.append(number)
        yield number


def settled(made: list[int]) -> int:
    """How many items the thread has made when it makes no more."""
    before = -1
    while len(made) != before:
        before = len(made)
        time.sleep(0.05)
    return before


@pytest.mark.parametrize(("slots", "held"), [(2, 1), (5, 1), (7, 4)])
def test_an_item_is_made_only_when_its_buffer_is_free(slots: int, held: int) -> None:
    made: list[int] = []
    work = Ahead(counted(made), slots, held)
    assert settled(made) == slots
    for number, item in zip(range(30), work, strict=False):
        assert item == number
        given_back = max(0, number + 1 - held)
        assert (
            settled(made) == slots + given_back
            if number < 4
            else len(made) <= slots + given_back + 1
        )
    work.close()
    assert not work._thread.is_alive()


def test_everything_comes_in_order_and_ends() -> None:
    assert list(Ahead(iter(range(1000)), 3)) == list(range(1000))
    assert list(Ahead(iter(()), 2)) == []


@pytest.mark.parametrize(
    "error", [OSError(5, "disk on fire"), TimeoutError("disk on fire"), SystemExit("disk on fire")]
)
def test_what_the_thread_raises_is_raised_at_once_after_what_was_made(error: BaseException) -> None:
    def fails() -> Iterator[int]:
        yield 1
        raise error

    got: list[int] = []
    start = time.monotonic()
    with pytest.raises(type(error), match="disk on fire"):
        for item in Ahead(fails(), 4):
            got.append(item)
    assert got == [1] and time.monotonic() - start < 1


@pytest.mark.parametrize("held", [1, 3])
def test_a_thread_that_blocks_is_told(held: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ahead, "DEADLINE_S", 0.3)
    monkeypatch.setattr(ahead, "JOIN_S", 0.1)
    never = threading.Event()

    def blocks() -> Iterator[int]:
        yield 1
        never.wait()

    work = Ahead(blocks(), 4, held)
    with pytest.raises(UserError, match="made no batch for"):
        list(work)
    work.close()
    never.set()


def test_buffers_are_not_used_again_while_the_old_thread_runs(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    never = threading.Event()
    work = Ahead(iter(never.wait, None), 2, deadline_s=0.2)
    for _ in range(2):  # nor by who tries again
        with pytest.raises(RuntimeError, match="its buffers cannot be used again"):
            work.close(to_restart=True)
    never.set()


@pytest.mark.parametrize("feed", ["dali", "stream"])
def test_a_consumer_that_dies_takes_the_thread_with_it(
    feed: str, small_dir: os.PathLike[str]
) -> None:
    code = """
import sys, torch
from engine.config import DataConfig, RunConfig
from engine.feeds.build import make_feed, open_for
from engine.order import Order
config = RunConfig(data=DataConfig(feed=sys.argv[1], order="blocked"))
split = open_for(config.data, sys.argv[2]).split("train")
order = Order(num_samples=len(split), global_batch=8, block_samples=16, window_blocks=2)
for batch in make_feed(config, split, order, 8, torch.device("cpu")).batches(0):
    raise SystemExit(7)
"""
    done = subprocess.run(
        [sys.executable, "-c", code, feed, small_dir], cwd=ROOT, timeout=30, capture_output=True
    )
    assert done.returncode == 7, done.stderr


def test_a_thread_that_blocks_does_not_keep_the_process() -> None:
    code = """
import threading
from engine.feeds.ahead import Ahead
for item in Ahead(iter([1, 2]), 2, deadline_s=0.2):
    Ahead(iter(threading.Event().wait, 0), 2)
"""
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, timeout=30, capture_output=True)
    assert done.returncode == 0, done.stderr
