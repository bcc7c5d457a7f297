"""What one rank cannot do, all ranks say.

Here by a real store in threads, in tests/reliability/ranks.py by torchrun.
"""

import json
import re
import signal
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict
from datetime import timedelta
from typing import Any

import pytest
from torch import distributed

from engine import heart as heart_module
from engine import ranks as ranks_module
from engine.errors import UserError
from engine.heart import LEFT, SAVING, TRAINING, Beat, Heart, Watch, died, read_beats
from engine.meeting import common_try
from engine.ranks import OtherRankFailed, Ranks, join_ranks
from engine.stop import Stopped, StopRequest


@pytest.fixture(autouse=True)
def own_signals(monkeypatch: pytest.MonkeyPatch) -> StopRequest:
    """Ranks are threads here; in a process of its own each would have this for itself."""
    request = StopRequest()
    monkeypatch.setattr(ranks_module, "STOP", request)
    return request


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


def test_who_waits_waits_on_while_another_signs(monkeypatch: pytest.MonkeyPatch) -> None:
    def work(ranks: Ranks) -> float:
        start_s = time.monotonic()
        for _ in range(4 * ranks.rank):
            time.sleep(0.2)
            ranks.sign()
        ranks._meet("place", False, timedelta(seconds=0.5))
        return time.monotonic() - start_s

    waited = on_all(2, work)
    assert all(isinstance(each, float) and each > 0.6 for each in waited), waited
    monkeypatch.setattr(Ranks, "sign", lambda self: None)
    assert isinstance(on_all(2, work)[0], UserError)


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


def test_each_ranks_text_reaches_all() -> None:
    found = on_all(3, lambda ranks: ranks.texts_of_all("version", f"2.{ranks.rank}"))
    assert found == [["2.0", "2.1", "2.2"]] * 3


def test_ranks_that_do_not_come_are_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ranks_module, "JOIN_TIMEOUT", timedelta(seconds=0.5))

    def work(ranks: Ranks) -> None:
        if ranks.rank in (0, 2):
            ranks._meet("start", False, ranks_module.JOIN_TIMEOUT)

    errors = on_all(4, work)
    wanted = "ranks 1 and 3 did not come within 0 s; look at the output of their machines"
    assert [str(error) for error in errors] == [wanted, "None", wanted, "None"]
    monkeypatch.setenv("GROUP_WORLD_SIZE", "2")
    monkeypatch.setenv("MASTER_ADDR", "localhost")
    errors = on_all(4, work)
    assert "told to meet at localhost" in str(errors[0]) and "--local-addr" in str(errors[0])


def test_a_try_has_a_name_that_no_earlier_one_had() -> None:
    """The store outlives a try, and its ranks come one after the other, as they did before."""
    store = distributed.HashStore()
    names = []
    for _ in range(3):
        with ThreadPoolExecutor(3) as pool:
            jobs = []
            for rank in (1, 0, 2):
                jobs.append(pool.submit(common_try, store, rank, 3, timedelta(seconds=20)))
                time.sleep(0.05)
            found = {job.result() for job in jobs}
        assert len(found) == 1
        names += found
    assert len(set(names)) == 3
    late = timedelta(seconds=0.2)
    with ThreadPoolExecutor(2) as pool:  # rank 2 is not started again
        jobs = [pool.submit(common_try, store, rank, 3, late) for rank in (0, 1)]
        errors = [str(job.exception()) for job in jobs]
    assert all(error.startswith("rank 2 did not come within 0 s") for error in errors)
    with pytest.raises(UserError, match="ranks 0 and 2 did not come within 0 s"):
        common_try(distributed.HashStore(), 1, 3, late)


def test_a_rank_that_died_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    """Those that live say so; those that do not neither say so nor beat."""
    monkeypatch.setattr(ranks_module, "REASON_S", 1.0)

    def work(ranks: Ranks) -> None:
        with ranks.explaining(), ranks.watching(Heart(doing=TRAINING), 60.0):
            if ranks.rank != 1:
                raise RuntimeError("[gloo] Connection closed by peer")

    errors = on_all(3, work)
    assert errors[1] is None
    for rank in (0, 2):
        assert str(errors[rank]).startswith("rank 1: has ended without a word, perhaps killed")


def test_a_signal_amid_the_explanation_does_not_stand_for_it(
    own_signals: StopRequest, monkeypatch: pytest.MonkeyPatch
) -> None:
    """torchrun's, which may lose its rendezvous before the rank has asked who died."""
    read = Ranks._beats_of_the_living

    def asked_to_stop(ranks: Ranks) -> dict[int, Beat]:
        own_signals._handle(signal.SIGTERM, None)
        return read(ranks)

    monkeypatch.setattr(Ranks, "_beats_of_the_living", asked_to_stop)
    ranks = Ranks(0, 2, 0, distributed.HashStore())
    with pytest.raises(UserError, match=re.escape(died([]))), ranks.explaining():
        raise RuntimeError("[gloo] Connection closed by peer")
    assert own_signals.number == signal.SIGTERM and not own_signals._is_polled


def test_a_signal_between_a_broken_collective_and_its_explanation_does_not_stand_for_it(
    own_signals: StopRequest,
) -> None:
    """The rank was tidying up: the process group and the watch end before it explains."""
    ranks = Ranks(0, 2, 0, distributed.HashStore())
    with pytest.raises(UserError, match=re.escape(died([]))), ranks.explaining():
        try:
            raise RuntimeError("[gloo] Connection closed by peer")
        finally:
            own_signals._handle(signal.SIGTERM, None)
    assert not ranks.store.check(["reason of 0"])  # it is no reason of this rank's own


def test_a_signal_that_broke_nothing_is_the_reason_of_its_rank() -> None:
    ranks = Ranks(0, 2, 0, distributed.HashStore())
    with pytest.raises(Stopped), ranks.explaining():
        raise Stopped(signal.SIGTERM)
    assert ranks._reason() == (0, "rank 0: stopped by SIGTERM")


def test_a_rank_cut_off_from_the_store_ends_in_a_sentence(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Its heart waits for an answer that never comes; here the ways out are only noted."""
    ended = threading.Event()
    killed: list[int] = []

    def end(code: int) -> None:
        watch._over.set()
        ended.set()

    monkeypatch.setattr(heart_module, "PERIOD_S", 0.02)
    monkeypatch.setattr(heart_module.os, "_exit", end)
    monkeypatch.setattr(heart_module.os, "kill", lambda pid, number: killed.append(pid))
    for restarts, wanted in (("0", 1), ("3", 0)):
        monkeypatch.setenv("TORCHELASTIC_RUN_ID", "x")
        monkeypatch.setenv("TORCHELASTIC_MAX_RESTARTS", restarts)
        store = Deaf()
        watch = Watch(store, 0, 1, Heart(step=7, doing="saving"), 0.4)
        watch.start()
        assert not ended.wait(0.8), "it answers"
        store.is_deaf = True
        assert ended.wait(5)
        store.is_deaf = False
        watch.stop()
        said = capsys.readouterr().err
        assert said.startswith(
            "error: the ranks' store, on the machine of rank 0, has not answered"
        )
        assert "the last step here was 7, saving; start the run again with --resume" in said
        assert len(killed) == wanted
        ended.clear()
        killed.clear()


def test_asked_to_stop_a_rank_waits_for_none_that_died(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Its main thread may hear nothing, in a collective with the one that died."""
    monkeypatch.setattr(heart_module, "PERIOD_S", 0.02)
    monkeypatch.setattr(heart_module, "DEAF_S", 0.3)
    cases = (  # what the other did last, whether this one was asked, what it does, its end
        (TRAINING, True, TRAINING, True),
        (TRAINING, True, SAVING, False),  # it waits for a disk
        (LEFT, True, TRAINING, False),
        (TRAINING, False, TRAINING, False),
    )
    for last, asked, doing, ends in cases:
        request, ended = StopRequest(), threading.Event()
        monkeypatch.setattr(heart_module, "STOP", request)
        monkeypatch.setattr(heart_module.os, "_exit", lambda code, ended=ended: ended.set())
        if asked:
            request._woken.send(bytes([signal.SIGTERM]))
        store = distributed.HashStore()
        beat = Beat(count=5, step=9, doing=last, num_signs=0, pid=1, parent=1, machine=0)
        store.set("beat 1", json.dumps(asdict(beat)))
        watch = Watch(store, 0, 2, Heart(doing=doing), 60.0)
        watch.start()
        assert ended.wait(1.0) == ends
        watch.stop()
        said = capsys.readouterr().err
        assert said.startswith("error: rank 1: has ended without a word, perhaps" if ends else "")
        assert bool(said) == ends and read_beats(store, 2)[0].doing == LEFT


def test_a_rank_that_failed_is_missed_one_that_is_done_is_not(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(heart_module, "PERIOD_S", 0.02)
    for failed, last in ((True, TRAINING), (False, LEFT)):
        store = distributed.HashStore()
        watch = Watch(store, 0, 1, Heart(doing=TRAINING), 60.0)
        watch.start()
        watch.stop(failed)
        assert read_beats(store, 1)[0].doing == last


def test_a_rank_that_failed_does_not_wait_for_a_store_that_is_deaf(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Its watch has ended with what it was at."""
    store = Deaf()
    beat = Beat(count=1, step=0, doing=TRAINING, num_signs=0, pid=1, parent=1, machine=0)
    ended: list[int] = []

    def end(code: int) -> None:
        ended.append(code)
        store.is_deaf = False

    monkeypatch.setattr(ranks_module.os, "_exit", end)
    monkeypatch.setattr(ranks_module, "REASON_S", 0.1)
    store.set("beat 0", json.dumps(asdict(beat)))
    store.set("beat 1", json.dumps(asdict(beat)))
    ranks = Ranks(0, 2, 0, store, _patience_s=0.3)
    ranks._last_beats = {0: beat, 1: beat}
    store.is_deaf = True
    with pytest.raises(ValueError, match="a bug"), ranks.explaining():
        raise ValueError("a bug")
    said = capsys.readouterr().err
    assert ended == [3]
    assert said.startswith(
        "error: rank 0: ValueError: a bug; and the ranks' store is silent; start"
    )


class Deaf:
    """A store that can stop answering, as one behind a cut cable does: no error, no end."""

    def __init__(self) -> None:
        self.is_deaf = False
        self._store = distributed.HashStore()

    def set(self, key: str, value: str) -> None:
        self._store.set(key, value)

    def multi_get(self, keys: list[str]) -> list[bytes]:
        while self.is_deaf:
            time.sleep(0.01)
        return list(self._store.multi_get(keys))

    def check(self, keys: list[str]) -> bool:
        return bool(self._store.check(keys))


def test_no_heart_beats_on_when_the_watching_ends() -> None:
    """A thread that asks the store while the interpreter ends would abort the process."""
    heart = Heart(step=0, doing=TRAINING)

    def watch(ranks: Ranks) -> None:
        with ranks.watching(heart, 60.0):
            assert {"heart", "guard"} <= {thread.name for thread in threading.enumerate()}

    assert on_all(2, watch) == [None, None]
    assert not {"heart", "guard"} & {thread.name for thread in threading.enumerate()}
