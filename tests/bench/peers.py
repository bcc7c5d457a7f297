"""What others carry, to compare: torch's TensorDataset, torchdata, FFCV, and index_select alone.

python -m tests.bench.peers NAME RECORDS BATCH SECONDS measures one, as tools.measure.feeds does;
engine.loader, too, which is no peer but goes where they do. FFCV and torchdata are measured where
they are installed. index_select is torch's gather of ids that were drawn before: what the memory
allows.
"""

import tempfile
from collections.abc import Iterable
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.utils.data import DataLoader, TensorDataset

import engine
from engine.data.records import open_records
from tools.measure.feeds import FeedRate, Opened, main, measure_all


def measure_peers(records: Path, batch_size: int, seconds: float) -> list[FeedRate]:
    """What each of PEERS carries that is installed."""
    names = installed(PEERS)
    return measure_all(records, batch_size, seconds, names=names, module="tests.bench.peers")


def installed(names: Iterable[str]) -> list[str]:
    """Those of the names whose package is here."""
    return [name for name in names if find_spec(PACKAGES.get(name, "torch"))]


def _tensor_dataset(records: Path, batch_size: int, kind: Any = DataLoader) -> Opened:
    """What a tutorial writes: torch's own shuffle, TensorDataset, two workers."""
    train = open_records(records).split("train")
    tensors = (torch.from_numpy(array) for array in (train.image_NHW, train.label_N))
    data = TensorDataset(*tensors, torch.arange(len(train)))
    how = {"shuffle": True, "drop_last": True, "num_workers": 2, "persistent_workers": True}
    loaders = [kind(data, batch_size, **how)]  # a list: clearing it ends the workers
    return lambda epoch: (label_B for _, label_B, _ in loaders[0]), "torch's", loaders.clear


def _torchdata(records: Path, batch_size: int) -> Opened:
    """The same with a loader that goes on amid an epoch."""
    from torchdata.stateful_dataloader import StatefulDataLoader

    return _tensor_dataset(records, batch_size, StatefulDataLoader)


def _engine_loader(records: Path, batch_size: int) -> Opened:
    batches = engine.loader(records, batch_size=batch_size, device="cpu")
    return lambda epoch: (label_B for _, label_B, _ in batches), "exact", batches.close


def _ffcv(records: Path, batch_size: int) -> Opened:
    """FFCV with two workers, its file in the page cache, its own shuffle."""
    from ffcv.fields import IntField, NDArrayField
    from ffcv.fields.decoders import IntDecoder, NDArrayDecoder
    from ffcv.loader import Loader, OrderOption
    from ffcv.transforms import ToTensor
    from ffcv.writer import DatasetWriter

    train = open_records(records).split("train")
    folder = tempfile.TemporaryDirectory()
    path = str(Path(folder.name) / "train.beton")
    image = NDArrayField(np.dtype("uint8"), train.height_width)
    fields = {"image": image, "label": IntField(), "id": IntField()}
    rows = _Rows(train.image_NHW, train.label_N)
    DatasetWriter(path, fields, num_workers=1).from_indexed_dataset(rows)
    pipelines = {
        "image": [NDArrayDecoder(), ToTensor()],
        "label": [IntDecoder(), ToTensor()],
        "id": [IntDecoder()],
    }
    how = {"num_workers": 2, "order": OrderOption.RANDOM, "os_cache": True, "drop_last": True}
    loader = Loader(path, batch_size, pipelines=pipelines, **how)
    return lambda epoch: (label_B for _, label_B, _ in loader), "FFCV's", folder.cleanup


class _Rows:
    """What FFCV's writer reads, row by row."""

    def __init__(self, image_NHW: np.ndarray, label_N: np.ndarray) -> None:
        self._image_NHW = image_NHW
        self._label_N = label_N

    def __len__(self) -> int:
        return len(self._label_N)

    def __getitem__(self, row: int) -> tuple[np.ndarray, int, int]:
        return self._image_NHW[row], int(self._label_N[row]), row


def _index_select(records: Path, batch_size: int) -> Opened:
    train = open_records(records).split("train")
    image_NP = torch.from_numpy(train.image_NHW).view(len(train), -1)
    out_BP = torch.from_numpy(np.empty((batch_size, image_NP.shape[1]), np.uint8))
    ids = torch.randperm(len(train))[: len(train) // batch_size * batch_size].split(batch_size)
    gather = partial(torch.index_select, image_NP, 0, out=out_BP)
    return lambda epoch: map(gather, ids), "drawn", lambda: None


PEERS = {
    "TensorDataset": _tensor_dataset,
    "torchdata": _torchdata,
    "FFCV": _ffcv,
    "index_select": _index_select,
}
OURS = {"engine.loader": _engine_loader}
PACKAGES = {"torchdata": "torchdata", "FFCV": "ffcv"}
"""What a name needs beside torch."""


if __name__ == "__main__":
    main(lambda name, records, batch_size: (PEERS | OURS)[name](records, batch_size))
