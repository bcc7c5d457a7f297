"""This machine's interfaces as the kernel tells them, and what names mean on it."""

import os
import shutil
import socket
import subprocess

import pytest

from engine.host import env_meeting_place, env_num_machines, is_last_try
from engine.network import (
    Interface,
    addresses_of,
    interfaces,
    means_only_here,
    own_address,
    way_to,
)
from engine.ranks import _choose_interface

ETH = Interface("eth0", ("10.0.0.1",), True, 1500)


def test_interfaces_are_those_that_ip_shows() -> None:
    there = {each.name: each for each in interfaces()}
    assert there["lo"].is_loopback and "127.0.0.1" in there["lo"].addresses
    assert there["lo"].is_running and there["lo"].mtu_bytes > 1000
    if not shutil.which("ip"):
        return
    shown = subprocess.run(["ip", "-o", "address"], capture_output=True, text=True).stdout
    words = [line.split() for line in shown.splitlines()]
    wanted = {(line[1], line[3].partition("/")[0]) for line in words if line[2][:4] == "inet"}
    assert {(each.name, text) for each in there.values() for text in each.addresses} == wanted


def test_what_names_mean() -> None:
    assert means_only_here("localhost") and means_only_here("127.0.1.1") and means_only_here("::1")
    assert not means_only_here("192.0.2.1")
    nothing = "no such name.invalid"
    assert addresses_of(nothing) == [] and not means_only_here(nothing)
    loopback = way_to("127.0.0.1")
    assert loopback and loopback.name == "lo"
    assert way_to("no such name.invalid") is None


def test_an_own_address_is_one_that_can_be_bound(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, wanted in (("localhost", "127.0.0.1"), ("192.0.2.7", ""), ("127.0.1.1", "127.0.1.1")):
        monkeypatch.setattr(socket, "gethostname", lambda name=name: name)
        assert own_address() in (wanted, "::1" if name == "localhost" else wanted)


@pytest.mark.parametrize(
    ("num_machines", "own", "meeting", "given", "wanted"),
    [
        (2, "127.0.0.1", "10.0.0.9", "", "eth0"),
        (2, "", "10.0.0.9", "", "eth0"),
        (2, "127.0.0.1", "10.0.0.9", "ib0", "ib0"),
        (2, "10.0.0.1", "10.0.0.9", "", ""),
        (2, "127.0.0.1", "localhost", "", ""),
        (1, "127.0.0.1", "10.0.0.9", "", ""),
    ],
)
def test_gloo_goes_by_the_meeting_place_where_the_own_name_is_of_no_use(
    num_machines: int,
    own: str,
    meeting: str,
    given: str,
    wanted: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("engine.ranks.own_address", lambda: own)
    monkeypatch.setattr("engine.ranks.way_to", lambda address: ETH)
    monkeypatch.setenv("GROUP_WORLD_SIZE", str(num_machines))
    monkeypatch.setenv("MASTER_ADDR", meeting)
    monkeypatch.setenv("GLOO_SOCKET_IFNAME", given)
    if not given:
        monkeypatch.delenv("GLOO_SOCKET_IFNAME")
    _choose_interface()
    found = os.environ.get("GLOO_SOCKET_IFNAME", "")
    monkeypatch.delenv("GLOO_SOCKET_IFNAME", raising=False)
    assert found == wanted


def test_what_torchrun_tells_a_rank(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("GROUP_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"):
        monkeypatch.delenv(name, raising=False)
    assert env_num_machines() == 1 and env_meeting_place() == ("", "")
    monkeypatch.delenv("TORCHELASTIC_RUN_ID", raising=False)
    assert not is_last_try(), "nothing would start it again, but there is no torchrun to end"
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "x")
    monkeypatch.setenv("TORCHELASTIC_MAX_RESTARTS", "3")
    for count, wanted in (("0", False), ("2", False), ("3", True)):
        monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", count)
        assert is_last_try() is wanted
