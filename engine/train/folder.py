"""A run's folder as it is found: is it free for a new run, and does it hold one that can go on?"""

from pathlib import Path

from engine.durable import is_empty
from engine.errors import UserError

CONFIG = "config.toml"
CHECKPOINTS = "checkpoints"


def check_new(out: Path) -> None:
    """UserError if a new run may not write to `out`."""
    if is_empty(out):
        return
    if _has_checkpoints(out):
        remedy = f"name another --out, or go on with --resume {out}"
        raise UserError(f"{out}: is not empty, it holds a run; {remedy}")
    raise UserError(f"{out}: is not empty, and holds no run to resume; name another --out")


def check_resumable(run: Path) -> None:
    """UserError if `run` is no folder of a run that can go on."""
    remedy = "give --resume the folder of an earlier run"
    if not run.is_dir():
        raise UserError(f"{run}: no such folder; {remedy}")
    if not (run / CONFIG).is_file():
        raise UserError(f"{run}: holds no {CONFIG}, so it is no run's folder; {remedy}")
    if not _has_checkpoints(run):
        anew = f"start anew with another --out (and --config {run / CONFIG})"
        raise UserError(f"{run}: holds no checkpoint to resume from; {anew}")


def _has_checkpoints(run: Path) -> bool:
    return any((run / CHECKPOINTS).glob("epoch-*"))
