"""R10: two nodes on this machine, in a network namespace each, with a torchrun each.

The nodes' only link is a pair of virtual interfaces that the token bucket filter (tbf) shapes. Each
has a cache and a working folder of its own; the disk is the same. Inside, this machine's name means
loopback, as it does in containers.
"""

import ctypes
import json
import os
import re
import shutil
import signal
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from engine.data.pack import pack
from engine.host import ROOT
from tests.reliability.common import LIBC, Done, Tally, glyph_csv
from tests.reliability.torchruns import Torchrun, fork_ranks, is_helper, send
from tests.reliability.training import check_nothing_left, children, until

CLONE_NEWNET = 0x40000000
"""linux/sched.h."""
ADDRESSES = ("10.77.0.1", "10.77.0.2")
PORT = 29400
SHAPE = ("rate", "100mbit", "burst", "64kb", "latency", "50ms")
MOST_MBIT_PER_S = 110
"""The link's rate, and what its bucket lets through at once."""
ENDS_S = 120.0
"""From its start; of this a run takes a tenth, on a machine that is not busy."""
HANGS_S = 5
"""--timeout of the runs that lose a node: the least."""
GRACE_S = 8.0
"""Beyond it: a look a second, torchrun's own end, two busy cores."""
FLAGS = ("--device=cpu", "--out=o", "--kernels=off")
LONG = (
    *FLAGS,
    "--batch-size=8",
    "--epochs=100000",
    "--data=records",
    f"--timeout={HANGS_S}",
    "--resume=auto",
)


class NoNodes(Exception):
    """Why there can be no namespaces here."""


class Nodes:
    """Two namespaces and the link between them; interfaces are called node0 and node1."""

    def __init__(self, folder: Path, shape: tuple[str, ...] = SHAPE) -> None:
        """`shape`: options of tc's tbf."""
        self.shape = shape
        self.names = [f"tmnist-{os.getpid()}-{number}" for number in (0, 1)]
        self.folders = [folder / f"node{number}" for number in (0, 1)]

    def make(self) -> None:
        for name in self.names:
            _command("ip", "netns", "add", name)
        first, second = self.names
        pair = ["type", "veth", "peer", "name", "node1", "netns", second]
        _command("ip", "link", "add", "node0", "netns", first, *pair)
        for number, name in enumerate(self.names):
            interface = f"node{number}"
            address = f"{ADDRESSES[number]}/24"
            _command("ip", "-n", name, "address", "add", address, "dev", interface)
            self.link(number, "up")
            _command("ip", "-n", name, "link", "set", "lo", "up")
            _command("tc", "-n", name, "qdisc", "add", "dev", interface, "root", "tbf", *self.shape)

    def remove(self) -> None:
        for name in self.names:
            subprocess.run(["ip", "netns", "delete", name], capture_output=True)

    def link(self, number: int, state: str) -> None:
        """Pull a node's cable, or put it in."""
        _command("ip", "-n", self.names[number], "link", "set", f"node{number}", state)

    def empty(self) -> None:
        """Folders as on two fresh machines."""
        for folder in self.folders:
            shutil.rmtree(folder, ignore_errors=True)
            folder.mkdir()

    def start(
        self,
        *words: str,
        module: str = "engine.run",
        num_ranks: tuple[int, int] = (1, 1),
        restarts: int = 0,
    ) -> list[Torchrun]:
        """torchrun on each node, for so many ranks."""
        line = [f"--max-restarts={restarts}", "-m", module, *words]
        options = [[f"--nproc-per-node={each}", *line] for each in num_ranks]
        return [self._start(number, options[number]) for number in (0, 1)]

    def _start(self, number: int, words: list[str]) -> Torchrun:
        def prepare() -> None:
            with open(f"/run/netns/{self.names[number]}", "rb") as space:
                assert LIBC.setns(space.fileno(), CLONE_NEWNET) == 0, ctypes.get_errno()
            os.chdir(self.folders[number])
            cache = str(self.folders[number] / "cache")
            paths = {"PYTHONPATH": str(ROOT), "XDG_CACHE_HOME": cache}
            os.environ |= paths | {"OMP_NUM_THREADS": "1"}
            fork_ranks()

        meeting = [
            "--rdzv-backend=c10d",
            f"--rdzv-endpoint={ADDRESSES[0]}:{PORT}",
            f"--rdzv-conf=is_host={int(number == 0)}",
            f"--local-addr={ADDRESSES[number]}",
        ]
        return Torchrun("--nnodes=2", "--monitor-interval=0.1", *meeting, *words, before=prepare)


def _command(*words: str) -> None:
    """Run ip or tc.

    Raises:
        NoNodes: it is not here, or refuses.
    """
    try:
        done = subprocess.run(words, capture_output=True, text=True)
    except OSError as error:
        raise NoNodes(f"{words[0]}: {error.strerror} (install iproute2)") from None
    if done.returncode:
        raise NoNodes(f"{' '.join(words)}: {done.stderr.strip()}")


@contextmanager
def two_nodes(tally: Tally) -> Iterator[Nodes | None]:
    """The nodes, or None and a skip where there can be none; in CI that is a failure."""
    nodes = Nodes(tally.folder)
    try:
        nodes.make()
    except NoNodes as error:
        tally.skip("two nodes", f"{error}; run it as root")
        if os.environ.get("CI") == "true":
            tally.check(False, f"CI must have network namespaces: {error}")
        nodes.remove()
        yield None
        return
    try:
        yield nodes
    finally:
        nodes.remove()


def said(done: Done) -> list[str]:
    """The sentences of a node's output."""
    return re.findall(r"^error: (.*)$", done.text, re.MULTILINE)


def train(tally: Tally) -> None:
    """A run from its start to its end, and one in which the second node lacks something."""
    with two_nodes(tally) as nodes:
        if nodes is None:
            return
        nodes.empty()
        runs = nodes.start(*FLAGS, "--batch-size=1024", "--epochs=1")
        done = [run.wait(ENDS_S) for run in runs]
        what = f"a run on two nodes: {'; '.join(map(str, done))}"
        tally.check([each.code for each in done] == [0, 0], what)
        packed = ["packing the sample" in each.text for each in done]
        tally.check(packed == [True, True], f"{what}: each packs the sample for itself")
        report = json.loads((nodes.folders[0] / "o" / "report.json").read_text())
        good = report["num_ranks"] == 2 and report["status"] == "finished"
        tally.check(good, f"{what}: {report['status']}, {report['num_ranks']} ranks")
        nodes.empty()
        (nodes.folders[1] / "cache").touch()  # a file, no folder
        done = [run.wait(ENDS_S) for run in nodes.start(*FLAGS)]
        for number, each in enumerate(done):
            found = said(each)
            good = len(found) == 1 and found[0].startswith("rank 1: ") and "cache" in found[0]
            tally.check(good and each.code != 0, f"no cache on node 1, node {number}: {each}")


def examine(tally: Tally) -> None:
    """tools/verify doctor --nodes: what each node says, and what both find out together."""
    with two_nodes(tally) as nodes:
        if nodes is None:
            return
        nodes.empty()
        for number, folder in enumerate(nodes.folders):
            pack(glyph_csv(folder / "some.csv", 200, 12, seed=number), folder / "records")
        words = ("doctor", "--nodes", f"--rendezvous={ADDRESSES[0]}:{PORT}", "--device=cpu")
        runs = nodes.start(*words, "--data=records", module="tools.verify")
        done = [run.wait(ENDS_S) for run in runs]
    wanted = ("ok    MASTER_ADDR", "ok    versions", "ok    clocks", "ok    all-reduce")
    hosts = ("note  is_host              10.77.0.1 is this node, but", "ok    reachable")
    for number, each in enumerate(done):
        what = f"doctor --nodes, node {number}: {each.text[-1500:]}"
        tally.check(all(text in each.text for text in (*wanted, hosts[number])), what)
        differ = r"BAD   data +rank 0: \w+; rank 1: \w+; pack or copy the same"
        tally.check(each.code == 1 and re.search(differ, each.text) is not None, what)
        rate = re.search(r"([\d,]+) Mbit/s each way", each.text)
        good = rate is not None and 50 < int(rate[1].replace(",", "")) < MOST_MBIT_PER_S
        tally.check(good, f"{what}: faster than the link")


def lose(tally: Tally) -> None:
    """The link is cut, or all processes of a node die: the other ends and names who is missing."""
    with two_nodes(tally) as nodes:
        if nodes is None:
            return
        _cut(tally, nodes)
        for number in (0, 1)[: tally.count(1, 1, 2)]:
            _kill(tally, nodes, number)
        for number in (1, 0)[: tally.count(0, 1, 2)]:
            _start_again(tally, nodes, number)
        for _ in range(tally.count(0, 0, 3)):
            _come_back(tally, nodes)


def _training(
    nodes: Nodes, num_ranks: tuple[int, int] = (1, 1), restarts: int = 0
) -> list[Torchrun]:
    """A run on both nodes, some epochs after its first checkpoint."""
    nodes.empty()
    for folder in nodes.folders:
        pack(glyph_csv(folder / "some.csv", 200, 12), folder / "records")
    runs = nodes.start(*LONG, num_ranks=num_ranks, restarts=restarts)
    assert until(lambda: _num_epochs(nodes) >= 5, list(runs)), "the run does not train"
    return runs


def _num_epochs(nodes: Nodes) -> int:
    lines = nodes.folders[0] / "o" / "metrics.jsonl"
    return lines.read_text().count("\n") if lines.exists() else 0


def _cut(tally: Tally, nodes: Nodes) -> None:
    """One rank on the first node, two on the other: each side names all that it misses."""
    runs = _training(nodes, (1, 2))
    nodes.link(0, "down")
    start_s = time.perf_counter()
    done = [run.wait(ENDS_S) for run in runs]
    took_s = time.perf_counter() - start_s
    nodes.link(0, "up")
    what = f"the link was cut: {'; '.join(map(str, done))}"
    good = took_s < HANGS_S + GRACE_S and 0 not in (each.code for each in done)
    tally.check(good, f"{what} after {took_s:.1f} s")
    cut_off = "the ranks' store, on the machine of rank 0, has not answered for"
    sentences = ("ranks 1 and 2: have been silent for", cut_off)
    for each, sentence in zip(done, sentences, strict=True):
        found = said(each)
        tally.check(len(found) == 1 and found[0].startswith(sentence), f"{what}: says {found}")
    check_nothing_left(tally, what)
    tally.note(f"both nodes had ended {took_s:.1f} s after the link was cut, --timeout {HANGS_S}")


def _start_again(tally: Tally, nodes: Nodes, number: int) -> None:
    """A rank is killed: its torchrun counts a restart, the other one starts again with it."""
    runs = _training(nodes, restarts=3)
    old = _ranks(runs[0])
    send(_ranks(runs[number])[0], signal.SIGKILL)
    _check_goes_on(tally, nodes, runs, old, f"a rank of node {number} was killed")


def _come_back(tally: Tally, nodes: Nodes) -> None:
    """The network is away for twice the time-out; torchruns that may start again go on by then."""
    runs = _training(nodes, restarts=3)
    old = _ranks(runs[0])
    nodes.link(0, "down")
    time.sleep(2 * HANGS_S)
    nodes.link(0, "up")
    _check_goes_on(tally, nodes, runs, old, "the network came back")


def _check_goes_on(
    tally: Tally, nodes: Nodes, runs: list[Torchrun], old: list[int], what: str
) -> None:
    """Other ranks than `old` train on node 0, from where those stopped; then they are stopped."""
    start_s = time.perf_counter()
    until(lambda: bool(found := _ranks(runs[0])) and found != old, list(runs))
    before = _num_epochs(nodes)
    went_on = until(lambda: _num_epochs(nodes) > before, list(runs))
    took_s = time.perf_counter() - start_s
    for run in runs:
        send(run.pid, signal.SIGTERM)
    done = [run.wait(ENDS_S) for run in runs]
    ended = f"{what}: {'; '.join(map(str, done))}"
    tally.check(went_on and "resumed after" in done[0].text, ended)
    check_nothing_left(tally, ended)
    tally.note(f"{what}: the run had gone on {took_s:.1f} s later")


def _kill(tally: Tally, nodes: Nodes, number: int) -> None:
    """SIGKILL of all that runs on a node, as where it runs out of memory."""
    runs = _training(nodes)
    for pid in (*_ranks(runs[number]), runs[number].pid):
        send(pid, signal.SIGKILL)
    start_s = time.perf_counter()
    runs[number].wait()
    done = runs[1 - number].wait(ENDS_S)
    took_s = time.perf_counter() - start_s
    what = f"node {number} died: {done}"
    tally.check(done.code != 0 and took_s < HANGS_S + GRACE_S, f"{what} after {took_s:.1f} s")
    found = said(done)
    good = len(found) == 1 and found[0].startswith(f"rank {number}: has ended without a word")
    tally.check(good, f"{what}: says {found}")
    check_nothing_left(tally, what)


def _ranks(run: Torchrun) -> list[int]:
    return [pid for pid in children(run.pid) if not is_helper(pid)]


ROWS = (
    ("R10", "two nodes over a shaped link train and say errors", train),
    ("R10", "doctor --nodes on two nodes with other records", examine),
    ("R10", "a cut link, a dead node: the others end, and name it", lose),
)
