"""Matrices are read strictly, run in turn, and survive cells that fail; the children are real."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner

from engine.config import RECIPES, DataConfig, RunConfig, override
from engine.errors import UserError
from engine.host import ROOT, num_cpus
from tests.conftest import run_configs
from tools import profile
from tools.measure.matrix import Cell, read_cells
from tools.measure.results import Published, read_profile
from tools.measure.runner import Run, in_child, in_turn
from tools.report.tables import cells_frame

LADDER = """
title = "T"
batch = 64
repetitions = 3
set = { epochs = 2 }
rung = [
  { name = "a", set = { "optim.fused" = false } },
  { name = "b", set = { model.name = "baseline" }, batches = [8, 16] },
  { name = "c", set = { step.precision = "bf16" }, base = "a", ranks = [1, 2] },
  { name = "d", set = {}, accuracy = true, repetitions = 2 },
]
"""
AXES = """
steps = 7
accuracy = true
set = { model.name = "baseline" }
axes = { batch = [8, 16], ranks = [1, 4], "step.precision" = ["fp32", "bf16"] }
[[published]]
axes = { batch = 16, ranks = 4, "step.precision" = "fp32" }
gpu = "P100 x 4"
train_s = 45
source = "S"
"""


def cells_of(text: str, tmp_path: Path) -> tuple[str, list[Cell]]:
    file = tmp_path / "m.toml"
    file.write_text(text)
    return read_cells([file])


def test_rungs_add_up(tmp_path: Path) -> None:
    title, cells = cells_of(LADDER, tmp_path)
    assert title == "T" and [cell.id for cell in cells] == [
        "c000",
        "c001",
        "c002",
        "c003",
        "c004",
        "c005",
    ]
    assert [cell.name for cell in cells] == [
        "a",
        "b, batch 8",
        "b, batch 16",
        "c, ranks 1",
        "c, ranks 2",
        "d",
    ]
    a, b, b16, c, c2, d = cells
    plain = {"epochs": 2, "optim.fused": False}
    assert a.settings == plain | {"global_batch": 64}
    assert b.settings == plain | {"model.name": "baseline", "global_batch": 8} and b16.axes == {
        "batch": 16,
        "ranks": 1,
    }
    assert (
        c.settings == plain | {"step.precision": "bf16", "global_batch": 64}
        and c2.settings["global_batch"] == 128
    )
    assert (
        d.settings == c.settings
        and d.accuracy
        and not a.accuracy
        and (a.repetitions, d.repetitions) == (3, 2)
    )
    assert (b16.rung, b16.base) == ("b", "") and (c2.rung, c2.base) == ("c", "a")
    assert [cell.ladder for cell in cells] == [True, True, True, False, False, False]
    assert [cell.num_threads for cell in cells] == [0, 0, 0, 1, 1, 0], (
        "1 rank has the threads of those beside it"
    )


def test_a_rung_of_a_recipe_is_that_recipe(tmp_path: Path) -> None:
    text = 'set = { seed = 3 }\n[[rung]]\nname = "a"\nset = { epochs = 9 }\n'
    text += '[[rung]]\nname = "b"\nrecipe = "study"\nset = { "data.feed" = "resident" }\n'
    _, (_, cell) = cells_of(text, tmp_path)
    wanted = replace(RECIPES["study"], seed=3, data=DataConfig(feed="resident"))
    assert override(RunConfig(), cell.settings, "test") == wanted and cell.axes["batch"] == 64
    with pytest.raises(UserError, match="there is no recipe 'none'"):
        cells_of(text.replace('"study"', '"none"'), tmp_path)


def test_axes_are_a_full_product(tmp_path: Path) -> None:
    title, cells = cells_of(AXES, tmp_path)
    assert title == "m" and len({json.dumps(cell.axes) for cell in cells}) == 8 == len(cells)
    last = cells[-1]
    assert last.name == "batch 16, ranks 4, step.precision bf16" and (
        last.num_steps,
        last.repetitions,
    ) == (7, 1)
    assert last.settings == {"model.name": "baseline", "step.precision": "bf16", "global_batch": 64}
    assert all(cell.accuracy and cell.num_threads == 1 and not cell.ladder for cell in cells)
    published = [cell.published for cell in cells if cell.published]
    assert published == [cells[6].published] == [Published(gpu="P100 x 4", train_s=45, source="S")]


@pytest.mark.parametrize(
    ("old", "new", "told"),
    [
        ("batch = 64", "batches = 64", "there is no key batches; here are"),
        ("batch = 64", "batch = 0", "batch: is 0; give a whole number from 1"),
        ("repetitions = 3", "repetitions = true", "give a value of type int"),
        ("repetitions = 3", "repetitions = 0", "repetitions: is 0"),
        ("epochs = 2", "epoch = 2", "unknown setting"),
        ("epochs = 2", "global_batch = 2", "give batch, samples a rank"),
        ("false", "0", "give a value of type bool"),
        ('base = "a"', 'base = "d"', "base = 'd' is no rung before it"),
        ('name = "d"', 'name = "a"', "rung 'a': is there twice"),
        ('name = "d"', 'nam = "d"', "there is no key nam"),
        ("set = {}, ", "", "lacks set"),
        ("batches = [8, 16]", "batches = []", "give a list of values"),
        ("batches = [8, 16]", 'batches = ["8"]', "give a whole number"),
        ("rung = [", "axes = {}\nrung = [", "wants either rungs or axes"),
        ("axes = { batch = [8, 16]", "axes = { batch = 8", "batch is 8; give a list"),
        ('"bf16"]', '"int4"]', "choose one of fp32"),
        ("axes = { batch = 16, ranks = 4,", "axes = { batch = 32, ranks = 4,", "fit 0 cells"),
        ("axes = { batch = 16, ranks = 4,", "axes = { batch = 16,", "fit 2 cells"),
        ("train_s = 45", 'train_s = "45"', "give a value of type float"),
        ('gpu = "P100 x 4"', "", "lacks gpu"),
        (
            "[[published]]",
            f"[[published]]{AXES.partition('[[published]]')[2]}[[published]]",
            "no figures yet",
        ),
    ],
)
def test_what_is_no_matrix_is_refused(old: str, new: str, told: str, tmp_path: Path) -> None:
    text = LADDER if old in LADDER else AXES
    assert text.count(old) == 1, old
    with pytest.raises(UserError, match=r"m\.toml") as refused:
        cells_of(text.replace(old, new), tmp_path)
    assert told in str(refused.value)


def test_the_committed_files_are_read() -> None:
    files = sorted((ROOT / "bench_configs").glob("*.toml"))
    assert {path.stem for path in run_configs()} == {"baseline", "rung_bf16", "rung_eager_fp32"}
    sizes = {path.stem: len(read_cells([path])[1]) for path in files}
    assert (
        sizes["baseline"] == 1
        and sizes["ladder_h100"] > 20
        and sizes["study_ddp"] == sizes["study_amp"] == 24
    )
    (told,) = [
        cell
        for cell in read_cells([ROOT / "bench_configs" / "study_ddp.toml"])[1]
        if cell.published
    ]
    assert told.axes == {"batch": 64, "ranks": 4} and told.settings["global_batch"] == 256


def test_cells_are_measured_in_turn(tmp_path: Path) -> None:
    a, b, c = (
        Cell(name=name, axes={}, settings={}, repetitions=n)
        for name, n in (("a", 3), ("b", 1), ("c", 2))
    )
    assert [(cell.name, n) for cell, n in in_turn([a, b, c])] == [
        ("a", 0), ("b", 0), ("c", 0), ("a", 1), ("c", 1), ("a", 2)
    ]  # fmt: skip


def test_a_machine_has_its_limits() -> None:
    cell = Cell(name="", axes={"batch": 1, "ranks": 1000}, settings={})
    assert cell.not_measured(2) == "needs 1000 GPUs, there are 2"
    num_cores = num_cpus()
    assert cell.not_measured(0) == f"needs 1000 GPUs, there are 0, and {num_cores} CPU cores"
    assert not cell.not_measured(1000)


def smoke(tmp_path: Path, small_dir: Path, **changed: Any) -> Run:
    """Two cells of 1 and 2 ranks, one that cannot be, one for another machine."""
    (tmp_path / "s.toml").write_text(
        """
        steps = 2
        [[rung]]
        name = "x"
        set = { data.feed = "resident", epochs = 1 }
        batches = [16]
        ranks = [1, 2]
        accuracy = true
        [[rung]]
        name = "too large"
        set = {}
        batches = [100_000]
        [[rung]]
        name = "too many"
        set = {}
        ranks = [1000]
        """
    )
    title, cells = read_cells([tmp_path / "s.toml"])
    return Run(
        **(
            {"title": title, "cells": cells, "out": tmp_path / "out", "data": str(small_dir)}
            | changed
        )
    )


def test_cells_run_and_one_that_fails_is_told(
    tmp_path: Path, small_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("OMP_NUM_THREADS", "2")
    run = smoke(tmp_path, small_dir, device="cpu")
    words = ("run", tmp_path / "s.toml", "--data", small_dir, "--device", "cpu", "--out", run.out)
    done = CliRunner().invoke(profile.main, [*map(str, words)])
    assert done.exit_code == 1, done.output
    told = done.stdout.splitlines()
    assert "2/3 c001 x, ranks 2: " in told[1] and "samples/s" in told[1] and "speed-up" in told[3]
    assert (
        "c002 too large: failed: exit code 2: a global batch" in told[-2]
        and "profile.csv" in told[-1]
    )
    assert "not measured here: needs 1000 GPUs, there are 0" in done.stdout
    one, two, large, many = read_profile(run.out).cells
    (line,) = two.repetitions
    assert (line.num_ranks, line.global_batch, line.seed) == (2, 32, 42) and line.num_steps == 2
    assert [cell.repetitions[0].facts.num_threads for cell in (one, two)] == [1, 1]
    assert set(line.stage_ms) > {"forward", "all_reduce"} and len(line.confusion.classes) == 8
    assert sum(count for _, _, count in line.confusion.counts) == 48, "the test split, once"
    assert len(line.epochs) == 1 and 0 < line.test_accuracy_fraction <= 1 and line.train_s > 0
    failed = large.repetitions[0].failed
    assert failed.startswith(
        "exit code 2: a global batch of 100000 is larger than the train split of 224 samples"
    )
    assert many.repetitions == [] and many.not_measured.startswith("needs 1000 GPUs")
    frame = cells_frame(read_profile(run.out)).set_index("name")
    assert (
        frame["speedup"].notna().tolist() == [True, True, False, False]
        and frame["efficiency"].iloc[1] < 1.5
    )
    assert [(cell.name, n) for cell, n in run.missing(resume=True)] == [("too large", 0)], (
        "what failed is tried again"
    )
    for changed in ({"data": "elsewhere"}, {"device": "cuda"}):
        assert (
            len(smoke(tmp_path, small_dir, **{"device": "cpu"} | changed).missing(resume=True)) == 3
        ), "not as it would be now"
    (run.out / "cells" / "c000-0.json").write_text("{")
    assert [cell.id for cell, _ in run.missing(resume=True)] == ["c000", "c002"]


def test_a_child_that_does_not_end_is_ended(tmp_path: Path, small_dir: Path) -> None:
    run = smoke(tmp_path, small_dir)
    found = in_child(run.job(run.cells[1], 3), limit_s=0.3)
    assert (found.failed, found.seed) == ("did not end within 0.3 s", 45)


def test_the_command_refuses_in_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refused(*words: object) -> str:
        done = CliRunner().invoke(profile.main, ["run", *map(str, words)])
        assert done.exit_code == 2 and len(done.stderr.splitlines()) == 1, done.output
        return done.stderr

    matrix = ROOT / "bench_configs" / "cpu_ladder.toml"
    assert "leave out --batch-size" in refused(matrix, "--batch-size", 8)
    assert "holds no cells to go on with" in refused(matrix, "--resume", "--out", tmp_path)
    (tmp_path / "x").touch()
    assert "is not empty" in refused(matrix, "--out", tmp_path) and [
        path.name for path in tmp_path.iterdir()
    ] == ["x"]
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert "start it without torchrun" in refused(matrix, "--out", tmp_path / "new")
