"""The house's own rules: imports run downward, one step function, units in names."""

import ast
import re
import signal
import subprocess
import time
from dataclasses import fields
from pathlib import Path

import pytest

from engine import errors, report
from engine.errors import UserError, exit_on_user_error, printable
from engine.host import ROOT
from engine.report import Environment, RunReport

FLOORS = (
    (
        "errors",
        "ui",
        "host",
        "late_dynamo",
        "network",
        "paths",
        "ranks",
        "heart",
        "meeting",
        "stop",
        "config",
        "config_text",
        "order",
        "report",
        "typed",
        "durable",
    ),
    ("data",),
    ("world", "meters", "feeds", "models"),
    ("train",),
    ("flags", "serve", "run"),
)
"""What stands in engine/, packages and files, from the ground up: imports run downward or stay."""
TOOL_ROOMS = ("measure", "report", "checks")
NO_TORCH = (*FLOORS[0], *FLOORS[1], "serve", "run")


def floor(module: str) -> int:
    """The floor of a module of engine/."""
    room = module.split(".")[1]  # packages and files alike
    return next(number for number, rooms in enumerate(FLOORS) if room in rooms)


def modules(*folders: str) -> dict[str, Path]:
    files = [file for folder in folders for file in (ROOT / folder).rglob("*.py")]
    names = {
        ".".join(file.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__"): file
        for file in files
    }
    return {name: file for name, file in names.items() if name != "engine"}


def imports(file: Path, top_level_only: bool = False) -> set[str]:
    tree = ast.parse(file.read_text())
    found = set()
    for node in tree.body if top_level_only else ast.walk(tree):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        if isinstance(node, ast.ImportFrom) and node.module:
            found |= {node.module} | {f"{node.module}.{alias.name}" for alias in node.names}
    return found


def test_imports_run_downward() -> None:
    engine = modules("engine")
    rooms = {name.split(".")[1] for name in engine}
    assert rooms == {room for rooms in FLOORS for room in rooms}, "a room without a floor"
    for name, file in engine.items():
        for imported in imports(file) & set(engine):
            assert floor(imported) <= floor(name), f"{name} imports {imported}, which stands above"


def test_the_rooms_of_the_tools_import_no_command() -> None:
    tools = modules("tools")
    alone = {name for name, file in tools.items() if file.parent == ROOT / "tools"}
    commands = alone - {"tools", "tools.results"}
    for name, file in tools.items():
        if name.count(".") == 2 and name.split(".")[1] in TOOL_ROOMS:
            assert not imports(file) & commands, name


def test_nothing_imports_the_commands_and_kernels_know_no_engine() -> None:
    for name, file in modules("engine", "kernels").items():
        tops = {imported.split(".")[0] for imported in imports(file)}
        assert not tops & {"tools", "tests", "bench_configs"}, name
        assert not (name.startswith("kernels") and "engine" in tops), name


def test_what_needs_no_torch_imports_none() -> None:
    for name, file in modules("engine").items():
        if name.split(".")[1] in NO_TORCH:
            found = {imported.split(".")[0] for imported in imports(file, top_level_only=True)}
            assert "torch" not in found, name


def test_dali_and_triton_are_imported_where_they_belong() -> None:
    for name, file in modules("engine", "kernels", "tools").items():
        found = imports(file)
        assert name == "engine.feeds.dali" or not any(i.startswith("nvidia.dali") for i in found), (
            name
        )
        assert name.startswith("kernels") or not any(i.split(".")[0] == "triton" for i in found), (
            name
        )


def test_backward_stands_in_one_place() -> None:
    places = [
        name
        for name, file in modules("engine", "kernels", "tools").items()
        if ".backward(" in file.read_text()
    ]
    assert places == ["engine.train.step"]


def test_only_the_host_reads_the_rank() -> None:
    pattern = re.compile(r"""["'](LOCAL_|)(RANK|WORLD_SIZE)["']""")
    readers = [
        name
        for name, file in modules("engine", "kernels", "tools").items()
        if pattern.search(file.read_text())
    ]
    assert readers == ["engine.host"]


UNSAFE_CALLS = (
    "torch.load(",
    "allow_pickle",
    "shell=True",
    "eval(",
    "exec(",
    "yaml.load",
    "_object(",
    "joblib.load",
    "joblib.dump",
    "joblib import load",
    "joblib import dump",
)


def test_nothing_unsafe_reads_a_strangers_file() -> None:
    unsafe = {"pickle", "marshal", "shelve", "dill"}
    for name, file in modules("engine", "kernels", "tools").items():
        assert not {i.split(".")[0] for i in imports(file)} & unsafe, name
        text = file.read_text()
        for call in UNSAFE_CALLS:
            assert call not in text.replace("retrieval(", ""), f"{name} has {call}"


def test_numbers_carry_their_units() -> None:
    units = ("_s", "_ms", "_per_s", "_gib", "_bytes", "_w", "_j", "_percent", "_fraction", "_loss")
    for kind in (RunReport, Environment):
        for field in fields(kind):
            is_number = "int" in str(field.type) or "float" in str(field.type)
            if is_number and field.name != "format":
                assert field.name.startswith("num_") or field.name.endswith(units), (
                    f"{kind.__name__}.{field.name}"
                )


def test_a_report_cannot_be_built_without_its_circumstances() -> None:
    with pytest.raises(TypeError, match="environment"):
        RunReport()  # type: ignore[call-arg]
    with pytest.raises(TypeError, match="gpu_power_limit_w"):
        Environment()  # type: ignore[call-arg]


def test_the_commit_comes_from_git_or_the_environment(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(report, "ROOT", tmp_path)
    monkeypatch.delenv("ENGINE_COMMIT", raising=False)
    assert report.git_state() == ("unknown", None)
    monkeypatch.setenv("ENGINE_COMMIT", "abc")
    assert report.git_state() == ("abc", None)


def test_the_commit_is_never_that_of_a_foreign_repository(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """A wheel inside another repository's working tree, tracked or not, or called by its hook."""
    inside = tmp_path / "venv" / "site-packages"
    (inside / "engine").mkdir(parents=True)
    (inside / "engine" / "report.py").touch()
    git = ["git", "-C", str(tmp_path), "-c", "user.name=x", "-c", "user.email=x@x"]
    for words in (["init", "-q"], ["add", "."], ["commit", "-qm", "theirs"]):
        subprocess.run([*git, *words], check=True)
    monkeypatch.delenv("ENGINE_COMMIT", raising=False)
    monkeypatch.setattr(report, "ROOT", inside)
    assert report.git_state() == ("unknown", None)
    monkeypatch.setattr(report, "ROOT", tmp_path)  # no project of ours at its top
    assert report.git_state() == ("unknown", None)
    monkeypatch.undo()
    ours = report.git_state()
    monkeypatch.setenv("GIT_DIR", str(tmp_path / ".git"))
    assert report.git_state() == ours


def test_a_users_error_is_one_printable_line(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(SystemExit) as ended, exit_on_user_error():
        raise UserError("the label \x1b[31m\n is odd")
    assert ended.value.code == 2
    assert capsys.readouterr().err == "error: the label \\x1b[31m\\n is odd\n"
    monkeypatch.setattr(errors, "LINGER_S", 0.0)
    before = signal.getsignal(signal.SIGTERM)
    silent = UserError("another rank says it")
    silent.speaks = False
    with pytest.raises(SystemExit), exit_on_user_error():
        raise silent
    signal.signal(signal.SIGTERM, before)
    assert capsys.readouterr().err == ""
    assert printable("é, 字") == "é, 字"


def test_a_rank_that_was_asked_to_stop_waits_for_no_other(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its torchrun has died, say, and can ask it no more."""
    before = signal.getsignal(signal.SIGTERM)
    monkeypatch.setattr(errors.STOP, "number", signal.SIGTERM)
    monkeypatch.setattr(time, "sleep", lambda _: pytest.fail("it waits"))
    silent = UserError("another rank says it")
    silent.speaks = False
    with pytest.raises(SystemExit), exit_on_user_error():
        raise silent
    signal.signal(signal.SIGTERM, before)


def test_a_command_names_no_folders_of_the_user(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(
        "sys.argv", ["x.py", "--data=/home/me/full", "/tmp/out", "runs/demo/fast", "--lr=1e-3"]
    )
    assert report.command_line().endswith(" --data=full out runs/demo/fast --lr=1e-3")
    monkeypatch.setattr("sys.argv", ["x.py", "/home/me/my data/full set", "--set=data.path=~/a b"])
    assert report.command_line().endswith(" 'full set' '--set=data.path=a b'")
    told = report.without_folders(
        {"path": "/home/me/full", "notes": ["at /a/b/c: 3/4 of 1/2", "runs/x"]}
    )
    assert told == {"path": "full", "notes": ["at c: 3/4 of 1/2", "runs/x"]}


def test_strict_json_only(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="JSON"):
        report.write_json({"loss": float("nan")}, tmp_path / "x.json")
    assert list(tmp_path.iterdir()) == []
