"""Every benchmark runs, tiny: figures are made by make bench, never here."""

import json
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest

from engine.config import RunConfig
from engine.data.sample import ensure_sample
from engine.errors import UserError
from tests.bench import (
    canonical,
    checkpoints,
    feeds,
    fp8,
    fsdp,
    fullsize,
    layers,
    loader,
    measuring,
    noise,
    pack,
    plan,
    precision,
    predict,
    ranks,
    report,
    serve,
    sources,
    startup,
    step,
    sweep,
    warp,
)
from tests.browser import CHROMIUM
from tests.conftest import FAST_PRECISION

pytestmark = pytest.mark.slow


def checked(file: Path) -> list[str]:
    result = json.loads(file.read_text())
    assert all(row["low"] <= row["value"] <= row["high"] for row in result["rows"])
    assert result["environment"]["commit"] and all(
        isinstance(claim["met"], bool) for claim in result["claims"]
    )
    return [claim["claim"] for claim in result["claims"]]


def test_pack(tmp_path: Path) -> None:
    pack.bench(tmp_path, csv=None, rounds=1, num_rows=15_000)
    assert "open_records (s)" in checked(tmp_path / "cpu_pack.json")
    assert [path.name for path in tmp_path.iterdir()] == ["cpu_pack.json"]


def test_sources(tmp_path: Path) -> None:
    sources.bench(tmp_path, rounds=1, num=3000, num_pictures=300, num_warm=0)
    assert checked(tmp_path / "cpu_sources.json") == [
        "IDX over the disk, or over 1 GB/s (x)",
        "npz over the disk, or over 1 GB/s (x)",
        "Parquet, bytes over the disk, or over 1 GB/s (x)",
        "PNG (images/s)",
        "peak memory of any (MiB)",
    ]
    assert [path.name for path in tmp_path.iterdir()] == ["cpu_sources.json"]


def test_predict(tmp_path: Path, small_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(predict, "ensure_sample", lambda: small_dir)
    monkeypatch.setattr(predict, "RECIPES", {"fast": RunConfig(global_batch=32, epochs=1)})
    predict.bench(tmp_path, rounds=1, num=100)
    assert checked(tmp_path / "cpu_predict.json") == [
        "100 PNGs in a folder (s)",
        "100 PNGs, each named (s)",
    ]
    assert [path.name for path in tmp_path.iterdir()] == ["cpu_predict.json"]


def test_startup(tmp_path: Path, small_dir: Path) -> None:
    flags = ("--data", small_dir, "--batch-size", 32)
    startup.bench(tmp_path, rounds=1, num_warm=0, flags=flags)
    assert checked(tmp_path / "cpu_startup.json") == ["the command's time as a part"]


@pytest.mark.long
def test_feeds(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(feeds, "FEEDS", ("stream", "dali augmented"))
    monkeypatch.setattr(feeds, "WANTED", {"stream": 1.0})
    feeds.bench(tmp_path, seconds=0.1, num_rows=3000)
    assert checked(tmp_path / "cpu_feeds.json") == [
        "stream (samples/s)",
        "training at batch 512 waits for stream (%)",
    ]


def test_loader(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(loader, "OTHERS", (loader.PLAIN,))
    loader.bench(tmp_path, rounds=1, seconds=0.1, num_rows=3000)
    assert checked(tmp_path / "cpu_loader.json") == [
        "engine.loader of the bare feed (%)",
        "engine.loader over TensorDataset (x)",
    ]


@pytest.mark.long
def test_warp(tmp_path: Path) -> None:
    warp.bench(tmp_path, rounds=1, seconds=0.1, num_rows=3000)
    assert checked(tmp_path / "cpu_warp.json") == [
        "resident augmented, compiled (samples/s)",
        "training at batch 512 waits, compiled (%)",
    ]


@pytest.mark.usefixtures("measured_here")
def test_step(tmp_path: Path, cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(cache))  # of the bare loop's process
    ensure_sample()  # which says so
    monkeypatch.setattr(step, "BATCH", 32)
    step.bench(tmp_path, rounds=1, num_steps=2)
    assert "fast step over eager fp32 NCHW (x)" in checked(tmp_path / "cpu_step.json")


@pytest.mark.usefixtures("measured_here")
@pytest.mark.long
def test_layers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(layers, "CASES", (("bf16", 32, "trained"),))
    layers.bench(tmp_path, rounds=1, num_steps=2)
    assert "bf16, batch 32, first layer trained: ratio (x)" in checked(tmp_path / "cpu_layers.json")


@pytest.mark.usefixtures("measured_here")
def test_ranks(tmp_path: Path, cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(cache))
    monkeypatch.setattr(ranks, "BATCH", 32)
    ranks.bench(tmp_path, pairs=1, num_steps=2)
    assert checked(tmp_path / "cpu_ranks.json") == ["efficiency of 2 ranks (%)"]


@pytest.mark.usefixtures("measured_here")
def test_canonical(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(canonical, "GLOBAL_BATCH", 32)
    monkeypatch.setattr(canonical, "RANKS", (1,))  # test_ranks starts several
    canonical.bench(tmp_path, rounds=1, num_steps=2)
    assert checked(tmp_path / "cpu_canonical.json") == []


@pytest.mark.long
def test_fsdp(tmp_path: Path, cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(cache))
    monkeypatch.setattr(fsdp, "NETWORKS", {"baseline": (32, 1, {"model.name": "baseline"})})
    fsdp.bench(tmp_path, rounds=1, num_steps=2)
    assert checked(tmp_path / "cpu_fsdp.json") == ["fsdp of ddp's samples/s, baseline (%)"]
    rows = json.loads((tmp_path / "cpu_fsdp.json").read_text())["rows"]
    kept = {row["name"]: row["value"] for row in rows if row["unit"] == "MB"}
    assert kept["baseline, global batch 32: fsdp, optimiser a rank"] == pytest.approx(
        kept["baseline, global batch 32: ddp, optimiser a rank"] / 2, rel=1e-3
    )


@pytest.mark.long
def test_plan(tmp_path: Path, cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With two nodes where this machine lets namespaces be made."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(cache))
    monkeypatch.setattr(plan, "BATCHES", (24,))
    monkeypatch.setattr(plan, "BETWEEN", 24)
    monkeypatch.setattr(plan, "SIZES_BYTES", (2**12, 2**16))
    monkeypatch.setattr(plan, "OTHER_BYTES", (2**14,))
    monkeypatch.setattr(plan, "RATES", {"1gbit": "128kb"})
    plan.bench(tmp_path, rounds=1, num_steps=2)
    claims = checked(tmp_path / "cpu_plan.json")
    here = [claim for claim in claims if claim.startswith("this machine: ")]
    nodes = [claim for claim in claims if claim.startswith("two nodes, 1gbit: ")]
    assert (len(here), len(nodes)) in ((3, 2), (3, 0)) and len(claims) == len(here + nodes)
    rows = json.loads((tmp_path / "cpu_plan.json").read_text())["rows"]
    values = {row["name"]: row["value"] for row in rows}
    published = [name for name in values if name.endswith("as published")]
    assert len(published) == 2 and values["1,024 ranks, ddp, counted: a step's collectives"] > 1.7


def test_checkpoints(tmp_path: Path, cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(cache))
    monkeypatch.setattr(checkpoints, "BATCH", 32)
    monkeypatch.setattr(checkpoints, "NUM_STEPS", 2)
    checkpoints.bench(tmp_path, rounds=2)
    assert "resuming adds to start-up (s)" in checked(tmp_path / "cpu_checkpoints.json")
    assert [path.name for path in tmp_path.iterdir()] == ["cpu_checkpoints.json"]


@pytest.mark.long
def test_sweep(tmp_path: Path, cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(cache))
    monkeypatch.setattr(sweep, "NUM", 2)
    sweep.bench(tmp_path, rounds=1, epochs=1)
    assert checked(tmp_path / "cpu_sweep.json") == [
        "2 processes one after another, time over members of one process (x)"
    ]


@pytest.mark.long
@pytest.mark.skipif(not CHROMIUM, reason="there is no Chromium here")
def test_serve(tmp_path: Path, cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(cache))
    serve.bench(tmp_path, rounds=1, epochs=2)
    assert checked(tmp_path / "cpu_serve.json") == [
        "with a page costs (%)",
        "with a page open in Chromium costs (%)",
        "Chromium's CPU time (%)",
    ]


def test_measuring(tmp_path: Path, cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(cache))
    monkeypatch.setattr(measuring, "BATCH", 32)
    measuring.bench(tmp_path, rounds=2, num_steps=4)
    assert checked(tmp_path / "cpu_measuring.json") == ["throughput that measuring costs (%)"]


def test_report(tmp_path: Path) -> None:
    report.bench(tmp_path, rounds=1)
    assert checked(tmp_path / "cpu_report.json") == ["whole command (s)", "report.html (MB)"]


@pytest.mark.skipif(FAST_PRECISION == "fp32", reason="this CPU has no bf16 instructions")
@pytest.mark.long
def test_precision(tmp_path: Path, small_dir: Path) -> None:
    precision.bench(tmp_path, small_dir, pairs=2, extra=("--epochs=1", "--batch-size=32"))
    assert checked(tmp_path / "cpu_precision.json") == [
        "the interval's end that is farther from 0 (points)"
    ]


@pytest.mark.skipif(FAST_PRECISION == "fp32", reason="this CPU has no bf16 instructions")
@pytest.mark.long
def test_fp8(tmp_path: Path, small_dir: Path) -> None:
    fp8.bench(tmp_path, small_dir, pairs=2, extra=("--epochs=1", "--batch-size=32"))
    result = json.loads((tmp_path / "cpu_fp8.json").read_text())
    assert result["title"].startswith("fp8 against bf16: 1 epoch on ")
    assert checked(tmp_path / "cpu_fp8.json") == [
        "the interval's end that is farther from 0 (points)"
    ]


@pytest.mark.long
def test_fullsize(tmp_path: Path, small_dir: Path) -> None:
    """With one seed, then with one more: what is trained already stays as it is."""
    plan = fullsize.Plan(small_dir, "networks", 1, ("--epochs=1", "--batch-size=32"))
    fullsize.bench(tmp_path, plan, tmp_path / "runs")
    trained = (tmp_path / "runs/networks/0-1/report.json").read_bytes()
    assert "training time" in (tmp_path / "cpu_networks.json").read_text()
    fullsize.bench(tmp_path, replace(plan, seeds=2, at_once=2), tmp_path / "runs")
    assert (tmp_path / "runs/networks/0-1/report.json").read_bytes() == trained
    assert "the best ensemble's test accuracy (%)" in checked(tmp_path / "cpu_networks.json")
    assert "training time" not in (tmp_path / "cpu_networks.json").read_text()


def test_runs_of_several_commits_are_no_one_figure(tmp_path: Path) -> None:
    one = SimpleNamespace(environment=SimpleNamespace(commit="a1"))
    other = SimpleNamespace(environment=SimpleNamespace(commit="b2"))
    fullsize._check_commits([one, one], tmp_path)  # type: ignore[list-item]
    with pytest.raises(UserError, match="holds runs of the commits a1, b2; figures are of one"):
        fullsize._check_commits([one, other], tmp_path)  # type: ignore[list-item]


def test_the_permutation_test_counts_the_ways_to_deal() -> None:
    """Against the definition: of 5 and 5, 2 of 252 ways are as far apart; equal means are no sign.

    1, 2 against 3, 4: of the six ways, {1, 2} and {3, 4} differ by 2, the others by less.
    """
    assert fullsize.permutation_p([1, 2, 3, 4, 5], [6, 7, 8, 9, 10]) == 2 / 252
    assert fullsize.permutation_p([1, 2], [3, 4]) == 2 / 6
    assert fullsize.permutation_p([1, 4], [2, 3]) == 1


@pytest.mark.long
def test_noise(tmp_path: Path, small_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(noise, "START", 32)
    noise.bench(tmp_path, noise.Sweep(small_dir, 0.3, 1, batches=(16, 64), epochs=12))
    claims = checked(tmp_path / "cpu_noise.json")
    assert claims[0].startswith("time of noise over the best fixed batch's")


def test_the_sweeps_fit() -> None:
    steps = [100 * (1 + 300 / batch) for batch in noise.BATCHES]
    assert noise.fitted(noise.BATCHES, steps) == pytest.approx((100, 300))
