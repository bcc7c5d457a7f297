"""Folders that are taken: no two processes write to one, and none is left that holds nothing."""

import os
import threading
from pathlib import Path

import pytest

from engine.durable import is_empty, take_folder
from engine.errors import UserError


def test_a_taken_folder_is_refused_with_its_holder(tmp_path: Path) -> None:
    out = tmp_path / "deep" / "x"
    with take_folder(out) as taken:
        assert taken == out and is_empty(out) and out.is_dir()
        (out / "report.json").write_text("{}")
        with pytest.raises(UserError, match=f"x: process {os.getpid()} is writing it; wait"):
            take_folder(out).__enter__()
    assert [file.name for file in out.iterdir()] == ["report.json"] and not is_empty(out)
    with take_folder(out):  # free again
        pass
    assert out.exists()


def test_what_was_made_and_stays_empty_goes(tmp_path: Path) -> None:
    def refuse(out: Path) -> None:
        raise UserError("not that one")

    with pytest.raises(UserError, match="not that one"):
        take_folder(tmp_path / "x", check=refuse).__enter__()
    assert list(tmp_path.iterdir()) == []
    (tmp_path / "mine").mkdir()
    with take_folder(tmp_path / "mine"):
        pass
    assert (tmp_path / "mine").is_dir()


def test_names_of_the_same_second_do_not_collide(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """Ten at once, all within one second: each gets a folder of its own."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("time.strftime", lambda form, when: "profile-20261125-120000")
    together, names = threading.Barrier(10), []

    def take() -> None:
        together.wait()
        with take_folder(None, "profile-") as folder:
            names.append(folder.name)
            (folder / "x").touch()
            together.wait()

    threads = [threading.Thread(target=take) for _ in range(10)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(20)
    numbers = ["", *(f"-{number}" for number in range(2, 11))]
    assert sorted(names) == sorted(f"profile-20261125-120000{number}" for number in numbers)
    assert sorted(path.name for path in (tmp_path / "runs").iterdir()) == sorted(names)


def test_places_that_are_no_folder_are_named(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    for out in (tmp_path / "file", tmp_path / "file" / "below"):
        with pytest.raises(UserError, match="file.*: cannot be written"):
            take_folder(out).__enter__()
    assert (tmp_path / "file").is_file()


def test_a_lock_left_by_a_killed_process_holds_nobody(tmp_path: Path) -> None:
    (tmp_path / ".lock").write_text("99999")
    assert is_empty(tmp_path)
    with take_folder(tmp_path):
        pass
