"""The command: torchrun -m engine.run --amp --cuda-graphs. Flags -> RunConfig -> trainer.fit, nothing else."""

import time
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path
from typing import Any, get_args, get_type_hints

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

FEEDS = list(get_args(get_type_hints(DataConfig)["feed"]))
KERNELS = list(get_args(get_type_hints(KernelConfig)["use"]))
ORDERS = list(get_args(get_type_hints(DataConfig)["order"]))


@click.command(context_settings={"help_option_names": ["-h", "--help"]})
@click.option(
    "--data",
    type=click.Path(),
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
@click.option("--config", "config_file", type=click.Path(), help="TOML file with any setting.")
@click.option(
    "--set",
    "assignments",
    multiple=True,
    metavar="KEY=VALUE",
    help="Any setting, e.g. optim.weight_decay=0.1.",
)
@click.option(
    "--out", type=click.Path(path_type=Path), help="Folder for the results.  [default: runs/<time>]"
)
@click.option(
    "--resume", type=click.Path(path_type=Path), help="Go on with the run in this folder."
)
@click.option(
    "--device", type=click.Choice(["cpu", "cuda"]), help="[default: cuda where there is a GPU]"
)
def main(
    config_file: str | None,
    assignments: tuple[str, ...],
    baseline: bool,
    out: Path | None,
    resume: Path | None,
    device: str | None,
    **flags: Any,
) -> None:
    """Train a character recogniser. Runs alone or under torchrun; flags override --set, which overrides --config."""
    from engine.world import end_rank, env_rank, env_world_size

    with exit_on_user_error(speak=env_rank() == 0):
        config = RunConfig.baseline() if baseline else RunConfig()
        if resume:
            config = load_toml(config, resume / "config.toml")
            if out and out != resume:
                raise UserError(
                    "--out and --resume name two folders; a resumed run goes on in its own, leave out --out"
                )
        elif baseline:
            config = replace(config, global_batch=config.global_batch * env_world_size())
        if config_file:
            config = load_toml(config, config_file)
        config = override(config, parse_assignments(assignments), "--set")
        config = override(config, _settings(flags, env_world_size()), "flags")
        _run(config, out or resume, bool(resume), device or "")
    end_rank()


def _settings(flags: dict[str, Any], world_size: int) -> dict[str, Any]:
    """Flags that were given, as settings."""
    names = {"amp": "step.precision", "cuda_graphs": "step.cuda_graphs", "steps_per_graph": "step.steps_per_graph",
             "compile": "step.compile", "accumulate": "step.accumulate", "channels_last": "step.channels_last",
             "kernels": "kernels.use", "feed": "data.feed", "order": "data.order", "data": "data.path",
             "batch_size": "global_batch"}  # fmt: skip
    given = {names.get(flag, flag): value for flag, value in flags.items() if value is not None}
    if flags["data"]:
        given["data.path"] = str(Path(flags["data"]).absolute())  # a run is resumed from any folder
    if flags["batch_size"] is not None:
        given["global_batch"] *= world_size
    return given


def _run(config: RunConfig, out: Path | None, resume: bool, device: str) -> None:
    from engine.feeds import open_for
    from engine.publish import writing
    from engine.sample import ensure_sample
    from engine.session import check_batch
    from engine.trainer import fit
    from engine.world import check_ranks, env_rank, env_world_size, keep_large_blocks, start_world

    def say(line: str) -> None:
        if env_rank() == 0:
            click.echo(line)

    if config.tensorboard and find_spec("tensorboard") is None:
        raise UserError(
            "--tensorboard: the package is not installed; pip install tensorboard, or leave it out"
        )
    keep_large_blocks()  # before anything large is read
    check_ranks(device)
    records = None
    if config.data.path:
        records = open_for(config.data, config.data.path)
        check_batch(config, records, env_world_size())
    out = out or Path("runs") / time.strftime("%Y%m%d-%H%M%S", time.gmtime())
    _check_out(out, resume)

    def make_out() -> None:
        with writing(out):
            out.mkdir(parents=True, exist_ok=True)

    with start_world(device) as world:
        if records is None:
            records = open_for(config.data, ensure_sample(world))
            check_batch(config, records, world.size)
        world.first(make_out)
        report = fit(config, records, world, out, resume=resume, say=say)
        test = (
            f", test {report.test_accuracy_fraction:.2%}"
            if report.test_accuracy_fraction is not None
            else ""
        )
        say(
            f"{report.train_s:.2f} s of training, {report.samples_per_s:,.0f} samples/s{test}: {out / 'report.json'}"
        )


def _check_out(out: Path, resume: bool) -> None:
    if resume and not (out / "checkpoints").is_dir():
        raise UserError(
            f"{out}: holds no checkpoints to resume from; give the folder of an earlier run"
        )
    if not resume and out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise UserError(f"{out}: is not empty; name another --out, or --resume {out}")


if __name__ == "__main__":
    main()
