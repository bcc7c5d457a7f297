"""The command end to end, in real processes: alone, under torchrun, resumed, refused."""

import json
import shutil
from pathlib import Path
from subprocess import CompletedProcess
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load_file

from engine.config import RunConfig
from engine.data.records import Records
from engine.errors import UserError
from engine.train.session import check_batch
from tests.conftest import Command, assert_refused

SHORT = ("--epochs", 3, "--batch-size", 32, "--device", "cpu")


def report(run: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((run / "report.json").read_text())
    return found


def train(command: Command, *flags: object, **environment: str) -> CompletedProcess[str]:
    return command("python", "-m", "engine.run", *flags, **environment)


def metrics(run: Path) -> list[dict[str, Any]]:
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [
        {k: v for k, v in line.items() if k not in ("train_s", "samples_per_s")} for line in lines
    ]


@pytest.fixture(scope="module")
def alone(small_dir: Path, command: Command, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An uninterrupted run of three epochs."""
    out = tmp_path_factory.mktemp("runs") / "alone"
    done = train(command, "--amp", "--data", small_dir, "--out", out, *SHORT)
    assert done.returncode == 0, done.stderr
    assert "Traceback" not in done.stderr and "Warning" not in done.stderr, done.stderr
    return out


def test_the_literal_command_on_the_sample(command: Command, tmp_path: Path) -> None:
    cache = str(tmp_path / "cache")
    flags = ("--amp", "--cuda-graphs", "--epochs", 1, "--out", tmp_path / "out")
    done = command("torchrun", "-m", "engine.run", *flags, XDG_CACHE_HOME=cache)
    assert done.returncode == 0, done.stderr
    assert "packing the sample of 128 typefaces" in done.stdout
    found = report(tmp_path / "out")
    assert found["num_parameters"] == 432_478 and found["num_train_samples"] == 8460
    assert found["requested"]["cuda_graphs"] is True
    if found["environment"]["gpu_name"] is None:
        assert found["effective"]["cuda_graphs"] is False
        assert "CUDA graphs are not used: there is no GPU" in done.stdout and found["notes"]
    assert found["test_accuracy_fraction"] > 0.3  # of 94 classes, after 16 steps
    again = command("tools/evaluate", tmp_path / "out", XDG_CACHE_HOME=cache)
    assert again.returncode == 0 and "packing" not in again.stdout
    assert f"{found['test_accuracy_fraction']:.2%}".replace("%", " %") in again.stdout


def test_a_run_leaves_its_files(alone: Path) -> None:
    assert sorted(p.name for p in alone.iterdir()) == [
        "checkpoints",
        "config.toml",
        "metrics.jsonl",
        "model.safetensors",
        "report.json",
    ]
    assert [m["epoch"] for m in metrics(alone)] == [1, 2, 3]
    found = report(alone)
    assert (
        found["num_epochs"] == 3 and found["train_s"] > 0 and 0 <= found["data_wait_fraction"] < 1
    )
    assert (
        found["val_accuracy_fraction"]
        == max(m["val_accuracy_fraction"] for m in metrics(alone))
        > 0.5
    )


def test_a_resumed_run_ends_bit_identical(
    alone: Path, small_dir: Path, command: Command, tmp_path: Path
) -> None:
    shutil.copytree(alone, tmp_path / "run")
    for name in ("report.json", "model.safetensors"):
        (tmp_path / "run" / name).unlink()
    shutil.rmtree(tmp_path / "run" / "checkpoints" / "step-000000021")
    done = train(command, "--resume", tmp_path / "run", "--device", "cpu")
    assert done.returncode == 0 and "resumed after epoch 2 of 3" in done.stdout, done.stderr
    assert metrics(tmp_path / "run") == metrics(alone)
    resumed, whole = (load_file(run / "model.safetensors") for run in (tmp_path / "run", alone))
    assert all(np.array_equal(resumed[name], whole[name]) for name in whole)
    assert report(tmp_path / "run")["test_loss"] == report(alone)["test_loss"]


@pytest.mark.parametrize("damage", ["bit", "half"])
def test_a_damaged_checkpoint_is_skipped_and_named(
    damage: str, alone: Path, command: Command, tmp_path: Path
) -> None:
    shutil.copytree(alone, tmp_path / "run")
    (tmp_path / "run" / "model.safetensors").unlink()  # as if stopped before its end
    newest = tmp_path / "run" / "checkpoints" / "step-000000021"
    data = (newest / "model.safetensors").read_bytes()
    if damage == "bit":
        (newest / "model.safetensors").write_bytes(
            data[:5000] + bytes([data[5000] ^ 1]) + data[5001:]
        )
    else:
        (newest / "optim.safetensors").unlink()
    done = train(command, "--resume", tmp_path / "run", "--device", "cpu")
    assert done.returncode == 0, done.stderr
    assert (
        "note: step-000000021 was skipped" in done.stdout and "resumed after epoch 2" in done.stdout
    )
    assert metrics(tmp_path / "run") == metrics(alone)


def test_two_ranks_train_the_same(
    alone: Path, small_dir: Path, command: Command, tmp_path: Path
) -> None:
    out = tmp_path / "two"
    done = command(
        "torchrun", "--standalone", "--nproc-per-node=2", "-m", "engine.run",
        "--amp", "--cuda-graphs", "--data", small_dir, "--out", out,
        "--epochs", 3, "--batch-size", 16, "--device", "cpu",
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("epoch   1/3") == 1
    found = report(out)
    assert (
        found["num_ranks"] == 2
        and found["config"]["global_batch"] == 32
        and found["effective"]["feed"] == "resident"
    )
    for got, wanted in zip(metrics(out), metrics(alone), strict=True):
        assert got["train_loss"] == pytest.approx(wanted["train_loss"], rel=0.05)
        assert got["step"] == wanted["step"]


def test_every_feed_trains_bit_identically(
    alone: Path, small_dir: Path, command: Command, tmp_path: Path
) -> None:
    for feed in ("dali", "loader"):
        out = tmp_path / feed
        flags = ("--amp", "--data", small_dir, "--out", out, "--feed", feed)
        done = train(command, *flags, *SHORT)
        assert done.returncode == 0, done.stderr
        assert report(out)["effective"]["feed"] == feed
        assert metrics(out) == metrics(alone)


def test_stream_trains_as_resident_does_in_the_blocked_order(
    small_dir: Path, command: Command, tmp_path: Path
) -> None:
    settings = ("data.block_samples=20", "data.window_blocks=3", "augment.rotate_degrees=10")
    blocked = ("--order=blocked", *(f"--set={setting}" for setting in settings), *SHORT)
    for feed in ("resident", "stream"):
        flags = ("--data", small_dir, "--out", tmp_path / feed, "--feed", feed, *blocked)
        done = train(command, *flags)
        assert done.returncode == 0, done.stderr
    assert metrics(tmp_path / "stream") == metrics(tmp_path / "resident")
    assert report(tmp_path / "stream")["test_loss"] == report(tmp_path / "resident")["test_loss"]
    assert report(tmp_path / "stream")["order_reach_fraction"] == pytest.approx(60 / 224)


def test_a_target_ends_the_run(small_dir: Path, command: Command, tmp_path: Path) -> None:
    flags = ("--epochs", 50, "--batch-size", 32, "--target-accuracy", 0.5)
    done = train(command, "--data", small_dir, "--out", tmp_path / "run", *flags)
    assert done.returncode == 0, done.stderr
    found = report(tmp_path / "run")
    assert found["num_epochs"] < 50 and found["val_accuracy_fraction"] >= 0.5
    assert found["time_to_target_s"] == found["train_s"]


def test_the_baseline_is_the_study(small_dir: Path, command: Command, tmp_path: Path) -> None:
    flags = ("--baseline", "--epochs", 1, "--data", small_dir)
    done = train(command, *flags, "--out", tmp_path / "run")
    assert done.returncode == 0, done.stderr
    found = report(tmp_path / "run")
    switches = {"precision": "fp32", "channels_last": False, "cuda_graphs": False, "feed": "loader"}
    assert found["effective"].items() >= switches.items()
    assert found["config"]["global_batch"] == 64 and found["config"]["optim"]["name"] == "adam"


def test_records_without_a_split_train_without_evaluation(
    small_csv: Path, command: Command, tmp_path: Path
) -> None:
    command("tools/pack_tmnist", small_csv, tmp_path / "all", "--split=none")
    flags = ("--epochs", 1, "--batch-size", 32, "--data", tmp_path / "all")
    done = train(command, *flags, "--out", tmp_path / "run")
    assert done.returncode == 0, done.stderr
    assert report(tmp_path / "run")["test_accuracy_fraction"] is None


def test_help_needs_no_torch(command: Command) -> None:
    code = (
        "import sys, engine.run as r\n"
        "try: r.main(['--help'])\n"
        "except SystemExit: print('torch' in sys.modules)"
    )
    done = command("python", "-c", code)
    assert "--cuda-graphs" in done.stdout and done.stdout.strip().endswith("False")


@pytest.mark.parametrize(
    ("flags", "texts"),
    [
        (["--data", "nowhere"], ["nowhere", "tools/pack_tmnist"]),
        (["--set", "optim.lr=1"], ["optim.lr", "unknown setting"]),
        (["--config", "nowhere.toml"], ["nowhere.toml"]),
        (
            ["--data", "{small}", "--batch-size", 1000],
            ["larger than the train split", "at most 224"],
        ),
        (["--resume", "{tmp}"], ["config.toml"]),
        (["--device", "cuda"], ["no GPU"]),
    ],
)
def test_bad_input_is_one_line_and_leaves_nothing(
    flags: list[Any], texts: list[str], small_dir: Path, command: Command, tmp_path: Path
) -> None:
    if "cuda" in flags and __import__("torch").cuda.is_available():
        pytest.skip("there is a GPU here, so --device cuda is no bad input")
    flags = [str(flag).format(small=small_dir, tmp=tmp_path) for flag in flags]
    out = [] if "--resume" in flags else ["--out", tmp_path / "out"]
    assert_refused(train(command, *flags, *out), *texts)
    assert list(tmp_path.iterdir()) == []


def test_an_earlier_run_is_never_overwritten(
    alone: Path, small_dir: Path, command: Command
) -> None:
    before = (alone / "report.json").read_bytes()
    done = train(command, "--data", small_dir, "--out", alone, *SHORT)
    assert_refused(done, "is not empty", "--resume")
    assert (alone / "report.json").read_bytes() == before


def test_a_run_is_resumed_only_as_what_it_was(
    alone: Path, small_csv: Path, command: Command, tmp_path: Path
) -> None:
    shutil.copytree(alone, tmp_path / "run")
    run = ("--resume", tmp_path / "run", "--device", "cpu")
    assert_refused(train(command, *run, "--seed", 1), "seed was 42 and is 1")
    command("tools/pack_tmnist", small_csv, tmp_path / "other", "--seed", 1)
    more = ("--epochs", 4, "--data", tmp_path / "other")
    assert_refused(train(command, *run, *more), "was trained on records")


@pytest.mark.slow
def test_under_torchrun_one_rank_speaks_and_all_exit_2(command: Command, tmp_path: Path) -> None:
    torchrun = ("torchrun", "--standalone", "--nproc-per-node=2", "-m", "engine.run")
    done = command(*torchrun, "--data", "nowhere", "--out", tmp_path / "o")
    assert done.returncode == 1  # torchrun's own
    assert done.stderr.count("nowhere: no such record directory") == 1
    assert "exitcode  : 2" in done.stderr and list(tmp_path.iterdir()) == []


def test_ranks_that_do_not_divide_the_batch_are_refused(small: Records) -> None:
    with pytest.raises(UserError, match="33 cannot be divided by 2 ranks; give --batch-size"):
        check_batch(RunConfig(global_batch=33), small, 2)


def test_places_that_cannot_be_written_are_named(
    small_dir: Path, command: Command, tmp_path: Path
) -> None:
    done = train(command, "--data", small_dir, *SHORT, "--out", "/proc/no")
    assert_refused(done, "/proc/no: cannot be written")
    done = train(command, "--device", "cpu", "--out", tmp_path / "out", XDG_CACHE_HOME="/proc/no")
    assert_refused(done, "/proc/no/tmnist-engine")
    assert list(tmp_path.iterdir()) == []
