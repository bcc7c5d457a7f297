"""Other people's data from end to end: scikit-learn's digits, with a test set of their own."""

from pathlib import Path

import numpy as np
import pytest

from engine.data.records import open_records
from engine.report import read_report
from tests.conftest import Command
from tests.glyph_files import Glyphs

NUM_TEST = 360


def test_digits_are_packed_trained_evaluated_and_read(command: Command, tmp_path: Path) -> None:
    """8 x 8 pixels of 0 to 16; the last fifth is the test set."""
    load_digits = pytest.importorskip("sklearn.datasets").load_digits
    digits = load_digits()
    image_NHW = np.minimum(digits.images * 16, 255).astype(np.uint8)
    whole = Glyphs(image_NHW, digits.target.astype(np.uint8))
    parts = {"train": slice(0, -NUM_TEST), "test": slice(-NUM_TEST, None)}
    words: list[object] = []
    for name, rows in parts.items():
        part = Glyphs(whole.image_NHW[rows], whole.label_N[rows])
        words += [f"--{name}", part.npz(tmp_path / f"{name}.npz")]
    records, run = tmp_path / "records", tmp_path / "run"
    assert command("tools/pack_tmnist", *words, records).returncode == 0
    assert open_records(records).given == ("train", "test")

    train = ("--data", records, "--out", run, "--epochs", 8, "--kernels", "off")
    done = command("python", "-m", "engine.run", "--device", "cpu", *train)
    assert done.returncode == 0, done.stderr
    accuracy = read_report(run).test_accuracy_fraction
    assert accuracy and accuracy > 0.9

    done = command("tools/evaluate", run, "--data", records)
    assert f"test split, {NUM_TEST} samples; in fp32" in done.stdout
    tree = Glyphs(whole.image_NHW[parts["test"]], whole.label_N[parts["test"]]).png(tmp_path / "t")
    done = command("tools/predict", run, tree, "--csv")
    right = f"{round(accuracy * NUM_TEST)} of {NUM_TEST} labels right"
    assert right in done.stderr and len(done.stdout.splitlines()) == NUM_TEST + 1
