"""What is printed never fails the work: encodings, closed, full and broken streams."""

import io
import os
import re
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from engine import ui
from engine.report import ROOT
from tests.conftest import Command

KANNADA = "೧"
SCRIPT = r"""
import sys, click
from engine.errors import exit_on_user_error
from engine.ui import progress_bar

@click.command()
@click.argument("out")
def main(out):
    with exit_on_user_error():
        file = open(out + "/done", "wb")
        assert file.fileno() > 2, "a file of ours is stdout now"
        with progress_bar("\u0ce7", 1) as show:
            show(1)
        click.echo("\u0ce7 " * 10000)
        print("\u0ce7", flush=True)
        file.write(b"whole")
        file.close()

main()
"""
"""A command that prints, by click and without it, before its work is done."""


@pytest.mark.parametrize(
    ("encoding", "told"),
    [
        ("utf-8", "é೧ \\udcff\n".encode()),
        ("latin-1", b"\xe9\\u0ce7 \\udcff\n"),
        ("cp1252", b"\xe9\\u0ce7 \\udcff\n"),
        ("ascii", b"\\xe9\\u0ce7 \\udcff\n"),
    ],
)
def test_what_an_encoding_lacks_is_escaped(encoding: str, told: bytes) -> None:
    reading, writing = os.pipe()
    claimed = "utf-8" if encoding == "ascii" else encoding
    file = io.BufferedWriter(ui._LossyFile(writing, "w"))
    with ui._EscapingText(file, encoding, claimed) as stream:
        stream.write("é೧ \udcff\n")
    with open(reading, "rb") as pipe:
        assert pipe.read() == told


def test_a_stream_that_cannot_be_written_swallows() -> None:
    reading, broken = os.pipe()
    os.close(reading)
    for descriptor in (broken, os.open("/dev/full", os.O_WRONLY)):
        file = io.BufferedWriter(ui._LossyFile(descriptor, "w"))
        with ui._EscapingText(file, "utf-8", "utf-8") as stream:
            assert stream.write("12345\n") == 6


def test_a_pipe_that_does_not_block_gets_all() -> None:
    """More than fits into the pipe, to a reader that is slower."""
    reading, writing = os.pipe()
    os.set_blocking(writing, False)
    with open(reading, "rb") as pipe, ThreadPoolExecutor(1) as readers:
        told = readers.submit(pipe.read)
        with io.BufferedWriter(ui._LossyFile(writing, "w")) as file:
            file.write(b"x" * 1_000_000)
        assert len(told.result()) == 1_000_000


CASES = {
    "latin-1": ("PYTHONIOENCODING=latin-1 {}", rb"\\u0ce7 "),
    "C": ("LC_ALL=C PYTHONUTF8=0 {}", rb"\\u0ce7 "),
    "closed": ("{} >&-", b""),
    "both closed": ("{} >&- 2>&-", b""),
    "full": ("{} >/dev/full 2>/dev/full", b""),
    "reader has gone": ("set -o pipefail; {} | true", b""),
}


@pytest.mark.parametrize("case", CASES)
def test_a_command_does_its_work_on_any_output(case: str, tmp_path: Path) -> None:
    """In a real shell; the exit code is the work's."""
    line, told = CASES[case]
    python = f"{sys.executable} -c '{SCRIPT}' {tmp_path}"
    done = subprocess.run(["bash", "-c", line.format(python)], cwd=ROOT, capture_output=True)
    assert done.returncode == 0, done.stderr
    assert done.stderr == b"" and (tmp_path / "done").read_bytes() == b"whole"
    assert re.match(told, done.stdout)


def test_an_error_has_its_exit_code_on_any_output(tmp_path: Path) -> None:
    python = f"{sys.executable} -m tools.pack_tmnist {tmp_path}/none.csv {tmp_path}/out"
    lines = [f"{python} {streams}; echo $?" for streams in ("2>&-", "2>/dev/full", ">/dev/full")]
    done = subprocess.run(
        ["bash", "-c", "\n".join(lines)], cwd=ROOT, capture_output=True, text=True
    )
    assert done.stdout.split() == ["2", "2", "2"]
    assert len(done.stderr.splitlines()) == 1 and "none.csv" in done.stderr


def test_packing_and_its_help_on_odd_outputs(
    command: Command, small_csv: Path, tmp_path: Path
) -> None:
    python = f"{sys.executable} -m tools.pack_tmnist"
    line = f"{python} {small_csv} {tmp_path}/r | true; echo ${{PIPESTATUS[0]}}"
    assert command("bash", "-c", line).stdout == "0\n"
    assert (tmp_path / "r" / "manifest.json").is_file()
    done = command("bash", "-c", f"{python} --help > /dev/full; echo $?")
    assert done.stdout == "0\n" and not done.stderr


def test_an_ascii_terminal_gets_an_ascii_bar(monkeypatch: pytest.MonkeyPatch) -> None:
    told = io.BytesIO()
    terminal = io.TextIOWrapper(told, "ascii", "backslashreplace")
    monkeypatch.setattr(terminal, "isatty", lambda: True, raising=False)
    monkeypatch.setattr(sys, "stderr", terminal)
    monkeypatch.setenv("TERM", "xterm")
    with ui.progress_bar(f"packing {KANNADA}", 10) as show:
        show(5, "half")
    terminal.flush()
    assert b"packing \\u0ce7" in told.getvalue() and b"\\u25" not in told.getvalue()


def test_child_processes_are_read_as_utf8() -> None:
    """ruff holds files to their encoding; this does the same for what children print."""
    for folder in ("engine", "kernels", "tools"):
        for file in (ROOT / folder).rglob("*.py"):
            text = file.read_text(encoding="utf-8")
            assert "text=True" not in text and "universal_newlines" not in text, file
