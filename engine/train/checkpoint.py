"""Checkpoints: folders of safetensors under a manifest with hashes, published whole; no pickle.

Each holds model.safetensors, optim.safetensors (the optimiser's state and the log of the epoch in
hand) and manifest.json with its hash (train/folder.py). Loading takes the newest that verifies, and
copies in place, so that a captured graph keeps its addresses.

Shapes: S steps of the epoch in hand.
"""

import hashlib
import os
import re
import shutil
from contextlib import suppress
from dataclasses import asdict, replace
from pathlib import Path

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.torch import load, save

from engine.durable import (
    Damaged,
    open_regular,
    publish_directory,
    refuse_unknown_files,
    temporary_name,
    write_file,
    write_manifest,
)
from engine.errors import UserError
from engine.train.folder import (
    CHECKPOINTS,
    Manifest,
    checkpoint_path,
    checkpoints,
    manifest_of,
)
from engine.train.state import Tensors, TrainState

NUM_KEPT = 2
MODEL, OPTIM = "model.safetensors", "optim.safetensors"
FILES = (MODEL, OPTIM)
LOG = "log/loss_S"
"""In optim.safetensors: float64, the mean loss of each step done of the epoch in hand."""
LEFTOVER = re.compile(r"\.step-[0-9]{9}\.tmp-[0-9a-f]{8}")


def checkpoint_tensors(state: TrainState) -> dict[str, Tensors]:
    """The live tensors, by the file that keeps them."""
    return {MODEL: state.model_tensors(), OPTIM: state.optimizer_tensors()}


def write_checkpoint(run: Path, manifest: Manifest, files: dict[str, Tensors]) -> Path:
    """Publish a checkpoint; another of the same step is replaced.

    Args:
        manifest: all of it but the hashes.
        files: tensors on the CPU, by file.
    Raises:
        UserError: a number is not finite; nothing is written.
        OSError: the disk refused; earlier checkpoints are untouched.
    """
    _refuse_nonfinite(files, f"after step {manifest.position.num_steps}")
    data = {name: _packed(tensors) for name, tensors in files.items()}
    hashes = {name: hashlib.sha256(packed).hexdigest() for name, packed in data.items()}
    target = checkpoint_path(run, manifest.position.number)
    old = temporary_name(target)
    if target.exists():  # of an earlier try, perhaps damaged: not every disk can exchange two names
        os.rename(target, old)
    with publish_directory(target) as directory:
        for name, packed in data.items():
            (directory / name).write_bytes(packed)
        write_manifest(directory, asdict(replace(manifest, sha256=hashes)))
    shutil.rmtree(old, ignore_errors=True)
    return target


def prune(run: Path, sound: set[Path], best_number: int | None) -> None:
    """Delete checkpoints, but the newest two of `sound` and the best.

    Args:
        sound: those that this process has written or read; others are deleted only where two
            newer ones are sound, and what does not verify never pushes out what does.
    """
    best = None if best_number is None else checkpoint_path(run, best_number)
    num_sound = 0
    for checkpoint in checkpoints(run):
        if num_sound >= NUM_KEPT and checkpoint != best:
            shutil.rmtree(checkpoint, ignore_errors=True)
        num_sound += checkpoint in sound


def remove_unfinished(run: Path) -> None:
    """Delete what killed processes left of checkpoints; the caller holds the run's lock."""
    for entry in (run / CHECKPOINTS).glob(".step-*"):
        if LEFTOVER.fullmatch(entry.name) and not entry.is_symlink():
            shutil.rmtree(entry, ignore_errors=True)


def load_checkpoint(run: Path, state: TrainState) -> tuple[Manifest, torch.Tensor, list[str]]:
    """Copy the newest checkpoint that verifies into the live tensors.

    The optimiser's state must exist: warm up first.

    Returns:
        Its manifest, loss_S (float64) of the epoch in hand, and a sentence for each newer one that
        was skipped.
    Raises:
        UserError: none verifies, or it holds tensors of another model.
    """
    skipped: list[str] = []
    for checkpoint in checkpoints(run):
        try:
            manifest, files = read_checkpoint(checkpoint)
        except (Damaged, OSError) as error:
            skipped.append(f"{checkpoint.name} was skipped: {error}")
            continue
        loss_S = files[OPTIM].pop(LOG, torch.zeros(0, dtype=torch.float64))
        for name, tensors in checkpoint_tensors(state).items():
            if _kinds(state.in_files(tensors)) != _kinds(files[name]):
                remedy = "resume with the model and the precision it was made by"
                raise UserError(f"{checkpoint}: holds tensors of another model; {remedy}")
            _copy(tensors, files[name])
        state.written()
        if state.scaler.is_enabled():
            state.load_scaler(manifest.scaler)
        return manifest, loss_S, skipped
    why = "; ".join(skipped) or "start anew without --resume"
    raise UserError(f"{run}: holds no checkpoint that verifies; {why}")


def read_checkpoint(checkpoint: Path) -> tuple[Manifest, dict[str, Tensors]]:
    """A checkpoint's manifest and tensors, every byte verified; Damaged or OSError."""
    manifest = manifest_of(checkpoint)
    refuse_unknown_files(checkpoint, set(FILES))
    files = {name: _verified(checkpoint / name, manifest.sha256.get(name)) for name in FILES}
    try:
        _refuse_nonfinite(files, "in it")
    except UserError as error:
        raise Damaged(str(error)) from None
    return manifest, files


def newest_sound_manifest(run: Path) -> Manifest | None:
    """Of the checkpoint that `load_checkpoint` takes; None if none verifies."""
    for checkpoint in checkpoints(run):
        with suppress(Damaged, OSError):
            return read_checkpoint(checkpoint)[0]
    return None


def save_model(path: Path, model: torch.nn.Module) -> None:
    """Write the parameters alone as one safetensors file."""
    write_file(path, _packed(model.state_dict()))


def _verified(path: Path, sha256: str | None) -> Tensors:
    with open(open_regular(path), "rb") as file:
        data = file.read()
    if hashlib.sha256(data).hexdigest() != sha256:
        raise Damaged(f"{path.name} does not match its SHA-256")
    try:
        return load(data)
    except SafetensorError as error:
        raise Damaged(f"{path.name} is not safetensors ({error})") from None


def _copy(live: Tensors, stored: Tensors) -> None:
    """Copy in place what files hold, by name."""
    with torch.no_grad():
        for name, tensor in live.items():
            tensor.copy_(stored[name].view(tensor.shape))


def _kinds(tensors: Tensors) -> dict[str, tuple[torch.Size, torch.dtype]]:
    return {name: (tensor.shape, tensor.dtype) for name, tensor in tensors.items()}


def _refuse_nonfinite(files: dict[str, Tensors], when: str) -> None:
    """By NumPy, which stays in its thread.

    torch would start a second team of OpenMP for the saver's. With more threads than cores none
    spins any longer, and each operation of the training waits until its threads have woken up.
    """
    for tensors in files.values():
        for name, tensor in tensors.items():
            if name != LOG and not np.isfinite(tensor.numpy()).all():  # fp16 skips overflowed steps
                raise UserError(f"{name} is not finite {when}; lower optim.learning_rate")


def _packed(tensors: Tensors) -> bytes:
    """As safetensors, which keeps no strides: channels-last weights are written in plain order."""
    return save({name: tensor.contiguous() for name, tensor in tensors.items()})
