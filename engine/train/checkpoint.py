"""Checkpoints: directories of safetensors under a manifest with hashes, published whole; no pickle.

RUN/checkpoints/epoch-0003/ holds model.safetensors, optim.safetensors (the optimiser's state) and
manifest.json with its hash: position in the order, loss scale, the config's digest and the data's
fingerprint. Loading takes the newest directory that verifies, and copies in place, so that a
captured graph keeps its addresses.
"""

import hashlib
import shutil
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load, save

from engine.durable import (
    Damaged,
    open_regular,
    publish_directory,
    read_manifest,
    refuse_unknown_files,
    write_file,
    write_manifest,
)
from engine.errors import UserError
from engine.train.state import Tensors, TrainState

FORMAT = "glyph-checkpoint"
VERSION = 1
NUM_KEPT = 2
FILES = ("model.safetensors", "optim.safetensors")


@dataclass(frozen=True, kw_only=True)
class Position:
    """Where a run stands after an epoch."""

    num_epochs: int
    num_steps: int
    train_s: float
    best_val_accuracy_fraction: float | None
    time_to_target_s: float | None


def save_checkpoint(
    run: Path,
    position: Position,
    state: TrainState,
    *,
    digest: str,
    fingerprint: str,
) -> None:
    """Publish a checkpoint and delete all but the newest two.

    Raises:
        UserError: a number is not finite; nothing is written.
        OSError: the disk refused; earlier checkpoints are untouched.
    """
    live = _files(state)
    for name, tensor in [item for tensors in live.values() for item in tensors.items()]:
        if not torch.isfinite(tensor).all():
            raise UserError(
                f"{name} is not finite after epoch {position.num_epochs}; lower optim.learning_rate"
            )
    files = {name: _packed(tensors) for name, tensors in live.items()}
    manifest = {
        "format": FORMAT,
        "version": VERSION,
        "config_digest": digest,
        "dataset_fingerprint": fingerprint,
        "position": asdict(position),
        "scaler": state.scaler.state_dict(),
        "sha256": {name: hashlib.sha256(data).hexdigest() for name, data in files.items()},
    }
    with publish_directory(run / "checkpoints" / f"epoch-{position.num_epochs:04}") as directory:
        for name, data in files.items():
            (directory / name).write_bytes(data)
        write_manifest(directory, manifest)
    for old in _checkpoints(run)[NUM_KEPT:]:
        shutil.rmtree(old)


def load_checkpoint(
    run: Path,
    state: TrainState,
    *,
    digest: str,
    fingerprint: str,
) -> tuple[Position, list[str]]:
    """Copy the newest checkpoint that verifies into the live tensors.

    The optimiser's state must exist: warm up first.

    Returns:
        The position, and a sentence for each newer checkpoint that was skipped.
    Raises:
        UserError: none verifies, or the run is of another config, other records or another model.
    """
    skipped = []
    for directory in _checkpoints(run):
        try:
            manifest, files = _read(directory)
        except (Damaged, OSError) as error:
            skipped.append(f"{directory.name} was skipped: {error}")
            continue
        if manifest["config_digest"] != digest:
            remedy = "resume with the flags the run was started with"
            raise UserError(f"{directory}: was made by another configuration; {remedy}")
        if manifest["dataset_fingerprint"] != fingerprint:
            remedy = "give the --data the run was started with"
            raise UserError(f"{directory}: was trained on other records; {remedy}")
        for name, tensors in _files(state).items():
            if _shapes(tensors) != _shapes(files[name]):
                remedy = "resume with the model it was made by"
                raise UserError(f"{directory}: holds tensors of another model; {remedy}")
            with torch.no_grad():
                for key, tensor in tensors.items():
                    tensor.copy_(files[name][key])
        if state.scaler.is_enabled():
            state.scaler.load_state_dict(manifest["scaler"])
        return Position(**manifest["position"]), skipped
    why = "; ".join(skipped) or "start anew without --resume"
    raise UserError(f"{run}: holds no checkpoint that verifies; {why}")


def _shapes(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Size]:
    return {name: tensor.shape for name, tensor in tensors.items()}


def save_model(path: Path, model: torch.nn.Module) -> None:
    """Write the parameters alone as one safetensors file."""
    write_file(path, _packed(model.state_dict()))


def _checkpoints(run: Path) -> list[Path]:
    return sorted((run / "checkpoints").glob("epoch-*"), reverse=True)


def _read(directory: Path) -> tuple[dict[str, Any], dict[str, Tensors]]:
    manifest = read_manifest(directory, FORMAT, VERSION)
    refuse_unknown_files(directory, set(FILES))
    files = {}
    for name in FILES:
        with open(open_regular(directory / name), "rb") as file:
            data = file.read()
        if hashlib.sha256(data).hexdigest() != manifest["sha256"].get(name):
            raise Damaged(f"{name} does not match its SHA-256")
        try:
            files[name] = load(data)
        except SafetensorError as error:
            raise Damaged(f"{name} is not safetensors ({error})") from None
    return manifest, files


def _packed(tensors: Tensors) -> bytes:
    """As safetensors, which keeps no strides: channels-last weights are written in plain order."""
    return save({name: tensor.contiguous() for name, tensor in tensors.items()})


def _files(state: TrainState) -> dict[str, Tensors]:
    """The live tensors, by the file that keeps them."""
    return dict(zip(FILES, (state.model_tensors(), state.optimizer_tensors()), strict=True))
