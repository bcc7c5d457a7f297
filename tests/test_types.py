"""mypy, as `make check` runs it: among the slow tests, since it keeps one core busy for long."""

import subprocess
import sys

import pytest

from engine.host import ROOT


@pytest.mark.slow
def test_every_module_is_as_strictly_typed_as_mypy_is_asked_for() -> None:
    done = subprocess.run([sys.executable, "-m", "mypy"], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
