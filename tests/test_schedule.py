"""The batch's schedule: decisions as a table, and runs whose batch changes, to the bit."""

import json
import signal
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from engine.config import OptimConfig, RunConfig, override
from engine.config_text import to_toml
from engine.data.records import Records
from engine.errors import UserError
from engine.report import read_report
from engine.stop import STOP
from engine.train.folder import checkpoints, manifest_of
from engine.train.parts import Handover
from engine.train.schedule import (
    Timing,
    check_schedule,
    choose_batch,
    neighbours,
    part_config,
    ramp_batch,
    ramp_of,
)
from engine.train.step import TrainStep
from engine.train.trainer import Trainer, fit
from engine.world import World
from tests.conftest import child
from tests.test_resume import CONFIG, assert_same, metrics, quiet, stop_after, trained
from tools.checks.order import check_order

__all__ = ["stop_after"]

RAMP = override(
    CONFIG,
    {
        "optim.batch_schedule": "ramp",
        "optim.batch_ramp": "16x1,32x1,8x1",
        "epochs": 4,
        "checkpoint_every": "3steps",
    },
    "test",
)
"""14, 7, 28 and 28 steps of the small records."""
NOISE = override(CONFIG, {"optim.batch_schedule": "noise", "optim.batch_min": 4}, "test")


def test_a_ramp_is_read_and_its_last_batch_goes_on() -> None:
    assert ramp_of("128x1, 256x1,512x2") == [(128, 1), (256, 1), (512, 2)]
    assert [ramp_batch(RAMP, epoch) for epoch in range(5)] == [16, 32, 8, 8, 8]
    for text in ("", "128", "128x0", "128x1,", "128x1;256x1"):
        with pytest.raises(UserError, match="write 128x1,256x1,512x2"):
            ramp_of(text)


@pytest.mark.parametrize(
    ("settings", "remedy"),
    [
        ({"epochs": 2}, "give more --epochs"),
        ({"optim.batch_schedule": "fixed"}, "is for --batch-schedule ramp"),
        (
            {"optim.batch_schedule": "noise", "optim.batch_ramp": "", "global_batch": 16},
            "set optim.batch_min",
        ),
    ],
)
def test_settings_that_do_not_fit_are_refused(settings: dict[str, Any], remedy: str) -> None:
    with pytest.raises(UserError, match=remedy):
        check_schedule(override(RAMP, settings, "test"))


def test_the_rate_goes_with_the_root_of_the_batch() -> None:
    config = RunConfig(global_batch=128, optim=OptimConfig(learning_rate=0.01))
    assert part_config(config, 512).optim.learning_rate == 0.02
    assert part_config(config, 32).optim.learning_rate == 0.005
    assert part_config(config, 128) == config
    assert neighbours(config, 128) == [64, 128, 256]
    assert neighbours(config, 32) == [32, 64] and neighbours(config, 4096) == [2048, 4096]


@pytest.mark.parametrize(
    ("critical", "step_ms", "wanted"),
    [
        (None, (1.0, 1.0, 1.0), 128),  # nothing is known
        (1000.0, (1.0, 1.0, 1.0), 256),  # steps of any size take the same: fewer of them
        (1000.0, (0.5, 1.0, 2.0), 64),  # they take as long as they are large: smaller ones
        (1.0, (1.0, 1.0, 1.0), 128),  # larger ones save no steps
        (1.0, (0.96, 1.0, 1.0), 128),  # less than 5 %
        (1.0, (0.9, 1.0, 1.0), 64),
        (384.0, (1.0, 1.0, 1.5), 256),  # (1 + 1.5) x 1.5 < 4, and (1 + 6) > 4
        (384.0, (1.0, 1.0, 1.55), 128),  # 3 % less
        (1e6, (1.0, 1.0, None), 128),  # the larger one does not fit
    ],
)
def test_decisions(critical: float | None, step_ms: tuple[float | None, ...], wanted: int) -> None:
    batches = zip((64, 128, 256), step_ms, strict=True)
    timings = [Timing(global_batch=b, step_s=ms / 1000) for b, ms in batches if ms]
    assert choose_batch(128, critical, timings) == wanted


@pytest.fixture(scope="module")
def ramp(tiny: Records, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The run that nobody disturbs."""
    import torch

    world = World(rank=0, size=1, device=torch.device("cpu"), stream=None)
    return trained(tiny, world, tmp_path_factory.mktemp("ramp"), RAMP)


def test_a_ramp_trains_each_epoch_with_its_batch(ramp: Path) -> None:
    report = read_report(ramp)
    assert [each.global_batch for each in report.batches] == [16, 32, 8, 8]
    assert [each.num_steps for each in report.batches] == [14, 7, 28, 28]
    assert [line["global_batch"] for line in metrics(ramp)] == [16, 32, 8, 8]
    assert [line["step"] for line in metrics(ramp)] == [14, 21, 49, 77]
    segments = [(each.first_step, each.num_steps, each.global_batch) for each in report.segments]
    assert segments == [(0, 14, 16), (14, 7, 32), (21, 56, 8)]
    assert report.num_steps == 77 and report.config.global_batch == 16
    assert report.batches[1].learning_rate == pytest.approx(0.01 * 2**0.5)


@pytest.mark.parametrize("num_steps", [14, 17, 24])
def test_a_run_stopped_in_a_ramp_goes_on_to_the_same_end(
    num_steps: int,
    tiny: Records,
    world: World,
    ramp: Path,
    stop_after: Any,
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
) -> None:
    """At the end of a part, and in the middle of the second and of the third."""
    stop_after(num_steps)
    run = trained(tiny, world, tmp_path / "run", RAMP)
    position = manifest_of(checkpoints(run)[0]).position
    assert position.number == num_steps and not (run / "model.safetensors").exists()
    assert position.global_batch == (8 if num_steps == 24 else 32)
    monkeypatch.undo()
    monkeypatch.setattr(STOP, "number", 0)
    trained(tiny, world, run, RAMP, resume=True)
    assert_same(run, ramp)
    batches = [each.global_batch for each in read_report(run).batches]
    assert batches == [16, 32, 8, 8]


def test_a_signal_between_two_parts_is_heard_by_the_next(
    tiny: Records, world: World, ramp: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """Nothing of the run may be taken for unsaved, and it says how to go on."""
    handover, run = Trainer.handover, tmp_path / "run"

    def signalled(*given: Any) -> Handover:
        STOP._handle(signal.SIGTERM, None)
        return handover(*given)

    monkeypatch.setattr(STOP, "number", 0)
    with monkeypatch.context() as patch:
        patch.setattr(Trainer, "handover", signalled)
        trained(tiny, world, run, RAMP)
    position = manifest_of(checkpoints(run)[0]).position
    assert (run / "preempted").exists() and position.number in (14, 15)
    monkeypatch.setattr(STOP, "number", 0)
    trained(tiny, world, run, RAMP, resume=True)
    assert_same(run, ramp)


def test_a_ramp_of_one_batch_is_a_fixed_run(tiny: Records, world: World, tmp_path: Path) -> None:
    same = {"optim.batch_schedule": "ramp", "optim.batch_ramp": "16x1", "epochs": 2}
    runs = [
        trained(tiny, world, tmp_path / name, override(CONFIG, settings, "test"))
        for name, settings in {"fixed": {"epochs": 2}, "ramp": same}.items()
    ]
    assert_same(*runs)


def test_every_sample_of_a_ramp_comes_as_its_batches_order_it(
    tiny: Records, tiny_dir: Path, world: World, tmp_path: Path
) -> None:
    run = trained(tiny, world, tmp_path / "run", override(RAMP, {"log_ids": True}, "test"))
    checked, faults = check_order(run, str(tiny_dir))
    assert checked == 4 * 224 and not faults


def test_a_disk_that_refuses_does_not_lose_a_part(
    tiny: Records, world: World, ramp: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """The state is handed over in memory."""

    def refuse(*arguments: Any) -> Path:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("engine.train.saver.write_checkpoint", refuse)
    assert metrics(trained(tiny, world, tmp_path / "run", RAMP)) == metrics(ramp)


def test_noise_decides_by_what_is_measured_and_a_run_that_goes_on_decides_the_same(
    tiny: Records,
    world: World,
    stop_after: Any,
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
) -> None:
    """Timings as if a step of any size took the same: the batch grows as long as it may."""
    times = monkeypatch.setattr
    times(TrainStep, "time_steps", lambda step, num: [1e-3] * num)
    config = override(NOISE, {"optim.batch_max": 64, "global_batch": 8, "epochs": 4}, "test")
    whole = trained(tiny, world, tmp_path / "whole", config)
    report = read_report(whole)
    batches = [each.global_batch for each in report.batches]
    assert batches[0] == 8 and max(batches) > 8
    for before, after in zip(report.batches, report.batches[1:], strict=False):
        known = [Timing(global_batch=b, step_s=1e-3) for b in (8, 16, 32, 64)]
        wanted = choose_batch(before.global_batch, before.critical_batch, known)
        assert after.global_batch == wanted
    last = metrics(whole)[-1]
    assert last["gradient_variance"] > 0
    assert last["gradient_variance"] == report.batches[-1].gradient_variance
    stop_after(33)
    run = trained(tiny, world, tmp_path / "run", config)
    assert manifest_of(checkpoints(run)[0]).position.step == 5
    monkeypatch.undo()
    monkeypatch.setattr(STOP, "number", 0)
    timed: list[int] = []
    real = TrainStep.time_steps
    times(TrainStep, "time_steps", lambda step, num: timed.append(num) or [1e-3] * num)
    fit(config, tiny, world, run, resume=True, say=quiet)
    assert real and len(timed) <= 1  # what the checkpoint knows is not timed again
    assert_same(run, whole)


def test_timing_steps_changes_nothing(tiny: Records, world: World) -> None:
    from engine.train.session import open_session

    session = open_session(replace(CONFIG, global_batch=32), tiny, world)
    before = {name: t.clone() for name, t in session.step.state.model_tensors().items()}
    found = session.step.time_steps(3)
    assert len(found) == 3 and min(found) > 0
    after = session.step.state.model_tensors()
    assert all((before[name] == after[name]).all() for name in before)
    assert not session.step.counter_21.any()
    session.close()


@pytest.mark.slow
def test_two_ranks_train_the_same_ramp(
    tiny: Records, tiny_dir: Path, world: World, tmp_path: Path
) -> None:
    """To the bit, with --canonical; the noise scale, too."""
    settings = {"step.canonical": 2, "step.noise_scale": True, "epochs": 3}
    config = override(RAMP, settings | {"optim.batch_ramp": "16x1,32x2"}, "test")
    alone = trained(tiny, world, tmp_path / "alone", config)
    (tmp_path / "config.toml").write_text(to_toml(config))
    line = ["torchrun", "--standalone", "--nproc-per-node=2", "-m", "engine.run", "--device=cpu"]
    line += [f"--config={tmp_path / 'config.toml'}", f"--data={tiny_dir}"]
    done = child([*line, f"--out={tmp_path / 'ranks'}"], {"OMP_NUM_THREADS": "1"})
    assert done.returncode == 0, done.stderr
    assert_same(tmp_path / "ranks", alone)
    assert metrics(alone)[-1]["gradient_variance"] > 0


def test_a_schedule_keeps_the_batch_that_its_rates_go_by(
    tiny_dir: Path, ramp: Path, command: Any
) -> None:
    flags = ("--resume", ramp, "--batch-size", 64, "--epochs", 5)
    done = command("python", "-m", "engine.run", "--data", tiny_dir, *flags)
    assert done.returncode == 2 and "global_batch was 16 and is 64" in done.stderr
    assert json.loads((ramp / "report.json").read_text())["status"] == "finished"
