"""Matrices: TOML files as cells. Nothing is measured here: tools/measure/runner.py does that.

A file with `[[rung]]` or `[axes]` is a matrix; any other is a run config and one cell. A rung adds
its `set` to that of the rung before, or of the one that `base` names, or to a `recipe`, whose batch
it has. Axes are the full product of their lists. `batch` is samples per rank.

Threads: torchrun gives each of several ranks one thread, but a process alone takes all cores, and
beside that 2 ranks on two cores would gain nothing. So where a rung, or the axes, have a cell of
several ranks, each of their cells has one thread per rank, those of 1 rank too. All others have
what torch takes. The loader's workers come on top of both.
"""

from collections.abc import Iterator
from dataclasses import dataclass, replace
from itertools import product
from pathlib import Path
from typing import Any

from engine.config import RunConfig, flatten, override, recipe_settings
from engine.config_text import full_settings, read_toml
from engine.errors import UserError
from engine.host import num_cpus
from tools.measure.results import Published, Settings

NUM_STEPS = 100
Tree = dict[str, Any]
"""A table of TOML, before it is checked."""
MATRIX_KEYS: dict[str, type] = {
    "title": str, "repetitions": int, "steps": int, "accuracy": bool, "batch": int, "set": dict,
    "rung": list, "axes": dict, "published": list, "expected": list,
}  # fmt: skip
RUNG_KEYS: dict[str, type] = {
    "name": str, "set": dict, "base": str, "batches": list, "ranks": list, "accuracy": bool,
    "repetitions": int, "recipe": str,
}  # fmt: skip
PUBLISHED_KEYS: dict[str, type] = {
    "axes": dict, "samples_per_s": float, "train_s": float, "test_accuracy_fraction": float,
    "gpu": str, "source": str,
}  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class Cell:
    """One configuration to be measured."""

    id: str = ""
    name: str
    rung: str = ""
    base: str = ""
    """The rung that its own adds to, where it names one; else it is the rung before."""
    ladder: bool = False
    """A rung that is compared with the one before; not those of several ranks or with accuracy."""
    axes: Settings
    """`batch`, `ranks`, and the settings that vary."""
    settings: Settings
    """All that is not RunConfig's default, global_batch included."""
    published: Published | None = None
    accuracy: bool = False
    """Whether to train whole epochs and evaluate, too."""
    num_steps: int = NUM_STEPS
    """On the clock."""
    repetitions: int = 1
    num_threads: int = 0
    """Of a rank; 0: as many as torch takes."""

    @property
    def num_ranks(self) -> int:
        return int(self.axes["ranks"])

    def not_measured(self, num_gpus: int) -> str:
        """Why this machine cannot measure it, if so. Without GPUs a rank needs a core."""
        num_cores = num_cpus()
        if self.num_ranks <= (num_gpus or num_cores):
            return ""
        has = f"there are {num_gpus}" if num_gpus else f"there are 0, and {num_cores} CPU cores"
        return f"needs {self.num_ranks} GPUs, {has}"


def read_cells(paths: list[Path], batch: int | None = None) -> tuple[str, list[Cell]]:
    """A title and the cells of matrices and run configs, these with `batch` instead of their own.

    Raises:
        UserError: a file cannot be read, or says what is no matrix and no configuration.
    """
    titles, cells = [], list[Cell]()
    for path in paths:
        tree = _with_settings(read_toml(path), path)
        titles.append(tree.get("title", path.stem))
        cells += (
            _matrix(str(path), tree, batch)
            if is_matrix(tree)
            else [config_cell(str(path), flatten(tree), batch)]
        )
    return ", ".join(titles), [
        replace(cell, id=f"c{number:03}") for number, cell in enumerate(cells)
    ]


def _with_settings(tree: Tree, file: Path) -> Tree:
    """A file's tables, their settings dotted and those of the recipe added, paths absolute."""
    if not is_matrix(tree):
        return full_settings(tree, file)
    tree = dict(tree)
    if isinstance(tree.get("set", {}), dict):
        tree["set"] = full_settings(tree.get("set", {}), file)
        if "recipe" in tree:
            recipe = recipe_settings(tree.pop("recipe"), str(file))
            tree.setdefault("batch", recipe.pop("global_batch", RunConfig().global_batch))
            tree["set"] = recipe | tree["set"]
    for rung in tree.get("rung", []):
        if isinstance(rung, dict) and isinstance(rung.get("set"), dict):
            rung["set"] = full_settings(rung["set"], file)
            _add_recipe(rung, file)
    return tree


def _add_recipe(rung: Tree, file: Path) -> None:
    """Put the settings of a rung's recipe before its own, and its batch."""
    if type(rung.get("recipe")) is str:
        recipe = recipe_settings(rung["recipe"], str(file))
        rung.setdefault("batches", [recipe.pop("global_batch", RunConfig().global_batch)])
        rung["set"] = recipe | rung["set"]


def is_matrix(tree: Tree) -> bool:
    return "rung" in tree or "axes" in tree


def config_cell(name: str, settings: Settings, batch: int | None = None) -> Cell:
    """A configuration as a cell of one rank, with `batch` instead of its own."""
    global_batch = batch or override(RunConfig(), settings, name).global_batch
    axes = {"batch": global_batch, "ranks": 1}
    return Cell(
        id="c000",
        name=Path(name).stem,
        axes=axes,
        settings=settings | {"global_batch": global_batch},
    )


def rungs(tree: Tree, where: str) -> Iterator[tuple[Tree, Settings]]:
    """Each rung of a ladder with its settings in sum.

    Raises:
        UserError: it is no rung, or its base is none before it.
    """
    known, before = {"": flatten(tree.get("set", {}))}, ""
    for rung in tree["rung"]:
        _check_keys(rung, RUNG_KEYS, {"name", "set"}, f"{where}: a rung")
        base = rung.get("base", "" if "recipe" in rung else before)
        if base not in known or rung["name"] in known:
            fault = (
                f"base = {base!r} is no rung before it" if base not in known else "is there twice"
            )
            raise UserError(
                f"{where}: rung {rung['name']!r}: {fault}; name each rung once, before it is a base"
            )
        before = rung["name"]
        known[before] = known[base] | flatten(rung["set"])
        yield rung, known[before]


def _matrix(where: str, tree: Tree, batch: int | None) -> list[Cell]:
    _check_keys(tree, MATRIX_KEYS, set(), where)
    if batch:
        raise UserError(f"{where}: names its batches itself; leave out --batch-size")
    if not tree.get("rung", tree.get("axes")) or ("rung" in tree and "axes" in tree):
        remedy = "give a [[rung]], or [axes] with a list"
        raise UserError(f"{where}: wants either rungs or axes, at least one; {remedy}")
    groups = rungs(tree, where) if "rung" in tree else [({}, flatten(tree.get("set", {})))]
    cells = [cell for rung, settings in groups for cell in _group(tree | rung, settings, where)]
    for figures in tree.get("published", []):
        _publish(cells, figures, f"{where}: published")
    return cells


def _group(table: Tree, settings: Settings, where: str) -> Iterator[Cell]:
    """Cells of the axes, or of a rung: the product of its lists.

    A rung has the matrix's values where it has none of its own.

    What it has of several ranks makes all of it one thread a rank.
    """
    keys = {"batch": "batches", "ranks": "ranks"}
    of_rung = {axis: table[key] for axis, key in keys.items() if key in table}
    axes = {"batch": [table.get("batch", RunConfig().global_batch)], "ranks": [1]}
    axes |= table.get("axes", of_rung)
    name = table.get("name", "")
    accuracy = table.get("accuracy", False)
    num_steps = _number(table.get("steps", NUM_STEPS), f"{where}: steps")
    repetitions = _number(table.get("repetitions", 1), f"{where}: repetitions")
    _check_axes(axes, f"{where}: {name or 'axes'}")
    for values in product(*axes.values()):
        chosen = dict(zip(axes, values, strict=True))
        dotted = settings | {axis: chosen[axis] for axis in chosen if axis not in keys}
        if "global_batch" in dotted:
            why = "which is batch times ranks here; give batch, samples a rank"
            raise UserError(f"{where}: sets global_batch, {why}")
        dotted["global_batch"] = chosen["batch"] * chosen["ranks"]
        override(RunConfig(), dotted, where)
        varied = [f"{axis} {value}" for axis, value in chosen.items() if len(axes[axis]) > 1]
        yield Cell(
            name=", ".join([name] * bool(name) + varied) or Path(where).stem,
            rung=name,
            base=table.get("base", ""),
            ladder="rung" in table and "ranks" not in of_rung and not accuracy,
            axes=chosen,
            settings=dotted,
            accuracy=accuracy,
            num_steps=num_steps,
            repetitions=repetitions,
            num_threads=int(max(axes["ranks"]) > 1),
        )


def _check_axes(axes: Tree, where: str) -> None:
    for axis, values in axes.items():
        if type(values) is not list or not values:
            raise UserError(f"{where}: {axis} is {values!r}; give a list of values")
        if axis in ("batch", "ranks"):
            for value in values:
                _number(value, f"{where}: {axis}")


def _publish(cells: list[Cell], figures: Tree, where: str) -> None:
    _check_keys(figures, PUBLISHED_KEYS, {"axes", "gpu", "source"}, where)
    given = {name: value for name, value in figures.items() if name != "axes"}
    fit = [number for number, cell in enumerate(cells) if cell.axes | figures["axes"] == cell.axes]
    if len(fit) != 1 or cells[fit[0]].published:
        fault = f"axes {figures['axes']} fit {len(fit)} cells"
        raise UserError(f"{where}: {fault}; name one that has no figures yet")
    cells[fit[0]] = replace(cells[fit[0]], published=Published(**given))


def _check_keys(table: Any, kinds: dict[str, type], needed: set[str], where: str) -> None:
    if type(table) is not dict:
        raise UserError(f"{where}: is {table!r}; give a table")
    for name, value in table.items():
        if name not in kinds:
            raise UserError(f"{where}: there is no key {name}; here are {', '.join(kinds)}")
        if type(value) is not kinds[name] and not (kinds[name] is float and type(value) is int):
            raise UserError(
                f"{where}: {name} is {value!r}; give a value of type {kinds[name].__name__}"
            )
    if missing := sorted(needed - table.keys()):
        raise UserError(f"{where}: lacks {', '.join(missing)}; add it")


def _number(value: Any, where: str) -> int:
    if type(value) is not int or value < 1:
        raise UserError(f"{where}: is {value!r}; give a whole number from 1")
    return value
