"""Is there room for a command's file? Asked before the work, so that none is done in vain."""

import os
from pathlib import Path

from engine.errors import UserError


def check_file(path: Path) -> None:
    """UserError unless a file can be written at `path`, replacing an earlier one."""
    if path.is_dir():
        raise UserError(f"{path}: is a folder; name a file in it")
    if path.exists() and not path.is_file():
        raise UserError(f"{path}: is no ordinary file; choose another name")
    if not path.parent.is_dir():
        raise UserError(f"{path}: there is no folder {path.parent}; make it, or name another place")
    if not os.access(path.parent, os.W_OK | os.X_OK):
        why = f"no permission in {path.parent}"
        raise UserError(f"{path}: cannot be written ({why}); choose another place")
