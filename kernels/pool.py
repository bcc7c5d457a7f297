"""Device functions of both pooling kernels: the contest of four, and the code of its outcome.

kernels/launch.py says what a code is.
"""

import triton
from triton import language as tl

from kernels import launch

LANES = tl.constexpr(launch.LANES)


@triton.jit
def better(best, winner, value, place):
    """Let `value` from `place` challenge the best so far.

    Of equals the first stays, a NaN stays for good.
    """
    takes = (value > best) | (value != value)
    return tl.where(takes, value, best), tl.where(takes, place, winner)


@triton.jit
def store_code(code_ptr, winner, passes, index, num_words, mask):
    """winner, passes [BLOCK, 32] -> three words each at `index` [BLOCK]."""
    lane = tl.arange(0, LANES)[None, :]
    tl.store(code_ptr + index, tl.sum((winner & 1) << lane, 1), mask=mask)
    tl.store(code_ptr + num_words + index, tl.sum((winner >> 1) << lane, 1), mask=mask)
    tl.store(code_ptr + 2 * num_words + index, tl.sum(passes.to(tl.int32) << lane, 1), mask=mask)


@triton.jit
def load_code(code_ptr, index, num_words, mask):
    """(winner, passes) [BLOCK, 32] from `index` [BLOCK]; passes is false where masked."""
    lane = tl.arange(0, LANES)[None, :]
    low = tl.load(code_ptr + index, mask=mask, other=0)[:, None] >> lane
    high = tl.load(code_ptr + num_words + index, mask=mask, other=0)[:, None] >> lane
    passes = tl.load(code_ptr + 2 * num_words + index, mask=mask, other=0)[:, None] >> lane
    return (low & 1) + 2 * (high & 1), (passes & 1) != 0
