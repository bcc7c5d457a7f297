"""Paths as users write them: the one place that expands `~` and gives relative ones their folder.

What lies behind a URL (`s3://...`) is no path; it passes as text, stripped of credentials.

Paths are bytes to the system. Those that are no UTF-8 pass through TOML as `file:` URIs (RFC 8089),
which are accepted wherever a config holds a path.
"""

import os
import re
from pathlib import Path
from typing import Any
from urllib.parse import unquote_to_bytes, urlsplit, urlunsplit

import click
from click.shell_completion import CompletionItem

from engine.errors import UserError
from engine.host import home

URI = "file:///"
_URL = re.compile(r"\b[A-Za-z][A-Za-z0-9+.-]*://[^\s'\"<>]*[^\s'\"<>,;:.)\]]")
_whole_urls: dict[str, str] = {}
"""By what may be said of them, those with credentials: they are in this process's memory alone."""


def is_url(text: object) -> bool:
    """Whether it names what no path does: something to be fetched."""
    return isinstance(text, str) and _URL.match(text) is not None and not text.startswith(URI)


def said_url(url: str) -> str:
    """The URL as it may be printed and stored: without user, password, query and fragment.

    In this process `whole_url` gives them back.

    Raises:
        UserError: it is none.
    """
    try:
        said = _stripped(url)
    except ValueError:
        raise UserError("the URL cannot be understood; check its host") from None
    if said != url.rstrip("/"):
        _whole_urls[said] = url
    return said


def whole_url(said: str) -> str:
    """The URL as the user gave it."""
    return _whole_urls.get(said, said)


def without_credentials(text: str) -> str:
    """The text, each URL in it without user, password, query and fragment."""

    def strip(found: re.Match[str]) -> str:
        try:
            return _stripped(found[0]) if is_url(found[0]) else found[0]
        except ValueError:
            return "a URL"

    return _URL.sub(strip, text)


def _stripped(url: str) -> str:
    parts = urlsplit(url)
    host = parts.netloc.rpartition("@")[2]
    return urlunsplit((parts.scheme, host, parts.path.rstrip("/"), "", ""))


def full_path(text: str | os.PathLike[str], folder: Path | None = None) -> Path:
    """An absolute path.

    Args:
        text: as the user wrote it: `~` and `~user` are homes, `file:///...` is a URI.
        folder: what a relative path is relative to; None: the current folder.
    Raises:
        UserError: the home is unknown, the current folder is gone, or the text cannot be a path.
    """
    path = written_path(os.fspath(text))
    try:
        return (folder / path if folder else path).absolute()
    except OSError as error:
        why = f"the current folder cannot be found ({error.strerror})"
        raise UserError(f"{text}: {why}; change to another, or write the whole path") from None


def path_text(path: str | os.PathLike[str]) -> str:
    """`path` as text that UTF-8 can hold; `full_path` gives the path back."""
    text = os.fspath(path)
    try:
        text.encode()
    except UnicodeEncodeError:
        return Path(text).absolute().as_uri()
    return text


def written_path(text: str) -> Path:
    """The path that a user, or `path_text`, wrote; a relative one stays so.

    Raises:
        UserError: the home is unknown, or the text cannot be a path.
    """
    if "\0" in text:
        raise UserError(f"{text!r}: a path holds no NUL character; write it without")
    if text.startswith(URI):
        return Path(os.fsdecode(unquote_to_bytes(urlsplit(text).path)))
    if not text.startswith("~"):
        return Path(text)
    user, _, rest = text.partition("/")
    found = home() if user == "~" else Path(os.path.expanduser(user))
    if found is None or not found.is_absolute():
        what = "this user has no home folder" if user == "~" else f"there is no user {user[1:]}"
        raise UserError(
            f"{text}: {what}; write the whole path, or ./{text} for a file of that name"
        )
    return found / rest


class Refused(click.ClickException):
    """A path on the command line that cannot be one: one line, exit code 2."""

    exit_code = 2

    def show(self, file: Any = None) -> None:
        click.echo(f"error: {self.message}", err=True)


class PathType(click.ParamType[Path]):
    """The type of every option and argument that is a path: `~` expanded, otherwise as written."""

    name = "path"

    def convert(
        self, value: Any, param: click.Parameter | None, context: click.Context | None
    ) -> Path:
        if not os.fspath(value):
            raise Refused("a path is empty; is a variable of the shell not set?")
        try:
            path = written_path(os.fspath(value))
            return path.absolute() if path.parts[:1] and path.parts[0].startswith("~") else path
        except UserError as error:
            raise Refused(str(error)) from None

    def shell_complete(
        self, context: click.Context, param: click.Parameter, incomplete: str
    ) -> list[CompletionItem]:
        return [CompletionItem(incomplete, type="file")]


class PathOrUrlType(PathType):
    """Of what may be a URL, too: that is a text, by `said_url`."""

    def convert(
        self, value: Any, param: click.Parameter | None, context: click.Context | None
    ) -> Any:
        try:
            return said_url(value) if is_url(value) else super().convert(value, param, context)
        except UserError as error:
            raise Refused(str(error)) from None


PATH = PathType()
PATH_OR_URL = PathOrUrlType()
