"""R12, R14 and R18: runs on disks that refuse, runs whose numbers break, and many kills of one."""

import hashlib
import json
import os
import shutil
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from engine.durable import MANIFEST, write_manifest
from engine.train.folder import checkpoints
from tests.reliability.common import Done, Tally, why_no_strace
from tests.reliability.runs import RENAMES, go_on, published_in
from tests.reliability.system import mounted, own_mounts
from tests.reliability.training import (
    Run,
    Training,
    check_memory,
    kill,
    leftovers,
    memory_files,
    metrics,
    newest,
    newest_sound,
    refused,
    same_tensors,
    until,
    wait,
    weights_by_step,
)

FAILING = ("write", "fsync", "?rename", "?mkdir", "unlinkat")
ERRORS = ("ENOSPC", "EIO")
GOES_ON = "training goes on"
NUM_LOOKS, LOOK_S = 20, 0.005
"""At what a run has open, and the pause between two."""


def disks(tally: Tally) -> None:
    """A disk that refuses, fills up or goes away under a run that saves every 5 steps."""
    training = Training(tally.fast, log_ids=False)
    weights = weights_by_step(training)
    _check_removed(tally, training)
    if own_mounts():
        for turn in range(tally.count(1, 4, 20)):
            _check_full(tally, training, weights, turn)
        for mib in (1, 2, 3, 4, 6)[: tally.count(2, 5, 5)]:
            _check_small(tally, training, mib)
    else:
        tally.skip("disks of many sizes", "no right to mount; run it under unshare -rm")
    if why_no_strace():
        return tally.skip("errors of system calls", why_no_strace())
    failures = 0
    for number, name in enumerate(FAILING if tally.level != "tiny" else ("fsync",)):
        for k in range(1, 41, tally.count(13, 8, 1)):
            error = ERRORS[(number + k) % 2]
            failures += _fail_call(tally, training, weights, f"{name}:error={error}:when={k}")
    tally.check(failures > 0, "no system call was made to fail")
    tally.note(f"{failures} system calls were made to fail")


def _fail_call(tally: Tally, training: Training, weights: dict[int, str], fault: str) -> bool:
    """The k-th call of each thread fails; false if none has so many."""
    training.reset()
    name = fault.partition(":")[0]
    strace = ("-e", f"trace={RENAMES},{name}", "-e", f"inject={fault}")
    runs = training.start(strace=strace, before=_keep_cache(training))
    done = wait(runs)[0]
    if "(INJECTED)" not in runs[0].trace:
        return False
    published = published_in(runs[0].trace)
    _check_kept(tally, training, weights, published, fault)
    num_failed = runs[0].trace.count("(INJECTED)")
    told = done.text.count(GOES_ON)
    tally.check(told <= num_failed, f"{fault}: {num_failed} calls failed, said: {done.text}")
    tally.check(done.code == 0 or refused(done), f"{fault}: {done}")
    go_on(tally, training, f"after {fault}")
    return True


def _keep_cache(training: Training) -> Callable[[], object]:
    """The second place is a cache folder of the row's own."""
    cache = {"XDG_CACHE_HOME": str(training.folder / "cache")}
    return lambda: os.environ.update(cache)


def _check_kept(
    tally: Tally, training: Training, weights: dict[int, str], published: int, what: str
) -> None:
    """What was published is read, and is right."""
    step, found = newest_sound(training.out)
    tally.check(step >= published, f"{what}: {published} was published, {step} is read")
    tally.check(not step or found == weights[step], f"{what}: other weights after step {step}")


def _rescued(training: Training) -> list[Path]:
    return sorted((training.folder / "cache").glob("tmnist-engine/rescued/*/model.safetensors"))


def _check_end(tally: Tally, training: Training, done: Done, what: str) -> None:
    """The run ended well, and its weights are where it says.

    It says so once; or not at all, where it had saved everything before the disk was full.
    """
    has_all = newest_sound(training.out) == newest_sound(training.whole)
    said = done.text.count(GOES_ON)
    tally.check(done.code == 0 and (said == 1 or (has_all and not said)), f"{what}: {done}")
    whole = training.whole / "model.safetensors"
    places = [training.out / "model.safetensors", *_rescued(training)]
    good = any(same_tensors(path, whole) for path in places)
    tally.check(good, f"{what}: no weights: {done}")


def _check_full(tally: Tally, training: Training, weights: dict[int, str], turn: int) -> None:
    """The disk fills up under a run; every second one is then stopped."""
    training.reset()
    training.out.mkdir()
    shutil.rmtree(training.folder / "cache", ignore_errors=True)
    with mounted(b"tmpfs", training.out, b"size=12m"):
        runs = training.start(before=_keep_cache(training))
        begun = tally.rng.randrange(5, 50)
        until(lambda: newest(training.out) >= begun, runs)
        published = newest(training.out)
        _fill(training.out / "filler")
        if turn % 2:
            time.sleep(0.1)
            runs[0].signal(signal.SIGTERM)
        done = wait(runs)[0]
        what = f"a disk that filled up{' and SIGTERM' if turn % 2 else ''}"
        _check_kept(tally, training, weights, published, what)
        if "stopped by" in done.text:
            step, _ = newest_sound(training.out)
            claims = ", saved;" in done.text
            at = json.loads((training.out / "report.json").read_text())["num_steps"]
            tally.check(claims == (step == at), f"{what}: saved {step} of {at}: {done}")
        else:
            _check_end(tally, training, done, what)
        (training.out / "filler").unlink()
        go_on(tally, training, what)


def _fill(path: Path) -> None:
    """Take all the space there is."""
    with open(path, "wb") as file:
        try:
            while True:
                os.write(file.fileno(), bytes(4096))
        except OSError:
            return


def _check_small(tally: Tally, training: Training, mib: int) -> None:
    """Refused before the first step in one line, or done."""
    training.reset()
    training.out.mkdir()
    with mounted(b"tmpfs", training.out, f"size={mib}m".encode()):
        done = training.run(before=_keep_cache(training))[0]
        good = refused(done) and "are free" in done.text and not metrics(training.out)
        faults = training.faults() if done.code == 0 else []
        tally.check(good or (done.code == 0 and not faults), f"{mib} MiB: {done} {faults}")
        tally.note(f"on {mib} MiB: exit {done.code}")


def _check_removed(tally: Tally, training: Training) -> None:
    """The run's folder goes while it trains: it goes on, and its weights are kept."""
    training.reset()
    runs = training.start(before=_keep_cache(training))
    until(lambda: newest(training.out) >= 20, runs)
    training.out.rename(training.folder / "gone")
    done = wait(runs)[0]
    shutil.rmtree(training.folder / "gone")
    what = "the folder was removed"
    tally.check(done.code == 0 and "Traceback" not in done.text, f"{what}: {done}")
    whole = training.whole / "model.safetensors"
    places = [training.out / "model.safetensors", *_rescued(training)]
    good = any(same_tensors(path, whole) for path in places)
    tally.check(good, f"{what}: no weights: {done}")


HOT = "--set=optim.learning_rate=1000"
BAD = ("nan", "inf", "-inf")


def numbers(tally: Tally) -> None:
    """Losses and weights that are not finite: the step is named, nothing of it is saved."""
    for size in (1, 2)[: tally.count(1, 2, 2)]:
        training = Training(tally.fast / str(size), num_ranks=size)
        _check_hot(tally, training)
        for value in BAD[: tally.count(1, 3, 3)]:
            _check_bad_checkpoint(tally, training, value)


def _check_hot(tally: Tally, training: Training) -> None:
    training.reset()
    done = training.run(HOT, "--set=optim.schedule=constant")
    said = " ".join(each.text for each in done)
    what = f"{HOT} on {training.num_ranks} ranks: {said[-300:]}"
    tally.check({each.code for each in done} == {2}, f"{what}: {[each.code for each in done]}")
    tally.check("not finite" in said and "step" in said and "Traceback" not in said, what)
    tally.check(_is_finite(training.out), f"{what}: a checkpoint is not finite")


def _is_finite(out: Path) -> bool:
    from engine.train.checkpoint import read_checkpoint

    return all(
        bool(tensor.isfinite().all())
        for path in checkpoints(out)
        for tensors in read_checkpoint(path)[1].values()
        for tensor in tensors.values()
    )


def _check_bad_checkpoint(tally: Tally, training: Training, value: str) -> None:
    """A newest checkpoint with a bad number under right hashes is not gone on from."""
    training.reset()
    runs = training.start()
    until(lambda: newest(training.out) >= 50, runs)
    kill(runs)
    path = checkpoints(training.out)[0]
    _spoil(path, float(value))
    go_on(tally, training, f"{value} in a weight of {path.name}")


def _spoil(checkpoint: Path, value: float) -> None:
    """Put `value` into a weight, and make the hashes anew."""
    from safetensors.torch import load_file, save_file

    file = checkpoint / "model.safetensors"
    tensors = load_file(file)
    next(iter(tensors.values())).view(-1)[3] = value
    save_file(tensors, file)
    manifest: dict[str, Any] = json.loads((checkpoint / MANIFEST).read_text())
    manifest["sha256"][file.name] = hashlib.sha256(file.read_bytes()).hexdigest()
    write_manifest(checkpoint, manifest)


def soak(tally: Tally) -> None:
    """One run killed and gone on again and again: nothing piles up, and it ends right."""
    num_cycles = tally.count(2, 3, 50)
    training = Training(tally.folder, num_epochs=1 + num_cycles)  # some 10 steps are one cycle's
    temporary = training.folder / "tmp"
    temporary.mkdir()
    memory = memory_files()
    used: list[tuple[int, int]] = []
    for turn in range(num_cycles):
        runs = training.start(before=lambda: os.environ.update(TMPDIR=str(temporary)))
        begun = newest(training.out)
        hit = until(lambda begun=begun: newest(training.out) > begun, runs)
        tally.check(hit, f"cycle {turn}: the run had ended before it was killed")
        used.append(_in_use(runs[0]))
        runs[0].signal(signal.SIGTERM if turn % 5 == 4 else signal.SIGKILL)
        wait(runs)
        num_kept = len(checkpoints(training.out))
        tally.check(num_kept <= 4, f"{num_kept} checkpoints are kept")
    go_on(tally, training, "after all kills")
    files, threads = (max(found) for found in zip(*used, strict=True))
    few = files <= used[0][0] and threads <= used[0][1]
    tally.check(few, f"(files, threads) grew: {used}")
    check_memory(tally, memory)
    tally.check(not leftovers(training.out), f"left {leftovers(training.out)}")
    tally.check(not list(temporary.iterdir()), "temporary files were left")
    tally.note(f"{len(used)} cycles, {files} files and {threads} threads at most")


def _in_use(run: Run) -> tuple[int, int]:
    """Open files and threads of a run: the fewest of many looks, for it writes between steps."""
    place = Path(f"/proc/{run.pid}")
    looks = []
    for _ in range(NUM_LOOKS):
        looks.append((len(os.listdir(place / "fd")), len(os.listdir(place / "task"))))
        time.sleep(LOOK_S)
    files, threads = (min(found) for found in zip(*looks, strict=True))
    return files, threads


ROWS: tuple[tuple[str, str, Callable[[Tally], None]], ...] = (
    ("R12", "a run on disks that fill up, fail or go away", disks),
    ("R14", "numbers that are not finite", numbers),
    ("R18", "one run killed again and again", soak),
)
