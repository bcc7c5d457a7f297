"""The command: torchrun -m engine.run --amp --cuda-graphs. Flags -> RunConfig -> trainer.fit, nothing else."""

import os
from contextlib import ExitStack
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any, get_args, get_type_hints

import click

from engine.config import (
    DataConfig,
    KernelConfig,
    RunConfig,
    load_toml,
    override,
    parse_assignments,
)
from engine.errors import UserError, exit_on_user_error
from engine.host import env_rank, prepare_process
from engine.paths import PATH, path_text, written_path
from engine.publish import is_empty, take_folder
from engine.ranks import Ranks, join_ranks

if TYPE_CHECKING:
    from engine.records import Records

FEEDS = list(get_args(get_type_hints(DataConfig)["feed"]))
KERNELS = list(get_args(get_type_hints(KernelConfig)["use"]))
ORDERS = list(get_args(get_type_hints(DataConfig)["order"]))


@click.command(context_settings={"help_option_names": ["-h", "--help"]})
@click.option(
    "--data",
    type=PATH,
    help="Record directory made by tools/pack_tmnist.  [default: the sample]",
)
@click.option("--amp", type=click.Choice(["bf16", "fp16"]), is_flag=False, flag_value="bf16",
              help="Mixed precision; alone it means bf16.")  # fmt: skip
@click.option(
    "--cuda-graphs/--no-cuda-graphs", default=None, help="Capture the whole step in one CUDA graph."
)
@click.option(
    "--steps-per-graph",
    type=click.IntRange(1, 64),
    metavar="K",
    help="Steps in one launch.  [default: 1]",
)
@click.option("--compile", type=click.Choice(["off", "default", "max-autotune"]), is_flag=False, flag_value="default",
              help="torch.compile in this mode; alone: default.")  # fmt: skip
@click.option(
    "--kernels",
    type=click.Choice(KERNELS),
    help="Fused code: kernels/ (triton), torch.compile, or the best.",
)
@click.option(
    "--accumulate", type=click.IntRange(1), help="Parts of a rank's batch before the one update."
)
@click.option("--channels-last/--no-channels-last", default=None, help="NHWC memory format.")
@click.option("--feed", type=click.Choice(FEEDS), help="The road the batches take.")
@click.option(
    "--order", type=click.Choice(ORDERS), help="exact, or blocked: as the stream feed can read it."
)
@click.option("--batch-size", type=click.IntRange(1), help="Samples of one rank in a step.")
@click.option("--epochs", type=click.IntRange(1), help="Passes over the training split.")
@click.option(
    "--target-accuracy", type=click.FloatRange(0, 1), help="Stop when validation reaches it (0..1)."
)
@click.option("--seed", type=click.IntRange(0), help="Initial weights and order of samples.")
@click.option(
    "--baseline",
    is_flag=True,
    help="The study's recipe: fp32, NCHW, eager, loader, Adam 1e-3, batch 64.",
)
@click.option(
    "--tensorboard",
    is_flag=True,
    default=None,
    help="Write TensorBoard events, too, to OUT/tensorboard.",
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
    "--device", type=click.Choice(["cpu", "cuda"]), help="[default: cuda where there is a GPU]"
)
def main(
    config_file: Path | None,
    assignments: tuple[str, ...],
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
            config = _first_config(baseline, resume, out, ranks.size)
            if config_file:
                config = load_toml(config, config_file)
            config = override(config, parse_assignments(assignments), "--set")
            return override(config, _settings(flags, ranks.size), "flags")

        config = ranks.agree(read_config)
        ranks.agree_on("configuration", config.digest())
        _run(config, ranks, out, resume, device or "")
    from engine.world import end_rank

    end_rank()


def _first_config(
    baseline: bool, resume: Path | None, out: Path | None, num_ranks: int
) -> RunConfig:
    """What files and flags override: a recipe, or the config of the run that goes on."""
    config = RunConfig.baseline() if baseline else RunConfig()
    if resume:
        if out and out != resume:
            remedy = "a resumed run goes on in its own, leave out --out"
            raise UserError(f"--out and --resume name two folders; {remedy}")
        _check_resumable(resume)
        return load_toml(config, resume / "config.toml")
    return replace(config, global_batch=config.global_batch * num_ranks) if baseline else config


def _settings(flags: dict[str, Any], num_ranks: int) -> dict[str, Any]:
    """Flags that were given, as settings."""
    names = {"amp": "step.precision", "cuda_graphs": "step.cuda_graphs", "steps_per_graph": "step.steps_per_graph",
             "compile": "step.compile", "accumulate": "step.accumulate", "channels_last": "step.channels_last",
             "kernels": "kernels.use", "feed": "data.feed", "order": "data.order", "data": "data.path",
             "batch_size": "global_batch"}  # fmt: skip
    given = {names.get(flag, flag): value for flag, value in flags.items() if value is not None}
    if flags["data"]:
        given["data.path"] = os.fspath(flags["data"])
    if flags["batch_size"] is not None:
        given["global_batch"] *= num_ranks
    return given


def _run(
    config: RunConfig, ranks: Ranks, out: Path | None, resume: Path | None, device: str
) -> None:
    from engine.trainer import fit
    from engine.world import check_ranks, start_world

    if config.tensorboard and find_spec("tensorboard") is None:
        raise UserError(
            "--tensorboard: the package is not installed; pip install tensorboard, or leave it out"
        )
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
    from engine.feeds import open_for
    from engine.sample import ensure_sample
    from engine.session import check_batch

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
    main()
