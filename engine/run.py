"""The command: torchrun -m engine.run --amp --cuda-graphs. Flags -> RunConfig -> trainer.fit, nothing else."""

from contextlib import ExitStack
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from engine.config import RECIPES, RunConfig, load_toml, override, parse_assignments
from engine.durable import is_empty, take_folder
from engine.errors import UserError, exit_on_user_error
from engine.flags import flag_settings, setting_options
from engine.host import cache_notes, env_rank, prepare_process
from engine.paths import PATH, path_text, written_path
from engine.ranks import Ranks, join_ranks
from engine.ui import guard_outputs

if TYPE_CHECKING:
    from engine.data.records import Records


@click.command(context_settings={"help_option_names": ["-h", "--help"]})
@setting_options
@click.option(
    "--recipe", type=click.Choice(tuple(RECIPES)), help="A named config.  [default: fast]"
)
@click.option("--baseline", is_flag=True, help="The study's training: --recipe study.")
@click.option("--config", "config_file", type=PATH, help="TOML file with any setting.")
@click.option(
    "--set",
    "assignments",
    multiple=True,
    metavar="KEY=VALUE",
    help="Any setting, e.g. optim.weight_decay=0.1.",
)
@click.option("--out", type=PATH, help="Folder for the results.  [default: runs/<time>]")
@click.option("--resume", type=PATH, help="Go on with the run in this folder.")
@click.option(
    "--device", type=click.Choice(["cpu", "cuda"]), help="[default: cuda if there is a GPU]"
)
def main(
    config_file: Path | None,
    assignments: tuple[str, ...],
    recipe: str | None,
    baseline: bool,
    out: Path | None,
    resume: Path | None,
    device: str | None,
    **flags: Any,
) -> None:
    """Train a character recogniser. Runs alone or under torchrun; flags override --set, which overrides --config."""
    with exit_on_user_error():
        prepare_process()
        ranks = join_ranks()

        def read_config() -> RunConfig:
            name = "study" if baseline else recipe
            config = _first_config(name, resume, out, ranks.size)
            if config_file:
                config = load_toml(config, config_file)
            config = override(config, parse_assignments(assignments), "--set")
            return override(config, flag_settings(flags, ranks.size), "flags")

        config = ranks.agree(read_config)
        ranks.agree_on("configuration", config.digest())
        _run(config, ranks, out, resume, device or "")
    from engine.world import end_rank

    end_rank()


def _first_config(
    recipe: str | None, resume: Path | None, out: Path | None, num_ranks: int
) -> RunConfig:
    """What files and flags override: a recipe, or the config of the run that goes on."""
    if resume:
        if out and out != resume:
            remedy = "a resumed run goes on in its own, leave out --out"
            raise UserError(f"--out and --resume name two folders; {remedy}")
        _check_resumable(resume)
        return load_toml(RunConfig(), resume / "config.toml")
    config = RECIPES[recipe or "fast"]
    if recipe == "study":  # its batch is a rank's
        config = replace(config, global_batch=config.global_batch * num_ranks)
    return config


def _run(
    config: RunConfig, ranks: Ranks, out: Path | None, resume: Path | None, device: str
) -> None:
    from engine.train.trainer import fit
    from engine.world import check_ranks, start_world

    if config.tensorboard and find_spec("tensorboard") is None:
        raise UserError(
            "--tensorboard: the package is not installed; pip install tensorboard, or leave it out"
        )
    for note in cache_notes():
        _say(f"note: {note}")
    ranks.agree(lambda: check_ranks(device))
    records = ranks.agree(lambda: _open_records(config, ranks.size))
    ranks.agree_on("records' fingerprint", records.fingerprint)
    with ExitStack() as stack:

        def take() -> str:
            check = _check_resumable if resume else _check_new
            return path_text(stack.enter_context(take_folder(resume or out, check=check)))

        out = written_path(ranks.from_first(take))
        with start_world(device, ranks) as world:
            report = fit(config, records, world, out, resume=bool(resume), say=_say)
    accuracy = report.test_accuracy_fraction
    test = "" if accuracy is None else f", test {accuracy:.2%}"
    speed = f"{report.train_s:.2f} s of training, {report.samples_per_s:,.0f} samples/s"
    _say(f"{speed}{test}: {out / 'report.json'}")


def _say(line: str) -> None:
    if env_rank() == 0:
        click.echo(line)


def _open_records(config: RunConfig, num_ranks: int) -> "Records":
    from engine.data.sample import ensure_sample
    from engine.feeds.build import open_for
    from engine.train.session import check_batch

    records = open_for(config.data, config.data.path or ensure_sample())
    check_batch(config, records, num_ranks)
    return records


def _check_new(out: Path) -> None:
    if is_empty(out):
        return
    if any(out.glob("checkpoints/epoch-*")):
        raise UserError(
            f"{out}: holds a run already; name another --out, or go on with --resume {out}"
        )
    raise UserError(f"{out}: is not empty, and holds no run to resume; name another --out")


def _check_resumable(run: Path) -> None:
    remedy = "give --resume the folder of an earlier run"
    if not run.is_dir():
        raise UserError(f"{run}: no such folder; {remedy}")
    if not (run / "config.toml").is_file():
        raise UserError(f"{run}: holds no config.toml, so it is no run's folder; {remedy}")
    if not any(run.glob("checkpoints/epoch-*")):
        anew = f"start anew with another --out (and --config {run / 'config.toml'})"
        raise UserError(f"{run}: holds no checkpoint to resume from; {anew}")


if __name__ == "__main__":
    guard_outputs()
    main(prog_name="engine.run")
