"""The options of engine.run that set something of the config, made from its fields."""

from collections.abc import Callable
from dataclasses import Field
from typing import Any, Literal, get_args, get_origin

import click

from engine.config import RunConfig, settings_of
from engine.paths import PATH_OR_URL

AMP = ("bf16", "fp16", "fp8")
"""The precisions that --amp offers."""
ALONE = {"step.compile": "default", "serve": 0}
"""What a flag means that is given without a value."""


def setting_options(command: Callable[..., Any]) -> Callable[..., Any]:
    """Add an option per field that has a flag, and --amp and --batch-size, which are no fields."""
    for name, each, kind, default in reversed(list(settings_of(RunConfig()))):
        if each.metadata["flag"]:
            command = _option(name, each, kind, default)(command)
    batch = click.option(
        "--batch-size", type=click.IntRange(1), help="Samples of one rank in a step."
    )
    amp = click.option(
        "--amp",
        is_flag=False,
        flag_value=AMP[0],
        type=click.Choice(AMP),
        help="Mixed precision; alone: bf16.",
    )
    return amp(batch(command))


def flag_settings(flags: dict[str, Any], num_ranks: int) -> dict[str, Any]:
    """The options that were given, as dotted settings."""
    given = {name.replace("__", "."): value for name, value in flags.items() if value is not None}
    if "amp" in given:
        given["step.precision"] = given.pop("amp")
    if "batch_size" in given:
        given["global_batch"] = given.pop("batch_size") * num_ranks
    if "data.path" in given:
        given["data.path"] = str(given["data.path"])
    return given


def _option(name: str, each: Field[Any], kind: Any, default: Any) -> Callable[..., Any]:
    facts = each.metadata
    flag = facts["flag"]
    variable = name.replace(".", "__")
    words: dict[str, Any] = {"help": facts["help"], "default": None}
    if kind is bool:
        return click.option(f"{flag}/--no-{flag[2:]}", variable, **words)
    if facts["path"]:
        words["type"] = PATH_OR_URL
    elif get_origin(kind) is Literal:
        words["type"] = click.Choice(get_args(kind))
    elif kind is int:
        words["type"] = click.IntRange(facts["low"], facts["high"])
    elif kind is float:
        words["type"] = click.FloatRange(facts["low"], facts["high"])
    if name in ALONE:
        words |= {"is_flag": False, "flag_value": ALONE[name]}
    return click.option(flag, variable, **words)
