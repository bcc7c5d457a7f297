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
def load_words(code_ptr, index, num_words, mask):
    """The three words of a code at `index` [BLOCK]; 0 where masked."""
    low = tl.load(code_ptr + index, mask=mask, other=0)
    high = tl.load(code_ptr + num_words + index, mask=mask, other=0)
    passes = tl.load(code_ptr + 2 * num_words + index, mask=mask, other=0)
    return low, high, passes


@triton.jit
def read_code(low, high, passes):
    """(winner, passes) [BLOCK, 32] of the three words; passes is false where they are 0."""
    lane = tl.arange(0, LANES)[None, :]
    winner = (low[:, None] >> lane & 1) + 2 * (high[:, None] >> lane & 1)
    return winner, (passes[:, None] >> lane & 1) != 0


@triton.jit
def load_code(code_ptr, index, num_words, mask):
    """(winner, passes) [BLOCK, 32] from `index` [BLOCK]; passes is false where masked."""
    low, high, passes = load_words(code_ptr, index, num_words, mask)
    return read_code(low, high, passes)
