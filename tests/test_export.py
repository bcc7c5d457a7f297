"""tools/export: files that other libraries run, checked on the whole split, beside a model card."""

import json
import os
import zipfile
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors.torch
import torch
from click.testing import CliRunner, Result
from safetensors import safe_open
from torch import nn

from engine.config import RunConfig
from engine.data.records import Records
from engine.errors import UserError
from engine.train.answers import all_logits
from engine.train.weights import load_network, network_facts, read_facts
from tests.conftest import CLASSES
from tests.test_predict import packed, refused, trained
from tools import export
from tools.measure import exported, forms
from tools.measure.exported import check_form, write_form
from tools.measure.forms import FORMS
from tools.measure.trained import find_weights, known_facts, run_config
from tools.report.card import READING

CPU = torch.device("cpu")
NEEDED = FORMS["onnx"].packages


@pytest.fixture(scope="module")
def run(small_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return trained(tmp_path_factory.mktemp("export") / "run", small_dir)


def call(*words: object) -> Result:
    return CliRunner().invoke(export.main, [str(word) for word in words])


def logits_of(run: Path, records: Records) -> torch.Tensor:
    """What the run's own network gives for the test split."""
    weights = find_weights(run)
    config = run_config(weights)
    network = load_network(config.model, known_facts(weights, config, None), weights.file)
    return all_logits(network, records.split("test").image_NHW, CPU)


def test_weights_go_out_with_a_card(run: Path, small: Records, tmp_path: Path) -> None:
    out = tmp_path / "out"
    done = call(run, "--to", "safetensors", "--out", out)
    assert done.exit_code == 0, done.output
    num = len(small.split("test"))
    assert f"{num} of {num} test images read the same" in done.output
    with safe_open(out / "model.safetensors", "pt") as file:
        facts = file.metadata()
    assert json.loads(facts["classes"]) == sorted(CLASSES)
    assert facts["input"] == "uint8 [B, 28, 28]" and facts["model"] == "fast"
    card = (out / "README.md").read_text(encoding="utf-8")
    right = logits_of(run, small).argmax(1).numpy() == small.split("test").label_N
    assert f"| accuracy on test, as exported | {right.mean():.2%} |" in card
    for text in (small.fingerprint, "## Limits", "trained on", '"é"'):
        assert text in card, card
    assert str(run.parent) not in card, "no folder of the user's"
    before = {path.name for path in out.iterdir()}
    refused(call(run, "--to", "safetensors", "--out", out), f"{out}: exists; give --force")
    assert call(run, "--to", "safetensors", "--out", out, "--force").exit_code == 0
    assert {path.name for path in out.iterdir()} == before
    (out / "notes.txt").touch()
    done = call(run, "--to", "safetensors", "--out", out, "--force")
    refused(done, "holds notes.txt, which is no export's")
    refused(
        call(run, "--to", "safetensors", "--out", "/proc/no/x"), "/proc/no/x: cannot be written"
    )


def test_a_checkpoint_goes_out_beside_it_not_into_it(run: Path, tmp_path: Path) -> None:
    (checkpoint,) = (run / "checkpoints").iterdir()
    before = {path.name for path in checkpoint.iterdir()}
    done = call(checkpoint, "--to", "safetensors")
    assert done.exit_code == 0, done.output
    card = (run / "export" / "README.md").read_text(encoding="utf-8")
    assert f"`{checkpoint.name}`" in card and "by the run's report" not in card
    assert read_facts(run / "export" / "model.safetensors") == read_facts(run / "model.safetensors")
    assert {path.name for path in checkpoint.iterdir()} == before


def test_what_is_missing_is_one_line(
    run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    refused(call(tmp_path, "--to", "safetensors"), "holds no report.json")
    assert "is not one of" in call(run, "--to", "tflite").output
    out = tmp_path / "out"
    other = packed(tmp_path, 28, split="none")
    done = call(trained(tmp_path / "other", other), "--to", "safetensors", "--out", out)
    refused(done, "has no split test, but train")
    refused(call(run, "--to", "safetensors", "--data", other, "--out", out), "holds other records")
    monkeypatch.setattr(forms, "find_spec", lambda name: None if "script" in name else name)
    done = call(run, "--to", "torch", "--to", "onnx", "--out", out)
    refused(done, "--to onnx: onnxscript is not installed; pip install onnxscript")
    monkeypatch.setattr(forms, "find_spec", lambda name: None)
    refused(call(run, "--to", "onnx"), f"are not installed; pip install {' '.join(NEEDED)}")
    assert not out.exists()


def test_a_file_that_answers_otherwise_is_refused(
    run: Path, small: Records, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By logits that are slightly off, or not finite; and then nothing is left."""
    weights = find_weights(run)
    config = run_config(weights)
    facts = known_facts(weights, config, None)
    network, like = (load_network(config.model, facts, weights.file) for _ in range(2))
    path = write_form("safetensors", tmp_path, network, facts)
    wanted_NK = logits_of(run, small)
    split = small.split("test")
    check = check_form("safetensors", path, split, wanted_NK, like)
    assert check.num_same == len(split) and check.largest_difference < 1e-5
    for wrong in (1e-2, float("nan")):
        off_NK = wanted_NK.clone()
        off_NK[3, 2] += wrong * wanted_NK.abs().max()
        with pytest.raises(UserError, match="model.safetensors answers otherwise .* in a logit"):
            check_form("safetensors", path, split, off_NK, like)
    monkeypatch.setattr(exported, "TOLERANCE", -1.0)
    refused(call(run, "--to", "safetensors", "--out", tmp_path / "out"), "answers otherwise")
    assert [each.name for each in tmp_path.iterdir()] == ["model.safetensors"]


class Branching(nn.Module):
    def forward(self, image_BHW: torch.Tensor) -> torch.Tensor:
        flat_BP = image_BHW.float().flatten(1)
        return flat_BP if flat_BP.mean() > 3 else -flat_BP


@pytest.mark.slow
def test_other_libraries_read_the_same(
    run: Path, small: Records, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By the lines that the card shows, for any number of images."""
    forms = ["torch", "safetensors"] + ["onnx"] * all(map(find_spec, NEEDED))
    assert "onnx" in forms or os.environ.get("CI") != "true", "it is in pyproject's group `test`"
    out = tmp_path / "out"
    done = call(run, *(word for name in forms for word in ("--to", name)), "--out", out)
    assert done.exit_code == 0, done.output
    assert len(done.output.splitlines()) == len(forms), "the exporters are quiet"
    card = (out / "README.md").read_text(encoding="utf-8")
    monkeypatch.chdir(out)
    image_NHW = small.split("test").image_NHW
    wanted_NK = logits_of(run, small).numpy()
    for name in forms:
        code = "\n".join(READING[name])
        assert code in card
        for num in (1, 5, len(image_NHW)):
            found = read_as_shown(code, image_NHW[:num])
            if name == "safetensors":
                assert "fc2.bias" in found["weights"]
                continue
            assert found["classes"] == sorted(CLASSES)
            assert np.abs(found["logits"] - wanted_NK[:num]).max() < 1e-4
    with zipfile.ZipFile("model.pt2") as archive:
        samples = [name for name in archive.namelist() if "sample_inputs" in name]
        assert samples and not any(map(archive.read, samples)), "nothing in it is pickled"
        assert b'"use_pickle": true' not in b"".join(map(archive.read, archive.namelist()))
    with pytest.raises(UserError, match=r"--to torch: .* cannot be exported .* --to safetensors"):
        facts = network_facts(RunConfig().model, small)
        write_form("torch", tmp_path, Branching(), facts)
    if "onnx" not in forms:
        pytest.skip(f"without onnx, for want of {', '.join(NEEDED)}; the other files are right")


def read_as_shown(code: str, image_BHW: np.ndarray) -> dict[str, Any]:
    """What the card's lines leave in their variables, logits as an array."""
    names: dict[str, Any] = {"json": json, "torch": torch, "safetensors": safetensors}
    if "onnxruntime" in code:
        names["onnxruntime"] = pytest.importorskip("onnxruntime")
    names["images"] = image_BHW if "onnxruntime" in code else torch.from_numpy(image_BHW)
    exec(code, names)
    if isinstance(names.get("logits"), torch.Tensor):
        names["logits"] = names["logits"].detach().numpy()
    return names
