"""Record directories behind URLs: whole copies in this machine's cache, and publishing to a URL.

`local` is where a URL becomes a path; behind it all is as with records on a disk. A URL is any of
fsspec's (s3://, gs://, https://). Its manifest is read at each start, and names the copy: other
records at the same URL are another copy. Blocks are compared with the manifest as they come, so
that a download that broke goes on behind the last right one. One process of a machine downloads,
the others wait for it. All copies share a size limit: those used least recently go first, never one
that a process uses.

Credentials are in no name, text or error. Does not: read over the network while training.
"""

import os
import secrets
import shutil
import socket
import sys
import time
import zlib
from collections.abc import Callable, Iterator
from concurrent.futures import FIRST_EXCEPTION, ThreadPoolExecutor, wait
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, BinaryIO

import click

from engine.config import DataConfig
from engine.data import server
from engine.data.record_file import BLOCK_BYTES, FONTS, FileEntry
from engine.data.server import CLAIM, PUBLISH, RemoteFolder, Unreachable, Wanted
from engine.durable import MANIFEST, MANIFEST_HASH, fsync, lock_of, try_lock, writing
from engine.errors import UserError
from engine.host import env_local_rank, user_cache
from engine.paths import PathOrUrlType, Refused, is_url
from engine.ui import progress_bar

CACHE = "remote"
PART = ".part"
"""Ends the name of a copy that is not whole yet."""
READERS = 4
_held: dict[Path, int] = {}
"""The copies that this process uses, and the locks that keep them until it ends."""


def local(
    path: str | Path,
    cache_gib: float = DataConfig.cache_gib,
    sign: Callable[[], None] = lambda: None,
) -> Path:
    """Where the records at a path or URL lie on this machine; fetched first, if need be.

    Args:
        cache_gib: limit of all copies together, GiB.
        sign: called about once a second while a download goes on.
    Raises:
        UserError: the URL's records cannot be fetched or kept; never for a path.
    """
    if not is_url(path):
        return Path(path)
    start_s = time.time()
    remote = RemoteFolder(str(path))
    cache = user_cache() / CACHE
    with writing(cache):
        cache.mkdir(exist_ok=True)
        try:
            wanted = remote.wanted()
        except Unreachable as error:
            kept = _newest(cache, remote)
            if kept is None or not _take(kept):
                raise
            if env_local_rank() == 0:
                _say(f"note: {str(error).rpartition(';')[0]}; the copy in {kept} is used")
            return kept
        copy = cache / wanted.name

        def download() -> None:
            with _shared_failure(lock_of(copy), start_s):
                _download(remote, wanted, copy, cache_gib, sign)

        _wait_for(copy, download, remote.said)
        return copy


def is_copy(folder: Path) -> bool:
    """Whether it is the copy of a URL's records that this process uses."""
    return folder in _held


def publish(records: Path, url: str) -> None:
    """Copy a record directory to a URL, its manifest last: before that, nobody takes it for one.

    What was copied is deleted again where this fails. Of two that publish to one URL at the same
    time, the second is refused.

    Raises:
        UserError: the URL holds records already, another process publishes some there, or it
            cannot be written.
    """
    remote = RemoteFolder(url)
    last = [MANIFEST_HASH, MANIFEST]
    started = time.strftime("%Y-%m-%d %H:%M:%S UTC", time.gmtime())
    once = secrets.token_hex(4)
    remote.claim(f"process {os.getpid()} on {socket.gethostname()} ({started}, {once})")
    to_delete = [CLAIM]
    try:
        remote.check_free()
        for name in [*sorted(set(os.listdir(records)) - set(last)), *last]:
            to_delete.append(name)
            remote.put(records / name)
        to_delete = [CLAIM]
    finally:
        remote.remove(to_delete)  # the claim last


def check_free(url: str) -> None:
    """UserError if a URL holds records already, or cannot be published to."""
    RemoteFolder(url).check_free()


def _newest(cache: Path, remote: RemoteFolder) -> Path | None:
    """The copy of a URL's records that was used last."""
    copies = [copy for copy in cache.glob(f"{remote.name}-*") if copy.suffix != PART]
    return max(copies, key=lambda copy: copy.stat().st_mtime, default=None)


def _take(copy: Path) -> bool:
    """Whether the copy is there, and nobody deletes it from now on until this process ends."""
    if copy in _held and not copy.is_dir():  # the user has deleted it
        os.close(_held.pop(copy))
    if copy not in _held:
        handle = try_lock(copy, shared=True) if copy.is_dir() else None
        if handle is None:
            return False
        if not copy.is_dir():  # deleted in between
            os.close(handle)
            return False
        _held[copy] = handle
    os.utime(copy)
    return True


def _wait_for(copy: Path, download: Callable[[], None], said: str) -> None:
    """Take a copy: made here, or by another process, which is waited for while it gets on."""
    size_seen = -1
    end_s = 0.0
    while not _take(copy):
        with _locked(copy) as is_ours:
            if is_ours and not copy.is_dir():
                download()
            if is_ours:
                continue
        if (size := _size(_part_of(copy))) != size_seen:
            size_seen = size
            end_s = time.monotonic() + 2 * server.PATIENCE_S
        if time.monotonic() > end_s:
            since = f"nothing for {2 * server.PATIENCE_S:.0f} s"
            what = f"another process downloads it, and got {since}"
            raise UserError(f"{said}: {what}; end that one, or wait for it, and start again")
        time.sleep(server.SHORTEST_PAUSE_S)


@contextmanager
def _shared_failure(lock: Path, since_s: float) -> Iterator[None]:
    """Leave the sentence of what fails inside in the lock's file; raise one left after `since_s`.

    So those that waited do not try, one after the other, what one has tried for long.
    """
    when_s, _, said = lock.read_text(encoding="utf-8").partition(" ")
    if said and float(when_s) > since_s:
        raise UserError(said)
    try:
        yield
    except UserError as error:
        lock.write_text(f"{time.time()} {error}", encoding="utf-8")
        raise


@contextmanager
def _locked(copy: Path) -> Iterator[bool]:
    """Whether no other process uses or makes the copy, while this is entered."""
    handle = try_lock(copy)
    try:
        yield handle is not None
    finally:
        if handle is not None:
            os.close(handle)


def _download(
    remote: RemoteFolder, wanted: Wanted, copy: Path, cache_gib: float, sign: Callable[[], None]
) -> None:
    """Make the copy, from what is there of it already; under its lock."""
    part = _part_of(copy)
    _make_room(part, wanted.num_bytes, cache_gib)
    part.mkdir(exist_ok=True)
    _say(f"fetching {wanted.num_bytes / 1e6:,.1f} MB from {remote.said} into {copy}")
    (part / MANIFEST).write_bytes(wanted.manifest)
    (part / MANIFEST_HASH).write_bytes(wanted.manifest_hash)
    (part / FONTS).write_bytes(remote.fonts(wanted))
    pool = ThreadPoolExecutor(READERS)
    try:
        pending = {pool.submit(_fetch, remote, file, part / file.name) for file in wanted.files}
        _watch(pending, remote, wanted, sign)
    finally:
        remote.is_over = True
        pool.shutdown(cancel_futures=True)
    for file in part.iterdir():
        fsync(file)
    fsync(part)
    os.rename(part, copy)
    fsync(copy.parent)


def _watch(
    pending: set[Any], remote: RemoteFolder, wanted: Wanted, sign: Callable[[], None]
) -> None:
    """Wait for the readers, and let it be seen that they get on; raises what one of them did."""
    num_seen = 0
    with progress_bar("fetching records", wanted.num_bytes) as show:
        while pending:
            done, pending = wait(pending, 1.0, FIRST_EXCEPTION)
            for future in done:
                future.result()
            if remote.num_received > num_seen:
                num_seen = remote.num_received
                sign()
                show(num_seen)


def _fetch(remote: RemoteFolder, file: FileEntry, path: Path) -> None:
    """Bring a file, block by block, on from what is right of it.

    Raises:
        UserError: a block was damaged twice, or does not come.
    """
    with open(os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666), "r+b") as opened:
        start = _num_right_in(opened, file)
        remote.received(start)
        opened.seek(start)
        opened.truncate()
        damaged = -1
        while start < file.bytes:
            data = remote.part(file, start)
            num_right = _num_right(data, file, start)
            if not num_right and start == damaged:
                what = f"{file.name}: the block at byte {start} has not its CRC32, twice"
                raise UserError(f"{remote.said}: damaged: {what}; {PUBLISH}")
            opened.write(data[:num_right])
            start += num_right
            if num_right:
                remote.received(num_right)
            if len(data) > num_right:
                damaged = start


def _num_right(data: bytes, file: FileEntry, start: int) -> int:
    """How many bytes of a file, from `start` on, are blocks that are whole and right."""
    num_right = 0
    for crc32 in file.crc32[start // BLOCK_BYTES :]:
        block_bytes = file.block_bytes(start + num_right)
        block = memoryview(data)[num_right : num_right + block_bytes]
        if len(block) < block_bytes or zlib.crc32(block) != crc32:
            break
        num_right += block_bytes
    return num_right


def _num_right_in(opened: BinaryIO, file: FileEntry) -> int:
    """How many bytes of what an earlier download left are right."""
    start = 0
    while num_right := _num_right(opened.read(server.PART_BYTES), file, start):
        start += num_right
        opened.seek(start)
    return start


def _make_room(part: Path, num_bytes: int, cache_gib: float) -> None:
    """Delete the copies used least recently until another of `num_bytes` keeps to the limit.

    Raises:
        UserError: it does not, even so.
    """
    left_bytes = cache_gib * 2**30 - num_bytes
    what = f"{num_bytes / 2**30:.3g} GiB of records do not fit"
    others = [folder for folder in part.parent.iterdir() if folder.is_dir() and folder != part]
    others.sort(key=lambda folder: folder.stat().st_mtime)
    used_bytes = sum(map(_size, others))
    for folder in others:
        if 0 <= left_bytes < used_bytes:
            used_bytes -= _delete(folder)
    if left_bytes >= 0 and used_bytes:
        what += f" beside {used_bytes / 2**30:.3g} GiB that are in use"
    if left_bytes < used_bytes:
        limit = f"the limit of {cache_gib:g} GiB"
        remedy = "give engine.run --set data.cache_gib=MORE, or copy the records to a disk"
        raise UserError(f"{part.parent}: {what} within {limit}; {remedy}")


def _delete(folder: Path) -> int:
    """Delete a copy, whole or not, that nobody uses; the bytes it had."""
    copy = folder.with_name(folder.name.removesuffix(PART))
    with _locked(copy) as is_free:
        if not is_free:
            return 0
        num_bytes = _size(folder)
        part = _part_of(copy)
        if folder != part:
            os.rename(folder, part)  # whatever happens now, it is never taken for whole
        shutil.rmtree(part)
        lock_of(copy).unlink(missing_ok=True)
        return num_bytes


def _part_of(copy: Path) -> Path:
    """Where a copy is before it is whole."""
    return copy.with_name(copy.name + PART)


def _size(folder: Path) -> int:
    """Bytes of the files in a folder, as far as it is there."""
    num_bytes = 0
    with suppress(FileNotFoundError):
        for file in folder.iterdir():
            num_bytes += file.stat().st_size
    return num_bytes


def _say(line: str) -> None:
    """On stderr: what commands print may be answers."""
    print(line, file=sys.stderr, flush=True)


class RecordsType(PathOrUrlType):
    """The type of an option that names a record directory: a URL's is fetched."""

    def convert(
        self, value: Any, param: click.Parameter | None, context: click.Context | None
    ) -> Path:
        found = super().convert(value, param, context)
        is_completing = context is not None and context.resilient_parsing
        try:
            return Path(found) if is_completing else local(found)
        except UserError as error:
            raise Refused(str(error)) from None


RECORDS = RecordsType()
