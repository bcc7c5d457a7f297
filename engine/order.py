"""Which sample comes when: a keyed bijection of (n, seed, epoch), and each rank's slice of it.

Everything here is a pure function of integers. It works on NumPy and torch int64 arrays alike and
gives the same bits, needs O(1) memory and time per index, and knows nothing of pixels, devices or
processes.

The bijection is a generalised Feistel network (Black and Rogaway, "Ciphers with Arbitrary Finite
Domains", CT-RSA 2002, section 5) on [0, a) x [0, b) with a = ceil(sqrt(n)), b = ceil(n / a): the
domain exceeds n by at most 2 sqrt(n), so cycle walking is rare. The round function is a 32-bit
integer hash whose multipliers stay below 2^31: every product fits an int64 lane.

Shapes: N samples, S steps, B samples of one rank in a step, K blocks or strata, W windows.
"""

import hashlib
from dataclasses import dataclass, field
from functools import lru_cache
from math import isqrt
from typing import Any

import numpy as np

MASK32 = 0xFFFFFFFF
NUM_ROUNDS = 4
PADDING_ID = -1
"""The id of a row that holds no sample: only evaluation's last batch has such, uncounted."""


def round_keys(*parts: int | str) -> tuple[int, ...]:
    """One 32-bit key a round from any integers and strings, such as (seed, epoch)."""
    digest = hashlib.blake2b(repr(parts).encode(), digest_size=4 * NUM_ROUNDS).digest()
    return tuple(int.from_bytes(digest[i : i + 4], "little") for i in range(0, len(digest), 4))


def hash32(value: Any, key: int) -> Any:
    """A keyed hash of int64 lanes below 2^32 (multipliers below 2^31: Wellons' prospector)."""
    value = value ^ key
    value *= 0x21F0AAAD
    value &= MASK32
    value ^= value >> 15
    value *= 0x735A2D97
    value &= MASK32
    return value


def _round(value: Any, key: int, size: int) -> Any:
    """A hash scaled to [0, size)."""
    value = hash32(value, key)
    value *= size
    value >>= 32
    return value


def _rounds(position: Any, a: int, b: int, keys: tuple[int, ...]) -> Any:
    """One pass of the network. Updates stand in place: temporaries of 64k lanes are what it
    costs (23 ns per sample)."""
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
    """Map positions, an int64 array (NumPy or torch) of any shape, to samples.

    A bijection of [0, n), 1 <= n <= 2^40.

    `keys` are from `round_keys`. Returns a new array of the same kind and shape.
    """
    a = isqrt(n - 1) + 1
    b = -(-n // a)
    sample = _rounds(position, a, b, keys)
    while (outside := sample >= n).any():
        sample[outside] = _rounds(sample[outside], a, b, keys)
    return sample


class Windows:
    """The blocked order of one epoch, for sets that are read in pieces.

    Blocks of neighbours are shuffled, then the samples within each window of blocks.

    Position p stands in window w at row q of the window's blocks, laid end to end; `ids` says which
    sample that is. Needs 24 bytes per block.
    """

    def __init__(
        self, num_samples: int, block_samples: int, window_blocks: int, keys: tuple[int, ...]
    ) -> None:
        """`keys` are (seed, epoch), or none for a sequential order."""
        self.block_samples = block_samples
        self.window_blocks = window_blocks
        self.keys = keys
        num_blocks = -(-num_samples // block_samples)
        block_K = np.arange(num_blocks)
        if keys:
            block_K = permute(block_K, num_blocks, round_keys(*keys, "blocks"))
        size_K = np.where(
            block_K == num_blocks - 1, num_samples - (num_blocks - 1) * block_samples, block_samples
        )
        self.first_K = block_K * block_samples
        self.size_K = size_K
        """Per block, in the epoch's order: its first sample and how many it has."""
        self.start_K = np.concatenate([[0], np.cumsum(size_K)])
        """The position where each begins, and the end."""
        self.edges = np.append(self.start_K[:-1:window_blocks], num_samples)
        """The position where each window begins, and the end."""

    def runs(self, window: int) -> list[tuple[int, int]]:
        """(first sample, samples) of each block of a window, in the order of its rows."""
        part = slice(window * self.window_blocks, (window + 1) * self.window_blocks)
        return list(zip(self.first_K[part].tolist(), self.size_K[part].tolist(), strict=True))

    def rows(self, window: int, position: np.ndarray) -> np.ndarray:
        """The rows of positions that lie in `window`, shuffled within it."""
        start, stop = self.edges[window : window + 2].tolist()
        row: np.ndarray = position - start
        if not self.keys:
            return row
        shuffled: np.ndarray = permute(row, stop - start, round_keys(*self.keys, "window", window))
        return shuffled

    def ids(self, window: int, row: np.ndarray) -> np.ndarray:
        """The samples that lie at rows of a window."""
        first = window * self.window_blocks
        position = row + self.edges[window]
        start_K = self.start_K[first : first + self.window_blocks]
        slot = np.searchsorted(start_K, position, side="right") - 1 + first
        found: np.ndarray = self.first_K[slot] + position - self.start_K[slot]
        return found


_windows = lru_cache(2)(Windows)


class Strata:
    """The stratified order: the samples of each stratum (a class) spread evenly over an epoch.

    A stratum of n samples divides the epoch into n equal parts; each sample comes at a random place
    of a part of its own (as in stratified sampling). So any stretch of an epoch, a batch for one,
    holds every class by its share, give or take one or two. Needs 24 bytes per sample.
    """

    def __init__(self, stratum_N: np.ndarray) -> None:
        """`stratum_N`: the stratum of each sample, small integers."""
        self._member_N = np.argsort(stratum_N, kind="stable")
        """Samples, those of a stratum side by side."""
        self._size_K = np.bincount(stratum_N)
        self._order_of = lru_cache(2)(self._draw)

    def in_epoch(self, seed: int, epoch: int) -> np.ndarray:
        """All samples in an epoch's order."""
        return self._order_of(seed, epoch)

    def _draw(self, seed: int, epoch: int) -> np.ndarray:
        place_N = np.empty(len(self._member_N))
        first = 0
        for stratum, size in enumerate(self._size_K.tolist()):
            part_M = np.arange(size)
            low, high, *_ = round_keys(seed, epoch, "place", stratum)
            within_M = hash32(hash32(part_M & MASK32, low) ^ (part_M >> 32), high) / 2**32
            keys = round_keys(seed, epoch, "stratum", stratum)
            row_M = first + permute(part_M, size, keys) if size else part_M
            place_N[row_M] = (part_M + within_M) / max(size, 1)
            first += size
        return self._member_N[np.argsort(place_N, kind="stable")]


@dataclass(frozen=True, kw_only=True)
class Order:
    """The sequence of ids one rank sees in any epoch.

    Position p of an epoch belongs to step (p - start) // global_batch; rank r takes the r-th
    contiguous slice of each step, so every world size that divides the global batch sees the same
    global order. A shuffled order leaves out an epoch's last positions, fewer than global_batch
    (another set of samples each epoch); a sequential one (evaluation) leaves out none and fills its
    last batch with PADDING_ID.
    """

    num_samples: int
    global_batch: int
    rank: int = 0
    world_size: int = 1
    seed: int = 0
    shuffle: bool = True
    block_samples: int = 0
    """Of the blocked order (see Windows); 0: exact, every sample may come at any place."""
    window_blocks: int = 0
    strata: Strata | None = field(default=None, compare=False)
    """Of the stratified order."""
    start: int = 0
    """The position of step 0: of an epoch that goes on with another global batch."""

    def __post_init__(self) -> None:
        if self.global_batch % self.world_size:
            raise ValueError(
                f"a global batch of {self.global_batch} cannot be divided by "
                f"{self.world_size} ranks"
            )

    @property
    def rank_batch(self) -> int:
        """Samples of one rank in a step."""
        return self.global_batch // self.world_size

    @property
    def steps_per_epoch(self) -> int:
        """Equal on every rank."""
        num_samples = self.num_samples - self.start
        if self.shuffle:
            return num_samples // self.global_batch
        return -(-num_samples // self.global_batch)

    @property
    def reach_fraction(self) -> float:
        """How well it shuffles: the part of all samples that a batch may draw from; exact: 1."""
        window = self.block_samples * self.window_blocks
        return (
            min(1.0, window / self.num_samples) if window and self.shuffle else float(self.shuffle)
        )

    def windows(self, epoch: int) -> Windows:
        """The windows of an epoch: of a blocked order, or a sequential one read in blocks."""
        keys = (self.seed, epoch) if self.shuffle else ()
        return _windows(self.num_samples, self.block_samples, self.window_blocks, keys)

    def positions(self, first_step: int, num_steps: int) -> np.ndarray:
        """positions_SB int64 of this rank's samples in `num_steps` steps of an epoch."""
        step_S1 = np.arange(first_step, first_step + num_steps).reshape(-1, 1)
        first = self.start + self.rank * self.rank_batch
        return step_S1 * self.global_batch + np.arange(first, first + self.rank_batch)

    def ids(self, epoch: int, first_step: int, num_steps: int) -> np.ndarray:
        """ids_SB int64 of `num_steps` steps, PADDING_ID where a sequential order has run out."""
        position_SB = self.positions(first_step, num_steps)
        if not self.shuffle:
            position_SB[position_SB >= self.num_samples] = PADDING_ID
            return position_SB
        if self.strata:
            drawn_SB: np.ndarray = self.strata.in_epoch(self.seed, epoch)[position_SB]
            return drawn_SB
        if not self.block_samples:
            id_SB: np.ndarray = permute(position_SB, self.num_samples, round_keys(self.seed, epoch))
            return id_SB
        windows = self.windows(epoch)
        position = position_SB.reshape(-1)
        edges = np.searchsorted(position, windows.edges)
        for window in np.flatnonzero(np.diff(edges)).tolist():
            part = position[edges[window] : edges[window + 1]]
            part[:] = windows.ids(window, windows.rows(window, part))
        return position_SB
