"""tools/predict RUN without images: test glyphs with a network's answers, and its weights."""

from pathlib import Path

import click
import numpy as np
import torch
from PIL import Image

from engine.data.records import Records, Split
from engine.durable import write_file, writing
from engine.errors import printable
from engine.report import NetworkFacts
from engine.train.answers import answers
from engine.train.weights import load_network, metadata_for_others, network_facts, packed
from tools.measure.trained import (
    check_same_task,
    open_run_records,
    run_config,
    weights_at,
)
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


def draw_glyphs(run: Path, data: Path | None, model: str, out: Path, export: Path | None) -> None:
    """Draw test glyphs with a run's answers to `out`, and write its weights to `export`.

    Args:
        data: the run's records, if they were moved.
        model: FILE.py:NAME, where the network is of the user's own.
    Raises:
        UserError: the run or its records are not there or not whole, or a file cannot be written.
    """
    check_picture(out)
    trained = weights_at(run)
    config = run_config(trained, model)
    records = open_run_records(config, data, trained.fingerprint)
    facts = trained.facts or network_facts(config.model, records)
    check_same_task(facts, records)
    name, split = shown_split(records)
    num = min(COLUMNS * ROWS, len(split))
    shown = split.take(np.linspace(0, len(split) - 1, num).astype(int))
    network = load_network(config.model, facts, trained.file)
    answer_N = answers(network, shown.image_NHW, torch.device("cpu"))
    if export:
        export_weights(export, network, facts)
    save_picture(draw(shown, answer_N, records.classes), out)
    where = "" if name == "test" else f" of the {name} split, for want of a test split,"
    right = (answer_N == shown.label_N).sum()
    click.echo(printable(f"{right} of {num} glyphs{where} right: {out}"))


def export_weights(file: Path, network: torch.nn.Module, facts: NetworkFacts) -> None:
    """Write the weights as one safetensors file, whose metadata say what its answers mean."""
    with writing(file):
        write_file(file, packed(network.state_dict(), metadata_for_others(facts)))


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
