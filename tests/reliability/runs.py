"""R7, R8, R13, R14 and R18: runs that are killed, stopped, spoilt, and go on, to the same bits."""

import signal
import time
from collections.abc import Callable
from pathlib import Path

from tests.reliability.common import Tally, why_no_strace
from tests.reliability.training import (
    RUN_S,
    STEPS,
    Run,
    Training,
    kill,
    newest,
    newest_sound,
    num_logged,
    text_of,
    until,
    wait,
    weights_by_step,
)

Moment = Callable[["Training", list[Run], Tally], bool]
"""Waits until a run is where it shall be killed; false if it ended before."""


def at_random(training: Training, runs: list[Run], tally: Tally) -> bool:
    time.sleep(tally.rng.random() * training.seconds)
    return runs[0].is_running()


def in_save(training: Training, runs: list[Run], tally: Tally) -> bool:
    """A checkpoint is being written: its temporary folder is there, for a random moment."""
    begun = newest(training.out) + tally.rng.randrange(5, 50)
    folder = training.out / "checkpoints"
    found = until(lambda: newest(training.out) >= begun and any(folder.glob(".step-*.tmp-*")), runs)
    time.sleep(tally.rng.random() * 0.004)
    return found


def in_evaluation(training: Training, runs: list[Run], tally: Tally) -> bool:
    """An epoch's last step is logged and its line is not written."""
    epoch = min(_epochs_done(training.out), 2)
    found = until(lambda: num_logged(training.out, epoch) >= STEPS, runs)
    time.sleep(tally.rng.random() * 0.008)
    return found


def at_step(training: Training, runs: list[Run], epoch: int, step: int) -> bool:
    return until(lambda: num_logged(training.out, epoch) >= step, runs, 0.0)


def before_edge(training: Training, runs: list[Run], tally: Tally) -> bool:
    return at_step(training, runs, min(_epochs_done(training.out), 2), STEPS - 1)


def at_edge(training: Training, runs: list[Run], tally: Tally) -> bool:
    return at_step(training, runs, min(_epochs_done(training.out), 2), STEPS)


def after_edge(training: Training, runs: list[Run], tally: Tally) -> bool:
    return at_step(training, runs, min(_epochs_done(training.out) + 1, 2), 1)


def _epochs_done(out: Path) -> int:
    path = out / "metrics.jsonl"
    return len(path.read_bytes().splitlines()) if path.exists() else 0


MOMENTS: tuple[Moment, ...] = (
    before_edge,
    at_edge,
    after_edge,
    in_evaluation,
    in_save,
    at_random,
    at_random,
    at_random,
)


def go_on(tally: Tally, training: Training, what: str, *more: object) -> bool:
    """The same command line again, to its end, which equals the undisturbed run's."""
    done = training.run(*more)
    good = tally.check(all(each.code == 0 for each in done), f"{what}, gone on: {text_of(done)}")
    faults = training.faults() if good else []
    return good and tally.check(not faults, f"{what}, gone on: {'; '.join(faults)}")


def resumes(tally: Tally) -> None:
    """1, 2 and 5 kills in a run, at the moments that differ; alone, in launches, and on 2 ranks."""
    plans = ((), 1, 1), (("--steps-per-launch=4",), 1, 3), ((), 2, 2)
    for number, (flags, num_ranks, part) in enumerate(plans):
        training = Training(tally.fast / str(number), flags, num_ranks)
        num = tally.count(2, 8, 40) // part
        for turn in range(num):
            num_kills = (1, 1, 2, 5)[turn % 4]
            _kill_and_go_on(tally, training, num_kills, turn)
    tally.note(f"a run takes {training.seconds:.1f} s on 2 ranks")


def _kill_and_go_on(tally: Tally, training: Training, num_kills: int, turn: int) -> None:
    training.reset()
    places = []
    for number in range(num_kills):
        moment = MOMENTS[(turn + number) % len(MOMENTS)]
        runs = training.start()
        hit = moment(training, runs, tally)
        done = kill(runs)
        places.append(moment.__name__ if hit else "missed")
        ended = all(each.code in (0, -signal.SIGKILL) for each in done)
        tally.check(ended, f"until {moment.__name__}: {text_of(done)}")
    ranks = f"{training.num_ranks} ranks {' '.join(training.flags)}"
    go_on(tally, training, f"killed {', '.join(places)}, {ranks}")


CALLS = ("write", "fsync", "?rename", "?mkdir", "unlinkat", "?rmdir")
RENAMES = "?rename,?renameat,?renameat2"


def crashes(tally: Tally) -> None:
    """SIGKILL while a checkpoint is written or an old one pruned, and at the calls that do it."""
    training = Training(tally.folder)
    weights = weights_by_step(training)
    for _ in range(tally.count(2, 8, 100)):
        training.reset()
        runs = training.start()
        hit = in_save(training, runs, tally)
        published = newest(training.out)
        kill(runs)
        what = "in a save" if hit else "after the last save"
        _check_crash(tally, training, weights, published, f"SIGKILL {what}")
    if why_no_strace():
        return tally.skip("kills at system calls", why_no_strace())
    hits = 0
    for name in CALLS if tally.level != "tiny" else ("fsync",):
        for k in range(1, 33, tally.count(15, 8, 1)):
            hits += _kill_at_call(tally, training, weights, name, k)
    tally.check(hits > 0, "no kill at a system call")
    tally.note(f"{hits} kills at system calls")


def _kill_at_call(
    tally: Tally, training: Training, weights: dict[int, str], name: str, k: int
) -> bool:
    """Kill a run at the k-th call that one of its threads makes; false if it ended before."""
    training.reset()
    inject = f"inject={name}:signal=KILL:when={k}"
    runs = training.start(strace=("-e", f"trace={RENAMES},{name}", "-e", inject))
    if wait(runs)[0].code != -signal.SIGKILL:
        return False
    _check_crash(tally, training, weights, published_in(runs[0].trace), inject)
    return True


def published_in(trace: str) -> int:
    """The step of the newest checkpoint that was renamed into its place."""
    steps = [0]
    for line in trace.splitlines():
        at = line.rpartition("/checkpoints/step-")[2][:9]
        if line.endswith("= 0") and at.isdigit():
            steps.append(int(at))
    return max(steps)


def _check_crash(
    tally: Tally, training: Training, weights: dict[int, str], published: int, what: str
) -> None:
    """What was published is not lost, what is read is right, and the next start tidies up."""
    step, found = newest_sound(training.out)
    tally.check(step >= published, f"{what}: {published} was published, {step} is read")
    tally.check(not step or found == weights[step], f"{what}: other weights after step {step}")
    go_on(tally, training, what)


STOPS = (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT, signal.SIGHUP)
LEAVES_S = 10.0
SLOW_S = 4
"""How long a slow disk takes for an fsync."""
AGAIN_S = 1.5
"""More than a second, wherever a busy machine lets it see the first."""


def stops(tally: Tally) -> None:
    """Signals to a lone run at any moment, and a second one."""
    lone = Training(tally.fast / "1")
    moments: tuple[Moment, ...] = (at_random, in_evaluation, in_save, at_random, _in_start)
    for turn in range(tally.count(4, 10, 60)):
        _stop(tally, lone, STOPS[turn % len(STOPS)], moments[turn % len(moments)])
    if why_no_strace():
        return tally.skip("a second signal", why_no_strace())
    for number in STOPS[: tally.count(1, 2, 4)]:
        _stop_twice(tally, lone, number)


def _in_start(training: Training, runs: list[Run], tally: Tally) -> bool:
    time.sleep(tally.rng.random() * 0.1)
    return runs[0].is_running()


def _stop(tally: Tally, training: Training, number: signal.Signals, moment: Moment) -> None:
    """A stopped run has saved its last step, says so, and goes on to the same bits."""
    training.reset()
    runs = training.start()
    moment(training, runs, tally)
    runs[0].signal(number)
    start_s = time.perf_counter()
    done = wait(runs)
    took_s = time.perf_counter() - start_s
    what = f"{number.name} {moment.__name__}: {text_of(done)}"
    said = " ".join(each.text for each in done)
    marker = training.out / "preempted"
    allowed = {0, 128 + number, -number}  # before the handlers are there, the default holds
    tally.check({each.code for each in done} <= allowed, what)
    tally.check(took_s < LEAVES_S and "Traceback" not in said, f"{what} after {took_s:.1f} s")
    if f"stopped by {number.name} in epoch" in said:
        logged = sum(num_logged(training.out, epoch) for epoch in range(3))
        saved = newest_sound(training.out)[0]
        tally.check(saved == logged, f"{what}: saved {saved} of {logged} steps")
        tally.check(number.name in marker.read_text(), f"{what}: {marker.name} does not say so")
        tally.check({each.code for each in done} == {128 + number}, f"{what}: exit code")
    go_on(tally, training, what)


def _stop_twice(tally: Tally, training: Training, number: signal.Signals) -> None:
    """While a slow disk takes the checkpoint, the second signal ends the run at once.

    It is sent again and again: where the main thread itself waits for an fsync, Python hears those
    that come meanwhile as one. To save takes six of them.
    """
    training.reset()
    slow = f"inject=fsync:delay_enter={SLOW_S * 1_000_000}:when=8+"
    runs = training.start(strace=("-e", "trace=fsync", "-e", slow))
    until(lambda: num_logged(training.out, 0) > 20, runs)
    start_s = time.perf_counter()
    while runs[0].is_running() and time.perf_counter() - start_s < RUN_S:
        runs[0].signal(number)
        time.sleep(AGAIN_S)
    took_s = time.perf_counter() - start_s
    done = wait(runs)
    what = f"{number.name} twice: {text_of(done)}, ended after {took_s:.1f} s"
    tally.check(done[0].code == 128 + number and took_s < 3 * SLOW_S, what)
    go_on(tally, training, what)


ROWS: tuple[tuple[str, str, Callable[[Tally], None]], ...] = (
    ("R7", "a run killed while it saves, and at its system calls", crashes),
    ("R8", "kills anywhere, gone on to the same bits", resumes),
    ("R13", "signals: saved at the step, and gone on", stops),
)
