"""What can be had where, and what is said when it cannot."""

from dataclasses import replace
from typing import Any

import pytest
import torch

from engine.config import OptimConfig, RunConfig, StepConfig
from engine.data.records import Records
from engine.errors import UserError
from engine.train import available
from engine.train.available import effective_config
from engine.world import World, check_ranks
from tests.conftest import Command


def effective(
    records: Records, world: World, optim: OptimConfig | None = None, **step: Any
) -> tuple[StepConfig, str]:
    config = RunConfig(step=StepConfig(**step), optim=optim or OptimConfig(), global_batch=32)
    found, notes = effective_config(config, records, world)
    assert notes.pop().startswith("the feed is resident")
    assert len(notes) <= 1
    return found.step, notes[0] if notes else ""


def test_more_ranks_than_gpus_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")
    check_ranks()
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "3")
    with pytest.raises(
        UserError, match="3 ranks on a machine with 2 GPUs; start torchrun with --nproc-per-node"
    ):
        check_ranks()
    check_ranks("cpu")


def test_bf16_needs_its_instructions(
    small: Records, world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(available, "has_fast_bf16", lambda device: True)
    assert effective(small, world, precision="bf16") == (StepConfig(precision="bf16"), "")
    monkeypatch.setattr(available, "has_fast_bf16", lambda device: False)
    step, note = effective(small, world, precision="bf16")
    assert step.precision == "fp32" and "no bf16 instructions" in note


def test_fp16_and_graphs_need_a_gpu(small: Records, world: World) -> None:
    step, note = effective(small, world, precision="fp16")
    assert step.precision == "fp32" and "fp16 is not used" in note
    step, note = effective(small, world, cuda_graphs=True)
    assert not step.cuda_graphs and "there is no GPU" in note


def test_what_only_a_gpus_libraries_do_is_taken_back(
    small: Records, world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    step, note = effective(small, world, cudnn_benchmark=True)
    assert not step.cudnn_benchmark and "there is no GPU" in note
    gpu = replace(world, device=torch.device("cuda", 0))
    monkeypatch.setattr(
        available, "choose_feed", lambda config, split, device: ("resident", "it fits")
    )
    monkeypatch.setattr(available, "cannot_compile", lambda device: "")
    assert effective(small, gpu, cudnn_benchmark=True)[0].cudnn_benchmark
    step, note = effective(small, gpu, cudnn_benchmark=True, canonical=2)
    assert not step.cudnn_benchmark and "fixed algorithms" in note
    step, note = effective(small, gpu, triton_conv_backward=True, compile="default")
    assert not step.triton_conv_backward and "take --compile max-autotune" in note
    for can in (True, False):
        monkeypatch.setattr(available, "has_conv_backward", lambda can=can: can)
        step, note = effective(small, gpu, triton_conv_backward=True, compile="max-autotune")
        assert step.triton_conv_backward is can and ("2.13 or newer" in note) is not can


def test_graphs_on_a_gpu(small: Records, world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(
        available, "choose_feed", lambda config, split, device: ("resident", "it fits")
    )
    gpu = replace(world, device=torch.device("cuda", 0))
    assert effective(small, gpu, cuda_graphs=True)[0].cuda_graphs
    assert effective(small, replace(gpu, size=2), cuda_graphs=True)[0].cuda_graphs
    plain = OptimConfig(fused=False)
    assert (
        "not fused reads the host"
        in effective(small, gpu, plain, cuda_graphs=True, precision="fp16")[1]
    )


def test_rank_0_fails_for_all(world: World) -> None:
    def fails() -> None:
        raise UserError("disk full")

    with pytest.raises(UserError, match="disk full"):
        world.first(fails)


def test_sums_do_not_change_their_input(world: World) -> None:
    values = torch.tensor([1.0, 2.0])
    total = world.sum(values)
    total += 1
    assert values.tolist() == [1.0, 2.0]


def test_no_thread_of_a_cpu_computes_with_denormal_numbers(command: Command) -> None:
    """Where moments of Adam fade to them, an epoch takes a third longer."""
    code = """
import torch
from engine.world import start_world
with start_world("cpu"):
    torch.set_num_threads(2)
    print((torch.full((2**20,), 1e-30) * 1e-9).count_nonzero().item())
"""
    if not torch.set_flush_denormal(True):
        pytest.skip("this CPU has no such switch")
    done = command("python", "-c", code)
    assert done.stdout.split() == ["0"]
