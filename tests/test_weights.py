"""model.safetensors says what its network takes and answers, in runs and in checkpoints."""

import json
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save, save_file

from engine import __version__
from engine.config import DataConfig, ModelConfig, RunConfig, override
from engine.config_text import with_own_network
from engine.data.records import Records
from engine.errors import UserError
from engine.models import NETWORKS
from engine.report import git_state, read_report
from engine.train.checkpoint import MODEL
from engine.train.folder import checkpoints
from engine.train.trainer import fit
from engine.train.weights import (
    KEY,
    load_network,
    metadata_of,
    network_facts,
    packed,
    plain_metadata,
    read_facts,
)
from engine.world import World
from tests.conftest import CLASSES
from tests.test_models import readme_example
from tools.measure.trained import find_weights, run_config, weights_alone

WEIGHTS = {"a": torch.arange(6.0).reshape(2, 3)}


@pytest.fixture(scope="module")
def run(small: Records, small_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("weights") / "run"
    out.mkdir()
    world = World(rank=0, size=1, device=torch.device("cpu"), stream=None)
    config = RunConfig(global_batch=16, epochs=1, data=DataConfig(path=str(small_dir)))
    fit(config, small, world, out, resume=False, say=lambda line: None)
    return out


def test_a_run_and_its_checkpoints_say_their_network(run: Path, small: Records) -> None:
    facts = read_facts(run / MODEL)
    assert facts and facts == read_report(run).network
    assert facts.classes == sorted(CLASSES)
    assert (facts.height_pixels, facts.width_pixels) == (28, 28)
    assert facts.input.startswith("uint8 [B, H, W]") and facts.scaling == "pixel / 255"
    assert facts.pixel_mean == small.pixel_mean
    assert facts.dataset_fingerprint == small.fingerprint
    assert (facts.version, (facts.commit, facts.dirty)) == (__version__, git_state())
    newest = checkpoints(run)[0]
    assert read_facts(newest / MODEL) == facts
    with safe_open(newest / "optim.safetensors", "pt") as file:
        assert file.metadata() is None
    with safe_open(run / MODEL, "pt") as file:  # as any other program reads it
        assert json.loads(file.metadata()[KEY])["classes"] == facts.classes


def test_the_same_weights_are_the_same_bytes(small: Records) -> None:
    """safetensors orders the entries of metadata anew each time; there is one."""
    facts = network_facts(ModelConfig(), small)
    assert len(metadata_of(facts)) == 1
    assert len({packed(WEIGHTS, metadata_of(facts)) for _ in range(20)}) == 1
    assert packed(WEIGHTS) == save(WEIGHTS)


def test_each_network_says_how_it_scales(small: Records) -> None:
    said = {name: network_facts(ModelConfig(name=name), small).scaling for name in NETWORKS}
    for name, kind in NETWORKS.items():
        network = kind.of(ModelConfig(name=name), 28, 28, 2)
        assert ("pixels.mean" in said[name]) == ("pixels.mean" in network.state_dict())
    assert said["baseline"] == said["fast"] == "pixel / 255"


def test_no_place_of_the_users_is_in_it(small: Records, tmp_path: Path) -> None:
    file = readme_example(tmp_path)
    own = override(RunConfig(), with_own_network({"model.name": f"{file}:Wide"}, "test"), "test")
    assert str(tmp_path) in own.model.file
    facts = network_facts(own.model, small)
    for said in (metadata_of(facts)[KEY], str(plain_metadata(facts))):
        assert "wide.py:Wide" in said and str(tmp_path) not in said


@pytest.mark.parametrize(
    ("change", "wanted"),
    [
        ({"classes": []}, "the classes are not 1 to 256 different texts"),
        ({"classes": ["a", "a"]}, "the classes are not 1 to 256 different texts"),
        ({"classes": [str(n) for n in range(257)]}, "the classes are not 1 to 256"),
        ({"classes": None}, "classes is None, not a list"),
        ({"height_pixels": 0}, "images of 0 x 28 pixels cannot be"),
        ({"width_pixels": 10**7}, "images of 28 x 10000000 pixels cannot be"),
        ({"pixel_mean": -1.0}, "pixels cannot have a mean of -1.0"),
        ({"pixel_mean": "0"}, "pixel_mean is '0', not a float"),
        ({"model": {"vit_patch_pixels": 0}}, "a patch has no pixels"),
        ({"model": {"vit_size": "huge"}}, "vit_size is 'huge', not one of"),
        ({"model": {"name": "evil.py:Net", "file": "evil.py"}}, "only a command line may"),
        ({"dataset_fingerprint": "\ud800"}, "not text"),
        ("[", "is not JSON"),
        ("[" * 2**23, "larger than"),
        ('{"a": NaN}', "is not JSON"),
        ("[" * 10_000, "is not JSON"),
        ("[]", "not a table"),
    ],
)
def test_what_no_network_is_is_refused(
    change: dict[str, Any] | str, wanted: str, small: Records, tmp_path: Path
) -> None:
    facts = asdict(network_facts(ModelConfig(), small))
    text = change if isinstance(change, str) else json.dumps(facts | change)
    save_file(WEIGHTS, tmp_path / MODEL, metadata={KEY: text})
    with pytest.raises(UserError, match=f"{MODEL}: its metadata are no network's .*{wanted}"):
        read_facts(tmp_path / MODEL)


def test_files_of_other_makers_say_nothing(tmp_path: Path) -> None:
    save_file(WEIGHTS, tmp_path / "a", metadata={"format": "pt"})
    save_file(WEIGHTS, tmp_path / "b")
    assert read_facts(tmp_path / "a") is None and read_facts(tmp_path / "b") is None
    with pytest.raises(UserError, match="does not say its network"):
        weights_alone(tmp_path / "a")
    (tmp_path / "model.pt2").write_bytes(b"PK")
    with pytest.raises(UserError, match="is an exported network, .*; name its run"):
        read_facts(tmp_path / "model.pt2")
    (tmp_path / "c").write_bytes(b"PK")
    with pytest.raises(UserError, match="is damaged or no safetensors file"):
        read_facts(tmp_path / "c")


def test_weights_of_another_run_are_found(run: Path, tmp_path: Path) -> None:
    facts = read_facts(run / MODEL)
    assert facts
    trained = find_weights(run)
    network = load_network(run_config(trained).model, facts, trained.file)
    other = replace(facts, dataset_fingerprint="0" * 64)
    (tmp_path / "run").mkdir()
    for name in ("report.json", "config.toml"):
        (tmp_path / "run" / name).write_bytes((run / name).read_bytes())
    (tmp_path / "run" / MODEL).write_bytes(packed(dict(network.state_dict()), metadata_of(other)))
    with pytest.raises(
        UserError, match="says that it was trained on records 0000000000000000, but"
    ):
        find_weights(tmp_path / "run")


def test_a_file_that_speaks_of_a_huge_network_takes_no_memory(
    run: Path, small: Records, tmp_path: Path
) -> None:
    """64 MiB of images of one class: a linear layer of them would take 32 GiB and more."""
    facts = read_facts(run / MODEL)
    assert facts
    huge = replace(facts, height_pixels=4096, width_pixels=4096)
    (tmp_path / MODEL).write_bytes(packed(WEIGHTS, metadata_of(huge)))
    trained = weights_alone(tmp_path / MODEL)
    with pytest.raises(UserError, match="holds the weights of another network"):
        load_network(huge.model, huge, trained.file)
