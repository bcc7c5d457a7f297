"""tools/predict RUN IMAGES: answers without records, for people and as CSV, or one sentence."""

import csv
import io
import os
import re
import shutil
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from engine.config import DataConfig, RunConfig
from engine.data.given import SourceOptions
from engine.data.inputs import Inputs, open_inputs
from engine.data.pack import PackOptions, pack
from engine.data.records import Records, open_records
from engine.errors import UserError
from engine.train.checkpoint import MODEL
from engine.train.folder import checkpoints
from engine.train.trainer import fit
from engine.train.weights import network_facts
from engine.world import World
from tests.conftest import Command, assert_refused
from tests.glyph_files import Glyphs, glyphs
from tests.test_inputs import png, standard_input
from tools.measure.predictions import Predictions, predict
from tools.report.predictions import csv_text, ground_note, lines

SIDE = 8


def bars(num: int, seed: int = 0) -> Glyphs:
    """A bright bar whose place tells the class, on a dark ground."""
    rng = np.random.default_rng(seed)
    label_N = (np.arange(num) % 3).astype(np.uint8)
    image_NHW = rng.integers(0, 40, (num, SIDE, SIDE)).astype(np.uint8)
    for image_HW, label in zip(image_NHW, label_N, strict=True):
        image_HW[1 + 2 * label : 3 + 2 * label] += 180
    return Glyphs(image_NHW, label_N)


TEST = bars(30, seed=1).by_class()


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run on splits that were given, whose records are gone."""
    folder = tmp_path_factory.mktemp("predictions")
    given = {"train": [bars(240).csv(folder / "a.csv")], "test": [TEST.csv(folder / "b.csv")]}
    pack(given, folder / "records")
    out = folder / "run"
    out.mkdir()
    world = World(rank=0, size=1, device=torch.device("cpu"), stream=None)
    config = RunConfig(global_batch=16, epochs=4, data=DataConfig(path=str(folder / "records")))
    report, _ = fit(
        config, open_records(folder / "records"), world, out, resume=False, say=lambda line: None
    )
    assert report.test_accuracy_fraction == 1.0
    shutil.copytree(folder / "records", folder / "moved")
    shutil.rmtree(folder / "records")
    return out


def unlabelled(image_NP: np.ndarray, places: Sequence[str]) -> Inputs:
    """Images of 28 x 28."""
    no_label_N = np.zeros(0, np.uint8)
    return Inputs(
        "x", len(places), 28, 28, lambda row_M: image_NP[row_M], iter(places), (), no_label_N, []
    )


def rows_of(text: str) -> list[dict[str, str]]:
    return list(csv.DictReader(io.StringIO(text)))


def test_every_source_is_answered_alike_without_the_records(
    run: Path, command: Command, tmp_path: Path
) -> None:
    tree, table = TEST.png(tmp_path / "tree"), TEST.csv(tmp_path / "a.csv")
    files = sorted(tree.glob("*/*.png"))
    wanted = [str(label) for label in TEST.label_N]
    (checkpoint, *_) = checkpoints(run)
    answered = []
    for place, sources in (
        (run, [tree]),
        (run, files),
        (run, [table]),
        (checkpoint, [tree]),
        (run / MODEL, [run.parent / "moved"]),
    ):
        done = command("tools/predict", place, *sources, "--csv")
        assert done.returncode == 0, done.stderr
        rows = rows_of(done.stdout)
        assert [row["label"] for row in rows] == wanted
        answered.append([row["probability"] for row in rows])
        if "true_label" in rows[0]:
            assert [row["true_label"] for row in rows] == wanted
            assert "30 of 30 labels right (100.00%)" in done.stderr
    assert answered[0] == answered[1] == answered[2] == answered[3]
    assert (
        "read as PNG, 30 images of 8 x 8 in the 3 class folders"
        in command("tools/predict", run, tree).stderr
    )


def test_lines_and_rows_say_the_three_likeliest(
    run: Path, command: Command, tmp_path: Path
) -> None:
    picture = tmp_path / "one.png"
    picture.write_bytes(png(TEST.image_NHW[0]))
    (line,) = command("tools/predict", run, picture).stdout.splitlines()
    share = r"\d+\.\d\d%"
    assert re.fullmatch(rf"{picture}: 0 {share}  \([12] {share}, [12] {share}\)", line), line
    with standard_input(png(TEST.image_NHW[0]) + png(TEST.image_NHW[-1])):
        rows = rows_of(command("tools/predict", run, "-", "--csv").stdout)
    assert [row["label"] for row in rows] == ["0", "2"]
    assert [row["image"] for row in rows] == [f"standard input: image {n}" for n in (1, 2)]
    for row in rows:
        assert {row["label"], row["label_2"], row["label_3"]} == {"0", "1", "2"}
        shares = [float(row[name]) for name in ("probability", "probability_2", "probability_3")]
        assert shares == sorted(shares, reverse=True) and sum(shares) == pytest.approx(1, abs=1e-5)


def test_answers_are_written_whole(run: Path, command: Command, tmp_path: Path) -> None:
    tree = TEST.png(tmp_path / "tree")
    done = command("tools/predict", run, tree, "--out", tmp_path / "answers.csv")
    assert done.returncode == 0 and done.stdout == ""
    assert len(rows_of((tmp_path / "answers.csv").read_text())) == 30
    assert_refused(command("tools/predict", run, tree, "--out", tmp_path / "x.png"), "end in .csv")
    assert_refused(command("tools/predict", run, tree, "--out", tmp_path / "no" / "x.csv"), "no f")


def test_negatives_are_found_and_inverted_where_asked(
    run: Path, command: Command, tmp_path: Path
) -> None:
    negative = Glyphs(255 - TEST.image_NHW, TEST.label_N).png(tmp_path / "tree")
    done = command("tools/predict", run, negative)
    said = "note: 30 of 30 images look dark on light, and the network was trained on light on dark;"
    assert f"{said} give --invert\n" in done.stderr
    done = command("tools/predict", run, negative, "--invert")
    assert "note" not in done.stderr and "30 of 30 labels right" in done.stderr
    done = command("tools/predict", run, TEST.png(tmp_path / "plain"), "--invert")
    assert f"{said} leave --invert out\n" in done.stderr


def test_wrong_and_unknown_labels_are_said_and_counted(
    run: Path, command: Command, tmp_path: Path
) -> None:
    labels = np.array([0, 1, 7], np.uint8)
    drawn = Glyphs(np.repeat(TEST.image_NHW[:1], 3, axis=0), labels)
    done = command("tools/predict", run, drawn.csv(tmp_path / "a.csv"))
    said = [line.partition(")")[2] for line in done.stdout.splitlines()]
    assert said == ["", "  labelled 1", "  labelled 7"]
    assert "1 of 3 labels right (33.33%)" in done.stderr
    assert "note: 1 of the 3 labels are no classes of this network ('7')" in done.stderr


@pytest.mark.parametrize(
    ("pixel_mean", "greys", "wanted"),
    [
        (30.0, [230, 20, 20], ""),
        (30.0, [230, 230, 20], "note: 2 of 3 images look dark on light, and .* give --invert"),
        (200.0, [20, 230, 230], ""),
        (200.0, [20, 20, 230], "note: 2 of 3 images look light on dark, and .* give --invert"),
    ],
)
def test_the_ground_that_most_images_have_is_compared(
    pixel_mean: float, greys: list[int], wanted: str, small: Records
) -> None:
    facts = replace(network_facts(RunConfig().model, small), pixel_mean=pixel_mean)
    inputs = unlabelled(np.repeat(np.array(greys, np.uint8)[:, None], 784, axis=1), "abc")
    found = predict(lambda image: torch.zeros(len(image), 8), facts, inputs, invert=False)
    assert re.fullmatch(wanted, ground_note(found, facts, is_inverted=False))


def test_bad_images_are_one_line_and_leave_nothing(
    run: Path, command: Command, tmp_path: Path
) -> None:
    good, bad = tmp_path / "good.png", tmp_path / "bad.png"
    good.write_bytes(png(TEST.image_NHW[0]))
    bad.write_bytes(b"no picture")
    large = tmp_path / "large.png"
    large.write_bytes(png(np.zeros((28, 28), np.uint8)))
    out = ("--out", tmp_path / "a.csv")
    for words, wanted in (
        ([good, bad], "bad.png: is no PNG"),
        ([large], "large.png: holds images of 28 x 28 pixels, but the network takes 8 x 8; scale"),
        ([tmp_path / "no"], "no: cannot be read"),
        ([good, "--export", tmp_path / "w"], "--export: goes without IMAGES"),
    ):
        assert_refused(command("tools/predict", run, *words, *out), wanted)
    with standard_input(b"no picture"):
        assert_refused(command("tools/predict", run, "-", *out), "standard input:1: got the header")
    of_images = "--invert: is about IMAGES, and none are named"
    assert_refused(command("tools/predict", run, "--invert"), of_images)
    assert_refused(command("tools/predict", run, ""), "a path is empty")
    checkpoint = next((run / "checkpoints").glob("step-*"))
    refused = command("tools/predict", run, checkpoint)
    assert_refused(refused, "is no record directory: manifest.json is of a 'glyph-checkpoint'")
    assert_refused(command("tools/predict", tmp_path / "no run", good), "no run")
    assert not (tmp_path / "a.csv").exists()


def test_a_run_of_an_earlier_version_needs_its_records(
    run: Path, command: Command, tmp_path: Path
) -> None:
    old = tmp_path / "old"
    shutil.copytree(run, old)
    save_file(load_file(run / MODEL), old / MODEL)
    tree = TEST.png(tmp_path / "tree")
    said = "does not say its classes (an earlier version wrote it), so the run's own records are"
    assert_refused(command("tools/predict", old, tree), said, "say where with --data")
    moved = run.parent / "moved"
    done = command("tools/predict", old, tree, "--data", moved)
    assert "30 of 30 labels right" in done.stderr
    other = tmp_path / "other"
    pack(TEST.csv(tmp_path / "a.csv"), other, PackOptions())
    assert_refused(command("tools/predict", old, tree, "--data", other), said)
    assert_refused(command("tools/predict", old / MODEL, tree), "name its run's folder")


def test_other_records_are_evaluated(run: Path, command: Command, tmp_path: Path) -> None:
    """A finished run and a checkpoint, on another test set; and its val of its own."""
    wrong = bars(40, seed=2)
    wrong.label_N[:4] = (wrong.label_N[:4] + 1) % 3
    other = tmp_path / "other"
    pack(wrong.csv(tmp_path / "a.csv"), other, PackOptions(split="none"))
    for place in (run, checkpoints(run)[0]):
        done = command("tools/evaluate", place, "--data", other, "--split", "train")
        assert done.returncode == 0, done.stderr
        assert "train split, 40 samples, not of the records trained on; in fp32" in done.stdout
        assert "nothing shows that training did not see images of this train split" in done.stdout
        top1 = next(line for line in done.stdout.splitlines() if line.startswith("top-1"))
        assert "90.00" in top1
        assert re.search(r"class +read as +times", done.stdout)
    assert_refused(command("tools/evaluate", run, "--data", other), "has no split test, but train")


def test_records_of_another_task_are_refused(run: Path, command: Command, tmp_path: Path) -> None:
    for name, image_NHW, label_N, wanted in (
        (
            "new",
            TEST.image_NHW,
            TEST.label_N + 1,
            ("not the network's (more: '3'; missing: '0');", "same 3 classes"),
        ),
        (
            "few",
            TEST.image_NHW,
            TEST.label_N % 2,
            ("not the network's (missing: '2'); name records",),
        ),
        ("size", TEST.image_NHW[:, :4, :4], TEST.label_N, ("4 x 4 pixels, but the network takes",)),
    ):
        drawn = Glyphs(np.ascontiguousarray(image_NHW), label_N)
        pack(drawn.csv(tmp_path / f"{name}.csv"), tmp_path / name)
        assert_refused(command("tools/evaluate", run, "--data", tmp_path / name), *wanted)


def test_texts_that_spreadsheets_would_run_are_guarded(small: Records) -> None:
    """Classes of one character stay as they are, as TMNIST has them."""
    facts = replace(
        network_facts(RunConfig().model, small), classes=["=", "=1+1", "-5", "@x", "a\nb\x1b"]
    )
    places = ["=cmd.png", "b,c.png", "\udcff.png", "-", "e"]
    inputs = unlabelled(np.zeros((5, 784), np.uint8), places)
    found = Predictions(
        answer_NT=np.arange(5)[:, None], probability_NT=np.ones((5, 1), np.float32), num_opposite=0
    )
    rows = rows_of(csv_text(found, facts, inputs))
    assert [row["label"] for row in rows] == ["=", "'=1+1", "-5", "'@x", "a\\nb\\x1b"]
    assert [row["image"] for row in rows] == ["'=cmd.png", "b,c.png", "\\udcff.png", "-", "e"]
    shown = list(lines(found, facts, replace(inputs, places=iter(places))))
    assert shown[4] == "e: a\\nb\\x1b 100.00%" and len(shown) == 5


@pytest.mark.parametrize("layout", ["npz", "idx"])
def test_pixels_that_change_while_they_are_answered_are_refused(
    layout: str, small: Records, tmp_path: Path
) -> None:
    """They come from the file itself, where they lie in it as they are."""
    drawn = glyphs(30)
    paths = [drawn.npz(tmp_path / "a.npz")] if layout == "npz" else drawn.idx(tmp_path)
    facts = replace(network_facts(RunConfig().model, small), height_pixels=8, width_pixels=8)

    def network(image_BHW: torch.Tensor) -> torch.Tensor:
        with paths[0].open("r+b") as file:
            file.seek(-1, os.SEEK_END)
            file.write(b"x")
        return torch.zeros(len(image_BHW), 8)

    with (
        open_inputs(paths, SourceOptions()) as inputs,
        pytest.raises(UserError, match="changed while it was read"),
    ):
        predict(network, facts, inputs, invert=False)


def test_a_network_that_is_broken_is_refused(small: Records) -> None:
    facts = network_facts(RunConfig().model, small)
    inputs = unlabelled(np.zeros((3, 784), np.uint8), "abc")
    with pytest.raises(UserError, match="not finite; train it again"):
        predict(lambda image: torch.full((len(image), 8), torch.nan), facts, inputs, invert=False)
    shares = predict(lambda image: torch.zeros(len(image), 8), facts, inputs, invert=False)
    assert shares.probability_NT.shape == (3, 3) and (shares.probability_NT == 0.125).all()
