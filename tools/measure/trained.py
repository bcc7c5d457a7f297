"""A run's network as it was left: its weights found, its records opened, both checked.

RUN is a run's folder, finished or not, or one of its checkpoints. Does not: train, or judge.
"""

import os
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import click

from engine.config import RunConfig, override
from engine.config_text import load_toml, with_own_network
from engine.data.foreign import listed
from engine.data.records import Records, open_records
from engine.data.remote import local
from engine.data.sample import ensure_sample
from engine.durable import Damaged
from engine.errors import UserError, printable
from engine.report import NetworkFacts, read_report
from engine.train.checkpoint import MODEL, read_checkpoint
from engine.train.folder import CHECKPOINTS, CONFIG, checkpoints
from engine.train.weights import network_facts, read_facts


@dataclass(frozen=True)
class Trained:
    """Where a network's weights are, on which records they were trained, and what they say."""

    run: Path | None
    """The run's folder; None: the file is alone."""
    file: Path
    fingerprint: str
    facts: NetworkFacts | None
    """What it takes and answers; None: an earlier version wrote it, and it does not say."""


def find_weights(place: Path) -> Trained:
    """The weights of a finished run, of one that is not (its newest checkpoint), or a checkpoint.

    Raises:
        UserError: there are none, or they do not verify, or say that they are another run's.
    """
    if place.parent.name == CHECKPOINTS:
        return _of_checkpoint(place)
    found, report = checkpoints(place), read_report(place)
    is_whole = report.status == "finished" and (place / MODEL).exists()
    if is_whole or not found:  # weights beside an unfinished report are an earlier end's
        return _trained(place, place / MODEL, report.dataset_fingerprint)
    for checkpoint in found:
        with suppress(UserError):
            trained = _of_checkpoint(checkpoint)
            shown = printable(f"this run is not finished: {checkpoint.name} is shown")
            click.echo(shown, err=True)
            return trained
    raise UserError(f"{place}: holds no checkpoint that verifies; go on with --resume {place}")


def weights_at(place: Path) -> Trained:
    """The weights of a run, a checkpoint, or in a file alone; UserError as by those."""
    return weights_alone(place) if os.path.isfile(place) else find_weights(place)


def weights_alone(file: Path) -> Trained:
    """A file of weights that says what network it is of, wherever it lies.

    Raises:
        UserError: it does not say it.
    """
    facts = read_facts(file)
    if facts is None:
        raise UserError(
            f"{file}: does not say its network (an earlier version wrote it, or another program); "
            f"name its run's folder"
        )
    return Trained(None, file, facts.dataset_fingerprint, facts)


def _trained(run: Path, file: Path, fingerprint: str) -> Trained:
    facts = read_facts(file)
    if facts and facts.dataset_fingerprint != fingerprint:
        raise UserError(
            f"{file}: says that it was trained on records {facts.dataset_fingerprint[:16]}, but "
            f"the run was on {fingerprint[:16]}; put back the run's own weights"
        )
    return Trained(run, file, fingerprint, facts)


def _of_checkpoint(checkpoint: Path) -> Trained:
    try:
        manifest, _ = read_checkpoint(checkpoint)
    except (Damaged, OSError) as error:
        remedy = "name another checkpoint, or the folder of the run"
        raise UserError(f"{checkpoint}: is no whole checkpoint ({error}); {remedy}") from None
    return _trained(checkpoint.parent.parent, checkpoint / MODEL, manifest.dataset_fingerprint)


def known_facts(trained: Trained, config: RunConfig, data: Path | None) -> NetworkFacts:
    """What the run's network takes and answers, by its file, or by the run's own records.

    Args:
        data: where these may be, if they were moved.
    Raises:
        UserError: neither says it.
    """
    if trained.facts:
        return trained.facts
    reasons = []
    for place in [data, None] if data else [None]:
        try:
            records = open_run_records(config, place, trained.fingerprint)
        except UserError as error:
            reasons.append(error)
        else:
            return network_facts(config.model, records)
    raise UserError(
        f"{trained.file}: does not say its classes (an earlier version wrote it), so the run's own "
        f"records are needed: {reasons[0]}"
    )


def run_config(trained: Trained, model: str = "") -> RunConfig:
    """The config that the run was trained with; of a file alone, its network's settings.

    Args:
        model: FILE.py:NAME where its network is of the user's own.
    """
    if trained.run:
        return with_code(load_toml(RunConfig(), trained.run / CONFIG), model)
    assert trained.facts
    return with_code(RunConfig(model=trained.facts.model), model)


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
    path = local(data or config.data.path or ensure_sample(), config.data.cache_gib)
    if not data and not path.is_dir():
        raise UserError(f"{path}: the records of the run are no longer here; say where with --data")
    records = open_records(path)
    if records.fingerprint != fingerprint:
        raise UserError(
            f"{path}: holds other records than the run was trained on (fingerprint "
            f"{records.fingerprint[:16]}, not {fingerprint[:16]}); name the run's with --data"
        )
    return records


def check_same_task(facts: NetworkFacts, records: Records) -> None:
    """UserError unless a network takes the images of the records, and has their classes."""
    size, wanted = records.height_width, (facts.height_pixels, facts.width_pixels)
    if size != wanted:
        raise UserError(
            f"{records.path}: holds images of {size[0]} x {size[1]} pixels, but the network takes "
            f"{wanted[0]} x {wanted[1]}; name records of such images"
        )
    if list(records.classes) == facts.classes:
        return
    more = [repr(name) for name in records.classes if name not in facts.classes]
    missing = [repr(name) for name in facts.classes if name not in records.classes]
    parts = {"more": more, "missing": missing}
    said = "; ".join(f"{what}: {listed(names)}" for what, names in parts.items() if names)
    raise UserError(
        f"{records.path}: its classes are not the network's ({said}); name records of the same "
        f"{len(facts.classes)} classes"
    )
