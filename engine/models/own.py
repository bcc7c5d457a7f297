"""A network of the user's own: a class in a Python file that the command line names.

The file's code is run, with all that it may do. So it is read only where a command line names it,
`--model FILE.py:NAME`; a run's folder keeps the file's name and its SHA-256, never its place, and
whoever goes on with the run, or shows it, names the file again. It must then be the same file.

It does not look for files, and keeps no compiled code beside them.
"""

import sys
from importlib.abc import SourceLoader
from importlib.util import module_from_spec, spec_from_loader
from pathlib import Path
from types import ModuleType

from engine.config import ModelConfig
from engine.config_text import read_code, sha256_of
from engine.errors import UserError, sentence
from engine.models.network import Network


class _Bytes(SourceLoader):
    """Python's import of source that is already read: what was hashed is what is run."""

    def __init__(self, file: str, data: bytes) -> None:
        self._file = file
        self._data = data

    def get_filename(self, fullname: str) -> str:
        return self._file

    def get_data(self, path: str) -> bytes:
        return self._data


def own_network(config: ModelConfig) -> type[Network]:
    """The class that `config.name`, FILE.py:NAME, means; the file is run once a process.

    Raises:
        UserError: the file is not named, not the run's, not to be read, or fails; or it holds no
            such network.
    """
    base, _, name = config.name.partition(":")
    if not config.file:
        why = "is code of the run's owner, which is run only where a command line names it"
        raise UserError(f"the network {config.name} {why}; add --model PATH/{config.name}")
    data = read_code(config.file)
    if sha256_of(data) != config.sha256:
        remedy = "give the file as it was, or start anew with another --out"
        raise UserError(f"{config.file}: is another file than the run's {base}; {remedy}")
    kind = getattr(_module(config, data), name, None)
    if not (isinstance(kind, type) and issubclass(kind, Network)):
        what = "is no class of it" if kind is None else "is no subclass of engine.models.Network"
        raise UserError(f"{config.file}: {name} {what}; engine/models/README.md shows one")
    return kind


def _module(config: ModelConfig, data: bytes) -> ModuleType:
    title = f"own_network_{config.sha256}"
    if title in sys.modules:
        return sys.modules[title]
    spec = spec_from_loader(title, _Bytes(config.file, data), origin=config.file)
    assert spec and spec.loader
    module = sys.modules[title] = module_from_spec(spec)
    try:
        spec.loader.exec_module(module)
    except Exception as error:  # the user's code: anything
        del sys.modules[title]
        where = f"line {error.lineno}: " if isinstance(error, SyntaxError) else ""
        why = f"{where}{type(error).__name__}: {sentence(error)}"
        raise UserError(f"{Path(config.file)}: cannot be run ({why}); mend the file") from error
    return module
