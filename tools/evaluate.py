"""tools/evaluate RUN...: how right networks are, how right they believe they are, and why.

Bare of runs, `--data-facts` says what the images alone allow.
"""

from contextlib import nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from engine.data.record_file import SPLITS
from engine.data.records import open_records
from engine.data.remote import RECORDS
from engine.data.sample import ensure_sample
from engine.durable import take_folder, write_file, writing
from engine.errors import UserError, exit_on_user_error
from engine.host import prepare_process
from engine.paths import PATH
from engine.report import write_json
from engine.ui import guard_outputs, options_given, progress_bar

if TYPE_CHECKING:
    from tools.measure.evaluation import Evaluation
    from tools.measure.neighbours import DataFacts

# What imports torch is imported where it is used: --help and wrong options do not wait for it.

OF_RUNS = ("split", "shifts", "ensemble", "confused_percent", "model")
"""Parameters that --data-facts has no use for."""


@click.command(context_settings={"help_option_names": ["-h", "--help"]})
@click.argument("runs", metavar="[RUN|CHECKPOINT]...", nargs=-1, type=PATH)
@click.option(
    "--data",
    type=RECORDS,
    help="The records to evaluate on: the runs' own, if they were moved, or others of the same "
    "classes.  [default: those each run was trained on]",
)
@click.option("--split", default="test", show_default=True, type=click.Choice(SPLITS))
@click.option(
    "--shifts", is_flag=True, help="Average the logits over each image and its 4 one-pixel shifts."
)
@click.option(
    "--ensemble", is_flag=True, help="Also average the probabilities of runs on the same records."
)
@click.option(
    "--confused",
    "confused_percent",
    default=10.0,
    show_default=True,
    type=click.FloatRange(0, 100, max_open=True),
    help="Classes of which a larger part (%) was swapped on val are measured look-alikes.",
)
@click.option(
    "--data-facts",
    "is_about_data",
    is_flag=True,
    help="Name no run: what the images of --data (else the sample) have in twins and neighbours.",
)
@click.option(
    "--max-train",
    type=click.IntRange(1),
    help="With --data-facts: training images to look among for near ones.  [default: all]",
)
@click.option(
    "--model", default="", help="FILE.py:NAME again, where the runs' network is of your own."
)
@click.option("--out", type=PATH, help="Folder for the figures as JSON and text.")
@click.option(
    "--device",
    type=click.Choice(["cpu", "cuda"]),
    callback=lambda _, __, value: value or "",
    help="[default: cuda where there is a GPU]",
)
def main(runs: tuple[Path, ...], data: Path | None, out: Path | None, **asked: Any) -> None:
    """Evaluate RUNs, folders or checkpoints, on a split: each alone, pooled, as an ensemble.

    Top-1, top-2, loss, calibration, look-alikes merged, and the classes one by one.
    """
    with exit_on_user_error():
        prepare_process()
        check(runs, options_given())
        with take_folder(out) if out else nullcontext():
            if asked["is_about_data"]:
                tell_of_data(data, asked, out)
            else:
                tell_of_runs(runs, data, asked, out)


def tell_of_data(data: Path | None, asked: dict[str, Any], out: Path | None) -> None:
    """What the images alone allow."""
    from engine.world import start_world
    from tools.measure.neighbours import NAME, data_facts
    from tools.report.evaluation import facts_text

    with start_world(asked["device"]) as world, world.on_stream():
        records = open_records(data or ensure_sample())
        found = data_facts(records, world.environment(), world.device, asked["max_train"])
    show(facts_text(found), found, out, NAME)


def tell_of_runs(
    runs: tuple[Path, ...], data: Path | None, asked: dict[str, Any], out: Path | None
) -> None:
    """How right the runs' networks are."""
    from engine.world import start_world
    from tools.measure.evaluation import NAME, Opened, Question, answer, evaluate
    from tools.report.evaluation import evaluation_text

    question = Question(
        split=asked["split"],
        shifts=asked["shifts"],
        confused_share=asked["confused_percent"] / 100,
    )
    opened, answered = Opened(data), []
    with start_world(asked["device"]) as world, world.on_stream():
        with progress_bar("evaluating", len(runs)) as bar:
            for number, run in enumerate(runs, 1):
                answered.append(answer(run, opened, question, world.device, asked["model"]))
                bar(number)
        facts = world.environment()
        evaluated = evaluate(answered, question, facts, ensemble=asked["ensemble"])
    show(evaluation_text(evaluated), evaluated, out, NAME)


def check(runs: tuple[Path, ...], given: dict[str, str]) -> None:
    """UserError where options do not go together; asked before any work.

    Args:
        given: all options on the command line, by parameter.
    """
    if "is_about_data" in given:
        if runs:
            remedy = "name them with --data"
            raise UserError(f"--data-facts: is about records and takes no run; {remedy}")
        if others := [given[name] for name in OF_RUNS if name in given]:
            what = "is of runs, and --data-facts is about images alone"
            raise UserError(f"{others[0]}: {what}; leave it out")
        return
    if not runs:
        raise UserError("no run is named; name the folder of one, or give --data-facts")
    if "max_train" in given:
        raise UserError("--max-train: goes with --data-facts only; leave it out")
    places = [run.resolve() for run in runs]
    for number, place in enumerate(places):
        if place in places[:number]:
            raise UserError(f"{runs[number]}: is named twice; name each run once")


def show(text: str, found: "Evaluation | DataFacts", out: Path | None, name: str) -> None:
    """Print the text; leave it and the figures in `out`."""
    click.echo(text)
    if out:
        with writing(out):
            write_json(found, out / name)
            write_file((out / name).with_suffix(".txt"), (text + "\n").encode())
        click.echo(f"written: {out / name}")


if __name__ == "__main__":
    guard_outputs()
    main()
