"""A run's network as it was left: its weights found, its records opened, both checked.

RUN is a run's folder, finished or not, or one of its checkpoints. Does not: train, or judge.
"""

from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import click
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file

from engine.config import RunConfig, override
from engine.config_text import load_toml, with_own_network
from engine.data.records import Records, open_records
from engine.data.sample import ensure_sample
from engine.durable import Damaged
from engine.errors import UserError, printable
from engine.models import make_model
from engine.report import read_report
from engine.train.checkpoint import MODEL, read_checkpoint
from engine.train.folder import CHECKPOINTS, CONFIG, checkpoints


@dataclass(frozen=True)
class Trained:
    """Where a network's weights are, and on which records they were trained."""

    run: Path
    file: Path
    fingerprint: str


def find_weights(place: Path) -> Trained:
    """The weights of a finished run, of one that is not (its newest checkpoint), or a checkpoint.

    Raises:
        UserError: there are none, or they do not verify.
    """
    if place.parent.name == CHECKPOINTS:
        return _of_checkpoint(place)
    found, report = checkpoints(place), read_report(place)
    is_whole = report.status == "finished" and (place / MODEL).exists()
    if is_whole or not found:  # weights beside an unfinished report are an earlier end's
        return Trained(place, place / MODEL, report.dataset_fingerprint)
    for checkpoint in found:
        with suppress(UserError):
            trained = _of_checkpoint(checkpoint)
            click.echo(printable(f"this run is not finished: {checkpoint.name} is shown"))
            return trained
    raise UserError(f"{place}: holds no checkpoint that verifies; go on with --resume {place}")


def _of_checkpoint(checkpoint: Path) -> Trained:
    try:
        manifest, _ = read_checkpoint(checkpoint)
    except (Damaged, OSError) as error:
        remedy = "name another checkpoint, or the folder of the run"
        raise UserError(f"{checkpoint}: is no whole checkpoint ({error}); {remedy}") from None
    return Trained(checkpoint.parent.parent, checkpoint / MODEL, manifest.dataset_fingerprint)


def load_network(config: RunConfig, records: Records, trained: Trained) -> torch.nn.Module:
    """The run's network on the CPU with its weights, as it answers: nothing of it is in training.

    Raises:
        UserError: the weights are damaged, or another network's.
    """
    model = make_model(config.model, *records.height_width, len(records.classes), seed=0)
    load_weights(model, trained.file)
    return model.train(False)


def run_config(trained: Trained, model: str = "") -> RunConfig:
    """The config that the run was trained with.

    Args:
        model: FILE.py:NAME where its network is of the user's own.
    """
    return with_code(load_toml(RunConfig(), trained.run / CONFIG), model)


def with_code(config: RunConfig, model: str) -> RunConfig:
    """A run's config and, where its network is of the user's own, the file that `model` names.

    Raises:
        UserError: the file cannot be read, or is of another network.
    """
    if not model:
        return config
    named = override(config, with_own_network({"model.name": model}, "--model"), "--model")
    if (named.model.name, named.model.sha256) != (config.model.name, config.model.sha256):
        what = f"is not the network of the run, {config.model.name}, as it was then"
        raise UserError(f"--model {model}: {what}; give its own file, or leave it out")
    return named


def open_run_records(config: RunConfig, data: Path | None, fingerprint: str) -> Records:
    """The records that a run was trained on, at `data` if they were moved.

    Raises:
        UserError: they are not there, or others are: an answer's number would mean another class.
    """
    path = data or config.data.path or ensure_sample()
    if not data and not Path(path).is_dir():
        raise UserError(f"{path}: the records of the run are no longer here; say where with --data")
    records = open_records(path)
    if records.fingerprint != fingerprint:
        raise UserError(
            f"{path}: holds other records than the run was trained on (fingerprint "
            f"{records.fingerprint[:16]}, not {fingerprint[:16]}); name the run's with --data"
        )
    return records


def load_weights(model: torch.nn.Module, file: Path) -> None:
    """Give the model the parameters in a safetensors file; UserError if they are another's."""
    remedy = "name the folder of a finished run, or train it again"
    if not file.is_file():
        raise UserError(f"{file.parent}: holds no {file.name}; {remedy}")
    try:
        found = load_file(file)
    except (OSError, SafetensorError) as error:
        raise UserError(f"{file}: is damaged or no safetensors file ({error}); {remedy}") from None
    if _forms(found) != _forms(model.state_dict()):
        raise UserError(f"{file}: holds the weights of another network; {remedy}")
    model.load_state_dict(found)


def _forms(tensors: dict[str, torch.Tensor]) -> dict[str, tuple[torch.Size, torch.dtype]]:
    return {name: (tensor.shape, tensor.dtype) for name, tensor in tensors.items()}
