"""R12, R16 and R17: full and failing disks, several packers at once, permissions and odd paths."""

import contextlib
import os
import pwd
import re
import resource
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from itertools import product
from pathlib import Path

import numpy as np

from engine.data.records import open_records
from engine.host import ROOT
from tests.reliability.common import LIBC, Child, Done, Tally, beside, digest, run, why_no_strace
from tests.reliability.crash import Packing

CLONE_NEWNS, MNT_DETACH = 0x20000, 2
MS_RDONLY, MS_REMOUNT, MS_BIND, MS_REC, MS_PRIVATE = 1, 32, 4096, 16384, 1 << 18
NOBODY = 65534
FAILING = (
    "write", "pwrite64", "ftruncate", "fsync", "close", "?mkdir", "?mkdirat", "?rename",
    "?renameat", "?renameat2", "?unlink", "unlinkat",
)  # fmt: skip
ERRORS = ("ENOSPC", "EIO")
PACKERS = 8
REFUSED_S = 2.0


def disks(tally: Tally) -> None:
    """File systems of many sizes, limits of a file's size, and errors of the k-th system call."""
    packing = Packing(tally.fast)
    _check_small_disks(tally, packing)
    for size in (0, 10, 5000, 40_000, 100_000, 168_000, 200_000):
        limit = (size, resource.getrlimit(resource.RLIMIT_FSIZE)[1])
        for force in (False, True):
            done = run(
                *packing.reset(force),
                before=lambda limit=limit: resource.setrlimit(resource.RLIMIT_FSIZE, limit),
            )
            _check_intact(tally, packing, force, done, f"files of at most {size} bytes")
    if why_no_strace():
        return tally.skip("errors of system calls", why_no_strace())
    failures = 0
    names = FAILING if tally.level != "tiny" else ("fsync",)
    for name, number, force in product(names, range(len(ERRORS)), (False, True)):
        # A commit's counts give each call one of the errors, a release's both.
        first = 1 + (number + force) % tally.count(2, 2, 1)
        for k in range(first, 1000, tally.count(4, 2, 1)):
            if not _fail_once(tally, packing, force, name, ERRORS[number], k):
                break
            failures += 1
    tally.check(failures > 0, "no system call was made to fail")
    tally.note(f"{failures} system calls were made to fail")


def _check_small_disks(tally: Tally, packing: Packing) -> None:
    """Pack over records, from a file and from a pipe, where less and less space is left."""
    if not own_mounts():
        return tally.skip("disks of many sizes", "no right to mount; run it under unshare -rm")
    place = packing.target.parent
    packing.reset(False)
    outcomes = set()
    for kib in np.linspace(4, 600, tally.count(4, 10, 40)).astype(int):
        for piped in (False, True):
            taken = sum(-(-file.stat().st_size // 4096) * 4 for file in packing.old.iterdir())
            with mounted(b"tmpfs", place, f"size={taken + kib}k".encode()):
                shutil.copytree(packing.old, packing.target)
                source = subprocess.Popen(
                    ["cat", packing.csv], stdout=subprocess.PIPE, stderr=subprocess.DEVNULL
                )
                assert source.stdout
                if piped:
                    done = run("-", packing.target, "--force", stdin=source.stdout.fileno())
                else:
                    done = run(packing.csv, packing.target, "--force")
                source.stdout.close()
                source.wait()
                outcomes.add(done.code)
                _check_intact(
                    tally,
                    packing,
                    True,
                    done,
                    f"a disk with {kib} KiB left, {'' if piped else 'not '}piped",
                )
    tally.check(outcomes == {0, 2}, f"too small and large enough disks end with {outcomes}")


def _check_intact(tally: Tally, packing: Packing, force: bool, done: Done, what: str) -> None:
    """Refused with all as it was, or done; nothing is left beside it in either case."""
    there = packing.target.exists()
    if done.code == 0:
        good = there and digest(packing.target) == digest(packing.new)
    else:
        good = (
            done.refused
            and there == force
            and (not force or digest(packing.target) == digest(packing.old))
        )
    tally.check(
        good and not beside(packing.target), f"{what}: {done}, beside it {beside(packing.target)}"
    )


def _fail_once(tally: Tally, packing: Packing, force: bool, name: str, error: str, k: int) -> bool:
    """Let the k-th call of a system call fail; false if there are not so many."""
    inject = f"inject={name}:error={error}:when={k}"
    child = Child(*packing.reset(force), strace=("-e", f"trace={name}", "-e", inject))
    done = child.wait()
    calls = _injected_calls(child.trace)
    if not calls:
        return False
    what = f"{error} at {calls[0][:150]}"
    ours = all(
        str(packing.target.parent) in call for call in calls
    )  # else it is the terminal, or a file Python reads
    ended = done.refused or (done.code == 0 and "fsync" not in name)
    tally.check(ended if ours else done.code is not None and done.code >= 0, f"{what}: {done}")
    cleaning = "unlink" in name or re.search(
        r"close\(\d+<[^>]*\.tmp-\w+>", calls[-1]
    )  # the next pack tidies up, then
    if ours and len(calls) == 1 and not cleaning:
        tally.check(not beside(packing.target), f"{what}: left {beside(packing.target)}")
    packing.check(tally, force, what)
    return True


def _injected_calls(trace: str) -> list[str]:
    """The calls that were made to fail: one of each thread at most."""
    begun: dict[str, str] = {}
    calls = []
    for line in trace.splitlines():
        pid, _, call = line.partition(" ")
        if "<unfinished" in call:
            begun[pid] = call
        if "(INJECTED)" in call:
            calls.append(begun.get(pid, "") + call if "resumed>" in call else call)
    return calls


@contextlib.contextmanager
def mounted(kind: bytes, place: Path, options: bytes) -> Iterator[None]:
    if LIBC.mount(kind, os.fsencode(place), kind, 0, options):
        raise OSError(f"{place}: cannot mount {kind!r}")
    try:
        yield
    finally:
        LIBC.umount2(os.fsencode(place), MNT_DETACH)


def packers(tally: Tally) -> None:
    """Eight packers at one target, a holder that dies, and a replacement under a reader."""
    packing = Packing(tally.folder)
    for _ in range(tally.count(1, 10, 50)):
        words = packing.reset(False)
        children = [Child(*words, held=True) for _ in range(PACKERS)]
        for child in children:
            child.go()
        ended = [child.wait() for child in children]
        holders = [f"process {child.pid} is writing" for child in children]
        won = [done for done in ended if done.code == 0]
        lost = [done for done in ended if done.refused]
        told = all(
            "exists; give --force" in done.text or any(h in done.text for h in holders)
            for done in lost
        )
        tally.check(
            len(won) == 1 and len(lost) == PACKERS - 1 and told,
            f"{PACKERS} packers: {[*map(str, ended)]}",
        )
        _check_whole(tally, packing, "eight packers")
        _check_dead_holder(tally, packing)
        _check_reader(tally, packing)


def _check_whole(tally: Tally, packing: Packing, what: str) -> None:
    whole = digest(packing.target) == digest(packing.new) and not beside(packing.target)
    tally.check(
        whole, f"after {what} the records differ, or beside them is {beside(packing.target)}"
    )


def _check_dead_holder(tally: Tally, packing: Packing) -> None:
    words = packing.reset(False)
    holder, feed = _fed_packer(packing)
    second = run(*words)
    tally.check(
        second.refused and f"process {holder.pid} " in second.text,
        f"while {holder.pid} packs: {second}",
    )
    holder.kill()
    holder.wait()
    os.close(feed)
    tally.check(run(*words).code == 0, "the lock outlives its holder")
    _check_whole(tally, packing, "the holder was killed")


def _fed_packer(packing: Packing) -> tuple[Child, int]:
    """A packer that holds its lock and waits for its pipe, and the pipe."""
    source, feed = os.pipe()
    child = Child("-", packing.target, stdin=source, before=lambda: os.close(feed))
    os.close(source)
    os.write(feed, packing.csv.read_bytes()[:5000])
    lock = packing.target.parent / f".{packing.target.name}.lock"
    stop = time.perf_counter() + 5
    while time.perf_counter() < stop and not (lock.exists() and lock.stat().st_size):
        time.sleep(0.001)
    return child, feed


def _check_reader(tally: Tally, packing: Packing) -> None:
    packing.reset(True)
    wanted = open_records(packing.old).split("train")
    reader = open_records(packing.target, in_memory=False).split("train")
    child = Child(packing.csv, packing.target, "--force")
    order = np.random.default_rng(0).permutation(len(reader))
    same = all(
        np.array_equal(reader.image_NHW[rows], wanted.image_NHW[rows])
        for rows in np.array_split(order, 20)
    )
    done = child.wait()
    same &= np.array_equal(reader.image_NHW[:], wanted.image_NHW)
    late = open_records(packing.old, in_memory=False).split("train").image_NHW
    tally.check(
        same and done.code == 0 and len(late) == len(wanted),
        f"a reader of replaced records; the packer: {done}",
    )
    _check_whole(tally, packing, "a replacement under a reader")


def places(tally: Tally) -> None:
    """Other users, permissions, read-only mounts, odd names, and a folder that goes away."""
    packing = Packing(tally.folder)
    fault = tally.folder / "fault.csv"
    fault.write_text("names,labels,1\nF,a,999\n")  # read, it would be refused for its pixel
    _check_permissions(tally, packing, fault)
    _check_read_only_mount(tally, packing, fault)
    if tally.level != "tiny":
        _check_no_cache(tally, packing)
    _check_names(tally, packing)
    for seconds in (0.0, 0.2):  # before and after the pixels' own file is there
        _check_folder_removed(tally, packing, seconds)


def _check_permissions(tally: Tally, packing: Packing, fault: Path) -> None:
    words = packing.reset(False)
    packing.csv.chmod(0o644)
    records = shutil.copytree(packing.old, tally.folder / "read only")
    for path in (*records.iterdir(), records):
        path.chmod(0o555)
    done = run("--verify", records, before=_lower)
    tally.check(done.code == 0, f"read-only records, as another user: {done}")
    records.chmod(0o755)
    (records / "fonts.json").chmod(0)
    done = run("--verify", records, before=_lower)
    _check_refused(tally, done, "records without permission", "fonts.json")
    packing.target.parent.chmod(0o555)
    done = run(fault, packing.target, before=_lower)
    _check_refused(tally, done, "an unwritable folder", "cannot be written")
    done = run(fault, "/proc/records", before=_lower)
    _check_refused(tally, done, "a folder of the system", "cannot be written")
    packing.target.parent.chmod(0o755)
    packing.csv.chmod(0)
    done = run(*words, before=_lower)
    _check_refused(tally, done, "a table without permission", "cannot be read")
    packing.csv.chmod(0o644)


def _check_folder_removed(tally: Tally, packing: Packing, seconds: float) -> None:
    """The folder goes while it is packed into, so long after the lock was taken."""
    packing.reset(False)
    child, feed = _fed_packer(packing)
    time.sleep(seconds)
    shutil.rmtree(packing.target.parent)
    with contextlib.suppress(BrokenPipeError):
        os.write(feed, packing.csv.read_bytes()[5000:])
    os.close(feed)
    done = child.wait()
    whole = done.code == 0 and digest(packing.target) == digest(packing.new)
    tally.check(done.refused or whole, f"the folder removed while it is packed into: {done}")
    tally.note(f"the folder removed {seconds} s after the lock was taken: exit {done.code}")


def _lower() -> None:
    """Become a user without rights, where this one is root, to whom permissions mean nothing."""
    if os.geteuid() == 0:
        os.setgroups([])
        os.setresgid(NOBODY, NOBODY, NOBODY)
        os.setresuid(NOBODY, NOBODY, NOBODY)


def _check_refused(tally: Tally, done: Done, what: str, text: str = "") -> None:
    tally.check(done.refused and done.seconds < REFUSED_S and text in done.text, f"{what}: {done}")


def _check_read_only_mount(tally: Tally, packing: Packing, fault: Path) -> None:
    if not own_mounts():
        return tally.skip("a read-only mount", "no right to mount; run it under unshare -rm")
    packing.reset(True)
    _mount_read_only(packing.target.parent)
    tally.check(run("--verify", packing.target).code == 0, "records on a read-only mount")
    done = run(fault, packing.target.with_name("other"))
    _check_refused(tally, done, "packing to a read-only mount", "Read-only file system")
    LIBC.umount2(os.fsencode(packing.target.parent), MNT_DETACH)


def _check_no_cache(tally: Tally, packing: Packing) -> None:
    """A fresh process that can keep compiled code neither beside the source nor in its home."""
    if not own_mounts():
        return tally.skip(
            "no place for compiled code", "no right to mount; run it under unshare -rm"
        )

    def lock() -> None:
        own_mounts()
        for folder in (ROOT, Path(pwd.getpwuid(os.getuid()).pw_dir)):
            _mount_read_only(folder)

    line = [sys.executable, "-m", "tools.pack_tmnist", *map(str, packing.reset(False))]
    environment = {"PATH": os.environ["PATH"]}
    started = time.perf_counter()
    done = subprocess.run(
        line,
        cwd=ROOT,
        env=environment,
        preexec_fn=lock,
        capture_output=True,
        text=True,
        timeout=120,
    )
    whole = done.returncode == 0 and digest(packing.target) == digest(packing.new)
    tally.check(whole, f"no home, no cache: {done.returncode} {done.stderr[-300:]}")
    tally.note(
        f"without a place for compiled code a pack takes {time.perf_counter() - started:.1f} s"
    )


def own_mounts() -> bool:
    """Give this process mounts of its own, which go with it; false if it may not."""
    return not LIBC.unshare(CLONE_NEWNS) and not LIBC.mount(
        b"none", b"/", None, MS_REC | MS_PRIVATE, None
    )


def _mount_read_only(folder: Path) -> None:
    place = os.fsencode(folder)
    LIBC.mount(place, place, None, MS_BIND | MS_REC, None)
    LIBC.mount(None, place, None, MS_REMOUNT | MS_BIND | MS_RDONLY, None)


def _check_names(tally: Tally, packing: Packing) -> None:
    """Names that must work, and names that must be refused in one line."""
    place = packing.target.parent
    good = {
        "spaces": "a name with  spaces",
        "200 bytes": "n" * 200,
        "UTF-8": "é字😀",
        "a folder that is not UTF-8": os.fsdecode(b"caf\xe9/records"),
        "markup": "<b>${HOME}{0}%n;&",
        "below a link": "link/records",
        "a new folder": "a/b/c",
    }
    bad = {
        "255 bytes": "n" * 255,
        "256 bytes": "n" * 256,
        "a line feed": "a\nb",
        "a control": "a\x1b[31m",
        "..": "x/..",
    }
    for name, out in (good | bad).items():
        packing.reset(False)
        (place / os.fsdecode(b"caf\xe9")).mkdir()
        (place / "real").mkdir()
        (place / "link").symlink_to("real")
        done = run(packing.csv, place / out if name != ".." else f"{place}/{out}")
        if name in bad:
            _check_refused(tally, done, name)
        else:
            tally.check(
                done.code == 0 and digest(place / out) == digest(packing.new), f"{name}: {done}"
            )
            left = [found for found in beside(place / out) if found.startswith(".")]
            tally.check(
                run("--verify", place / out).code == 0 and not left,
                f"{name}: opened again; left {left}",
            )
    done = run(packing.csv, place / os.fsdecode(b"caf\xe9s"))
    tally.check(done.code == 0 or done.refused, f"a name that is not UTF-8: {done}")
    tally.note(f"a target's own name that is not UTF-8: exit {done.code}")
    for name, source in {
        "255 bytes": "s" * 255,
        "not UTF-8": os.fsdecode(b"\xe9.csv"),
        "a line feed": "a\nb",
    }.items():
        packing.reset(False)
        table = shutil.copy(packing.csv, place / source)
        tally.check(run(table, packing.target).code == 0, f"a table's name: {name}")
    _check_ways(tally, packing)


def _check_ways(tally: Tally, packing: Packing) -> None:
    """The same records by a relative path, by ~, and through links."""
    place = packing.target.parent

    def home() -> None:
        os.environ["HOME"] = str(place)
        os.chdir(place)

    for out in ("records", "~/records", "./records/", "../place/records"):
        packing.reset(False)
        done = run(packing.csv, out, before=home)
        tally.check(
            done.code == 0 and digest(packing.target) == digest(packing.new), f"{out}: {done}"
        )
        done = run("--verify", out, before=home)
        tally.check(done.code == 0, f"{out} verified: {done}")
    packing.reset(True)
    (place / "link").symlink_to("records")
    tally.check(run("--verify", place / "link").code == 0, "a link to records")
    done = run(packing.csv, place / "link", "--force")
    same = (
        done.code == 0
        and (place / "link").is_symlink()
        and digest(packing.target) == digest(packing.new)
    )
    tally.check(same, f"replaced through a link: {done}")
    (place / "dangling").symlink_to("nothing")
    _check_refused(tally, run("--verify", place / "dangling"), "a link to nothing")


ROWS: tuple[tuple[str, str, Callable[[Tally], None]], ...] = (
    ("R12", "full disks, limits, and system calls that fail", disks),
    ("R16", "eight packers, a dead holder, a reader", packers),
    ("R17", "permissions, mounts, names and folders that go", places),
)
