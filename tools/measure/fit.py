"""How long a collective takes: alpha, what a message costs, and beta, the rate of a link.

A ring of R ranks passes n bytes in parts of n / R: an all-reduce in 2 (R - 1) rounds, an all-gather
or a reduce-scatter in half as many. Each round costs alpha and its part's bytes at beta:

    time = messages x alpha + bytes sent / beta

NCCL takes trees instead where they are sooner: 2 log2 R messages for 2 n bytes. Sources: Patarasuk
and Yuan, "Bandwidth optimal all-reduce algorithms" (2009); Sanders, Speck and Traeff, "Two-tree
algorithms for full bandwidth broadcast, reduction and scan" (2009), as NCCL has them since 2.4.

Between two sizes that were measured of as many ranks, a time is taken between theirs; elsewhere the
two numbers say it. There is one link, that of all ranks: no machines within which they are closer.
What measures is link.py.

Shapes: N points, P pairs of them.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from math import ceil, log2
from pathlib import Path
from typing import Literal

import numpy as np

from engine.errors import UserError
from engine.report import Environment
from engine.typed import read_result_as

Kind = Literal["all-reduce", "all-gather", "reduce-scatter"]
KINDS: tuple[Kind, ...] = ("all-reduce", "all-gather", "reduce-scatter")
FORMAT = 1
BITS_PER_US = 1e3
"""Of 1 Gbit/s."""


@dataclass(frozen=True, kw_only=True)
class Point:
    """A collective that was measured."""

    kind: Kind
    num_ranks: int
    num_bytes: int
    """Of the whole tensor, that every rank has or gets."""
    us: float

    def __post_init__(self) -> None:
        if self.num_ranks < 2 or self.num_bytes < 1 or not self.us > 0:
            raise ValueError("a point has 2 ranks, a byte and some time at least")


@dataclass(frozen=True, kw_only=True)
class Link:
    """What ranks talk over."""

    format: int = FORMAT
    source: str
    """In words: given, or where it was measured."""
    backend: Literal["gloo", "nccl"]
    alpha_us: float
    beta_gbps: float
    """Gbit/s that a rank sends while it receives as many."""
    num_local: int = 0
    """Ranks of a machine; 0: as many as it has."""
    points: list[Point] = field(default_factory=list)
    environment: Environment | None = None
    """Where the points were measured."""

    def __post_init__(self) -> None:
        if self.format != FORMAT:
            raise ValueError(f"format {self.format}, this engine reads {FORMAT}")
        if self.alpha_us < 0 or not self.beta_gbps > 0 or self.num_local < 0:
            raise ValueError("alpha_us or num_local is below 0, or beta_gbps not above it")

    def us(self, kind: Kind, num_bytes: float, num_ranks: int) -> float:
        """Microseconds of a collective; 0 for one rank."""
        if num_ranks == 1:
            return 0.0
        same = [p for p in self.points if (p.kind, p.num_ranks) == (kind, num_ranks)]
        known = sorted((point.num_bytes, point.us) for point in same)
        if not known:
            return self.fitted_us(kind, num_bytes, num_ranks)
        largest, longest_us = known[-1]
        if num_bytes > largest:
            growth = self.fitted_us(kind, num_bytes, num_ranks)
            return longest_us * growth / self.fitted_us(kind, largest, num_ranks)
        return interpolated(known, num_bytes)

    def fitted_us(self, kind: Kind, num_bytes: float, num_ranks: int) -> float:
        """The same by the two numbers alone."""
        ring = ring_parts(kind, num_bytes, num_ranks)
        ways = [ring]
        if self.backend == "nccl" and kind == "all-reduce":
            ways.append((2 * ceil(log2(num_ranks)), 2 * num_bytes))
        return min(
            messages * self.alpha_us + sent * 8 / (self.beta_gbps * BITS_PER_US)
            for messages, sent in ways
        )

    def missed(self) -> list[float]:
        """By how much the two numbers miss each point: 0.1 is 10 % too long."""
        return [self.fitted_us(p.kind, p.num_bytes, p.num_ranks) / p.us - 1 for p in self.points]


def ring_parts(kind: Kind, num_bytes: float, num_ranks: int) -> tuple[int, float]:
    """Messages that a rank of a ring sends one after the other, and their bytes in all."""
    rounds = (num_ranks - 1) * (2 if kind == "all-reduce" else 1)
    return rounds, rounds / num_ranks * num_bytes


def interpolated(known: Sequence[tuple[float, float]], x: float) -> float:
    """y between the two neighbours of x; at the ends those of the first and the last."""
    xs, ys = zip(*sorted(known), strict=True)
    return float(np.interp(x, xs, ys))


def two_numbers(u_N: np.ndarray, v_N: np.ndarray, y_N: np.ndarray) -> tuple[float, float]:
    """(a, b) of y = a u + b v, neither below 0, that miss all y by the least factors together.

    Tried are the lines through two of the points, or through one and an axis. Unlike that of least
    squares, the best of them is not drawn to one odd point. All numbers are above 0.
    """
    i_P, j_P = np.triu_indices(len(y_N), 1)
    area_P = u_N[i_P] * v_N[j_P] - u_N[j_P] * v_N[i_P]
    i_P, j_P, area_P = i_P[area_P != 0], j_P[area_P != 0], area_P[area_P != 0]
    zero_N = np.zeros(len(y_N))
    through_P = (y_N[i_P] * v_N[j_P] - y_N[j_P] * v_N[i_P]) / area_P
    slope_P = (u_N[i_P] * y_N[j_P] - u_N[j_P] * y_N[i_P]) / area_P
    a_P = np.concatenate([through_P, zero_N, y_N / u_N])
    b_P = np.concatenate([slope_P, y_N / v_N, zero_N])
    is_fit_P = (a_P >= 0) & (b_P >= 0)
    a_P, b_P = a_P[is_fit_P], b_P[is_fit_P]
    missed_P = np.abs(np.log((np.outer(a_P, u_N) + np.outer(b_P, v_N)) / y_N)).sum(1)
    best = int(missed_P.argmin())
    return float(a_P[best]), float(b_P[best])


def fitted_link(
    points: list[Point],
    source: str,
    backend: Literal["gloo", "nccl"],
    num_local: int = 0,
    facts: Environment | None = None,
) -> Link:
    """The link whose two numbers fit its all-reduces.

    Raises:
        UserError: more bytes take no more time.
    """
    reduces = [point for point in points if point.kind == "all-reduce"]
    parts = [ring_parts(p.kind, p.num_bytes, p.num_ranks) for p in reduces]
    messages_N, sent_N = np.array(parts, float).T
    alpha_us, us_per_byte = two_numbers(messages_N, sent_N, np.array([p.us for p in reduces]))
    if us_per_byte == 0:
        raise UserError(f"{source}: more bytes took no more time; measure a quiet machine")
    return Link(
        source=source,
        backend=backend,
        alpha_us=alpha_us,
        beta_gbps=8 / (us_per_byte * BITS_PER_US),
        num_local=num_local,
        points=points,
        environment=facts,
    )


def given_link(alpha_us: float, beta_gbps: float, backend: Literal["gloo", "nccl"]) -> Link:
    """A link that somebody states."""
    return Link(source="as given", backend=backend, alpha_us=alpha_us, beta_gbps=beta_gbps)


def read_link(path: Path) -> Link:
    """A link that link.py has measured.

    Raises:
        UserError: the file cannot be read, or is none.
    """
    remedy = "make it by torchrun ... -m tools.measure.link FILE"
    return read_result_as(Link, path, "fit of a link", remedy)
