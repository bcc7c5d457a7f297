"""Configs as text: TOML files, assignments of a command line, the files of networks of one's own.

What a text says overrides the fields of config.py, which checks it.
"""

import hashlib
import re
import tomllib
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import tomli_w

from engine.config import OWN, RunConfig, flatten, override, recipe_settings, with_full_paths
from engine.errors import UserError
from engine.paths import full_path, path_text

BARE_POINT = re.compile(r"(?<![^+-])\.(?=\d)")
"""Of .5, which TOML does not know: a point that nothing but a sign stands before."""


def with_own_network(dotted: Mapping[str, Any], source: str) -> dict[str, Any]:
    """What a command line sets, with the place and hash of the file where it names one's own class.

    Only for what a command line says: no file, not even a configuration, has code run.

    Raises:
        UserError: the file cannot be read.
    """
    found = OWN.fullmatch(str(dotted.get("model.name", "")))
    if not found:
        return dict(dotted)
    try:
        file = full_path(found["file"])
    except UserError as error:
        raise UserError(f"{source}: model.name: {error}") from None
    own = {
        "model.name": f"{path_text(file.name)}:{found['name']}",
        "model.file": str(file),
        "model.sha256": sha256_of(read_code(file)),
    }
    return dict(dotted) | own


def sha256_of(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


def read_code(file: str | Path) -> bytes:
    """A Python file's bytes.

    Raises:
        UserError: it cannot be read.
    """
    try:
        return Path(file).read_bytes()
    except OSError as error:
        why = f"cannot be read ({error.strerror})"
        raise UserError(
            f"{file}: {why}; give --model FILE.py:NAME of a file that is there"
        ) from None


def _refuse_code(dotted: Mapping[str, Any], source: str) -> None:
    if dotted.get("model.file"):
        remedy = "leave it out, and name the file with --model FILE.py:NAME"
        raise UserError(f"{source}: model.file: only a command line names code to run; {remedy}")


def load_toml(config: RunConfig, path: str | Path) -> RunConfig:
    """`config` overridden by a TOML file: `recipe`, if it names one, then the fields of RunConfig.

    Relative paths in it are from its folder.
    """
    return override(config, full_settings(read_toml(path), Path(path)), str(path))


def config_of(text: str, source: str) -> RunConfig:
    """The config that `to_toml` wrote."""
    try:
        tree = tomllib.loads(text)
    except tomllib.TOMLDecodeError as error:
        raise UserError(f"{source}: is not TOML ({error}); start anew with another --out") from None
    dotted = flatten(tree)
    if dotted.pop("tensorboard", False):  # a setting of earlier versions
        dotted["track"] = ["tensorboard"]
    _refuse_code(dotted, source)
    return override(RunConfig(), dotted, source)


def full_settings(tree: dict[str, Any], file: Path) -> dict[str, Any]:
    """The tables of `file` as dotted settings: those of its recipe first, and paths absolute."""
    given = dict(tree)
    recipe = given.pop("recipe", None)
    base = {} if recipe is None else recipe_settings(recipe, str(file))
    _refuse_code(flatten(given), str(file))
    return base | with_full_paths(flatten(given), file.parent, str(file))


def read_toml(path: str | Path) -> dict[str, Any]:
    """The tables of a TOML file.

    Raises:
        UserError: it cannot be read, or is no TOML.
    """
    try:
        return tomllib.loads(Path(path).read_bytes().decode("utf-8-sig"))
    except OSError as error:
        why = f"cannot be read ({error.strerror})"
        raise UserError(f"{path}: {why}; give --config an existing TOML file") from None
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise UserError(f"{path}: is not TOML ({error}); see bench_configs/ for examples") from None


def parse_assignments(assignments: tuple[str, ...]) -> dict[str, Any]:
    """["epochs=2"] -> {"epochs": 2}; values are those of `parse_value`."""
    dotted = {}
    for assignment in assignments:
        name, equals, text = assignment.partition("=")
        if not equals:
            raise UserError(
                f"--set {assignment}: has no '='; write --set optim.learning_rate=0.002"
            )
        dotted[name] = parse_value(text)
    return dotted


def parse_value(text: str) -> Any:
    """A value as a command line gives it: TOML's (and .5 is 0.5), else plain text."""
    try:
        return tomllib.loads(f"value = {BARE_POINT.sub('0.', text)}")["value"]
    except tomllib.TOMLDecodeError:
        return text


def to_toml(config: RunConfig) -> str:
    """The whole config as TOML; `load_toml` gives it back."""
    tree = asdict(config)
    tree["data"]["path"] = path_text(config.data.path)
    tree["model"].pop("file")  # whoever reads this names the code to run
    return tomli_w.dumps(tree)
