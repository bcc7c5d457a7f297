"""A run goes on where it was stopped, to the bit; what may change on the way, and what may not."""

import errno
import json
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from engine.config import RunConfig, override
from engine.config_text import config_of, to_toml
from engine.data.records import Records
from engine.durable import Damaged, write_file
from engine.errors import UserError
from engine.heart import LEFT, TRAINING, WAITING, Beat, Seen, hung_ranks
from engine.host import ROOT
from engine.report import read_report
from engine.stop import STOP, Stopped
from engine.train import available, trainer
from engine.train.checkpoint import (
    FILES,
    checkpoint_tensors,
    load_checkpoint,
    prune,
    read_checkpoint,
    write_checkpoint,
)
from engine.train.folder import (
    Manifest,
    Position,
    checkpoint_path,
    checkpoints,
    finished_text,
    manifest_of,
)
from engine.train.journal import CHECKPOINTS, Journal
from engine.train.pulse import Cadence, Pulse
from engine.train.saver import Saver
from engine.train.session import Session, evaluate
from engine.train.step import TrainStep
from engine.train.trainer import fit
from engine.world import World
from tests.conftest import Command, assert_refused, child
from tests.test_step import losses, make_step

CONFIG = RunConfig(global_batch=16, epochs=3, seed=5, checkpoint_every="4steps,1epoch")
"""14 steps in each epoch of the tiny records."""


def quiet(line: str) -> None:
    pass


def trained(
    records: Records, world: World, out: Path, config: RunConfig = CONFIG, resume: bool = False
) -> Path:
    out.mkdir(exist_ok=True)
    fit(config, records, world, out, resume=resume, say=quiet)
    return out


@pytest.fixture(scope="module")
def whole(tiny: Records, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The run that nobody disturbs."""
    world = World(rank=0, size=1, device=torch.device("cpu"), stream=None)
    return trained(tiny, world, tmp_path_factory.mktemp("whole"))


@pytest.fixture
def stop_after(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Let a signal arrive while a step is trained."""
    monkeypatch.setattr(STOP, "number", 0)

    def arrange(num_steps: int, signals: tuple[int, ...] = (signal.SIGTERM,)) -> None:
        real, trained = TrainStep._launch, [0]

        def launch(step: Any, batch: Any, k: int) -> None:
            real(step, batch, k)
            trained[0] += k
            if trained[0] >= num_steps and not STOP.number:
                for number in signals:
                    STOP._handle(number, None)

        monkeypatch.setattr(TrainStep, "_launch", launch)
        monkeypatch.setattr(Pulse, "is_due", lambda self, step: True)

    return arrange


def metrics(run: Path) -> list[dict[str, Any]]:
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    timed = ("train_s", "samples_per_s")
    return [{key: value for key, value in line.items() if key not in timed} for line in lines]


def assert_same(run: Path, whole: Path) -> None:
    """Weights, optimiser, log and metrics are equal to the bit."""
    assert metrics(run) == metrics(whole)
    newest = [checkpoints(path)[0] for path in (run, whole)]
    assert newest[0].name == newest[1].name
    for name in FILES:
        got, wanted = (load_file(checkpoint / name) for checkpoint in newest)
        assert got.keys() == wanted.keys()
        assert all(torch.equal(got[key], wanted[key]) for key in wanted), name
    final = [load_file(path / "model.safetensors") for path in (run, whole)]
    assert all(torch.equal(final[0][key], final[1][key]) for key in final[1])


def test_evaluating_within_epochs_changes_no_bit_and_keeps_the_best(
    tiny: Records, world: World, whole: Path, tmp_path: Path
) -> None:
    config = override(CONFIG, {"evaluate_every": 5, "step.steps_per_launch": 2}, "")
    said: list[str] = []
    run = tmp_path / "run"
    run.mkdir()
    report, _ = fit(config, tiny, world, run, resume=False, say=said.append)
    assert_same(run, whole)
    steps = [int(line.split()[1]) for line in said if line.startswith("step ")]
    assert steps == [6, 10, 16, 20, 26, 30, 36, 40]  # where launches end; not at epochs' ends
    best = manifest_of(checkpoints(run)[0]).position.best_number
    assert best in (*steps, 14, 28, 42) and checkpoint_path(run, best).is_dir()
    assert report.num_steps == 42


@pytest.mark.slow
def test_ranks_killed_before_their_first_checkpoint_start_anew(
    tiny_dir: Path, tmp_path: Path
) -> None:
    words = ["--data", tiny_dir, "--batch-size", 16, "--epochs", 1, "--device", "cpu"]
    config = to_toml(override(RunConfig(), {"epochs": 1}, ""))
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "config.toml").write_text(config)  # all that a killed start may leave
    line = ["torchrun", "--standalone", "--nproc-per-node=2", "-m", "engine.run", *map(str, words)]
    done = child([*line, "--resume=auto", f"--out={tmp_path / 'run'}"], {"OMP_NUM_THREADS": "1"})
    assert done.returncode == 0, done.stderr
    assert "stopped before its first checkpoint; it starts at step 0" in done.stdout


def test_evaluating_within_epochs_is_off_the_clock(
    tiny: Records, world: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By a clock that goes on in evaluations alone."""
    now_s = [0.0]

    def timed(session: Session, split: str) -> tuple[float, float]:
        now_s[0] += 100
        return evaluate(session, split)

    monkeypatch.setattr(trainer, "evaluate", timed)
    monkeypatch.setattr(time, "perf_counter", lambda: now_s[0])
    config = override(CONFIG, {"evaluate_every": 2, "epochs": 1}, "")
    report = read_report(trained(tiny, world, tmp_path / "run", config))
    assert report.eval_s == 100 * 8  # 6 within the epoch, val at its end, test
    assert report.train_s == 0


def test_a_target_reached_within_an_epoch_ends_the_run_there(
    tiny: Records, world: World, tmp_path: Path
) -> None:
    config = override(CONFIG, {"evaluate_every": 4, "target_accuracy": 1e-6, "epochs": 2}, "")
    run = trained(tiny, world, tmp_path / "run", config)
    report = read_report(run)
    assert report.status == "finished" and report.num_epochs < 2
    assert report.num_steps % 4 == 0 and report.num_steps % 14
    assert report.time_to_target_s == pytest.approx(report.train_s, abs=0.05)
    assert report.train_s > 0 and report.eval_s > 0
    assert checkpoints(run)[0] == checkpoint_path(run, report.num_steps)
    assert "reached its target" in finished_text(run, config)


@pytest.mark.parametrize("num_steps", [1, 5, 13, 14, 15, 29])
@pytest.mark.parametrize("per_launch", [1, 4])
def test_a_stopped_run_goes_on_to_the_same_end(
    num_steps: int,
    per_launch: int,
    tiny: Records,
    world: World,
    whole: Path,
    stop_after: Any,
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
) -> None:
    """Within an epoch, at its last step, and at the first step of the next; then once more."""
    config = override(CONFIG, {"step.steps_per_launch": per_launch}, "")
    stop_after(num_steps)
    run = trained(tiny, world, tmp_path / "run", config)
    stopped_at = manifest_of(checkpoints(run)[0]).position
    assert stopped_at.num_steps < 42 and not (run / "model.safetensors").exists()
    report = json.loads((run / "report.json").read_text())
    assert report["status"] == "stopped" and report["num_steps"] == stopped_at.num_steps
    marker = json.loads((run / "preempted").read_text())
    assert marker == {
        "signal": "SIGTERM", "epoch": stopped_at.epoch, "step": stopped_at.step,
    }  # fmt: skip
    monkeypatch.undo()
    monkeypatch.setattr(STOP, "number", 0)
    trained(tiny, world, run, config, resume=True)
    assert_same(run, whole)
    report = json.loads((run / "report.json").read_text())
    parts = [(part["first_step"], part["num_steps"]) for part in report["segments"]]
    assert parts == [(0, stopped_at.num_steps), (stopped_at.num_steps, 42 - stopped_at.num_steps)]
    assert report["status"] == "finished" and not (run / "preempted").exists()


def test_fp16_goes_on_with_the_loss_scale_it_had(
    tiny: Records, world: World, stop_after: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """A CPU would take fp32 in its place; here the scaler doubles the scale at each third step,
    and halves it where a gradient overflows."""
    scaler = partial(torch.amp.GradScaler, init_scale=1024.0, growth_interval=3)
    rules = tuple(rule for rule in available.RULES if rule.__name__ != "_fp16")

    def allow_fp16() -> None:
        monkeypatch.setattr(available, "RULES", rules)
        monkeypatch.setattr(torch.amp, "GradScaler", scaler)

    config = override(CONFIG, {"step.precision": "fp16", "epochs": 1}, "")
    allow_fp16()
    whole = trained(tiny, world, tmp_path / "whole", config)
    stop_after(5)
    run = trained(tiny, world, tmp_path / "run", config)
    monkeypatch.undo()
    monkeypatch.setattr(STOP, "number", 0)
    allow_fp16()
    stopped, end = (manifest_of(checkpoints(folder)[0]).scaler for folder in (run, whole))
    assert stopped != end and 1024.0 not in (stopped["scale"], end["scale"]), "it moves"
    trained(tiny, world, run, config, resume=True)
    assert_same(run, whole)
    assert manifest_of(checkpoints(run)[0]).scaler == end


def test_a_run_without_a_checkpoint_starts_at_step_0(
    tiny: Records, world: World, whole: Path, tmp_path: Path
) -> None:
    (tmp_path / "run").mkdir()
    assert_same(trained(tiny, world, tmp_path / "run", resume=True), whole)


def test_more_epochs_have_the_schedule_that_they_have(
    tiny: Records, world: World, tmp_path: Path
) -> None:
    """A run of 1 epoch that goes on to 3: the rates of 3 epochs from there on, or those of 1."""
    short = replace(CONFIG, epochs=1)
    run = trained(tiny, world, tmp_path / "run", short)
    first = metrics(run)
    lines: list[str] = []
    fit(CONFIG, tiny, world, run, resume=True, say=lines.append)
    assert "note: epochs was 1 and is 3 from here on" in lines
    assert metrics(run)[:1] == first and len(metrics(run)) == 3
    kept = trained(tiny, world, tmp_path / "kept", short)
    with_schedule = replace(CONFIG, schedule_epochs=1)
    trained(tiny, world, kept, with_schedule, resume=True)
    last = [metrics(path)[-1]["train_loss"] for path in (run, kept)]
    assert last[0] != last[1]


def test_another_batch_comes_with_the_next_epoch(
    tiny: Records,
    world: World,
    whole: Path,
    stop_after: Any,
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
) -> None:
    stop_after(17)
    run = trained(tiny, world, tmp_path / "run")
    assert manifest_of(checkpoints(run)[0]).position.step == 3
    monkeypatch.undo()
    monkeypatch.setattr(STOP, "number", 0)
    lines: list[str] = []
    fit(replace(CONFIG, global_batch=8), tiny, world, run, resume=True, say=lines.append)
    assert "note: epoch 2 is finished with its global batch of 16 first" in lines
    assert "note: global_batch was 16 and is 8 from here on" in lines
    assert metrics(run)[:2] == metrics(whole)[:2]
    assert metrics(run)[2]["step"] == 2 * 14 + 28


def test_a_larger_batch_goes_on_from_its_own_checkpoints(
    tiny: Records, world: World, tmp_path: Path
) -> None:
    """Its epochs have fewer steps, and yet its checkpoints are the newer ones."""
    run = trained(tiny, world, tmp_path / "run", replace(CONFIG, epochs=2))
    assert checkpoints(run)[0].name == "step-000000028"
    larger = replace(CONFIG, global_batch=64, epochs=3)
    trained(tiny, world, run, larger, resume=True)
    position = manifest_of(checkpoints(run)[0]).position
    assert (position.epoch, position.num_steps, position.number) == (3, 9, 31)
    assert "left as it is" in finished_text(run, larger)
    trained(tiny, world, run, replace(larger, epochs=4), resume=True)
    assert [line["step"] for line in metrics(run)] == [14, 28, 31, 34]
    again = manifest_of(checkpoints(run)[0]).position
    assert (again.epoch, again.num_steps, again.number) == (4, 12, 34)


def test_a_damaged_newest_checkpoint_does_not_decide_which_batch_ends_the_epoch(
    tiny: Records,
    world: World,
    whole: Path,
    stop_after: Any,
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
) -> None:
    """It stands at an epoch's end, the one before it in the middle of an epoch."""
    stop_after(17)
    run = trained(tiny, world, tmp_path / "run")
    monkeypatch.undo()
    monkeypatch.setattr(STOP, "number", 0)
    trained(tiny, world, run, replace(CONFIG, epochs=2, checkpoint_every="1epoch"), resume=True)
    newest, before = checkpoints(run)[:2]
    assert [manifest_of(path).position.step for path in (newest, before)] == [0, 3]
    with open(newest / FILES[0], "r+b") as file:
        file.write(b"x")
    lines: list[str] = []
    fit(replace(CONFIG, global_batch=8), tiny, world, run, resume=True, say=lines.append)
    assert "note: epoch 2 is finished with its global batch of 16 first" in lines
    assert metrics(run)[:2] == metrics(whole)[:2]


def test_a_disk_that_refuses_the_log_of_ids_ends_nothing_else(
    tiny: Records, world: World, whole: Path, tmp_path: Path
) -> None:
    run = tmp_path / "run"
    (run / "ids").mkdir(parents=True)
    (run / "ids" / "epoch1-step0-rank0of1.bin").symlink_to("/dev/full")
    lines: list[str] = []
    config = override(CONFIG, {"log_ids": True}, "")
    fit(config, tiny, world, run, resume=False, say=lines.append)
    assert_same(run, whole)
    said = [line for line in lines if "No space left" in line]
    assert len(said) == 1 and "the log of ids ends here, training goes on" in said[0]
    names = sorted(path.name for path in (run / "ids").iterdir())
    assert names == ["epoch0-step0-rank0of1.bin", "epoch1-step0-rank0of1.bin"]


def test_a_full_disk_is_said_once_though_small_files_still_fit(tmp_path: Path) -> None:
    lines: list[str] = []
    journal = Journal(tmp_path, lines.append)
    full = OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
    for number in range(3):
        journal.refused(full, CHECKPOINTS)
        journal.attempt(lambda number=number: write_file(tmp_path / "small", bytes(number)))
    assert len(lines) == 1 and "No space left on device); training goes on" in lines[0]
    journal.accepted(CHECKPOINTS)
    journal.refused(full, CHECKPOINTS)
    assert len(lines) == 2


def test_what_another_training_would_change_is_named_at_once(
    tiny_dir: Path, whole: Path, command: Command, tmp_path: Path
) -> None:
    flags = ("--resume", whole, "--set", "optim.weight_decay=0.5", "--epochs", 4)
    done = command("python", "-m", "engine.run", "--data", tiny_dir, *flags)
    assert_refused(done, "optim.weight_decay was 0.01 and is 0.5", "start anew")
    done = command("python", "-m", "engine.run", "--resume", whole, "--baseline")
    assert_refused(done, "optim.name was adamw and is adam", "model.name was fast and is baseline")
    done = command("python", "-m", "engine.run", "--resume", "auto")
    assert_refused(done, "--resume auto: give --out too")
    done = command("python", "-m", "engine.run", "--checkpoint-every", "often")
    assert_refused(done, "'often' is no interval", "500steps, 30s or 1epoch")


def test_a_run_killed_before_its_report_is_written_ends_at_the_next_start(
    tiny: Records, world: World, whole: Path, tmp_path: Path
) -> None:
    run = Path(shutil.copytree(whole, tmp_path / "run"))
    report = run / "report.json"
    assert "left as it is" in finished_text(run, CONFIG)
    report.rename(run / ".report.json.tmp-0123abcd")
    assert finished_text(run, CONFIG) == ""
    report.write_text('{"status": "unfinished"}')
    assert finished_text(run, CONFIG) == ""
    trained(tiny, world, run, resume=True)
    assert "left as it is" in finished_text(run, CONFIG)
    assert read_report(run).status == "finished" and metrics(run) == metrics(whole)
    assert not list(run.glob(".*.tmp-*"))


def test_auto_starts_goes_on_and_leaves_a_finished_run(
    tiny_dir: Path, command: Command, tmp_path: Path
) -> None:
    out = tmp_path / "run"
    line = ("python", "-m", "engine.run", "--data", tiny_dir, "--device", "cpu", "--out", out)
    line += ("--epochs", "1", "--batch-size", "32", "--resume", "auto")
    assert "test" in command(*line).stdout
    before = (out / "report.json").read_bytes()
    again = command(*line)
    assert again.returncode == 0 and "left as it is" in again.stdout
    assert (out / "report.json").read_bytes() == before
    more = command(*line[:-2], "--resume", "auto", "--epochs", "2")
    assert more.returncode == 0 and "resumed after epoch 1 of 2" in more.stdout, more.stderr
    assert config_of((out / "config.toml").read_text(), "").epochs == 2


def manifest(num_steps: int, **changed: Any) -> Manifest:
    position = Position(epoch=num_steps, num_steps=num_steps, **changed)
    return Manifest(training={}, dataset_fingerprint="f", position=position, scaler={}, sha256={})


def tensors() -> dict[str, dict[str, torch.Tensor]]:
    return {name: {"w": torch.ones(3)} for name in FILES}


def test_checkpoints_are_sorted_by_number_and_strangers_are_left(tmp_path: Path) -> None:
    for num_steps in (9, 10, 999_999_999):
        write_checkpoint(tmp_path, manifest(num_steps), tensors())
    for name in ("step-first", "step-000000011x", "epoch-0001", "my copy"):
        (tmp_path / "checkpoints" / name).mkdir()
    found = checkpoints(tmp_path)
    assert [int(path.name[5:]) for path in found] == [999_999_999, 10, 9]
    prune(tmp_path, set(found), best_number=9)
    assert checkpoints(tmp_path) == found  # the best stays
    prune(tmp_path, set(found), best_number=None)
    assert checkpoints(tmp_path) == found[:2]
    assert len(list((tmp_path / "checkpoints").iterdir())) == 6


@pytest.mark.parametrize("to_nhwc", [True, False])
def test_nhwc_and_nchw_read_each_others_checkpoints(
    to_nhwc: bool, small: Records, world: World, tmp_path: Path
) -> None:
    """The same numbers by the same index, weights and moments, in the shapes of torch's layers."""
    first, second = (make_step(world, channels_last=last) for last in (not to_nhwc, to_nhwc))
    losses(first, small, 3)
    live = checkpoint_tensors(first.state).items()
    files = {name: first.state.in_files(tensors) for name, tensors in live}
    for name in ("fc1.weight", "fc1.weight/exp_avg"):
        (found,) = (tensors[name] for tensors in files.values() if name in tensors)
        assert found.shape == (128, 64 * 7 * 7)
    assert torch.equal(files["model.safetensors"]["fc1.weight"], first.model.fc1.weight.flatten(1))
    write_checkpoint(tmp_path, manifest(3), files)
    second.prepare()
    load_checkpoint(tmp_path, second.state)
    loaded = dict(checkpoint_tensors(second.state))
    for name, tensors in live:
        assert [key for key, t in tensors.items() if not torch.equal(t, loaded[name][key])] == []
    strides = second.model.fc1.weight.stride()
    assert (strides[1] == 1) == to_nhwc
    assert second.optimizer.state[second.model.fc1.weight]["exp_avg"].stride() == strides
    image_BHW = torch.from_numpy(small.split("val").image_NHW[:16])
    plain = make_step(world, channels_last=not to_nhwc).model
    plain.load_state_dict(second.model.state_dict())
    torch.testing.assert_close(plain(image_BHW), second.model(image_BHW), rtol=1e-5, atol=1e-5)


def test_what_does_not_verify_never_pushes_out_what_does(tmp_path: Path) -> None:
    sound = {write_checkpoint(tmp_path, manifest(5), tensors())}
    for num_steps in (6, 7):
        checkpoint_path(tmp_path, num_steps).mkdir()
    prune(tmp_path, sound, None)
    assert len(checkpoints(tmp_path)) == 3
    again = write_checkpoint(tmp_path, manifest(7), tensors())  # over the empty one
    assert read_checkpoint(again)[0].position.epoch == 7


@pytest.mark.parametrize(
    "changed",
    [{"epoch": -1}, {"train_s": float("inf")}, {"position": None}, {"training": 3}, {"version": 1}],
)
def test_a_manifest_that_says_nonsense_is_damaged(changed: dict[str, Any], tmp_path: Path) -> None:
    """Signed again, as a stranger would."""
    from engine.durable import write_manifest

    target = write_checkpoint(tmp_path, manifest(5), tensors())
    tree = json.loads((target / "manifest.json").read_text())
    for key, value in changed.items():
        place = tree if key in tree else tree["position"]
        place[key] = value
        if value is None:
            del place[key]
    try:
        write_manifest(target, tree)
    except ValueError:  # JSON has no infinity
        return
    with pytest.raises(Damaged):
        read_checkpoint(target)


def test_weights_that_are_not_finite_are_neither_written_nor_read(tmp_path: Path) -> None:
    spoiled = tensors()
    spoiled["model.safetensors"]["w"][1] = float("nan")
    with pytest.raises(UserError, match="w is not finite after step 5; lower"):
        write_checkpoint(tmp_path, manifest(5), spoiled)
    assert not checkpoints(tmp_path)


def test_whatever_breaks_the_savers_thread_is_raised(world: World, tmp_path: Path) -> None:
    """At once, and not as a disk that does not answer for two minutes."""
    saver = Saver(tmp_path, make_step(world).state)
    broken: Any = None
    saver.save(manifest(5), broken)
    with pytest.raises(AttributeError):
        saver.wait()
    saver.close()


def test_the_savers_thread_has_ended_when_it_is_closed(world: World, tmp_path: Path) -> None:
    """What it does while the interpreter ends would abort the process."""
    (tmp_path / "checkpoints").mkdir()
    saver = Saver(tmp_path, make_step(world).state)
    saver.save(manifest(5), torch.zeros(5))
    saver.close()
    assert "saver" not in {thread.name for thread in threading.enumerate()}
    assert checkpoints(tmp_path)


def test_writing_a_checkpoint_starts_no_threads_of_its_own(tmp_path: Path) -> None:
    """A second team of OpenMP makes each operation of the training wait for the first to wake."""
    num_threads, seen = torch.get_num_threads(), list[int]()
    torch.set_num_threads(2)
    large = {"w": torch.ones(2**20)}
    torch.isfinite(large["w"]).all()  # starts the team of this thread

    def write() -> None:
        write_checkpoint(tmp_path, manifest(5), tensors() | {"model.safetensors": large})
        seen.append(len(os.listdir("/proc/self/task")))

    thread = threading.Thread(target=write)
    before = len(os.listdir("/proc/self/task"))
    thread.start()
    thread.join()
    torch.set_num_threads(num_threads)
    assert seen == [before + 1]


@pytest.mark.parametrize(
    ("text", "wanted"),
    [
        ("500steps", Cadence(steps=500)),
        ("30s", Cadence(seconds=30)),
        ("1epoch, 60s", Cadence(seconds=60, epochs=1)),
        ("2 epochs,7step", Cadence(steps=7, epochs=2)),
    ],
)
def test_intervals_are_read(text: str, wanted: Cadence) -> None:
    assert Cadence.of(text) == wanted


@pytest.mark.parametrize("text", ["", "often", "0steps", "-1s", "1.5s", "5 minutes", "5steps,"])
def test_what_is_no_interval_is_refused(text: str) -> None:
    with pytest.raises(UserError, match="is no interval; write 500steps"):
        Cadence.of(text)


def test_a_save_by_steps_comes_at_its_step(world: World) -> None:
    pulse = Pulse(world, Cadence(steps=7))
    pulse.start(100)
    saved = []
    for step in range(101, 131):
        if pulse.is_due(step) and pulse.meet(step).save:
            pulse.saved(step)
            saved.append(step)
    assert saved == [107, 114, 121, 128]


def beat(step: int, doing: str, count: int = 1) -> Beat:
    return Beat(count, step, doing, num_signs=step, pid=0, parent=0, machine=0)


def test_the_ranks_that_hold_the_others_up_are_named() -> None:
    seen = {0: Seen(beat(9, TRAINING), 100, 30), 1: Seen(beat(9, WAITING), 100, 30)}
    assert hung_ranks(seen, 100, 75) is None
    ranks, text = hung_ranks(seen, 95, 60) or ([], "")
    assert ranks == [1] and "its last step was 9, it was waiting for its feed" in text
    seen[0] = Seen(beat(9, "saving"), 95, 30)
    assert hung_ranks(seen, 95, 60) is None, "a slow disk is no hang"
    seen[1] = Seen(beat(8, TRAINING), 20, 20)
    ranks, text = hung_ranks(seen, 95, 60) or ([], "")
    assert ranks == [1] and text.startswith("rank 1: has been silent for 75 s")
    seen[2] = Seen(beat(8, TRAINING), 36, 20)  # it went with rank 1, and beat a second later
    ranks, text = hung_ranks(seen, 95, 60) or ([], "")
    assert ranks == [1, 2] and text.startswith("ranks 1 and 2: have been silent for 75 s")
    assert "the last step of rank 1 was 8" in text
    seen[1] = seen[2] = Seen(beat(105, LEFT), 20, 20)  # their runs have ended
    assert hung_ranks(seen, 95, 60) is None
    seen[0] = Seen(beat(9, TRAINING), 95, 30)
    ranks, text = hung_ranks(seen, 95, 60) or ([], "")
    assert ranks == [0] and "hangs for 65 s" in text


def test_a_signal_before_training_ends_the_process_at_once(monkeypatch: Any) -> None:
    monkeypatch.setattr(STOP, "number", 0)
    with pytest.raises(Stopped, match="stopped by SIGTERM"):
        STOP._handle(signal.SIGTERM, None)


def test_ctrl_c_before_the_command_line_is_read_is_one_line() -> None:
    code = """
import os, signal
from engine import run
signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background jobs ignore it
read = run.main.make_context
def interrupted(*args, **options):
    os.kill(os.getpid(), signal.SIGINT)
    return read(*args, **options)
run.main.make_context = interrupted
run.main([], prog_name="engine.run")
"""
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, timeout=60)
    wanted = b"error: stopped by SIGINT; there was nothing to save\n"
    assert (done.returncode, done.stdout, done.stderr) == (128 + signal.SIGINT, b"", wanted)


def test_the_same_signal_again_ends_the_process_at_once() -> None:
    """A second later, that is: a terminal and torchrun both send one for the same wish."""
    code = """
import os, signal
from engine.stop import PATIENCE_S, STOP
STOP.install()
with STOP.polled():
    os.kill(os.getpid(), signal.SIGTERM)
    os.kill(os.getpid(), signal.SIGTERM)
    print("goes on", STOP.number, flush=True)
    STOP._since_s -= PATIENCE_S
    os.kill(os.getpid(), signal.SIGTERM)
    print("never")
"""
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, timeout=60)
    assert (done.returncode, done.stdout) == (128 + signal.SIGTERM, b"goes on 15\n"), done.stderr


def test_a_signal_is_known_of_before_python_hears_it() -> None:
    """The main thread is in one long call of native code, as in a collective."""
    code = """
import ctypes, os, signal, threading, time
from engine.stop import STOP
LIBC = ctypes.CDLL(None)
mutex = ctypes.create_string_buffer(64)  # zeros: free, and no signal ends the wait for it
is_locked = threading.Event()
def ask():
    LIBC.pthread_mutex_lock(mutex)
    is_locked.set()
    time.sleep(0.5)  # the main thread is in its call
    print(STOP.was_sent())
    os.kill(os.getpid(), signal.SIGTERM)
    time.sleep(0.2)
    print(STOP.was_sent(), STOP.number)
    LIBC.pthread_mutex_unlock(mutex)
STOP.install()
with STOP.polled():
    asking = threading.Thread(target=ask)
    asking.start()
    is_locked.wait()
    LIBC.pthread_mutex_lock(mutex)
    asking.join()
print(STOP.number)
"""
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, timeout=60)
    assert (done.returncode, done.stdout) == (0, b"False\nTrue 0\n15\n"), done.stderr


def test_a_process_does_not_hear_the_signals_of_one_forked_before() -> None:
    """A rank that took its sibling's signal for its own took a rank that was stopped for dead."""
    code = """
import os, signal
from engine.stop import STOP
for is_first in (True, False):
    pid = os.fork()
    if not pid:
        STOP.install()
        if is_first:
            with STOP.polled():
                os.kill(os.getpid(), signal.SIGTERM)
        else:
            print(STOP.was_sent(), flush=True)
        os._exit(0)
    os.waitpid(pid, 0)
"""
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, timeout=60)
    assert (done.returncode, done.stdout) == (0, b"False\n"), done.stderr


def test_a_signal_in_a_destructor_is_kept_and_prints_nothing() -> None:
    code = """
import os, signal
from engine.stop import STOP
class Falls:
    def __del__(self):
        os.kill(os.getpid(), signal.SIGTERM)
STOP.install()
Falls()
print(STOP.number, flush=True)
"""
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, timeout=60)
    assert (done.returncode, done.stdout, done.stderr) == (0, b"15\n", b"")


def test_a_lone_run_stops_by_a_signal_and_says_how_to_go_on(tiny_dir: Path, tmp_path: Path) -> None:
    """The real process: exit code 128 + 10, one line, no traceback."""
    line = [sys.executable, "-m", "engine.run", "--data", tiny_dir, "--epochs", "500"]
    line += ["--batch-size", "32", "--device", "cpu", "--out", tmp_path / "run"]
    run = subprocess.Popen(
        [str(word) for word in line], cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE
    )
    try:
        deadline = time.monotonic() + 60
        while not checkpoints(tmp_path / "run") and time.monotonic() < deadline:
            time.sleep(0.05)
        os.kill(run.pid, signal.SIGUSR1)
        out, err = run.communicate(timeout=60)
    finally:
        run.kill()
    assert run.returncode == 128 + signal.SIGUSR1, err
    assert "stopped by SIGUSR1 in epoch" in out.decode() and not err, err
    assert "saved; go on with --resume" in out.decode()
