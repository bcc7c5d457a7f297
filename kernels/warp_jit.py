"""The affine warp of uint8 images on a CPU, compiled by numba: what cpu.py calls, on NumPy arrays.

A pixel of the result looks up one word that holds the four pixels around its source, so each image
is first laid out as such words. Both loops have neither branch nor remainder to speak of, and LLVM
turns them into wide instructions: the words are gathered, 8 at a time with AVX2, 16 with AVX-512.

Every product is fused with a sum in one rounding, where the processor has such an instruction or
not, and no other order of sums is allowed: no bit depends on the machine or the number of threads.
NaN in a matrix counts as far outside.

It does not gather labels, and knows neither ids nor padding: rows are trusted.

Shapes: N images, M samples, H x W pixels, P = H W. S = W + 1 is a row of the layout: a black column
stands between two rows, and serves as the border of both.
"""

from typing import Any

import numpy as np
from llvmlite import ir
from numba import njit, prange, types
from numba.core import cgutils
from numba.extending import intrinsic

from kernels.pools_jit import Compiled

BLOCK = 8
"""Samples that a thread takes at a time."""
CHUNK = 16
"""Bytes that are copied together."""
LINE = 64
"""Bytes of a cache line."""
LANES = 32
"""What is made for whole vectors is a multiple of this long."""
BYTE, WORD, LONG = ir.IntType(8), ir.IntType(32), ir.IntType(64)
WIDEST = '"prefer-vector-width"="512"'
"""Left alone, LLVM keeps to half of AVX-512, for the sake of code around it."""
ROUND = np.float32(12582912.0)
"""1.5 * 2^23: added to a float32 below 2^22, it leaves the nearest whole number, ties to even, in
the lowest bits."""


def _address(context: Any, builder: Any, kind: Any, array: Any, index: Any) -> Any:
    """Of an element; there are no checks, and negative indices are not counted from the end."""
    return builder.gep(context.make_array(kind)(context, builder, array).data, [index])


def _apart(builder: Any) -> Any:
    """LLVM's name for what only `look_up` reads while `put` writes: these never overlap."""
    domain = builder.module.add_metadata(["kernels.warp_jit"])
    scope = builder.module.add_metadata(["kernels.warp_jit.read", domain])
    return builder.module.add_metadata([scope])


def _look_up_intrinsic(context: Any, array_P: Any, offset: Any, index: Any) -> Any:
    """array[offset + index], from an array that nobody changes while `put` is in use."""

    def codegen(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        set.add(builder.function.attributes, WIDEST)  # llvmlite's own add refuses it
        start = _address(context, builder, signature.args[0], arguments[0], arguments[1])
        value = builder.load(builder.gep(start, [builder.sext(arguments[2], LONG)]))
        value.set_metadata("alias.scope", _apart(builder))
        return value

    return array_P.dtype(array_P, types.intp, types.int32), codegen


def _put_intrinsic(context: Any, array_P: Any, index: Any, value: Any) -> Any:
    """array[index] = value, in an array of which nothing is looked up."""

    def codegen(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        address = _address(context, builder, signature.args[0], *arguments[:2])
        builder.store(arguments[2], address).set_metadata("noalias", _apart(builder))
        return context.get_dummy_value()

    return types.void(array_P, types.intp, array_P.dtype), codegen


def _copy_chunk_intrinsic(context: Any, into_P: Any, to: Any, from_P: Any, start: Any) -> Any:
    """into[to : to + CHUNK] = from[start : start + CHUNK]."""

    def codegen(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        chunk = ir.VectorType(BYTE, CHUNK).as_pointer()
        kinds = signature.args
        into = _address(context, builder, kinds[0], *arguments[:2])
        source = _address(context, builder, kinds[2], *arguments[2:])
        value = builder.load(builder.bitcast(source, chunk), align=1)
        builder.store(value, builder.bitcast(into, chunk), align=1)
        return context.get_dummy_value()

    return types.void(into_P, types.intp, from_P, types.intp), codegen


def _prefetch_intrinsic(context: Any, array_P: Any, index: Any) -> Any:
    """Ask for the cache line of array[index]; any index may be asked for."""

    def codegen(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        address = _address(context, builder, signature.args[0], *arguments)
        kind = ir.FunctionType(ir.VoidType(), [address.type, WORD, WORD, WORD])
        ask = cgutils.get_or_insert_function(builder.module, kind, "llvm.prefetch.p0")
        to_read, keep, data = (ir.Constant(WORD, number) for number in (0, 3, 1))
        builder.call(ask, [address, to_read, keep, data])
        return context.get_dummy_value()

    return types.void(array_P, types.intp), codegen


def _floor_intrinsic(context: Any, value: Any) -> Any:
    def codegen(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        floor = builder.module.declare_intrinsic("llvm.floor", [arguments[0].type])
        return builder.call(floor, arguments)

    return types.float32(types.float32), codegen


def _fused_intrinsic(context: Any, a: Any, b: Any, c: Any) -> Any:
    """a * b + c, rounded once."""

    def codegen(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        return builder.fma(*arguments)

    return types.float32(types.float32, types.float32, types.float32), codegen


def _bits_intrinsic(context: Any, value: Any) -> Any:
    def codegen(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        return builder.bitcast(arguments[0], WORD)

    return types.int32(types.float32), codegen


look_up: Any = intrinsic(_look_up_intrinsic)
put: Any = intrinsic(_put_intrinsic)
copy_chunk: Any = intrinsic(_copy_chunk_intrinsic)
prefetch: Any = intrinsic(_prefetch_intrinsic)
floor: Any = intrinsic(_floor_intrinsic)
fused: Any = intrinsic(_fused_intrinsic)
bits: Any = intrinsic(_bits_intrinsic)

_inlined: Any = njit(nogil=True, error_model="numpy", inline="always")


@_inlined
def _lay_out(image_P: Any, height: Any, width: Any, padded: Any) -> None:
    """Put the rows between black ones; what is black at the start and the end is left alone.

    Rows are copied in whole chunks where those end within the image. What such a chunk writes
    behind its row is overwritten by the rows that follow.
    """
    stride = width + 1
    in_chunks = -(-width // CHUNK) * CHUNK
    for y in range(height):
        start, to = y * width, (y + 1) * stride + 1
        if start + in_chunks <= len(image_P):
            for x in range(0, width, CHUNK):
                copy_chunk(padded, to + x, image_P, start + x)
        else:
            for x in range(width):
                padded[np.uint64(to + x)] = image_P[np.uint64(start + x)]
        padded[np.uint64(to + width)] = np.uint8(0)


@_inlined
def _combine(padded: Any, pair: Any, quad: Any, stride: Any) -> None:
    """A pixel and its right neighbour as 16 bits, then these and those below as 32.

    Indices are unsigned, or each would be asked whether it counts from the end.
    """
    for p in range(len(pair)):
        i = np.uint64(p)
        right = np.uint16(np.uint16(padded[i + np.uint64(1)]) << 8)
        pair[i] = np.uint16(padded[i]) | right
    for p in range(len(quad)):
        i = np.uint64(p)
        below = np.int32(np.int32(pair[i + np.uint64(stride)]) << 16)
        quad[i] = np.int32(pair[i]) | below


@_inlined
def _sample(
    quad: Any, matrix_6: Any, x_P: Any, y_P: Any, height: Any, width: Any, out_P: Any
) -> None:
    """Each pixel of the result from the four around its source, clamped to the black border."""
    stride = width + 1
    half, lowest = np.float32(0.5), np.float32(-1)
    right, bottom = np.float32(width), np.float32(height)
    xx, xy, x0 = matrix_6[0], matrix_6[1], matrix_6[2] - half
    yx, yy, y0 = matrix_6[3], matrix_6[4], matrix_6[5] - half
    for p in range(len(out_P)):
        x, y = look_up(x_P, 0, np.int32(p)), look_up(y_P, 0, np.int32(p))
        u = fused(xx, x, fused(xy, y, x0))
        v = fused(yx, x, fused(yy, y, y0))
        u = u if u > lowest else lowest
        u = u if u < right else right
        v = v if v > lowest else lowest
        v = v if v < bottom else bottom
        left, top = floor(u), floor(v)
        beside, below = u - left, v - top
        place = np.int32(np.int32(np.int32(top) * np.int32(stride)) + np.int32(left))
        four = look_up(quad, stride + 1, place)
        a, b = np.int32(four & 255), np.int32((four >> 8) & 255)
        c, d = np.int32((four >> 16) & 255), np.int32((four >> 24) & 255)
        upper = fused(beside, np.float32(np.int32(b - a)), np.float32(a))
        lower = fused(beside, np.float32(np.int32(d - c)), np.float32(c))
        value = fused(below, lower - upper, upper)
        put(out_P, p, np.uint8(bits(value + ROUND)))


@Compiled
def warp(
    image_NP: np.ndarray,
    row_M: np.ndarray,
    matrix_M6: np.ndarray,
    x_P: np.ndarray,
    y_P: np.ndarray,
    size_2: np.ndarray,
    out_MP: np.ndarray,
) -> None:
    """out[m] = image[row[m]] through matrix[m]: bilinear, black outside, rounded to nearest.

    Args:
        x_P, y_P: float32, the centre of each pixel.
        size_2: (H, W), with (H + 2) (W + 1) below 2^31.
    """
    num, (height, width) = len(row_M), (size_2[0], size_2[1])
    stride = width + 1
    words = -(-((height + 2) * stride + 1) // LANES) * LANES
    pairs = words + -(-stride // LANES) * LANES
    for block in prange(-(-num // BLOCK)):
        padded = np.zeros(pairs + LANES, np.uint8)
        pair, quad = np.empty(pairs, np.uint16), np.empty(words, np.int32)
        for m in range(block * BLOCK, min(block * BLOCK + BLOCK, num)):
            following = image_NP[row_M[min(m + 1, num - 1)]]
            for p in range(0, len(following), LINE):
                prefetch(following, p)
            _lay_out(image_NP[row_M[m]], height, width, padded)
            _combine(padded, pair, quad, stride)
            _sample(quad, matrix_M6[m], x_P, y_P, height, width, out_MP[m])
