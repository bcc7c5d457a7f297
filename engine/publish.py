"""Files and directories that appear whole or not at all: temporary name, fsync, rename, fsync of the parent.

Used by records, checkpoints and reports. Nothing here knows what the files hold.
"""

import fcntl
import hashlib
import json
import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from engine.errors import UserError

MANIFEST = "manifest.json"
MANIFEST_HASH = "manifest.sha256"
MANIFEST_LIMIT_BYTES = 2**20


class Damaged(Exception):
    """A published directory is incomplete or damaged; the text says which file and how."""


def write_file(path: Path, data: bytes) -> None:
    """Write `data` to `path`, replacing it in one instant; after a crash the old or the new content is there."""
    handle, name = tempfile.mkstemp(prefix=f".{path.name}.tmp-", dir=path.parent)
    try:
        with os.fdopen(handle, "wb") as file:
            file.write(data)
            file.flush()
            os.fchmod(file.fileno(), 0o666 & ~_umask())
            os.fsync(file.fileno())
        os.replace(name, path)
    except BaseException:
        os.unlink(name)
        raise
    _fsync_directory(path.parent)


@contextmanager
def publish_directory(target: Path) -> Iterator[Path]:
    """Yield a temporary directory beside `target` that becomes `target` when the block ends without an exception.

    An existing target is moved aside first and deleted last. On any exception the temporary directory is deleted.
    """
    target.parent.mkdir(parents=True, exist_ok=True)
    temporary = Path(tempfile.mkdtemp(prefix=f".{target.name}.tmp-", dir=target.parent))
    try:
        os.chmod(temporary, 0o777 & ~_umask())
        yield temporary
        for file in temporary.iterdir():
            _fsync(file, os.O_RDONLY)
        _fsync_directory(temporary)
        _swap_in(temporary, target)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def write_manifest(directory: Path, content: dict[str, Any]) -> None:
    """Write manifest.json (last of all files) and its SHA-256 beside it."""
    data = json.dumps(content, sort_keys=True, ensure_ascii=False, allow_nan=False).encode()
    if len(data) > MANIFEST_LIMIT_BYTES:
        raise ValueError(f"a manifest of {len(data)} bytes is larger than {MANIFEST_LIMIT_BYTES}")
    (directory / MANIFEST_HASH).write_text(hashlib.sha256(data).hexdigest() + "\n")
    (directory / MANIFEST).write_bytes(data)


def read_manifest(directory: Path) -> dict[str, Any]:
    """The manifest, after its bytes were found to be those that were published.

    Raises:
        Damaged: missing, too large, or not what manifest.sha256 says.
    """
    data = read_small(directory / MANIFEST)
    if read_small(directory / MANIFEST_HASH).decode("ascii", "replace").strip() != hashlib.sha256(data).hexdigest():
        raise Damaged(f"{MANIFEST} does not match {MANIFEST_HASH}")
    try:
        content = json.loads(data, object_pairs_hook=_no_duplicates)
    except (ValueError, RecursionError) as error:
        raise Damaged(f"{MANIFEST} is not JSON ({error})") from None
    if not isinstance(content, dict):
        raise Damaged(f"{MANIFEST} is not a JSON object")
    return content


def read_small(path: Path) -> bytes:
    """The bytes of a regular file of at most 1 MiB."""
    try:
        with open(os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK), "rb") as file:
            data = file.read(MANIFEST_LIMIT_BYTES + 1)
    except OSError as error:
        raise Damaged(f"{path.name} cannot be read ({error.strerror})") from None
    if len(data) > MANIFEST_LIMIT_BYTES:
        raise Damaged(f"{path.name} is larger than {MANIFEST_LIMIT_BYTES} bytes")
    return data


def refuse_unknown_files(directory: Path, known: set[str]) -> None:
    """Raise Damaged unless the directory holds exactly `known` beside the manifest and its hash."""
    present = set(os.listdir(directory)) - {MANIFEST, MANIFEST_HASH}
    for name in sorted(known - present):
        raise Damaged(f"{name} is missing")
    for name in sorted(present - known):
        raise Damaged(f"{name} is not listed in {MANIFEST}")


@contextmanager
def writing(target: Path) -> Iterator[None]:
    """Turn the system's refusal to write (full, read-only, no permission) into a UserError that names `target`."""
    try:
        yield
    except OSError as error:
        reason = error.strerror or error
        raise UserError(f"{target}: cannot be written ({reason}); free space or choose another place") from None


@contextmanager
def locked(target: Path) -> Iterator[None]:
    """Hold an exclusive lock beside `target`; waits for another holder. The lock dies with its process."""
    target.parent.mkdir(parents=True, exist_ok=True)
    with open(target.parent / f".{target.name}.lock", "w") as handle:
        fcntl.flock(handle, fcntl.LOCK_EX)
        yield


def _swap_in(temporary: Path, target: Path) -> None:
    aside = Path(tempfile.mkdtemp(prefix=f".{target.name}.old-", dir=target.parent))
    try:
        if target.is_dir():
            os.rename(target, aside / "old")
        os.rename(temporary, target)
        _fsync_directory(target.parent)
    finally:
        if not target.exists() and (aside / "old").exists():
            os.rename(aside / "old", target)
        shutil.rmtree(aside, ignore_errors=True)


def _no_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    content = dict(pairs)
    if len(content) != len(pairs):
        raise ValueError("a key occurs twice")
    return content


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask


def _fsync_directory(path: Path) -> None:
    _fsync(path, os.O_RDONLY | os.O_DIRECTORY)


def _fsync(path: Path, flags: int) -> None:
    descriptor = os.open(path, flags)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
