"""The kernels of the convolutions and poolings in Triton's interpreter, against float64.

Run by TRITON_INTERPRET=1 pytest tests/kernels/interpreted_layers.py.
"""

import pytest
import torch
from torch.nn import functional

from kernels import bias_pool_relu as second
from kernels import conv2_pool_relu as whole
from kernels import conv_pool_relu as first
from kernels import launch
from tests.kernels.interpreting import LAUNCHED, close, poisoned_and_recorded

__all__ = ["poisoned_and_recorded"]  # a fixture of every test

SHAPES = [(1, 28, 28), (5, 28, 28), (3, 9, 7), (7, 4, 6)]
"""B, H, W: one and several turns of a program, odd sides (a row and column in no window), partly
filled blocks."""


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


BLOCKS = [
    name + kind
    for name in ("FORWARD", "INPUT_BACKWARD", "WEIGHT_BACKWARD")
    for kind in ("", "_FP32")
]
LAYERS = [(1, 14, 14, 32, 64), (3, 9, 7, 16, 32), (5, 4, 6, 48, 32)]
"""B, H, W, channels in and out: the study's; odd sides; blocks of fewer channels than the most."""
WIDE = (2, 5, 4, 32, 64)
"""More channels in and out than a block, where it takes 16 and 32."""


@pytest.mark.parametrize("layer", [*LAYERS, WIDE])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_conv2_pool_relu(
    dtype: torch.dtype, layer: tuple[int, int, int, int, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    """At odd sizes in two programs, so that there are partial sums to add, and a turn too many."""
    monkeypatch.setattr(launch, "num_processors", lambda tensor: 1 + layer[1] % 2)
    for name in BLOCKS if layer == WIDE else ():
        blocks = getattr(whole, name)
        monkeypatch.setattr(whole, name, blocks._replace(inputs=16, outputs=32))
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


def test_every_branch_ran() -> None:
    """Last: each kernel in each type and with each switch that a launcher can ask for.

    bf16 products are excepted.
    """
    wanted = {
        "conv_pool_relu_backward_sum float32 float32 float32",
        "conv2_pool_relu_weight_backward_sum float32 float32 float32",
    }
    for t in ("float32", "float16"):
        coded = f"conv_pool_relu_forward uint8 float32 float32 {t} int32 CODED"
        wanted |= {f"{coded}=True", f"{coded}=False"}
        wanted.add(f"conv_pool_relu_backward {t} int32 uint8 float32")
        wanted.add(f"conv2_pool_relu_forward {t} {t} float32 {t} int32")
        wanted.add(f"conv2_pool_relu_input_backward {t} int32 {t} {t}")
        wanted.add(f"conv2_pool_relu_weight_backward {t} int32 {t} float32")
    for t in ("float32", "float16", "bfloat16"):
        wanted.add(f"bias_pool_relu_forward {t} float32 {t} int32")
        wanted.add(f"bias_pool_relu_backward {t} int32 {t} float32")
    assert wanted == LAUNCHED
