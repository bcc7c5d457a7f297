"""Checkpoints: a directory of safetensors under a manifest with hashes, published whole; no pickle anywhere.

RUN/checkpoints/epoch-0003/ holds model.safetensors, optim.safetensors (the optimiser's state) and manifest.json with
its hash: position in the order, loss scale, the config's digest and the data's fingerprint. Loading takes the newest
directory that verifies, in place (`copy_`), so that a captured graph keeps its addresses.
"""

import hashlib
import shutil
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load, save

from engine.errors import UserError
from engine.publish import Damaged, publish_directory, read_manifest, refuse_unknown_files, write_file, write_manifest

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
    model: torch.nn.Module,
    optimizer: torch.optim.Optimizer,
    scaler: torch.amp.GradScaler,
    *,
    digest: str,
    fingerprint: str,
) -> None:
    """Publish a checkpoint and delete all but the newest two.

    Raises:
        UserError: a number is not finite; nothing is written.
        OSError: the disk refused; earlier checkpoints are untouched.
    """
    for name, tensor in (_model_tensors(model) | _other_tensors(model, optimizer)).items():
        if not torch.isfinite(tensor).all():
            raise UserError(f"{name} is not finite after epoch {position.num_epochs}; lower optim.learning_rate")
    files = {FILES[0]: _packed(_model_tensors(model)), FILES[1]: _packed(_other_tensors(model, optimizer))}
    manifest = {
        "format": FORMAT,
        "version": VERSION,
        "config_digest": digest,
        "dataset_fingerprint": fingerprint,
        "position": asdict(position),
        "scaler": scaler.state_dict(),
        "sha256": {name: hashlib.sha256(data).hexdigest() for name, data in files.items()},
    }
    target = run / "checkpoints" / f"epoch-{position.num_epochs:04}"
    with publish_directory(target) as directory:
        for name, data in files.items():
            (directory / name).write_bytes(data)
        write_manifest(directory, manifest)
    for old in _checkpoints(run)[NUM_KEPT:]:
        shutil.rmtree(old)


def load_checkpoint(
    run: Path,
    model: torch.nn.Module,
    optimizer: torch.optim.Optimizer,
    scaler: torch.amp.GradScaler,
    *,
    digest: str,
    fingerprint: str,
) -> tuple[Position, list[str]]:
    """Copy the newest checkpoint that verifies into the live tensors (the optimiser's state must exist: warm up first).

    Returns:
        The position, and a sentence for each newer checkpoint that was skipped.
    Raises:
        UserError: none verifies, or the run is another config's or another data set's.
    """
    skipped = []
    for directory in _checkpoints(run):
        try:
            manifest, files = _read(directory)
        except Damaged as error:
            skipped.append(f"{directory.name} was skipped: {error}")
            continue
        _refuse_foreign(directory, manifest, digest, fingerprint)
        _copy_into(_model_tensors(model), files[FILES[0]], directory)
        _copy_into(_other_tensors(model, optimizer), files[FILES[1]], directory)
        if scaler.is_enabled():
            scaler.load_state_dict(manifest["scaler"])
        return Position(**manifest["position"]), skipped
    raise UserError(f"{run}: holds no checkpoint that verifies; {'; '.join(skipped) or 'start anew without --resume'}")


def save_model(path: Path, model: torch.nn.Module) -> None:
    """Write the parameters alone as one safetensors file."""
    write_file(path, _packed(_model_tensors(model)))


def _checkpoints(run: Path) -> list[Path]:
    return sorted((run / "checkpoints").glob("epoch-*"), reverse=True)


def _read(directory: Path) -> tuple[dict[str, Any], dict[str, dict[str, torch.Tensor]]]:
    manifest = read_manifest(directory)
    if (found := (manifest.get("format"), manifest.get("version"))) != (FORMAT, VERSION):
        raise Damaged(f"format and version are {found}, this engine reads {(FORMAT, VERSION)}")
    refuse_unknown_files(directory, set(FILES))
    tensors = {}
    for name in FILES:
        data = (directory / name).read_bytes()
        if hashlib.sha256(data).hexdigest() != manifest["sha256"].get(name):
            raise Damaged(f"{name} does not match its SHA-256")
        try:
            tensors[name] = load(data)
        except SafetensorError as error:
            raise Damaged(f"{name} is not safetensors ({error})") from None
    return manifest, tensors


def _refuse_foreign(directory: Path, manifest: dict[str, Any], digest: str, fingerprint: str) -> None:
    if manifest["config_digest"] != digest:
        raise UserError(
            f"{directory}: was made by another configuration; resume with the flags the run was started with"
        )
    if manifest["dataset_fingerprint"] != fingerprint:
        raise UserError(f"{directory}: was trained on other records; give the --data the run was started with")


def _packed(tensors: dict[str, torch.Tensor]) -> bytes:
    """As safetensors, which keeps no strides: channels-last weights are written in plain order."""
    return save({name: tensor.contiguous() for name, tensor in tensors.items()})


def _model_tensors(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    return dict(model.state_dict())


def _other_tensors(model: torch.nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, torch.Tensor]:
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    return {
        f"{names[id(parameter)]}/{key}": value
        for parameter, values in optimizer.state.items()
        for key, value in values.items()
        if isinstance(value, torch.Tensor)
    }


def _copy_into(live: dict[str, torch.Tensor], saved: dict[str, torch.Tensor], directory: Path) -> None:
    if {n: t.shape for n, t in live.items()} != {n: t.shape for n, t in saved.items()}:
        raise UserError(f"{directory}: holds tensors of another model; resume with the model it was made by")
    with torch.no_grad():
        for name, tensor in live.items():
            tensor.copy_(saved[name])
