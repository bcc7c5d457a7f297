"""The kernels where there is no GPU: their references, their operators, the switch. The slow proofs: tests/kernels/."""

import json
import os
import re
import subprocess
import sys
from typing import Any

import pytest
import torch
from torch.nn import functional

import kernels
from engine import world
from engine.config import KERNELS, AugmentConfig, RunConfig, override
from engine.data.records import Records
from engine.feeds.augment import AugmentedFeed
from engine.feeds.batch import Batch
from engine.feeds.resident import ResidentFeed
from engine.feeds.synthetic import random_batch
from engine.host import ROOT
from engine.models.baseline import make_model
from engine.order import Order
from engine.train.available import effective_config
from engine.train.objective import Objective
from engine.world import World
from kernels import bias_pool_relu as second
from kernels import conv_pool_relu as first
from kernels import gather_warp as gather
from kernels import launch
from kernels import softmax_cross_entropy as loss_file
from tests.conftest import Command
from tests.kernels.__main__ import triton_versions
from tools.measure import roofline

CPU = torch.device("cpu")


def float64(*shape: int) -> torch.Tensor:
    return torch.randn(shape, dtype=torch.float64).requires_grad_()


def gradients(y: torch.Tensor, leaves: list[torch.Tensor]) -> list[torch.Tensor]:
    weights = torch.linspace(-1, 1, y.numel(), dtype=y.dtype).view(y.shape)
    return [y.detach(), *torch.autograd.grad((y * weights).sum(), leaves)]


@pytest.mark.parametrize("shape", [(5, 28, 28), (3, 9, 7)])
def test_the_references_are_pytorchs_own_operations(shape: tuple[int, int, int]) -> None:
    size, height, width = shape
    image, weight, bias = (
        torch.randint(256, shape, dtype=torch.uint8),
        float64(32, 1, 3, 3),
        float64(32),
    )
    got = gradients(first.conv_pool_relu(image, weight, bias, torch.float64), [weight, bias])
    x = functional.conv2d(image[:, None].double() / 255, weight, bias, padding=1)
    want = gradients(functional.relu(functional.max_pool2d(x, 2)), [weight, bias])
    x, bias = float64(size, 64, height, width), float64(64)
    got += gradients(second.bias_pool_relu(x, bias), [x, bias])
    want += gradients(functional.relu(functional.max_pool2d(x, 2) + bias[:, None, None]), [x, bias])
    for a, b in zip(got, want, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-12)


def test_the_reference_of_the_loss_is_pytorchs() -> None:
    logits, label = float64(37, 94), torch.randint(94, (37,), dtype=torch.uint8)
    loss, correct = loss_file.softmax_cross_entropy(logits, label, 0.05)
    wanted = functional.cross_entropy(logits, label.long(), label_smoothing=0.05)
    assert loss.item() == pytest.approx(wanted.item(), rel=1e-6) and not correct.requires_grad
    assert correct.item() == (logits.argmax(1) == label).sum()
    for a, b in zip(gradients(loss, [logits])[1:], gradients(wanted, [logits])[1:], strict=True):
        torch.testing.assert_close(a, b)


def test_a_code_can_be_read_again() -> None:
    winner, passes = torch.randint(4, (7, 96)), torch.rand(7, 96) < 0.5
    code = launch.pack_code(winner, passes)
    assert code.shape == (3, 7, 3) and code.dtype == torch.int32
    assert all(map(torch.equal, launch.unpack_code(code), (winner, passes)))


def operators() -> list[tuple[Any, tuple[Any, ...]]]:
    image, label = (
        torch.randint(256, (4, 8, 8), dtype=torch.uint8),
        torch.randint(9, (4,), dtype=torch.uint8),
    )
    weight, bias = torch.randn(32, 1, 3, 3).requires_grad_(), torch.randn(32).requires_grad_()
    x = torch.randn(4, 32, 6, 5).requires_grad_()
    table, step, out = torch.randint(4, (3, 2)), torch.tensor([2, 0]), torch.empty_like(image)
    return [
        (first._op, (image, weight, bias, torch.float32)),
        (second._op, (x, bias)),
        (loss_file._op, (torch.randn(4, 9).requires_grad_(), label, 0.05)),
        (
            gather.gather_warp,
            (image, label, table, step, None, out, label.clone(), torch.arange(4)),
        ),
    ]


@pytest.mark.parametrize("number", range(4))
def test_operators_keep_torchs_contract(number: int) -> None:
    """Schema, fake implementation, autograd registration: what torch.compile and export rest on."""
    torch.library.opcheck(*operators()[number])


def test_export_sees_every_operator() -> None:
    config = override(RunConfig(), {"kernels": "all"}, "test")
    fused = frozenset(config.kernels)
    assert fused == set(kernels.NAMES)
    model = make_model(config.model, 28, 28, 8, seed=1, fused=fused)
    batch = random_batch(4, (28, 28), 8, CPU)
    program = torch.export.export(Objective(model, config, CPU), (batch.image_BHW, batch.label_B))
    graphs = [
        module.graph
        for module in program.graph_module.modules()
        if isinstance(module, torch.fx.GraphModule)
    ]
    targets = [
        str(node.target) for graph in graphs for node in graph.nodes
    ]  # autocast's region is a graph of its own
    seen = {target.split(".")[1] for target in targets if target.startswith("tmnist.")}
    assert seen == set(kernels.NAMES) - {"gather_warp"}


def test_every_combination_of_kernels_is_the_same_objective() -> None:
    batch, results = random_batch(6, (28, 28), 8, CPU), []
    for chosen in ((), *[(name,) for name in kernels.NAMES], kernels.NAMES):
        config = override(RunConfig(), {"kernels": list(chosen)}, "test")
        fused = frozenset(config.kernels)
        assert fused == set(chosen)
        objective = Objective(make_model(config.model, 28, 28, 8, 1, fused), config, CPU)
        loss, correct = objective(batch.image_BHW, batch.label_B)
        results.append(
            [loss, correct.float(), *torch.autograd.grad(loss, list(objective.parameters()))]
        )
    for other in results[1:]:
        for a, b in zip(other, results[0], strict=True):
            torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("turn", [0.0, 15.0])
def test_feeds_gather_and_warp_by_the_kernel(turn: float, small: Records) -> None:
    """On a CPU by its reference: every batch, and those of a launch, are the plain feed's."""
    split, augment, found = small.split("train"), AugmentConfig(rotate_degrees=turn), []
    for fused in (frozenset[str](), frozenset({"gather_warp"})):
        order = Order(num_samples=len(split), global_batch=30, seed=3)
        feed, launched = ResidentFeed(split, order, CPU, fused), Batch.empty(60, (28, 28), CPU)
        feed.load_epoch(1)
        feed.gather(torch.tensor([2, 0]), launched)
        road = AugmentedFeed(feed, augment, fused) if augment.is_on else feed
        batches = [[t.clone() for t in (b.image_BHW, b.label_B, b.id_B)] for b in road.batches(1)]
        found.append([*batches, [launched.image_BHW, launched.label_B, launched.id_B]])
    for plain, fused_batch in zip(*found, strict=True):
        assert (plain[0].int() - fused_batch[0].int()).abs().max() <= augment.is_on
        assert torch.equal(plain[1], fused_batch[1]) and torch.equal(plain[2], fused_batch[2])


@pytest.mark.parametrize(
    "call, sentence",
    [
        (lambda: first._op(torch.zeros(2, 8, 8), float64(32, 1, 3, 3), float64(32), torch.float32), "image is torch.f"),
        (lambda: first._op(*operators()[0][1][:1], float64(20, 1, 3, 3), float64(20), torch.float32), "multiple of 32"),
        (lambda: second._op(torch.zeros(2, 32, 4, 4), torch.zeros(31)), r"bias has shape \[31\]; give \[32\]"),
        (lambda: loss_file._op(torch.zeros(3, 9), torch.zeros(4, dtype=torch.uint8), 0.0), "label has shape"),
        (lambda: loss_file._op(torch.zeros(3, 9), torch.zeros(3), 0.0), "label is torch.float32; give torch.uint8"),
        (lambda: gather.gather_warp(*operators()[3][1][:5], torch.zeros(4, 8, 16).byte()[:, :, ::2],
                                    *operators()[3][1][6:]), "out is not contiguous"),
        (lambda: gather.gather_warp(*operators()[3][1][:4], torch.zeros(3, 2, 3), *operators()[3][1][5:]), "matrix"),
    ],
)  # fmt: skip
def test_what_does_not_fit_is_refused_with_a_sentence(call: Any, sentence: str) -> None:
    with pytest.raises(ValueError, match=sentence):
        call()


def test_the_config_names_the_kernels() -> None:
    assert KERNELS == kernels.NAMES
    for name in kernels.NAMES:
        text = (ROOT / "kernels" / f"{name}.py").read_text()
        places = [
            text.index(word) for word in (f"def {name}_reference(", "@triton.jit", "    start(")
        ]
        assert places == sorted(places), f"{name}: reference, jit, launcher"
        assert f"def {name}(" in text and "Bytes a sample" in text and f"tmnist::{name}" in text


def effective(records: Records, here: World) -> tuple[RunConfig, str]:
    """With all kernels asked for."""
    config, notes = effective_config(override(RunConfig(), {"kernels": "all"}, ""), records, here)
    return config, " ".join(notes)


def test_what_cannot_be_had_is_said(
    small: Records, world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    config, notes = effective(small, world)
    assert config.kernels == () and "Triton kernels are not used: there is no GPU" in notes
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    monkeypatch.setattr(kernels.sysconfig, "get_path", lambda name: "/nowhere")
    assert "install python3-dev" in effective(small, world)[1]
    monkeypatch.delenv("CC", raising=False)
    monkeypatch.setattr(kernels.shutil, "which", lambda name: None)
    assert "Triton needs a C compiler" in effective(small, world)[1]
    monkeypatch.setattr(kernels, "find_spec", lambda name: None)
    assert "Triton is not installed; pip install" in effective(small, world)[1]


def test_old_gpus_are_refused_and_the_interpreter_is_let_in(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(kernels, "missing", lambda: "")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (7, 0))
    assert "8.0" in world.cannot_fuse(torch.device("cuda"))
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    assert world.cannot_fuse(CPU) == ""


def test_kernels_and_the_plain_step_share_checkpoints() -> None:
    plain, fused = (override(RunConfig(), {"kernels": names}, "test") for names in ("off", "all"))
    assert plain.digest() == fused.digest()


def test_a_run_without_a_gpu_says_so_once(command: Command, small_dir: Any, tmp_path: Any) -> None:
    words = (
        "--data",
        small_dir,
        "--epochs",
        1,
        "--batch-size",
        64,
        "--kernels",
        "all",
        "--out",
        tmp_path / "run",
    )
    done = command("python", "-m", "engine.run", *words)
    assert (
        done.returncode == 0
        and done.stdout.count("Triton kernels are not used: there is no GPU") == 1
    )


def test_the_interpreter_agrees() -> None:
    """A part of the proofs, in a process of its own: each kernel, small, against float64."""
    chosen = "dtype1-shape2 and (conv_pool or channels_last) or dtype0-5-8 or (gather_warp and dtype0-shape1) or nan"
    command = [sys.executable, "-m", "pytest", "-q", "tests/kernels/interpreted.py", "-k", chosen]
    done = subprocess.run(
        command,
        cwd=ROOT,
        env=os.environ | {"TRITON_INTERPRET": "1"},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout[-3000:]
    found = re.search(r"(\d+) passed", done.stdout)
    assert found and int(found[1]) >= 9, done.stdout


def test_it_compiles_for_an_h100() -> None:
    command = [sys.executable, "-m", "pytest", "-q", "tests/kernels/compiled.py", "-k", "90"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0 and re.search("[12] passed", done.stdout), done.stdout[-3000:]


def test_resources_are_on_file_for_every_triton_that_an_allowed_torch_asks_for() -> None:
    """No register spills in any: neither stack nor local memory is used."""
    kept = json.loads((ROOT / "tests" / "kernels" / "resources.json").read_text())
    assert list(kept) == triton_versions()
    for version, architectures in kept.items():
        assert len({frozenset(found) for found in architectures.values()}) == 1
        for found in architectures.values():
            for name, usage in found.items():
                assert usage.endswith(" 0 + 0 bytes of stack + local"), (version, name, usage)


def test_the_designs_bytes_fall_out_of_the_model() -> None:
    """113 KB and 231 KB a sample with two bits a pooled value, 25.1 MFLOP, 27 M samples/s at 3 TB/s."""
    shapes = roofline.Shapes(28, 28, 94, code_bits=2)
    kilobytes = [round(work.num_bytes / 1000, 1) for work in roofline.floor(shapes)]
    assert kilobytes == [2.4, 15.7, 19.6, 7.2, 12.8, 19.6, 19.6, 15.7]
    assert sum(w.num_bytes for w in roofline.kernels(shapes)) == pytest.approx(231e3, rel=0.01)
    for way in (roofline.floor, roofline.kernels, roofline.eager):
        assert sum(w.flops for w in way(shapes)) == pytest.approx(25.06e6, rel=1e-3)
    only_bytes = roofline.predicted_s(roofline.floor(shapes), 3e12, 1e30)
    assert 1 / only_bytes == pytest.approx(27e6, rel=0.02)


def test_unknown_hardware_has_no_prediction() -> None:
    shape = (28, 28, 94)
    assert roofline.peak_flops("NVIDIA H100 80GB HBM3", "bf16") == 989e12
    assert roofline.peak_flops("NVIDIA H100 PCIe", "bf16") == 756e12
    assert roofline.peak_flops("NVIDIA H100 NVL", "bf16") == 835e12
    assert roofline.peak_flops("NVIDIA H100 MIG 1g.10gb", "bf16") is None
    assert (
        roofline.peak_flops("Some CPU", "bf16") is None
        and roofline.peak_flops(None, "bf16") is None
    )
    assert roofline.roofline_fraction(1e6, "Some GPU", "bf16", 3e12, shape) is None
    assert roofline.roofline_fraction(1e6, "NVIDIA H100 80GB HBM3", "bf16", None, shape) is None
    fraction = roofline.roofline_fraction(12e6, "NVIDIA H100 80GB HBM3", "bf16", 3e12, shape)
    assert fraction is not None and 0.4 < fraction < 0.6
    assert roofline.copy_bandwidth(CPU) is None


def test_readme_shows_the_models_table() -> None:
    assert roofline.table(28, 28, 94) in (ROOT / "README.md").read_text()
