"""The training engine: records, order, feeds, step, trainer. README.md here has the map.

These names are the public Python API. They are imported when first asked for, so that a command
which needs no torch loads none:

- `pack(SOURCE, OUT)`: a CSV or images as a record directory.
- `open_records(PATH)`: a record directory, verified.
- `loader(RECORDS, batch_size=...)`: its batches, for a training loop of your own.
- `RunConfig(...)`: what a run is; `Trainer.opened(CONFIG, RECORDS, OUT)` trains it.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from engine.config import RunConfig
    from engine.data.pack import pack
    from engine.data.records import open_records
    from engine.feeds.iterable import loader
    from engine.train.trainer import Trainer

__all__ = ["RunConfig", "Trainer", "loader", "open_records", "pack"]
__version__ = "0.1.0"
_HOMES = {
    "RunConfig": "engine.config",
    "Trainer": "engine.train.trainer",
    "loader": "engine.feeds.iterable",
    "open_records": "engine.data.records",
    "pack": "engine.data.pack",
}


def __getattr__(name: str) -> Any:
    """One of the public names, on its first use."""
    if name not in _HOMES:
        raise AttributeError(f"module 'engine' has no attribute {name!r}")
    found = getattr(import_module(_HOMES[name]), name)
    globals()[name] = found
    return found


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
