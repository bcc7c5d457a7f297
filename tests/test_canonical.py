"""--canonical: one hash of weights and optimiser, one log, on every number of ranks.

By the real command, alone and under torchrun. One rank alone is let take two threads, which it must
not use. Four ranks, other switches, and runs that are stopped and resumed: tests/reliability.
"""

import hashlib
import json
from pathlib import Path
from typing import Any

import pytest
import torch

from engine.config import RunConfig, override
from engine.data.records import Records
from engine.errors import UserError
from engine.train.folder import checkpoints
from engine.train.session import Session, check_batch, evaluate, open_session
from engine.world import World
from tests.conftest import child

SHARDS = 4
BATCH = 32
EPOCHS = 2


def line(records: Path, out: Path, num_ranks: int) -> list[str]:
    """A run of 14 steps; alone, or under torchrun with several ranks."""
    alone = ["python", "-m", "engine.run"]
    ranks = ["torchrun", "--standalone", f"--nproc-per-node={num_ranks}", "-m", "engine.run"]
    words = ["--data", records, "--batch-size", BATCH // num_ranks, "--epochs", EPOCHS]
    words += ["--device", "cpu", "--canonical", SHARDS]
    return [*(alone if num_ranks == 1 else ranks), *map(str, [*words, "--out", out])]


def train(records: Path, out: Path, num_ranks: int) -> str:
    """Train in processes of their own; what was printed."""
    threads = "2" if num_ranks == 1 else "1"
    done = child(line(records, out, num_ranks), {"OMP_NUM_THREADS": threads})
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


@pytest.mark.slow
def test_two_ranks_train_the_same_bits(tmp_path: Path, tiny_dir: Path) -> None:
    alone, run = tmp_path / "alone", tmp_path / "run"
    assert "note: --canonical computes with one thread per rank" in train(tiny_dir, alone, 1)
    train(tiny_dir, run, 2)
    found, wanted = metrics(run), metrics(alone)
    assert found == wanted and len(found) == EPOCHS
    assert found[-1]["train_loss"] < found[0]["train_loss"]
    assert state_hash(run) == state_hash(alone)


def opened(records: Records, world: World, shards: int) -> Session:
    settings = {"global_batch": BATCH, "step.canonical": shards, "data.feed": "resident"}
    return open_session(override(RunConfig(), settings, "test"), records, world)


def test_it_is_the_mean_of_the_shards_gradients(tiny: Records, world: World) -> None:
    """Not only alike everywhere, but right: as one batch gives it, but for rounding."""
    found = []
    for shards in (0, SHARDS):
        session = opened(tiny, world, shards)
        next(session.step.train_epoch(session.feed, 0))
        log = session.step.read_training()
        gradients = [p.grad for p in session.step.model.parameters() if p.grad is not None]
        norm = torch.linalg.vector_norm(torch.cat([g.flatten() for g in gradients]))
        found.append((log.loss, log.num_correct, norm.item(), *evaluate(session, "val")))
        session.close()
    assert found[1] == pytest.approx(found[0], rel=1e-4)


def test_threads_are_given_back(tiny: Records, world: World) -> None:
    before = torch.get_num_threads()
    torch.set_num_threads(3)
    try:
        session = opened(tiny, world, SHARDS)
        assert torch.get_num_threads() == 1 and session.environment.num_threads == 1
        session.close()
        assert torch.get_num_threads() == 3
    finally:
        torch.set_num_threads(before)


def test_what_cannot_be_divided_is_refused_with_what_can(tiny: Records) -> None:
    config = override(RunConfig(), {"global_batch": 24, "step.canonical": 4}, "test")
    for num_ranks in (1, 2, 4):
        check_batch(config, tiny, num_ranks)
    with pytest.raises(UserError, match="cannot be divided by 3 ranks; start 1, 2 or 4 ranks"):
        check_batch(config, tiny, 3)
    config = override(config, {"step.canonical": 16}, "test")
    with pytest.raises(UserError, match="into 16 shards; give --canonical 2, 4, 6, 8, 12 or 24,"):
        check_batch(config, tiny, 2)
    with pytest.raises(UserError, match="leave step.accumulate at 1, or step.canonical at 0"):
        override(config, {"step.accumulate": 2}, "test")
