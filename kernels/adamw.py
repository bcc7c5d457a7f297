"""AdamW over flat buffers: one step of all parameters in two launches, whatever their number.

    m = m + (1 - beta1) (g - m)
    v = beta2 v + (1 - beta2) g g
    p = p (1 - rate decay) - rate / (1 - beta1^t) m / (sqrt(v) / sqrt(1 - beta2^t) + eps)

That is Loshchilov & Hutter, arXiv 1711.05101, as torch.optim.AdamW computes it; the decay is that
of the first `num_decayed` numbers. Gradients are fp32 or bf16, everything else fp32; where there is
a shadow, it is p rounded to bf16. The learning rate and the step are read on the device, and the
step's own numbers are computed once, in fp64.

The first launch looks for a gradient that is not finite and prepares the step's numbers; the second
updates. Where one was found, by it or before, parameters, moments and step stay as they are.

Bytes a parameter: the first launch reads its gradient (4, or 2 in bf16), the second that, p, m and
v, and writes the latter three: 28 more (26), and 2 for a shadow. It does not gather gradients.

Shapes: P numbers of the flat buffers, T parameters.
"""

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
import triton
from triton import language as tl

from kernels.launch import check, check_contiguous, on_triton, start

BLOCK = 1024
"""Numbers a program takes."""
NUM_SCALARS = 4
"""The step's number, its step size, the root of its second correction, and what decay leaves."""


class Flat(NamedTuple):
    """Parameters whose gradients are of one type; each buffer is contiguous."""

    param_P: torch.Tensor
    exp_avg_P: torch.Tensor
    exp_avg_sq_P: torch.Tensor
    grad_P: torch.Tensor
    """fp32 or bf16; the others are fp32."""
    num_decayed: int
    """The first so many decay."""
    shadow_P: torch.Tensor | None = None
    """bf16, to be written."""


class Rates(NamedTuple):
    """What a step depends on."""

    rate: torch.Tensor
    """The learning rate, an fp32 scalar on the device."""
    step_T: torch.Tensor
    """fp32: steps done, the same number for each parameter; advanced by one."""
    bad: torch.Tensor
    """An fp32 scalar: 1 where the step is not to be done. Set where a gradient is not finite."""
    scalars_4: torch.Tensor
    """fp32, for the step's own numbers."""
    betas: tuple[float, float]
    decay: float
    eps: float


def adamw_reference(parts: Sequence[Flat], rates: Rates) -> None:
    """One step in PyTorch's operations; reads the host."""
    for part in parts:
        if not torch.isfinite(part.grad_P).all():
            rates.bad.fill_(1)
    if rates.bad.item():
        return
    (beta1, beta2), rate = rates.betas, rates.rate.item()
    step = rates.step_T[0].item() + 1
    root = math.sqrt(1 - beta2**step)
    for part in parts:
        grad_P = part.grad_P.float()
        part.param_P[: part.num_decayed].mul_(1 - rate * rates.decay)
        part.exp_avg_P.lerp_(grad_P, 1 - beta1)
        part.exp_avg_sq_P.mul_(beta2).addcmul_(grad_P, grad_P, value=1 - beta2)
        size_P = part.exp_avg_sq_P.sqrt().div_(root).add_(rates.eps)
        part.param_P.addcdiv_(part.exp_avg_P, size_P, value=-rate / (1 - beta1**step))
        if part.shadow_P is not None:
            part.shadow_P.copy_(part.param_P)
    rates.step_T.fill_(step)


@triton.jit(do_not_specialize_on_alignment=["rate_ptr", "bad_ptr"])
def adamw_check(
    grad_ptr,
    rate_ptr,
    step_ptr,
    bad_ptr,
    scalars_ptr,
    num,
    LOG_BETA1: tl.constexpr,
    LOG_BETA2: tl.constexpr,
    DECAY: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """bad = 1 where a gradient is not finite; the first program writes the scalars."""
    place = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    grad = tl.load(grad_ptr + place, mask=place < num, other=0.0).to(tl.float32)
    worst = tl.max(tl.where(tl.abs(grad) < float("inf"), 0.0, 1.0), 0)
    tl.store(bad_ptr, worst, mask=worst > 0)
    if tl.program_id(0) == 0:
        step = tl.load(step_ptr).to(tl.float64) + 1
        rate = tl.load(rate_ptr).to(tl.float64)
        first = 1 - tl.exp(step * LOG_BETA1)
        second = 1 - tl.exp(step * LOG_BETA2)
        tl.store(scalars_ptr, step.to(tl.float32))
        tl.store(scalars_ptr + 1, (rate / first).to(tl.float32))
        tl.store(scalars_ptr + 2, tl.sqrt(second).to(tl.float32))
        tl.store(scalars_ptr + 3, (1 - rate * DECAY).to(tl.float32))


@triton.jit(do_not_specialize_on_alignment=["bad_ptr"])
def adamw_update(
    grad_ptr,
    bad_ptr,
    scalars_ptr,
    step_ptr,
    param_ptr,
    exp_avg_ptr,
    exp_avg_sq_ptr,
    shadow_ptr,
    num,
    num_decayed,
    num_steps,
    BETA1: tl.constexpr,
    BETA2: tl.constexpr,
    EPS: tl.constexpr,
    SHADOW: tl.constexpr,
    STEPS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Nothing is written where bad is not 0."""
    bad = tl.load(bad_ptr)
    step = tl.load(scalars_ptr)
    step_size = tl.load(scalars_ptr + 1)
    root = tl.load(scalars_ptr + 2)
    kept = tl.load(scalars_ptr + 3)
    place = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    mask = place < tl.where(bad == 0, num, 0)
    grad = tl.load(grad_ptr + place, mask=mask, other=0.0).to(tl.float32)
    param = tl.load(param_ptr + place, mask=mask, other=0.0)
    exp_avg = tl.load(exp_avg_ptr + place, mask=mask, other=0.0)
    exp_avg_sq = tl.load(exp_avg_sq_ptr + place, mask=mask, other=0.0)
    param = tl.where(place < num_decayed, param * kept, param)
    exp_avg = exp_avg + (1 - BETA1) * (grad - exp_avg)
    exp_avg_sq = BETA2 * exp_avg_sq + (1 - BETA2) * grad * grad
    size = tl.div_rn(tl.sqrt_rn(exp_avg_sq), root) + EPS
    param = param - tl.div_rn(step_size * exp_avg, size)
    tl.store(param_ptr + place, param, mask=mask)
    tl.store(exp_avg_ptr + place, exp_avg, mask=mask)
    tl.store(exp_avg_sq_ptr + place, exp_avg_sq, mask=mask)
    if SHADOW:
        tl.store(shadow_ptr + place, param.to(tl.bfloat16), mask=mask)
    if tl.program_id(0) == 0:
        number = tl.arange(0, STEPS)
        many = step + tl.zeros([STEPS], tl.float32)
        tl.store(step_ptr + number, many, mask=number < tl.where(bad == 0, num_steps, 0))


def adamw(parts: Sequence[Flat], rates: Rates) -> None:
    """One step of all parameters, in place; device work only.

    Args:
        parts: each with gradients of one type; two launches each.
    Raises:
        ValueError: a shape, type or device does not fit.
    """
    _check(parts, rates)
    if not on_triton(rates.step_T):
        adamw_reference(parts, rates)
        return
    (beta1, beta2), scalars = rates.betas, rates.scalars_4
    logs = {"LOG_BETA1": math.log(beta1), "LOG_BETA2": math.log(beta2) if beta2 else -1e3}
    for part in parts:  # all are looked at before any is changed
        num = part.grad_P.numel()
        looked_at = (part.grad_P, rates.rate, rates.step_T, rates.bad, scalars, num)
        grid = (triton.cdiv(num, BLOCK),)
        start(adamw_check, grid, *looked_at, **logs, DECAY=rates.decay, BLOCK=BLOCK)
    num_steps = rates.step_T.numel()
    sizes = {"STEPS": triton.next_power_of_2(num_steps), "BLOCK": BLOCK}
    for part in parts:
        num, has_shadow = part.grad_P.numel(), part.shadow_P is not None
        buffers = (part.param_P, part.exp_avg_P, part.exp_avg_sq_P)
        shadow_P = part.shadow_P if part.shadow_P is not None else part.param_P  # is not written
        given = (part.grad_P, rates.bad, scalars, rates.step_T, *buffers, shadow_P)
        numbers = (num, part.num_decayed, num_steps)
        chosen = {"BETA1": beta1, "BETA2": beta2, "EPS": rates.eps, "SHADOW": has_shadow}
        start(adamw_update, (triton.cdiv(num, BLOCK),), *given, *numbers, **chosen, **sizes)


def _check(parts: Sequence[Flat], rates: Rates) -> None:
    like, fp32 = rates.step_T, (torch.float32,)
    check("the rate", rates.rate, fp32, (), like)
    check("bad", rates.bad, fp32, (), like)
    check("the steps", rates.step_T, fp32, (None,), like)
    check("the scalars", rates.scalars_4, fp32, (NUM_SCALARS,), like)
    for part in parts:
        size = (part.grad_P.numel(),)
        check("the gradient", part.grad_P, (torch.float32, torch.bfloat16), size, like)
        for name in ("param_P", "exp_avg_P", "exp_avg_sq_P"):
            check(name, getattr(part, name), fp32, size, like)
        if part.shadow_P is not None:
            check("the shadow", part.shadow_P, (torch.bfloat16,), size, like)
        for tensor in part:
            if isinstance(tensor, torch.Tensor):
                check_contiguous("a flat buffer", tensor)
