"""Members of a sweep end with the bits of their runs alone, whatever they share, and go on."""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import closing
from functools import partial
from math import ceil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from torch.nn import functional

from engine.config import RunConfig, override
from engine.config_text import with_own_network
from engine.data.records import Records
from engine.errors import UserError
from engine.feeds.build import make_feed
from engine.feeds.resident import Gather, Pixels
from engine.feeds.shared import SharedFeed, SharedFeeds
from engine.host import ROOT
from engine.meters import Stopwatch
from engine.models import make_model
from engine.ranks import join_ranks
from engine.report import read_report
from engine.stop import STOP
from engine.train import members
from engine.train.folder import WEIGHTS
from engine.train.joint import Joint
from engine.train.members import Crew
from engine.train.outcome import FAILED, train_sweep
from engine.train.session import make_order
from engine.train.sweep import Sweep, SweepResult, parse_sweeps, read_sweep
from engine.train.trainer import fit
from engine.train.vote import Ballot
from engine.train.weights import network_facts, save_model
from engine.world import World
from tests.conftest import FAST_PRECISION, Command, assert_refused
from tests.test_resume import assert_same, quiet, stop_after
from tools.measure.evaluation import Opened, Question, answer, averaged, evaluate
from tools.measure.scores import Answers
from tools.report.sweep import read_sweep_result

__all__ = ["stop_after"]
BASE = RunConfig(global_batch=32, epochs=2, checkpoint_every="3steps,1epoch")
"""7 steps in each epoch of the tiny records."""
DROPPED = """
from torch.nn import functional
from engine.models.baseline import FastGlyphNet


class Dropped(FastGlyphNet):
    def hidden(self, image_BHW):
        return functional.dropout(super().hidden(image_BHW), 0.2, self.training)
"""


def sweep_of(tiny_dir: Path, sweeps: tuple[str, ...], settings: dict[str, Any]) -> Sweep:
    config = override(BASE, settings | {"data.path": str(tiny_dir)}, "test")
    return Sweep.of(config, parse_sweeps(sweeps))


def train(sweep: Sweep, out: Path, lines: list[str] | None = None) -> int:
    """By the command's own way; the exit code."""
    out.mkdir(exist_ok=True)
    said = [] if lines is None else lines
    return train_sweep(sweep, out, "cpu", join_ranks(), said.append)


def assert_alone(sweep: Sweep, out: Path, records: Records, world: World, alone: Path) -> None:
    """Each member is what its run alone is: weights, optimiser, log and metrics, to the bit."""
    for member in sweep.members:
        run = alone / member.folder
        run.mkdir(parents=True)
        report, _ = fit(member.config, records, world, run, resume=False, say=quiet)
        assert_same(out / member.folder, run)
        found = read_report(out / member.folder)
        assert found.test_loss == report.test_loss and found.status == "finished"
        assert found.config_digest == report.config_digest


CASES: list[tuple[tuple[str, ...], dict[str, Any]]] = [
    (("optim.learning_rate=0.002,0.004",), {"step.steps_per_launch": 3}),
    (("epochs=1,2", "data.order=exact,stratified"), {"evaluate_every": 4}),
    (("model.name=fast,residual",), {"epochs": 1, "augment.shift_pixels": 1}),
    (("step.precision=fp32,bf16",), {"epochs": 1}),
    (("optim.batch_ramp=['16x1,32x1','56x1,16x1']",), {"optim.batch_schedule": "ramp"}),
]


@pytest.mark.slow
@pytest.mark.parametrize(("sweeps", "settings"), CASES, ids=str)
def test_members_end_with_the_bits_of_their_runs_alone(
    sweeps: tuple[str, ...],
    settings: dict[str, Any],
    tiny: Records,
    tiny_dir: Path,
    world: World,
    tmp_path: Path,
) -> None:
    if "bf16" in sweeps[0] and FAST_PRECISION == "fp32":
        pytest.skip("this CPU has no bf16 instructions, and both would be fp32")
    sweep = sweep_of(tiny_dir, sweeps, settings)
    assert train(sweep, tmp_path / "sweep") == 0
    assert_alone(sweep, tmp_path / "sweep", tiny, world, tmp_path / "alone")


@pytest.mark.parametrize("feed", ["resident", pytest.param("loader", marks=pytest.mark.slow)])
def test_networks_that_draw_random_numbers_draw_their_own(
    feed: str, tiny: Records, tiny_dir: Path, world: World, tmp_path: Path
) -> None:
    """They share each batch; whoever asks for it first draws for nobody else."""
    file = tmp_path / "dropped.py"
    file.write_text(DROPPED)
    own = with_own_network({"model.name": f"{file}:Dropped"}, "test")
    settings = {"epochs": 1, "data.feed": feed, "data.loader_workers": 0}
    sweep = sweep_of(tiny_dir, ("optim.learning_rate=0.002,0.004",), own | settings)
    assert train(sweep, tmp_path / "sweep") == 0
    assert_alone(sweep, tmp_path / "sweep", tiny, world, tmp_path / "alone")


def files_of(out: Path) -> dict[str, bytes]:
    return {str(file): file.read_bytes() for file in out.rglob("*") if file.is_file()}


def test_a_sweep_that_is_stopped_goes_on_to_the_same_bits(
    tiny: Records,
    tiny_dir: Path,
    world: World,
    tmp_path: Path,
    stop_after: Any,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    sweep, out = sweep_of(tiny_dir, ("seed=1,2",), {}), tmp_path / "sweep"
    stop_after(9)  # of 2 x 14 steps
    assert train(sweep, out) == 128 + signal.SIGTERM
    stopped = read_sweep_result(out)
    assert stopped.status == "stopped" and stopped.votes == []
    assert [member.status for member in stopped.members] == ["stopped"] * 2
    assert all((out / member.folder / "preempted").exists() for member in stopped.members)
    STOP.number = 0
    monkeypatch.setattr(STOP, "_handle", lambda *_: None)  # nothing stops what follows
    lines: list[str] = []
    assert train(sweep, out, lines) == 0
    assert sum("resumed after epoch 0 of 2, step" in line for line in lines) == 2
    assert sum(line.startswith("note: a sweep of 2 members in one process") for line in lines) == 1
    assert_alone(sweep, out, tiny, world, tmp_path / "alone")
    runs = {name: files_of(out / name) for name in (m.folder for m in sweep.members)}
    again = read_sweep_result(out)
    assert train(sweep, out, lines) == 0  # nothing is left to do
    assert sum("is left as it is" in line for line in lines) == 2
    assert runs == {name: files_of(out / name) for name in runs}
    assert read_sweep_result(out).votes == again.votes
    (out / sweep.members[1].folder / "report.json").unlink()
    assert train(sweep, out) == 0  # killed before its last file, it ends now
    assert read_sweep_result(out).votes == again.votes


def test_notes_of_one_member_have_its_name(
    tiny: Records, tiny_dir: Path, world: World, tmp_path: Path
) -> None:
    sweep, lines = sweep_of(tiny_dir, ("seed=1..3",), {}), list[str]()
    crew = Crew(sweep, tiny, world, tmp_path, lines.append)
    crew.running = [None] * 3  # type: ignore[list-item]
    for member in sweep.members:
        crew._voice(member)("note: of all")
    crew._voice(sweep.members[1])("note: of one")
    crew._say_notes()
    assert lines == ["note: of all", "2 seed=2: note: of one"]


@pytest.mark.slow
@pytest.mark.usefixtures("one_thread")
def test_a_killed_sweep_goes_on_by_the_same_line(
    tiny: Records, tiny_dir: Path, world: World, command: Command, tmp_path: Path, cache: Path
) -> None:
    out = tmp_path / "sweep"
    words = ["--sweep", "seed=1,2", "--epochs", 3, "--batch-size", 16, "--device", "cpu"]
    words += ["--data", tiny_dir, "--checkpoint-every", "2steps", "--out", out, "--resume", "auto"]
    line = ["-m", "engine.run", "--kernels=off", *map(str, words)]
    variables = os.environ | {"OMP_NUM_THREADS": "1", "XDG_CACHE_HOME": str(cache)}
    with subprocess.Popen([sys.executable, *line], cwd=ROOT, env=variables) as killed:
        end_s = time.monotonic() + 100
        while len(list(out.glob("*/checkpoints/step-*"))) < 3 and time.monotonic() < end_s:
            time.sleep(0.02)
        killed.kill()
    assert not (out / "sweep.json").exists(), "it was not killed in time"
    done = command("python", *line)
    assert done.returncode == 0 and done.stdout.count("resumed after epoch") == 2, done.stderr
    assert_alone(Sweep.of(*read_sweep(out)), out, tiny, world, tmp_path / "alone")


@pytest.mark.slow
def test_networks_whose_weights_are_gone_take_no_part_in_the_vote(
    tiny_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As where the disk refused at the end, and they were written elsewhere."""
    sweep, out = sweep_of(tiny_dir, ("seed=1..3",), {"epochs": 1}), tmp_path / "sweep"
    train_all = Crew.train

    def train_and_lose(crew: Crew) -> None:
        train_all(crew)
        (out / sweep.members[1].folder / "model.safetensors").unlink()

    monkeypatch.setattr(Crew, "train", train_and_lose)
    lines: list[str] = []
    assert train(sweep, out, lines) == 0
    assert [vote.num_members for vote in read_sweep_result(out).votes] == [2, 2]
    assert any(line.startswith("2 seed=2: takes no part in the vote: ") for line in lines)


@pytest.mark.slow
def test_a_member_that_breaks_down_leaves_the_others_alone(
    tiny: Records, tiny_dir: Path, world: World, tmp_path: Path
) -> None:
    settings = {"optim.fused": False, "optim.schedule": "constant", "epochs": 1}
    sweep = sweep_of(tiny_dir, ("optim.learning_rate=1000,0.002",), settings)
    out, lines = tmp_path / "sweep", list[str]()
    assert train(sweep, out, lines) == FAILED
    first, second = read_sweep_result(out).members
    assert (first.status, second.status) == ("failed", "finished")
    assert first.failure and "was not finite in step" in first.failure
    assert any(line.startswith("1 learning_rate=1000: failed: ") for line in lines), lines
    assert not (out / first.folder / "model.safetensors").exists()
    assert_alone(Sweep(sweep.config, sweep.axes, sweep.members[1:]), out, tiny, world, tmp_path)


def joined(monkeypatch: pytest.MonkeyPatch) -> list[Joint]:
    """Members that gather in launches have joint ones from now on, though there is no GPU."""
    made: list[Joint] = []
    init = Joint.__init__

    def note(joint: Joint, *given: Any) -> None:
        made.append(joint)
        init(joint, *given)

    def pace(trainer: Any) -> Any:
        place = (trainer.position.epoch, trainer.position.step, trainer.config.epochs)
        return place if trainer.step.gathers else None

    monkeypatch.setattr(Joint, "__init__", note)
    monkeypatch.setattr(members, "pace_of", pace)
    return made


@pytest.mark.slow
def test_joint_launches_change_no_bit(
    tiny: Records,
    tiny_dir: Path,
    world: World,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """As on a GPU: the last member to come starts the launch, and batches are gathered once."""
    gathered: list[int] = []
    steps = Gather.steps

    def count(gather: Gather, *given: Any) -> None:
        gathered.append(len(given[1]))
        steps(gather, *given)

    settings = {"step.steps_per_launch": 3, "epochs": 1}
    sweep = sweep_of(tiny_dir, ("optim.learning_rate=0.002,0.004", "seed=1,2"), settings)
    with monkeypatch.context() as patch:
        made = joined(patch)
        crew = Crew(sweep, tiny, world, tmp_path / "sweep", quiet)
        for member in sweep.members:
            (tmp_path / "sweep" / member.folder).mkdir(parents=True)
        launch_together = Crew._launch_together

        def count_from_here(crew: Crew, *given: Any) -> None:
            patch.setattr(Gather, "steps", count)
            launch_together(crew, *given)

        patch.setattr(Crew, "_launch_together", count_from_here)
        crew.train()
    assert len(made) == 1 and crew.launches == "one graph of 4 branches"
    assert gathered == [3, 3, 3, 3, 1, 1], "of each seed once: two learning rates share a batch"
    assert_alone(sweep, tmp_path / "sweep", tiny, world, tmp_path / "alone")


@pytest.mark.slow
def test_a_joint_launch_goes_on_without_a_member_that_broke_down(
    tiny: Records,
    tiny_dir: Path,
    world: World,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    settings = {"optim.fused": False, "optim.schedule": "constant", "step.steps_per_launch": 3}
    settings["epochs"] = 2
    sweep = sweep_of(tiny_dir, ("optim.learning_rate=1000,0.002,0.004",), settings)
    with monkeypatch.context() as patch:
        made = joined(patch)
        assert train(sweep, tmp_path / "sweep") == FAILED
        assert len(made) == 1
    others = sweep.members[1:]  # which lived on what the first gathered
    left = Sweep(sweep.config, sweep.axes, others)
    assert_alone(left, tmp_path / "sweep", tiny, world, tmp_path / "alone")


@pytest.fixture
def feeds(tiny: Records) -> Iterator[tuple[SharedFeed, SharedFeed, Any]]:
    """Two users of one feed, and how to make a feed of one's own."""
    split, cpu = tiny.split("train"), torch.device("cpu")
    order = make_order(BASE, split, 0, 1)
    shared = SharedFeeds()
    one, other = (shared.make(BASE, split, order, 8, cpu) for _ in range(2))
    assert isinstance(one, SharedFeed) and isinstance(other, SharedFeed)
    yield one, other, lambda: make_feed(BASE, split, order, 8, cpu)
    one.close()
    other.close()
    assert not shared._commons


def ids(feed: Any, epoch: int, first_step: int = 0) -> list[list[int]]:
    return [batch.id_B.tolist() for batch in feed.batches(epoch, first_step)]


def test_users_in_step_get_the_same_batches_made_once(feeds: Any) -> None:
    one, other, make = feeds
    with closing(make()) as alone:
        for epoch in (0, 1):
            found = []
            for a, b in zip(one.batches(epoch), other.batches(epoch), strict=True):
                assert a is b
                found.append(a.id_B.tolist())
            assert found == ids(alone, epoch)
    assert other._own is None


def test_a_user_elsewhere_gets_a_feed_of_its_own(feeds: Any) -> None:
    one, other, make = feeds
    with closing(make()) as alone:
        wanted = ids(alone, 2)
        here, there = one.batches(2, 1), other.batches(2, 4)
        found = [(next(here).id_B.tolist(), next(there).id_B.tolist()) for _ in range(3)]
        assert found == list(zip(wanted[1:4], wanted[4:7], strict=True))
        assert [batch.id_B.tolist() for batch in here] == wanted[4:]
        assert list(there) == []


def test_what_breaks_a_feed_breaks_all_its_users(feeds: Any) -> None:
    one, other, _ = feeds

    def broken(epoch: int, first_step: int = 0) -> Iterator[Any]:
        raise UserError("the disk is gone")
        yield

    one._common.feed.batches = broken
    for user in (one, other):
        with pytest.raises(UserError, match="the disk is gone"):
            next(user.batches(0))


def test_a_members_clock_stands_still_in_the_others_turns(monkeypatch: pytest.MonkeyPatch) -> None:
    moments = iter((100.0, 101.0, 111.0, 113.0, 114.0, 120.0, 121.0))
    monkeypatch.setattr("engine.meters.time.perf_counter", lambda: next(moments))
    watch = Stopwatch(torch.device("cpu"))
    watch.start()
    watch.pause()
    watch.resume()
    assert watch.stop() == 1 + 2 and watch.total_s == 3
    watch.pause()  # between two epochs
    watch.resume()
    watch.start()
    assert watch.total_s == 3


def test_signals_are_waited_for_until_the_last_member_has_ended() -> None:
    with STOP.polled():
        with STOP.polled():
            pass
        assert STOP._is_polled
    assert not STOP._is_polled


def test_images_are_on_the_device_once(tiny: Records) -> None:
    cpu, split = torch.device("cpu"), tiny.split("train")
    first, second = Gather(split, cpu), Gather(split, cpu)
    assert first._pixels_in_use is second._pixels_in_use
    assert Gather(tiny.split("val"), cpu)._pixels_in_use is not first._pixels_in_use
    del first, second
    assert Pixels.of(split, cpu).split is split


def test_the_command_its_table_and_its_report(
    tiny_dir: Path, command: Command, tmp_path: Path
) -> None:
    out = tmp_path / "sweep"
    line = ("python", "-m", "engine.run", "--data", tiny_dir, "--device", "cpu", "--kernels=off")
    given = ("--sweep", "optim.learning_rate=0.002", "--sweep", "seed=1..2")
    short = ("--epochs", 1, "--batch-size", 32)
    done = command(*line, *given, *short, "--out", out)
    assert done.returncode == 0, done.stderr
    result = read_sweep_result(out)
    check_table(done.stdout.splitlines(), result)
    check_vote(out, result, tiny_dir)
    shown = command("tools/profile", "report", out)
    assert shown.returncode == 0 and "sweep.md" in shown.stdout, shown.stderr
    table = (out / "sweep.md").read_text()
    assert "| 2 learning&#95;rate=0.002 seed=2 |" in table and "vote of 2, calibrated" in table
    assert "<svg" in (out / "sweep.svg").read_text()
    again = command(*line, *given, *short, "--out", out)
    assert_refused(again, "is not empty, it holds a sweep", "--resume")
    other = ("--resume", out, "--sweep", "seed=1..3")
    assert_refused(command("python", "-m", "engine.run", *other), "holds another sweep")
    refused = ("--resume", out, "--set", "optim.weight_decay=0.5")
    assert_refused(command("python", "-m", "engine.run", *refused), "optim.weight_decay was 0.01")
    longer = ("--resume", "auto", "--out", out, *given, "--epochs", 2, "--device", "cpu")
    assert command("python", "-m", "engine.run", *longer).returncode == 0
    assert {member.num_epochs for member in read_sweep_result(out).members} == {2}


def check_table(lines: list[str], result: SweepResult) -> None:
    """Members by validation accuracy, with their settings; then the votes."""
    start = next(n for n, line in enumerate(lines) if line.split()[:1] == ["member"])
    assert lines[start].split()[1:3] == ["optim.learning_rate", "seed"]
    rows = [line.split() for line in lines[start + 1 : start + 3]]
    accuracies = [float(row[3].rstrip("%")) for row in rows]
    assert accuracies == sorted(accuracies, reverse=True)
    settings = {(m.number, *(s.value for s in m.settings)) for m in result.members}
    assert {(int(row[0]), float(row[1]), int(row[2])) for row in rows} == settings
    assert [line.partition(":")[0] for line in lines[start + 3 : start + 5]] == [
        "vote of 2, mean of probabilities",
        "vote of 2, each calibrated on val",
    ]


def check_vote(out: Path, result: SweepResult, tiny_dir: Path) -> None:
    """The votes are ensembles of tools/evaluate's answers, the temperatures are those it finds."""
    question, device = Question(split="test"), torch.device("cpu")
    opened = Opened(tiny_dir)
    answered = [answer(out / m.folder, opened, question, device) for m in result.members]
    report = read_report(out / result.members[0].folder)
    found = evaluate(answered, question, report.environment, ensemble=True)
    temperatures = [run.scores.calibration.temperature for run in found.runs]
    assert None not in temperatures
    assert [m.temperature for m in result.members] == pytest.approx(temperatures)
    assert [vote.is_calibrated for vote in result.votes] == [False, True]
    for vote in result.votes:
        by = temperatures if vote.is_calibrated else [1.0] * len(answered)
        on_test = voted([each.on_split for each in answered], by)
        on_val = voted([each.on_val for each in answered], by)
        assert vote.test_accuracy_fraction == pytest.approx(on_test)
        assert vote.val_accuracy_fraction == pytest.approx(on_val)
    assert found.ensemble and result.votes[0].test_accuracy_fraction == pytest.approx(
        found.ensemble.scores.accuracy_fraction
    )


def voted(members: Sequence[Answers | None], temperatures: Sequence[float | None]) -> float:
    """The accuracy of the mean of the members' probabilities, each at its temperature."""
    scaled = [
        each.scaled(by) for each, by in zip(members, temperatures, strict=True) if each and by
    ]
    together = averaged(scaled)
    return together.num_right / len(together.label_N)


def test_a_calibrated_vote_is_of_each_at_its_own_temperature(
    tiny: Records, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """One network is always right and never sure, the other surer and wrong on every second image
    of val and every third of test: plain, the other is believed."""
    every = {"val": 2, "test": 3}
    splits = {name: tiny.split(name) for name in every}
    num_classes = len(tiny.classes)
    network = make_model(BASE.model, *tiny.height_width, num_classes, seed=0)
    save_model(tmp_path / WEIGHTS, network.state_dict(), network_facts(BASE.model, tiny))
    ballot = Ballot(tiny, torch.device("cpu"))

    def answered(scale: float, is_wrong: bool, network: Any, image_NHW: Any, device: Any) -> Any:
        (name,) = (name for name, split in splits.items() if split.image_NHW is image_NHW)
        label_N = torch.from_numpy(splits[name].label_N.astype(np.int64))
        label_N[:: every[name]] += is_wrong
        return scale * functional.one_hot(label_N % num_classes, num_classes).float()

    for scale, is_wrong in ((0.2, False), (10.0, True)):
        logits = partial(answered, scale, is_wrong)
        monkeypatch.setattr("engine.train.vote.all_logits", logits)
        ballot.add(BASE, tmp_path)
    plain, calibrated = ballot.votes()
    num_val, num_test = len(splits["val"]), len(splits["test"])
    assert plain.val_accuracy_fraction == pytest.approx(1 - ceil(num_val / 2) / num_val)
    assert plain.test_accuracy_fraction == pytest.approx(1 - ceil(num_test / 3) / num_test)
    assert calibrated.val_accuracy_fraction == calibrated.test_accuracy_fraction == 1.0


@pytest.mark.slow
def test_a_member_is_a_run_like_any_other(tiny_dir: Path, command: Command, tmp_path: Path) -> None:
    sweep = sweep_of(tiny_dir, ("seed=1,2",), {"epochs": 1})
    assert train(sweep, tmp_path / "sweep") == 0
    member = tmp_path / "sweep" / sweep.members[1].folder
    report = json.loads((member / "report.json").read_text())
    assert any("a sweep of 2 members in one process" in note for note in report["notes"])
    assert report["samples_per_s"] > 0 and report["train_s"] > 0
    done = command("python", "-m", "engine.run", "--resume", member, "--epochs", 2, "--device=cpu")
    assert done.returncode == 0 and "resumed after epoch 1 of 2" in done.stdout, done.stderr
    assert load_file(member / "model.safetensors").keys()
