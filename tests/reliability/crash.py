"""R1 and R2: a pack that is killed, and a power cut after any of its system calls."""

import os
import random
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from statistics import median

from engine.data.records import open_records
from engine.host import ROOT
from tests.reliability.common import (
    Child,
    Tally,
    beside,
    digest,
    glyph_csv,
    run,
    verdict,
    why_no_strace,
)

SYSCALLS = (
    "write", "pwrite64", "ftruncate", "fsync", "?mkdir", "?mkdirat", "?rename", "?renameat",
    "?renameat2", "?unlink", "unlinkat", "?rmdir",
)  # fmt: skip
Operation = tuple[str, str, str | int]
"""(kind, path, second path or number of bytes)."""


class Packing:
    """Two packs of one CSV, and a place where the second, disturbed, may replace the first."""

    def __init__(self, folder: Path) -> None:
        self.csv = glyph_csv(folder / "small.csv", 300, 28)
        self.old, self.new = folder / "old", folder / "new"
        for out, seed in ((self.old, 1), (self.new, 42)):
            assert run(self.csv, out, "--seed", seed).code == 0
        self.old_print, self.new_print = (
            open_records(out).fingerprint for out in (self.old, self.new)
        )
        self.target = folder / "place" / "records"

    def reset(self, force: bool) -> tuple[object, ...]:
        """Empty the place, or put the old records there; returns the command's words."""
        shutil.rmtree(self.target.parent, ignore_errors=True)
        self.target.parent.mkdir()
        if force:
            shutil.copytree(self.old, self.target)
        return (self.csv, self.target, *(["--force"] if force else []))

    def check(self, tally: Tally, force: bool, what: str) -> None:
        """After a crash: old, new, or without --force nothing; the next pack puts all in order."""
        found = verdict(self.target)
        allowed = (
            {self.new_print, self.old_print} if force else {self.new_print, "missing", "refused"}
        )
        again = run(self.csv, self.target, "--force")
        whole = (
            again.code == 0 and digest(self.target) == digest(self.new) and not beside(self.target)
        )
        tally.check(
            found in allowed and whole,
            f"{what}: {found}, then {again}, beside it {beside(self.target)}",
        )


def kills(tally: Tally) -> None:
    """SIGKILL at random instants, and at each system call that changes the disk."""
    packing = Packing(tally.fast)
    usual = median(run(*packing.reset(False)).seconds for _ in range(5))
    num = tally.count(6, 24, 100)
    for number in range(num):
        force = bool(number % 2)
        child = Child(*packing.reset(force))
        time.sleep(tally.rng.random() * usual)
        child.kill()
        child.wait()
        packing.check(tally, force, "SIGKILL at a random instant")
    for number in range(num // 10):  # the whole life of a process, its imports too
        words = [
            sys.executable,
            "-m",
            "tools.pack_tmnist",
            *map(str, packing.reset(bool(number % 2))),
        ]
        process = subprocess.Popen(words, cwd=ROOT, stdout=subprocess.DEVNULL)
        time.sleep(tally.rng.random())
        process.kill()
        process.wait()
        packing.check(tally, bool(number % 2), "SIGKILL of a command that was just started")
    if why_no_strace():
        return tally.skip("kills at system calls", why_no_strace())
    for force in (False, True):
        hits = 0
        for name in SYSCALLS if tally.level != "tiny" else ("fsync", "unlinkat"):
            for k in range(1 + force, 1000, tally.count(4, 2, 1)):
                inject = f"inject={name}:signal=KILL:when={k}"
                if (
                    run(*packing.reset(force), strace=("-e", f"trace={name}", "-e", inject)).code
                    != -signal.SIGKILL
                ):
                    break
                hits += 1
                packing.check(tally, force, inject)
        tally.check(hits > 0, "no kill at a system call")
        tally.note(
            f"{hits} kills at system calls {'over existing records' if force else 'into nothing'}"
        )


def power_cuts(tally: Tally) -> None:
    """The order of the system calls, and every directory that a power cut could leave behind."""
    if why_no_strace():
        return tally.skip("all", why_no_strace())
    packing = Packing(tally.folder)
    names = ",".join(f"?{name.lstrip('?')}" for name in (*SYSCALLS, "openat", "fdatasync"))
    for force in (False, True):
        child = Child(*packing.reset(force), strace=("-e", f"trace={names}"))
        if not tally.check(
            child.wait().code == 0 and not beside(packing.target), "the traced pack"
        ):
            return
        operations = list(_operations(child.trace, packing.target))
        _check_order(tally, operations, packing.target, force)
        _check_states(tally, operations, packing, force, tally.count(60, 500, 2000) // 2)


def _operations(trace: str, target: Path) -> Iterator[Operation]:
    """What a traced pack did to its temporary directory, to `target` and to their parent."""
    begun: dict[str, str] = {}
    within = re.compile(
        rf"{re.escape(str(target.parent))}(/\.{target.name}\.tmp-\w+|/{target.name}|$)"
    )
    for line in trace.splitlines():
        pid, _, call = line.partition(" ")
        call = call.strip()
        if call.endswith(" <unfinished ...>"):
            begun[pid] = call.removesuffix(" <unfinished ...>")
            continue
        call = re.sub(r"^<\.\.\. \w+ resumed>", lambda _, pid=pid: begun.pop(pid), call)
        match = re.match(r"(\w+)\((.*)\)\s+= (\d+)", call)
        if not match:
            continue  # it failed, or is a signal
        kind, words, result = match.groups()
        quoted = re.findall(r'"([^"]*)"', words)
        opened = re.match(r"\d+<([^>]*)>", words)
        if kind == "openat" and "O_CREAT" in words:
            found: Operation = ("create", quoted[0], 0)
        elif kind in ("write", "pwrite64", "fsync", "fdatasync") and opened:
            found = (kind.replace("pwrite64", "write"), opened[1], int(result))
        elif kind.startswith("rename"):
            found = ("rename", quoted[0], quoted[1])
        elif kind.startswith("unlink"):
            found = ("unlink", f"{opened[1]}/{quoted[0]}" if opened else quoted[0], 0)
        else:
            continue
        if within.match(found[1]) and "(deleted)" not in found[1]:
            yield found


def _check_order(tally: Tally, operations: list[Operation], target: Path, force: bool) -> None:
    """fsync of data < of the directory < rename < fsync of the parent < the old is deleted."""
    place = {}
    for number, (kind, path, _) in enumerate(operations):
        place[kind, path] = number  # the last of its kind
    temporary = next(
        Path(path).parent for kind, path, _ in operations if kind == "create" and "fonts" in path
    )
    never = len(operations)
    renamed, directory = (
        place.get(("rename", str(temporary)), never),
        place.get(("fsync", str(temporary)), never),
    )
    files = [Path(path) for kind, path, _ in operations if kind == "create"]
    tally.check({f.name for f in files} == set(os.listdir(target)), f"files made: {files}")
    for file in map(str, files):
        synced = place.get(("fsync", file), never)
        tally.check(
            place["write", file] < synced < directory,
            f"{file} is fsynced after its bytes, before its directory",
        )
        first = operations.index(("create", str(temporary / "manifest.json"), 0))
        tally.check(
            place["write", file] < first or "manifest.json" in file,
            f"{file} is written before the manifest",
        )
    parent = place.get(("fsync", str(target.parent)), -1)
    tally.check(
        directory < renamed < parent,
        "the directory is fsynced, renamed, its parent fsynced, in this order",
    )
    gone = [number for number, (kind, _, _) in enumerate(operations) if kind == "unlink"]
    tally.check(
        bool(gone) == force and all(number > parent for number in gone), "the old is deleted last"
    )


def _check_states(
    tally: Tally, operations: list[Operation], packing: Packing, force: bool, num: int
) -> None:
    """Random power cuts: what was not fsynced is kept, lost or torn by chance, each for itself."""
    new = {file.name: file.read_bytes() for file in packing.new.iterdir()}
    old = {file.name: file.read_bytes() for file in packing.old.iterdir()} if force else {}
    place = tally.fast / "state"
    for _ in range(num):
        written, renamed, removed = _state(operations, new, tally.rng)
        at_target = (
            written
            if renamed
            else {name: data for name, data in old.items() if name not in removed}
        )
        whole = (
            {packing.new_print, packing.old_print}
            if force
            else {packing.new_print, "missing", "refused"}
        )
        for files, allowed in (
            (at_target, whole),
            (written, {packing.new_print, "missing", "refused"}),
        ):
            shutil.rmtree(place, ignore_errors=True)
            if files:
                place.mkdir()
            for name, data in files.items():
                (place / name).write_bytes(data)
            found = verdict(place)
            sizes = {name: len(data) for name, data in files.items()}
            tally.check(found in allowed, f"renamed {renamed}, {sizes}: {found}")


def _state(
    operations: list[Operation], new: dict[str, bytes], rng: random.Random
) -> tuple[dict[str, bytes], bool, set[str]]:
    """What a power cut leaves: new files, whether they are in place, and what the old lost."""
    late = next(number for number, (kind, _, _) in enumerate(operations) if kind == "rename")
    stop = rng.randint(rng.choice((0, late)), len(operations))
    kept = rng.choice((0.0, 0.5, 0.5, 0.9, 1.0))
    synced = {
        path: number for number, (kind, path, _) in enumerate(operations[:stop]) if kind == "fsync"
    }
    contents: dict[str, bytearray] = {}
    offsets: dict[str, int] = {}
    renamed, removed = False, set()
    for number, (kind, path, value) in enumerate(operations[:stop]):
        name, folder = os.path.basename(path), os.path.dirname(path)
        holder = path if kind == "write" else folder
        survives = synced.get(holder, -1) > number or rng.random() < kept
        if kind == "create" and survives:
            contents[name] = bytearray()
        elif kind == "write":
            start = offsets.get(name, 0)
            offsets[name] = start + int(value)
            data = new[name][start : start + int(value)]
            if name in contents and (survives or rng.random() < 0.5):
                data = (
                    data
                    if survives
                    else data[: rng.randrange(len(data))] + bytes(rng.randrange(len(data) + 1))
                )
                contents[name] += (
                    bytes(start - len(contents[name])) + data
                )  # what was lost before is a hole
                del contents[name][start + int(value) :]
        elif kind == "rename":
            renamed = survives
        elif kind == "unlink" and survives:
            removed.add(name)
    return {name: bytes(data) for name, data in contents.items()}, renamed, removed


ROWS: tuple[tuple[str, str, Callable[[Tally], None]], ...] = (
    ("R1", "pack killed at any instant and system call", kills),
    ("R2", "order of the writes, and states after a power cut", power_cuts),
)
