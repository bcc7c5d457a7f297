"""How .venv is made: the build of torch that is chosen, its size as said, what goes wrong."""

import subprocess
import sys
from pathlib import Path

import pytest

from engine.report import ROOT
from tests import resolve
from tools import set_up


def offer(monkeypatch: pytest.MonkeyPatch, offers: dict[str, str]) -> list[str]:
    """Let each index offer what is given, and list the indexes that are asked."""
    asked: list[str] = []

    def pip(*words: str, index: str = "") -> subprocess.CompletedProcess[str]:
        asked.append(index)
        return subprocess.CompletedProcess(words, 0, offers.get(index, ""), "")

    monkeypatch.setattr(set_up, "pip", pip)
    return asked


def test_the_newest_allowed_cpu_build_is_taken() -> None:
    line = (
        "torch (2.15.0)\nAvailable versions: 2.15.0+cpu, 2.14.1, 2.9.0+cpu, 2.13.0+cpu, 2.12.1+cpu"
    )
    assert set_up.cpu_version(line) == "2.13.0+cpu"
    assert set_up.cpu_version("Available versions: 2.15.0, 2.14.1, 2.13.0, 2.13.0+cu126") is None
    assert set_up.cpu_version("Available versions: 2.14.0+cpu.cxx11.abi, 2.10.0+cpu") is None
    assert set_up.cpu_version("") is None


def test_without_a_driver_the_own_index_comes_first_then_pytorchs(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.delenv("TORCH_INDEX", raising=False)
    asked = offer(monkeypatch, {"": "2.13.0+cpu"})
    assert set_up.choose(driver=False) == set_up.Torch("torch==2.13.0+cpu")
    assert asked == [""]
    asked = offer(monkeypatch, {"": "2.13.0", set_up.CPU_INDEX: "2.14.1+cpu"})
    assert set_up.choose(driver=False) == set_up.Torch("torch==2.14.1+cpu", set_up.CPU_INDEX)
    assert asked == ["", set_up.CPU_INDEX]
    offer(monkeypatch, {"": "2.13.0"})
    assert set_up.choose(driver=False) == set_up.Torch(set_up.torch_range())


def test_with_a_driver_the_index_is_not_searched_for_a_cpu_build(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.delenv("TORCH_INDEX", raising=False)
    assert offer(monkeypatch, {"": "2.13.0+cpu"}) == []
    assert set_up.choose(driver=True) == set_up.Torch(set_up.torch_range())


def test_an_index_that_is_named_and_offers_nothing_is_an_error(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("TORCH_INDEX", "https://example.invalid/cpu")
    asked = offer(monkeypatch, {"": "2.13.0+cpu"})
    with pytest.raises(set_up.SetUpError, match="TORCH_INDEX=https://example.invalid/cpu offers"):
        set_up.choose(driver=False)
    assert asked == ["https://example.invalid/cpu"]


def test_sizes_are_those_of_the_files(tmp_path: Path) -> None:
    wheel = tmp_path / "a wheel.whl"
    wheel.write_bytes(b"x" * 1500)
    assert set_up.num_bytes(wheel.as_uri()) == 1500
    assert set_up.num_bytes((tmp_path / "none.whl").as_uri()) is None
    assert set_up.readable(191_600_000) == "192 MB"
    assert set_up.readable(2_930_000_000) == "2.9 GB"


def test_a_python_that_cannot_make_an_environment_is_told_in_one_line(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(set_up, "VENV", tmp_path / ".venv")
    monkeypatch.setattr(set_up.sys, "executable", "/bin/false")
    with pytest.raises(set_up.SetUpError, match="apt-get install python3-venv") as told:
        set_up.make_venv()
    assert "\n" not in str(told.value) and not (tmp_path / ".venv").exists()


def test_every_torch_of_the_range_has_its_triton() -> None:
    """The table of pyproject.toml and its two ranges say the same."""
    table = set_up.project()["tool"]["engine"]["triton_of_torch"]
    minors = [int(version.split(".")[1]) for version in table]
    assert minors == list(range(minors[0], minors[-1] + 1))
    assert set_up.torch_range() == f"torch>=2.{minors[0]},<2.{minors[-1] + 1}"


def test_a_conflict_is_named_and_no_answer_is_no_success() -> None:
    """A pin that a CUDA build contradicts: the resolver's own words, as one line."""
    words = """error: No solution found when resolving dependencies
  ╰─▶ Because torch==2.13.0 depends on triton==3.7.1 and you require
      triton==3.6.0, we can conclude that your requirements are unsatisfiable.
"""
    case = resolve.Case("3.12", "torch 2.13", ())
    failed = subprocess.CompletedProcess((), 1, "", words)
    told = resolve.fault_of(case, failed, {})
    assert "\n" not in told
    assert "torch==2.13.0 depends on triton==3.7.1 and you require triton==3.6.0" in told
    silent = subprocess.CompletedProcess((), 1, "", "")
    assert resolve.fault_of(case, silent, {}) == "uv failed and said nothing"


def test_a_triton_that_the_table_does_not_name_fails() -> None:
    case = resolve.Case("3.12", "torch 2.14", (), triton="3.8.0")
    done = subprocess.CompletedProcess((), 0, "", "")
    assert not resolve.fault_of(case, done, {"triton": "3.8.0"})
    assert "3.7.1" in resolve.fault_of(case, done, {"triton": "3.7.1"})


def test_make_elsewhere_says_where_to_run_it(tmp_path: Path) -> None:
    done = subprocess.run(
        ["make", "-f", str(ROOT / "Makefile"), "test"],
        cwd=tmp_path, capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 2 and "make -C FOLDER" in done.stderr
    assert not list(tmp_path.iterdir())


def test_pyproject_names_no_pin_that_users_get() -> None:
    assert not [r for r in set_up.project()["project"]["dependencies"] if "==" in r.split(";")[0]]


def test_the_set_up_script_needs_the_standard_library_alone() -> None:
    line = "import sys; sys.path.insert(0, 'tools'); import set_up"
    done = subprocess.run([sys.executable, "-I", "-S", "-c", line], cwd=ROOT, capture_output=True)
    assert done.returncode == 0, done.stderr
