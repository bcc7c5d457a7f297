"""The command: torchrun -m engine.run --amp --cuda-graphs.

Flags -> RunConfig -> trainer.fit, nothing else.
"""

from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import Any

import click

from engine.config import RECIPES, RunConfig, load_toml, override, parse_assignments
from engine.durable import take_folder
from engine.errors import UserError, exit_on_user_error
from engine.flags import flag_settings, setting_options
from engine.host import cache_notes, env_rank, prepare_process
from engine.paths import PATH, path_text, written_path
from engine.ranks import Ranks, join_ranks
from engine.train.folder import check_new, check_resumable
from engine.ui import guard_outputs


@click.command(context_settings={"help_option_names": ["-h", "--help"]})
@setting_options
@click.option(
    "--recipe", type=click.Choice(tuple(RECIPES)), help="A named config.  [default: fast]"
)
@click.option(
    "--baseline", "recipe", flag_value="study", help="The study's training: --recipe study."
)
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
    out: Path | None,
    resume: Path | None,
    device: str | None,
    **flags: Any,
) -> None:
    """Train a character recogniser.

    Runs alone or under torchrun. Flags override --set, which overrides --config.
    """
    with exit_on_user_error():
        ranks = join_ranks()
        ranks.agree(prepare_process)  # a rank's cache folder may be the one that cannot be made

        def read_config() -> RunConfig:
            config = _first_config(recipe, resume, out, ranks.size)
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
        check_resumable(resume)
        return load_toml(RunConfig(), resume / "config.toml")
    config = RECIPES[recipe or "fast"]
    if recipe == "study":  # its batch is a rank's
        config = replace(config, global_batch=config.global_batch * num_ranks)
    return config


def _run(
    config: RunConfig, ranks: Ranks, out: Path | None, resume: Path | None, device: str
) -> None:
    from engine.train.session import open_run_records
    from engine.train.trainer import check_run, fit
    from engine.world import start_world

    for note in cache_notes():
        _say(f"note: {note}")
    ranks.agree(lambda: check_run(config, device))
    records = ranks.agree(lambda: open_run_records(config, ranks.size))
    ranks.agree_on("records' fingerprint", records.fingerprint)
    with ExitStack() as stack:

        def take() -> str:
            check = check_resumable if resume else check_new
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


if __name__ == "__main__":
    guard_outputs()
    main(prog_name="engine.run")
