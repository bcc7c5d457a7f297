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
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.torch import load

from engine.durable import (
    Damaged,
    open_regular,
    publish_directory,
    refuse_unknown_files,
    temporary_name,
    write_manifest,
)
from engine.errors import UserError
from engine.report import NetworkFacts
from engine.train.folder import (
    CHECKPOINTS,
    Manifest,
    checkpoint_path,
    checkpoints,
    manifest_of,
)
from engine.train.parallel import put, whole
from engine.train.state import Tensors, TrainState
from engine.train.weights import metadata_of, packed
from engine.world import World

NUM_KEPT = 2
MODEL, OPTIM = "model.safetensors", "optim.safetensors"
FILES = (MODEL, OPTIM)
LOG = "log/loss_S"
"""In optim.safetensors: float64, the mean loss of each step done of the epoch in hand."""
LEFTOVER = re.compile(r"\.step-[0-9]{9}\.tmp-[0-9a-f]{8}")


def checkpoint_tensors(state: TrainState) -> dict[str, Tensors]:
    """The live tensors, by the file that keeps them."""
    return {MODEL: state.model_tensors(), OPTIM: state.optimizer_tensors()}


def whole_tensors(state: TrainState) -> Iterator[tuple[str, str, torch.Tensor]]:
    """(file, name, tensor) of `checkpoint_tensors`: the live ones, or gathered from all ranks.

    Under FSDP each step of it is collective: every rank goes to its end, whoever keeps the tensors.
    """
    for file, tensors in checkpoint_tensors(state).items():
        for name, tensor in tensors.items():
            yield file, name, whole(tensor)


def write_checkpoint(
    run: Path, manifest: Manifest, files: dict[str, Tensors], facts: NetworkFacts | None = None
) -> Path:
    """Publish a checkpoint; another of the same step is replaced.

    Args:
        manifest: all of it but the hashes.
        files: tensors on the CPU, by file.
        facts: what the network's file says of it; None: nothing.
    Raises:
        UserError: a number is not finite; nothing is written.
        OSError: the disk refused; earlier checkpoints are untouched.
    """
    _refuse_nonfinite(files, f"after step {manifest.position.num_steps}")
    says = {MODEL: metadata_of(facts)} if facts else {}
    data = {name: packed(each, says.get(name)) for name, each in files.items()}
    hashes = {name: hashlib.sha256(content).hexdigest() for name, content in data.items()}
    target = checkpoint_path(run, manifest.position.number)
    old = temporary_name(target)
    if target.exists():  # of an earlier try, perhaps damaged: not every disk can exchange two names
        os.rename(target, old)
    with publish_directory(target) as directory:
        for name, content in data.items():
            (directory / name).write_bytes(content)
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


@dataclass(frozen=True)
class Found:
    """A checkpoint that verifies and fits."""

    manifest: Manifest
    files: dict[str, Tensors]
    """Its tensors, by file and name."""
    loss_S: torch.Tensor
    """float64, of the epoch in hand."""
    skipped: list[str]
    """A sentence for each newer one that does not verify."""


def load_checkpoint(run: Path, state: TrainState) -> Found:
    """Copy the newest checkpoint that verifies into the live tensors of a process alone.

    The optimiser's state must exist: warm up first.

    Raises:
        UserError: none verifies, or it holds tensors of another model.
    """
    found = find_checkpoint(run, state)
    deal_out(state, found.files)
    state.load_scaler(found.manifest.scaler)
    return found


def find_checkpoint(run: Path, state: TrainState) -> Found:
    """Read the newest checkpoint that verifies; nothing is copied into the live tensors.

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
        return Found(manifest, files, loss_S, skipped)
    why = "; ".join(skipped) or "start anew without --resume"
    raise UserError(f"{run}: holds no checkpoint that verifies; {why}")


def deal_out(state: TrainState, files: dict[str, Tensors], world: World | None = None) -> None:
    """Copy tensors of a checkpoint into the live ones, or this rank's part of them.

    Args:
        files: by file and name; of several ranks, the first one's count. Collective then.
        world: None: alone.
    """
    for file, tensors in checkpoint_tensors(state).items():
        for name, live in tensors.items():
            values = torch.empty(live.shape, dtype=live.dtype, device=live.device)
            if files:
                values.copy_(files[file][name].view(live.shape))
            if world:
                world.copy_from_first(values)
            put(live, values)
    state.written()


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


def _verified(path: Path, sha256: str | None) -> Tensors:
    with open(open_regular(path), "rb") as file:
        data = file.read()
    if hashlib.sha256(data).hexdigest() != sha256:
        raise Damaged(f"{path.name} does not match its SHA-256")
    try:
        return load(data)
    except SafetensorError as error:
        raise Damaged(f"{path.name} is not safetensors ({error})") from None


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
