"""python -m tools.predict RUN: what a trained network reads, as a picture of test glyphs with its answers."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import click
import numpy as np
import torch
from PIL import Image
from safetensors.torch import load_file

from engine.config import RunConfig, load_toml
from engine.errors import UserError, exit_on_user_error
from engine.model import make_model
from engine.records import Records, Split, open_records
from engine.sample import sample_path
from engine.ui import guard_outputs
from tools.sheet import BLACK, COLUMNS, RED, draw_sheet

ROWS = 6
BATCH = 2048


@click.command(context_settings={"help_option_names": ["-h", "--help"]})
@click.argument("run", type=click.Path(path_type=Path))
@click.option(
    "--out", type=click.Path(path_type=Path), default=Path("predictions.png"), show_default=True
)
def main(run: Path, out: Path) -> None:
    """Draw test glyphs with RUN's answers; a wrong one is red, the right one beside it."""
    with exit_on_user_error():
        config = load_toml(RunConfig(), run / "config.toml")
        records = open_records(config.data.path or sample_path())
        if not (run / "model.safetensors").is_file():
            raise UserError(f"{run}: holds no model.safetensors; name the folder of a finished run")
        split = records.split("test")
        shown = split.take(np.linspace(0, len(split) - 1, COLUMNS * ROWS).astype(int))
        answer_N = predict(config, run / "model.safetensors", records, shown)
        draw(shown, answer_N, records.classes).save(out)
        click.echo(f"{(answer_N == shown.label_N).sum()} of {len(answer_N)} glyphs right: {out}")


def predict(config: RunConfig, weights: Path, records: Records, split: Split) -> np.ndarray:
    """answer_N: the class index the network gives each image of the split (fp32, on the CPU)."""
    model = make_model(config.model, *records.height_width, len(records.classes), seed=0)
    model.load_state_dict(load_file(weights))
    return answers(
        lambda image_BHW: model(image_BHW.unsqueeze(1).float() / 255),
        split.image_NHW,
        torch.device("cpu"),
    )


@torch.no_grad()
def answers(
    logits: Callable[[torch.Tensor], torch.Tensor], image_NHW: Any, device: torch.device
) -> np.ndarray:
    """answer_N: the class index that `logits` (of uint8 images on `device`) gives each image."""
    parts = [image_NHW[start : start + BATCH] for start in range(0, len(image_NHW), BATCH)]
    return np.concatenate(
        [logits(torch.from_numpy(part).to(device)).argmax(1).cpu().numpy() for part in parts]
    )


def draw(split: Split, answer_N: np.ndarray, classes: tuple[str, ...]) -> Image.Image:
    """The images in a grid, each with its answer below."""
    right_N = answer_N == split.label_N
    captions = [
        classes[answer] if right else f"{classes[answer]}  ({classes[label]})"
        for answer, label, right in zip(answer_N, split.label_N, right_N, strict=True)
    ]
    return draw_sheet(split.image_NHW, captions, [BLACK if right else RED for right in right_N])


if __name__ == "__main__":
    guard_outputs()
    main()
