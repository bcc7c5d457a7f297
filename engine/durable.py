"""Files and directories that appear whole or not at all.

A temporary name, fsync, rename, fsync of the parent.

Used by records, checkpoints and reports. Nothing here knows what the files hold.
"""

import ctypes
import errno
import fcntl
import hashlib
import itertools
import json
import os
import re
import secrets
import shutil
import stat
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import Any, BinaryIO

from engine.errors import UserError

MANIFEST = "manifest.json"
MANIFEST_HASH = "manifest.sha256"
MANIFEST_LIMIT_BYTES = 2**20
FOLDER_LOCK = ".lock"
"""In a folder that `take_folder` took."""
NO_LOCKS = (errno.ENOSYS, errno.ENOTSUP, errno.ENOLCK)
"""What a file system without locks answers; there, nobody is kept out."""
AT_FDCWD = -100  # linux/fcntl.h
RENAME_EXCHANGE = 2  # linux/fs.h
SYNC_FILE_RANGE_WRITE = 2  # linux/fs.h
_LITTER = (
    (
        r"\.DS_Store|\._.*|\.AppleDouble|\.Spotlight-V100|\.Trashes|\.fseventsd|\.localized|Icon\r|"
        r"__MACOSX|\.TemporaryItems|\.apdisk",
        "macOS has left it there; delete it",
    ),
    (
        r"(?i:(eh)?thumbs\.db|desktop\.ini|\$RECYCLE\.BIN|System Volume Information)|"
        r".*:Zone\.Identifier",
        "Windows has left it there; delete it",
    ),
    (
        r"\.nfs[0-9a-fA-F]+|\.fuse_hidden.*",
        "a process holds a deleted file open; end that process, and it goes",
    ),
    (
        r"\.ipynb_checkpoints|__pycache__|\.mypy_cache|\.pytest_cache",
        "a tool has left it there; delete it",
    ),
    (r".*~|\..*\.sw[a-p]|#.*#|\.#.*", "an editor has left it there; delete it"),
    (
        r"\.gitkeep|\.keep|\.gitignore|\.gitattributes|\.git|\.dvcignore",
        "it is git's; move it to the folder above",
    ),
    (r"\.cache", "a download by Hugging Face has left it there; delete it"),
    (
        r"\.directory|\.Trash-[0-9]+|@eaDir|#recycle|\.stfolder|\.stversions",
        "a file manager or a storage has left it there; delete it",
    ),
    (
        r".*\.(part|partial|crdownload|tmp)|\..*\.[A-Za-z0-9]{6}",
        "a download or copy was cut short; copy again, then delete it",
    ),
)
"""Names of what systems and tools put into folders, and what to do with it."""
_REMEDIES = {
    errno.ENOSPC: "free space or choose another place",
    errno.EDQUOT: "free some of your quota or choose another place",
    errno.EIO: "the disk fails: look at the system's log, and choose another place",
    errno.EROFS: "the file system is read-only: choose another place",
    errno.EACCES: "choose a place that you may write to",
    errno.EPERM: "choose a place that you may write to",
    errno.ENOENT: "the folder is gone: make it again, or choose another place",
}
"""What to do where the system refuses to write."""
_LIBC = ctypes.CDLL(None, use_errno=True)


class Damaged(Exception):
    """A published directory is incomplete or damaged; the text says which file and how."""


class Foreign(Damaged):
    """It is published, but something else than is asked for; the text says what."""


class Disturbed(Damaged):
    """It may be whole, but cannot be taken as it is; the text ends with what to do."""


@contextmanager
def writing_file(path: Path) -> Iterator[BinaryIO]:
    """A file that becomes `path`, in one instant, when the block ends without an exception."""
    temporary = temporary_name(path)
    try:
        with open(temporary, "xb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    fsync(path.parent)


def write_file(path: Path, data: bytes) -> None:
    """Replace the content of `path` in one instant; after a crash it is the old or the new one."""
    with writing_file(path) as file:
        file.write(data)


@contextmanager
def publish_directory(target: Path) -> Iterator[Path]:
    """Yield a temporary directory that becomes `target` when the block ends without an exception.

    Every file is on the disk before the rename, and the rename before this returns. An existing
    target is exchanged in the same instant and deleted last. On any exception the temporary
    directory is deleted.
    """
    target.parent.mkdir(parents=True, exist_ok=True)
    temporary = temporary_name(target)
    temporary.mkdir()
    try:
        yield temporary
        for file in temporary.iterdir():
            fsync(file)
        fsync(temporary)
        if not os.path.lexists(target):
            os.rename(temporary, target)
        elif _LIBC.renameat2(
            AT_FDCWD, os.fsencode(temporary), AT_FDCWD, os.fsencode(target), RENAME_EXCHANGE
        ):
            reason = ctypes.get_errno()
            cannot = reason in (errno.EINVAL, errno.ENOSYS)  # NFS, for one
            raise OSError(
                reason,
                "this file system cannot exchange two names" if cannot else os.strerror(reason),
            )
        fsync(target.parent)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def temporary_name(target: Path) -> Path:
    """A new name beside `target`, which `remove_leftovers` knows."""
    return target.with_name(f".{target.name}.tmp-{secrets.token_hex(4)}")


def remove_leftovers(target: Path) -> None:
    """Delete what killed processes left beside `target`; the caller holds its lock."""
    ours = re.compile(rf"\.{re.escape(target.name)}\.tmp-[a-z0-9_]{{8}}")
    for entry in target.parent.iterdir():
        if ours.fullmatch(entry.name) and entry.is_dir() and not entry.is_symlink():
            shutil.rmtree(entry, ignore_errors=True)
        elif ours.fullmatch(entry.name):
            entry.unlink()


def write_manifest(directory: Path, content: dict[str, Any]) -> None:
    """Write manifest.json (last of all files) and its SHA-256 beside it."""
    data = json.dumps(content, sort_keys=True, ensure_ascii=False, allow_nan=False).encode()
    if len(data) > MANIFEST_LIMIT_BYTES:
        raise UserError(
            f"a manifest of {len(data)} bytes is larger than {MANIFEST_LIMIT_BYTES}; "
            f"write a smaller set"
        )
    (directory / MANIFEST_HASH).write_text(
        hashlib.sha256(data).hexdigest() + "\n", encoding="ascii"
    )
    (directory / MANIFEST).write_bytes(data)


def read_manifest(directory: Path, form: str, version: int) -> dict[str, Any]:
    """The manifest; Damaged if it is missing, too large, changed, or of another format."""
    data = read_small(directory / MANIFEST)
    return parse_manifest(data, read_small(directory / MANIFEST_HASH), form, version)


def parse_manifest(data: bytes, sha256: bytes, form: str, version: int) -> dict[str, Any]:
    """The manifest of these bytes, and of its hash's file; Damaged as in `read_manifest`."""
    if sha256 != hashlib.sha256(data).hexdigest().encode() + b"\n":
        raise Damaged(f"{MANIFEST} does not match {MANIFEST_HASH}")
    content = parse_json(data, MANIFEST)
    if not isinstance(content, dict):
        raise Damaged(f"{MANIFEST} is not a JSON object")
    found = (content.get("format"), content.get("version"))
    if found[0] != form and isinstance(found[0], str):
        raise Foreign(f"{MANIFEST} is of a {found[0][:40]!r}, not of a {form!r}")
    if found != (form, version):
        raise Damaged(f"format and version are {found}, this engine reads {(form, version)}")
    return content


def parse_json(data: bytes, name: str) -> Any:
    """A stranger's JSON; Damaged if it is none, repeats a key, nests deeply, or holds NaN."""
    try:
        return json.loads(
            data.decode(), object_pairs_hook=_no_duplicates, parse_constant=_no_constant
        )
    except (ValueError, RecursionError) as error:
        raise Damaged(f"{name} is not JSON ({str(error)[:80]})") from None


def open_regular(path: Path | bytes) -> int:
    """A descriptor of a regular file, or of one that a link leads to; Damaged if there is none.

    What is no regular file is not opened: opening a stranger's link to a device may already do
    something.

    Args:
        path: as bytes where many are opened: to make a Path takes as long as to open a file.
    """
    try:
        if not stat.S_ISREG(os.stat(path).st_mode):
            raise _irregular(path)
        handle = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    except OSError as error:
        raise _unopened(Path(os.fsdecode(path)), error) from None
    if not stat.S_ISREG(os.fstat(handle).st_mode):
        os.close(handle)
        raise _irregular(path)
    return handle


def _irregular(path: Path | bytes) -> Damaged:
    return Damaged(f"{Path(os.fsdecode(path)).name} is not a regular file")


def _unopened(path: Path, error: OSError) -> Damaged:
    if error.errno == errno.ELOOP:
        return Disturbed(f"{path.name} is a link that leads in a circle; copy the file itself here")
    if error.errno == errno.ENOENT and path.is_symlink():
        remedy = "fetch the file (dvc pull, git annex get), or copy the folder with cp -rL"
        return Disturbed(f"{path.name} is a link to {os.readlink(path)}, which is gone; {remedy}")
    return Damaged(f"{path.name} cannot be read ({error.strerror})")


def read_small(path: Path, limit_bytes: int = MANIFEST_LIMIT_BYTES) -> bytes:
    """The bytes of a file of at most `limit_bytes`, opened by `open_regular`."""
    with open(open_regular(path), "rb") as file:
        data = file.read(limit_bytes + 1)
    if data.startswith(b"version https://git-lfs"):
        raise Disturbed(f"{path.name} is a pointer of git-lfs; run git lfs pull")
    if len(data) > limit_bytes:
        raise Damaged(f"{path.name} is larger than {limit_bytes} bytes")
    return data


def refuse_unknown_files(directory: Path, known: set[str]) -> None:
    """Raise Damaged unless the directory holds exactly `known` beside the manifest and its hash."""
    present = set(os.listdir(directory)) - {MANIFEST, MANIFEST_HASH}
    for name in sorted(known - present):
        raise Damaged(f"{name} is missing")
    for name in sorted(present - known):
        others = f" ({len(present - known) - 1:,} other files are not, either)"
        more = others if len(present - known) > 1 else ""
        raise Disturbed(f"{name} is not listed in {MANIFEST}{more}; {_remedy(name)}")


def _remedy(name: str) -> str:
    """What to do with a file that is no part of a published directory."""
    for pattern, remedy in _LITTER:
        if re.fullmatch(pattern, name):
            return remedy
    return "move it away: nobody but you can know what it is for"


@contextmanager
def writing(target: Path) -> Iterator[None]:
    """Turn the system's refusal to write (full, read-only) into a UserError that names `target`."""
    try:
        yield
    except OSError as error:
        reason = error.strerror or error
        remedy = _REMEDIES.get(error.errno or 0, "choose another place")
        raise UserError(f"{target}: cannot be written ({reason}); {remedy}") from None


@contextmanager
def locked(target: Path, *, wait: bool = True) -> Iterator[None]:
    """Hold an exclusive lock beside `target`.

    It dies with its process, and its file goes with its last holder.

    UserError if another process holds it and `wait` is false.
    """
    target.parent.mkdir(parents=True, exist_ok=True)
    with _locked_file(lock_of(target), target, wait):
        yield


@contextmanager
def take_folder(
    out: Path | None, prefix: str = "", check: Callable[[Path], None] = lambda out: None
) -> Iterator[Path]:
    """A folder that no other process writes to while the block runs; what is left empty is removed.

    Args:
        out: the folder, made if it is missing; None: a new one, runs/PREFIX<time>, under a free
            name.
        prefix: of that name.
        check: raises UserError if `out` may not be used as it is found; called under the lock.
    Raises:
        UserError: another process writes to it, or it cannot be written.
    """
    is_new = out is None or not os.path.lexists(out)
    with writing(out or Path("runs")):
        folder = _new_folder(prefix) if out is None else out
        if not folder.is_dir():
            folder.mkdir(parents=True)
    with ExitStack() as stack:
        if is_new:
            stack.callback(_remove_if_empty, folder)
        with writing(folder):
            stack.enter_context(_locked_file(folder / FOLDER_LOCK, folder, wait=False))
        check(folder)
        yield folder


def _remove_if_empty(folder: Path) -> None:
    with suppress(OSError):
        folder.rmdir()


def is_empty(folder: Path) -> bool:
    """Whether a folder holds nothing but, perhaps, its lock."""
    return not set(os.listdir(folder)) - {FOLDER_LOCK}


def _new_folder(prefix: str) -> Path:
    """Make runs/PREFIX<time>, with a number behind it where another process was as quick."""
    name = time.strftime(f"{prefix}%Y%m%d-%H%M%S", time.gmtime())
    for number in itertools.count(1):
        folder = Path("runs") / (name if number == 1 else f"{name}-{number}")
        try:
            folder.mkdir(parents=True)
            break
        except FileExistsError:
            if not folder.exists():  # "runs" itself is a file
                raise
    return folder


@contextmanager
def _locked_file(path: Path, target: Path, wait: bool) -> Iterator[None]:
    handle = _lock(path, target, wait)
    try:
        os.ftruncate(handle, 0)
        os.pwrite(handle, str(os.getpid()).encode(), 0)
        yield
    finally:
        path.unlink(missing_ok=True)
        os.close(handle)


def try_lock(target: Path, *, shared: bool = False) -> int | None:
    """A descriptor that locks `target` until it is closed; None where others hold it.

    Its file stays beside `target`. Any number of processes may hold it `shared`.
    """
    operation = fcntl.LOCK_SH if shared else fcntl.LOCK_EX
    try:
        return _flock(lock_of(target), operation | fcntl.LOCK_NB)
    except BlockingIOError:
        return None


def lock_of(target: Path) -> Path:
    """The file that locks `target`, beside it."""
    return target.parent / f".{target.name}.lock"


def _lock(path: Path, target: Path, wait: bool) -> int:
    try:
        return _flock(path, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
    except BlockingIOError:
        holder = "unknown"
        with suppress(OSError):
            holder = path.read_text(encoding="ascii", errors="replace") or holder
        remedy = "wait for it, or choose another place"
        raise UserError(f"{target}: process {holder} is writing it; {remedy}") from None


def _flock(path: Path, operation: int) -> int:
    while True:
        flags = os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC
        handle = os.open(path, flags, 0o666)
        try:
            fcntl.flock(handle, operation)
        except BlockingIOError:
            os.close(handle)
            raise
        except OSError as error:
            if error.errno not in NO_LOCKS:
                os.close(handle)
                raise
            return handle
        with suppress(FileNotFoundError):  # its last holder may have removed it while we waited
            if os.path.samestat(os.stat(path), os.fstat(handle)):
                return handle
        os.close(handle)


def _no_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    if len(content := dict(pairs)) != len(pairs):
        raise ValueError("a key occurs twice")
    return content


def _no_constant(name: str) -> Any:
    raise ValueError(f"{name} is no number of JSON")


def fsync(path: Path) -> None:
    """Wait until a file's bytes, or a directory's names, are on the disk."""
    handle = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def begin_writeback(handle: int, offset: int, num_bytes: int) -> None:
    """Let the disk begin with bytes that were written, so that fsync has less to wait for.

    A hint: what the disk refuses, fsync says.
    """
    place = (ctypes.c_int64(offset), ctypes.c_int64(num_bytes))
    _LIBC.sync_file_range(handle, *place, SYNC_FILE_RANGE_WRITE)
