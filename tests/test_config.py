"""One home for defaults: files and flags only override; what is no setting is an error."""

from dataclasses import Field, replace
from pathlib import Path
from typing import Any, Literal, get_args, get_origin

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from engine import run
from engine.config import (
    NETWORK_NAMES,
    RECIPES,
    RunConfig,
    override,
    recipe_settings,
    settings_of,
)
from engine.config_text import load_toml, parse_assignments, to_toml
from engine.errors import UserError
from engine.flags import flag_settings
from engine.host import ROOT
from kernels import ALL
from tests.conftest import run_configs

PATHS = st.sampled_from(["", "/data/tmnist", '/a b/\u00e9 = "x"', "/no utf-8 \udcff"])


def values(kind: Any, each: Field[Any]) -> st.SearchStrategy[Any]:
    """Whatever a setting may be."""
    low, high = each.metadata["low"], each.metadata["high"]
    if kind is bool:
        return st.booleans()
    if kind is int:
        return st.integers(low, high)
    if kind is float:
        return st.floats(low, high, allow_subnormal=False) | st.integers(low, int(high))
    if each.metadata["path"]:
        return PATHS
    if kind is str:
        return st.sampled_from(["500steps", "30s", "1epoch,60s"])
    if get_origin(kind) is Literal:
        return st.sampled_from(get_args(kind))
    names = [name for name in get_args(get_args(kind)[0]) if name != "auto"]  # which stands alone
    return st.lists(st.sampled_from(names), unique=True)


FOUND = ("model.file", "model.sha256")
"""What is found by itself, of a network of one's own."""
GIVEN = st.fixed_dictionaries(
    {},
    optional={
        name: values(kind, each)
        for name, each, kind, _ in settings_of(RunConfig())
        if name not in FOUND
    }
    | {"model.name": st.sampled_from([*NETWORK_NAMES, "own.py:Net"])},
)
"""Settings by dotted name: some of them, or all."""


@settings(deadline=None)
@given(given=GIVEN, name=st.sampled_from(sorted(RECIPES)))
def test_toml_gives_the_config_back(
    given: dict[str, Any], name: str, tmp_path_factory: pytest.TempPathFactory
) -> None:
    if given.get("data.feed", RECIPES[name].data.feed) == "stream":
        given = given | {"data.order": "blocked"}
    if given.get("step.canonical"):
        given = given | {"step.accumulate": 1}
    config = override(RECIPES[name], given, "test")
    found = {dotted: value for dotted, _, _, value in settings_of(config)}
    for names in ("kernels", "track"):
        assert set(given.pop(names, found[names])) == set(found[names])
    assert {**found, **given} == found
    file = tmp_path_factory.getbasetemp() / "config.toml"
    file.write_text(to_toml(config), encoding="utf-8")
    read = load_toml(RunConfig(), file)
    assert read == config and read.digest() == config.digest()


def test_the_baseline_file_is_the_baseline() -> None:
    assert load_toml(RunConfig(), ROOT / "bench_configs" / "baseline.toml") == RECIPES["study"]


@pytest.mark.parametrize("file", run_configs(), ids=lambda p: p.name)
def test_every_bench_config_is_valid(file: Path) -> None:
    load_toml(RunConfig(), file)


@pytest.mark.parametrize(
    ("text", "remedy"),
    [
        ("epoch = 3", "unknown setting; is epochs meant?"),
        ("rate = 3", "unknown setting; choose from"),
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


def test_a_number_may_begin_with_its_point() -> None:
    given = parse_assignments(("optim.learning_rate=.5", "data.path=.5.records"))
    assert given == {"optim.learning_rate": 0.5, "data.path": ".5.records"}


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


def test_every_setting_says_what_it_is_and_every_number_has_bounds() -> None:
    for name, each, kind, value in settings_of(RunConfig()):
        facts = each.metadata
        assert facts["help"].endswith((".", "]")) and len(facts["help"]) > 10, name
        if kind in (int, float):
            assert facts["low"] <= value <= facts["high"], name
            for outside in (facts["low"] - 1, facts["high"] + 1):
                with pytest.raises(UserError, match=f"{name} is .*; give a value from"):
                    override(RunConfig(), {name: kind(outside)}, "test")


def test_flags_are_made_from_the_fields() -> None:
    """Every flag sets its field, and refuses what the field refuses."""
    options = {option.name: option for option in run.main.params}
    for name, each, kind, _ in settings_of(RunConfig()):
        if not each.metadata["flag"]:
            continue
        option = options.pop(name.replace(".", "__"))
        assert each.metadata["flag"] in option.opts
        if kind in (int, float):
            assert (option.type.min, option.type.max) == (
                each.metadata["low"],
                each.metadata["high"],
            )
    given = {"amp": "fp16", "batch_size": 8, "step__cuda_graphs": True, "epochs": None}
    wanted = {"step.precision": "fp16", "global_batch": 16, "step.cuda_graphs": True}
    assert flag_settings(given, num_ranks=2) == wanted
    others = {"amp", "batch_size", "recipe", "config_file", "assignments", "sweeps", "out"}
    assert set(options) == others | {"baseline", "resume", "keep_schedule", "device"}


def test_flags_that_contradict_each_other_are_refused() -> None:
    run._check_together("study", True, None, False)
    run._check_together(None, True, "auto", True)
    with pytest.raises(UserError, match="--baseline: is --recipe study, but --recipe names best;"):
        run._check_together("best", True, None, False)
    with pytest.raises(UserError, match="--keep-schedule: is of a run that goes on for more epoch"):
        run._check_together(None, False, None, True)


@pytest.mark.parametrize("name", ["residual", "vit"])
def test_a_network_is_trained_by_its_own_recipe_where_none_is_named(name: str) -> None:
    def config_of(recipe: str | None) -> RunConfig:
        flags = {"model__name": name, "epochs": 3}
        given = run.Given(recipe, None, (), flags, keep_schedule=False)
        return run._read_config(given, "", 1)

    assert config_of(None) == replace(RECIPES[name], epochs=3)
    best = config_of("best")
    assert best.model == replace(RECIPES["best"].model, name=name)
    assert best.optim == RECIPES["best"].optim


def test_recipes_are_typed_once(tmp_path: Path) -> None:
    assert override(RunConfig(), recipe_settings("study", "test"), "test") == RECIPES["study"]
    (tmp_path / "c.toml").write_text('recipe = "study"\nepochs = 3\n')
    assert load_toml(RunConfig(), tmp_path / "c.toml") == replace(RECIPES["study"], epochs=3)
    (tmp_path / "c.toml").write_text('recipe = "slow"\n')
    names = "fast, best, large-batch, residual, vit, study"
    with pytest.raises(UserError, match=f"there is no recipe 'slow'; choose from {names}"):
        load_toml(RunConfig(), tmp_path / "c.toml")


@pytest.mark.parametrize(
    ("given", "wanted"),
    [
        ("all", ALL),
        ("all, conv2_pool_relu", ALL),
        (["softmax_cross_entropy", "gather_warp"], ("gather_warp", "softmax_cross_entropy")),
        ("gather_warp, conv_pool_relu", ("gather_warp", "conv_pool_relu")),
        ("off", ()),
        ("auto", ("auto",)),
        ([], ()),
    ],
)
def test_kernels_are_a_list_of_names(given: object, wanted: tuple[str, ...]) -> None:
    assert override(RunConfig(), {"kernels": given}, "test").kernels == wanted


@pytest.mark.parametrize("given", ["gather", ["all", 3], 7, "auto,gather_warp"])
def test_other_kernels_are_refused(given: object) -> None:
    with pytest.raises(
        UserError,
        match="kernels: is .*; (choose from all, auto, gather_warp|give a list|give auto alone)",
    ):
        override(RunConfig(), {"kernels": given}, "test")
