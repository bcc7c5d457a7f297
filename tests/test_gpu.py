"""What only a GPU can show. Run offline by python3 -m tools.gpu; skipped elsewhere."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel

import engine
import kernels
from engine.config import RunConfig, override
from engine.data.records import Records
from engine.feeds.synthetic import random_batch
from engine.train import available
from engine.train import step as step_module
from engine.train.joint import Joint
from engine.train.members import Crew
from engine.train.parallel import NEVER
from engine.train.precision import fp8_linear
from engine.train.session import Session, evaluate, open_session
from engine.train.step import TrainLog
from engine.train.sweep import Sweep, parse_sweeps
from engine.train.trainer import fit
from engine.world import World, cannot_fp8, start_world
from kernels.bias_pool_relu import bias_pool_relu
from kernels.conv2_pool_relu import conv2_pool_relu
from kernels.conv_pool_relu import conv_pool_relu
from kernels.gather_warp import gather_warp
from kernels.linear_cross_entropy import linear_cross_entropy
from kernels.linear_relu import linear_relu
from kernels.softmax_cross_entropy import softmax_cross_entropy
from tools.checks.doctor import host_reads

pytestmark = pytest.mark.gpu
BATCH = 32
WITH_HEAD = ("gather_warp", "conv_pool_relu", "bias_pool_relu", "linear_cross_entropy")
WITH_CONV2 = ("gather_warp", "conv_pool_relu", "conv2_pool_relu", "softmax_cross_entropy")


@pytest.fixture
def gpu_world() -> Iterator[World]:
    with start_world("cuda") as world, world.on_stream():
        yield world


def session(records: Records, world: World, **settings: Any) -> Session:
    """Seven steps an epoch; `step_precision` stands for step.precision."""
    common = {
        "optim.learning_rate": 2e-3,
        "global_batch": BATCH,
        "epochs": 4,
        "data.feed": "resident",
    }
    given = {name.replace("_", ".", 1): value for name, value in settings.items()}
    return open_session(override(RunConfig(), common | given, "test"), records, world)


def losses(opened: Session, num_epochs: int = 3) -> list[float]:
    found: list[TrainLog] = []
    for epoch in range(num_epochs):
        for launch in opened.step.train_epoch(opened.feed, epoch):
            assert launch.num_steps in (1, opened.step.steps_per_launch)
        found.append(opened.step.read_training())
    return np.concatenate([log.loss_S for log in found]).tolist()


@pytest.mark.parametrize("feed", ["resident", "loader", "synthetic"])
@pytest.mark.parametrize("num_steps", [1, 3])
@pytest.mark.parametrize("precision", ["fp32", "tf32", "bf16", "fp16", "fp8"])
def test_the_graph_trains_as_the_eager_step(
    precision: str, num_steps: int, feed: str, small: Records, gpu_world: World
) -> None:
    if precision == "fp8" and (why := cannot_fp8(gpu_world.device)):
        pytest.skip(why)
    eager = session(small, gpu_world, step_precision=precision, data_feed=feed)
    wanted, wanted_evaluation = losses(eager), evaluate(eager, "val")
    eager.close()
    settings = {
        "step_precision": precision,
        "step_cuda_graphs": True,
        "step_steps_per_launch": num_steps,
    }
    graph = session(small, gpu_world, **settings, data_feed=feed)
    assert graph.effective["cuda_graphs"], graph.notes
    found, evaluation = losses(graph), evaluate(graph, "val")
    assert found == pytest.approx(wanted, rel=1e-3 if precision == "fp32" else 2e-2)
    assert evaluation[0] == pytest.approx(wanted_evaluation[0], rel=5e-2)
    assert wanted[-1] < 0.8 * wanted[0], "the loss must fall, or equality shows nothing"
    assert int(graph.step.counter_21[0]) == len(found) == 21
    graph.close()


@pytest.mark.parametrize(
    "settings",
    [
        {"step_accumulate": 4},
        {"step_compile": "default"},
        {"step_compile": "max-autotune", "step_triton_conv_backward": True},
        {"step_cudnn_benchmark": True},
        {"optim_fused": False},
    ],
    ids=str,
)
def test_other_ways_of_stepping_are_captured_too(
    settings: dict[str, Any], small: Records, gpu_world: World
) -> None:
    plain = session(small, gpu_world)
    wanted = losses(plain)
    plain.close()
    graph = session(small, gpu_world, step_cuda_graphs=True, step_steps_per_launch=3, **settings)
    assert graph.effective["cuda_graphs"], graph.notes
    assert torch.backends.cudnn.benchmark == settings.get("step_cudnn_benchmark", False)
    assert losses(graph) == pytest.approx(wanted, rel=5e-3)
    graph.close()


@pytest.mark.parametrize("num_steps", [1, 3])
def test_members_of_one_graph_train_as_graphs_of_their_own(
    num_steps: int, small: Records, gpu_world: World, tmp_path: Path
) -> None:
    """Branches of two orders, two each; the graph is one, and so is a batch of each order."""
    settings = {
        "optim.learning_rate": 2e-3,
        "global_batch": BATCH,
        "epochs": 2,
        "step.cuda_graphs": True,
        "step.steps_per_launch": num_steps,
    }
    config = override(RunConfig(), settings, "test")
    axes = parse_sweeps(["seed=1,2", "optim.weight_decay=0.01,0.1"])
    crew = Crew(Sweep.of(config, axes), small, gpu_world, tmp_path / "sweep", print)
    for member in crew.sweep.members:
        (crew.out / member.folder).mkdir(parents=True)
    crew.train()
    assert crew.launches == "one graph of 4 branches"
    found = []
    for member in crew.sweep.members:
        alone = tmp_path / member.folder
        alone.mkdir()
        fit(member.config, small, gpu_world, alone, resume=False, say=print)
        lines = [_epochs(run) for run in (crew.out / member.folder, alone)]
        assert lines[0] == pytest.approx(lines[1], rel=1e-3)
        found.append(lines[0])
    assert found[0] != found[2], "two seeds"
    assert found[0][-1] < 0.8 * found[0][0], "the loss must fall, or equality shows nothing"


def _epochs(run: Path) -> list[float]:
    """The training loss of each epoch."""
    lines = (run / "metrics.jsonl").read_text().splitlines()
    return [json.loads(line)["train_loss"] for line in lines]


def test_members_go_on_with_graphs_of_their_own_where_one_cannot_be_captured(
    small: Records, gpu_world: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(joint: Joint, sizes: list[int]) -> None:
        raise RuntimeError("this driver forks no graphs")

    monkeypatch.setattr(Joint, "_capture", refuse)
    settings = {"global_batch": BATCH, "epochs": 1, "step.cuda_graphs": True}
    sweep = Sweep.of(override(RunConfig(), settings, "test"), parse_sweeps(["seed=1,2"]))
    said: list[str] = []
    crew = Crew(sweep, small, gpu_world, tmp_path, said.append)
    for member in sweep.members:
        (tmp_path / member.folder).mkdir()
    crew.train()
    assert crew.launches == "a graph a member, on streams of their own"
    assert any("this driver forks no graphs; each has its own" in line for line in said)
    assert all((tmp_path / m.folder / "model.safetensors").exists() for m in sweep.members)


def test_augmented_images_are_handed_to_the_graph(small: Records, gpu_world: World) -> None:
    found = []
    for graphs in (False, True):
        opened = session(small, gpu_world, step_cuda_graphs=graphs, augment_rotate_degrees=10.0)
        found.append(losses(opened))
        opened.close()
    assert found[1] == pytest.approx(found[0], rel=1e-3)


def test_the_all_reduce_of_ddp_is_captured(
    small: Records, gpu_world: World, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """By NCCL with one rank: its kernels are in the graph, though nobody else takes part."""
    plain = session(small, gpu_world)
    wanted = losses(plain)
    plain.close()
    keep = step_module.TrainStep._wrap

    def with_ddp(step: step_module.TrainStep) -> None:
        keep(step)
        step._net = ddp = DistributedDataParallel(
            step.objective, device_ids=[0], gradient_as_bucket_view=True
        )
        ddp._set_ddp_runtime_logging_sample_rate(NEVER)

    monkeypatch.setattr(step_module.TrainStep, "_wrap", with_ddp)
    monkeypatch.setattr(step_module, "WARMUP_STEPS", step_module.DDP_WARMUP_STEPS)
    dist.init_process_group(
        "nccl", init_method=f"file://{tmp_path / 'store'}", rank=0, world_size=1
    )
    try:
        graph = session(small, gpu_world, step_cuda_graphs=True, step_steps_per_launch=3)
        assert graph.effective["cuda_graphs"], graph.notes
        assert losses(graph) == pytest.approx(wanted, rel=1e-3)
        graph.close()
    finally:
        dist.destroy_process_group()


@pytest.mark.parametrize("graphs", [False, True])
@pytest.mark.parametrize("precision", ["fp32", "bf16", "fp16"])
def test_fsdp_trains_as_the_plain_step(
    precision: str,
    graphs: bool,
    small: Records,
    gpu_world: World,
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
) -> None:
    """By NCCL with one rank, where it would give way. What cannot be captured runs eagerly."""
    plain = session(small, gpu_world, step_precision=precision)
    wanted = losses(plain)
    plain.close()
    rules = tuple(rule for rule in available.RULES if rule.__name__ != "_fsdp")
    monkeypatch.setattr(available, "RULES", rules)
    dist.init_process_group(
        "nccl", init_method=f"file://{tmp_path / 'store'}", rank=0, world_size=1
    )
    settings = {"step_parallel": "fsdp", "step_precision": precision, "step_cuda_graphs": graphs}
    try:
        sharded = session(small, gpu_world, **settings)
        assert sharded.effective["parallel"] == "fsdp"
        assert sharded.effective["cuda_graphs"] == graphs or sharded.step.capture_failure
        assert losses(sharded) == pytest.approx(wanted, rel=1e-3 if precision == "fp32" else 2e-2)
        sharded.close()
    finally:
        dist.destroy_process_group()


@pytest.mark.parametrize("graphs", [False, True])
def test_warm_up_and_capture_change_nothing(graphs: bool, small: Records, gpu_world: World) -> None:
    opened = session(small, gpu_world, step_precision="fp16", step_cuda_graphs=graphs)
    for values in opened.step.optimizer.state.values():
        assert all(not t.any() for t in values.values() if isinstance(t, torch.Tensor))
    assert not opened.step.counter_21.any()
    assert opened.step.scaler.state_dict()["scale"] == 65536.0
    opened.close()


@pytest.mark.parametrize("graphs", [False, True])
@pytest.mark.parametrize(
    ("precision", "names"), [("bf16", "off"), ("bf16", "all"), ("fp16", "off")]
)
def test_a_step_never_waits_for_the_device(
    precision: str, names: str, graphs: bool, small: Records, gpu_world: World
) -> None:
    settings = {"step_precision": precision, "step_cuda_graphs": graphs}
    opened = session(small, gpu_world, kernels=names, **settings)
    assert (
        host_reads(opened.step.train_epoch(opened.feed, 0), gpu_world.device, num_launches=7) == []
    )
    opened.close()


def test_a_graph_refuses_another_batch(small: Records, gpu_world: World) -> None:
    opened = session(small, gpu_world, step_cuda_graphs=True, data_feed="loader")
    with pytest.raises(ValueError, match="was built for"):
        opened.step.train(random_batch(BATCH + 1, (28, 28), 8, gpu_world.device))
    opened.close()


@pytest.mark.parametrize("num_rows", [64, 20])
def test_fp8_is_what_a_cpu_emulates(num_rows: int, gpu_world: World) -> None:
    """The same 8-bit numbers; the sums are rounded otherwise, in the forward to 14 bits."""
    if why := cannot_fp8(gpu_world.device):
        pytest.skip(why)
    drawn = [torch.randn(num_rows, 96).bfloat16(), torch.randn(48, 96), torch.randn(48)]
    grad, found = torch.randn(num_rows, 48).bfloat16(), []
    for device in ("cpu", gpu_world.device):
        leaves = [each.to(device).requires_grad_() for each in drawn]
        y = fp8_linear(*leaves)
        found.append((y, *torch.autograd.grad(y, leaves, grad.to(device))))
    for wanted, got in zip(*found, strict=True):
        assert got.dtype == wanted.dtype
        close = 2**-7 * float(wanted.abs().max())
        assert torch.allclose(got.cpu().float(), wanted.float(), rtol=2**-7, atol=close)


@pytest.mark.parametrize("feed", ["dali", "loader"])
def test_feeds_bring_the_same_batches_to_the_gpu(
    feed: str, small: Records, gpu_world: World
) -> None:
    if feed == "dali":
        pytest.importorskip("nvidia.dali")
    a, b = session(small, gpu_world), session(small, gpu_world, data_feed=feed)
    for wanted, got in zip(a.feed.batches(1), b.feed.batches(1), strict=True):
        assert torch.equal(wanted.image_BHW, got.image_BHW)
        assert torch.equal(wanted.label_B, got.label_B) and torch.equal(wanted.id_B, got.id_B)
    a.close()
    b.close()


@pytest.mark.parametrize("precision", ["fp32", "bf16", "fp16"])
@pytest.mark.parametrize("graphs", [False, True])
@pytest.mark.parametrize("names", [kernels.ALL, WITH_CONV2, WITH_HEAD])
def test_the_kernels_train_as_pytorchs_operations(
    names: tuple[str, ...], graphs: bool, precision: str, small: Records, gpu_world: World
) -> None:
    plain = session(small, gpu_world, step_precision=precision)
    wanted, wanted_evaluation = losses(plain), evaluate(plain, "val")
    plain.close()
    settings = {
        "step_precision": precision,
        "step_cuda_graphs": graphs,
        "step_steps_per_launch": 3 if graphs else 1,
    }
    fused = session(small, gpu_world, kernels=names, **settings)
    assert fused.config.kernels == names and fused.effective["cuda_graphs"] == graphs, fused.notes
    assert losses(fused) == pytest.approx(wanted, rel=1e-3 if precision == "fp32" else 3e-2)
    assert evaluate(fused, "val")[0] == pytest.approx(wanted_evaluation[0], rel=5e-2)
    fused.close()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("batch", [1, 37, 2048])
def test_the_kernels_agree_with_float64(batch: int, dtype: torch.dtype, gpu_world: World) -> None:
    """Forward and gradient on what the kernel was given, within what type and sums allow."""
    close = 3 * {torch.float32: 4e-6, torch.bfloat16: 2**-8, torch.float16: 2**-11}[dtype]
    image = torch.randint(256, (batch, 28, 28), dtype=torch.uint8)
    weight, bias = torch.randn(32, 1, 3, 3).to(dtype).float(), torch.randn(32)
    x = torch.randn(batch, 64, 14, 14).to(dtype).contiguous(memory_format=torch.channels_last)
    pooled = x[:, :32].contiguous(memory_format=torch.channels_last)
    weight_2 = (torch.randn(64, 32, 3, 3) / 17).to(dtype).float()
    logits, label = torch.randn(batch, 94).to(dtype), torch.randint(94, (batch,), dtype=torch.uint8)
    hidden, last = torch.randn(batch, 128).to(dtype), (torch.randn(94, 128) / 11).to(dtype)

    layer = (last, logits[0].clone())

    def first(i: torch.Tensor, w: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
        return conv_pool_relu(i, w, b, w.dtype if w.dtype == torch.float64 else dtype)

    cases: list[tuple[Any, tuple[torch.Tensor, ...]]] = [
        (first, (image, weight, bias)),
        (bias_pool_relu, (x, bias.repeat(2))),
        (conv2_pool_relu, (pooled, weight_2, bias.repeat(2))),
        (lambda a, b: softmax_cross_entropy(a, b, 0.05)[0], (logits, label)),
        (lambda *a: linear_cross_entropy(*a, 0.05)[0], (hidden, *layer, label)),
        (lambda *a: linear_cross_entropy(*a, 0.05, True)[0], (hidden.relu(), *layer, label)),
        (linear_relu, (hidden, *layer)),
    ]  # fmt: skip
    for call, given in cases:
        ours = [t.cuda().requires_grad_(t.is_floating_point()) for t in given]
        exact = [t.double().requires_grad_() if t.is_floating_point() else t for t in given]
        y, wanted = call(*ours), call(*exact)  # on the CPU the reference
        torch.testing.assert_close(y.cpu().double(), wanted, rtol=close, atol=close)
        grad = torch.randn(wanted.shape, dtype=torch.float64).to(y.dtype).double()
        y.backward(grad.to("cuda", y.dtype))
        wanted.backward(grad)
        for a, b in zip(ours, exact, strict=True):
            if a.grad is not None and b.grad is not None:
                apart = (a.grad.cpu().double() - b.grad).norm()
                assert apart <= max(5 * close, 5e-3) * b.grad.norm()  # some winners change


def test_a_loader_gives_the_cpus_batches(small: Records) -> None:
    gpu, cpu = (engine.loader(small, batch_size=BATCH, device=name) for name in ("cuda", "cpu"))
    assert engine.loader(small, batch_size=BATCH).device.type == "cuda", "the default"
    for found, wanted in zip(gpu, cpu, strict=True):
        assert all(tensor.is_cuda for tensor in found)
        assert all(torch.equal(a.cpu(), b) for a, b in zip(found, wanted, strict=True))
    gpu.load_state_dict(cpu.state_dict() | {"num_samples": BATCH + 1})
    assert len(list(gpu)) == len(cpu) - 2, "with another order's feed"


def test_the_gather_kernel_is_index_select_on_the_gpu(gpu_world: World) -> None:
    image, label = (
        torch.randint(256, (99, 28, 28), dtype=torch.uint8),
        torch.randint(94, (99,), dtype=torch.uint8),
    )
    table, step = torch.randint(-1, 99, (7, 33)), torch.tensor([3, 6])
    matrix = torch.eye(2, 3).repeat(66, 1, 1) + 0.1 * torch.randn(66, 2, 3)
    for given in (None, matrix):
        found = []
        for device in ("cuda", "cpu"):
            out = (
                torch.empty(66, 28, 28, dtype=torch.uint8, device=device),
                label[:66].to(device).clone(),
            )
            ids = torch.empty(66, dtype=torch.int64, device=device)
            inputs = [t if t is None else t.to(device) for t in (image, label, table, step, given)]
            gather_warp(*inputs, *out, ids)
            found.append([t.cpu() for t in (*out, ids)])
        assert (found[0][0].int() - found[1][0].int()).abs().max() <= (given is not None)
        assert torch.equal(found[0][1], found[1][1]) and torch.equal(found[0][2], found[1][2])
