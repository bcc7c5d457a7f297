"""What each feed carries, alone: each in a process of its own, on the same records, uint8 batches with their ids.

python -m tools.measure.feeds NAME RECORDS BATCH SECONDS measures one and prints JSON; `measure_all` runs them in turn.
"""

import json
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass, replace
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import torch
from torch.utils.data import DataLoader, TensorDataset

from engine.config import AugmentConfig, RunConfig, override
from engine.data.records import open_records
from engine.data.sample import ensure_sample
from engine.durable import write_file, writing
from engine.feeds.build import make_feed, open_for
from engine.host import keep_large_blocks
from engine.meters import host_peak_rss_gib
from engine.report import environment, write_json
from engine.train.session import check_batch, make_order
from engine.typed import typed
from tools.report.rows import number

FEEDS = ("resident", "dali", "stream", "resident augmented", "dali augmented", "loader_batched", "loader",
         "TensorDataset", "FFCV", "index_select")  # fmt: skip
"""The last three are not feeds of ours. FFCV is measured where it is installed; index_select is torch's gather of ids
that were drawn before: what the memory allows."""
Opened = tuple[Callable[[int], Iterable[Any]], str, Callable[[], object]]
"""Something of each batch of an epoch that is as long as it, the order's name, and what closes the feed."""


@dataclass(frozen=True, kw_only=True)
class FeedRate:
    """What a feed carries: the median over passes, the lowest and the highest, and what it takes."""

    name: str
    samples_per_s: float
    low: float
    high: float
    num_passes: int
    order: str
    threads: int
    first_batch_s: float
    peak_mib: float
    cpu_s_per_million: float


def measure_all(records: Path, batch_size: int, seconds: float) -> list[FeedRate]:
    """A row for each of FEEDS, each measured for about `seconds`."""
    rows = []
    for name in FEEDS:
        if name == "FFCV" and find_spec("ffcv") is None:
            continue
        command = [
            sys.executable,
            "-m",
            "tools.measure.feeds",
            name,
            str(records),
            str(batch_size),
            str(seconds),
        ]
        done = subprocess.run(command, check=True, stdout=subprocess.PIPE, encoding="utf-8")
        last = done.stdout.splitlines()[-1]
        rows.append(typed(FeedRate, json.loads(last), name))
    return rows


def profile_feeds(
    data: Path | None, batch_size: int, seconds: float, json_file: Path | None, out: Path
) -> str:
    """The table of all feeds; writes OUT/feeds.json and feeds.png, and the JSON to `json_file`.

    Raises:
        UserError: the records cannot be opened, or a batch is larger than their train split.
    """
    import pandas as pd  # not above: what the children load counts as their memory

    from tools.report import charts

    records = data or ensure_sample()
    check_batch(RunConfig(global_batch=batch_size), open_records(records, in_memory=False), 1)
    frame = pd.DataFrame(map(asdict, measure_all(records, batch_size, seconds)))
    facts = asdict(
        environment(num_threads=torch.get_num_threads(), allocator="keep_large_blocks", gpu={})
    )
    tree = {"environment": facts, "batch_size": batch_size, "feeds": frame.to_dict("records")}
    rates, xlabel = (
        frame["samples_per_s"],
        f"samples/s, batch {batch_size}: median, lowest and highest epoch",
    )
    spread = frame[["low", "high"]].sub(rates, axis=0).abs().to_numpy().T
    chart = partial(charts.bars, frame["name"], rates, [*map(number, rates)], xlabel, spread)
    with writing(out):
        out.mkdir(parents=True, exist_ok=True)
        for file in (out / "feeds.json", *([json_file] if json_file else [])):
            write_json(tree, file)
        write_file(out / "feeds.png", charts.draw("feeds", chart).png)
    shown = frame[
        ["name", "samples_per_s", "order", "first_batch_s", "peak_mib", "cpu_s_per_million"]
    ]
    table = shown.to_string(index=False, float_format=number)
    return f"{table}\nwritten: {out / 'feeds.json'}, {out / 'feeds.png'}"


def measure(name: str, records: Path, batch_size: int, seconds: float) -> FeedRate:
    """Throughput (median over passes, after one that warms up), time to the first batch, memory, CPU time."""
    keep_large_blocks()
    before_gib, start = host_peak_rss_gib(), time.perf_counter()
    others = {"TensorDataset": _tensor_dataset, "FFCV": _ffcv, "index_select": _index_select}
    epoch, order, close = others.get(name, partial(_ours, name))(records, batch_size)
    batches = iter(epoch(0))
    next(batches)
    first_batch_s = time.perf_counter() - start
    warmed = _pass(batches, seconds / 2)[0]
    rates: list[float] = []
    counted, cpu_s = 0, time.process_time()
    deadline = time.perf_counter() + seconds
    while not rates or time.perf_counter() < deadline:
        seen, took_s = _pass(epoch(1 + len(rates)), max(deadline - time.perf_counter(), 0.1))
        rates.append(seen / took_s)
        counted += seen
    cpu_s = time.process_time() - cpu_s
    close()
    children = resource.getrusage(resource.RUSAGE_CHILDREN)  # over all passes, the first included
    cpu_s += (children.ru_utime + children.ru_stime) * counted / (counted + warmed)
    return FeedRate(
        name=name,
        samples_per_s=median(rates),
        low=min(rates),
        high=max(rates),
        num_passes=len(rates),
        order=order,
        threads=torch.get_num_threads(),
        first_batch_s=first_batch_s,
        peak_mib=1024 * (host_peak_rss_gib() - before_gib),
        cpu_s_per_million=cpu_s / counted * 1e6,
    )


def _pass(batches: Iterable[Any], seconds: float) -> tuple[int, float]:
    """(samples, seconds) of an epoch, or of what part of it fits into `seconds`."""
    start, seen = time.perf_counter(), 0
    for batch in batches:
        seen += len(batch)
        if time.perf_counter() - start > seconds:
            break
    return seen, time.perf_counter() - start


def _ours(name: str, records: Path, batch_size: int) -> Opened:
    kind, _, augmented = name.partition(" ")
    settings = {
        "data.feed": kind,
        "data.order": "blocked" if kind == "stream" else "exact",
        "global_batch": batch_size,
    }
    config = override(RunConfig(), settings, name)
    distortion = AugmentConfig(
        shift_pixels=2, rotate_degrees=10, shear_degrees=5, scale_fraction=0.1
    )
    opened = open_for(config.data, records)
    train = opened.split("train")
    order = make_order(config, len(train), rank=0, world_size=1)
    if augmented:
        config = replace(config, augment=distortion)
    feed = make_feed(config, train, order, len(opened.classes), torch.device("cpu"))
    return (
        lambda epoch: (batch.id_B for batch in feed.batches(epoch)),
        config.data.order,
        feed.close,
    )


def _tensor_dataset(records: Path, batch_size: int) -> Opened:
    """What a tutorial writes: torch's own shuffle, TensorDataset, two workers."""
    train = open_records(records).split("train")
    tensors = (torch.from_numpy(array) for array in (train.image_NHW, train.label_N))
    data = TensorDataset(*tensors, torch.arange(len(train)))
    # a list, so that closing lets go of the loader, and with it of its workers
    loaders = [
        DataLoader(
            data, batch_size, shuffle=True, drop_last=True, num_workers=2, persistent_workers=True
        )
    ]
    return lambda epoch: (label_B for _, label_B, _ in loaders[0]), "torch's", loaders.clear


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
    fields = {
        "image": NDArrayField(np.dtype("uint8"), train.height_width),
        "label": IntField(),
        "id": IntField(),
    }
    DatasetWriter(path, fields, num_workers=1).from_indexed_dataset(
        _Rows(train.image_NHW, train.label_N)
    )
    pipelines = {
        "image": [NDArrayDecoder(), ToTensor()],
        "label": [IntDecoder(), ToTensor()],
        "id": [IntDecoder()],
    }
    how = {"num_workers": 2, "order": OrderOption.RANDOM, "os_cache": True, "drop_last": True}
    loader = Loader(path, batch_size, pipelines=pipelines, **how)
    return lambda epoch: (label_B for _, label_B, _ in loader), "FFCV's", folder.cleanup


def _index_select(records: Path, batch_size: int) -> Opened:
    train = open_records(records).split("train")
    image_NP = torch.from_numpy(train.image_NHW).view(len(train), -1)
    out_BP = torch.from_numpy(np.empty((batch_size, image_NP.shape[1]), np.uint8))
    ids = torch.randperm(len(train))[: len(train) // batch_size * batch_size].split(batch_size)
    gather = partial(torch.index_select, image_NP, 0, out=out_BP)
    return lambda epoch: map(gather, ids), "drawn", lambda: None


class _Rows:
    """What FFCV's writer reads, row by row."""

    def __init__(self, image_NHW: np.ndarray, label_N: np.ndarray) -> None:
        self._image_NHW, self._label_N = image_NHW, label_N

    def __len__(self) -> int:
        return len(self._label_N)

    def __getitem__(self, row: int) -> tuple[np.ndarray, int, int]:
        return self._image_NHW[row], int(self._label_N[row]), row


if __name__ == "__main__":
    feed, folder, samples, duration_s = sys.argv[1:]
    found = measure(feed, Path(folder), int(samples), float(duration_s))
    print(json.dumps(asdict(found)))
