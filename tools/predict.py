"""python -m tools.predict RUN: a picture of test glyphs with a trained network's answers.

RUN is a run's folder, finished or not, or one of its checkpoints.
"""

import json
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import click
import numpy as np
import torch
from PIL import Image
from safetensors import SafetensorError
from safetensors.torch import load_file, save

from engine.config import RunConfig, load_toml, override, with_own_network
from engine.data.records import Records, Split, open_records
from engine.data.sample import ensure_sample
from engine.durable import Damaged, write_file, writing
from engine.errors import UserError, exit_on_user_error, printable
from engine.host import prepare_process
from engine.models import make_model
from engine.paths import PATH
from engine.report import read_report
from engine.train.checkpoint import MODEL, read_checkpoint
from engine.train.folder import CHECKPOINTS, checkpoints
from engine.ui import guard_outputs
from tools.measure.answers import answers
from tools.report.sheet import (
    BLACK,
    COLUMNS,
    RED,
    check_picture,
    class_captions,
    draw_sheet,
    save_picture,
)

ROWS = 6
SHORT = 3
"""Characters of a class's name up to which answer and truth stand in one line."""


@click.command(context_settings={"help_option_names": ["-h", "--help"]})
@click.argument("run", type=PATH)
@click.option(
    "--data",
    type=PATH,
    help="The records, if they are no longer where the run found them.",
)
@click.option("--out", type=PATH, default=Path("predictions.png"), show_default=True)
@click.option(
    "--model", default="", help="FILE.py:NAME again, where the run's network is of your own."
)
@click.option("--export", type=PATH, help="Write the weights there too, as one safetensors file.")
def main(run: Path, data: Path | None, out: Path, model: str, export: Path | None) -> None:
    """Draw test glyphs with RUN's answers; a wrong one is red, the right one beside it.

    RUN is the folder of a run, or one of its checkpoints.
    """
    with exit_on_user_error():
        prepare_process()
        check_picture(out)
        trained = find_weights(run)
        config = with_code(load_toml(RunConfig(), trained.run / "config.toml"), model)
        records = open_run_records(config, data, trained.fingerprint)
        name, split = shown_split(records)
        num = min(COLUMNS * ROWS, len(split))
        shown = split.take(np.linspace(0, len(split) - 1, num).astype(int))
        network = make_model(config.model, *records.height_width, len(records.classes), seed=0)
        load_weights(network, trained.file)
        answer_N = answers(network, shown.image_NHW, torch.device("cpu"))
        if export:
            export_weights(export, network, config, records)
        save_picture(draw(shown, answer_N, records.classes), out)
        where = "" if name == "test" else f" of the {name} split, for want of a test split,"
        right = (answer_N == shown.label_N).sum()
        click.echo(printable(f"{right} of {num} glyphs{where} right: {out}"))


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


def export_weights(file: Path, model: torch.nn.Module, config: RunConfig, records: Records) -> None:
    """Write the weights as one safetensors file, whose metadata say what its answers mean."""
    height, width = records.height_width
    facts = {
        "format": "pt",
        "model": config.model.name,
        "input": f"uint8 [B, {height}, {width}]",
        "classes": json.dumps(records.classes, ensure_ascii=False),
        "dataset_fingerprint": records.fingerprint,
    }
    tensors = {name: tensor.contiguous() for name, tensor in model.state_dict().items()}
    with writing(file):
        write_file(file, save(tensors, metadata=facts))


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


def shown_split(records: Records) -> tuple[str, Split]:
    """The test split and its name, or where there is none, or no image in it, the next best."""
    for name in ("test", "val"):
        if name in records.splits and len(records.splits[name]):
            return name, records.splits[name]
    return "train", records.split("train")


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


def draw(split: Split, answer_N: np.ndarray, classes: tuple[str, ...]) -> Image.Image:
    """The images in a grid, each with its answer below; beside or below a wrong one the truth."""
    right_N = answer_N == split.label_N
    names = class_captions(classes)
    between = "  " if all(len(name) <= SHORT for name in names) else "\n"
    captions = [
        names[answer] if right else f"{names[answer]}{between}({names[label]})"
        for answer, label, right in zip(answer_N, split.label_N, right_N, strict=True)
    ]
    return draw_sheet(split.image_NHW, captions, [BLACK if right else RED for right in right_N])


if __name__ == "__main__":
    guard_outputs()
    main()
