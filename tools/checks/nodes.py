"""tools/verify doctor --nodes: whether several nodes can meet, are alike, and how fast they talk.

Alone, a node says what torchrun, gloo and NCCL would make of its name and interfaces. Under
torchrun on every node (`torchrun --nnodes 2 ... -m tools.verify doctor --nodes`) all compare what
they are made of and measure clocks and all-reduces. No setting is changed. Whether training is
fast on each is the plain doctor's question.

    R ranks
"""

import json
import os
import socket
import time
from collections import defaultdict
from collections.abc import Iterator, Mapping
from importlib.metadata import PackageNotFoundError, version

import torch
import torch.distributed as dist

from engine.errors import UserError
from engine.heart import named
from engine.host import env_local_rank, env_meeting_place, env_num_machines
from engine.meeting import GIVE_ADDRESS
from engine.network import (
    Interface,
    addresses_of,
    interfaces,
    means_only_here,
    own_address,
    way_to,
)
from engine.ranks import Ranks
from engine.report import git_state
from engine.world import World
from tools.checks.doctor import LOWEST, Finding, graded
from tools.measure.link import LONGEST_S, collective_s

PORT = 29400
"""torchrun's default for the rendezvous backend c10d."""
CONNECT_S = 2.0
GLOO = "GLOO_SOCKET_IFNAME"
NCCL = "NCCL_SOCKET_IFNAME"
NUM_PINGS = 20
SKEW_S = 0.5
"""Beyond it the lines of two nodes' logs can no longer be laid side by side."""
SIZES_BYTES = (4 * 2**10, 64 * 2**10, 2**20, 16 * 2**20, 64 * 2**20)


def alone(
    rendezvous: str, device_name: str, environ: Mapping[str, str] = os.environ
) -> Iterator[Finding]:
    """What this node can say by itself.

    Args:
        rendezvous: HOST:PORT as torchrun's --rdzv-endpoint has it; "": not looked at.
        device_name: "cpu" or "cuda"; empty: CUDA where there is a GPU.
    Raises:
        UserError: `rendezvous` is no such thing.
    """
    there = interfaces()
    yield _interfaces(there)
    yield _meeting_place(there)
    if rendezvous:
        yield from _rendezvous(rendezvous, there)
    yield _gloo(there, environ)
    on_gpu = torch.cuda.is_available() and device_name != "cpu"
    yield _nccl(there, environ, on_gpu)


def together(ranks: Ranks, world: World, fingerprint: str) -> Iterator[Finding]:
    """What all nodes find out together. Collective; the same findings on every rank."""
    texts = ranks.texts_of_all("versions", json.dumps(_versions()))
    yield from alike([json.loads(text) for text in texts])
    text = _differing(ranks.texts_of_all("fingerprint", fingerprint))
    same = f"the same records on all ranks, {fingerprint[:12]}"
    yield graded(not text, "data", f"{text}; pack or copy the same" if text else same, "BAD")
    yield _clocks(world)
    yield _all_reduce(world)


def _interfaces(there: list[Interface]) -> Finding:
    others = _usable(there)
    texts = [f"{each.name} {each.addresses[0]} (packets of {each.mtu_bytes} B)" for each in others]
    none = "none but loopback is up; bring one up"
    return graded(bool(others), "interfaces", "; ".join(texts) or none, "BAD")


def _usable(there: list[Interface]) -> list[Interface]:
    """Those by which other nodes may be reached: docker's and libvirt's bridges stay within."""
    inner = ("docker", "virbr")
    up = [each for each in there if each.is_running and not each.is_loopback]
    return [each for each in up if not each.name.startswith(inner)] or up


def _meeting_place(there: list[Interface]) -> Finding:
    """Where the ranks meet: what torchrun told them, else what it would tell them."""
    told, _ = env_meeting_place()
    if env_num_machines() > 1:
        good = not means_only_here(told)
        text = told if good else f"torchrun says {told}, which is every node itself; {GIVE_ADDRESS}"
        return graded(good, "MASTER_ADDR", text, "BAD")
    name = socket.getfqdn()
    if addresses_of(name) and not means_only_here(name):
        found = ", ".join(addresses_of(name))
        return Finding("ok", "MASTER_ADDR", f"torchrun would say {name}: {found}")
    own = [each.addresses[0] for each in _usable(there)]
    remedy = f"give it --local-addr {' or '.join(own) or 'with an address of this node'}"
    what = "is every node itself" if addresses_of(name) else "means nothing here"
    why = f"torchrun would say {name}, which {what}"
    return Finding("note", "MASTER_ADDR", f"{why}; {remedy}")


def _rendezvous(endpoint: str, there: list[Interface]) -> Iterator[Finding]:
    """Whether torchrun takes the right node for the one that opens the rendezvous' store."""
    from torch.distributed.elastic.rendezvous import utils

    try:
        host, port = utils.parse_rendezvous_endpoint(endpoint, PORT)
    except ValueError:
        raise UserError(
            f"--rendezvous {endpoint}: is not HOST:PORT; write 10.0.0.1:29400"
        ) from None
    found = addresses_of(host)
    if not found or means_only_here(host):
        what = "is every node itself" if found else "means nothing here"
        remedy = "give an address of the first node that all nodes reach"
        yield Finding("BAD", "rendezvous", f"{host} {what}; {remedy}")
        return
    is_own = any(set(found) & set(each.addresses) for each in there)
    try:
        yield host_finding(host, is_own, bool(utils._matches_machine_hostname(host)))
    except socket.gaierror:
        what = f"this node's name, {socket.gethostname()}, means nothing here: torchrun fails on it"
        remedy = f"--rdzv-conf is_host={int(is_own)} goes around it"
        yield Finding("BAD", "is_host", f"{what}; put it into /etc/hosts, or {remedy}")
    if not is_own:
        yield _reachable(host, port)


def host_finding(host: str, is_own: bool, takes_it: bool) -> Finding:
    """Whether is_host must be set.

    Args:
        is_own: whether an interface of this node has the address.
        takes_it: whether torchrun, which goes by the node's name, would think so.
    """
    if is_own == takes_it:
        who = "this node opens the store" if is_own else "another node opens the store"
        return Finding("ok", "is_host", f"{who} at {host}, and torchrun finds so by itself")
    if is_own:
        text = (
            f"{host} is this node, but its name does not say so: without --rdzv-conf is_host=1 "
            "here and is_host=0 elsewhere all wait 60 s for a store that nobody opens"
        )
    else:
        text = f"{host} is not this node, though its name says so; give --rdzv-conf is_host=0 here"
    return Finding("note", "is_host", text)


def _reachable(host: str, port: int) -> Finding:
    place = f"{host}:{port}"
    try:
        socket.create_connection((host, port), CONNECT_S).close()
    except ConnectionRefusedError:
        text = f"{place} is reached, nobody listens yet; start torchrun there"
        return Finding("note", "reachable", text)
    except OSError as error:
        why = error.strerror or str(error)
        return Finding("BAD", "reachable", f"{place} is not ({why}); check the route, the firewall")
    return Finding("ok", "reachable", place)


def _gloo(there: list[Interface], environ: Mapping[str, str]) -> Finding:
    """Which address gloo tells the other ranks."""
    if chosen := environ.get(GLOO, ""):
        names = {each.name for each in there if each.is_running}
        wrong = [name for name in chosen.split(",") if name not in names]
        text = f"takes {chosen} ({GLOO})"
        if wrong:
            text += f": {wrong[0]} is not there or down; there are {', '.join(sorted(names))}"
        return graded(not wrong, "gloo", text, "BAD")
    address = own_address()
    if address and not means_only_here(address):
        way = way_to(address)
        return Finding("ok", "gloo", f"takes {way.name if way else 'an interface'}, {address}")
    what = "this node's name is of no use to others: a run takes the interface towards MASTER_ADDR"
    return Finding("ok", "gloo", f"{what}; {GLOO} decides otherwise")


def _nccl(there: list[Interface], environ: Mapping[str, str], on_gpu: bool) -> Finding:
    chosen = environ.get(NCCL, "")
    found = [each.name for each in nccl_interfaces(there, chosen)]
    if not on_gpu:
        taken = ", ".join(found) or "none"
        return Finding(
            "note", "NCCL", f"not used without a GPU; of the interfaces it takes {taken}"
        )
    if not found:
        why = f"{NCCL}={chosen} leaves no interface; correct or unset it"
        return Finding("BAD", "NCCL", why if chosen else "no interface is up; bring one up")
    text = f"takes {', '.join(found)}"
    several = len(found) > 1 and not chosen
    return graded(not several, "NCCL", text + f"; {NCCL} leaves the others out" * several)


def nccl_interfaces(there: list[Interface], chosen: str) -> list[Interface]:
    """Those that NCCL takes for its sockets.

    Args:
        chosen: NCCL_SOCKET_IFNAME: beginnings of names with commas between; after ^ what is left
            out; after = whole names. "": ib... if there is one, else all but docker..., lo and
            virbr..., else the first of these (ncclFindInterfaces in NCCL's src/misc/socket.cc).
    """
    up = [each for each in there if each.is_running]
    if not chosen:
        last = ("docker", "lo", "virbr")
        fabric = [each for each in up if each.name.startswith("ib")]
        usual = [each for each in up if not each.name.startswith(last)]
        others = ([each for each in up if each.name.startswith(name)] for name in last)
        return next(filter(None, (fabric, usual, *others)), [])
    is_left_out = chosen.startswith("^")
    is_whole = chosen.lstrip("^").startswith("=")
    names = tuple(name for name in chosen.lstrip("^=").split(",") if name)

    def matches(name: str) -> bool:
        return name in names if is_whole else name.startswith(names)

    return [each for each in up if matches(each.name) != is_left_out]


def _versions() -> dict[str, str]:
    found = {"commit": git_state()[0]}
    for package in LOWEST:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            found[package] = "not installed"
    if torch.cuda.is_available():
        found["NCCL"] = ".".join(map(str, torch.cuda.nccl.version()))
    return found


def alike(versions_R: list[dict[str, str]]) -> list[Finding]:
    """Whether all ranks have the same versions; each difference is a finding."""
    names = dict.fromkeys(name for versions in versions_R for name in versions)
    found = {name: _differing([each.get(name, "none") for each in versions_R]) for name in names}
    different = [
        Finding("BAD", name, f"{text}; install the same everywhere")
        for name, text in found.items()
        if text
    ]
    equal = ", ".join(f"{name} {value[:12]}" for name, value in versions_R[0].items())
    return different or [Finding("ok", "versions", f"equal on all ranks: {equal}")]


def _differing(value_R: list[str]) -> str:
    """Which ranks have what, as a sentence; "" if all have the same."""
    ranks_of = defaultdict(list)
    for rank, value in enumerate(value_R):
        ranks_of[value].append(rank)
    if len(ranks_of) == 1:
        return ""
    return "; ".join(f"{named(ranks)}: {value}" for value, ranks in ranks_of.items())


def _clocks(world: World) -> Finding:
    """How far the nodes' clocks are from that of rank 0, as a time server's client asks."""
    offset_R = torch.zeros(world.size, dtype=torch.float64)
    doubt_R = torch.zeros(world.size, dtype=torch.float64)
    is_first_here = torch.zeros(world.size, dtype=torch.float64)
    is_first_here[world.rank] = env_local_rank() == 0
    firsts = world.sum(is_first_here).nonzero().flatten().tolist()
    for rank in firsts[1:]:
        if world.is_first:
            offset_R[rank], doubt_R[rank] = _ask(rank, world)
        elif rank == world.rank:
            _answer(world)
    offset_s = world.sum(offset_R).tolist()
    doubt_s = world.sum(doubt_R).tolist()
    if not firsts[1:]:
        return Finding("ok", "clocks", "all ranks are on one node")
    furthest = max(firsts[1:], key=lambda rank: abs(offset_s[rank]))
    skew_s = offset_s[furthest]
    text = f"rank {furthest} is {skew_s * 1e3:+.2f} ms from rank 0, "
    text += f"give or take {doubt_s[furthest] * 1e3:.2f} ms"
    good = abs(skew_s) <= SKEW_S
    remedy = "; logs cannot be laid side by side: run an NTP client"
    return graded(good, "clocks", text + remedy * (not good))


def _ask(rank: int, world: World) -> tuple[float, float]:
    """(offset, doubt) in seconds of another rank's clock, by the quickest of some answers."""
    found = []
    theirs = torch.zeros(1, dtype=torch.float64)
    for _ in range(NUM_PINGS):
        sent_s = time.time()
        dist.send(theirs, rank, group=world.hosts)
        dist.recv(theirs, rank, group=world.hosts)
        took_s = time.time() - sent_s
        found.append((took_s / 2, float(theirs) - sent_s - took_s / 2))
    doubt_s, offset_s = min(found)
    return offset_s, doubt_s


def _answer(world: World) -> None:
    mine = torch.zeros(1, dtype=torch.float64)
    for _ in range(NUM_PINGS):
        dist.recv(mine, 0, group=world.hosts)
        mine[0] = time.time()
        dist.send(mine, 0, group=world.hosts)


def _all_reduce(world: World) -> Finding:
    """The time of an all-reduce over its size, and what the largest comes to per second."""
    texts = []
    for num_bytes in SIZES_BYTES:
        took_s = collective_s("all-reduce", num_bytes, world)
        texts.append(f"{_size(num_bytes)} {took_s * 1e3:,.2f} ms")
        if took_s > LONGEST_S:
            break
    # a ring sends and receives 2 (n - 1) / n of the bytes on each rank
    mbit_per_s = 2 * (world.size - 1) / world.size * num_bytes * 8 / took_s / 1e6
    text = f"{', '.join(texts)}; {mbit_per_s:,.0f} Mbit/s each way at the last"
    return Finding("ok", "all-reduce", text)


def _size(num_bytes: int) -> str:
    if num_bytes >= 2**20:
        return f"{num_bytes // 2**20} MiB"
    return f"{num_bytes // 2**10} KiB"
