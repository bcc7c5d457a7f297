"""Paths as users write them: homes, folders of config files, and names that no text can hold."""

import json
import os
from pathlib import Path

import pytest
from click.testing import CliRunner
from hypothesis import example, given
from hypothesis import strategies as st

from engine import host, run
from engine.config import DataConfig, RunConfig, override
from engine.config_text import load_toml, to_toml
from engine.errors import UserError
from engine.host import ROOT
from engine.paths import full_path, path_text, written_path
from engine.report import write_json
from tools.measure.matrix import read_cells

NAMES = st.binary(min_size=1, max_size=40).filter(lambda name: b"\0" not in name)


@given(name=NAMES)
@example(name="🔤/é".encode())
@example(name=b"\xff\xfe not UTF-8 \x80")
@example(name=b"~/a")
@example(name=b'quote " and \\ and \n line')
@example(name=b"file:///x")
def test_any_path_comes_back_from_toml_and_json(
    name: bytes, tmp_path_factory: pytest.TempPathFactory
) -> None:
    folder = tmp_path_factory.getbasetemp()
    path = "/" + os.fsdecode(name).lstrip("/")
    config = RunConfig(data=DataConfig(path=path))
    (folder / "config.toml").write_bytes(to_toml(config).encode())
    assert load_toml(RunConfig(), folder / "config.toml").data.path == str(Path(path))
    write_json({"path": path_text(path)}, folder / "x.json")
    found = json.loads((folder / "x.json").read_bytes().decode())["path"]
    assert os.fsencode(written_path(found)) == os.fsencode(Path(path))


def test_homes_are_expanded(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.delenv(host.ORIGINAL_HOME, raising=False)
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    assert full_path("~/r") == tmp_path / "r" and full_path("~") == tmp_path
    assert full_path("~root/r") == Path("/root/r")
    assert full_path("./~/r") == tmp_path / "~" / "r"
    assert override(RunConfig(), {"data.path": "~/r"}, "--set").data.path == str(tmp_path / "r")
    with pytest.raises(UserError, match=r"~nobody-such/r: there is no user nobody-such; write"):
        full_path("~nobody-such/r")
    with pytest.raises(UserError, match="--set: data.path: .*NUL"):
        override(RunConfig(), {"data.path": "a\0b"}, "--set")


def test_no_folder_is_ever_called_tilde(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv(host.ORIGINAL_HOME, "")  # prepare_process found none
    monkeypatch.chdir(tmp_path)
    for flag in ("--out=~/o", "--data=~/r", "--config=~/c", "--resume=~/o", "--set=data.path=~/r"):
        done = CliRunner().invoke(run.main, [flag])
        assert done.exit_code == 2 and not list(tmp_path.iterdir()), flag
        assert "no home folder; write the whole path" in done.stderr
        assert len(done.stderr.splitlines()) == 1


def test_a_files_relative_path_is_from_its_folder(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    (tmp_path / "configs").mkdir()
    (tmp_path / "configs" / "run.toml").write_text('[data]\npath = "../records"\n')
    rungs = '[[rung]]\nname = "a"\nset = { "data.path" = "records" }\n'
    (tmp_path / "configs" / "matrix.toml").write_text(rungs)
    monkeypatch.chdir(tmp_path)
    wanted = tmp_path / "configs" / ".." / "records"
    relative = Path("configs/run.toml")
    assert load_toml(RunConfig(), relative).data.path == str(wanted)
    monkeypatch.chdir("/")
    assert load_toml(RunConfig(), tmp_path / relative).data.path == str(wanted)
    _, cells = read_cells([tmp_path / "configs" / "run.toml", tmp_path / "configs" / "matrix.toml"])
    assert cells[0].settings["data.path"] == str(wanted)
    assert cells[1].settings["data.path"] == str(tmp_path / "configs" / "records")


def test_a_current_folder_that_is_gone_is_said(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    (tmp_path / "gone").mkdir()
    monkeypatch.chdir(tmp_path / "gone")
    (tmp_path / "gone").rmdir()
    with pytest.raises(UserError, match="the current folder cannot be found"):
        full_path("r")
    monkeypatch.chdir("/")


def test_every_option_that_is_a_path_is_read_in_one_way() -> None:
    for folder in ("engine", "tools"):
        for file in (ROOT / folder).rglob("*.py"):
            text = file.read_text(encoding="utf-8")
            assert "click.Path(" not in text and "expanduser(" not in text.replace(
                "os.path.expanduser(user)", ""
            ), file
