"""Classes that count as one: case pairs, look-alikes, and those that a run itself confuses.

An answer is right under a merge if it is in the label's group: the network stays the one that was
trained on all classes, and only the count differs.

Does not: retrain, or sum the probabilities of a group.

Shapes: K classes, N samples; group_K is each class's group, a number from 0 on without a gap.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import combinations

import numpy as np


@dataclass(frozen=True)
class LookAlikes:
    """Groups of classes, a text of single characters each, and where they come from."""

    groups: tuple[str, ...]
    why: str


def _pairs(letters: str) -> tuple[str, ...]:
    return tuple(letter.upper() + letter for letter in letters)


MERGES = {
    "EMNIST ByMerge": LookAlikes(
        _pairs("cijklmopsuvwxyz"),
        "the 15 letters whose cases EMNIST's ByMerge makes one, as NIST suggested for handwriting",
    ),
    "case pairs of print": LookAlikes(
        _pairs("cjkmopsuvwxyz"),
        "ByMerge without I and L: in print, unlike handwriting, their cases differ in shape",
    ),
    "zero": LookAlikes(
        ("0Oo",), "Unicode's confusables (UTS #39) give 0 and O one skeleton; o is O made larger"
    ),
    "one": LookAlikes(("1Il|",), "Unicode's confusables (UTS #39) give 1, I, l and | one skeleton"),
    "quotes": LookAlikes(
        ("'`,",), "UTS #39 gives ' and ` one skeleton; , is ' lower down, and images are centred"
    ),
    "bars": LookAlikes(
        ("-_",), "a horizontal bar each: they differ in height and length, and images are scaled"
    ),
}
"""Sets of classes that look alike, by name; none is chosen by what a run got wrong.

EMNIST: Cohen, Afshar, Tapson, van Schaik, 2017, arXiv:1702.05373: of 62 classes 47 are
left. UTS #39: unicode.org/reports/tr39. Centred and scaled: a glyph is cropped to its ink and fills
the image, in TMNIST and in what tools/render_glyphs draws.
"""
ALL = "all of these"
ALL_WHY = "the sets above together; groups that share a class are one"
MEASURED = "measured look-alikes"


def named_merges(classes: Sequence[str]) -> dict[str, tuple[np.ndarray, str]]:
    """(group_K, why) by name, of those MERGES that join any of `classes`; ALL is their union."""
    index = {label: number for number, label in enumerate(classes)}
    found = {}
    every: list[tuple[int, int]] = []
    for name, merge in MERGES.items():
        pairs = [
            (index[a], index[b])
            for group in merge.groups
            for a, b in combinations(group, 2)
            if a in index and b in index
        ]
        every += pairs
        if pairs:
            found[name] = merged(len(classes), pairs), merge.why
    if found:
        found[ALL] = merged(len(classes), every), ALL_WHY
    return found


def merged(num_classes: int, pairs: Iterable[tuple[int, int]]) -> np.ndarray:
    """group_K with the classes of each pair in one group, and so on in turn (union-find)."""
    parent = list(range(num_classes))

    def root(k: int) -> int:
        while parent[k] != k:
            parent[k] = parent[parent[k]]
            k = parent[k]
        return k

    for a, b in pairs:
        parent[root(a)] = root(b)
    roots = [root(k) for k in range(num_classes)]
    group_K: np.ndarray = np.unique(roots, return_inverse=True)[1]
    return group_K


def confused_pairs(
    label_N: np.ndarray, answer_N: np.ndarray, num_classes: int, share: float
) -> list[tuple[int, int]]:
    """Pairs of classes of whose samples, both together, more than `share` got the other's name."""
    count_TR = np.zeros((num_classes, num_classes), int)
    np.add.at(count_TR, (label_N, answer_N), 1)
    size_K = count_TR.sum(1)
    swapped_TR = count_TR + count_TR.T
    is_over_TR = swapped_TR > share * (size_K[:, None] + size_K[None])
    return [(int(a), int(b)) for a, b in np.argwhere(np.triu(is_over_TR, 1))]


def group_names(classes: Sequence[str], group_K: np.ndarray) -> list[list[str]]:
    """The classes of each group of more than one."""
    members = [
        [classes[k] for k in np.flatnonzero(group_K == g).tolist()]
        for g in range(group_K.max() + 1)
    ]
    return [names for names in members if len(names) > 1]
