"""What the images alone say of a data set: twins between its splits, and nearest neighbours.

Distances are Euclidean over pixels (0..255), in float64: sums of squares are whole numbers far
below 2**53, so every count here is exact. RMS is the root of a distance's mean square per pixel.

`ceiling_fraction` is a bound: of test images with the same pixels under several labels, one label
can be right. The nearest neighbour's accuracy is a yardstick, not a bound: a network that
generalises passes it.

Does not: look at any network.

Shapes: N test images, R of them in a block, B training images of a block, P pixels, J nearest ones,
T limits of NEAR_RMS, M rows.
"""

from collections import Counter, defaultdict
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import combinations
from pathlib import Path

import numpy as np
import torch

from engine.data.record_file import SPLITS
from engine.data.records import Records, Split
from engine.errors import UserError
from engine.report import Environment
from engine.typed import read_result_as
from engine.ui import progress_bar

FORMAT = 1
NAME = "data_facts.json"
NEAR_RMS = (1, 16)
"""Grey levels below which images are near twins."""
NUM_NEAREST = 5
BLOCK_ROWS, BLOCK_COLUMNS = 1024, 2048
"""Test and training images at a time: 16 MiB of distances."""


@dataclass(frozen=True, kw_only=True)
class Twins:
    """Images of one split that have twins in another."""

    split: str
    among: str
    below_rms: int
    """Grey levels; 0: identical pixels."""
    num_images: int
    num_with_twins: int
    num_with_other_label: int
    """At least one of the twins carries another label."""
    num_mostly_other_label: int
    """More than half of the twins do."""


@dataclass(frozen=True, kw_only=True)
class Nearest:
    """Test images, and how near training images of their own class and of others are."""

    num_images: int
    num_train: int
    """Training images that were compared with."""
    num_own_nearer: int
    num_other_nearer: int
    num_tied: int
    num_own_in_five: int
    """One of the own class is among the 5 nearest, or as near as the fifth."""
    accuracy_fraction: float
    """Of the nearest neighbour; of ties half count as right."""
    other_nearer_fraction: float
    own_in_five_fraction: float


@dataclass(frozen=True, kw_only=True)
class DataFacts:
    """What the images of records say, without a network."""

    format: int = FORMAT
    environment: Environment
    dataset_fingerprint: str
    num_images: dict[str, int]
    """Of each split."""
    ceiling_fraction: float
    """No function of the pixels is right on more of the test split."""
    twins: list[Twins]
    nearest: Nearest

    def __post_init__(self) -> None:
        if self.format != FORMAT:
            raise ValueError(f"format {self.format}, this reader knows {FORMAT}")
        if not 0 < self.ceiling_fraction <= 1:
            raise ValueError(f"a ceiling of {self.ceiling_fraction} cannot be")


def read_facts(folder: Path) -> DataFacts:
    """FOLDER/data_facts.json.

    Raises:
        UserError: it is missing, damaged or of another format.
    """
    remedy = "make it with tools/evaluate --data-facts --out"
    return read_result_as(DataFacts, folder / NAME, "file of facts of data", remedy)


def data_facts(
    records: Records, environment: Environment, device: torch.device, max_train: int | None = None
) -> DataFacts:
    """The facts of records that have a test split.

    Args:
        max_train: training images to look among for near ones, spread evenly; None: all.
    Raises:
        UserError: there is no image in the test or the train split.
    """
    test, train = records.split("test"), records.split("train")
    for name, split in (("test", test), ("train", train)):
        if not len(split):
            raise UserError(f"{records.path}: has no image in {name}; pack it with --split random")
    if max_train and max_train < len(train):
        train = train.take(np.linspace(0, len(train) - 1, max_train).astype(int))
    names = [name for name in SPLITS if name in records.splits]
    identical = [_identical(records, split, among) for among, split in combinations(names, 2)]
    nearest, near = nearest_images(test, train, device)
    return DataFacts(
        environment=environment,
        dataset_fingerprint=records.fingerprint,
        num_images={name: len(records.splits[name]) for name in names},
        ceiling_fraction=ceiling(test),
        twins=[*identical, *near],
        nearest=nearest,
    )


def ceiling(split: Split) -> float:
    """The largest accuracy of any function of the pixels: one label for equal images."""
    labels = _labels_by_image(split)
    return sum(max(count.values()) for count in labels.values()) / len(split)


def _labels_by_image(split: Split) -> dict[bytes, Counter[int]]:
    found: dict[bytes, Counter[int]] = defaultdict(Counter)
    for image_HW, label in zip(split.image_NHW, split.label_N.tolist(), strict=True):
        found[image_HW.tobytes()][label] += 1
    return found


def _identical(records: Records, name: str, among: str) -> Twins:
    """The images of `name` whose pixels an image of `among` has, too."""
    split, labels = records.splits[name], _labels_by_image(records.splits[among])
    same_N, all_N = np.zeros((2, len(split)), np.int64)
    for n, (image_HW, label) in enumerate(zip(split.image_NHW, split.label_N, strict=True)):
        count = labels.get(image_HW.tobytes())
        if count:
            same_N[n], all_N[n] = count[int(label)], count.total()
    return _twins(name, among, 0, same_N, all_N)


def _twins(split: str, among: str, below_rms: int, same_N: np.ndarray, all_N: np.ndarray) -> Twins:
    """From each image's number of twins of its own label, and of any."""
    return Twins(
        split=split,
        among=among,
        below_rms=below_rms,
        num_images=len(all_N),
        num_with_twins=int((all_N > 0).sum()),
        num_with_other_label=int((all_N > same_N).sum()),
        num_mostly_other_label=int((2 * (all_N - same_N) > all_N).sum()),
    )


def nearest_images(test: Split, train: Split, device: torch.device) -> tuple[Nearest, list[Twins]]:
    """The nearest training images of every test image, and its near twins below each NEAR_RMS."""
    search = _Search(test, device)
    with progress_bar("nearest images", len(train)) as show:
        done = 0
        for image_BHW, label in _blocks_of_a_class(train):
            search.add(_pixels(image_BHW).to(device), label)
            done += len(image_BHW)
            show(done)
    twins = [
        _twins("test", "train", rms, same_N.cpu().numpy(), all_N.cpu().numpy())
        for rms, same_N, all_N in zip(NEAR_RMS, search.same_TN, search.all_TN, strict=True)
    ]
    return search.nearest(len(train)), twins


def _blocks_of_a_class(train: Split) -> Iterator[tuple[np.ndarray, int]]:
    """(image_BHW, label) of all images: in a block, all are of one class."""
    for label in np.unique(train.label_N):
        row_M = np.flatnonzero(train.label_N == label)
        for start in range(0, len(row_M), BLOCK_COLUMNS):
            yield train.image_NHW[row_M[start : start + BLOCK_COLUMNS]], int(label)


def _pixels(image_BHW: np.ndarray) -> torch.Tensor:
    return torch.from_numpy(image_BHW).flatten(1).double()


class _Search:
    """What was found so far of each test image; training images are added block by block."""

    def __init__(self, test: Split, device: torch.device) -> None:
        num = len(test)
        self.pixel_NP = _pixels(test.image_NHW).to(device)
        self.square_N = self.pixel_NP.square().sum(1)
        self.label_N = torch.from_numpy(test.label_N.astype(np.int64)).to(device)
        self.own_N = torch.full((num,), torch.inf, dtype=torch.float64, device=device)
        """The least squared distance to an image of the own class, and of another."""
        self.other_N = self.own_N.clone()
        self.nearest_NJ = self.own_N[:, None].repeat(1, NUM_NEAREST)
        """The least squared distances, ascending."""
        self.same_TN = torch.zeros((len(NEAR_RMS), num), dtype=torch.int64, device=device)
        """Near twins of the own label, and of any, for each of NEAR_RMS."""
        self.all_TN = self.same_TN.clone()

    def add(self, pixel_BP: torch.Tensor, label: int) -> None:
        """Take in training images of one class."""
        square_B = pixel_BP.square().sum(1)
        for start in range(0, len(self.label_N), BLOCK_ROWS):
            rows = slice(start, start + BLOCK_ROWS)
            square_RB = torch.addmm(square_B, self.pixel_NP[rows], pixel_BP.T, alpha=-2)
            square_RB += self.square_N[rows, None]
            self._take_nearest(rows, square_RB, label)
            self._take_twins(rows, square_RB, label)

    def _take_nearest(self, rows: slice, square_RB: torch.Tensor, label: int) -> None:
        num = min(NUM_NEAREST, square_RB.shape[1])
        found_RJ = square_RB.topk(num, dim=1, largest=False).values
        both_RJ = torch.cat([self.nearest_NJ[rows], found_RJ], 1)
        self.nearest_NJ[rows] = both_RJ.topk(NUM_NEAREST, dim=1, largest=False).values
        is_own_R = self.label_N[rows] == label
        for least_N, is_its_R in ((self.own_N, is_own_R), (self.other_N, ~is_own_R)):
            nearer_R = torch.minimum(least_N[rows], found_RJ[:, 0])
            least_N[rows] = torch.where(is_its_R, nearer_R, least_N[rows])

    def _take_twins(self, rows: slice, square_RB: torch.Tensor, label: int) -> None:
        least_R = square_RB.amin(1)
        for number, rms in enumerate(NEAR_RMS):
            limit = rms**2 * self.pixel_NP.shape[1]
            row_M = (least_R < limit).nonzero()[:, 0]  # few: only they are counted
            if len(row_M):
                count_M = (square_RB[row_M] < limit).sum(1)
                place_M = row_M + rows.start
                self.all_TN[number, place_M] += count_M
                self.same_TN[number, place_M] += count_M * (self.label_N[place_M] == label)

    def nearest(self, num_train: int) -> Nearest:
        num = len(self.label_N)
        own = int((self.own_N < self.other_N).sum())
        other = int((self.own_N > self.other_N).sum())
        is_in_five_N = self.own_N.isfinite() & (self.own_N <= self.nearest_NJ[:, -1])
        in_five = int(is_in_five_N.sum())
        return Nearest(
            num_images=num,
            num_train=num_train,
            num_own_nearer=own,
            num_other_nearer=other,
            num_tied=num - own - other,
            num_own_in_five=in_five,
            accuracy_fraction=(num + own - other) / 2 / num,
            other_nearer_fraction=other / num,
            own_in_five_fraction=in_five / num,
        )
