"""Every kernel in Triton's interpreter against float64.

Run by TRITON_INTERPRET=1 pytest tests/kernels/interpreted.py. fp32 and fp16 in full. bf16 only
where it is loaded, cast at once and stored, and to one unit in the last place: the interpreter of
triton 3.6 computes bf16 on raw bits (a product would be silently wrong) and truncates its stores.
Memory that a kernel should write is poisoned before (NaN, largest integers): torch's
fill_uninitialized_memory.
"""

import os
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch.nn import functional

from kernels import adamw as optimiser
from kernels import bias_pool_relu as second
from kernels import conv2_pool_relu as whole
from kernels import conv_pool_relu as first
from kernels import cpu, launch
from kernels import gather_warp as gather
from kernels import linear_cross_entropy as head_file
from kernels import softmax_cross_entropy as loss_file

SHAPES = [(1, 28, 28), (5, 28, 28), (3, 9, 7), (7, 4, 6)]
"""B, H, W: one and several turns of a program, odd sides (a row and column in no window), partly
filled blocks."""
UNIT = {torch.float32: 2.0**-23, torch.float16: 2.0**-10, torch.bfloat16: 2.0**-7}
"""Distance of neighbours at 1."""
LAUNCHED: set[str] = set()
"""Kernel, types and switches of every launch."""


@pytest.fixture(autouse=True)
def poisoned_and_recorded(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    assert launch.INTERPRETED, "run me with TRITON_INTERPRET=1"
    assert os.environ["TRITON_INTERPRET"] == "1", "run me with TRITON_INTERPRET=1"

    def start(kernel: Any, grid: tuple[int, ...], *args: Any, **constants: Any) -> None:
        types = [str(a.dtype).removeprefix("torch.") for a in args if isinstance(a, torch.Tensor)]
        named = ("WARPED", "CODED", "AFTER_RELU")
        switches = [f"{name}={value}" for name, value in constants.items() if name in named]
        LAUNCHED.add(" ".join([kernel.__name__, *types, *switches]))
        launch.start(kernel, grid, *args, **constants)

    for file in (first, second, whole, gather, loss_file, head_file, optimiser):
        monkeypatch.setattr(file, "start", start)
    torch.manual_seed(0)
    torch.use_deterministic_algorithms(True)
    assert torch.utils.deterministic.fill_uninitialized_memory
    assert torch.zeros(1).new_empty(3).isnan().all(), "poison works"
    yield
    torch.use_deterministic_algorithms(False)


def close(
    got: torch.Tensor,
    wanted: torch.Tensor,
    dtype: torch.dtype,
    scale: float = 1.0,
    units: float = 1.0,
) -> None:
    """Within so many units in the last place of `dtype`, and of fp32 sums of size `scale`."""
    error = (got.double() - wanted.double()).abs()
    allowed = units * UNIT[dtype] * wanted.double().abs() + 4e-6 * scale
    if dtype == torch.float16:
        allowed += 1e-7  # its smallest numbers
    assert got.shape == wanted.shape
    assert (error <= allowed).all(), f"{(error - allowed).max()} too much"


@pytest.mark.parametrize("channels", [32, 64])
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_conv_pool_relu(dtype: torch.dtype, shape: tuple[int, int, int], channels: int) -> None:
    image = torch.randint(256, shape, dtype=torch.uint8)
    image[0, : shape[1] // 2] = 0  # a blank part: ties and, with a negative bias, nothing passes
    weight = torch.randn(channels, 1, 3, 3).requires_grad_()
    bias = torch.randn(channels).requires_grad_()
    y, code = first._op(image, weight, bias, dtype)
    frozen = first.conv_pool_relu(image, weight.detach(), bias.detach(), dtype)
    assert torch.equal(frozen, y), "without a code"
    rounded = weight.detach().to(dtype).double()
    pixels = image[:, None].double() / 255
    candidates = functional.conv2d(pixels, rounded, bias.detach().double(), padding=1)
    close(y, functional.relu(functional.max_pool2d(candidates, 2)), dtype, scale=5)

    winner, passes = launch.unpack_code(code)
    wanted, _ = launch.pool_reference(candidates, torch.zeros(channels, dtype=torch.float64))
    rows = wanted.permute(0, 2, 3, 1).reshape(-1, channels)
    assert passes[rows > 1e-4].all(), "what is clearly positive passes"
    chosen, _ = launch.unpool_reference(torch.ones_like(wanted), code, *shape[1:])
    chosen_values = functional.avg_pool2d(chosen * candidates, 2) * 4
    assert (chosen_values - wanted).abs().max() < 1e-4, "the winner is the largest"
    assert (winner < 4).all()

    grad = torch.randn_like(y)
    y.backward(grad)
    exact = first.conv_pool_relu_backward_reference(grad, code, image, torch.float64)
    sums = first.conv_pool_relu_backward_reference(grad.abs(), code, image, torch.float64)
    for got, want, size in zip((weight.grad, bias.grad), exact, sums, strict=True):
        assert got is not None and got.dtype == torch.float32
        close(got, want, torch.float32, scale=float(size.max()))


def test_a_blank_image_gives_the_bias_and_the_first_winner() -> None:
    bias = torch.linspace(-1, 1, 32)
    image = torch.zeros(2, 8, 8, dtype=torch.uint8)
    y, code = first._op(image, torch.randn(32, 1, 3, 3), bias, torch.float32)
    assert torch.equal(y, bias.clamp(min=0)[None, :, None, None].expand_as(y))
    winner, passes = launch.unpack_code(code)
    assert not winner.any()
    assert torch.equal(passes, (bias > 0).expand_as(passes))


@pytest.mark.parametrize("layout", ["channels_last", "contiguous", "every_other"])
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_bias_pool_relu(dtype: torch.dtype, shape: tuple[int, int, int], layout: str) -> None:
    size, height, width = shape
    x = torch.randint(-8, 9, (2 * size, 64, height, width)).to(dtype)  # whole numbers: many ties
    x = x[::2] if layout == "every_other" else x[:size]
    x = x.to(memory_format=torch.channels_last) if layout == "channels_last" else x
    x.requires_grad_()
    bias = torch.randn(64).requires_grad_()
    y, code = second._op(x, bias)
    pooled, index = functional.max_pool2d(x.detach().double(), 2, return_indices=True)
    before = pooled + bias.detach().double()[:, None, None]
    close(y, functional.relu(before), dtype)
    winner, passes = launch.unpack_code(code)
    place = (index // width % 2 * 2 + index % width % 2).permute(0, 2, 3, 1).reshape(-1, 64)
    assert torch.equal(winner, place), "of equal values the first wins, as PyTorch has it"
    assert torch.equal(passes, (before > 0).permute(0, 2, 3, 1).reshape(-1, 64))

    grad = torch.randn(y.shape).to(dtype)
    y.backward(grad)
    twin = x.detach().double().requires_grad_()
    twin_bias = bias.detach().double().requires_grad_()
    twin_y = functional.relu(functional.max_pool2d(twin, 2) + twin_bias[:, None, None])
    twin_y.backward(grad.double())
    assert x.grad is not None and twin.grad is not None
    assert torch.equal(x.grad.double(), twin.grad), "a gradient is moved, not computed"
    assert bias.grad is not None and twin_bias.grad is not None
    largest = float(grad.double().abs().sum((0, 2, 3)).max())
    close(bias.grad, twin_bias.grad, torch.float32, scale=largest)


def test_a_gradient_without_memory_of_its_own_is_taken() -> None:
    x = torch.randn(2, 32, 4, 4).requires_grad_()
    bias = torch.zeros(32).requires_grad_()
    second.bias_pool_relu(x, bias).sum().backward()  # its gradient is one number, expanded
    assert x.grad is not None and x.grad.sum() == (functional.max_pool2d(x, 2) > 0).sum()


def test_nan_is_not_lost_in_a_pool() -> None:
    for place in range(4):
        x = torch.zeros(1, 32, 2, 2)
        x[0, 5, place // 2, place % 2] = torch.nan
        y = second.bias_pool_relu(x, torch.zeros(32))
        assert y.isnan().sum() == 1 and y[0, 5].isnan()


LAYERS = [(1, 14, 14, 32, 64), (3, 9, 7, 16, 32), (5, 4, 6, 48, 96), (2, 5, 4, 64, 128)]
"""B, H, W, channels in and out: the study's; odd sides; blocks of fewer channels than the most; and
more channels than a block."""


@pytest.mark.parametrize("layer", LAYERS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_conv2_pool_relu(
    dtype: torch.dtype, layer: tuple[int, int, int, int, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    """At odd sizes in two programs, so that there are partial sums to add, and a turn too many."""
    monkeypatch.setattr(launch, "num_processors", lambda tensor: 1 + layer[1] % 2)
    size, height, width, inputs, outputs = layer
    x = torch.randn(size, inputs, height, width)
    x[0, :, :3] = 0  # a blank part: ties and, with a negative bias, nothing passes
    x = x.to(dtype).requires_grad_()
    weight = (torch.randn(outputs, inputs, 3, 3) / 8).requires_grad_()
    bias = torch.randn(outputs).requires_grad_()
    y, code = whole._op(x, weight, bias, weight.detach().to(x.dtype))
    values, rounded = x.detach().double(), weight.detach().to(dtype).double()
    candidates = functional.conv2d(values, rounded, padding=1)
    wanted, _ = launch.pool_reference(candidates, bias.detach().double())
    close(y, wanted, dtype, scale=5)

    winner, passes = launch.unpack_code(code)
    rows = wanted.permute(0, 2, 3, 1).reshape(-1, outputs)
    assert torch.equal(passes, (y > 0).permute(0, 2, 3, 1).reshape(-1, outputs))
    assert passes[rows > 1e-4].all(), "what is clearly positive passes"
    largest, _ = launch.pool_reference(candidates - candidates.min(), torch.zeros(outputs))
    every = launch.pack_code(winner, torch.ones_like(passes))
    chosen, _ = launch.unpool_reference(torch.ones_like(wanted), every, height, width)
    chosen_values = functional.avg_pool2d(chosen * candidates, 2) * 4 - candidates.min()
    assert (chosen_values - largest).abs().max() < 1e-4, "the winner is the largest"
    assert not winner.view(size, -1, outputs)[0, 0].any(), "of equal values the first wins"

    grad = torch.randn(y.shape).to(dtype)
    y.backward(grad)
    check_gradients(dtype, grad, code, (x, weight, bias), rounded)


def check_gradients(
    dtype: torch.dtype,
    grad: torch.Tensor,
    code: torch.Tensor,
    leaves: tuple[torch.Tensor, torch.Tensor, torch.Tensor],
    rounded: torch.Tensor,
) -> None:
    """The three gradients are those of float64, for the winners of the code."""
    x, weight, bias = leaves
    height_width = x.shape[2:]
    exact = [
        whole.conv2_pool_relu_input_backward_reference(g, code, w, *height_width)
        for g, w in ((grad.double(), rounded), (grad.double().abs(), rounded.abs()))
    ]
    assert x.grad is not None and x.grad.dtype == dtype
    close(x.grad, exact[0], dtype, scale=float(exact[1].max()))
    values = x.detach()
    sums = [
        whole.conv2_pool_relu_weight_backward_reference(g, code, v, torch.float64)
        for g, v in ((grad, values), (grad.abs(), values.abs()))
    ]
    for got, want, size in zip((weight.grad, bias.grad), *sums, strict=True):
        assert got is not None and got.dtype == torch.float32
        close(got, want, torch.float32, scale=float(size.max()))


def test_a_nan_reaches_what_sees_it_and_no_other() -> None:
    x = torch.randn(2, 32, 6, 6)
    x[0, 3, 2, 2] = torch.nan
    weight = torch.randn(32, 32, 3, 3)
    y = whole.conv2_pool_relu(x, weight, torch.zeros(32))
    wanted = torch.zeros(2, 3, 3, dtype=torch.bool)
    wanted[0, :2, :2] = True
    assert torch.equal(y.isnan(), wanted[:, None].expand_as(y))


def test_no_gradient_of_x_is_computed_for_a_frozen_first_layer() -> None:
    before = LAUNCHED.copy()
    LAUNCHED.clear()
    x = torch.randn(2, 32, 4, 4)
    weight = torch.randn(32, 32, 3, 3).requires_grad_()
    whole.conv2_pool_relu(x, weight, torch.zeros(32)).sum().backward()
    assert weight.grad is not None and weight.grad.any()
    assert not any("_input_backward" in name for name in LAUNCHED)
    LAUNCHED.update(before)


@pytest.mark.parametrize("smoothing", [0.0, 0.05])
@pytest.mark.parametrize("batch_size, num_classes", [(1, 94), (37, 94), (5, 8), (8, 128), (3, 200)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_softmax_cross_entropy(
    dtype: torch.dtype, batch_size: int, num_classes: int, smoothing: float
) -> None:
    wide = (4 * torch.randn(batch_size, num_classes + 3)).to(dtype)
    logits = wide[:, :num_classes].detach()  # rows lie further apart than they are long
    logits.requires_grad_()
    label = torch.randint(num_classes, (batch_size,), dtype=torch.uint8)
    twin = logits.detach().double().requires_grad_()
    wanted = functional.cross_entropy(twin, label.long(), label_smoothing=smoothing)
    scale = 1024.0 if dtype == torch.float16 else 3.0
    loss, correct = loss_file.softmax_cross_entropy(logits, label, smoothing)
    assert loss.dtype == torch.float32
    assert loss.item() == pytest.approx(wanted.item(), rel=1e-6)
    first_best = (twin == twin.amax(1, keepdim=True)).int().argmax(1)
    assert correct.item() == (first_best == label).sum()
    (scale * loss).backward()
    (scale * wanted).backward()
    assert logits.grad is not None and twin.grad is not None and logits.grad.dtype == dtype
    close(logits.grad, twin.grad, dtype, scale=scale / batch_size, units=2)  # rounded twice
    assert logits.grad.double().sum(1).abs().max() <= num_classes * UNIT[dtype] * scale / batch_size


def test_a_label_that_is_no_class_and_a_nan_reach_the_loss() -> None:
    logits = torch.randn(3, 8)
    label = torch.tensor([1, 8, 2], dtype=torch.uint8)
    assert loss_file.softmax_cross_entropy(logits, label, 0.05)[0].isnan()
    logits[0, 3] = torch.nan
    assert loss_file.softmax_cross_entropy(logits, label.clamp(max=7), 0.05)[0].isnan()
    ties = torch.zeros(2, 8)
    _, correct = loss_file.softmax_cross_entropy(ties, torch.tensor([0, 1], dtype=torch.uint8), 0.0)
    assert correct == 1, "of equal logits the first is the answer"


HEADS = [(1, 128, 94), (37, 128, 94), (5, 20, 8), (19, 96, 128), (3, 140, 200)]
"""B, D, K: one and several turns and chunks, sizes that fill no block, the widest classes."""


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
@pytest.mark.parametrize("batch_size, width, num_classes", HEADS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_linear_cross_entropy(
    dtype: torch.dtype, batch_size: int, width: int, num_classes: int, smoothing: float
) -> None:
    """With smoothing also as after a linear layer and its ReLU."""
    wide = torch.randn(batch_size, width + 3).to(dtype)
    relu_bias = torch.zeros(width, dtype=dtype).requires_grad_() if smoothing > 0 else None
    if relu_bias is not None:
        wide.relu_()
    hidden = wide[:, :width].detach().requires_grad_()  # rows lie further apart than they are long
    weight = (3 * torch.randn(num_classes, width) / width**0.5).requires_grad_()
    bias = torch.randn(num_classes).requires_grad_()
    label = torch.randint(num_classes, (batch_size,), dtype=torch.uint8)
    rounded = weight.detach().to(dtype)
    twins = [t.detach().double().requires_grad_() for t in (hidden, rounded, bias)]
    logits = functional.linear(*twins)
    wanted = functional.cross_entropy(logits, label.long(), label_smoothing=smoothing)
    scale = 1024.0 if dtype == torch.float16 else 3.0
    loss, correct = head_file.linear_cross_entropy(
        hidden, weight, bias, label, smoothing, relu_bias
    )
    assert loss.dtype == torch.float32
    assert loss.item() == pytest.approx(wanted.item(), rel=1e-5)
    assert correct.item() == (logits.argmax(1) == label).sum()
    (scale * loss).backward()
    (scale * wanted).backward()
    ours = [hidden, weight, bias]
    if relu_bias is not None:
        assert (hidden == 0).any() and twins[0].grad is not None
        twins[0].grad *= hidden > 0
        ours.append(relu_bias)
        twins.append(torch.empty(width, dtype=torch.float64))
        twins[3].grad = twins[0].grad.sum(0)
    chosen = functional.one_hot(label.long(), num_classes) * (1 - smoothing)
    unit = (logits.detach().softmax(1) - chosen - smoothing / num_classes).abs()
    hidden_size = unit @ rounded.double().abs()
    sizes = [hidden_size, unit.T @ hidden.detach().double().abs(), unit.sum(0), hidden_size.sum(0)]
    for our, twin, size in zip(ours, twins, sizes[: len(ours)], strict=True):
        assert our.grad is not None and twin.grad is not None and our.grad.dtype == our.dtype
        largest = float(size.max()) * scale / batch_size
        rounded_unit = UNIT[dtype] / 4e-6 if dtype == torch.float16 and our is not bias else 1.0
        close(our.grad, twin.grad, our.dtype, scale=largest * rounded_unit, units=2)


def test_many_samples_of_few_programs_are_all_counted(monkeypatch: pytest.MonkeyPatch) -> None:
    """Turns beyond the first, a last one that is partly filled, and partial sums of several."""
    monkeypatch.setattr(launch, "num_processors", lambda tensor: 3)
    hidden, label = torch.randn(16 * 7 + 5, 20), torch.zeros(16 * 7 + 5, dtype=torch.uint8)
    weight, bias = torch.randn(9, 20), torch.randn(9)
    found = head_file._op(hidden, weight, bias, label, 0.1, bias.new_zeros(20))
    wanted = head_file.linear_cross_entropy_reference(hidden, weight, bias, label, 0.1, True)
    for a, b in zip(found, wanted, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=2e-5)


@pytest.mark.parametrize("place", ["hidden", "weight", "bias", "label"])
def test_what_is_no_number_or_no_class_reaches_the_heads_loss(place: str) -> None:
    given = {"hidden": torch.randn(3, 20), "weight": torch.randn(9, 20), "bias": torch.randn(9)}
    label = torch.tensor([1, 9 if place == "label" else 8, 2], dtype=torch.uint8)
    if place in given:
        given[place].flatten()[5] = torch.nan
    assert head_file.linear_cross_entropy(*given.values(), label, 0.1)[0].isnan()
    for t in given.values():
        t.zero_()
    _, correct = head_file.linear_cross_entropy(*given.values(), label.clamp(max=1) - 1, 0.0)
    assert correct == 3, "of equal logits the first is the answer"


@pytest.mark.parametrize("warped", [False, True])
@pytest.mark.parametrize("shape", [(28, 28), (9, 7)])
def test_gather_warp(shape: tuple[int, int], warped: bool) -> None:
    num, batch_size, margin = 20, 5, 3
    image = torch.randint(256, (num, *shape), dtype=torch.uint8)
    label = torch.randint(94, (num,), dtype=torch.uint8)
    table = torch.randint(-1, num, (6, batch_size))
    step = torch.tensor([5, 0, 3])
    size = len(step) * batch_size
    matrix = distortions(size) if warped else None
    whole = [
        torch.full((size + 2 * margin, *shape), 77, dtype=torch.uint8),
        torch.full((size + 2 * margin,), 77, dtype=torch.uint8),
        torch.full((size + 2 * margin,), 77, dtype=torch.int64),
    ]
    out = [t[margin : margin + size] for t in whole]
    gather.gather_warp(image, label, table, step, matrix, *out)
    number = table[step].flatten()
    assert torch.equal(out[2], number)
    assert torch.equal(out[1], label[number.clamp(min=0)])
    for t in whole:
        beside = torch.cat([t[:margin], t[-margin:]])
        assert (beside == 77).all(), "nothing beside the buffers is written"
    if matrix is None:
        assert torch.equal(out[0], image[number.clamp(min=0)])
        return
    wanted = [torch.empty_like(t) for t in out]
    gather.gather_warp_reference(image, label, table, step, matrix, *wanted)
    away = (out[0].int() - wanted[0].int()).abs()
    assert away.max() <= 1, "rounded to nearest, but for fp32's own rounding"
    assert away.float().mean() < 0.02
    assert not out[0][0].any(), "what lies far outside is black"
    if cpu.warps(image):
        cpu.warp(image, number.clamp(min=0), matrix, wanted[0])
        away = (out[0].int() - wanted[0].int()).abs()
        assert away.max() <= 1, "and so it is where it is compiled for a CPU"
        assert away.float().mean() < 0.02


def distortions(size: int) -> torch.Tensor:
    """Random warps, the first of which looks far outside."""
    matrix = torch.eye(2, 3).repeat(size, 1, 1) + 0.2 * torch.randn(size, 2, 3)
    matrix[:, :, 2] *= 20
    matrix[0] = torch.tensor([[1, 0, 1e9], [0, 1, -1e9]])
    return matrix


def test_the_identity_and_whole_shifts_move_pixels_exactly() -> None:
    image = torch.randint(256, (3, 9, 7), dtype=torch.uint8)
    labels = torch.zeros(3, dtype=torch.uint8)
    rows = torch.arange(3)
    step = torch.zeros(1, dtype=torch.int64)
    matrix = torch.eye(2, 3).repeat(3, 1, 1)
    matrix[1, 0, 2] = 2
    matrix[2, 1, 2] = -3
    out = torch.empty_like(image)
    gather.gather_warp(image, labels, rows[None], step, matrix, out, labels, rows.clone())
    assert torch.equal(out[0], image[0])
    assert torch.equal(out[1], functional.pad(image[1, :, 2:], (0, 2)))
    assert torch.equal(out[2], functional.pad(image[2, :-3], (0, 0, 3, 0)))


DECAY, BETAS, EPS = 0.1, (0.9, 0.97), 1e-8


def flat_of(num_rounded: int, num_plain: int, num_decayed: tuple[int, int]) -> optimiser.Flat:
    """Drawn parameters at their start, a margin of NaN behind each buffer that is written."""
    size = num_rounded + num_plain
    buffers = [torch.full((size + 8,), torch.nan)[:size] for _ in range(3)]
    buffers[0].copy_(torch.randn(size))
    buffers[1].zero_()
    buffers[2].zero_()
    rounded_grad_R = torch.zeros(num_rounded, dtype=torch.bfloat16)
    shadow_R = torch.full((num_rounded + 8,), torch.nan, dtype=torch.bfloat16)[:num_rounded]
    return optimiser.Flat(*buffers, rounded_grad_R, shadow_R, torch.zeros(num_plain), num_decayed)


def rates_of(num_tensors: int) -> optimiser.Rates:
    zeros = (torch.zeros(()), torch.zeros(num_tensors), torch.zeros(()), torch.zeros(4))
    return optimiser.Rates(*zeros, BETAS, DECAY, EPS)


def draw_gradients(flat: optimiser.Flat) -> torch.Tensor:
    """Of a size of their own; in fp32, as they are read."""
    for grad in (flat.rounded_grad_R, flat.grad_F):
        grad.copy_(torch.randn(grad.shape) * 10.0 ** torch.randint(-6, 2, ()))
    return torch.cat([flat.rounded_grad_R.float(), flat.grad_F])


@pytest.mark.parametrize(
    "num_rounded, num_plain, num_decayed",
    [
        (0, 1, (0, 0)),
        (0, 2077, (0, 1031)),
        (1024, 0, (1024, 0)),
        (1031, 1046, (16, 1037)),
        (2048, 5, (2041, 0)),
    ],
)
def test_adamw(num_rounded: int, num_plain: int, num_decayed: tuple[int, int]) -> None:
    """25 steps, each from where torch's fused AdamW stands: within 2 * 2^-23 of the larger of a
    number and what it was, which is up to two units in its last place, four if it is just above a
    power of two."""
    flat, rates = flat_of(num_rounded, num_plain, num_decayed), rates_of(3)
    kinds = [num_decayed[0], num_rounded - num_decayed[0]]
    kinds += [num_decayed[1], num_plain - num_decayed[1]]
    parts = [part.clone() for part in flat.param_P.split(kinds)]
    groups = [
        {"params": [part], "weight_decay": decay}
        for part, decay in zip(parts, (DECAY, 0.0, DECAY, 0.0), strict=True)
        if len(part)
    ]
    torchs = torch.optim.AdamW(groups, rates.rate, BETAS, weight_decay=0.0, fused=True)
    for step in range(25):
        rates.rate.fill_(1e-3 * (1 + step % 5))
        for part, grad_P in zip(parts, draw_gradients(flat).split(kinds), strict=True):
            part.grad = grad_P
        before = [part.clone() for part in flat[:3]]
        torchs.step()
        optimiser.adamw(flat, rates)
        wanted = [torch.cat(parts)]
        for key in ("exp_avg", "exp_avg_sq"):
            wanted.append(torch.cat([torchs.state[part][key] for part in parts if len(part)]))
        for got, was, want in zip(flat[:3], before, wanted, strict=True):
            allowed = 2 * 2.0**-23 * torch.maximum(was.abs(), want.abs()) + 1e-38
            apart = (got - want).abs() / allowed
            assert (apart <= 1).all(), (step, apart.max())
        close(flat.shadow_R, flat.param_P[:num_rounded], torch.bfloat16)
        for got, want in zip(flat[:3], wanted, strict=True):
            got.copy_(want)
    assert (rates.step_T == 25).all() and rates.bad == 0
    for buffer in (*flat[:3], flat.shadow_R):
        size = len(buffer)
        margin = buffer.as_strided((size + 8,), (1,))[size:]
        assert margin.isnan().all(), "the margin is left"


@pytest.mark.parametrize("fault", [torch.nan, torch.inf, -torch.inf, 0.0])
@pytest.mark.parametrize("place", [3, 1030, 1031, 2076])
def test_adamw_leaves_everything_where_a_gradient_is_not_finite(place: int, fault: float) -> None:
    """In bf16 or fp32, first or last, or found before: nothing moves."""
    flat, rates = flat_of(1031, 1046, (16, 1037)), rates_of(3)
    rates.rate.fill_(1e-3)
    draw_gradients(flat)
    optimiser.adamw(flat, rates)
    assert rates.bad == 0 and (rates.step_T == 1).all()
    if place < 1031:
        flat.rounded_grad_R[place] += fault
    else:
        flat.grad_F[place - 1031] += fault
    before = [tensor.clone() for tensor in flat[:-1]]
    if fault == 0:
        rates.bad.fill_(1)
    optimiser.adamw(flat, rates)
    assert rates.bad == 1 and (rates.step_T == 1).all()
    for got, want in zip(flat[:-1], before, strict=True):
        assert torch.equal(got.nan_to_num(), want.nan_to_num())


NEW = "gather_warp,conv_pool_relu,conv2_pool_relu,linear_cross_entropy"
"""The second layer and the head by the kernels that `all` leaves out."""


@pytest.mark.parametrize("precision, names", [("fp32", "all"), ("fp16", "all"), ("fp32", NEW)])
def test_a_training_step_with_kernels_is_the_plain_step(
    precision: str, names: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """12 steps of 6 samples, fp16 by autocast on the CPU; 2 a launch: gather_warp gathers.

    conv2_pool_relu and adamw take all at once, for speed; the former takes a minute all the same,
    so its steps are in fp32 alone.
    """
    from tests.kernels.training import train

    monkeypatch.setattr(optimiser, "BLOCK", 2**17)
    for blocks in ("FORWARD", "INPUT_BACKWARD", "WEIGHT_BACKWARD"):
        monkeypatch.setattr(whole, blocks, whole.Blocks(512, 32, 64))
        monkeypatch.setattr(whole, f"{blocks}_FP32", whole.Blocks(512, 32, 64))
    plain = train(precision, "off")
    fused = train(precision, names)
    tight = precision == "fp32"
    assert fused.loss_S == pytest.approx(plain.loss_S, rel=1e-5 if tight else 2e-2)
    falls = plain.loss_S[-3:].mean() < 0.7 * plain.loss_S[:3].mean()
    assert falls, "the loss must fall, or equality shows nothing"
    for name, wanted in plain.parameters.items():
        distance = (fused.parameters[name] - wanted).norm() / (wanted - plain.start[name]).norm()
        assert distance < (1e-3 if tight else 0.2), f"{name}: {distance:.1e} of the way it went"
    assert fused.accuracy == pytest.approx(plain.accuracy, abs=0 if tight else 0.05)


def test_every_branch_ran() -> None:
    """Last: each kernel in each type and with each switch that a launcher can ask for.

    bf16 products are excepted.
    """
    wanted = {
        "conv_pool_relu_backward_sum float32 float32 float32",
        "conv2_pool_relu_weight_backward_sum float32 float32 float32",
        "softmax_cross_entropy_forward_sum float32 float32 float32",
        "linear_cross_entropy_forward_sum " + " ".join(7 * ["float32"]),
        f"adamw_check bfloat16{' float32' * 5}",
        f"adamw_update bfloat16{' float32' * 7} bfloat16",
        "gather_warp_forward uint8 uint8 int64 int64 uint8 uint8 uint8 int64 WARPED=False",
        "gather_warp_forward uint8 uint8 int64 int64 float32 uint8 uint8 int64 WARPED=True",
    }
    for t in ("float32", "float16", "bfloat16"):
        if t != "bfloat16":
            coded = f"conv_pool_relu_forward uint8 float32 float32 {t} int32 CODED"
            wanted |= {f"{coded}=True", f"{coded}=False"}
            wanted.add(f"conv_pool_relu_backward {t} int32 uint8 float32")
            three = "float32 float32"
            four = f"{three} float32"
            for masks in ("AFTER_RELU=True", "AFTER_RELU=False"):
                head = f"linear_cross_entropy_forward {t} {three} uint8 {t} {three} {masks}"
                wanted.add(head)
            head = f"linear_cross_entropy_backward {t} {four} float32 {t} {three}"
            wanted |= {f"{head} {t}", f"{head} float32"}
            wanted.add(f"conv2_pool_relu_forward {t} {t} float32 {t} int32")
            wanted.add(f"conv2_pool_relu_input_backward {t} int32 {t} {t}")
            wanted.add(f"conv2_pool_relu_weight_backward {t} int32 {t} float32")
        wanted.add(f"bias_pool_relu_forward {t} float32 {t} int32")
        wanted.add(f"bias_pool_relu_backward {t} int32 {t} float32")
        wanted.add(f"softmax_cross_entropy_forward {t} uint8 float32 {t}")
        wanted.add(f"softmax_cross_entropy_backward {t} float32 {t}")
    assert wanted == LAUNCHED
