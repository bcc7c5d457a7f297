"""The same few drawn images as a CSV and in each other layout: all must give the same records."""

import gzip
import struct
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow as pa
from PIL import Image

NUM_CLASSES = 3


@dataclass(frozen=True)
class Glyphs:
    """Images and their labels, 0 to 2: image_NHW uint8, label_N uint8."""

    image_NHW: np.ndarray
    label_N: np.ndarray

    def csv(self, path: Path) -> Path:
        """As MNIST's CSV."""
        num_pixels = self.image_NHW[0].size
        lines = [",".join(["label", *(f"pixel{p}" for p in range(num_pixels))])]
        for label, image_HW in zip(self.label_N, self.image_NHW, strict=True):
            lines.append(",".join(map(str, [label, *image_HW.ravel().tolist()])))
        path.write_text("\n".join(lines) + "\n")
        return path

    def idx(self, folder: Path, name: str = "idx", packed: bool = False) -> tuple[Path, Path]:
        """As IDX files of images and of labels."""
        suffix = ".gz" if packed else ""
        contents = {"images": idx(self.image_NHW), "labels": idx(self.label_N)}
        paths = folder / f"{name}-images{suffix}", folder / f"{name}-labels{suffix}"
        for path, content in zip(paths, contents.values(), strict=True):
            path.write_bytes(gzip.compress(content) if packed else content)
        return paths

    def npz(self, path: Path, packed: bool = False) -> Path:
        """As arrays called images and labels."""
        save = np.savez_compressed if packed else np.savez
        save(path, images=self.image_NHW, labels=self.label_N)
        return path

    def png(self, folder: Path) -> Path:
        """As a PNG each, in class folders; written class by class, as they will be read."""
        for number, (label, image_HW) in enumerate(zip(self.label_N, self.image_NHW, strict=True)):
            (folder / str(label)).mkdir(parents=True, exist_ok=True)
            Image.fromarray(image_HW).save(folder / str(label) / f"{number:05}.png")
        return folder

    def table(self) -> pa.Table:
        """As columns called image, of the pixels' bytes, and label."""
        cells = [image_HW.tobytes() for image_HW in self.image_NHW]
        return pa.table({"image": pa.array(cells, pa.binary()), "label": self.label_N})

    def by_class(self) -> "Glyphs":
        """The same rows, class by class."""
        order_N = np.argsort(self.label_N, kind="stable")
        return Glyphs(self.image_NHW[order_N], self.label_N[order_N])


def idx(values: np.ndarray, kind: int = 8) -> bytes:
    """An array of uint8 as an IDX file that says it is of `kind`."""
    head = struct.pack(f">2xBB{values.ndim}I", kind, values.ndim, *values.shape)
    return head + values.tobytes()


def glyphs(num: int = 60, side: int = 8, seed: int = 0) -> Glyphs:
    """Random images, each class of as many."""
    rng = np.random.default_rng(seed)
    image_NHW = rng.integers(0, 256, (num, side, side), np.uint8)
    return Glyphs(image_NHW, (np.arange(num) % NUM_CLASSES).astype(np.uint8))


def content(folder: Path) -> dict[str, bytes]:
    """Every file of a record directory."""
    return {file.name: file.read_bytes() for file in sorted(folder.iterdir())}
