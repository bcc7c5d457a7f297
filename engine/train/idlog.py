"""What a run consumed: each sample's id, which came with the pixels, and its pixels' CRC32.

tools/verify reads it.

OUT/ids/epoch<e>-step<s>-rank<r>of<w>.bin holds what rank r of w trained of epoch e from step s on:
little-endian int64 pairs, batch after batch. A resumed run begins new files; where it repeats steps
that an earlier process had trained and not saved, the later file counts.
"""

import re
import zlib
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from engine.feeds.batch import Batch
from engine.world import World

NAME = re.compile(r"epoch([0-9]+)-step([0-9]+)-rank([0-9]+)of([0-9]+)\.bin")


def path_of(out: Path, world: World, epoch: int, first_step: int) -> Path:
    return out / "ids" / f"epoch{epoch}-step{first_step}-rank{world.rank}of{world.size}.bin"


@dataclass(frozen=True)
class Piece:
    """Steps of an epoch that one world trained."""

    first_step: int
    last_step: int | None
    """The next piece's first; None: to the epoch's end."""
    num_ranks: int
    paths: list[Path]
    """By rank, those that are there."""


def pieces(out: Path, epoch: int) -> list[Piece]:
    """What was trained of an epoch, in order."""
    found: dict[int, dict[int, list[tuple[int, Path]]]] = {}
    for path in (out / "ids").glob(f"epoch{epoch}-step*"):
        if name := NAME.fullmatch(path.name):
            first_step, rank, size = (int(number) for number in name.groups()[1:])
            found.setdefault(first_step, {}).setdefault(size, []).append((rank, path))
    starts = sorted(found)
    ends = [*starts, None][1:]
    made = []
    for first_step, last_step in zip(starts, ends, strict=True):
        sizes = found[first_step]
        size = max(sizes, key=lambda size: sizes[size][0][1].stat().st_mtime_ns)  # the last try
        paths = [path for _, path in sorted(sizes[size])]
        made.append(Piece(first_step, last_step, size, paths))
    return made


def append(path: Path, batch: Batch, first: bool) -> None:
    """Write a batch down as it was trained on, the epoch's first into a new file.

    Waits for the device.
    """
    path.parent.mkdir(exist_ok=True)
    image_BHW = batch.image_BHW.cpu().numpy()
    crc_B = [zlib.crc32(image_HW) for image_HW in image_BHW]
    with open(path, "wb" if first else "ab") as file:
        file.write(np.stack([batch.id_B.cpu().numpy(), np.array(crc_B)], 1).astype("<i8").tobytes())


def read(path: Path, rank_batch: int) -> tuple[np.ndarray, np.ndarray]:
    """(id_SB, crc_SB) int64 of a file; S is the number of whole steps in it."""
    number_X = np.fromfile(path, "<i8")
    pair_SB2 = number_X[: len(number_X) // (2 * rank_batch) * (2 * rank_batch)].reshape(
        -1, rank_batch, 2
    )
    return pair_SB2[..., 0], pair_SB2[..., 1]
