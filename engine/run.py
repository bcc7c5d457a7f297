"""The command: torchrun -m engine.run --amp --cuda-graphs.

Flags -> RunConfig -> trainer.fit, nothing else.
"""

from contextlib import ExitStack
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import click

from engine.config import NO_PAGE, RECIPES, RunConfig, override
from engine.config_text import (
    config_of,
    load_toml,
    parse_assignments,
    to_toml,
    with_own_network,
)
from engine.durable import take_folder
from engine.errors import UserError, exit_on_user_error
from engine.flags import flag_settings, setting_options
from engine.host import cache_notes, end_rank, env_rank, prepare_process
from engine.paths import PATH, path_text, written_path
from engine.ranks import Ranks, join_ranks
from engine.serve import Page
from engine.stop import STOP, end_with_launcher
from engine.train.folder import (
    check_new,
    check_records,
    check_resumable,
    check_same_training,
    finished_text,
    holds_run,
    holds_sweep,
    newest_manifest,
    read_config_text,
)
from engine.train.sweep import Axis, Sweep, check_goes_on, parse_sweeps, read_sweep
from engine.ui import guard_outputs

AUTO = "auto"
DEFAULT = "fast"
STUDY = "study"
ALONE = "members train in one process; start it without torchrun, or with one rank"
"""Of a sweep."""


class _Stoppable(click.Command):
    """Hears signals from its first moment on; of an early Ctrl-C Click would say "Aborted!"."""

    def main(self, *args: Any, **options: Any) -> Any:
        with exit_on_user_error(end_rank):
            STOP.install()
            return super().main(*args, **options)


@click.command(cls=_Stoppable, context_settings={"help_option_names": ["-h", "--help"]})
@setting_options
@click.option(
    "--recipe",
    type=click.Choice(tuple(RECIPES)),
    help=f"A named config.  [default: that of --model, if it has one, else {DEFAULT}; with "
    "--config: the settings' defaults]",
)
@click.option("--baseline", is_flag=True, help=f"The study's training: --recipe {STUDY}.")
@click.option(
    "--config",
    "config_file",
    type=PATH,
    help="TOML file with any setting; over those of --recipe, where it is given.",
)
@click.option(
    "--set",
    "assignments",
    multiple=True,
    metavar="KEY=VALUE",
    help="Any setting, e.g. optim.weight_decay=0.1.",
)
@click.option(
    "--sweep",
    "sweeps",
    multiple=True,
    metavar="KEY=V1,V2|A..B",
    help="Train a member for each value, all in this process, in folders of --out; give it again "
    "for every combination. A sweep goes on with --resume.",
)
@click.option("--out", type=PATH, help="Folder for the results.  [default: runs/<time>]")
@click.option(
    "--resume",
    metavar="auto|FOLDER",
    help="Go on with the run in this folder; auto: in --out, if one was started there.",
)
@click.option(
    "--keep-schedule",
    is_flag=True,
    help="With --resume and more --epochs: the learning rate goes on as before.",
)
@click.option(
    "--device", type=click.Choice(["cpu", "cuda"]), help="[default: cuda if there is a GPU]"
)
def main(
    config_file: Path | None,
    assignments: tuple[str, ...],
    sweeps: tuple[str, ...],
    recipe: str | None,
    baseline: bool,
    out: Path | None,
    resume: str | None,
    keep_schedule: bool,
    device: str | None,
    **flags: Any,
) -> None:
    """Train a character recogniser, or with --sweep several.

    Runs alone or under torchrun. Flags override --set, which overrides --config.
    """
    end_with_launcher()
    ranks = join_ranks()
    ranks.agree(prepare_process)  # a rank's cache folder may be the one that cannot be made
    ranks.agree(lambda: _check_together(recipe, baseline, resume, keep_schedule))
    stored = ranks.from_first(lambda: _stored_config(resume, out, ranks.size))
    named = STUDY if baseline else recipe
    given = Given(named, config_file, assignments, flags, keep_schedule)
    config = ranks.agree(lambda: _read_config(given, stored, ranks.size))
    ranks.agree_on("configuration", config.digest())
    folder = out if resume == AUTO else _path(resume) or out
    going_on = folder if stored else None
    if axes := ranks.agree(lambda: _axes(sweeps, going_on, ranks.size)):
        code = _run_sweep(config, axes, ranks, folder, bool(stored), device or "")
    else:
        code = _run(config, ranks, folder, bool(stored), device or "")
    end_rank(code)


@dataclass(frozen=True)
class Given:
    """What the command line says of the config."""

    recipe: str | None
    config_file: Path | None
    assignments: tuple[str, ...]
    flags: dict[str, Any]
    keep_schedule: bool


def _check_together(
    recipe: str | None, baseline: bool, resume: str | None, keep_schedule: bool
) -> None:
    """UserError where flags contradict each other, or one has nothing to be about."""
    if baseline and recipe not in (None, STUDY):
        what = f"--baseline: is --recipe {STUDY}, but --recipe names {recipe}"
        raise UserError(f"{what}; leave one of them out")
    if keep_schedule and resume is None:
        what = "is of a run that goes on for more epochs"
        raise UserError(f"--keep-schedule: {what}; give --resume, or leave it out")


def _path(resume: str | None) -> Path | None:
    return None if resume is None else written_path(resume)


def _stored_config(resume: str | None, out: Path | None, num_ranks: int) -> str:
    """The config of the run or sweep that goes on, as TOML, or "" where one starts."""
    if resume is None:
        return ""
    if resume == AUTO:
        if out is None:
            raise UserError("--resume auto: give --out too, the folder of the run")
        if not holds_run(out) and not holds_sweep(out):
            return ""
        return _config_text(out, num_ranks)
    run = written_path(resume)
    if out and out != run:
        remedy = "a resumed run goes on in its own, leave out --out"
        raise UserError(f"--out and --resume name two folders; {remedy}")
    check_resumable(run)
    return _config_text(run, num_ranks)


def _config_text(folder: Path, num_ranks: int) -> str:
    if not holds_sweep(folder):
        return read_config_text(folder)
    if num_ranks > 1:
        raise UserError(f"{folder}: holds a sweep; {ALONE}")
    return to_toml(read_sweep(folder)[0])


def _axes(given: tuple[str, ...], going_on: Path | None, num_ranks: int) -> tuple[Axis, ...]:
    """What is swept: as the command line has it, or the sweep that goes on; nothing in a run.

    Raises:
        UserError: the two differ, or there are several ranks.
    """
    axes = parse_sweeps(given)
    if axes and num_ranks > 1:
        raise UserError(f"--sweep: {ALONE}")
    if going_on is None:
        return axes
    if axes and not holds_sweep(going_on):
        raise UserError(f"{going_on}: holds a run, no sweep; leave out --sweep, or change --out")
    stored = read_sweep(going_on)[1] if holds_sweep(going_on) else ()
    if axes and axes != stored:
        names = ", ".join(axis.name for axis in stored)
        what = f"holds another sweep, over other values or settings than these ({names})"
        raise UserError(f"{going_on}: {what}; leave out --sweep, or name another --out")
    return stored


def _read_config(given: Given, stored: str, num_ranks: int) -> RunConfig:
    """A recipe, or the config of the run that goes on, under what the command line says."""
    before = None
    if stored:  # the page was of the process that it was
        before = replace(config_of(stored, "config.toml"), serve=NO_PAGE)
    if before and given.recipe is None:
        config = before
    else:
        model = given.flags.get("model__name")
        config = RECIPES[given.recipe or (model if model in RECIPES else DEFAULT)]
        if given.config_file and given.recipe is None:  # it says all that is no field's default
            config = RunConfig()
        if given.recipe == STUDY:  # its batch is a rank's
            config = replace(config, global_batch=config.global_batch * num_ranks)
    if given.config_file:
        config = load_toml(config, given.config_file)
    assigned = with_own_network(parse_assignments(given.assignments), "--set")
    config = override(config, assigned, "--set")
    flags = with_own_network(flag_settings(given.flags, num_ranks), "--model")
    config = override(config, flags, "flags")
    if before and given.keep_schedule:
        epochs = before.schedule_epochs or before.epochs
        config = replace(config, schedule_epochs=epochs)
    return config


def _run(config: RunConfig, ranks: Ranks, folder: Path | None, resume: bool, device: str) -> int:
    """Train; the exit code."""
    for note in cache_notes():
        _say(f"note: {note}")
    with ExitStack() as stack:
        page = Page(config.serve)

        def take() -> str:
            stack.enter_context(page)
            check = check_resumable if resume else check_new
            out = stack.enter_context(take_folder(folder, check=check))
            if resume and (manifest := newest_manifest(out)):
                check_same_training(out, manifest, config)
            return path_text(out)

        out = written_path(ranks.from_first(take))
        done = ranks.from_first(lambda: finished_text(out, config) if resume else "")
        if done:
            _say(f"{done}: {out / 'report.json'}")
            ranks.leave()
            return 0
        return _train(config, ranks, out, resume, device, page)


def _train(
    config: RunConfig, ranks: Ranks, out: Path, resume: bool, device: str, page: Page
) -> int:
    from engine.train.session import open_run_records
    from engine.train.trainer import check_run, fit
    from engine.world import start_world

    ranks.agree(lambda: check_run(config, device))
    records = ranks.agree(lambda: open_run_records(config, ranks.size, ranks.sign))
    ranks.agree_on("records' fingerprint", records.fingerprint)
    ranks.agree(lambda: check_records(out, records.fingerprint, resume and ranks.rank == 0))
    ranks.from_first(lambda: _show(page, out))
    with start_world(device, ranks, config.timeout_s) as world:
        report, signal = fit(config, records, world, out, resume=resume, say=_say)
    if signal:
        return 128 + signal
    accuracy = report.test_accuracy_fraction
    test = "" if accuracy is None else f", test {accuracy:.2%}"
    speed = f"{report.train_s:.2f} s of training, {report.samples_per_s:,.0f} samples/s"
    _say(f"{speed}{test}: {out / 'report.json'}")
    return 0


def _run_sweep(
    config: RunConfig,
    axes: tuple[Axis, ...],
    ranks: Ranks,
    folder: Path | None,
    resume: bool,
    device: str,
) -> int:
    """Train the members of a sweep together; the exit code."""
    for note in cache_notes():
        _say(f"note: {note}")
    sweep = Sweep.of(config, axes)
    check = check_resumable if resume else check_new
    with Page(config.serve) as page, take_folder(folder, check=check) as out:
        if resume:
            check_goes_on(out, sweep.members)
        from engine.train.outcome import train_sweep

        _show(page, out)
        return train_sweep(sweep, out, device, ranks, _say)


def _show(page: Page, out: Path) -> str:
    """Start the page and say where, if it was asked for."""
    if line := page.start(out):
        _say(line)
    return line


def _say(line: str) -> None:
    if env_rank() == 0:
        click.echo(line)


if __name__ == "__main__":
    guard_outputs()
    main(prog_name="engine.run")
