"""Launches of several steps, accumulation, the way back to eager: the same training, always."""

from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from engine.config import DataConfig, OptimConfig, RunConfig, StepConfig, override
from engine.data.records import Records
from engine.errors import UserError
from engine.feeds.resident import ResidentFeed
from engine.train import session as sessions
from engine.train import step as step_module
from engine.train import trainer
from engine.train.capture import Graph
from engine.train.session import Session, open_session
from engine.train.step import MAX_SKIPPED, TrainStep
from engine.train.trainer import fit
from engine.world import World
from tests.conftest import Command
from tests.test_step import build, losses, make_step

EPOCHS = 2


def session(records: Records, world: World, settings: dict[str, Any] | None = None) -> Session:
    """Seven steps of 32 an epoch."""
    config = RunConfig(
        data=DataConfig(feed="resident"), optim=OptimConfig(learning_rate=2e-3), global_batch=32
    )
    return open_session(
        override(config, {"epochs": EPOCHS} | (settings or {}), "test"), records, world
    )


def trained(opened: Session) -> dict[str, np.ndarray]:
    """Everything that training leaves: losses, ids, gradients, parameters, optimiser, counters."""
    loss, ids = [], []
    for epoch in range(EPOCHS):
        for launch in opened.step.train_epoch(opened.feed, epoch):
            ids.append(launch.batch.id_B.numpy().copy())
            assert len(ids[-1]) == 32 * launch.num_steps
        loss.append(opened.step.read_training().loss_S)
    found = {
        "loss": np.concatenate(loss),
        "ids": np.concatenate(ids),
        "counters": opened.step.counter_21.numpy(),
    }
    for name, parameter in opened.step.model.named_parameters():
        assert parameter.grad is not None
        found |= {name: parameter.detach().numpy(), f"{name}.grad": parameter.grad.numpy()}
        for key, value in opened.step.optimizer.state[parameter].items():
            found[f"{name}.{key}"] = value.numpy()
    opened.close()
    return {name: value.copy() for name, value in found.items()}


def assert_same(got: dict[str, np.ndarray], wanted: dict[str, np.ndarray]) -> None:
    assert got.keys() == wanted.keys()
    assert [name for name in wanted if not np.array_equal(got[name], wanted[name])] == []


@pytest.mark.parametrize(
    "settings",
    [
        {"step.steps_per_launch": 3},  # two launches of 3 steps, one of the step that remains
        {"step.steps_per_launch": 3, "step.precision": "bf16"},
        {"step.steps_per_launch": 64},
        {"step.steps_per_launch": 3, "data.feed": "dali"},
        {"step.steps_per_launch": 3, "data.feed": "loader", "data.loader_workers": 0},
    ],
    ids=str,
)
def test_launches_of_k_steps_change_no_bit(
    settings: dict[str, Any], tiny: Records, world: World
) -> None:
    wanted = trained(
        session(tiny, world, {"step.precision": settings.get("step.precision", "fp32")})
    )
    opened = session(tiny, world, settings)
    gathers = settings.get("data.feed", "resident") == "resident"
    assert (opened.step._source is opened.feed) == gathers
    assert_same(trained(opened), wanted)


@pytest.mark.parametrize(
    "settings", [{"augment.rotate_degrees": 10}, {"data.feed": "synthetic"}], ids=str
)
def test_so_do_those_of_distorted_and_of_synthetic_images(
    settings: dict[str, Any], tiny: Records, world: World
) -> None:
    one, three = (session(tiny, world, settings | {"step.steps_per_launch": k}) for k in (1, 3))
    is_distorted = "augment.rotate_degrees" in settings
    assert (three.step._source is None) == is_distorted
    note = "images are gathered and distorted before a launch, not within it"
    assert note not in one.notes and (note in three.notes) == is_distorted
    assert_same(trained(one), trained(three))


def test_an_epoch_can_be_entered_in_the_middle(tiny: Records, world: World) -> None:
    found = []
    for num_steps in (1, 3):
        opened = session(tiny, world, {"step.steps_per_launch": num_steps})
        sizes = [
            launch.num_steps for launch in opened.step.train_epoch(opened.feed, 1, first_step=2)
        ]
        assert sizes == [1] * 5 if num_steps == 1 else [3, 1, 1]
        found.append(opened.step.read_training().loss_S)
        opened.close()
    assert len(found[0]) == 5 and np.array_equal(*found)


def test_epochs_may_come_in_any_order(tiny: Records, world: World) -> None:
    """The ids that were drawn ahead for the next epoch are not those of another."""
    opened = session(tiny, world, {"step.steps_per_launch": 7})
    for epoch in (0, 3, 1, 2):
        (launch,) = opened.step.train_epoch(opened.feed, epoch)
        assert np.array_equal(
            launch.batch.id_B.numpy(), opened.feed.order.ids(epoch, 0, 7).reshape(-1)
        )
    opened.close()


def test_a_feed_that_does_not_end_with_its_epoch_ends_the_run(tiny: Records, world: World) -> None:
    opened, more = session(tiny, world), ResidentFeed.batches
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ResidentFeed, "batches", lambda *given: chain(more(*given), more(*given)))
        with pytest.raises(RuntimeError, match="goes on after the epoch's last step"):
            list(opened.step.train_epoch(opened.feed, 0))
    opened.close()


def test_too_many_steps_in_a_launch_are_cut_to_an_epoch_and_told(
    tiny: Records, world: World
) -> None:
    opened = session(tiny, world, {"step.steps_per_launch": 64})
    assert opened.effective["steps_per_launch"] == 7
    assert "7 steps in a launch: an epoch has no more" in opened.notes
    opened.close()


def test_accumulation_is_the_whole_batch(tiny: Records, world: World) -> None:
    wanted, got = (trained(session(tiny, world, {"step.accumulate": parts})) for parts in (1, 4))
    assert got["loss"] == pytest.approx(wanted["loss"], rel=1e-4)
    assert not np.array_equal(got["loss"], wanted["loss"]), "the batch was not divided"
    for name in ("conv1.weight.grad", "fc2.bias.grad"):
        assert got[name] == pytest.approx(wanted[name], rel=2e-2, abs=2e-4)
    with pytest.raises(UserError, match="cannot be divided into 5 parts"):
        session(tiny, world, {"step.accumulate": 5})


@pytest.mark.slow
def test_a_compiled_step_is_the_same_training(tiny: Records, world: World) -> None:
    wanted, got = (
        trained(session(tiny, world, {"step.compile": mode})) for mode in ("off", "default")
    )
    assert got["loss"] == pytest.approx(wanted["loss"], rel=1e-4)


def test_compile_needs_a_compiler(
    tiny: Records, world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CXX", "no-such-compiler")
    config, notes = sessions.effective_config(
        RunConfig(global_batch=32, step=StepConfig(compile="default")), tiny, world
    )
    assert config.step.compile == "off" and any("no no-such-compiler" in note for note in notes)


def test_random_state_belongs_to_the_epoch(tiny: Records, world: World) -> None:
    """A network that draws (dropout) can be resumed at an epoch's end without its random state."""
    found = []
    for epochs in ([0, 1], [1]):
        opened = session(tiny, world)
        drawn: list[float] = []
        opened.step.model.register_forward_hook(
            lambda *_, drawn=drawn: drawn.append(float(torch.rand(1)))
        )
        for epoch in epochs:
            list(opened.step.train_epoch(opened.feed, epoch))
        found.append(drawn[-7:])
        opened.close()
    assert found[0] == found[1] and len(set(found[0])) == 7


def spoil(opened: TrainStep, when: set[int]) -> None:
    """Make the first gradient of some steps, counted from 0, infinite."""
    steps = iter(range(10_000))
    opened.model.conv1.weight.register_hook(
        lambda grad: torch.full_like(grad, float("inf")) if next(steps) in when else grad
    )


@pytest.mark.parametrize("fused", [True, False])
def test_a_gradient_that_is_not_finite_ends_the_run_at_its_step(
    fused: bool, small: Records, world: World
) -> None:
    step = build(
        world, RunConfig(optim=OptimConfig(fused=fused), step=StepConfig(precision="bf16"))
    )
    losses(step, small, 3)
    before = [p.detach().clone() for p in step.model.parameters()]
    spoil(step, {0})
    with pytest.raises(
        UserError, match="a gradient was not finite in step 4; lower optim.learning_rate"
    ):
        losses(step, small, 1)
    same = all(torch.equal(a, b) for a, b in zip(step.model.parameters(), before, strict=True))
    assert same == fused, "a fused optimiser leaves the parameters alone"


def test_nothing_that_is_not_finite_is_saved(tiny: Records, world: World, tmp_path: Path) -> None:
    config = RunConfig(
        global_batch=32, optim=OptimConfig(learning_rate=1000, fused=False), step=StepConfig()
    )
    with pytest.raises(UserError, match="was not finite in step [1-7];"):
        fit(
            override(config, {"optim.schedule": "constant"}, ""),
            tiny,
            world,
            tmp_path,
            resume=False,
            say=print,
        )
    assert not (tmp_path / "checkpoints").exists() and not (tmp_path / "model.safetensors").exists()


def test_a_checkpoint_refuses_moments_that_overflowed(
    tiny: Records, world: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Finite gradients whose squares are not: no loss tells, the optimiser's state does."""
    read = TrainStep.read_training

    def overflows(step: TrainStep) -> Any:
        step.optimizer.state[step.model.fc2.bias]["exp_avg_sq"].fill_(float("inf"))
        return read(step)

    monkeypatch.setattr(TrainStep, "read_training", overflows)
    with pytest.raises(UserError, match="fc2.bias/exp_avg_sq is not finite after step 7"):
        fit(RunConfig(global_batch=32), tiny, world, tmp_path, resume=False, say=print)
    assert not (tmp_path / "checkpoints").exists()


def test_fp16_skips_what_overflows_and_counts_it(small: Records, world: World) -> None:
    step = make_step(world, precision="fp16")
    losses(step, small, 3)
    before = [p.detach().clone() for p in step.model.parameters()]
    spoil(step, {0})
    batch = step._static
    step.train(batch)
    assert all(torch.equal(a, b) for a, b in zip(step.model.parameters(), before, strict=True))
    log = step.read_training()
    assert log.num_skipped == 1 and log.num_samples == 32
    assert float(step.scaler.state_dict()["scale"]) == 65536 / 2
    step.train(batch)
    assert step.read_training().num_skipped == 0
    assert not torch.equal(next(step.model.parameters()), before[0])


def test_an_epoch_without_a_finite_loss_ends_the_run(small: Records, world: World) -> None:
    """Even in fp16, and in fewer steps than may be skipped in a row."""
    step = make_step(world, precision="fp16")
    step.model.register_forward_hook(lambda module, inputs, output: output * float("inf"))
    with pytest.raises(UserError, match="the loss was not finite in any step of the epoch;"):
        losses(step, small, 1)


def test_fp16_trains_five_steps_as_fp32(small: Records, world: World) -> None:
    wanted, got = (losses(make_step(world, precision=name), small, 5) for name in ("fp32", "fp16"))
    assert got == pytest.approx(wanted, rel=0.02) and got[-1] < 0.95 * got[0]


def test_too_many_skipped_steps_in_a_row_end_the_run(
    tiny: Records, world: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Over the end of an epoch, which has 28 steps; and where a run goes on from there."""
    bad = {1, *range(10, 100)}
    keep = sessions.effective_config

    def with_fp16(config: RunConfig, records: Records, world: World) -> tuple[RunConfig, list[str]]:
        effective, notes = keep(config, records, world)
        return override(effective, {"step.precision": "fp16"}, "test"), notes

    def spoiled(*given: Any) -> Session:
        opened = open_session(*given)
        spoil(opened.step, bad)
        return opened

    monkeypatch.setattr(sessions, "effective_config", with_fp16)
    monkeypatch.setattr(trainer, "open_session", spoiled)
    sentence = rf"overflowed in {MAX_SKIPPED} steps in a row, the last of them step 30;"
    for resume in (False, True):
        with pytest.raises(UserError, match=sentence):
            fit(
                RunConfig(global_batch=8, epochs=9),
                tiny,
                world,
                tmp_path,
                resume=resume,
                say=print,
            )
        assert sorted(p.name for p in (tmp_path / "checkpoints").iterdir()) == ["step-000000028"]
        bad = set(range(100))


def test_what_cannot_be_captured_runs_eagerly_and_says_why(
    tiny: Records, world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Here torch has no CUDA graphs, or there is no GPU: a real failure."""
    if torch.cuda.is_available():
        pytest.skip("there is a GPU here, so capture works")
    wanted = trained(session(tiny, world, {}))
    keep = sessions.effective_config
    monkeypatch.setattr(sessions, "effective_config", lambda *given: (given[0], keep(*given)[1]))
    opened = session(tiny, world, {"step.cuda_graphs": True})
    assert not opened.effective["cuda_graphs"]
    assert any(
        note.startswith("CUDA graphs are not used: ") and "runs eagerly" in note
        for note in opened.notes
    )
    assert_same(trained(opened), wanted)


def test_a_failure_in_the_middle_of_a_step_leaves_nothing_behind(
    small: Records, world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Breaks(Graph):
        def __init__(self, work: Any, pool: Any) -> None:
            spoil_backward(
                broken[0], RuntimeError("operation not permitted\nwhen stream is capturing")
            )
            work()

    broken: list[TrainStep] = []
    for precision in ("bf16", "fp16"):
        cold, step = (make_step(world, precision=precision) for _ in range(2))
        broken[:] = [step]
        step._config = override(
            RunConfig(step=step._config.step, optim=step._config.optim, epochs=1), {}, ""
        )
        step._config = override(step._config, {"step.cuda_graphs": True}, "")
        monkeypatch.setattr(step_module, "Graph", Breaks)
        step.prepare()
        assert step.capture_failure == "RuntimeError: operation not permitted"
        assert losses(step, small, 2) == losses(cold, small, 2)


def spoil_backward(step: TrainStep, error: Exception) -> None:
    def fails(grad: torch.Tensor) -> torch.Tensor:
        hook.remove()
        raise error

    hook = step.model.conv2.weight.register_hook(fails)


TWO_RANKS = """
import sys, torch
from engine.train import step
from engine.config import RunConfig, override
from engine.errors import exit_on_user_error
from engine.data.records import open_records
from engine.train import session as sessions
from engine.host import end_rank
from engine.world import start_world
from tests.test_launches import spoil_backward

class Breaks:
    pool = None
    def __init__(self, work, pool):
        if world.rank == 1:
            spoil_backward(opened[0], RuntimeError("rank 1 is odd"))
            work()  # fails before its all-reduce; captured, the other rank's would not run, either
    def reset(self):
        pass

opened = []
make = step.TrainStep.__init__
step.TrainStep.__init__ = lambda self, *given: (opened.append(self), make(self, *given))[1]
keep = sessions.effective_config
with start_world("cpu") as world:
    records = open_records(sys.argv[1])
    found = []
    for graphs in (False, True):
        opened.clear()
        step.Graph = Breaks
        sessions.effective_config = lambda *given: (given[0], keep(*given)[1])
        settings = {"step.cuda_graphs": graphs, "global_batch": 32, "data.feed": "resident"}
        session = sessions.open_session(override(RunConfig(), settings, ""), records, world)
        why = "rank 1: RuntimeError: rank 1 is odd" if graphs else ""
        assert session.step.capture_failure == why
        list(session.step.train_epoch(session.feed, 0))
        found.append(session.step.read_training().loss)
        session.close()
    if world.rank == 0:
        print(found[0], found[1], session.notes)
end_rank()
"""


@pytest.mark.slow
def test_ranks_agree_on_the_way_back(tiny_dir: Path, command: Command, tmp_path: Path) -> None:
    """Rank 1 fails within the backward; both go on eagerly, as if nothing had been tried."""
    (tmp_path / "two.py").write_text(TWO_RANKS)
    done = command(
        "torchrun",
        "--standalone",
        "--nproc-per-node=2",
        tmp_path / "two.py",
        tiny_dir,
        PYTHONPATH=".",
    )
    assert done.returncode == 0, done.stderr
    first, second, notes = done.stdout.split(maxsplit=2)
    assert float(second) == pytest.approx(float(first), rel=1e-6)
    assert (
        "CUDA graphs are not used: rank 1: RuntimeError: rank 1 is odd; the same step runs eagerly"
        in notes
    )
