"""Packing every kind of source that is no CSV, the disk's own speed and SHA-256's, in turn.

Each pack is a process of its own, timed from the call of `pack` on, so without the start of the
interpreter. The images are those of the packaged sample, again and again. The manifest holds each
file's SHA-256: without the CPU's own instructions for it, that alone may take longer than the disk.
Peak memory is that of the packing process; those that read PNGs for it share most of its pages.
"""

import hashlib
import os
import shutil
import tempfile
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import click
import numpy as np
import pyarrow as pa
from pyarrow import parquet

from engine.data.records import open_records
from engine.data.sample import ensure_sample
from engine.report import environment
from tests.bench import OUT
from tests.bench.pack import measure
from tests.glyph_files import Glyphs
from tools.report.rows import Row, claim, row, write_result

NUM_IMAGES = 300_000
NUM_PICTURES = 60_000
NUM_CLASSES = 10
WANTED_GB_PER_S = 1.0
WANTED_PICTURES_PER_S = 20_000
PACK = """
import json, re, sys, time
from pathlib import Path
from engine.data.pack import pack
start = time.perf_counter()
pack([Path(path) for path in sys.argv[1:-1]], Path(sys.argv[-1]))
seconds = time.perf_counter() - start
# Not ru_maxrss: a child inherits its parent's.
kib = re.search("VmHWM:[^0-9]*([0-9]+)", Path("/proc/self/status").read_text(encoding="ascii"))
print(json.dumps([seconds, int(kib[1]) / 2**10]))
"""


@dataclass(frozen=True)
class Made:
    """A source: what it is called, its files, and how many images it holds."""

    name: str
    paths: Sequence[Path]
    num_images: int


def drawn(num: int) -> Glyphs:
    """So many images of the sample, in ten classes."""
    train = open_records(ensure_sample()).split("train")
    row_N = np.arange(num) % len(train)
    return Glyphs(train.image_NHW[row_N], (train.label_N[row_N] % NUM_CLASSES).astype(np.uint8))


def made(folder: Path, num: int, num_pictures: int) -> list[Made]:
    """The same images in every layout; fewer as pictures."""
    images = drawn(num)
    for name in ("plain.parquet", "snappy.parquet"):
        kind = "none" if name.startswith("plain") else "snappy"
        parquet.write_table(
            images.table(), folder / name, compression=kind, use_dictionary=["label"]
        )
    lists = pa.FixedSizeListArray.from_arrays(pa.array(images.image_NHW.reshape(-1)), 784)
    table = pa.table({"image": lists, "label": images.label_N})
    with pa.ipc.new_file(folder / "lists.arrow", table.schema) as writer:
        writer.write_table(table, max_chunksize=10_000)
    sources = [
        Made("IDX", images.idx(folder), num),
        Made("IDX, gzip", images.idx(folder, "packed", packed=True), num),
        Made("npz", [images.npz(folder / "plain.npz")], num),
        Made("npz, deflated", [images.npz(folder / "deflated.npz", packed=True)], num),
        Made("Parquet, bytes", [folder / "plain.parquet"], num),
        Made("Parquet, bytes, snappy", [folder / "snappy.parquet"], num),
        Made("Arrow, lists", [folder / "lists.arrow"], num),
    ]
    fewer = Glyphs(images.image_NHW[:num_pictures], images.label_N[:num_pictures])
    return [*sources, Made("PNG", [fewer.png(folder / "tree")], min(num, num_pictures))]


def disk_s(path: Path, num_bytes: int) -> float:
    """Seconds that writing so many bytes, and fsync, take."""
    part = np.random.default_rng(0).bytes(2**23)
    start = time.perf_counter()
    with open(path, "wb") as file:
        for place in range(0, num_bytes, len(part)):
            file.write(part[: num_bytes - place])
        file.flush()
        os.fsync(file.fileno())
    took_s = time.perf_counter() - start
    path.unlink()
    return took_s


def sha256_s(num_bytes: int) -> float:
    """Seconds that the SHA-256 of so many bytes takes on all cores."""
    part = np.random.default_rng(0).bytes(2**23)
    parts = [part] * (num_bytes // len(part)) + [part[: num_bytes % len(part)]]
    with ThreadPoolExecutor(len(os.sched_getaffinity(0))) as pool:
        start = time.perf_counter()
        list(pool.map(lambda part: hashlib.sha256(part).digest(), parts))
        return time.perf_counter() - start


def bench(
    out: Path,
    rounds: int,
    num: int = NUM_IMAGES,
    num_pictures: int = NUM_PICTURES,
    num_warm: int = 1,
) -> None:
    """Measure and write OUT/cpu_sources.json.

    Args:
        num_warm: rounds before, which compile and do not count.
    """
    out.mkdir(parents=True, exist_ok=True)
    rates: dict[str, list[float]] = {}
    peaks: dict[str, list[float]] = {}
    disk: list[float] = []
    hashed: list[float] = []
    with tempfile.TemporaryDirectory(dir=out) as folder:
        sources = made(Path(folder), num, num_pictures)
        records = Path(folder) / "records"
        for number in range(rounds + num_warm):
            disk.append(num * 784 / 1e9 / disk_s(Path(folder) / "bytes", num * 784))
            hashed.append(num * 784 / 1e9 / sha256_s(num * 784))
            for source in sources:
                shutil.rmtree(records, ignore_errors=True)
                os.sync()
                took_s, peak_mib = measure(PACK, *source.paths, records, whole=False)
                if number >= num_warm:
                    rates.setdefault(source.name, []).append(source.num_images / took_s)
                    peaks.setdefault(source.name, []).append(peak_mib)
    rows, claims = [], []
    slowest = min(WANTED_GB_PER_S, float(np.median(disk[num_warm:])))
    for name, per_s in rates.items():
        if name == "PNG":
            rows.append(row("PNG, a file per image", per_s, "images/s"))
            claims.append(claim("PNG (images/s)", rows[-1].value, WANTED_PICTURES_PER_S))
            continue
        rows.append(row(f"{name}: pixels", [rate * 784 / 1e9 for rate in per_s], "GB/s"))
        if name in ("IDX", "npz", "Parquet, bytes"):
            over = rows[-1].value / slowest
            claims.append(claim(f"{name} over the disk, or over 1 GB/s (x)", over, 1.0))
    rows.append(row("writing and fsync of as many bytes", disk[num_warm:], "GB/s"))
    rows.append(row("SHA-256 of as many bytes, on all cores", hashed[num_warm:], "GB/s"))
    rows += [row(f"{name}: peak memory", mib, "MiB") for name, mib in peaks.items()]
    claims.append(claim("peak memory of any (MiB)", most(rows), 500, at_most=True))
    title = f"Packing {num:,} images of 28 x 28 ({num * 784 / 1e6:,.0f} MB) from every layout"
    facts = environment(num_threads=len(os.sched_getaffinity(0)), allocator="default", gpu={})
    write_result(out / "cpu_sources.json", title=title, environment=facts, rows=rows, claims=claims)


def most(rows: Sequence[Row]) -> float:
    """The largest peak."""
    return max(each.value for each in rows if each.unit == "MiB")


@click.command()
@OUT
@click.option("--rounds", default=5, show_default=True)
@click.option("--images", "num", default=NUM_IMAGES, show_default=True)
@click.option("--pictures", "num_pictures", default=NUM_PICTURES, show_default=True)
def main(out: Path, rounds: int, num: int, num_pictures: int) -> None:
    """Benchmark the sources of the packer."""
    bench(out, rounds, num, num_pictures)


if __name__ == "__main__":
    main()
