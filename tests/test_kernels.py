"""The kernels where there is no GPU: their references, their operators, the switch.

The slow proofs stand in tests/kernels/.
"""

import ast
import json
import re
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from torch.nn import functional
from torch.utils._python_dispatch import TorchDispatchMode

import kernels
from engine import world
from engine.config import AugmentConfig, DataConfig, RunConfig, override
from engine.data.records import Records
from engine.feeds.batch import Batch, Feed
from engine.feeds.build import make_feed
from engine.feeds.resident import ResidentFeed
from engine.feeds.synthetic import random_batch
from engine.host import ROOT
from engine.models import make_model
from engine.order import Order
from engine.train import available
from engine.train.available import effective_config
from engine.train.objective import Objective
from engine.world import World
from kernels import bias_pool_relu as second
from kernels import conv2_pool_relu as whole
from kernels import conv_pool_relu as first
from kernels import cpu, launch
from kernels import gather_warp as gather
from kernels import linear_cross_entropy as head_file
from kernels import softmax_cross_entropy as loss_file
from kernels.linear_relu import linear_relu
from tests.conftest import CLASSES, Command
from tests.kernels.__main__ import triton_versions
from tools.measure import roofline

CPU = torch.device("cpu")
NONE: frozenset[str] = frozenset()
GATHER = frozenset({"gather_warp"})


def float64(*shape: int) -> torch.Tensor:
    return torch.randn(shape, dtype=torch.float64).requires_grad_()


def gradients(y: torch.Tensor, leaves: list[torch.Tensor]) -> list[torch.Tensor]:
    weights = torch.linspace(-1, 1, y.numel(), dtype=y.dtype).view(y.shape)
    return [y.detach(), *torch.autograd.grad((y * weights).sum(), leaves)]


@pytest.mark.parametrize("shape", [(5, 28, 28), (3, 9, 7)])
def test_the_references_are_pytorchs_own_operations(shape: tuple[int, int, int]) -> None:
    size, height, width = shape
    image = torch.randint(256, shape, dtype=torch.uint8)
    weight, bias = layer(32)
    got = gradients(first.conv_pool_relu(image, weight, bias, torch.float64), [weight, bias])
    x = functional.conv2d(image[:, None].double() / 255, weight, bias, padding=1)
    want = gradients(functional.relu(functional.max_pool2d(x, 2)), [weight, bias])
    x = float64(size, 64, height, width)
    bias = float64(64)
    got += gradients(second.bias_pool_relu(x, bias), [x, bias])
    want += gradients(functional.relu(functional.max_pool2d(x, 2) + bias[:, None, None]), [x, bias])
    leaves = [float64(size, 16, height, width), float64(32, 16, 3, 3), float64(32)]
    got += gradients(whole.conv2_pool_relu(*leaves), leaves)
    x = functional.conv2d(*leaves, padding=1)
    want += gradients(functional.relu(functional.max_pool2d(x, 2)), leaves)
    for a, b in zip(got, want, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-12)


def test_the_reference_of_the_loss_is_pytorchs() -> None:
    logits = float64(37, 94)
    label = torch.randint(94, (37,), dtype=torch.uint8)
    loss, correct = loss_file.softmax_cross_entropy(logits, label, 0.05)
    wanted = functional.cross_entropy(logits, label.long(), label_smoothing=0.05)
    assert loss.item() == pytest.approx(wanted.item(), rel=1e-6)
    assert not correct.requires_grad
    assert correct.item() == (logits.argmax(1) == label).sum()
    for a, b in zip(gradients(loss, [logits])[1:], gradients(wanted, [logits])[1:], strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_the_reference_of_the_head_is_pytorchs(smoothing: float) -> None:
    hidden, weight, bias = float64(37, 20), float64(94, 20), float64(94)
    label = torch.randint(94, (37,), dtype=torch.uint8)
    loss, correct = head_file.linear_cross_entropy(hidden, weight, bias, label, smoothing)
    logits = functional.linear(hidden, weight, bias)
    wanted = functional.cross_entropy(logits, label.long(), label_smoothing=smoothing)
    assert not correct.requires_grad
    assert correct.item() == (logits.argmax(1) == label).sum()
    leaves = [hidden, weight, bias]
    for a, b in zip(gradients(3 * loss, leaves), gradients(3 * wanted, leaves), strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_the_head_masks_the_relu_before_it_to_the_bit(dtype: torch.dtype) -> None:
    """The gradients of a layer, its ReLU and the head, whichever of the two masks.

    That of the layer's bias is summed before or after its terms are scaled and rounded.
    """
    x, layer, last = float64(37, 12), (float64(20, 12), float64(20)), (float64(94, 20), float64(94))
    leaves = [t.detach().to(dtype).requires_grad_() for t in (x, *layer, *last)]
    label = torch.randint(94, (37,), dtype=torch.uint8)
    found = []
    for head_masks in (True, False):
        hidden = linear_relu(*leaves[:3], masked=head_masks)
        assert (hidden == 0).any()
        bias = leaves[2] if head_masks else None
        loss, _ = head_file.linear_cross_entropy(hidden, *leaves[3:], label, 0.1, bias)
        (term_BC,) = torch.autograd.grad(loss, hidden, retain_graph=True)
        found.append(gradients(loss, leaves))
    ours, plain = (each.pop(3) for each in found)
    assert ours.dtype == dtype and ours.any()
    bound_C = 4 * torch.finfo(dtype).eps * (term_BC * (hidden > 0)).abs().sum(0)
    assert ((ours - plain).abs() <= bound_C).all()
    assert all(map(torch.equal, *found))
    hidden = linear_relu(*leaves[:3], masked=True)
    unmasked, _ = head_file.linear_cross_entropy(hidden, *leaves[3:], label, 0.1)
    others = [*leaves[:2], *leaves[3:]]
    assert not all(map(torch.equal, found[0], gradients(unmasked, others))), "nobody masks"


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_a_linear_layer_with_its_relu_is_pytorchs_two_to_the_bit(precision: str) -> None:
    layer = torch.nn.Linear(50, 30)
    results = []
    for ours in (True, False):
        x = torch.linspace(-1, 1, 350).sin().view(7, 50).requires_grad_()
        with torch.autocast("cpu", torch.bfloat16, enabled=precision == "bf16"):
            y = linear_relu(x, layer.weight, layer.bias) if ours else layer(x).relu()
        results.append([y.dtype, *gradients(y, [x, layer.weight, layer.bias])])
    assert results[0][0] == results[1][0] and (results[0][1] == 0).any()
    assert all(map(torch.equal, results[0][1:], results[1][1:]))


@pytest.mark.parametrize("is_compiled", [True, False])
def test_no_code_is_made_where_there_is_no_backward(
    is_compiled: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of a layer that is frozen, and without gradients; by numba and by the reference."""
    monkeypatch.setattr(cpu, "is_here", lambda: is_compiled)
    image = torch.randint(256, (2, 8, 8), dtype=torch.uint8)
    weight, bias = torch.randn(32, 1, 3, 3).requires_grad_(), torch.randn(32)
    kept, results = [], []
    for file, name in ((first, "_op"), (cpu, "_run_conv")):
        made = getattr(file, name)
        monkeypatch.setattr(file, name, lambda *a, made=made: kept.append(a[-1]) or made(*a))
    for each in (weight, weight.detach()):
        results.append(first.conv_pool_relu(image, each, bias, torch.float32))
    with torch.no_grad():
        results.append(first.conv_pool_relu(image, weight, bias, torch.float32))
    assert kept == [True, False, False]
    assert [y.requires_grad for y in results] == kept
    assert all(torch.equal(y, results[0]) for y in results)


def test_a_code_can_be_read_again() -> None:
    winner = torch.randint(4, (7, 96))
    passes = torch.rand(7, 96) < 0.5
    code = launch.pack_code(winner, passes)
    assert code.shape == (3, 7, 3)
    assert code.dtype == torch.int32
    assert all(map(torch.equal, launch.unpack_code(code), (winner, passes)))


def operators() -> list[tuple[Any, tuple[Any, ...]]]:
    """Each operator, with arguments that fit."""
    image = torch.randint(256, (4, 8, 8), dtype=torch.uint8)
    label = torch.randint(9, (4,), dtype=torch.uint8)
    weight = torch.randn(32, 1, 3, 3).requires_grad_()
    bias = torch.randn(32).requires_grad_()
    x = torch.randn(4, 32, 6, 5).requires_grad_()
    last = torch.randn(9, 8).requires_grad_(), torch.randn(9).requires_grad_()
    hidden = torch.randn(4, 8).requires_grad_()
    relu_bias = torch.randn(8).requires_grad_()
    weight_2 = torch.randn(64, 32, 3, 3).requires_grad_()
    table = torch.randint(4, (3, 2))
    step = torch.tensor([2, 0])
    out = (torch.empty_like(image), label.clone(), torch.arange(4))
    return [
        (first._op, (image, weight, bias, torch.float32)),
        (first._op, (image, weight.detach(), bias.detach(), torch.float32, False)),
        (second._op, (x, bias)),
        (loss_file._op, (torch.randn(4, 9).requires_grad_(), label, 0.05)),
        (gather.gather_warp, (image, label, table, step, None, *out)),
        (gather.gather_warp, (image, label, table, step, torch.randn(4, 2, 3), *out)),
        (head_file._op, (hidden, *last, label, 0.05)),
        (head_file._op, (hidden, *last, label, 0.05, relu_bias)),
        (whole._op, (x, weight_2, torch.randn(64).requires_grad_(), weight_2.detach())),
    ]


@pytest.mark.parametrize("number", range(9))
def test_operators_keep_torchs_contract(number: int) -> None:
    """Schema, fake implementation, autograd registration: what torch.compile and export rest on."""
    torch.library.opcheck(*operators()[number])


NEW = ("conv_pool_relu", "conv2_pool_relu", "linear_cross_entropy")


@pytest.mark.parametrize("chosen", [kernels.ALL, NEW])
def test_export_sees_every_operator(chosen: tuple[str, ...]) -> None:
    config = override(RunConfig(), {"kernels": chosen}, "test")
    fused = frozenset(config.kernels)
    model = make_model(config.model, 28, 28, 8, seed=1, fused=fused)
    batch = random_batch(4, (28, 28), 8, CPU)
    program = torch.export.export(Objective(model, config, CPU), (batch.image_BHW, batch.label_B))
    modules = program.graph_module.modules()  # autocast's region is a graph of its own
    graphs = [module.graph for module in modules if isinstance(module, torch.fx.GraphModule)]
    targets = [str(node.target) for graph in graphs for node in graph.nodes]
    names = (target.split(".")[1] for target in targets if target.startswith("tmnist."))
    seen = {name.removesuffix("_cpu") for name in names}
    assert seen == set(chosen) - {"gather_warp", "adamw"}


def test_every_combination_of_kernels_is_the_same_objective() -> None:
    batch = random_batch(6, (28, 28), 8, CPU)
    results = []
    for chosen in ((), *[(name,) for name in kernels.NAMES], kernels.ALL, kernels.NAMES):
        config = override(RunConfig(), {"kernels": list(chosen)}, "test")
        fused = frozenset(config.kernels)
        assert fused == set(chosen)
        objective = Objective(make_model(config.model, 28, 28, 8, 1, fused), config, CPU)
        loss, correct = objective(batch.image_BHW, batch.label_B)
        grads = torch.autograd.grad(loss, list(objective.parameters()))
        results.append([loss, correct.float(), *grads])
    for other in results[1:]:
        for a, b in zip(other, results[0], strict=True):
            torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-6)


def order_of(records: Records) -> Order:
    return Order(num_samples=len(records.split("train")), global_batch=30, seed=3)


def make(name: Any, records: Records, fused: frozenset[str], augment: AugmentConfig) -> Feed:
    split = records.split("train")
    config = RunConfig(data=DataConfig(feed=name), augment=augment, kernels=tuple(fused))
    return make_feed(config, split, order_of(records), len(CLASSES), CPU)


def copied(batch: Batch) -> Batch:
    return Batch(batch.image_BHW.clone(), batch.label_B.clone(), batch.id_B.clone())


@pytest.mark.parametrize("turn", [0.0, 15.0])
def test_resident_gathers_and_warps_by_the_kernel(turn: float, small: Records) -> None:
    """Every batch of two epochs is the plain feed's; on a CPU one function warps for both."""
    found = []
    for fused in (NONE, GATHER):
        feed = make("resident", small, fused, AugmentConfig(rotate_degrees=turn))
        found.append([copied(batch) for epoch in (0, 1) for batch in feed.batches(epoch)])
    for plain, by_kernel in zip(*found, strict=True):
        assert torch.equal(plain.image_BHW, by_kernel.image_BHW)
        assert torch.equal(plain.label_B, by_kernel.label_B)
        assert torch.equal(plain.id_B, by_kernel.id_B)
    train_NHW = torch.from_numpy(small.split("train").image_NHW)
    distorted = not torch.equal(by_kernel.image_BHW, train_NHW[by_kernel.id_B])
    assert distorted == (turn > 0)


def test_a_launch_gathers_its_steps_by_the_kernel(small: Records) -> None:
    split = small.split("train")
    found = []
    for fused in (NONE, GATHER):
        feed = ResidentFeed(split, order_of(small), CPU, fused)
        launched = Batch.empty(60, (28, 28), CPU)
        feed.load_epoch(1)
        feed.gather(torch.tensor([2, 0]), launched)
        found.append(launched)
    plain, by_kernel = found
    assert torch.equal(plain.image_BHW, by_kernel.image_BHW)
    assert torch.equal(plain.label_B, by_kernel.label_B)
    assert torch.equal(plain.id_B, by_kernel.id_B)


class Operators(TorchDispatchMode):
    """The names of torch's operators that are called in it, kernels included."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> object:
        self.names.append(func.overloadpacket.__qualname__.split(".")[-1])
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("turn", [0.0, 15.0])
def test_a_batch_of_the_resident_feed_is_one_launch(turn: float, small: Records) -> None:
    """Nothing is gathered, cloned or copied beside it: it writes into the feed's own batch."""
    feed = make("resident", small, GATHER, AugmentConfig(rotate_degrees=turn))
    batches = feed.batches(0)
    addresses = {next(batches).image_BHW.data_ptr()}
    with Operators() as seen:
        addresses |= {batch.image_BHW.data_ptr() for batch in batches}
    num_batches = feed.order.steps_per_epoch - 1
    assert num_batches > 3
    assert seen.names.count("gather_warp") == num_batches
    assert not {"clone", "copy_", "index_select", "index", "grid_sampler_2d"} & set(seen.names)
    assert len(addresses) == 1


@pytest.mark.parametrize("name", ["resident", "synthetic", "loader_batched"])
def test_torch_warps_only_where_numba_is_missing(
    name: str, small: Records, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On a CPU, whatever feed and kernels; grey values are the same within one."""
    found = []
    for has_numba in (True, False):
        monkeypatch.setattr(cpu, "is_here", lambda has_numba=has_numba: has_numba)
        feed = make(name, small, NONE, AugmentConfig(rotate_degrees=15.0))
        with Operators() as seen:
            found.append(copied(next(feed.batches(0))))
        assert ("grid_sampler_2d" in seen.names) == (not has_numba)
        assert "gather_warp" not in seen.names
        feed.close()
    away = (found[0].image_BHW.int() - found[1].image_BHW.int()).abs()
    assert away.max() <= 1 and away.float().mean() < 0.01


def test_a_run_whose_feed_gathers_itself_does_not_name_the_gather(
    small: Records, world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(available, "cannot_fuse", lambda device: "")
    for feed, used in (("resident", set(kernels.ALL)), ("loader", set(kernels.ALL) - GATHER)):
        config = override(RunConfig(), {"kernels": "all", "data.feed": feed}, "test")
        effective, notes = effective_config(config, small, world)
        assert set(effective.kernels) == used
        assert any("gather_warp is not used" in note for note in notes) == (feed == "loader")


def test_distorted_batches_cannot_be_gathered_in_a_launch(small: Records) -> None:
    """They would come undistorted, which nobody would see."""
    split = small.split("train")
    augment = AugmentConfig(rotate_degrees=15.0)
    feed = ResidentFeed(split, order_of(small), CPU, GATHER, augment)
    feed.load_epoch(0)
    with pytest.raises(AssertionError, match="handed out, not gathered"):
        feed.gather(torch.tensor([0]), Batch.empty(30, (28, 28), CPU))


def layer(channels: int) -> tuple[torch.Tensor, torch.Tensor]:
    return float64(channels, 1, 3, 3), float64(channels)


def second_layer(inputs: int, outputs: int, given: int = 0) -> None:
    """conv2_pool_relu of so many channels, or of other values than its weights are for."""
    weight = torch.zeros(outputs, inputs, 3, 3)
    whole._op(torch.zeros(2, given or inputs, 4, 4), weight, torch.zeros(outputs), weight)


def gather_with(**changed: torch.Tensor) -> None:
    """gather_warp of arguments that fit, but for those changed."""
    _, fitting = operators()[4]
    names = [argument.name for argument in torch.ops.tmnist.gather_warp.default._schema.arguments]
    gather.gather_warp(**dict(zip(names, fitting, strict=True)) | changed)


def head_of(*, width: int = 8, rows: int = 9, label: torch.dtype = torch.uint8) -> None:
    weight, bias = torch.zeros(rows, 8), torch.zeros(9)
    head_file.linear_cross_entropy(
        torch.zeros(3, width), weight, bias, torch.zeros(3, dtype=label), 0.0
    )


def loss_of(label_B: torch.Tensor) -> None:
    loss_file.softmax_cross_entropy(torch.zeros(3, 9), label_B, 0.0)


@pytest.mark.parametrize(
    "call, sentence",
    [
        (
            lambda: first._op(torch.zeros(2, 8, 8), *layer(32), torch.float32),
            "image is torch.float32; give torch.uint8",
        ),
        (
            lambda: first._op(torch.zeros(2, 8, 8).byte(), *layer(20), torch.float32),
            "20 channels are not a multiple of 32",
        ),
        (
            lambda: second._op(torch.zeros(2, 32, 4, 4), torch.zeros(31)),
            r"bias has shape \[31\]; give \[32\]",
        ),
        (
            lambda: second_layer(40, 32),
            "40 to 32 channels are not multiples of 16 to multiples of 32, up to 256; leave",
        ),
        (
            lambda: second_layer(16, 288),
            "16 to 288 channels are not multiples of 16 to multiples of 32, up to 256; leave",
        ),
        (
            lambda: second_layer(32, 32, given=16),
            r"x has shape \[2, 16, 4, 4\]; give \[any, 32, any, any\]",
        ),
        (
            lambda: loss_of(torch.zeros(4).byte()),
            r"label has shape \[4\]; give \[3\]",
        ),
        (
            lambda: loss_of(torch.zeros(3)),
            "label is torch.float32; give torch.uint8",
        ),
        (
            lambda: head_of(width=7),
            r"weight has shape \[9, 8\]; give \[any, 7\]",
        ),
        (
            lambda: head_of(rows=10),
            r"bias has shape \[9\]; give \[10\]",
        ),
        (
            lambda: head_of(label=torch.int64),
            "label is torch.int64; give torch.uint8",
        ),
        (
            lambda: head_file.linear_cross_entropy(
                torch.zeros(3, 513), torch.zeros(9, 513), torch.zeros(9), torch.zeros(3).byte(), 0.0
            ),
            "a layer of 513 numbers and 9 classes is too large; give at most 512 and 256",
        ),
        (
            lambda: gather_with(out_MHW=torch.zeros(4, 8, 8)),
            "out is torch.float32; give torch.uint8",
        ),
        (
            lambda: gather_with(out_MHW=torch.zeros(4, 8, 16).byte()[:, :, ::2]),
            "out is not contiguous; give",
        ),
        (
            lambda: gather_with(matrix_M23=torch.zeros(3, 2, 3)),
            r"matrix has shape \[3, 2, 3\]; give \[4, 2, 3\]",
        ),
        (
            lambda: gather_with(matrix_M23=torch.zeros(4, 3, 2).transpose(1, 2)),
            "matrix is not contiguous; give",
        ),
        (
            lambda: gather_with(step_K=torch.zeros(2)),
            "step is torch.float32; give torch.int64",
        ),
        (
            lambda: gather_with(id_M=torch.arange(5)),
            r"out id has shape \[5\]; give \[4\]",
        ),
    ],
)
def test_what_does_not_fit_is_refused_with_a_sentence(
    call: Callable[[], object], sentence: str
) -> None:
    with pytest.raises(ValueError, match=sentence) as caught:
        call()
    assert "\n" not in str(caught.value)


def test_the_config_names_the_kernels() -> None:
    assert override(RunConfig(), {"kernels": "all"}, "test").kernels == kernels.ALL
    assert override(RunConfig(), {"kernels": kernels.NAMES}, "test").kernels == kernels.NAMES
    for name in kernels.NAMES:
        text = (ROOT / "kernels" / f"{name}.py").read_text()
        assert f"def {name}(" in text
        assert f"tmnist::{name}" in text or name == "adamw", "no layer: nobody differentiates it"
        assert "Bytes a sample" in text or "Bytes a parameter" in text


@pytest.mark.parametrize("name", kernels.NAMES)
def test_a_kernel_file_is_reference_jit_launcher_autograd(name: str) -> None:
    """What is launched is named op_direction: a profiler shows that name and no file's."""
    tree = ast.parse((ROOT / "kernels" / f"{name}.py").read_text())
    functions = [node for node in tree.body if isinstance(node, ast.FunctionDef)]
    references = [f.lineno for f in functions if f.name.startswith(f"{name}_")][:1]
    jits = {f.name: f.lineno for f in functions if decorated(f, "triton.jit")}
    launchers = [f.lineno for f in functions if decorated(f, "torch.library.custom_op")]
    autograd = [f.lineno for f in functions if f.name in ("_save", "_differentiate")]
    order = [*references, *jits.values(), *launchers, *autograd]
    assert order == sorted(order)
    assert any(f.name == f"{name}_reference" for f in functions)
    launched = started(tree)
    assert launched <= jits.keys()
    for kernel in launched:
        pattern = rf"{name}_((forward|(input_|weight_)?backward)(_sum)?|check|update)"
        assert re.fullmatch(pattern, kernel), kernel
    for helper in jits.keys() - launched:
        assert helper.startswith("_"), f"{helper} is launched by nobody"


def decorated(function: ast.FunctionDef, decorator: str) -> bool:
    return any(ast.unparse(d).startswith(decorator) for d in function.decorator_list)


def started(tree: ast.Module) -> set[str]:
    """The names of the kernels that a file hands to `start`."""
    calls = [node for node in ast.walk(tree) if isinstance(node, ast.Call)]
    return {ast.unparse(call.args[0]) for call in calls if ast.unparse(call.func) == "start"}


def effective(records: Records, here: World) -> tuple[RunConfig, str]:
    """With all kernels asked for."""
    config, notes = effective_config(override(RunConfig(), {"kernels": "all"}, ""), records, here)
    return config, " ".join(notes)


def test_what_cannot_be_had_is_said(
    small: Records, world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    config, notes = effective(small, world)
    assert config.kernels == kernels.ON_CPU
    assert "gather_warp, softmax_cross_entropy, adamw are not used: there is no GPU" in notes
    monkeypatch.setattr(cpu, "is_here", lambda: False)
    config, notes = effective(small, world)
    assert config.kernels == ()
    assert "Triton kernels are not used: there is no GPU" in notes
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    monkeypatch.setattr(kernels.sysconfig, "get_path", lambda name: "/nowhere")
    assert "install python3-dev" in effective(small, world)[1]
    monkeypatch.delenv("CC", raising=False)
    monkeypatch.setattr(kernels.shutil, "which", lambda name: None)
    assert "Triton needs a C compiler" in effective(small, world)[1]
    monkeypatch.setattr(kernels, "find_spec", lambda name: None)
    assert "Triton is not installed; pip install" in effective(small, world)[1]


def test_one_kernel_computes_the_loss(
    small: Records, world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(available, "cannot_fuse", lambda device: "")
    config = override(RunConfig(), {"kernels": kernels.NAMES}, "test")
    used, notes = effective_config(config, small, world)
    assert set(used.kernels) == set(kernels.NAMES) - {"softmax_cross_entropy", "bias_pool_relu"}
    assert "softmax_cross_entropy is not used: linear_cross_entropy computes the loss" in notes


def test_the_kernel_of_the_whole_second_layer_is_named_or_off(
    small: Records, world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where it runs, bias_pool_relu has nothing to do; where it cannot, that one stays."""
    both = override(RunConfig(), {"kernels": "bias_pool_relu,conv2_pool_relu"}, "test")
    config, notes = effective_config(both, small, world)
    assert config.kernels == ("bias_pool_relu",)
    assert "Triton kernels conv2_pool_relu are not used: there is no GPU" in " ".join(notes)
    monkeypatch.setattr(available, "cannot_fuse", lambda device: "")
    config, notes = effective_config(both, small, world)
    assert config.kernels == ("conv2_pool_relu",)
    why = "bias_pool_relu is not used: conv2_pool_relu computes the whole layer"
    assert why in " ".join(notes)


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
    words = ["--data", small_dir, "--epochs", 1, "--batch-size", 64, "--kernels", "all"]
    done = command("python", "-m", "engine.run", *words, "--out", tmp_path / "run")
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("are not used: there is no GPU") == 1


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
    """113 KB a sample with two bits a pooled value; 25.1 MFLOP; 27 M samples/s."""
    shapes = roofline.Shapes(28, 28, 94)
    kilobytes = [round(work.num_bytes / 1000, 1) for work in roofline.floor(shapes)]
    assert kilobytes == [2.4, 15.7, 19.6, 7.2, 12.8, 19.6, 19.6, 15.7]
    assert sum(w.flops for w in roofline.floor(shapes)) == pytest.approx(25.06e6, rel=1e-3)
    frozen = roofline.frozen_floor(shapes)
    saved = sum(w.num_bytes for w in roofline.floor(shapes)) - sum(w.num_bytes for w in frozen)
    assert saved == pytest.approx(19.6e3 + 15.7e3 + 32 * 14 * 14 / 4, rel=0.01)
    only_bytes = roofline.predicted_s(roofline.floor(shapes), 3e12, 1e30)
    assert 1 / only_bytes == pytest.approx(27e6, rel=0.02)


def test_unknown_hardware_has_no_prediction() -> None:
    works = partial(roofline.studys_floor, 28, 28, 94, is_frozen=False)
    assert roofline.peak_flops("NVIDIA H100 80GB HBM3", "bf16") == 989e12
    assert roofline.peak_flops("NVIDIA H100 PCIe", "bf16") == 756e12
    assert roofline.peak_flops("NVIDIA H100 NVL", "bf16") == 835e12
    assert roofline.peak_flops("NVIDIA H100 MIG 1g.10gb", "bf16") is None
    assert roofline.peak_flops("Some CPU", "bf16") is None
    assert roofline.peak_flops(None, "bf16") is None
    assert roofline.roofline_fraction(1e6, "Some GPU", "bf16", 3e12, works) is None
    assert roofline.roofline_fraction(1e6, "NVIDIA H100 80GB HBM3", "bf16", None, works) is None
    fraction = roofline.roofline_fraction(12e6, "NVIDIA H100 80GB HBM3", "bf16", 3e12, works)
    assert fraction is not None and 0.4 < fraction < 0.6
    in_fp8 = roofline.roofline_fraction(12e6, "NVIDIA H100 80GB HBM3", "fp8", 3e12, works)
    assert in_fp8 is None and roofline.peak_flops("NVIDIA A100-SXM4-80GB", "fp8") is None
    assert roofline.copy_bandwidth(CPU) is None
