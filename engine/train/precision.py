"""The arithmetic of forward and backward, by the config's `step.precision`.

fp32 and tf32 are torch's own, bf16 and fp16 autocast's. fp8 is autocast's bf16, but for the linear
layers whose sides are whole multiples of 16: their three products multiply 8-bit numbers, e4m3 (4
bits of precision) of activations and weights, e5m2 (3 bits, a wider range) of gradients. Parameters
stay fp32 and so do their gradients; evaluation is bf16's.

Each tensor is scaled by one power of two before it is rounded, so that its largest number comes to
lie in the upper half of the format's range. The scale is made on the device in every step and never
read on the host. This is why fp8 needs no scaled loss, as fp16 does: a gradient is scaled where it
is rounded, and all between two products has bf16's range, which is fp32's. What is not finite makes
all of a product NaN, which the step's own check finds.

A GPU computes the products by `torch._scaled_mm`. A CPU has no such instructions, and oneDNN's
stand-in is many times slower than fp32; so there the same 8-bit numbers are multiplied in
fp32, which holds their products exactly. What a GPU refuses is refused on a CPU, too.

It keeps no history of scales, scales no rows or blocks by themselves, and computes no convolution.

Shapes: M rows (samples, or tokens of all samples), K numbers in, N numbers out.
"""

import math
from typing import Any, NamedTuple

import torch
from torch import nn
from torch.nn import functional

from engine.models.columns import Columns

AUTOCAST = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp8": torch.bfloat16}
"""By precision, the type of what autocast rounds; fp32 and tf32 have none."""
MULTIPLE = 16
"""Of which a GPU takes a product's inner and right sides: 16 bytes, by cuBLASLt's documentation."""
FORMATS = {torch.float8_e4m3fn: 224.0, torch.float8_e5m2: 28672.0}
"""Half of the largest number of a format, 1.75 times a power of two in both (OCP 8-bit floats)."""
LEAST_UNIT = 2.0**-126
"""The least normal number of fp32; its inverse is finite."""
EXPONENT_BITS = 0x7F800000
"""Of an fp32 number: without sign and fraction it is the power of two below."""


class Scaled(NamedTuple):
    """A tensor as 8-bit numbers times `unit`, a power of two (fp32, no dimension)."""

    number_MK: torch.Tensor
    unit: torch.Tensor

    def t(self) -> "Scaled":
        """Transposed, as a view."""
        return Scaled(self.number_MK.t(), self.unit)

    def turned(self) -> "Scaled":
        """[K, M] in rows, a copy; zeros fill M up to a whole multiple of 16."""
        missing = -len(self.number_MK) % MULTIPLE
        number_MK = self.number_MK
        if missing:
            number_MK = functional.pad(number_MK, (0, 0, 0, missing))
        return Scaled(number_MK.t().contiguous(), self.unit)


def to_fp8(x_MK: torch.Tensor, dtype: torch.dtype) -> Scaled:
    """Any floats as 8-bit ones of `dtype`, row by row; device work only.

    A number is off by 2^-4 (e4m3) or 2^-3 (e5m2) of itself at most, or by 2^-10 or 2^-17 of the
    unit, whichever is more. The unit is at most 1/224 or 1/28,672 of the largest number, or 2^-126.
    """
    largest = torch.linalg.vector_norm(x_MK, math.inf, dtype=torch.float32)
    above = (largest / FORMATS[dtype]).clamp(min=LEAST_UNIT)
    unit = (above.view(torch.int32) & EXPONENT_BITS).view(torch.float32)
    return Scaled((x_MK * unit.reciprocal()).to(dtype).contiguous(), unit)


def scaled_product(
    a: Scaled,
    b: Scaled,
    dtype: torch.dtype,
    bias_N: torch.Tensor | None = None,
    *,
    fast: bool = False,
) -> torch.Tensor:
    """a_MK b_KN + bias [M, N] of `dtype`.

    Args:
        bias_N: bf16.
        fast: on Hopper, sums of fewer bits, as is usual in the forward.

    Raises:
        ValueError: a GPU would refuse it.
    """
    a_MK, b_KN = a.number_MK, b.number_MK
    check_product(a_MK, b_KN)
    if is_emulated(a_MK):
        return _emulated(a, b, dtype, bias_N)
    return torch._scaled_mm(
        a_MK, b_KN, a.unit, b.unit, bias=bias_N, out_dtype=dtype, use_fast_accum=fast
    )


def check_product(a_MK: torch.Tensor, b_KN: torch.Tensor) -> None:
    """ValueError for what cuBLASLt does not take; a CPU would take anything."""
    if a_MK.dtype == b_KN.dtype == torch.float8_e5m2:
        raise ValueError("an fp8 product takes e5m2 on one side only")
    if not {a_MK.dtype, b_KN.dtype} <= FORMATS.keys():
        raise ValueError(f"an fp8 product takes e4m3 and e5m2, not {a_MK.dtype} and {b_KN.dtype}")
    if not a_MK.is_contiguous():
        raise ValueError(f"the left side's rows must lie in turn, not by strides {a_MK.stride()}")
    if not b_KN.t().is_contiguous():
        raise ValueError(f"the right side's columns must, not by strides {b_KN.stride()}")
    if b_KN.shape[0] % MULTIPLE or b_KN.shape[1] % MULTIPLE:
        raise ValueError(f"the right side must be of multiples of 16, not {list(b_KN.shape)}")


def is_emulated(tensor: torch.Tensor) -> bool:
    """Whether there are no 8-bit products where it is."""
    return tensor.device.type == "cpu"


def _emulated(
    a: Scaled, b: Scaled, dtype: torch.dtype, bias_N: torch.Tensor | None
) -> torch.Tensor:
    """By fp32: of two 8-bit numbers it holds the product exactly; sums are rounded as ever."""
    with torch.autocast(a.unit.device.type, enabled=False):
        y_MN = torch.mm(a.number_MK.float(), b.number_MK.float()) * (a.unit * b.unit)
        return (y_MN if bias_N is None else y_MN + bias_N).to(dtype)


class _Linear(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x_MK: torch.Tensor, weight_NK: torch.Tensor, bias_N: torch.Tensor | None
    ) -> torch.Tensor:
        x, weight = (to_fp8(side, torch.float8_e4m3fn) for side in (x_MK, weight_NK))
        ctx.save_for_backward(*x, *weight)
        ctx.dtypes = x_MK.dtype, weight_NK.dtype
        rounded_N = None if bias_N is None else bias_N.to(torch.bfloat16)
        return scaled_product(x, weight.t(), torch.bfloat16, rounded_N, fast=True)

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        (grad_MN,) = grads
        saved, (x_dtype, weight_dtype) = ctx.saved_tensors, ctx.dtypes
        x, weight, grad = Scaled(*saved[:2]), Scaled(*saved[2:]), to_fp8(grad_MN, torch.float8_e5m2)
        wants_x, wants_weight, wants_bias = ctx.needs_input_grad
        grad_x_MK = grad_weight_NK = grad_bias_N = None
        if wants_x:
            grad_x_MK = scaled_product(grad, weight.turned().t(), x_dtype)
        if wants_weight:
            grad_weight_NK = scaled_product(grad.turned(), x.turned().t(), weight_dtype)
        if wants_bias:
            grad_bias_N = grad_MN.sum(0, dtype=torch.float32)
        return grad_x_MK, grad_weight_NK, grad_bias_N


def fp8_linear(
    x_MK: torch.Tensor, weight_NK: torch.Tensor, bias_N: torch.Tensor | None
) -> torch.Tensor:
    """linear(x, weight, bias) [M, N] in bf16, its products of 8-bit numbers.

    Differentiable in all three, gradients in their types. K and N are whole multiples of 16; x may
    have more dimensions than two.
    """
    y_MN: torch.Tensor = _Linear.apply(x_MK.flatten(0, -2), weight_NK, bias_N)
    return y_MN.view(*x_MK.shape[:-1], len(weight_NK))


class Fp8Linear(nn.Linear):
    """nn.Linear in fp8 while it trains; in evaluation it is what it was."""

    def forward(self, x_MK: torch.Tensor) -> torch.Tensor:
        if not self.training:
            return super().forward(x_MK)
        return fp8_linear(x_MK, self.weight, self.bias)


class Fp8Columns(Columns):
    """Columns in fp8 while it trains."""

    def forward(self, x_BCHW: torch.Tensor) -> torch.Tensor:
        if not self.training:
            return super().forward(x_BCHW)
        return fp8_linear(*self.sides(x_BCHW), self.bias)


IN_FP8: dict[type[nn.Linear], type[nn.Linear]] = {nn.Linear: Fp8Linear, Columns: Fp8Columns}
"""By the class of a layer, the one that computes it in fp8."""
FEW_NAMES = 4


def use_fp8(model: nn.Module) -> str:
    """Make the linear layers that a GPU takes compute in fp8, in place; which they are, in words.

    Their class changes, as torch.nn.utils.parametrize changes it; parameters and names stay.
    """
    taken, left = list[str](), dict[str, list[str]]()
    for name, layer in model.named_modules():
        if not isinstance(layer, nn.Linear):
            continue
        if why := why_not_fp8(layer):
            left.setdefault(why, []).append(name)
        else:
            layer.__class__ = IN_FP8[type(layer)]
            taken.append(name)
    text = f"fp8 computes {_few(taken, ', ') or 'no layer'}, bf16 all else"
    reasons = [f"{_few(names, ', ')}: {why}" for why, names in left.items()]
    return f"{text} ({_few(reasons, '; ')})" if reasons else text


def _few(texts: list[str], between: str) -> str:
    """The first of them, and how many are left."""
    joined = between.join(texts[:FEW_NAMES])
    num_others = len(texts) - FEW_NAMES
    return f"{joined} and {num_others} others" if num_others > 0 else joined


def why_not_fp8(layer: nn.Linear) -> str:
    """Why a linear layer stays in bf16, or ""."""
    if type(layer) not in IN_FP8:
        return "it is of a class of its own"
    sides = (layer.in_features, layer.out_features)
    odd = [str(side) for side in dict.fromkeys(sides) if side % MULTIPLE]
    return f"{' and '.join(odd)} cannot be divided by {MULTIPLE}" if odd else ""
