"""The pooled layers on a CPU, compiled by numba: what cpu.py calls, on NumPy arrays.

Every loop over channels is one that LLVM turns into wide instructions: channels lie side by side
(NHWC), and a comparison is a choice, never a branch. Numbers are computed in fp32; bf16 is read as
its 16 bits and rounded to the nearest even where it is written.

A code is a byte of a pooled value: which of four won, 2 y + x in its window, and 4 where the ReLU
let it pass. Of equal values the first wins, and NaN wins always, as in PyTorch.

Images are shared out between threads; sums over images are made in blocks of a fixed size, added in
one order, so that no bit depends on the number of threads.

Shapes: B samples, H x W values, Y x X pooled positions, C channels, K blocks of samples, T = 9
taps of a 3x3 filter.
"""

from collections.abc import Callable
from types import FunctionType
from typing import Any

import numpy as np
from llvmlite import ir
from numba import njit, prange, types
from numba.extending import intrinsic

BLOCK = 8
"""Samples whose sums are added up together."""
FLOAT, INT = ir.FloatType(), ir.IntType(32)
SHORT = ir.IntType(16)


class Compiled:
    """A function twice: for one thread, without OpenMP, and for several.

    Each is compiled at its first call, and kept beside the source or in the user's cache.
    """

    def __init__(self, function: Callable[..., Any]) -> None:
        self.serial = _jit(_named(function, "serial"))
        self.parallel = _jit(_named(function, "parallel"), parallel=True)


def _named(function: Callable[..., Any], suffix: str) -> Callable[..., Any]:
    """The same function by another name: numba's cache tells functions apart by it."""
    name = f"{function.__name__}_{suffix}"
    copied = FunctionType(function.__code__, function.__globals__, name)
    copied.__qualname__ = name
    return copied


def _jit(function: Callable[..., Any], **more: bool) -> Any:
    options: Any = {"nogil": True, "error_model": "numpy", **more}
    options["fastmath"] = {"contract"}  # products and sums in one rounding; NaN stays NaN
    try:
        return njit(cache=True, **options)(function)
    except RuntimeError:  # no folder for a cache
        return njit(**options)(function)


_inlined: Any = njit(nogil=True, error_model="numpy", inline="always")


def _wide_intrinsic(context: Any, value: Any) -> Any:
    """fp32 of a float32, or of a bf16's 16 bits."""

    def codegen(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        if signature.args[0] == types.float32:
            return arguments[0]
        bits = builder.shl(builder.zext(arguments[0], INT), ir.Constant(INT, 16))
        return builder.bitcast(bits, FLOAT)

    return types.float32(value), codegen


def _narrow_intrinsic(context: Any, value: Any, like: Any) -> Any:
    """An fp32 as `like` is: itself, or the 16 bits of the nearest bf16, ties to even."""

    def codegen(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        number = arguments[0]
        if signature.return_type == types.float32:
            return number
        bits = builder.bitcast(number, INT)
        high = builder.lshr(bits, ir.Constant(INT, 16))
        odd = builder.and_(high, ir.Constant(INT, 1))
        up = builder.add(bits, builder.add(odd, ir.Constant(INT, 0x7FFF)))
        nearest = builder.lshr(up, ir.Constant(INT, 16))
        quiet = builder.or_(high, ir.Constant(INT, 0x40))
        is_nan = builder.fcmp_unordered("uno", number, number)
        return builder.trunc(builder.select(is_nan, quiet, nearest), SHORT)

    return like(types.float32, like), codegen


wide: Any = intrinsic(_wide_intrinsic)
narrow: Any = intrinsic(_narrow_intrinsic)


@_inlined
def _better(best_C: Any, code_C: Any, value_C: Any, number: Any) -> None:
    """Put the values that win, and their number, in place of the best so far."""
    for c in range(len(best_C)):
        value, best = wide(value_C[c]), best_C[c]
        wins = (not value <= best) & (best == best)
        best_C[c] = value if wins else best
        code_C[c] = number if wins else code_C[c]


@Compiled
def bias_pool_relu_forward(
    x_BHWC: np.ndarray, bias_C: np.ndarray, y_BYXC: np.ndarray, code_BYXC: np.ndarray
) -> None:
    """y = relu(max of 2x2 + bias) and its code; x and y float32, or bf16 as uint16."""
    num, rows, columns, channels = y_BYXC.shape
    for b in prange(num):
        best_C, code_C = np.empty(channels, np.float32), np.empty(channels, np.float32)
        for r in range(rows):
            for k in range(columns):
                for c in range(channels):
                    best_C[c] = wide(x_BHWC[b, 2 * r, 2 * k, c])
                    code_C[c] = 0
                _better(best_C, code_C, x_BHWC[b, 2 * r, 2 * k + 1], np.float32(1))
                _better(best_C, code_C, x_BHWC[b, 2 * r + 1, 2 * k], np.float32(2))
                _better(best_C, code_C, x_BHWC[b, 2 * r + 1, 2 * k + 1], np.float32(3))
                for c in range(channels):
                    best_C[c] += bias_C[c]
                    code_C[c] += np.float32(0) if best_C[c] <= np.float32(0) else np.float32(4)
                y_C, out_C = y_BYXC[b, r, k], code_BYXC[b, r, k]
                for c in range(channels):
                    y = np.float32(0) if best_C[c] <= np.float32(0) else best_C[c]
                    y_C[c] = narrow(y, y_C[c])
                    out_C[c] = np.uint8(code_C[c])


@_inlined
def _fill(out_C: Any, value: Any) -> None:
    """As out_C[:] = value; numba would compile the text of an error for that, too."""
    for c in range(len(out_C)):
        out_C[c] = value


@_inlined
def _copy(out_C: Any, value_C: Any) -> None:
    """Likewise."""
    for c in range(len(out_C)):
        out_C[c] = value_C[c]


@_inlined
def _place(grad_C: Any, code_C: Any, won: Any, out_C: Any) -> None:
    """The gradients of the values at one place of a window: those that won it, else 0."""
    zero = grad_C.dtype.type(0)
    for c in range(len(out_C)):
        out_C[c] = grad_C[c] if code_C[c] == won else zero


@Compiled
def bias_pool_relu_backward(
    grad_BYXC: np.ndarray, code_BYXC: np.ndarray, grad_BHWC: np.ndarray, bias_KC: np.ndarray
) -> None:
    """The gradient of x, everywhere, and of the bias, summed over BLOCK samples each."""
    num, rows, columns, channels = grad_BYXC.shape
    height, width = grad_BHWC.shape[1:3]
    zero = grad_BYXC.dtype.type(0)
    for block in prange(len(bias_KC)):
        sum_C = np.zeros(channels, np.float32)
        for b in range(block * BLOCK, min(block * BLOCK + BLOCK, num)):
            for r in range(rows):
                for k in range(columns):
                    grad_C, code_C = grad_BYXC[b, r, k], code_BYXC[b, r, k]
                    _place(grad_C, code_C, np.uint8(4), grad_BHWC[b, 2 * r, 2 * k])
                    _place(grad_C, code_C, np.uint8(5), grad_BHWC[b, 2 * r, 2 * k + 1])
                    _place(grad_C, code_C, np.uint8(6), grad_BHWC[b, 2 * r + 1, 2 * k])
                    _place(grad_C, code_C, np.uint8(7), grad_BHWC[b, 2 * r + 1, 2 * k + 1])
                    for c in range(channels):
                        passes = code_C[c] >= np.uint8(4)
                        sum_C[c] += wide(grad_C[c]) if passes else np.float32(0)
            for k in range(width * (height % 2)):
                _fill(grad_BHWC[b, height - 1, k], zero)
            for r in range(height * (width % 2)):
                _fill(grad_BHWC[b, r, width - 1], zero)
        _copy(bias_KC[block], sum_C)


@Compiled
def conv_pool_relu_forward(
    image_BHW: np.ndarray,
    weight_TC: np.ndarray,
    bias_C: np.ndarray,
    y_BYXC: np.ndarray,
    code_BYXC: np.ndarray | None,
) -> None:
    """y = relu(max of 2x2 of conv(image, weight) + bias) and its code.

    Args:
        image_BHW: float32 with a border of zeros, [B, H + 2, W + 2].
        weight_TC: of the pixels as they are, so with their scale in it.
        code_BYXC: None where there is no backward: numba compiles that without the code.
    """
    num, rows, columns, channels = y_BYXC.shape
    for b in prange(num):
        for r in range(rows):
            for k in range(columns):
                p0, p1 = image_BHW[b, 2 * r], image_BHW[b, 2 * r + 1]
                p2, p3 = image_BHW[b, 2 * r + 2], image_BHW[b, 2 * r + 3]
                i = 2 * k
                y_C = y_BYXC[b, r, k]
                code_C: Any = code_BYXC[b, r, k] if code_BYXC is not None else None
                a00, a01, a02, a03 = p0[i], p0[i + 1], p0[i + 2], p0[i + 3]
                a10, a11, a12, a13 = p1[i], p1[i + 1], p1[i + 2], p1[i + 3]
                a20, a21, a22, a23 = p2[i], p2[i + 1], p2[i + 2], p2[i + 3]
                a30, a31, a32, a33 = p3[i], p3[i + 1], p3[i + 2], p3[i + 3]
                for c in range(channels):
                    w0, w1, w2 = weight_TC[0, c], weight_TC[1, c], weight_TC[2, c]
                    w3, w4, w5 = weight_TC[3, c], weight_TC[4, c], weight_TC[5, c]
                    w6, w7, w8 = weight_TC[6, c], weight_TC[7, c], weight_TC[8, c]
                    best = a00 * w0 + a01 * w1 + a02 * w2 + a10 * w3 + a11 * w4
                    best += a12 * w5 + a20 * w6 + a21 * w7 + a22 * w8
                    one = a01 * w0 + a02 * w1 + a03 * w2 + a11 * w3 + a12 * w4
                    one += a13 * w5 + a21 * w6 + a22 * w7 + a23 * w8
                    two = a10 * w0 + a11 * w1 + a12 * w2 + a20 * w3 + a21 * w4
                    two += a22 * w5 + a30 * w6 + a31 * w7 + a32 * w8
                    three = a11 * w0 + a12 * w1 + a13 * w2 + a21 * w3 + a22 * w4
                    three += a23 * w5 + a31 * w6 + a32 * w7 + a33 * w8
                    code = np.float32(0)
                    wins = (not one <= best) & (best == best)
                    best, code = (one if wins else best), (np.float32(1) if wins else code)
                    wins = (not two <= best) & (best == best)
                    best, code = (two if wins else best), (np.float32(2) if wins else code)
                    wins = (not three <= best) & (best == best)
                    best, code = (three if wins else best), (np.float32(3) if wins else code)
                    y = best + bias_C[c]
                    passes = not y <= np.float32(0)
                    y_C[c] = narrow(y if passes else np.float32(0), y_C[c])
                    if code_BYXC is not None:
                        code_C[c] = np.uint8(code + (np.float32(4) if passes else np.float32(0)))


@Compiled
def conv_pool_relu_backward(
    grad_BYXC: np.ndarray,
    code_BYXC: np.ndarray,
    image_BHW: np.ndarray,
    weight_KTC: np.ndarray,
    bias_KC: np.ndarray,
) -> None:
    """The gradients of weight and bias, summed over BLOCK samples each; images as in forward."""
    num, rows, columns, channels = grad_BYXC.shape
    for block in prange(len(bias_KC)):
        sum_C = np.zeros(channels, np.float32)
        sum_TC = np.zeros((9, channels), np.float32)
        live_C = np.zeros(channels, np.float32)
        for b in range(block * BLOCK, min(block * BLOCK + BLOCK, num)):
            for r in range(rows):
                for k in range(columns):
                    grad_C, code_C = grad_BYXC[b, r, k], code_BYXC[b, r, k]
                    for c in range(channels):
                        passes = code_C[c] >= np.uint8(4)
                        live_C[c] = wide(grad_C[c]) if passes else np.float32(0)
                        sum_C[c] += live_C[c]
                    for tap in range(9):
                        y, x = 2 * r + tap // 3, 2 * k + tap % 3
                        a0, a1 = image_BHW[b, y, x], image_BHW[b, y, x + 1]
                        a2, a3 = image_BHW[b, y + 1, x], image_BHW[b, y + 1, x + 1]
                        out_C = sum_TC[tap]
                        for c in range(channels):
                            code = code_C[c]
                            upper = a0 if code == np.uint8(4) else a1
                            lower = a2 if code == np.uint8(6) else a3
                            pixel = upper if code <= np.uint8(5) else lower
                            out_C[c] += live_C[c] * pixel
        _copy(bias_KC[block], sum_C)
        for tap in range(9):
            _copy(weight_KTC[block, tap], sum_TC[tap])
