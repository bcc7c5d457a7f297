"""Is there room for a command's results? Asked before the work, so that none is done for nothing."""

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
    _check_access(path.parent, path)


def check_folder(path: Path) -> None:
    """UserError unless files can be written in the folder `path`, which may have to be made."""
    above = next(folder for folder in (path, *path.absolute().parents) if os.path.lexists(folder))
    if not above.is_dir():
        raise UserError(f"{path}: {above} is not a folder; name another place")
    _check_access(above, path)


def _check_access(folder: Path, path: Path) -> None:
    if not os.access(folder, os.W_OK | os.X_OK):
        raise UserError(
            f"{path}: cannot be written (no permission in {folder}); choose another place"
        )
