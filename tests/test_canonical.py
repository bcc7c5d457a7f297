"""--canonical: one hash of weights and optimiser, one log, on every number of ranks.

By the real command: alone and under torchrun, stopped and resumed. One rank alone is let take two
threads, which it must not use.
"""

import hashlib
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch

from engine.config import RunConfig, override
from engine.data.records import Records
from engine.data.sample import ensure_sample
from engine.errors import UserError
from engine.host import ROOT
from engine.train.folder import checkpoints
from engine.train.session import Session, check_batch, evaluate, open_session
from engine.world import World, has_fast_bf16
from tests.conftest import assert_refused, child

SHARDS = 4
BATCH = 32
EPOCHS = 4
RANKS = (1, 2, 4)
BF16 = "bf16" if has_fast_bf16(torch.device("cpu")) else ""


def line(records: Path, out: Path, num_ranks: int, *flags: object) -> list[str]:
    """A run of 28 steps; alone, or under torchrun with several ranks."""
    alone = ["python", "-m", "engine.run"]
    ranks = ["torchrun", "--standalone", f"--nproc-per-node={num_ranks}", "-m", "engine.run"]
    words = ["--data", records, "--batch-size", BATCH // num_ranks, "--epochs", EPOCHS]
    words += ["--device", "cpu", "--canonical", SHARDS, *flags]
    where = [] if "--resume" in flags else ["--out", out]
    return [*(alone if num_ranks == 1 else ranks), *map(str, [*words, *where])]


def train(records: Path, out: Path, num_ranks: int, *flags: object) -> str:
    """Train in processes of their own; what was printed."""
    threads = "2" if num_ranks == 1 else "1"
    done = child(line(records, out, num_ranks, *flags), {"OMP_NUM_THREADS": threads})
    assert done.returncode == 0, done.stderr
    return done.stdout


def state_hash(run: Path) -> str:
    """Of the newest checkpoint's weights and optimiser, and its weights once more."""
    newest = checkpoints(run)[0]
    files = (newest / "model.safetensors", newest / "optim.safetensors", run / "model.safetensors")
    return hashlib.sha256(b"".join(file.read_bytes() for file in files)).hexdigest()


def metrics(run: Path) -> list[dict[str, Any]]:
    """The lines of metrics.jsonl but for their times."""
    lines = [json.loads(text) for text in (run / "metrics.jsonl").read_text().splitlines()]
    times = {"train_s", "samples_per_s"}
    return [{key: line[key] for key in line.keys() - times} for line in lines]


@pytest.fixture(scope="module")
def undisturbed(small_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One rank, from its beginning to its end."""
    out = tmp_path_factory.mktemp("canonical") / "run"
    assert "note: --canonical computes with one thread per rank" in train(small_dir, out, 1)
    return out


@pytest.mark.parametrize("num_ranks", RANKS[1:])
def test_every_number_of_ranks_trains_the_same_bits(
    num_ranks: int, undisturbed: Path, small_dir: Path, tmp_path: Path
) -> None:
    train(small_dir, tmp_path / "run", num_ranks)
    found, wanted = metrics(tmp_path / "run"), metrics(undisturbed)
    assert found == wanted and len(found) == EPOCHS
    assert found[-1]["train_loss"] < found[0]["train_loss"]
    assert state_hash(tmp_path / "run") == state_hash(undisturbed)


@pytest.mark.slow
@pytest.mark.parametrize(
    "flags",
    [
        ("--steps-per-launch", 3),
        pytest.param(
            ("--amp", BF16),
            marks=pytest.mark.skipif(not BF16, reason="this CPU has no bf16 instructions"),
        ),
        ("--no-channels-last", "--set", "optim.fused=false"),
        ("--set", "augment.rotate_degrees=10"),
    ],
    ids=str,
)
def test_so_it_does_with_other_switches(
    flags: tuple[object, ...], small_dir: Path, tmp_path: Path
) -> None:
    for num_ranks in RANKS:
        train(small_dir, tmp_path / str(num_ranks), num_ranks, *flags)
    assert len({state_hash(tmp_path / str(num_ranks)) for num_ranks in RANKS}) == 1
    first = metrics(tmp_path / "1")
    assert metrics(tmp_path / "2") == first and metrics(tmp_path / "4") == first


@pytest.mark.slow
def test_steps_per_launch_change_no_bit(undisturbed: Path, small_dir: Path, tmp_path: Path) -> None:
    train(small_dir, tmp_path / "run", 2, "--steps-per-launch", 3)
    assert state_hash(tmp_path / "run") == state_hash(undisturbed)
    assert metrics(tmp_path / "run") == metrics(undisturbed)


@pytest.mark.slow
def test_stopped_on_4_ranks_it_ends_on_1_with_the_same_bits(
    tmp_path: Path,
) -> None:
    """By SIGTERM in the middle of an epoch of the packaged sample's many steps."""
    sample = ensure_sample()
    flags = ("--epochs", 1, "--checkpoint-every", "1steps")
    train(sample, tmp_path / "undisturbed", 1, *flags)
    out = tmp_path / "stopped"
    words = [sys.executable, "-m", "torch.distributed.run", *line(sample, out, 4, *flags)[1:]]
    variables = os.environ | {"OMP_NUM_THREADS": "1"}
    with subprocess.Popen(words, cwd=ROOT, env=variables, stdout=subprocess.DEVNULL) as running:
        while not checkpoints(out):
            assert running.poll() is None
            time.sleep(0.01)
        running.send_signal(signal.SIGTERM)
    assert json.loads((out / "preempted").read_text())["step"] > 0
    assert "of the next" in train(sample, out, 1, *flags, "--resume", out)
    assert state_hash(out) == state_hash(tmp_path / "undisturbed")
    assert metrics(out) == metrics(tmp_path / "undisturbed")


def opened(records: Records, world: World, shards: int) -> Session:
    settings = {"global_batch": BATCH, "step.canonical": shards, "data.feed": "resident"}
    return open_session(override(RunConfig(), settings, "test"), records, world)


def test_it_is_the_mean_of_the_shards_gradients(small: Records, world: World) -> None:
    """Not only alike everywhere, but right: as one batch gives it, but for rounding."""
    found = []
    for shards in (0, SHARDS):
        session = opened(small, world, shards)
        next(session.step.train_epoch(session.feed, 0))
        log = session.step.read_training()
        gradients = [p.grad for p in session.step.model.parameters() if p.grad is not None]
        norm = torch.linalg.vector_norm(torch.cat([g.flatten() for g in gradients]))
        found.append((log.loss, log.num_correct, norm.item(), *evaluate(session, "val")))
        session.close()
    assert found[1] == pytest.approx(found[0], rel=1e-4)


def test_threads_are_given_back(small: Records, world: World) -> None:
    before = torch.get_num_threads()
    torch.set_num_threads(3)
    try:
        session = opened(small, world, SHARDS)
        assert torch.get_num_threads() == 1 and session.environment.num_threads == 1
        session.close()
        assert torch.get_num_threads() == 3
    finally:
        torch.set_num_threads(before)


def test_what_cannot_be_divided_is_refused_with_what_can(small: Records) -> None:
    config = override(RunConfig(), {"global_batch": 24, "step.canonical": 4}, "test")
    for num_ranks in (1, 2, 4):
        check_batch(config, small, num_ranks)
    with pytest.raises(UserError, match="cannot be divided by 3 ranks; start 1, 2 or 4 ranks"):
        check_batch(config, small, 3)
    config = override(config, {"step.canonical": 16}, "test")
    with pytest.raises(UserError, match="into 16 shards; give --canonical 2, 4, 6, 8, 12 or 24,"):
        check_batch(config, small, 2)
    with pytest.raises(UserError, match="leave step.accumulate at 1, or step.canonical at 0"):
        override(config, {"step.accumulate": 2}, "test")


@pytest.mark.slow
def test_a_run_goes_on_with_its_own_number_of_shards(small_dir: Path, tmp_path: Path) -> None:
    train(small_dir, tmp_path / "run", 1, "--epochs", 1)
    words = line(small_dir, tmp_path / "run", 1, "--canonical", 2, "--resume", tmp_path / "run")
    done = child(words, {})
    assert_refused(done, "step.canonical was 4 and is 2")
