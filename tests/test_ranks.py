"""What one rank cannot do, all ranks say.

Here by a real store in threads, in tests/reliability/ranks.py by torchrun.
"""

import threading
from collections.abc import Callable
from typing import Any

import pytest
from torch import distributed

from engine import ranks as ranks_module
from engine.errors import UserError
from engine.heart import TRAINING, Heart
from engine.ranks import OtherRankFailed, Ranks, join_ranks


def on_all(num: int, work: Callable[[Ranks], Any]) -> list[Any]:
    """What `work` returns or raises on each rank."""
    store = distributed.HashStore()
    found: list[Any] = [None] * num

    def run(rank: int) -> None:
        try:
            found[rank] = work(Ranks(rank, num, rank, store))
        except Exception as error:  # returned to the test
            found[rank] = error

    threads = [threading.Thread(target=run, args=(rank,)) for rank in range(num)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(20)
    return found


def fail_on(*failing: int) -> Callable[[Ranks], int]:
    def work(ranks: Ranks) -> int:
        def own() -> int:
            if ranks.rank in failing:
                raise UserError(f"disk {ranks.rank} is full")
            return ranks.rank * 10

        return ranks.agree(lambda: 1) + ranks.agree(own)

    return work


def test_ranks_agree_or_all_say_what_the_lowest_lacks() -> None:
    assert on_all(3, fail_on()) == [1, 11, 21]
    errors = on_all(3, fail_on(2, 1))
    assert [str(error) for error in errors] == ["rank 1: disk 1 is full"] * 3
    assert [error.speaks for error in errors] == [True, False, False]
    assert all(error.is_shared for error in errors)


def test_what_fails_alike_everywhere_names_no_rank() -> None:
    def work(ranks: Ranks) -> None:
        def own() -> None:
            raise UserError("no such flag")

        ranks.agree(own)

    assert {str(error) for error in on_all(2, work)} == {"no such flag"}


def test_ranks_with_other_data_are_refused() -> None:
    def work(ranks: Ranks) -> str:
        ranks.agree_on("seed", "7")
        ranks.agree_on("fingerprint", "ab" if ranks.rank else "cd")
        return "went on"

    wanted = "rank 1: its fingerprint is ab, that of rank 0 is cd; give all ranks the same"
    assert [str(error) for error in on_all(2, work)] == [wanted] * 2


def test_the_first_ranks_text_reaches_all_and_its_error_too() -> None:
    assert on_all(3, lambda ranks: ranks.from_first(lambda: f"runs/{ranks.rank}")) == ["runs/0"] * 3

    def fails(ranks: Ranks) -> str:
        def own() -> str:
            raise UserError(f"{ranks.rank} cannot be written")

        return ranks.from_first(own)

    assert [str(e) for e in on_all(2, fails)] == ["rank 0: 0 cannot be written"] * 2


def test_a_broken_collective_is_explained_by_the_rank_that_failed(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def work(ranks: Ranks) -> None:
        with ranks.explaining():
            if ranks.rank == 1:
                raise UserError("block 7 is damaged")
            raise RuntimeError("connection closed") if ranks.rank else OtherRankFailed("gone")

    errors = on_all(3, work)
    assert [str(error) for error in errors] == ["rank 1: block 7 is damaged"] * 3
    assert [error.speaks for error in errors] == [False, True, False]  # one line a machine

    def crash(ranks: Ranks) -> None:
        with ranks.explaining():
            raise ZeroDivisionError("a fault of ours keeps its traceback")

    monkeypatch.setattr(ranks_module, "REASON_S", 0.1)
    assert all(isinstance(error, ZeroDivisionError) for error in on_all(2, crash))


def test_a_meeting_place_that_cannot_be_reached_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("RANK", "1")
    for name in ("MASTER_ADDR", "MASTER_PORT"):
        monkeypatch.delenv(name, raising=False)
    with pytest.raises(
        UserError, match="rank 1: cannot meet the others at .*check torchrun's address"
    ):
        join_ranks()


def test_no_heart_beats_on_when_the_watching_ends() -> None:
    """A thread that asks the store while the interpreter ends would abort the process."""
    heart = Heart(step=0, doing=TRAINING)

    def watch(ranks: Ranks) -> None:
        with ranks.watching(heart, 60.0):
            assert "heart" in {thread.name for thread in threading.enumerate()}

    assert on_all(2, watch) == [None, None]
    assert "heart" not in {thread.name for thread in threading.enumerate()}
