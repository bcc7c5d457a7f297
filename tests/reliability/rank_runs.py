"""R9, R10, R11 and R13: runs of several ranks that are resized, killed, stopped, or hang."""

import os
import signal
import time
from collections.abc import Callable
from statistics import median

from tests.reliability.common import Done, Tally, why_no_strace
from tests.reliability.runs import Moment, at_random, at_step, go_on, in_evaluation, in_save
from tests.reliability.torchruns import is_helper, send, torchrun
from tests.reliability.training import (
    EPOCHS,
    STEPS,
    Run,
    Training,
    check_memory,
    check_nothing_left,
    children,
    global_ids,
    memory_files,
    metrics,
    num_logged,
    refused,
    text_of,
    until,
    wait,
)

LEAVES_S = 10.0
STOPS = (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT)
HANGS_S = 5
"""--timeout of the runs in which something hangs: the least."""
SILENT_S = 30.0
BLOCKED_S = 40
"""How long a disk does not answer."""


def _in_last_step(training: Training, runs: list[Run], tally: Tally) -> bool:
    return at_step(training, runs, EPOCHS - 1, STEPS - 1)


def _in_start(training: Training, runs: list[Run], tally: Tally) -> bool:
    time.sleep(tally.rng.random() * 0.3)
    return True


MOMENTS: tuple[Moment, ...] = (_in_start, at_random, in_save, in_evaluation, _in_last_step)


def deaths(tally: Tally) -> None:
    """SIGKILL of a rank under torchrun, which starts it again; and of torchrun itself."""
    training = Training(tally.fast, num_ranks=2)
    before = memory_files()
    taken_s = []
    for turn in range(tally.count(2, 5, 20)):
        taken_s += _kill_rank(tally, training, MOMENTS[turn % len(MOMENTS)], literal=False)
    for turn in range(tally.count(0, 1, 4)):
        _kill_rank(tally, training, MOMENTS[1 + turn % 4], literal=True)
    for turn in range(tally.count(1, 2, 6)):
        _kill_torchrun(tally, training, literal=turn % 3 == 2)
    check_memory(tally, before)
    if taken_s:
        tally.note(
            f"first new step {median(taken_s):.1f} s after the kill, {max(taken_s):.1f} at most"
        )


def _kill_rank(tally: Tally, training: Training, moment: Moment, literal: bool) -> list[float]:
    """One rank is killed; torchrun starts both again, once. Seconds to the first new step."""
    training.reset()
    run = torchrun(training, literal=literal)
    ranks = run.started()
    if literal:
        until(lambda: num_logged(training.out, 0) > 0, [run])
    moment(training, [run], tally)
    hit = tally.rng.choice(run.ranks() or ranks)
    rank = ranks.index(hit) if hit in ranks else -1
    send(hit, signal.SIGKILL)
    start_ns = time.time_ns()
    done = run.wait(90)
    what = f"SIGKILL of rank {rank} {moment.__name__}{', literal' if literal else ''}: {done}"
    tally.check(done.code == 0, what)
    starts = done.text.count("the feed is resident")
    tally.check(starts <= 2, f"{what}: {starts} starts")
    faults = training.faults()
    tally.check(not faults, f"{what}: {'; '.join(faults)}")
    check_nothing_left(tally, what)
    files = [path.stat() for path in (training.out / "ids").glob("*")]
    again = [file.st_ctime_ns for file in files if file.st_ctime_ns > start_ns]
    return [] if not again or starts < 2 else [(min(again) - start_ns) / 1e9]


def _kill_torchrun(tally: Tally, training: Training, literal: bool) -> None:
    """Its ranks save and end with it."""
    training.reset()
    run = torchrun(training, literal=literal)
    until(lambda: num_logged(training.out, 1) > 3, [run])
    run.kill()
    start_s = time.perf_counter()
    run.wait()
    what = f"SIGKILL of torchrun{', literal' if literal else ''}"
    until(lambda: not children(os.getpid()), [])
    took_s = time.perf_counter() - start_s
    marker = training.out / "preempted"
    tally.check(marker.exists(), f"{what}: the ranks did not save")
    tally.check(took_s < LEAVES_S, f"{what}: its ranks went on for {took_s:.1f} s")
    check_nothing_left(tally, what)
    go_on(tally, training, what)


def launcher_stops(tally: Tally) -> None:
    """Signals to torchrun or to one rank: both ranks save and leave, and it does not end with 0."""
    training = Training(tally.fast, num_ranks=2)
    for turn in range(tally.count(1, 6, 27)):
        number = STOPS[(turn + turn // 3) % len(STOPS)]  # nine turns are every pair
        training.reset()
        run = torchrun(training, restarts=0)
        ranks = run.started()
        step = tally.rng.randrange(2, STEPS)
        at_step(training, [run], turn % EPOCHS, step)
        target = turn % 3
        send((run.pid, *ranks)[target], number)
        start_s = time.perf_counter()
        done = run.wait()
        until(lambda: not children(os.getpid()), [])  # by SIGUSR1 torchrun ends before its ranks
        took_s = time.perf_counter() - start_s
        what = f"{number.name} to {('torchrun', 'rank 0', 'rank 1')[target]}: {done}"
        marker = training.out / "preempted"
        tally.check(done.code not in (0, None) and took_s < LEAVES_S, f"{what} in {took_s:.1f} s")
        tally.check(marker.exists(), f"{what}: no marker")
        check_nothing_left(tally, what)
        go_on(tally, training, what)


def hangs(tally: Tally) -> None:
    """A rank that stands still for good or for a moment; a feed that does."""
    training = Training(tally.fast / "2", num_ranks=2)
    for turn in range(tally.count(1, 2, 10)):
        _stop_for_good(tally, training, turn % 2)
    for turn in range(tally.count(1, 1, 10)):
        _stop_for_a_moment(tally, training, turn % 2)
    loader = Training(
        tally.fast / "loader", ("--feed=loader_batched", "--set=data.loader_workers=1")
    )
    for number in (signal.SIGKILL, signal.SIGSTOP)[: tally.count(1, 2, 2)]:
        _disturb_worker(tally, loader, number)
    if why_no_strace():
        return tally.skip("a blocked reader", why_no_strace())
    stream = ("--feed=stream", "--order=blocked", "--set=data.block_samples=5")
    stream = (*stream, "--set=data.window_blocks=4")
    streaming = Training(tally.fast / "stream", stream)
    _fail_reader(tally, streaming, "error=EIO", "cannot be read")
    if tally.level != "tiny":
        _fail_reader(tally, streaming, f"delay_enter={BLOCKED_S * 1_000_000}", "feed")


def _stop_for_good(tally: Tally, training: Training, rank: int) -> None:
    training.reset()
    run = torchrun(training, f"--timeout={HANGS_S}", restarts=0)
    ranks = run.started()
    at_step(training, [run], 1, tally.rng.randrange(2, STEPS))
    os.kill(ranks[rank], signal.SIGSTOP)
    start_s = time.perf_counter()
    done = run.wait()
    took_s = time.perf_counter() - start_s
    what = f"SIGSTOP of rank {rank}: {done}"
    tally.check(done.code not in (0, None) and took_s < SILENT_S, f"{what} after {took_s:.1f} s")
    tally.check(f"error: rank {rank}: has been silent" in done.text, f"{what}: not named")
    check_nothing_left(tally, what)
    go_on(tally, training, what)


def _stop_for_a_moment(tally: Tally, training: Training, rank: int) -> None:
    training.reset()
    run = torchrun(training, f"--timeout={HANGS_S}", restarts=0)
    ranks = run.started()
    at_step(training, [run], 1, tally.rng.randrange(2, STEPS))
    os.kill(ranks[rank], signal.SIGSTOP)
    time.sleep(HANGS_S / 2)
    os.kill(ranks[rank], signal.SIGCONT)
    done = run.wait()
    faults = training.faults()
    what = f"rank {rank} stopped for a moment: {done}"
    tally.check(done.code == 0 and not faults, f"{what}: {'; '.join(faults)}")


def _check_ended(tally: Tally, run: Run, what: str, sentence: str) -> None:
    """It ends in time, not with 0, with a sentence and no traceback, and leaves no process."""
    start_s = time.perf_counter()
    until(lambda: False, [run])  # strace gives a thread that it delays back later
    took_s = time.perf_counter() - start_s
    done = run.wait(2 * BLOCKED_S)
    what = f"{what}: {done}"
    tally.check(done.code not in (0, None) and took_s < SILENT_S, f"{what} after {took_s:.1f} s")
    said = [line for line in done.text.splitlines() if line.startswith("error: ")]
    good = len(said) == 1 and sentence in said[0] and "Traceback" not in done.text
    tally.check(good, f"{what}: says {said}")
    check_nothing_left(tally, what)


def _disturb_worker(tally: Tally, training: Training, number: signal.Signals) -> None:
    training.reset()
    run = training.start()[0]
    at_step(training, [run], 1, 5)
    for worker in children(run.pid):
        if not is_helper(worker):
            os.kill(worker, number)
    _check_ended(tally, run, f"{number.name} of a loader's workers", "feed")
    go_on(tally, training, f"after {number.name} of a loader's workers")


def _fail_reader(tally: Tally, training: Training, fault: str, sentence: str) -> None:
    training.reset()
    inject = f"inject=preadv,preadv2:{fault}:when=30+"
    run = training.start(strace=("-e", "trace=preadv,preadv2", "-e", inject))[0]
    _check_ended(tally, run, f"{fault} while the stream is read", sentence)
    go_on(tally, training, f"after {fault} while the stream was read")


PLANS = ((2, 1, 4, 2), (1, 4, 1, 2), (4, 2, 1, 1), (2, 4, 2, 1), (1, 2, 4, 1))
CLOSE = 1e-3
RANKS = (1, 2, 4)


def elastic(tally: Tally) -> None:
    """A run that goes on with other numbers of ranks: the same global order, a loss as close."""
    training = Training(tally.fast)
    wanted = metrics(training.whole)[-1]["train_loss"]
    for plan in PLANS[: tally.count(1, 2, 5)]:
        done = _run_plan(training, plan)
        what = f"ranks {plan}: {text_of(done)}"
        if not tally.check({each.code for each in done} == {0}, what):
            continue
        same = [_same_order(training, epoch) for epoch in range(EPOCHS)]
        tally.check(all(same), f"{what}: another order of samples")
        loss = metrics(training.out)[-1]["train_loss"]
        tally.check(abs(loss - wanted) < CLOSE, f"{what}: loss {loss}, alone {wanted}")
    training.reset()
    done = wait(training.start(num_ranks=3))
    tally.check(any("divide" in each.text for each in done), f"3 ranks: {text_of(done)}")
    tally.check({each.code for each in done} == {2}, f"3 ranks: {text_of(done)}")


def _run_plan(training: Training, plan: tuple[int, ...], *more: object) -> list[Done]:
    """Train on one number of ranks after another, stopped between; how the last ranks ended."""
    training.reset()
    for turn, size in enumerate(plan):
        runs = training.start(*more, num_ranks=size)
        if turn < len(plan) - 1:
            until(lambda turn=turn: num_logged(training.out, turn) > 20, runs)
            for run in runs:
                run.signal(signal.SIGTERM)
        done = wait(runs)
    return done


def _same_order(training: Training, epoch: int) -> bool:
    return bool((global_ids(training.out, epoch) == global_ids(training.whole, epoch)).all())


CANONICAL = "--canonical=4"
LAUNCHES = "--steps-per-launch=3"
SWITCHES: tuple[tuple[str, ...], ...] = (
    ("--amp=bf16",),
    ("--no-channels-last", "--set=optim.fused=false"),
    ("--set=augment.rotate_degrees=10",),
    ("--compile",),
)


def canonical(tally: Tally) -> None:
    """--canonical: the same bits on 1, 2 and 4 ranks with every switch, and where ranks change."""
    plain = Training(tally.fast / "plain", (CANONICAL,))
    for size in RANKS[1:]:
        _check_bits(tally, plain, (size,))
    for size in RANKS[: tally.count(1, 2, 3)]:
        _check_bits(tally, plain, (size,), LAUNCHES)
    for plan in ((4, 1, 2), *PLANS)[: tally.count(1, 1, 6)]:
        _check_bits(tally, plain, plan)
    done = plain.run("--canonical=2", "--epochs=4")[0]
    good = refused(done) and "step.canonical was 4 and is 2" in done.text
    tally.check(good, f"other shards: {done}")
    for number, switches in enumerate(SWITCHES[: tally.count(0, 2, 4)]):
        if why := _why_not(switches):
            tally.skip(" ".join(switches), why)
            continue
        flags = (CANONICAL, "--epochs=1", *switches)
        training = Training(tally.fast / str(number), flags, log_ids=False)
        for size in RANKS[1:]:
            _check_bits(tally, training, (size,))


def _why_not(switches: tuple[str, ...]) -> str:
    """Why this machine leaves a switch out; "" if it does not."""
    import torch

    from engine.world import cannot_compile, has_fast_bf16

    cpu = torch.device("cpu")
    if "--amp=bf16" in switches and not has_fast_bf16(cpu):
        return "this CPU has no bf16 instructions"
    if "--compile" not in switches:
        return ""
    why = cannot_compile(cpu)
    if not why:  # what a first compilation imports and finds out, before the ranks are forked
        torch._inductor.config.compile_threads = 1
        torch.compile(torch.relu)(torch.ones(3, requires_grad=True)).sum().backward()
    return why


def _check_bits(tally: Tally, training: Training, plan: tuple[int, ...], *more: object) -> None:
    """A run on such numbers of ranks leaves what one rank left."""
    done = _run_plan(training, plan, *more)
    faults = training.faults()
    good = {each.code for each in done} == {0} and not faults
    flags = " ".join(map(str, (*training.flags, *more)))
    tally.check(good, f"{flags} on ranks {plan}: {'; '.join(faults)}: {text_of(done)}")


ROWS: tuple[tuple[str, str, Callable[[Tally], None]], ...] = (
    ("R9", "ranks 2, 1, 4, 2: one global order", elastic),
    ("R9", "--canonical on any ranks: the same bits", canonical),
    ("R10", "a rank or torchrun killed: it recovers", deaths),
    ("R11", "ranks, workers and readers that hang", hangs),
    ("R13", "signals to torchrun: saved at the step, and gone on", launcher_stops),
)
