"""What each feed carries, alone: in a process of its own, on the same records, batches with ids.

python -m tools.measure.feeds NAME RECORDS BATCH SECONDS measures one and prints JSON; `measure_all`
runs them in turn. tests/bench/peers.py measures what others have in the same way.
"""

import json
import resource
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any

import torch

from engine.config import AugmentConfig, RunConfig, override
from engine.data.records import open_records
from engine.data.sample import ensure_sample
from engine.durable import write_file, writing
from engine.feeds.build import make_feed, make_order, open_for
from engine.host import keep_large_blocks
from engine.late_dynamo import import_late
from engine.meters import host_peak_rss_gib
from engine.report import environment, write_json
from engine.train.session import check_batch
from engine.typed import typed
from tools.report.rows import number

FEEDS = (
    "resident", "dali", "stream", "resident augmented", "dali augmented", "loader_batched", "loader"
)  # fmt: skip
DISTORTION = AugmentConfig(shift_pixels=2, rotate_degrees=10, shear_degrees=5, scale_fraction=0.1)
Epoch = Callable[[int], Iterable[Any]]
"""Something of each batch of an epoch that is as long as the batch."""
Opened = tuple[Epoch, str, Callable[[], object]]
"""The epochs, the order's name, and what closes the feed."""
Open = Callable[[str, Path, int], Opened]
"""Opens a feed by its name, for a record directory and a batch size."""


@dataclass(frozen=True, kw_only=True)
class FeedRate:
    """What a feed carries, as the median, lowest and highest of passes, and what it takes."""

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


def measure_all(
    records: Path,
    batch_size: int,
    seconds: float,
    *,
    names: Sequence[str],
    module: str = "tools.measure.feeds",
) -> list[FeedRate]:
    """What each of `names` carries; `module` measures each for about `seconds`."""
    rows = []
    for name in names:
        command = [sys.executable, "-m", module, name, str(records), str(batch_size), str(seconds)]
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

    records = data or ensure_sample()
    check_batch(RunConfig(global_batch=batch_size), open_records(records, in_memory=False), 1)
    frame = pd.DataFrame(map(asdict, measure_all(records, batch_size, seconds, names=FEEDS)))
    num_threads = torch.get_num_threads()
    facts = environment(num_threads=num_threads, allocator="keep_large_blocks", gpu={})
    rows = frame.to_dict("records")
    tree = {"environment": asdict(facts), "batch_size": batch_size, "feeds": rows}
    with writing(out):
        out.mkdir(parents=True, exist_ok=True)
        for file in (out / "feeds.json", *([json_file] if json_file else [])):
            write_json(tree, file)
        write_file(out / "feeds.png", _chart(frame, batch_size))
    columns = ["name", "samples_per_s", "order", "first_batch_s", "peak_mib", "cpu_s_per_million"]
    table = frame[columns].to_string(index=False, float_format=number)
    return f"{table}\nwritten: {out / 'feeds.json'}, {out / 'feeds.png'}"


def _chart(frame: Any, batch_size: int) -> bytes:
    """The feeds' rates as a PNG."""
    from tools.report import charts

    rates = frame["samples_per_s"]
    xlabel = f"samples/s, batch {batch_size}: median, lowest and highest epoch"
    spread = frame[["low", "high"]].sub(rates, axis=0).abs().to_numpy().T
    bars = partial(charts.bars, frame["name"], rates, [*map(number, rates)], xlabel, spread)
    return charts.draw("feeds", bars).png


def measure(open_feed: Open, name: str, records: Path, batch_size: int, seconds: float) -> FeedRate:
    """Throughput over passes after one that warms up, time to the first batch, memory, CPU time."""
    keep_large_blocks()
    before_gib = host_peak_rss_gib()
    start = time.perf_counter()
    epoch, order, close = open_feed(name, records, batch_size)
    batches = iter(epoch(0))
    next(batches)
    first_batch_s = time.perf_counter() - start
    warmed = _pass(batches, seconds / 2)[0]
    start_cpu_s = time.process_time()
    seen, rates = _passes(epoch, seconds)
    cpu_s = time.process_time() - start_cpu_s
    close()
    children = resource.getrusage(resource.RUSAGE_CHILDREN)  # over all passes, the first included
    cpu_s += (children.ru_utime + children.ru_stime) * seen / (seen + warmed)
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
        cpu_s_per_million=cpu_s / seen * 1e6,
    )


def _passes(epoch: Epoch, seconds: float) -> tuple[int, list[float]]:
    """(samples, the rate of each pass) of epochs from number 1 on, in about `seconds`."""
    rates: list[float] = []
    counted = 0
    deadline = time.perf_counter() + seconds
    while not rates or time.perf_counter() < deadline:
        left_s = max(deadline - time.perf_counter(), 0.1)
        seen, took_s = _pass(epoch(1 + len(rates)), left_s)
        rates.append(seen / took_s)
        counted += seen
    return counted, rates


def _pass(batches: Iterable[Any], seconds: float) -> tuple[int, float]:
    """(samples, seconds) of an epoch, or of what part of it fits into `seconds`."""
    start = time.perf_counter()
    seen = 0
    for batch in batches:
        seen += len(batch)
        if time.perf_counter() - start > seconds:
            break
    return seen, time.perf_counter() - start


def open_feed(name: str, records: Path, batch_size: int) -> Opened:
    """One of FEEDS."""
    kind, _, augmented = name.partition(" ")
    order_name = "blocked" if kind == "stream" else "exact"
    settings = {"data.feed": kind, "data.order": order_name, "global_batch": batch_size}
    config = override(RunConfig(), settings, name)
    opened = open_for(config.data, records)
    train = opened.split("train")
    order = make_order(config, train, rank=0, world_size=1)
    if augmented:
        config = replace(config, augment=DISTORTION)
    feed = make_feed(config, train, order, len(opened.classes), torch.device("cpu"))
    return (
        lambda epoch: (batch.id_B for batch in feed.batches(epoch)),
        config.data.order,
        feed.close,
    )


def main(open_feed: Open) -> None:
    """Measure as the command line says, and print JSON."""
    import_late()
    name, records, batch_size, seconds = sys.argv[1:]
    found = measure(open_feed, name, Path(records), int(batch_size), float(seconds))
    print(json.dumps(asdict(found)))


if __name__ == "__main__":
    main(open_feed)
