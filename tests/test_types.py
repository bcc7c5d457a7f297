"""mypy, as `make check` runs it: in turn with the other files, since it keeps one core busy."""

import subprocess
import sys

from engine.host import ROOT


def test_every_module_is_as_strictly_typed_as_mypy_is_asked_for() -> None:
    done = subprocess.run([sys.executable, "-m", "mypy"], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
