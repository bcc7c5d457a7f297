"""tools/export RUN --to onnx|torch|safetensors: a trained network as files that others can run."""

from pathlib import Path

import click

from engine.data.record_file import SPLITS
from engine.data.remote import RECORDS
from engine.durable import publish_directory, writing
from engine.errors import UserError, exit_on_user_error, printable
from engine.host import prepare_process
from engine.paths import PATH
from engine.report import environment, read_report
from engine.ui import guard_outputs
from tools.measure.forms import FORMS, Check, check_packages
from tools.report.card import NAME, Card, card_text

# What imports torch is imported where it is used: --help and wrong options do not wait for it.

FOLDER = "export"
OURS = frozenset({NAME, *(form.file for form in FORMS.values())})
"""What an earlier export may have left."""


@click.command(context_settings={"help_option_names": ["-h", "--help"]})
@click.argument("run", metavar="RUN|CHECKPOINT", type=PATH)
@click.option(
    "--to",
    "forms",
    required=True,
    multiple=True,
    type=click.Choice(tuple(FORMS)),
    help="onnx: for onnxruntime and others; torch: for torch.export; safetensors: the weights. "
    "May be given again.",
)
@click.option("--out", type=PATH, help="Folder for the files.  [default: RUN/export]")
@click.option("--force", is_flag=True, help="Replace an earlier export in that folder.")
@click.option(
    "--data", type=RECORDS, help="The records, if they are no longer where the run found them."
)
@click.option(
    "--split",
    default="test",
    show_default=True,
    type=click.Choice(SPLITS),
    help="What the files are checked on.",
)
@click.option(
    "--model", default="", help="FILE.py:NAME again, where the run's network is of your own."
)
def main(
    run: Path,
    forms: tuple[str, ...],
    out: Path | None,
    force: bool,
    data: Path | None,
    split: str,
    model: str,
) -> None:
    """Write RUN's network as files that others can run, with a model card.

    Uint8 images in, logits out, any number at once; the classes are in the files' metadata. Every
    file is opened again and compared with the network on the whole split.
    """
    with exit_on_user_error():
        prepare_process()
        forms = tuple(dict.fromkeys(forms))
        check_packages(forms)
        import torch

        from tools.measure.exported import export
        from tools.measure.trained import (
            check_same_task,
            find_weights,
            known_facts,
            open_run_records,
            run_config,
        )

        trained = find_weights(run)
        assert trained.run
        target = out or trained.run / FOLDER
        check_target(target, force)
        config = run_config(trained, model)
        facts = known_facts(trained, config, data)
        records = open_run_records(config, data, trained.fingerprint)
        check_same_task(facts, records)
        of_run = trained.file.parent == trained.run
        checkpoint = "" if of_run else trained.file.parent.name
        with writing(target), publish_directory(target) as folder:
            checks = export(forms, folder, trained.file, config, facts, records.asked(split))
            card = Card(
                facts=facts,
                config=config,
                split=split,
                checks=checks,
                report=None if checkpoint else read_report(trained.run),
                checkpoint=checkpoint,
                environment=environment(
                    num_threads=torch.get_num_threads(), allocator="default", gpu={}
                ),
            )
            (folder / NAME).write_text(card_text(card), encoding="utf-8")
        for check in checks:
            click.echo(printable(check_line(check, target, split)))


def check_target(target: Path, force: bool) -> None:
    """UserError if files may not be written to this folder."""
    if not target.exists():
        return
    if not force:
        raise UserError(f"{target}: exists; give --force to replace it, or another --out")
    others = {path.name for path in target.iterdir()} - OURS if target.is_dir() else {target.name}
    if others:
        remedy = "give another --out"
        raise UserError(f"{target}: holds {min(others)}, which is no export's; {remedy}")


def check_line(check: Check, target: Path, split: str) -> str:
    """What became of one form, as a line."""
    same = f"{check.num_same:,} of {check.num_samples:,} {split} images read the same"
    most = f"largest difference of a logit {check.largest_difference:.2g}"
    return f"{target / check.file}: {same} by {check.runs_by}, {most}"


if __name__ == "__main__":
    guard_outputs()
    main()
