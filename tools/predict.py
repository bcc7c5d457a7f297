"""tools/predict RUN [IMAGES...]: what a trained network reads in images, or in test glyphs.

RUN is a run's folder, finished or not, one of its checkpoints, or its model.safetensors alone.
Answering images needs no records: the weights' file says its classes.

torch is imported while the images are read: it takes as long as thousands of them.
"""

from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from engine.data.given import SourceOptions
from engine.data.inputs import open_inputs
from engine.data.record_file import SPLITS
from engine.data.remote import RECORDS
from engine.durable import write_file, writing
from engine.errors import UserError, exit_on_user_error, printable
from engine.host import prepare_process
from engine.paths import PATH
from engine.report import NetworkFacts
from engine.ui import guard_outputs, options_given
from tools.report.outputs import check_file
from tools.source_options import source_options

if TYPE_CHECKING:
    from engine.train.answers import Network

    Load = Callable[[], tuple[Network, NetworkFacts]]

PICTURE = Path("predictions.png")
OF_PICTURES = {"run", "out", "data", "model", "export"}
"""Parameters of a call without IMAGES."""
CSV = ".csv"
EPILOG = """\b
tools/predict runs/x a.png b.png                   a line each: answer, probability, the next two
tools/predict runs/x digits/ --out answers.csv     a folder of PNGs, or of class folders
tools/predict runs/x test.csv --label-column none  a CSV of pixels alone; or .npz, IDX, Parquet
cat *.png | tools/predict runs/x - --csv           PNGs one behind the other, or a CSV
tools/predict runs/x --out predictions.png         a picture of test glyphs with the answers
"""


@click.command(context_settings={"help_option_names": ["-h", "--help"]}, epilog=EPILOG)
@click.argument("run", type=PATH)
@click.argument("sources", type=PATH, nargs=-1, metavar="[IMAGES]...")
@click.option(
    "--out",
    type=PATH,
    help=f"A CSV of the answers, or without IMAGES the picture.  [default: lines on the standard "
    f"output; {PICTURE}]",
)
@click.option("--csv", "as_csv", is_flag=True, help="Print CSV, not lines for people.")
@click.option(
    "--invert", is_flag=True, help="Take each pixel p as 255 - p: dark on light is light on dark."
)
@click.option(
    "--split",
    type=click.Choice(SPLITS),
    help="Where IMAGES is a record directory.  [default: test]",
)
@source_options(
    "first|last|N|none", "; none: it, or a source of another layout, is read without labels"
)
@click.option(
    "--data",
    type=RECORDS,
    help="The run's records, if they are no longer where it found them: for the picture, and for "
    "runs of earlier versions, whose weights do not say their classes.",
)
@click.option(
    "--model", default="", help="FILE.py:NAME again, where the run's network is of your own."
)
@click.option("--export", type=PATH, help="Write the weights there too, as one safetensors file.")
def main(
    run: Path, sources: tuple[Path, ...], out: Path | None, data: Path | None, **options: Any
) -> None:
    """Answer IMAGES with RUN's network: PNGs, folders of them, a CSV, - (a pipe), records, or any
    source that tools/pack_tmnist packs. Each comes with the three likeliest classes.

    RUN is the folder of a run, one of its checkpoints, or a model.safetensors. Without IMAGES, test
    glyphs are drawn with RUN's answers; a wrong one is red, the right one beside it.
    """
    with exit_on_user_error():
        prepare_process()
        model, export = options.pop("model"), options.pop("export")
        form = Form(out, *(options.pop(name) for name in ("as_csv", "invert", "split")))
        source_flags = SourceOptions(**options)
        if sources:
            form.check(export)
            answer(partial(load, run, data, model), sources, source_flags, form)
            return
        given = options_given()
        if others := [option for name, option in given.items() if name not in OF_PICTURES]:
            raise UserError(
                f"{others[0]}: is about IMAGES, and none are named; name some, or leave it out"
            )
        from tools.glyphs import draw_glyphs

        draw_glyphs(run, data, model, out or PICTURE, export)


@dataclass(frozen=True)
class Form:
    """How images are taken, and answers given."""

    out: Path | None
    as_csv: bool = False
    invert: bool = False
    split: str | None = None

    def check(self, export: Path | None) -> None:
        """UserError where options do not go together, or the file cannot be written; before any
        work."""
        if export:
            raise UserError("--export: goes without IMAGES; export in a call of its own")
        if self.out:
            if self.out.suffix.lower() != CSV:
                raise UserError(f"{self.out}: answers are written as CSV; let it end in {CSV}")
            check_file(self.out)


def answer(load: "Load", sources: Sequence[Path], options: SourceOptions, form: Form) -> None:
    """Answer all images of the sources; nothing is printed or written where one is refused."""
    with ThreadPoolExecutor(1) as pool, ExitStack() as stack:
        loading = pool.submit(load)
        inputs = stack.enter_context(open_inputs(sources, options, form.split))
        network, facts = loading.result()
        from tools.measure.predictions import num_right, predict
        from tools.report.predictions import csv_text, ground_note, label_note, lines

        predictions = predict(network, facts, inputs, invert=form.invert)
        for found in inputs.found:
            note(f"read as {found}")
        if ground := ground_note(predictions, facts, is_inverted=form.invert):
            note(ground)
        if unknown := label_note(facts, inputs):
            note(unknown)
        if form.out or form.as_csv:
            text = csv_text(predictions, facts, inputs)
        else:
            text = "".join(f"{line}\n" for line in lines(predictions, facts, inputs))
        if form.out:
            with writing(form.out):
                write_file(form.out, text.encode())
            note(f"written: {form.out}")
        else:
            click.echo(text, nl=False)
        if inputs.classes:
            right, num = num_right(predictions, facts, inputs), inputs.num_images
            note(f"{right:,} of {num:,} labels right ({right / num:.2%})")


def load(run: Path, data: Path | None, model: str) -> "tuple[Network, NetworkFacts]":
    """The network, and what it takes and answers; torch is imported here."""
    from engine.train.weights import load_network
    from tools.measure.trained import known_facts, run_config, weights_at

    trained = weights_at(run)
    config = run_config(trained, model)
    facts = known_facts(trained, config, data)
    network = load_network(config.model, facts, trained.file)
    network.use_channels_last()  # much faster on a CPU
    return network, facts


def note(text: str) -> None:
    """Beside the answers, which a program may read."""
    click.echo(printable(text), err=True)


if __name__ == "__main__":
    guard_outputs()
    main(prog_name="tools/predict")
