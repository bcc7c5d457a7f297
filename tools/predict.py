"""python -m tools.predict RUN: a picture of test glyphs with a trained network's answers.

RUN is a run's folder, finished or not, or one of its checkpoints.
"""

import json
from pathlib import Path

import click
import numpy as np
import torch
from PIL import Image
from safetensors.torch import save

from engine.config import RunConfig
from engine.data.records import Records, Split
from engine.durable import write_file, writing
from engine.errors import exit_on_user_error, printable
from engine.host import prepare_process
from engine.paths import PATH
from engine.ui import guard_outputs
from tools.measure.answers import answers
from tools.measure.trained import find_weights, load_network, open_run_records, run_config
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
        config = run_config(trained, model)
        records = open_run_records(config, data, trained.fingerprint)
        name, split = shown_split(records)
        num = min(COLUMNS * ROWS, len(split))
        shown = split.take(np.linspace(0, len(split) - 1, num).astype(int))
        network = load_network(config, records, trained)
        answer_N = answers(network, shown.image_NHW, torch.device("cpu"))
        if export:
            export_weights(export, network, config, records)
        save_picture(draw(shown, answer_N, records.classes), out)
        where = "" if name == "test" else f" of the {name} split, for want of a test split,"
        right = (answer_N == shown.label_N).sum()
        click.echo(printable(f"{right} of {num} glyphs{where} right: {out}"))


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


def shown_split(records: Records) -> tuple[str, Split]:
    """The test split and its name, or where there is none, or no image in it, the next best."""
    for name in ("test", "val"):
        if name in records.splits and len(records.splits[name]):
            return name, records.splits[name]
    return "train", records.split("train")


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
