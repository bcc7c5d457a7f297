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


@triton.jit
def store_codes(code_ptr, winner, passes, index, num_words, mask):
    """winner, passes [BLOCK, C] -> three words of each group at `index` [BLOCK, C // 32]."""
    groups: tl.constexpr = index.shape[1]
    lane = tl.arange(0, LANES)[None, None, :]
    winner = tl.reshape(winner, [winner.shape[0], groups, LANES])
    passes = tl.reshape(passes.to(tl.int32), [winner.shape[0], groups, LANES])
    tl.store(code_ptr + index, tl.sum((winner & 1) << lane, 2), mask=mask)
    tl.store(code_ptr + num_words + index, tl.sum((winner >> 1) << lane, 2), mask=mask)
    tl.store(code_ptr + 2 * num_words + index, tl.sum(passes << lane, 2), mask=mask)


@triton.jit
def load_won(code_ptr, index, num_words, mask, row):
    """(left, right): in a row of the windows, who won there and passed.

    Words [BLOCK, G] from `index` [BLOCK, G], a bit for each of 32 channels; 0 where masked.
    """
    low, high, passes = load_words(code_ptr, index, num_words, mask)
    won = passes & (high ^ (row - 1))  # row 0: all bits turned
    return won & ~low, won & low


@triton.jit
def keep_won(value, won):
    """value [BLOCK, C] where its bit in won [BLOCK, C // 32] is set, 0 elsewhere."""
    lane = tl.arange(0, LANES)[None, None, :]
    bits = tl.reshape((won[:, :, None] >> lane) & 1, value.shape)
    return tl.where(bits != 0, value, 0.0).to(value.dtype)


@triton.jit
def keep_won_across(value, won):
    """The same of value [C, BLOCK] and won [BLOCK, C // 32]."""
    lane = tl.arange(0, LANES)[None, :, None]
    bits = tl.reshape((tl.trans(won)[:, None, :] >> lane) & 1, value.shape)
    return tl.where(bits != 0, value, 0.0).to(value.dtype)
