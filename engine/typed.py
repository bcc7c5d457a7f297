"""JSON as dataclasses, and refused where it is not what they say.

A result file may be a stranger's, and what reads it must be able to trust every field: its kind is
checked here, once; what fields mean together is checked by the dataclass itself (`__post_init__`).
Keys that a dataclass does not know are left out, so that files of a later version can be read.
"""

from dataclasses import MISSING, fields, is_dataclass
from functools import cache
from pathlib import Path
from types import NoneType, UnionType
from typing import Any, Literal, TypeVar, Union, get_args, get_origin, get_type_hints

from engine.durable import Damaged, parse_json
from engine.errors import UserError

T = TypeVar("T")
LARGEST = 1e15
"""Of a figure: every whole number up to it is exact as a float, and sums do not overflow. A field
whose metadata says `high`, as a setting's do, has that as its bound."""


def read_as(kind: type[T], path: Path) -> T:
    """The file as a `kind`.

    Raises:
        OSError: it cannot be read.
        Damaged: it is no JSON, or not of this kind.
    """
    return typed(kind, parse_json(path.read_bytes(), path.name), "")


def read_result_as(kind: type[T], path: Path, what: str, remedy: str) -> T:
    """The file as a `kind`, for a command that a user gave it to.

    Raises:
        UserError: it cannot be read, or is not `what`; with the `remedy`.
    """
    try:
        return read_as(kind, path)
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror}); {remedy}") from None
    except (Damaged, RecursionError) as error:
        raise UserError(f"{path}: is no {what} ({error}); {remedy}") from None


def typed(kind: type[T], value: object, where: str) -> T:
    """A value of JSON as a `kind`; Damaged, with `where` in the file it is, if it is none."""
    found: T = _convert(kind, value, where)
    return found


def _convert(kind: Any, value: Any, where: str, largest: float = LARGEST) -> Any:
    if kind is Any:
        _check(_is_plain(value), value, "a value of TOML", where)
        return value
    if is_dataclass(kind):
        return _dataclass(kind, value, where)
    origin, inner = get_origin(kind), get_args(kind)
    if origin in (Union, UnionType):
        if value in (None, {}) and NoneType in inner:
            return None
        kind = next(arm for arm in inner if arm is not NoneType)
        return _convert(kind, value, where, largest)
    if origin is list:
        return [_convert(inner[0], item, f"{where}.{n}") for n, item in _items(value, where)]
    if origin is tuple:
        return _tuple(inner, value, where)
    if origin is dict:
        _check(isinstance(value, dict), value, "a table", where)
        return {key: _convert(inner[1], item, f"{where}.{key}") for key, item in value.items()}
    if origin is Literal:
        _check(value in inner, value, f"one of {', '.join(map(str, inner))}", where)
        return value
    return _scalar(kind, value, where, largest)


def _is_plain(value: Any) -> bool:
    """A single value, or a list of such."""
    values = value if isinstance(value, list) else [value]
    return not any(isinstance(item, (dict, list)) for item in values)


def _dataclass(kind: Any, value: Any, where: str) -> Any:
    _check(isinstance(value, dict), value, "a table", where)
    hints, given = _hints(kind), {}
    for field in fields(kind):
        place = f"{where}.{field.name}".lstrip(".")
        if field.name in value:
            largest = field.metadata.get("high") or LARGEST
            given[field.name] = _convert(hints[field.name], value[field.name], place, largest)
        elif field.default is MISSING and field.default_factory is MISSING:
            raise Damaged(f"{place} is missing")
    try:
        return kind(**given)
    except ValueError as error:
        raise Damaged(f"{where}: {error}".removeprefix(": ")) from None


@cache
def _hints(kind: Any) -> dict[str, object]:
    return get_type_hints(kind)


def _items(value: Any, where: str) -> list[tuple[int, Any]]:
    _check(isinstance(value, list), value, "a list", where)
    return list(enumerate(value))


def _tuple(inner: tuple[Any, ...], value: Any, where: str) -> tuple[Any, ...]:
    items = _items(value, where)
    if inner[-1] is Ellipsis:
        inner = inner[:1] * len(items)
    _check(len(items) == len(inner), value, f"{len(inner)} values", where)
    return tuple(_convert(inner[n], item, f"{where}.{n}") for n, item in items)


def _scalar(kind: type, value: Any, where: str, largest: float) -> Any:
    wanted = (int, float) if kind is float else (kind,)
    _check(type(value) in wanted, value, f"a {kind.__name__}", where)
    if kind in (int, float):
        _check(abs(value) <= largest, value, "a number of sensible size", where)
    if kind is str:
        _check(not any("\ud800" <= letter <= "\udfff" for letter in value), value, "text", where)
    return value


def _check(is_fine: bool, value: Any, wanted: str, where: str) -> None:
    if not is_fine:
        raise Damaged(f"{where} is {ascii(value)[:40]}, not {wanted}".lstrip())
