"""What stands behind a URL: a folder on a server, read and written with patience.

Any kind that fsspec knows. What fails is tried again until it has failed for too long, or cannot
succeed; errors are one line, without credentials. Damage is seen by the manifest's checksums.

Does not: keep anything on a disk; remote.py does.
"""

import hashlib
import re
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar
from urllib.parse import SplitResult, unquote, urlsplit, urlunsplit

from engine.data.record_file import (
    BLOCK_BYTES,
    FONTS,
    FONTS_LIMIT_BYTES,
    FORMAT,
    SPLITS,
    VERSION,
    FileEntry,
    are_counts,
    entries_of,
)
from engine.durable import (
    MANIFEST,
    MANIFEST_HASH,
    MANIFEST_LIMIT_BYTES,
    Damaged,
    parse_manifest,
)
from engine.errors import UserError, sentence
from engine.paths import said_url, whole_url, without_credentials

PART_BYTES = 8 * BLOCK_BYTES
"""What is asked for at once."""
CONNECT_S = 10.0
READ_S = 30.0
"""For the next bytes of an answer."""
FIRST_WORD_S = 15.0
"""How long the manifest is tried for."""
PATIENCE_S = 60.0
"""How long a download is tried for without a new block; who waits for one waits twice that."""
SHORTEST_PAUSE_S = 0.1
LONGEST_PAUSE_S = 5.0
WEB = ("http", "https")
INSTALL = "pip install fsspec s3fs gcsfs aiohttp"
LOG_IN = "give credentials (of S3: AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, or AWS_PROFILE)"
CLAIM = "publishing"
"""The file of who publishes to a folder, as long as that goes on."""
CLAIM_LIMIT_BYTES = 1000
NAME_IT = "name the folder that tools/pack_tmnist published"
PUBLISH = "publish the records again, elsewhere"
REFUSED = ("NoCredentialsError", "PartialCredentialsError", "ProfileNotFound")
"""Errors of botocore, by name: it need not be here."""
T = TypeVar("T")


class Unreachable(UserError):
    """The server gives no answer that helps, however often it is asked."""


class Taken(UserError):
    """There are records already, or somebody publishes some."""


@dataclass(frozen=True)
class Wanted:
    """What a URL's manifest names."""

    name: str
    """Of its copy."""
    manifest: bytes
    manifest_hash: bytes
    files: list[FileEntry]
    fonts_bytes: int
    fonts_sha256: str

    @property
    def num_bytes(self) -> int:
        return len(self.manifest) + self.fonts_bytes + sum(file.bytes for file in self.files)


class RemoteFolder:
    """A URL's folder: reads and writes that are tried again while there is hope."""

    def __init__(self, url: str) -> None:
        self.said = said_url(url)
        self._url = urlsplit(whole_url(self.said))
        if self._url.scheme == "file" and self._url.netloc:
            what = f"names a host, {self._url.netloc!r}"
            raise UserError(f"{self.said}: {what}; write file:///, then the whole path")
        self._fs = self._connect()
        self.name = re.sub(r"[^A-Za-z0-9]+", "-", self.said.rpartition("/")[2])[-40:]
        self.name += f"-{hashlib.sha256(self.said.encode()).hexdigest()[:12]}"
        """How the names of its copies begin."""
        self.num_received = 0
        """Bytes of right blocks."""
        self.is_over = False
        """Where one reader has failed, the others try no more."""
        self._heard_s = 0.0
        """When the last right block came."""

    def _connect(self) -> Any:
        """The file system of its kind.

        Raises:
            UserError: fsspec knows none, or its package is not installed.
        """
        try:
            import fsspec

            kind = fsspec.get_filesystem_class(self._url.scheme)
            filesystem = kind(skip_instance_cache=True, **_options(self._url))
        except ImportError as error:
            what = f"a package is missing for it ({sentence(error)})"
            raise UserError(f"{self.said}: {what}; {INSTALL}") from None
        except Exception as error:  # each kind has its own
            remedy = "write s3://, gs:// or https://"
            raise UserError(f"{self.said}: {self._reason(error)}; {remedy}") from None
        if hasattr(filesystem, "retries"):
            filesystem.retries = 1  # we try again ourselves
        return filesystem

    def _where(self, name: str) -> str:
        """A file of the folder, as its file system names it."""
        if self._url.scheme in WEB:
            path = f"{self._url.path.rstrip('/')}/{name}"
            return urlunsplit((self._url.scheme, self._url.netloc, path, self._url.query, ""))
        return f"{self._fs._strip_protocol(self.said)}/{name}"

    def patiently(self, name: str, work: Callable[[], T], patience_s: float) -> T:
        """Try `work` on a file until it succeeds, or `patience_s` since a right block came.

        Raises:
            UserError: to try again would not help.
            Unreachable: it did not.
        """
        start_s = time.monotonic()
        pause_s = SHORTEST_PAUSE_S
        while True:
            try:
                return work()
            except UserError:
                raise
            except Exception as error:  # fsspec's file systems have no common type
                reason = self._reason(error)
                if remedy := _remedy(error):
                    raise UserError(f"{self.said}/{name}: {reason}; {remedy}") from None
            end_s = max(start_s, self._heard_s) + patience_s
            if self.is_over or time.monotonic() + pause_s > end_s:
                tried = f"tried for {patience_s:g} s"
                raise Unreachable(f"{self.said}/{name}: {reason}, {tried}; start again later")
            time.sleep(pause_s)
            pause_s = min(2 * pause_s, LONGEST_PAUSE_S)

    def _reason(self, error: Exception) -> str:
        """The error in a line, without credentials."""
        if status := getattr(error, "status", 0):
            return f"HTTP {status}"
        text = without_credentials(sentence(error))
        for secret in (self._url.query, self._url.password):
            text = text.replace(secret, "...") if secret else text
        return text

    def received(self, num_bytes: int) -> None:
        """Count bytes of right blocks that came."""
        self.num_received += num_bytes
        self._heard_s = time.monotonic()

    def small(self, name: str, limit_bytes: int, patience_s: float) -> bytes:
        """A whole file of at most `limit_bytes`, or as much of it."""
        return self.patiently(name, lambda: self._read(name, 0, limit_bytes), patience_s)

    def _read(self, name: str, start: int, stop: int) -> bytes:
        data: bytes = self._fs.cat_file(self._where(name), start=start, end=stop)
        return data

    def part(self, file: FileEntry, start: int) -> bytes:
        """The bytes of a file from `start` on, a block at least, perhaps all that follow."""
        stop = min(start + PART_BYTES, file.bytes)

        def read() -> bytes:
            data = self._read(file.name, start, stop)
            if len(data) == file.bytes:  # a server that knows no ranges
                data = data[start:]
            if len(data) < file.block_bytes(start):
                raise EOFError(f"{file.name} ended early")
            return data

        return self.patiently(file.name, read, PATIENCE_S)

    def wanted(self) -> Wanted:
        """What its manifest names; asked for once more where it is damaged."""
        for is_last in (False, True):
            manifest = self.small(MANIFEST, MANIFEST_LIMIT_BYTES + 1, FIRST_WORD_S)
            manifest_hash = self.small(MANIFEST_HASH, MANIFEST_LIMIT_BYTES, FIRST_WORD_S)
            try:
                return self._parsed(manifest, manifest_hash)
            except Damaged as error:
                if is_last:
                    raise UserError(f"{self.said}: damaged: {error}; {PUBLISH}") from None
        raise AssertionError

    def _parsed(self, manifest: bytes, manifest_hash: bytes) -> Wanted:
        content = parse_manifest(manifest, manifest_hash, FORMAT, VERSION)
        try:
            sides = content["height"], content["width"]
            if not are_counts(*sides):
                raise Damaged(f"images of {str(sides)[:40]} pixels cannot be")
            splits = content["splits"]
            files = [
                file
                for split in SPLITS
                if split in splits
                for file in entries_of(split, splits[split]["files"], sides[0] * sides[1])
            ]
            fonts = content["fonts"]
            fonts_bytes, fonts_sha256 = fonts["bytes"], str(fonts["sha256"])
        except (AttributeError, KeyError, OverflowError, TypeError, ValueError) as error:
            raise Damaged(f"{MANIFEST} is malformed ({error!r})") from None
        if not are_counts(fonts_bytes) or fonts_bytes > FONTS_LIMIT_BYTES:
            raise Damaged(f"{FONTS} cannot have {fonts_bytes} bytes")
        name = f"{self.name}-{hashlib.sha256(manifest).hexdigest()[:16]}"
        return Wanted(name, manifest, manifest_hash, files, fonts_bytes, fonts_sha256)

    def fonts(self, wanted: Wanted) -> bytes:
        """fonts.json; asked for once more where it is damaged."""
        for _ in range(2):
            data = self.small(FONTS, FONTS_LIMIT_BYTES, PATIENCE_S)
            if hashlib.sha256(data).hexdigest() == wanted.fonts_sha256:
                return data
        raise UserError(f"{self.said}: damaged: {FONTS} has not its SHA-256; {PUBLISH}")

    def claim(self, who: str) -> None:
        """Leave a file that says who publishes here; the server takes one alone.

        Raises:
            Taken: there is another's.
            UserError: the URL cannot be written to.
        """
        self._check_writable()

        def create() -> None:
            try:
                self._fs.pipe_file(self._where(CLAIM), who.encode(), mode="create")
            except Exception:  # fsspec's file systems have no common type
                found = self._claimed()
                if not found:
                    raise
                if found != who:  # our own is there where only the answer was lost
                    remedy = f"wait for it, or delete {self.said}/{CLAIM} if it was killed"
                    raise Taken(f"{self.said}: {found} publishes there; {remedy}") from None

        self.patiently(CLAIM, create, FIRST_WORD_S)

    def _claimed(self) -> str:
        """Who publishes here; "" if nobody says so."""
        with suppress(FileNotFoundError):
            found = self._read(CLAIM, 0, CLAIM_LIMIT_BYTES).decode(errors="replace")
            return re.sub(r"[^ -~]", "?", found)
        return ""

    def _check_writable(self) -> None:
        if self._url.scheme in WEB:
            raise UserError(f"{self.said}: cannot be written to; publish to s3:// or gs://")

    def check_free(self) -> None:
        """Refuse to publish where there are records."""
        self._check_writable()
        where = self._where(MANIFEST)
        if self.patiently(MANIFEST, lambda: self._fs.exists(where), FIRST_WORD_S):
            raise Taken(f"{self.said}: holds records already; name another URL")

    def put(self, file: Path) -> None:
        """Copy a file there."""
        where = self._where(file.name)
        self.patiently(file.name, lambda: self._fs.put_file(str(file), where), PATIENCE_S)

    def remove(self, names: list[str]) -> None:
        """Delete files, where the server lets us."""
        for name in reversed(names):
            with suppress(Exception):
                self._fs.rm_file(self._where(name))


def _options(url: SplitResult) -> dict[str, Any]:
    """What a file system of this kind is made with: time-outs, and a URL's user."""
    if url.scheme in WEB:
        import aiohttp

        limits = aiohttp.ClientTimeout(total=None, sock_connect=CONNECT_S, sock_read=READ_S)
        return {"client_kwargs": {"timeout": limits}}
    if url.scheme not in ("s3", "s3a"):
        return {}
    config = {
        "connect_timeout": CONNECT_S,
        "read_timeout": READ_S,
        "retries": {"total_max_attempts": 1},
        "response_checksum_validation": "when_required",  # we compare blocks ourselves
    }
    if not url.username:
        return {"config_kwargs": config}
    user = {"key": unquote(url.username), "secret": unquote(url.password or "")}
    return {"config_kwargs": config, **user}


def _remedy(error: Exception) -> str:
    """What to do about an error that would come again; empty where it may not."""
    status = getattr(error, "status", 0)
    name = type(error).__name__
    if isinstance(error, PermissionError) or status in (401, 403) or name in REFUSED:
        return LOG_IN
    if isinstance(error, FileNotFoundError):
        return NAME_IT
    if name in ("ParamValidationError", "InvalidURL", "InvalidUrlClientError"):
        return "check the URL"
    return ""
