"""One home for defaults: files and flags only override, and whatever is not a setting is an error."""

from dataclasses import fields, is_dataclass
from pathlib import Path

import pytest

from engine.config import RunConfig, load_toml, override, parse_assignments, to_toml
from engine.errors import UserError
from engine.host import ROOT
from tests.conftest import run_configs


@pytest.mark.parametrize("config", [RunConfig(), RunConfig.baseline()])
def test_toml_gives_the_config_back(config: RunConfig, tmp_path: Path) -> None:
    file = tmp_path / "config.toml"
    file.write_text(to_toml(config))
    assert load_toml(RunConfig(), file) == config


def test_the_baseline_file_is_the_baseline() -> None:
    assert load_toml(RunConfig(), ROOT / "bench_configs" / "baseline.toml") == RunConfig.baseline()


@pytest.mark.parametrize("file", run_configs(), ids=lambda p: p.name)
def test_every_bench_config_is_valid(file: Path) -> None:
    load_toml(RunConfig(), file)


@pytest.mark.parametrize(
    ("text", "remedy"),
    [
        ("epoch = 3", "unknown setting; choose from"),
        ("[optim]\nlr = 3", "optim.lr: unknown setting"),
        ("optim = 3", "is a table"),
        ("[seed]\nx = 1", "is a value, not a table"),
        ("epochs = 1.5", "type int"),
        ("epochs = true", "type int"),
        ("[optim]\nfused = 1", "type bool"),
        ('[optim]\nname = "sgd"', "choose one of adam, adamw"),
        ("epochs = 0", "from 1 to"),
        ("target_accuracy = nan", "from 0 to 1"),
        ('[data]\nfeed = "stream"', "set data.order=blocked too"),
        ("[augment]\nscale_fraction = 1.0", "from 0 to 0.9"),
        ("epochs = ", "is not TOML"),
    ],
)
def test_what_is_not_a_setting_is_refused(text: str, remedy: str, tmp_path: Path) -> None:
    file = tmp_path / "bad.toml"
    file.write_text(text)
    with pytest.raises(UserError, match="bad.toml") as refused:
        load_toml(RunConfig(), file)
    assert remedy in str(refused.value)


def test_assignments_are_toml_else_text() -> None:
    given = parse_assignments(
        ("optim.learning_rate=0.5", "data.path=/a b", "optim.fused=false", "epochs=3")
    )
    config = override(RunConfig(), given, "--set")
    assert (config.optim.learning_rate, config.data.path, config.optim.fused, config.epochs) == (
        0.5,
        "/a b",
        False,
        3,
    )
    with pytest.raises(UserError, match="has no '='"):
        parse_assignments(("epochs",))


def test_an_integer_may_stand_for_a_float() -> None:
    assert override(RunConfig(), {"optim.learning_rate": 1}, "--set").optim.learning_rate == 1.0


def test_the_digest_knows_training_from_environment() -> None:
    digest = RunConfig().digest()
    for same in (
        {"data.feed": "dali"},
        {"data.path": "/x"},
        {"step.cuda_graphs": True},
        {"target_accuracy": 0.5},
    ):
        assert override(RunConfig(), same, "").digest() == digest
    for other in (
        {"seed": 1},
        {"global_batch": 64},
        {"step.precision": "bf16"},
        {"optim.weight_decay": 0.5},
    ):
        assert override(RunConfig(), other, "").digest() != digest


def test_every_setting_has_a_docstring() -> None:
    source = (ROOT / "engine" / "config.py").read_text().splitlines()
    for number, line in enumerate(source):
        is_setting = (
            line.startswith("    ")
            and not line.startswith("     ")
            and ": " in line
            and " = " in line
        )
        if (
            is_setting
            and "Config()" not in line
            and not line.strip().startswith(("hints", "return", "o ="))
        ):
            name = line.strip().split(":")[0]
            if any(name in [f.name for f in fields(c)] for c in _tree(RunConfig())):
                assert source[number + 1].strip().startswith('"""'), line


def _tree(config: object) -> list[object]:
    nested = [
        getattr(config, f.name) for f in fields(config) if is_dataclass(getattr(config, f.name))
    ]  # type: ignore[arg-type]
    return [config, *nested]
