"""AdamW over flat buffers: one step of all parameters in two launches, whatever their number.

    m = m + (1 - beta1) (g - m)
    v = beta2 v + (1 - beta2) g g
    p = p (1 - rate decay) - rate / (1 - beta1^t) m / (sqrt(v) / sqrt(1 - beta2^t) + eps)

That is Loshchilov & Hutter, arXiv 1711.05101, as torch.optim.AdamW computes it; the decay is that
of some of them. Everything is fp32; but the first parameters may have gradients in bf16, and then a
shadow, p rounded to bf16. The learning rate and the step are read on the device, and the step's own
numbers are computed once, in fp64.

The first launch looks for a gradient that is not finite and prepares the step's numbers; the second
updates. Where one was found, by it or before, parameters, moments and step stay as they are.

Bytes a parameter: the first launch reads its gradient (4, or 2 in bf16), the second that, p, m and
v, and writes the latter three: 28 more, with bf16 gradients and a shadow, too. It does not gather
gradients.

Shapes: P = R + F numbers of the flat buffers, T parameters.
"""

import math
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
    """All parameters: R numbers whose gradients are bf16, then F whose gradients are fp32.

    Each buffer is contiguous; R or F may be 0.
    """

    param_P: torch.Tensor
    exp_avg_P: torch.Tensor
    exp_avg_sq_P: torch.Tensor
    """fp32, like the two before."""
    rounded_grad_R: torch.Tensor
    shadow_R: torch.Tensor
    """bf16, to be written."""
    grad_F: torch.Tensor
    num_decayed: tuple[int, int]
    """The first so many decay, of R and of F."""


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


def adamw_reference(flat: Flat, rates: Rates) -> None:
    """One step in PyTorch's operations; reads the host."""
    grad_P = torch.cat([flat.rounded_grad_R.float(), flat.grad_F])
    if not torch.isfinite(grad_P).all():
        rates.bad.fill_(1)
    if rates.bad.item():
        return
    (beta1, beta2), rate = rates.betas, rates.rate.item()
    step = rates.step_T[0].item() + 1
    root = math.sqrt(1 - beta2**step)
    num_rounded = flat.shadow_R.numel()
    for first, num_decayed in zip((0, num_rounded), flat.num_decayed, strict=True):
        flat.param_P[first : first + num_decayed].mul_(1 - rate * rates.decay)
    flat.exp_avg_P.lerp_(grad_P, 1 - beta1)
    flat.exp_avg_sq_P.mul_(beta2).addcmul_(grad_P, grad_P, value=1 - beta2)
    size_P = flat.exp_avg_sq_P.sqrt().div_(root).add_(rates.eps)
    flat.param_P.addcdiv_(flat.exp_avg_P, size_P, value=-rate / (1 - beta1**step))
    flat.shadow_R.copy_(flat.param_P[:num_rounded])
    rates.step_T.fill_(step)


@triton.jit
def _gradient(rounded_grad_ptr, grad_ptr, place, num_rounded, num):
    """fp32 at `place`; 0 beyond the last."""
    is_rounded = place < num_rounded
    rounded = tl.load(rounded_grad_ptr + place, mask=is_rounded, other=0.0).to(tl.float32)
    is_plain = (place >= num_rounded) & (place < num)
    plain = tl.load(grad_ptr + (place - num_rounded), mask=is_plain, other=0.0)
    return tl.where(is_rounded, rounded, plain)


@triton.jit(do_not_specialize_on_alignment=["rate_ptr", "bad_ptr"])
def adamw_check(
    rounded_grad_ptr,
    grad_ptr,
    rate_ptr,
    step_ptr,
    bad_ptr,
    scalars_ptr,
    num_rounded,
    num,
    LOG_BETA1: tl.constexpr,
    LOG_BETA2: tl.constexpr,
    DECAY: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """bad = 1 where a gradient is not finite; the first program writes the scalars."""
    place = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    grad = _gradient(rounded_grad_ptr, grad_ptr, place, num_rounded, num)
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
    rounded_grad_ptr,
    grad_ptr,
    bad_ptr,
    scalars_ptr,
    step_ptr,
    param_ptr,
    exp_avg_ptr,
    exp_avg_sq_ptr,
    shadow_ptr,
    num_rounded,
    num,
    rounded_decay_end,
    decay_end,
    num_steps,
    BETA1: tl.constexpr,
    BETA2: tl.constexpr,
    EPS: tl.constexpr,
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
    grad = _gradient(rounded_grad_ptr, grad_ptr, place, num_rounded, num)
    param = tl.load(param_ptr + place, mask=mask, other=0.0)
    exp_avg = tl.load(exp_avg_ptr + place, mask=mask, other=0.0)
    exp_avg_sq = tl.load(exp_avg_sq_ptr + place, mask=mask, other=0.0)
    decays = (place < rounded_decay_end) | ((place >= num_rounded) & (place < decay_end))
    param = tl.where(decays, param * kept, param)
    exp_avg = exp_avg + (1 - BETA1) * (grad - exp_avg)
    exp_avg_sq = BETA2 * exp_avg_sq + (1 - BETA2) * grad * grad
    size = tl.div_rn(tl.sqrt_rn(exp_avg_sq), root) + EPS
    param = param - tl.div_rn(step_size * exp_avg, size)
    tl.store(param_ptr + place, param, mask=mask)
    tl.store(exp_avg_ptr + place, exp_avg, mask=mask)
    tl.store(exp_avg_sq_ptr + place, exp_avg_sq, mask=mask)
    tl.store(shadow_ptr + place, param.to(tl.bfloat16), mask=mask & (place < num_rounded))
    if tl.program_id(0) == 0:
        number = tl.arange(0, STEPS)
        many = step + tl.zeros([STEPS], tl.float32)
        tl.store(step_ptr + number, many, mask=number < tl.where(bad == 0, num_steps, 0))


def adamw(flat: Flat, rates: Rates) -> None:
    """One step of all parameters, in place; device work only.

    Raises:
        ValueError: a shape, type or device does not fit.
    """
    _check(flat, rates)
    if not on_triton(rates.step_T):
        adamw_reference(flat, rates)
        return
    (beta1, beta2), scalars = rates.betas, rates.scalars_4
    logs = {"LOG_BETA1": math.log(beta1), "LOG_BETA2": math.log(beta2) if beta2 else -1e3}
    gradients = (flat.rounded_grad_R, flat.grad_F)
    num_rounded, num = flat.shadow_R.numel(), flat.param_P.numel()
    grid = (triton.cdiv(num, BLOCK),)
    looked_at = (*gradients, rates.rate, rates.step_T, rates.bad, scalars, num_rounded, num)
    start(adamw_check, grid, *looked_at, **logs, DECAY=rates.decay, BLOCK=BLOCK)
    buffers = (flat.param_P, flat.exp_avg_P, flat.exp_avg_sq_P, flat.shadow_R)
    ends = (flat.num_decayed[0], num_rounded + flat.num_decayed[1])
    num_steps = rates.step_T.numel()
    given = (*gradients, rates.bad, scalars, rates.step_T, *buffers)
    numbers = (num_rounded, num, *ends, num_steps)
    chosen = {"BETA1": beta1, "BETA2": beta2, "EPS": rates.eps}
    sizes = {"STEPS": triton.next_power_of_2(num_steps), "BLOCK": BLOCK}
    start(adamw_update, grid, *given, *numbers, **chosen, **sizes)


def _check(flat: Flat, rates: Rates) -> None:
    like, fp32, bf16 = rates.step_T, (torch.float32,), (torch.bfloat16,)
    check("the rate", rates.rate, fp32, (), like)
    check("bad", rates.bad, fp32, (), like)
    check("the steps", rates.step_T, fp32, (None,), like)
    check("the scalars", rates.scalars_4, fp32, (NUM_SCALARS,), like)
    num, num_rounded = flat.param_P.numel(), flat.shadow_R.numel()
    for name in ("param_P", "exp_avg_P", "exp_avg_sq_P"):
        check(name, getattr(flat, name), fp32, (num,), like)
    check("the shadow", flat.shadow_R, bf16, (num_rounded,), like)
    check("the gradient in bf16", flat.rounded_grad_R, bf16, (num_rounded,), like)
    check("the gradient", flat.grad_F, fp32, (num - num_rounded,), like)
    for tensor in flat[:-1]:
        check_contiguous("a flat buffer", tensor)
