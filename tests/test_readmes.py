"""The READMEs are true: their map, links, figures, and every command line that they show."""

import json
import re
import shlex
from collections.abc import Iterator
from functools import cache
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path

import click
import pytest
from torch.distributed.run import get_args_parser

from engine.config import RunConfig, override
from engine.config_text import parse_assignments
from engine.flags import flag_settings
from engine.host import ROOT
from engine.train.sweep import Sweep, parse_sweeps
from tests.test_house import FLOORS

FOLDERS = ("engine", "kernels", "tools")
"""What the map shows."""
RESULTS = ROOT / "bench_configs" / "results"
MAP = ROOT / "engine" / "README.md"
DOORS = sorted(
    file for folder in (*FOLDERS, "bench_configs") for file in (ROOT / folder).rglob("README.md")
)
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", ROOT / "SECURITY.md", *DOORS]
MOST_LINES = 110
WIDTH = 100


def name_of(page: Path) -> str:
    return str(page.relative_to(ROOT))


def text_of(page: Path) -> str:
    return page.read_text(encoding="utf-8")


def blocks(page: Path) -> list[str]:
    """Fenced blocks of command lines."""
    found = re.findall(r"^```(\w*)\n(.*?)^```$", text_of(page), re.MULTILINE | re.DOTALL)
    return [text for language, text in found if not language]


def spans(text: str) -> list[str]:
    """Words in backticks; | is escaped in tables."""
    return [span.replace("\\|", "|") for span in re.findall(r"`([^`\n]+)`", text)]


def tables(page: Path) -> list[list[str]]:
    """The cells of every row of every table."""
    rows = [line for line in text_of(page).splitlines() if line.startswith("| ")]
    return [[cell.strip() for cell in re.split(r"(?<!\\)\|", row)[1:-1]] for row in rows]


def first_spans(page: Path) -> set[str]:
    return {cells[0].strip("`") for cells in tables(page) if cells[0].startswith("`")}


def door_of(module: Path) -> Path:
    """The README nearest to a module, on the way up."""
    folders = (folder for folder in module.parents if (folder / "README.md").is_file())
    return next(folders) / "README.md"


def modules() -> list[Path]:
    files = (file for folder in FOLDERS for file in (ROOT / folder).rglob("*.py"))
    return sorted(file for file in files if file.name != "__init__.py")


def test_the_map_names_every_package_and_nothing_else() -> None:
    packages = {file.parent for folder in FOLDERS for file in (ROOT / folder).rglob("__init__.py")}
    named = {span for span in first_spans(MAP) if span.endswith("/")}
    assert named == {f"{package.relative_to(ROOT)}/" for package in packages}


def test_every_module_is_named_at_its_door() -> None:
    for module in modules():
        door = door_of(module)
        assert door != ROOT / "README.md", f"{module.parent} has no README at its door"
        path = str(module.relative_to(door.parent))
        assert {path, path.removesuffix(".py")} & first_spans(door), f"{name_of(door)}: {path}"


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_every_file_and_folder_named_is_there(page: Path) -> None:
    tops = tuple(f"{folder}/" for folder in (*FOLDERS, "bench_configs", "tests"))
    for span in spans(text_of(page)):
        is_module = span.endswith(".py") and page in DOORS
        is_path = (is_module or span.startswith(tops)) and not re.search(r"[^\w./-]|\.\.\.", span)
        is_result = re.fullmatch(r"cpu_\w+\.json", span)
        places = [page.parent, ROOT, RESULTS] if is_result or is_path else []
        assert not places or any((place / span).exists() for place in places), span
    for block in blocks(page):
        for path in re.findall(r"\bbench_configs/\S+", block):
            assert (ROOT / path).is_file(), path


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_every_link_leads_somewhere(page: Path) -> None:
    for path, heading in re.findall(r"\]\(([^)#:]*)#?([^):]*)\)", text_of(page)):
        target = page.parent / path if path else page
        assert target.exists(), path
        if heading:
            titles = re.findall(r"^#+ (.*)$", text_of(target), re.MULTILINE)
            slugs = [re.sub(r"[^\w -]", "", title.lower()).replace(" ", "-") for title in titles]
            assert heading in slugs, f"{path}#{heading}"


def test_the_floors_are_those_that_hold() -> None:
    rows = {cells[0]: cells[1] for cells in tables(MAP)}
    for number, rooms in enumerate(FLOORS):
        named = {span.strip("/") for span in spans(rows[str(number)])}
        assert named - {"kernels"} == set(rooms)


def test_pages_are_as_long_and_wide_as_they_may_be() -> None:
    assert len(text_of(ROOT / "README.md").splitlines()) <= MOST_LINES
    for page in (ROOT / "README.md", ROOT / "CONTRIBUTING.md", *DOORS):
        for line in text_of(page).splitlines():
            is_table = line.startswith("| ") and page != ROOT / "README.md"
            assert len(line) <= WIDTH or is_table, f"{name_of(page)}: {line}"


@cache
def figures(file: str) -> list[float]:
    rows = json.loads((RESULTS / file).read_text(encoding="utf-8"))["rows"]
    return [row["value"] for row in rows]


def headlines() -> Iterator[tuple[str, str]]:
    """(figure as README shows it, the file that it is of)."""
    for cells in tables(ROOT / "README.md"):
        files = re.findall(r"`(\w+\.json)`", cells[-1])
        if files:
            yield cells[1], files[0]
        elif cells[0] in ("training time", "throughput", "test accuracy"):
            yield from ((cell, "cpu_demo.json") for cell in cells[1:])


def test_every_headline_figure_is_in_its_file() -> None:
    shown = list(headlines())
    assert len(shown) > 15
    for text, file in shown:
        number = re.search(r"[\d,]*\d(?:\.(\d+))?", text)
        assert number, text
        digits = len(number[1] or "")
        value = float(number[0].replace(",", ""))
        assert any(round(each, digits) == value for each in figures(file)), f"{text}: {file}"


def commands_in_blocks(page: Path) -> set[str]:
    """Every command of the page's blocks, whole as a reader would type it."""
    lines = [line.partition("  #")[0] for block in blocks(page) for line in block.splitlines()]
    return {command.strip() for line in lines for command in line.split(" && ")} - {""}


def commands_in_sentences(page: Path) -> set[str]:
    """What is a command in backticks, perhaps without its arguments."""
    prose = re.sub(r"^```.*?^```$", "", text_of(page), flags=re.MULTILINE | re.DOTALL)
    start = re.compile(r"(python|torchrun\b.*) -m \w|make \w|tools/\w+ ")
    found = {span for span in spans(prose) if start.match(span)}
    bare = {f"tools/{file.stem}" for file in (ROOT / "tools").glob("*.py")}
    return found | (bare & set(spans(prose)))


def check_command(line: str) -> None:
    """Parse a command line as its command does, and go no further."""
    words = [word for word in shlex.split(line, comments=True) if word != "..."]
    if words[0] == "make":
        rules = re.findall(r"^(\w+):", text_of(ROOT / "Makefile"), re.MULTILINE)
        assert all(word in rules for word in words[1:] if "=" not in word), line
        return
    if words[0] in ("python", "torchrun"):
        module = words.index("-m") + 1
        name, rest = words[module], words[module + 1 :]
    else:
        assert (ROOT / words[0]).is_file(), line
        name, rest = words[0].replace("/", "."), words[1:]
    check_options(name, rest)


def check_options(module: str, words: list[str]) -> None:
    if module.startswith("tests."):
        assert find_spec(module), module  # the benchmarks and proofs have no options of click's
        return
    command = import_module(module).main
    assert isinstance(command, click.Command), module
    if isinstance(command, click.Group):
        names = [word for word in words if word in command.commands]
        before = words[: words.index(names[0])] if names else words
        assert all(word.startswith("-") for word in before), f"no subcommand in {words}"
        command.make_context(module, before)
        if names:
            command = command.commands[names[0]]
            words = words[len(before) + 1 :]
    context = command.make_context(module, list(words))
    if module == "engine.run":
        options = dict(context.params)
        given = parse_assignments(options.pop("assignments"))
        axes = parse_sweeps(options.pop("sweeps"))
        own = ("config_file", "recipe", "baseline", "out", "resume", "keep_schedule", "device")
        flags = {name: value for name, value in options.items() if name not in own}
        config = override(override(RunConfig(), given, "--set"), flag_settings(flags, 1), "flags")
        Sweep.of(config, axes)


def test_every_command_in_a_block_is_one_that_its_command_takes() -> None:
    lines = {line for page in PAGES for line in commands_in_blocks(page)}
    assert len(lines) > 25
    for line in sorted(lines):
        try:
            check_command(line)
        except (click.ClickException, AssertionError, ImportError) as error:
            pytest.fail(f"{line}: {error}")


def test_every_command_in_a_sentence_is_one_that_its_command_takes() -> None:
    lines = {line for page in PAGES for line in commands_in_sentences(page)}
    assert len(lines) > 10
    for line in sorted(lines):
        try:
            check_command(line)
        except click.MissingParameter:
            continue
        except (click.ClickException, AssertionError, ImportError) as error:
            pytest.fail(f"{line}: {error}")


def test_a_wrong_command_line_is_found() -> None:
    for line in (
        "tools/profile run --epochz 3",
        "torchrun -m engine.run --kernels sum",
        "make tea",
    ):
        with pytest.raises(Exception, match="epochz|sum|tea"):
            check_command(line)


def all_options() -> set[str]:
    """Every long option of every command, and of torchrun."""
    names = ["engine.run", *(f"tools.{file.stem}" for file in (ROOT / "tools").glob("[a-z]*.py"))]
    torchrun = get_args_parser()._actions
    found = {"--help", "--test"} | {option for each in torchrun for option in each.option_strings}
    for name in names:
        command = getattr(import_module(name), "main", None)
        commands = [command, *getattr(command, "commands", {}).values()]
        for each in commands:
            for option in getattr(each, "params", ()):
                found |= {*option.opts, *option.secondary_opts}
    return found


def test_every_option_named_is_there() -> None:
    known = all_options()
    for page in PAGES:
        for span in spans(text_of(page)):
            if span.startswith("--"):
                assert re.split(r"[ =]", span)[0] in known, f"{name_of(page)}: {span}"
