"""Trackers show what metrics.jsonl and report.json say, once, and never end a training."""

import json
import shutil
import socket
import tomllib
from collections.abc import Iterator
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner

from engine import run
from engine.config import RunConfig, flatten
from engine.config_text import config_of, to_toml
from engine.data.records import Records
from engine.report import RunReport
from engine.stop import STOP
from engine.train.checkpoint import checkpoints
from engine.train.trackers import PROJECT, SUMMARY
from engine.train.trainer import fit
from engine.world import World
from tests.conftest import Command
from tests.test_members import sweep_of
from tests.test_members import train as train_sweep
from tests.test_resume import CONFIG, assert_same, quiet, stop_after, whole

__all__ = ["stop_after", "whole"]
TIMED = ("train_s", "samples_per_s")


@dataclass
class Shown:
    """What a tracker's own reader finds of a run."""

    curves: dict[str, list[tuple[int, float]]]
    settings: dict[str, Any]
    status: str


@pytest.fixture(autouse=True)
def store(tmp_path: Path) -> Iterator[Path]:
    """MLflow's; and nothing is sent anywhere."""
    folder = tmp_path / "mlflow"
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("MLFLOW_TRACKING_URI", folder.as_uri())
        patch.setenv("MLFLOW_ALLOW_FILE_STORE", "true")
        patch.setenv("DO_NOT_TRACK", "true")
        patch.setenv("TRACKIO_DIR", str(tmp_path / "trackio"))
        yield folder


def shown_by_tensorboard(run: Path) -> Shown:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
    from tensorboard.plugins.hparams.plugin_data_pb2 import HParamsPluginData

    found = EventAccumulator(str(run / "tensorboard"))
    found.Reload()
    tags = found.Tags()["scalars"]
    curves = {tag: [(each.step, each.value) for each in found.Scalars(tag)] for tag in tags}
    parts = found.PluginTagToContent("hparams")
    start = HParamsPluginData.FromString(parts["_hparams_/session_start_info"])
    values = start.session_start_info.hparams
    settings = {name: getattr(each, each.WhichOneof("kind")) for name, each in values.items()}
    status = "FINISHED" if "_hparams_/session_end_info" in parts else "RUNNING"
    return Shown(curves, settings, status)


def mlflow_runs() -> dict[str, Any]:
    """By their names."""
    import mlflow

    client = mlflow.MlflowClient()
    experiment = client.get_experiment_by_name(PROJECT)
    assert experiment
    return {each.info.run_name: each for each in client.search_runs([experiment.experiment_id])}


def shown_by_mlflow(run: Path) -> Shown:
    import mlflow

    found = mlflow_runs()[name_of(run)]
    client = mlflow.MlflowClient()
    histories = {n: client.get_metric_history(found.info.run_id, n) for n in found.data.metrics}
    curves = {name: [(p.step, p.value) for p in points] for name, points in histories.items()}
    return Shown(curves, found.data.params, found.info.status)


def shown_by_trackio(run: Path) -> Shown:
    from trackio.sqlite_storage import SQLiteStorage

    curves: dict[str, list[tuple[int, float]]] = {}
    for log in SQLiteStorage.get_logs(PROJECT, name_of(run)):
        for name in log.keys() - {"step", "timestamp"}:
            curves.setdefault(name, []).append((log["step"], log[name]))
    found = SQLiteStorage.get_run_config(PROJECT, name_of(run))
    assert found
    settings = {name: value for name, value in found.items() if not name.startswith("_")}
    return Shown(curves, settings, "FINISHED")


READERS = {
    "tensorboard": shown_by_tensorboard,
    "mlflow": shown_by_mlflow,
    "trackio": shown_by_trackio,
}


def name_of(run: Path) -> str:
    return f"{run.name}-{(run / 'track_id').read_text()[:6]}"


def trained(records: Records, world: World, out: Path, track: tuple[Any, ...], **more: Any) -> None:
    out.mkdir(exist_ok=True)
    settings = {"resume": False, "say": quiet} | more
    fit(replace(CONFIG, track=track), records, world, out, **settings)


@pytest.mark.parametrize("name", READERS)
def test_a_tracker_shows_a_resumed_run_once_under_the_names_of_its_files(
    name: Any,
    tiny: Records,
    world: World,
    stop_after: Any,
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
) -> None:
    """It goes on before an epoch that the tracker has already."""
    pytest.importorskip(name)
    out = tmp_path / "run"
    stop_after(33)
    trained(tiny, world, out, (name,))
    assert name != "mlflow" or shown_by_mlflow(out).status == "KILLED"
    for newer in checkpoints(out)[:-1]:
        shutil.rmtree(newer)
    monkeypatch.undo()
    monkeypatch.setattr(STOP, "number", 0)
    trained(tiny, world, out, (name,), resume=True)
    shown = READERS[name](out)
    lines = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    for line in lines:
        line["num_steps"] = line.pop("step")
    found = json.loads((out / "report.json").read_text())
    final = {f"report/{key}": found[key] for key in SUMMARY if found[key] is not None}
    assert {"report/test_accuracy_fraction", "report/num_parameters"} <= set(final)
    assert set(shown.curves) == set(lines[0]) | set(final) and shown.status == "FINISHED"
    for tag, points in shown.curves.items():
        if tag in final:
            assert points == [(3, pytest.approx(final[tag], rel=1e-6))], tag
            continue
        assert [step for step, _ in points] == [1, 2, 3], tag
        is_first_time = tag in TIMED and name != "tensorboard"  # which it keeps
        for line, (_, value) in zip(lines, points, strict=True):
            if not (is_first_time and line["epoch"] == 2):
                assert value == pytest.approx(line[tag], rel=1e-6), tag
    settings = flatten(tomllib.loads((out / "config.toml").read_text()))
    settings |= {"kernels": "", "track": name}
    as_shown = {key: str(value) if name == "mlflow" else value for key, value in settings.items()}
    assert shown.settings == as_shown


def test_the_final_figures_are_the_numbers_of_the_report() -> None:
    assert set(SUMMARY) <= {field.name for field in fields(RunReport)}
    assert {"train_s", "test_loss", "gpu_energy_j"} <= set(SUMMARY)
    assert not {"format", "status", "config", "segments"} & set(SUMMARY)


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
@pytest.mark.parametrize("name", ["tensorboard", "mlflow"])
def test_a_tracker_that_fails_amid_training_is_said_once_and_costs_nothing(
    name: Any, tiny: Records, world: World, whole: Path, store: Path, tmp_path: Path
) -> None:
    lines: list[str] = []
    folder = {"tensorboard": tmp_path / "run" / "tensorboard", "mlflow": store}[name]

    def say(line: str) -> None:
        lines.append(line)
        if line.startswith("epoch   1/3"):
            folder.rename(tmp_path / "gone")

    trained(tiny, world, tmp_path / "run", (name,), say=say)
    assert_same(tmp_path / "run", whole)
    said = [line for line in lines if "--track" in line]
    assert len(said) == 1 and f"note: --track {name}: left out, training goes on: " in said[0], said


def test_each_member_of_a_sweep_is_a_run_of_its_own(tiny_dir: Path, tmp_path: Path) -> None:
    sweep = sweep_of(tiny_dir, ("seed=1..2",), {"track": "mlflow", "epochs": 1})
    assert train_sweep(sweep, tmp_path / "sweep") == 0
    folders = [tmp_path / "sweep" / member.folder for member in sweep.members]
    assert set(mlflow_runs()) == set(map(name_of, folders))
    shown = [shown_by_mlflow(folder) for folder in folders]
    assert [each.settings["seed"] for each in shown] == ["1", "2"]
    assert [each.curves["epoch"] for each in shown] == [[(1, 1.0)]] * 2


def test_a_missing_package_is_said_before_training(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """A folder of its name, such as wandb leaves, is none."""
    (tmp_path / "wandb").mkdir()
    monkeypatch.syspath_prepend(tmp_path)
    out = tmp_path / "out"
    try:
        import wandb.sdk  # noqa: F401
    except ImportError:
        done = CliRunner().invoke(run.main, ["--track", "tensorboard,wandb", "--out", str(out)])
        assert done.exit_code == 2 and not out.exists()
        assert done.stderr.count("\n") == 1 and "--track wandb: the package" in done.stderr
        assert "pip install wandb, or leave it out" in done.stderr
    done = CliRunner().invoke(run.main, ["--track", "clearml", "--out", str(out)])
    assert done.exit_code == 2 and "choose from all, tensorboard, wandb" in done.stderr


def test_a_run_of_an_earlier_version_keeps_its_tensorboard() -> None:
    text = to_toml(RunConfig()).replace("track = []", "tensorboard = true")
    assert config_of(text, "").track == ("tensorboard",)
    assert config_of(text.replace("= true", "= false", 1), "").track == ()


@pytest.mark.slow
def test_one_rank_tracks_and_none_waits_for_a_server_that_never_answers(
    tiny_dir: Path, command: Command, tmp_path: Path
) -> None:
    """Half the time-out before the first step and after the last, and the process ends."""
    torchrun = ("torchrun", "--standalone", "--nproc-per-node=2", "-m", "engine.run")
    flags = ("--data", tiny_dir, "--epochs", 1, "--batch-size", 32, "--device", "cpu")
    flags += ("--timeout", 10, "--track", "mlflow,tensorboard", "--out", tmp_path / "out")
    with socket.create_server(("127.0.0.1", 0)) as server:  # takes connections, says nothing
        address = f"http://127.0.0.1:{server.getsockname()[1]}"
        done = command(*torchrun, *flags, MLFLOW_TRACKING_URI=address)
    assert done.returncode == 0, done.stderr
    said = [line for line in done.stdout.splitlines() if "--track" in line]
    assert said == ["note: --track mlflow: left out, training goes on: it does not answer"]
    assert len(list((tmp_path / "out" / "tensorboard").iterdir())) == 1
    assert len(shown_by_tensorboard(tmp_path / "out").curves["val_loss"]) == 1
