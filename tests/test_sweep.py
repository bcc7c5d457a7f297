"""What a sweep is: its axes, its members, its file, and what is refused; nothing is trained."""

from pathlib import Path
from typing import Any

import pytest

from engine.config import RunConfig, override
from engine.errors import UserError
from engine.report import environment
from engine.run import _axes
from engine.train.sweep import (
    Axis,
    MemberResult,
    Setting,
    Sweep,
    SweepResult,
    parse_sweeps,
    ranked,
    read_sweep,
    write_sweep,
)
from tests.conftest import Command, assert_refused


@pytest.mark.parametrize(
    ("text", "values"),
    [
        ("seed=1..4", (1, 2, 3, 4)),
        ("seed = 7", (7,)),
        ("optim.learning_rate=0.003,.01, 1e-1", (0.003, 0.01, 0.1)),
        ("optim.schedule=linear,one_cycle", ("linear", "one_cycle")),
        ('optim.batch_ramp=["32x1,64x1", "64x2"]', ("32x1,64x1", "64x2")),
        ("optim.fused=true,false", (True, False)),
    ],
)
def test_values_are_tomls_and_ranges(text: str, values: tuple[Any, ...]) -> None:
    (axis,) = parse_sweeps([text])
    assert axis == Axis(text.partition("=")[0].strip(), values)
    assert list(map(type, axis.values)) == list(map(type, values))


def test_members_are_every_combination() -> None:
    sweep = Sweep.of(
        RunConfig(epochs=3), parse_sweeps(["optim.learning_rate=0.1,0.2", "seed=1..3"])
    )
    found = [(m.number, m.config.optim.learning_rate, m.config.seed) for m in sweep.members]
    assert found == [(1, 0.1, 1), (2, 0.1, 2), (3, 0.1, 3), (4, 0.2, 1), (5, 0.2, 2), (6, 0.2, 3)]
    assert all(member.config.epochs == 3 for member in sweep.members)
    assert sweep.members[4].folder == "005_learning_rate=0.2_seed=2"


def test_folders_are_names_whatever_a_value_holds() -> None:
    axes = parse_sweeps(['optim.batch_ramp=["../../x", "é /\\u0007"]'])
    names = [member.folder for member in Sweep.of(RunConfig(), axes).members]
    assert names == ["001_batch_ramp=.._.._x", "002_batch_ramp=____x07"]
    long = Axis("optim.batch_ramp", ("1x1," * 400,))
    assert len(Sweep.of(RunConfig(), (long,)).members[0].folder) == 100


@pytest.mark.parametrize(
    ("sweeps", "texts"),
    [
        (["optim.lr=1,2"], ["optim.lr: unknown setting", "choose from"]),
        (["optim=1"], ["optim: is a table"]),
        (["seed=1..10000"], ["makes 10,000 members, a sweep has at most 256"]),
        (["seed=1..100", "epochs=1..100"], ["--sweep: makes 10,000 members"]),
        (["optim.learning_rate=0.1,-1"], ["optim.learning_rate is -1.0; give a value from 0"]),
        (["optim.name=adam,sgd"], ["optim.name: is 'sgd'; choose one of adam, adamw"]),
        (["seed"], ["has no '='"]),
        (["seed=1,,2"], ["a value is missing"]),
        (["seed="], ["a value is missing"]),
        (["seed=4..1"], ["runs backwards"]),
        (["seed=1,2", "seed=3"], ["swept twice"]),
        (["seed=1,2,1"], ["members 1 and 3 are the same training"]),
        (["data.feed=resident,loader"], ["not what is trained; set it for all"]),
        (["step.canonical=2,4"], ["start a run for each value"]),
        (["model.name=own.py:Net,fast"], ["a class of your own is of all members"]),
        (["global_batch=32,100000"], ["100000 is larger than the train split"]),
    ],
)
def test_bad_sweeps_are_one_line_and_leave_nothing(
    sweeps: list[str], texts: list[str], small_dir: Path, command: Command, tmp_path: Path
) -> None:
    words = [word for sweep in sweeps for word in ("--sweep", sweep)]
    line = ("python", "-m", "engine.run", "--data", small_dir, "--device", "cpu")
    assert_refused(command(*line, "--out", tmp_path / "out", *words), *texts)
    assert list(tmp_path.iterdir()) == []


def test_canonical_training_is_for_one_run() -> None:
    with pytest.raises(UserError, match=r"step\.canonical fixes the arithmetic"):
        Sweep.of(override(RunConfig(), {"step.canonical": 4}, ""), parse_sweeps(["seed=1,2"]))


def test_a_sweep_is_one_process_and_its_folder_one_sweep(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="--sweep: members train in one process; start it without"):
        _axes(("seed=1,2",), None, 2)
    assert _axes((), None, 2) == ()
    sweep = Sweep.of(RunConfig(), parse_sweeps(["seed=1..3"]))
    write_sweep(tmp_path, sweep)
    assert _axes((), tmp_path, 1) == _axes(("seed=1,2,3",), tmp_path, 1) == sweep.axes
    with pytest.raises(UserError, match=r"holds another sweep, .*\(seed\); leave out --sweep"):
        _axes(("seed=1..4",), tmp_path, 1)
    (tmp_path / "sweep.toml").rename(tmp_path / "config.toml")
    with pytest.raises(UserError, match="holds a run, no sweep"):
        _axes(("seed=1..3",), tmp_path, 1)


def test_the_file_gives_the_sweep_back(tmp_path: Path) -> None:
    config = override(RunConfig(), {"epochs": 7, "kernels": "adamw"}, "")
    axes = parse_sweeps(["optim.learning_rate=0.1,0.2", "optim.name=adam,adamw"])
    write_sweep(tmp_path, Sweep.of(config, axes))
    assert read_sweep(tmp_path) == (config, axes)
    file = tmp_path / "sweep.toml"
    for damaged in (
        "",
        "sweep = 1\n",
        "epochs = 7\n[sweep]\nseed = 1\n",
        "[",
        file.read_text()[:-9],
    ):
        file.write_text(damaged)
        with pytest.raises(UserError, match=r"sweep\.toml: cannot be read"):
            read_sweep(tmp_path)


def test_members_are_ranked_by_validation_those_without_last() -> None:
    accuracies = (0.0, None, 0.5, 0.25)
    members = [
        MemberResult(
            number=number,
            folder="",
            settings=[],
            status="finished",
            num_epochs=1,
            train_s=1.0,
            val_accuracy_fraction=accuracy,
        )
        for number, accuracy in enumerate(accuracies)
    ]
    facts = environment(num_threads=1, allocator="", gpu={})
    result = SweepResult(
        status="finished",
        environment=facts,
        dataset_fingerprint="",
        launches="",
        wall_s=1.0,
        members=members,
        votes=[],
    )
    assert [member.number for member in ranked(result)] == [2, 3, 0, 1]


def test_a_setting_says_no_control_character() -> None:
    setting = Setting(name="optim.name", value="\x1b[31m")
    assert str(setting) == "name=\\x1b[31m"
