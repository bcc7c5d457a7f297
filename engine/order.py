"""Which sample comes when: a keyed bijection of (n, seed, epoch), and each rank's slice of it.

Everything here is a pure function of integers. It works on NumPy and torch int64 arrays alike and gives the same bits,
needs O(1) memory and time an index, and knows nothing of pixels, devices or processes.

The bijection is a generalised Feistel network (Black and Rogaway, "Ciphers with Arbitrary Finite Domains", CT-RSA 2002,
section 5) on [0, a) x [0, b) with a = ceil(sqrt(n)), b = ceil(n / a): the domain exceeds n by at most 2 sqrt(n), so
cycle walking is rare. The round function is a 32-bit integer hash whose multipliers stay below 2^31: every product fits
an int64 lane.

Shapes: S steps, B samples of one rank in a step.
"""

import hashlib
from dataclasses import dataclass
from math import isqrt
from typing import Any

import numpy as np

MASK32 = 0xFFFFFFFF
NUM_ROUNDS = 4
MAX_SAMPLES = 2**40
PADDING_ID = -1
"""The id of a batch row that holds no sample: only evaluation's last batch has such rows, and nothing counts them."""


def round_keys(*parts: int | str) -> tuple[int, ...]:
    """One 32-bit key a round from any integers and strings, such as (seed, epoch)."""
    digest = hashlib.blake2b(repr(parts).encode(), digest_size=4 * NUM_ROUNDS).digest()
    return tuple(int.from_bytes(digest[i : i + 4], "little") for i in range(0, len(digest), 4))


def _round(value: Any, key: int, size: int) -> Any:
    """A keyed 32-bit hash of int64 lanes, scaled to [0, size) (multipliers: Wellons' hash prospector, below 2^31)."""
    value = value ^ key
    value *= 0x21F0AAAD
    value &= MASK32
    value ^= value >> 15
    value *= 0x735A2D97
    value &= MASK32
    value *= size
    value >>= 32
    return value


def _rounds(position: Any, a: int, b: int, keys: tuple[int, ...]) -> Any:
    """One pass of the network. Updates stand in place: temporaries of 64k lanes are what it costs (23 ns a sample)."""
    left = position // b
    right = position - left * b
    for even, odd in zip(keys[::2], keys[1::2], strict=True):
        left += _round(right, even, a)
        left -= (left >= a) * a
        right += _round(left, odd, b)
        right -= (right >= b) * b
    left *= b
    left += right
    return left


def permute(position: Any, n: int, keys: tuple[int, ...]) -> Any:
    """Map positions to samples, a bijection of [0, n).

    Args:
        position: int64 array (NumPy or torch) of any shape with values in [0, n).
        n: size of the set, 1 to 2^40.
        keys: from `round_keys`.
    Returns:
        An array of the same kind and shape.
    """
    if not 1 <= n <= MAX_SAMPLES:
        raise ValueError(f"n = {n} is outside 1..{MAX_SAMPLES}")
    a = isqrt(n - 1) + 1
    b = -(-n // a)
    sample = _rounds(position, a, b, keys)
    while (outside := sample >= n).any():
        sample[outside] = _rounds(sample[outside], a, b, keys)
    return sample


@dataclass(frozen=True, kw_only=True)
class Order:
    """The sequence of ids one rank sees in any epoch.

    Position p of an epoch belongs to step p // global_batch; rank r takes the r-th contiguous slice of each step, so
    every world size that divides the global batch sees the same global order. A shuffled order leaves out an epoch's
    last n mod global_batch positions (another set of samples each epoch); a sequential one (evaluation) leaves out
    none and fills its last batch with PADDING_ID.
    """

    num_samples: int
    global_batch: int
    rank: int = 0
    world_size: int = 1
    seed: int = 0
    shuffle: bool = True

    def __post_init__(self) -> None:
        if self.global_batch % self.world_size:
            raise ValueError(f"a global batch of {self.global_batch} cannot be divided by {self.world_size} ranks")

    @property
    def rank_batch(self) -> int:
        """Samples of one rank in a step."""
        return self.global_batch // self.world_size

    @property
    def steps_per_epoch(self) -> int:
        """Equal on every rank."""
        return self.num_samples // self.global_batch if self.shuffle else -(-self.num_samples // self.global_batch)

    def ids(self, epoch: int, first_step: int, num_steps: int) -> np.ndarray:
        """ids_SB int64 of `num_steps` steps of an epoch, PADDING_ID where a sequential order has run out."""
        step_S1 = np.arange(first_step, first_step + num_steps).reshape(-1, 1)
        position_SB = step_S1 * self.global_batch + self.rank * self.rank_batch + np.arange(self.rank_batch)
        if self.shuffle:
            id_SB: np.ndarray = permute(position_SB, self.num_samples, round_keys(self.seed, epoch))
            return id_SB
        position_SB[position_SB >= self.num_samples] = PADDING_ID
        return position_SB
