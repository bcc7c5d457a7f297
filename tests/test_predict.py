"""tools.predict on runs, records and places of all kinds; images as small as can be."""

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from click.testing import CliRunner, Result
from PIL import Image
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from engine.config import DataConfig, RunConfig
from engine.config_text import load_toml
from engine.data.pack import PackOptions, pack
from engine.data.records import Records, open_records
from engine.data.split import SplitMode
from engine.errors import UserError
from engine.models import make_model
from engine.report import read_report, write_json
from engine.train.session import check_batch
from engine.train.trainer import fit
from engine.world import World
from tests.conftest import CLASSES, glyph_rows, write_csv
from tools import pack_tmnist, predict, profile


def trained(out: Path, records: Path) -> Path:
    """A run of one epoch."""
    data = DataConfig(path=str(records))
    world = World(rank=0, size=1, device=torch.device("cpu"), stream=None)
    out.mkdir()
    config = RunConfig(global_batch=16, epochs=1, data=data)
    fit(config, open_records(records), world, out, resume=False, say=lambda line: None)
    return out


def packed(
    folder: Path, side: int, num: int = 16, split: SplitMode = "random", label: str = "{}"
) -> Path:
    """Records of two classes, `num` images each."""
    rng = np.random.default_rng(side)
    rows = [
        [f"font{n}", label.format(n % 2), *map(str, rng.integers(0, 256, side * side))]
        for n in range(2 * num)
    ]
    records = folder / f"records{side}"
    csv = write_csv(folder / f"{side}.csv", rows, side)
    pack(csv, records, PackOptions(split=split))
    return records


@pytest.fixture(scope="module")
def run(small_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return trained(tmp_path_factory.mktemp("predict") / "run", small_dir)


def call(*words: object) -> Result:
    return CliRunner().invoke(predict.main, [str(word) for word in words])


def refused(done: Result, *texts: str) -> None:
    assert done.exit_code == 2, done.output
    (line,) = done.output.splitlines()
    assert line.startswith("error: "), line
    for text in texts:
        assert text in line


def test_fewer_glyphs_than_cells_are_drawn_once(run: Path, tmp_path: Path) -> None:
    done = call(run, "--out", tmp_path / "p.JPG")
    assert done.exit_code == 0 and "of 48 glyphs right" in done.output
    with Image.open(tmp_path / "p.JPG") as picture:
        assert picture.format == "JPEG" and picture.height == 3 * (56 + 22)


@pytest.mark.parametrize(
    ("out", "text"),
    [
        ("no/x.png", "there is no folder"),
        ("x.foo", "let it end in .png"),
        ("x", "let it end in .png"),
        (".", "is a folder"),
        ("file/x.png", "there is no folder"),
        ("pipe.png", "is no ordinary file"),
    ],
)
def test_a_place_that_cannot_be_written_is_refused_before_the_work(
    out: str, text: str, tmp_path: Path
) -> None:
    """Before the work: the run is not even looked for."""
    (tmp_path / "file").write_bytes(b"")
    (tmp_path / "pipe.png").symlink_to("/dev/null")
    before = sorted(tmp_path.iterdir())
    refused(call(tmp_path / "no run", "--out", tmp_path / out), text)
    sheet = ["--describe", str(tmp_path / "no records"), "--sheet", str(tmp_path / out)]
    refused(CliRunner().invoke(pack_tmnist.main, sheet), text)
    assert sorted(tmp_path.iterdir()) == before


@pytest.mark.parametrize(
    "words",
    [
        ["compare", "no a", "no b"],
        ["report", "no profile"],
        ["feeds"],
        ["trace"],
        ["ensemble"],
        ["run"],
    ],
)
def test_a_folder_that_cannot_be_made_is_refused_before_the_work(
    words: list[str], tmp_path: Path
) -> None:
    (tmp_path / "file").write_bytes(b"")
    out = str(tmp_path / "file" / "out")
    done = CliRunner().invoke(profile.main, [*words, "--out", out])
    refused(done, "cannot be written (Not a directory)")
    if words == ["feeds"]:
        json_file = [*words, "--out", str(tmp_path / "o"), "--json", str(tmp_path)]
        refused(CliRunner().invoke(profile.main, json_file), "is a folder")


def test_a_full_disk_leaves_no_picture(
    run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(self: Image.Image, file: object, format: str) -> None:
        file.write(b"half")  # type: ignore[attr-defined]
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Image.Image, "save", full)
    refused(call(run, "--out", tmp_path / "p.png"), "p.png: cannot be written (No space left")
    assert not list(tmp_path.iterdir())


def test_records_elsewhere_are_named(run: Path, small_dir: Path, tmp_path: Path) -> None:
    moved = tmp_path / "moved"
    shutil.copytree(small_dir, moved)
    assert call(run, "--data", moved, "--out", tmp_path / "p.png").exit_code == 0
    lost = tmp_path / "lost"
    shutil.copytree(run, lost)
    config = (lost / "config.toml").read_text(encoding="utf-8")
    (lost / "config.toml").write_text(
        config.replace(str(small_dir), "/no/records"), encoding="utf-8"
    )
    refused(call(lost, "--out", tmp_path / "q.png"), "/no/records", "--data")
    assert call(lost, "--data", moved, "--out", tmp_path / "q.png").exit_code == 0


def test_other_records_are_refused(run: Path, small_dir: Path, tmp_path: Path) -> None:
    """The same images under swapped labels: as many classes, each answer another."""
    names = {"0": "00", "00": "0"}
    rows = [[font, names.get(label, label), *pixels] for font, label, *pixels in glyph_rows()]
    pack(write_csv(tmp_path / "swapped.csv", rows), tmp_path / "swapped")
    done = call(run, "--data", tmp_path / "swapped", "--out", tmp_path / "p.png")
    refused(
        done, "swapped: holds other records", open_records(small_dir).fingerprint[:16], "--data"
    )
    assert not (tmp_path / "p.png").exists()


def damaged_weights(case: str, file: Path) -> None:
    data = file.read_bytes()
    if case == "missing":
        file.unlink()
    elif case == "folder":
        file.unlink()
        file.mkdir()
    elif case == "shape":
        tensors = load_file(file)
        save_file(tensors | {"fc2.bias": torch.zeros(3)}, file)
    elif case == "name":
        save_file({"other": torch.zeros(3)}, file)
    elif case == "type":
        save_file({name: tensor.half() for name, tensor in load_file(file).items()}, file)
    else:
        file.write_bytes({"empty": b"", "cut": data[:5000], "foreign": b"PK\3\4" * 99}[case])


@pytest.mark.parametrize(
    ("case", "text"),
    [
        ("missing", "holds no model.safetensors"),
        ("folder", "holds no model.safetensors"),
        ("empty", "is damaged"),
        ("cut", "is damaged"),
        ("foreign", "is damaged"),
        ("shape", "another network"),
        ("name", "another network"),
        ("type", "another network"),
    ],
)
def test_weights_that_are_not_the_runs_are_refused(
    case: str, text: str, run: Path, tmp_path: Path
) -> None:
    shutil.copytree(run, tmp_path / "run")
    shutil.rmtree(tmp_path / "run" / "checkpoints")
    damaged_weights(case, tmp_path / "run" / "model.safetensors")
    refused(call(tmp_path / "run", "--out", tmp_path / "p.png"), text, str(tmp_path / "run"))


def test_a_checkpoint_is_shown_and_exported(run: Path, tmp_path: Path) -> None:
    """By its own name, and as the newest of a run that is not finished; whole ones only."""
    shutil.copytree(run, tmp_path / "run")
    report = tmp_path / "run" / "report.json"  # finished, gone on with more epochs, and killed
    report.write_text(report.read_text().replace('"finished"', '"unfinished"'))
    (tmp_path / "run" / "model.safetensors").write_bytes(b"of the earlier end")
    (checkpoint,) = (tmp_path / "run" / "checkpoints").iterdir()
    words = ("--out", tmp_path / "p.png", "--export", tmp_path / "w.safetensors")
    for place in (tmp_path / "run", checkpoint):
        done = call(place, *words)
        assert done.exit_code == 0, done.output
    wanted = load_file(run / "model.safetensors")
    assert load_file(tmp_path / "w.safetensors").keys() == wanted.keys()
    with safe_open(tmp_path / "w.safetensors", "pt") as file:
        facts = file.metadata()
        assert all((file.get_tensor(name) == wanted[name]).all() for name in wanted)
    assert facts["model"] == "fast" and facts["input"] == "uint8 [B, 28, 28]"
    assert json.loads(facts["classes"]) == sorted(CLASSES)
    optim = checkpoint / "optim.safetensors"
    optim.write_bytes(optim.read_bytes()[:-1])
    refused(call(checkpoint, *words), "is no whole checkpoint", "name another")
    refused(call(tmp_path / "run", *words), "holds no checkpoint that verifies")
    refused(call(run, *words[:2], "--export", "/proc/no/w"), "/proc/no/w: cannot be written")


def test_what_is_no_run_is_said(tmp_path: Path) -> None:
    (tmp_path / "sweep.toml").touch()
    wanted = "is a sweep; name the folder of one of its members"
    refused(call(tmp_path), wanted)
    refused(CliRunner().invoke(profile.main, ["plan", "--run", str(tmp_path)]), wanted)
    refused(call(tmp_path / "gone"), "gone: no such file or folder; name the folder of a finished")


@pytest.mark.parametrize("name", ["report.json", "config.toml"])
@pytest.mark.parametrize("data", [None, b"", b"[]", b"\xff\xfe"])
def test_a_run_that_is_incomplete_is_refused(
    name: str, data: bytes | None, run: Path, tmp_path: Path
) -> None:
    shutil.copytree(run, tmp_path / "run")
    if name == "config.toml" and data in (b"", b"[]"):
        data = b"["  # an empty TOML file is a complete one
    (tmp_path / "run" / name).unlink() if data is None else (tmp_path / "run" / name).write_bytes(
        data
    )
    refused(call(tmp_path / "run", "--out", tmp_path / "p.png"), str(tmp_path / "run"))


@pytest.mark.parametrize(
    ("change", "text"),
    [
        ({"dataset_fingerprint": None}, "dataset_fingerprint is missing"),
        ({"format": 2}, "format 2, this engine reads 1"),
        ({"num_steps": "7"}, "num_steps is '7', not a int"),
        ({"environment": {}}, "environment.cpu_name is missing"),
        ({"config": {"kernels": ["sum"]}}, "kernels.0 is 'sum', not one of auto, gather_warp"),
    ],
)
def test_a_report_that_is_none_is_refused(
    change: dict[str, Any], text: str, run: Path, tmp_path: Path
) -> None:
    shutil.copytree(run, tmp_path / "run")
    report = json.loads((run / "report.json").read_bytes()) | change
    kept = {
        name: value for name, value in report.items() if value is not None or name not in change
    }
    (tmp_path / "run" / "report.json").write_text(json.dumps(kept), encoding="utf-8")
    refused(call(tmp_path / "run", "--out", tmp_path / "p.png"), "is no report of a run", text)


def test_a_report_is_read_as_it_was_written(run: Path, small_dir: Path, tmp_path: Path) -> None:
    """Of the largest seed, too, and one of before reports had a format."""
    report = json.loads((run / "report.json").read_bytes())
    report["config"]["seed"] = 2**63 - 1
    del report["format"]
    (tmp_path / "report.json").write_text(json.dumps(report), encoding="utf-8")
    read = read_report(tmp_path)
    written = load_toml(RunConfig(), run / "config.toml")
    assert read.config.data.path == small_dir.name
    assert read.config == replace(written, seed=2**63 - 1, data=DataConfig(path=small_dir.name))
    write_json(read, tmp_path / "report.json")
    assert read_report(tmp_path) == read


def test_records_without_a_test_split_show_the_next_best(tmp_path: Path) -> None:
    records = packed(tmp_path, 8, split="none", label="a class with a long name, number {}")
    out = trained(tmp_path / "run", records)
    done = call(out, "--out", tmp_path / "p.png")
    assert done.exit_code == 0 and "of the train split, for want of a test split" in done.output
    with Image.open(tmp_path / "p.png") as picture:
        assert picture.width > 16 * 100, "cells as wide as the names"


def test_too_small_images_are_refused_before_anything_is_built(tmp_path: Path) -> None:
    records = open_records(packed(tmp_path, 3))
    assert isinstance(records, Records)
    with pytest.raises(UserError, match=r"images of 3 x 3 .* at least 4 x 4"):
        check_batch(RunConfig(global_batch=8), records, 1)
    for height, width in ((3, 28), (28, 3), (1, 1), (0, 4)):
        with pytest.raises(UserError, match=f"images of {height} x {width} "):
            make_model(RunConfig().model, height, width, 2, seed=0)


@pytest.mark.parametrize("side", [4, 5, 6, 7])
def test_small_images_train(side: int, tmp_path: Path) -> None:
    out = trained(tmp_path / "run", packed(tmp_path, side))
    assert json.loads((out / "report.json").read_bytes())["num_steps"] == 1
    if side == 5:
        assert call(out, "--out", tmp_path / "p.png").exit_code == 0
