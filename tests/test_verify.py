"""tools/verify: it finds what is bad, and passes what is the same training."""

import socket
from dataclasses import replace
from typing import Any

import pytest
import torch

from engine.data.records import Records
from engine.network import Interface, interfaces
from engine.world import World
from tests.conftest import Command, assert_refused
from tests.test_launches import session
from tools.checks import doctor as examined
from tools.checks import nodes
from tools.checks.doctor import doctor, host_reads
from tools.checks.parity import GROUPS, Verdict, differences

CPU = torch.device("cpu")


@pytest.mark.slow
def test_bare_it_examines_the_machine_and_compares_every_way_of_training(command: Command) -> None:
    done = command("tools/verify", "--device", "cpu")
    assert done.returncode == 0, done.stdout + done.stderr
    lines = done.stdout.splitlines()
    assert any(line.startswith("ok    hidden waits") for line in lines)
    exact = [line for line in lines if line.endswith("equal to the bit")]
    near = [line for line in lines if line.endswith("within tolerance")]
    assert {line[:36].strip() for line in exact} >= {
        "eager, again",
        "4 steps per launch, not captured",
        "resumed at an epoch's end",
        "resumed, 4 steps per launch",
        "torchrun, 1 rank",
        "torchrun, 1 rank, --canonical 4",
        "2 ranks, --canonical 4",
        "4 ranks, --canonical 4",
    }
    assert {line[:36].strip() for line in near} >= {
        "2 ranks, 4 steps per launch",
        "4 ranks, each batch in 2 parts",
        "2 ranks, 4 steps per launch, FSDP",
        "4 ranks, each batch in 2 parts, FSDP",
    }
    assert (
        "one CUDA graph of 4 steps (fp32): not tried, there is no GPU" in lines
        and "DIFFERS" not in done.stdout
    )


def test_a_hidden_wait_is_found(small: Records, world: World) -> None:
    opened = session(small, world)
    assert host_reads(opened.step.train_epoch(opened.feed, 0), CPU) == []
    opened.step.model.register_forward_hook(
        lambda module, inputs, output: print(float(output.detach().mean()))
    )
    assert host_reads(opened.step.train_epoch(opened.feed, 0), CPU) == ["_local_scalar_dense"]
    opened.close()


def findings(
    records: Records, world: World, environ: dict[str, str]
) -> dict[str, examined.Finding]:
    return {finding.name: finding for finding in doctor(records, world, environ)}


def test_harmful_settings_are_named_with_a_remedy(
    small: Records, world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert findings(small, world, {})["environment"].grade == "ok"
    found = findings(
        small,
        world,
        {"CUDA_LAUNCH_BLOCKING": "1", "NVIDIA_TF32_OVERRIDE": "0", "NCCL_BLOCKING_WAIT": "0"},
    )
    assert (
        found["CUDA_LAUNCH_BLOCKING"].grade == "BAD"
        and "unset it" in found["CUDA_LAUNCH_BLOCKING"].text
    )
    assert found["NVIDIA_TF32_OVERRIDE"].grade == "note"
    assert "NCCL_BLOCKING_WAIT" not in found and "environment" not in found
    assert found["allocator"].grade == "note" and found["hidden waits"].grade == "ok"
    assert findings(small, replace(world, allocator="glibc"), {})["allocator"].grade == "ok"
    versions = {"torch": "2.10.0+cu126", "triton": "3.6.0"}

    def version(package: str) -> str:
        if package not in versions:
            raise examined.PackageNotFoundError
        return versions[package]

    monkeypatch.setattr(examined, "version", version)
    found = findings(small, world, {})
    assert found["torch"].grade == "BAD" and "2.10.0+cu126: tested from 2.11" in found["torch"].text
    assert found["triton"].grade == "ok" and found["numpy"].grade == "BAD"
    assert found["nvidia-dali-cuda120"].grade == "note"


def test_a_bad_finding_ends_with_1(command: Command) -> None:
    done = command("tools/verify", "doctor", "--device", "cpu", TORCH_DISTRIBUTED_DEBUG="DETAIL")
    assert done.returncode == 1 and "BAD   TORCH_DISTRIBUTED_DEBUG" in done.stdout


LO = Interface("lo", ("127.0.0.1",), True, 65536)
ETH = Interface("eth0", ("10.0.0.1",), True, 1500)
FABRIC = Interface("ib0", ("10.1.0.1",), True, 4096)
DOWN = Interface("eth1", ("10.2.0.1",), False, 1500)
DOCKER = Interface("docker0", ("172.17.0.1",), True, 1500)
VIRBR = Interface("virbr0", ("192.168.122.1",), True, 1500)


def test_a_node_alone_says_how_others_would_meet_it(
    command: Command, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(socket, "getfqdn", lambda: "localhost")
    has_network = any(each.is_running and not each.is_loopback for each in interfaces())
    done = command("tools/verify", "doctor", "--nodes", "--device", "cpu")
    assert done.returncode == (not has_network), done.stdout + done.stderr
    assert (
        "torchrun would say localhost, which is every node itself; give it --local" in done.stdout
    )
    found = [line[6:27].strip() for line in done.stdout.splitlines()]
    assert {"interfaces", "MASTER_ADDR", "gloo", "NCCL"} <= set(found)
    here = ("tools/verify", "doctor", "--nodes", "--rendezvous")
    done = command(*here, "localhost:29400")
    assert done.returncode == 1 and "BAD   rendezvous           localhost is every" in done.stdout
    done = command(*here, "10.0.0.1:99999999")
    assert_refused(done, "is not HOST:PORT; write 10.0.0.1:29400")
    assert_refused(command("tools/verify", "doctor", "--data", "x"), "give --nodes, too")
    done = command("tools/verify", "doctor", "--nodes", GLOO_SOCKET_IFNAME="none0")
    assert done.returncode == 1 and "none0 is not there or down; there are" in done.stdout


def test_who_opens_the_store_is_found_or_must_be_said() -> None:
    assert nodes.host_finding("a", is_own=True, takes_it=True).grade == "ok"
    assert nodes.host_finding("a", is_own=False, takes_it=False).grade == "ok"
    finding = nodes.host_finding("a", is_own=True, takes_it=False)
    assert finding.grade == "note" and "without --rdzv-conf is_host=1 here" in finding.text
    finding = nodes.host_finding("a", is_own=False, takes_it=True)
    assert finding.grade == "note" and "give --rdzv-conf is_host=0 here" in finding.text


@pytest.mark.parametrize(
    ("there", "chosen", "wanted"),
    [
        ((LO, ETH, DOWN), "", "eth0"),
        ((LO, VIRBR, ETH), "", "eth0"),
        ((LO, VIRBR, DOCKER), "", "docker0"),
        ((LO, VIRBR), "", "lo"),
        ((DOWN,), "", ""),
        ((LO, ETH, FABRIC), "", "ib0"),
        ((LO, ETH, FABRIC), "eth", "eth0"),
        ((LO, ETH, FABRIC), "^lo,ib", "eth0"),
        ((LO, ETH, FABRIC), "=eth", ""),
        ((LO, ETH, FABRIC), "^=eth0", "lo ib0"),
    ],
)
def test_nccl_takes_the_interfaces_that_its_variable_means(
    there: tuple[Interface, ...], chosen: str, wanted: str
) -> None:
    found = nodes.nccl_interfaces(list(there), chosen)
    assert " ".join(each.name for each in found) == wanted


def test_nodes_that_are_not_alike_are_named() -> None:
    same = {"torch": "2.13.0", "numpy": "2.4.6"}
    assert [each.grade for each in nodes.alike([same, same])] == ["ok"]
    found = nodes.alike([same, same, same | {"torch": "2.12.0"}])
    assert found == [
        ("BAD", "torch", "ranks 0 and 1: 2.13.0; rank 2: 2.12.0; install the same everywhere")
    ]


def test_a_precision_that_cannot_be_had_is_refused(command: Command) -> None:
    done = command("tools/verify", "parity", "--device", "cpu", "--precision", "tf32")
    assert_refused(done, "TF32 is not used", "name another --precision")


@pytest.mark.parametrize("group", GROUPS)
def test_a_difference_is_not_overlooked(group: str) -> None:
    wanted = {name: torch.arange(1.0, 100.0, dtype=torch.float64) for name in GROUPS}
    for change, exact, inexact in ((0.0, True, True), (1e-9, False, True), (0.2, False, False)):
        got = wanted | {group: wanted[group] * (1 + change)}
        verdicts = [
            Verdict("fp32", "", differences(got, wanted), near).ok for near in (False, True)
        ]
        assert verdicts == [exact, inexact and not (change and group in ("scaler", "counters"))], (
            change
        )
    for damaged in (
        {k: v for k, v in wanted.items() if k != group},
        wanted | {group: wanted[group][:-1]},
    ):
        assert differences(damaged, wanted)[group] == float("inf")
    spoilt: dict[str, Any] = wanted | {group: wanted[group].clone().fill_(float("nan"))}
    assert not Verdict("fp32", "", differences(spoilt, wanted), True).ok
