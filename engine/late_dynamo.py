"""torch._dynamo, imported when something of it is needed, not before.

torch imports its compiler at the first step of an optimiser, the first call of a custom operator
and by DistributedDataParallel, only to hear that nothing is compiled: that takes nearly as long as
the import of torch itself, in each rank (tests/bench/startup.py measures both). `import_late()`
puts a stand-in there that answers these three questions, and one that init_process_group has once
it is there; whoever asks it for anything else, as torch.compile does, gets the real module, from
then on and for good.
"""

import functools
import importlib
import sys
from collections.abc import Callable, Sequence
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec, PathFinder
from types import ModuleType
from typing import Any

NAME = "torch._dynamo"


def import_late() -> None:
    """Let the next `import torch._dynamo` of this process give the stand-in, if none was yet."""
    if NAME not in sys.modules and _FINDER not in sys.meta_path:
        sys.meta_path.insert(0, _FINDER)


def is_loaded() -> bool:
    """Whether this process has the real module."""
    return NAME in sys.modules and not isinstance(sys.modules[NAME], StandIn)


def load() -> ModuleType:
    """The real module, imported now if it was not."""
    if _FINDER in sys.meta_path:
        sys.meta_path.remove(_FINDER)
    if not is_loaded():
        sys.modules.pop(NAME, None)
        vars(sys.modules["torch"]).pop("_dynamo", None)
    return importlib.import_module(NAME)


class StandIn(ModuleType):
    """Answers what torch asks of its compiler outside compiled code."""

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):  # of modules; the import system asks for them
            raise AttributeError(name)
        return getattr(load(), name)

    @property
    def utils(self) -> Any:
        """A name of torch._dynamo.utils, before which DistributedDataParallel names the package."""
        return load().utils if is_loaded() else _Utils(f"{NAME}.utils")

    @property
    def trace_rules(self) -> Any:
        """torch._dynamo.trace_rules, whose caches a new process group clears."""
        return load().trace_rules if is_loaded() else _TraceRules(f"{NAME}.trace_rules")

    def graph_break(self, *args: Any, **kwargs: Any) -> None:
        """Nothing is traced, so nothing is to be broken off."""
        if is_loaded():
            load().graph_break(*args, **kwargs)

    def disable(self, fn: Callable[..., Any] | None = None, *args: Any, **kwargs: Any) -> Any:
        """`fn`, kept out of compiled code once there can be any."""
        if fn is None or is_loaded():
            return load().disable(fn, *args, **kwargs)
        found: list[Callable[..., Any]] = []

        @functools.wraps(fn)
        def call(*inputs: Any, **named: Any) -> Any:
            if not found and is_loaded():
                found.append(load().disable(fn, *args, **kwargs))
            return (found[0] if found else fn)(*inputs, **named)

        return call


class _Utils(ModuleType):
    """torch._dynamo.utils as far as DistributedDataParallel's constructor asks it."""

    def __getattr__(self, name: str) -> Any:
        return getattr(load().utils, name)

    def get_optimize_ddp_mode(self) -> str:
        """What the real one says while nobody has set torch._dynamo.config.optimize_ddp."""
        return "ddp_optimizer"


class _TraceRules(ModuleType):
    """torch._dynamo.trace_rules as far as init_process_group asks it."""

    def __getattr__(self, name: str) -> Any:
        return getattr(load().trace_rules, name)

    def clear_lru_cache(self) -> None:
        """Nothing was traced, so nothing is cached."""


class _Finder(MetaPathFinder, Loader):
    """Finds the stand-in; of the package's modules, those of the real package."""

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        if fullname == NAME:
            real = PathFinder.find_spec(fullname, path, target)
            if real is None:
                return None
            spec = ModuleSpec(fullname, self, origin=real.origin, is_package=True)
            spec.submodule_search_locations = real.submodule_search_locations
            spec.has_location = True
            return spec
        return ModuleSpec(fullname, self) if fullname.startswith(f"{NAME}.") else None

    def create_module(self, spec: ModuleSpec) -> ModuleType:
        if spec.name == NAME:
            return StandIn(NAME)
        load()
        module = importlib.import_module(spec.name)
        spec.loader_state = module.__spec__
        return module

    def exec_module(self, module: ModuleType) -> None:
        """A real module has run already; give it back its own spec."""
        own = module.__spec__.loader_state if module.__spec__ else None
        if own is not None:
            module.__spec__ = own


_FINDER = _Finder()
