"""tools/profile: what a configuration does to throughput and memory.

Bare, it measures the default configuration with the fast settings on. Every figure comes from the
TrainStep and feeds of training, in processes of their own (tools/measure/matrix.py, cell.py).
"""

import os
from collections.abc import Iterator
from contextlib import AbstractContextManager, ExitStack, nullcontext
from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from engine.config import RECIPES, RunConfig, override
from engine.config_text import load_toml, with_own_network
from engine.data.remote import RECORDS
from engine.durable import is_empty, take_folder, writing
from engine.errors import UserError, exit_on_user_error, printable
from engine.host import cache_notes, end_rank, env_world_size, prepare_process
from engine.paths import PATH, full_path
from engine.report import read_report, write_json
from engine.serve import check_installed
from engine.ui import guard_outputs
from tools.report.outputs import check_file

if TYPE_CHECKING:
    from tools.measure.results import Profile

# Before torch is loaded: the profiler writes no lines of its own to stderr.
os.environ.setdefault("KINETO_LOG_LEVEL", "6")
DEFAULT = {"step.precision": "bf16", "step.cuda_graphs": True}
"""What `torchrun -m engine.run --amp --cuda-graphs` trains with."""
SHOWN = (
    "id", "name", "num", "samples_per_s", "samples_per_s_low95", "samples_per_s_high95", "base",
    "gain", "speedup", "efficiency", "steps_per_launch", "step_ms", "data_wait_fraction",
    "host_peak_rss_gib", "torch_peak_gib", "device_used_gib", "gpu_utilisation_percent", "power_w",
    "energy_j_per_ksample", "train_s", "test_accuracy_fraction",
)  # fmt: skip
"""The table's columns."""


DATA = click.option(
    "--data", type=RECORDS, help="Record directory, or its URL.  [default: the sample]"
)
DEVICE = click.option(
    "--device",
    type=click.Choice(["cpu", "cuda"]),
    callback=lambda _, __, value: value or "",
    help="[default: cuda where there is a GPU]",
)


@click.group(invoke_without_command=True, context_settings={"help_option_names": ["-h", "--help"]})
@click.pass_context
def main(context: click.Context) -> None:
    """Measure training: throughput, step times, waiting for data, memory, power."""
    with exit_on_user_error():
        prepare_process()
        for note in cache_notes():
            click.echo(f"note: {printable(note)}")
    if context.invoked_subcommand is None:
        context.invoke(run, device="")


@main.command()
@click.argument("configs", nargs=-1, type=PATH)
@DATA
@click.option(
    "--steps",
    type=click.IntRange(2),
    help="Timed steps of each cell, and no training of whole epochs.",
)
@click.option("--repetitions", type=click.IntRange(1), help="Of each cell.")
@click.option("--batch-size", type=click.IntRange(1), help="Samples in a step of every run config.")
@click.option("--out", type=PATH, help="Folder for the figures.  [default: runs/profile-<time>]")
@click.option(
    "--resume", is_flag=True, help="Go on in --out: what was measured of the same cells stays."
)
@DEVICE
def run(
    configs: tuple[Path, ...],
    data: Path | None,
    out: Path | None,
    resume: bool,
    device: str,
    **amounts: int | None,
) -> None:
    """Measure CONFIGS: matrices and run configs (bench_configs/*.toml); none: the default.

    Writes profile.json and .csv, and a file per repetition of a cell. Exit code 1 if a cell failed.
    """
    with exit_on_user_error():
        from tools.measure.matrix import config_cell, read_cells
        from tools.measure.runner import Run, in_child

        batch_size = amounts["batch_size"]
        title = "default"
        cells = [config_cell("default", DEFAULT, batch_size)]
        if configs:
            title, cells = read_cells(list(configs), batch_size)
        if steps := amounts["steps"]:
            cells = [replace(cell, num_steps=steps, accuracy=False) for cell in cells]
        if repetitions := amounts["repetitions"]:
            cells = [replace(cell, repetitions=repetitions) for cell in cells]
        num_gpus = _num_gpus(device)
        records = str(full_path(data)) if data else ""
        with _taken(out, resume) as folder:
            measured = Run(title=title, cells=cells, out=folder, data=records, device=device,
                           num_gpus=num_gpus)  # fmt: skip
            measured.measure(measured.missing(resume), in_child)
            failed = _show(measured.profile(), folder)
    raise SystemExit(1 if failed else 0)


@main.command()
@click.argument("a", type=PATH)
@click.argument("b", type=PATH)
@click.option("--out", type=PATH, help="Folder for comparison.md and comparison.json, too.")
def compare(a: Path, b: Path, out: Path | None) -> None:
    """Put two runs, or two folders of `tools/profile run`, A and B, side by side."""
    with exit_on_user_error():
        from tools.report.compare import compare_profiles, compare_runs

        side_by_side = compare_profiles if (a / "profile.json").exists() else compare_runs
        with take_folder(out) if out else nullcontext():
            click.echo(side_by_side(a, b, out))
        if out:
            click.echo(f"report: {out / 'comparison.md'}")


@main.command()
@click.argument("folders", metavar="DIR...", nargs=-1, required=True, type=PATH)
@click.option("--out", type=PATH, help="Folder for report.html, .md and figures.  [default: DIR]")
@click.option("--serve", is_flag=True, help="A live page of runs: DIR... or those that lie in it.")
@click.option("--port", type=click.IntRange(0, 65_535), help="Of --serve.  [default: a free one]")
def report(folders: tuple[Path, ...], out: Path | None, serve: bool, port: int | None) -> None:
    """Write what DIR's profile.json holds as a page with charts, as pictures, and as tables.

    Of a sweep's folder: its members and their vote, as a picture and a table. With --serve nothing
    is written.
    """
    with exit_on_user_error():
        if serve:
            _serve(folders, port or 0)
            return
        if len(folders) > 1 or port is not None:
            raise UserError("several folders and --port are for --serve; give one DIR, or --serve")
        from engine.train.sweep import RESULT
        from tools.report.page import write_report
        from tools.report.sweep import write_sweep_report

        (folder,) = folders
        is_sweep = (folder / RESULT).exists() and not (folder / "profile.json").exists()
        write = write_sweep_report if is_sweep else write_report
        with take_folder(out or folder) as place:
            click.echo(f"report: {write(folder, place)}")


@main.command()
@click.option(
    "--data", type=RECORDS, help="Records; best packed with --split none.  [default: the sample]"
)
@click.option(
    "--batch-size",
    default=2048,
    show_default=True,
    type=click.IntRange(1),
    help="Samples of a batch.",
)
@click.option(
    "--seconds", default=5.0, show_default=True, type=click.FloatRange(0.1), help="For each feed."
)
@click.option("--json", "json_file", type=PATH, help="Write the figures there, too.")
@click.option("--out", type=PATH, help="Folder for the figures.  [default: runs/feeds-<time>]")
def feeds(
    data: Path | None, batch_size: int, seconds: float, json_file: Path | None, out: Path | None
) -> None:
    """Measure what every feed carries, without a step."""
    with exit_on_user_error():
        from tools.measure.feeds import profile_feeds

        if json_file:
            check_file(json_file)
        with take_folder(out, "feeds-") as folder:
            click.echo(profile_feeds(data, batch_size, seconds, json_file, folder))


@main.command()
@click.argument("config_file", required=False, type=PATH, metavar="[CONFIG]")
@DATA
@click.option(
    "--steps", type=click.IntRange(1), default=10, show_default=True, help="Traced steps."
)
@click.option("--batch-size", type=click.IntRange(1), help="Samples of one rank in a step.")
@click.option("--out", type=PATH, help="Folder for the files.  [default: runs/trace-<time>]")
@DEVICE
def trace(
    config_file: Path | None,
    data: Path | None,
    steps: int,
    batch_size: int | None,
    out: Path | None,
    device: str,
) -> None:
    """Trace a few steps of CONFIG: stages, slowest operators, kernels; a file for Perfetto."""
    with exit_on_user_error(end_rank):
        from tools.measure.trace import trace_config

        if config_file:
            config = load_toml(RunConfig(), config_file)
        else:
            config = override(RunConfig(), DEFAULT, "default")
        if data:
            config = override(config, {"data.path": os.fspath(data)}, "flags")
        if batch_size:
            batch = batch_size * env_world_size()
            config = override(config, {"global_batch": batch}, "flags")
        with ExitStack() as stack:

            def take() -> Path:
                return stack.enter_context(take_folder(out, "trace-"))

            click.echo(trace_config(config, steps, take, device), nl=False)
    end_rank()


@main.command()
@click.argument("matrix", required=False, type=PATH, metavar="[MATRIX]")
@click.option(
    "--gpu", default="NVIDIA H100 80GB HBM3", show_default=True, help="The GPU of the model."
)
@click.option("--out", type=PATH, help="Write the ledger there, too, as JSON.")
def ledger(matrix: Path | None, gpu: str, out: Path | None) -> None:
    """Count the launches and bytes of MATRIX's steps, without a GPU, and predict their time.

    The default is bench_configs/ledger.toml. What is printed is a model's, not measured.
    """
    with exit_on_user_error():
        from tools.measure.ledger import (
            ROWS,
            launches_table,
            make_ledger,
            to_markdown,
            write_ledger,
        )

        if out:
            check_file(out)
        found = make_ledger(matrix or ROWS, gpu)
        click.echo(to_markdown(found, out.name if out else "none"))
        if not matrix:
            click.echo(launches_table(found), nl=False)
        if out:
            write_ledger(found, out)


@main.command()
@click.argument("config_file", required=False, type=PATH, metavar="[CONFIG]")
@click.option("--model", help="Another network than CONFIG's: a name, or FILE.py:NAME.")
@click.option(
    "--device", default="", help="The GPU's whole name.  [default: this machine's, if it has one]"
)
@click.option("--batch-size", type=click.IntRange(1), help="Samples in a step.")
def advise(
    config_file: Path | None, model: str | None, device: str, batch_size: int | None
) -> None:
    """Say for each layer of CONFIG's network whether fp8 would be faster on a GPU, and why not.

    It needs no GPU. What is printed is a model's, not measured.
    """
    with exit_on_user_error():
        import torch

        from tools.measure.advice import advise as advice_on
        from tools.measure.advice import to_markdown

        config = load_toml(RunConfig(), config_file) if config_file else RunConfig()
        given = {"model.name": model, "global_batch": batch_size}
        changed = {name: value for name, value in given.items() if value is not None}
        config = override(config, with_own_network(changed, "--model"), "flags")
        if not device and torch.cuda.is_available():
            device = torch.cuda.get_device_name()
        click.echo(to_markdown(advice_on(config, device)), nl=False)


@main.command()
@click.argument("config_file", required=False, type=PATH, metavar="[CONFIG]")
@DATA
@click.option("--run", type=PATH, help="A finished run: its config and accuracy.")
@click.option("--model", help="Another network than CONFIG's: a name, or FILE.py:NAME.")
@click.option("--batches", default="", help="Samples of a rank, with commas between.")
@click.option("--ranks", default="", help="Numbers up to 1024, with commas between.")
@click.option("--precisions", default="", help="fp32, bf16, ...  [default: fp32,bf16]")
@click.option("--parallel", default="", help="ddp, fsdp  [default: both]")
@click.option("--gpu", default="", help="A GPU's whole name: its model instead of this machine.")
@click.option("--fit", type=PATH, help="A link as `-m tools.measure.link` measured it.")
@click.option("--alpha-us", type=click.FloatRange(0, 1e6), help="What a message costs.")
@click.option(
    "--beta-gbps", type=click.FloatRange(1e-3, 1e5), help="Gbit/s that a rank sends and receives."
)
@click.option("--steps", default=30, show_default=True, type=click.IntRange(2), help="Timed ones.")
@click.option("--repetitions", default=3, show_default=True, type=click.IntRange(1))
@click.option("--out", type=PATH, help="Folder for plan.json, .md.  [default: runs/plan-<time>]")
@DEVICE
def plan(
    config_file: Path | None,
    data: Path | None,
    out: Path | None,
    device: str,
    **options: Any,
) -> None:
    """Recommend ranks, batch, precision, ddp or fsdp for CONFIG, on this machine or another.

    Measures steps and collectives here, or takes --gpu and --fit, or --alpha-us and --beta-gbps.
    Writes plan.json. What is predicted is a model's, not measured.
    """
    with exit_on_user_error():
        from tools.measure.plan import Asked, make_plan
        from tools.measure.timings import Here
        from tools.report.plan import to_markdown

        amounts = {"num_steps": options.pop("steps"), "repetitions": options.pop("repetitions")}
        num_gpus = _num_gpus(device)
        config = _planned_config(config_file, options["run"])
        given = {"model.name": options.pop("model"), "data.path": data and os.fspath(data)}
        changed = {name: value for name, value in given.items() if value is not None}
        config = override(config, with_own_network(changed, "--model"), "flags")
        with take_folder(out, "plan-") as folder:
            here = Here(out=folder, device=device, num_gpus=num_gpus, **amounts)
            found = make_plan(config, Asked(**options), here)
            text = to_markdown(found)
            with writing(folder):
                write_json(found, folder / "plan.json")
                (folder / "plan.md").write_text(text, encoding="utf-8")
        click.echo(text, nl=False)
        click.echo(f"written: {folder / 'plan.json'}, {folder / 'plan.md'}")


@main.command()
@DATA
@click.option(
    "--config", "config_file", type=PATH, help="TOML file: a recipe other than the study's."
)
@click.option("--networks", default=4, show_default=True, type=click.IntRange(2))
@click.option(
    "--workers", default=2, show_default=True, type=click.IntRange(2), help="Against one."
)
@click.option(
    "--epochs", default=4, show_default=True, type=click.IntRange(1), help="Of each network."
)
@click.option("--out", type=PATH, help="Folder for the figures.  [default: runs/ensemble-<time>]")
def ensemble(
    data: Path | None,
    config_file: Path | None,
    networks: int,
    workers: int,
    epochs: int,
    out: Path | None,
) -> None:
    """Train networks in parallel on CPU cores, by one worker and by several, and let them vote."""
    with exit_on_user_error():
        from tools.measure.ensemble import profile_ensemble

        config = RECIPES["study"]
        if config_file:
            config = load_toml(config, config_file)
        config = override(config, {"epochs": epochs}, "flags")
        if data:
            config = override(config, {"data.path": os.fspath(data)}, "flags")
        with take_folder(out, "ensemble-") as folder:
            click.echo(profile_ensemble(config, networks, workers, folder))


def _serve(folders: tuple[Path, ...], port: int) -> None:
    check_installed()
    from tools.report.live import show_runs

    show_runs(folders, port)


def _planned_config(config_file: Path | None, run_folder: Path | None) -> RunConfig:
    """The configuration of a plan: a file's, a run's, or that of engine.run."""
    if config_file and run_folder:
        raise UserError("CONFIG and --run: a run has its own config; give one of them")
    if run_folder:
        read_report(run_folder)  # refuses what is no run, a sweep among others
    file = run_folder / "config.toml" if run_folder else config_file
    return load_toml(RunConfig(), file) if file else RECIPES["fast"]


def _num_gpus(device: str) -> int:
    import torch

    from engine.world import check_ranks

    if env_world_size() > 1:
        raise UserError(
            "tools/profile starts the ranks of its cells itself; start it without torchrun"
        )
    check_ranks(device)
    return 0 if device == "cpu" else torch.cuda.device_count()


def _taken(out: Path | None, resume: bool) -> AbstractContextManager[Path]:
    """The folder of a profile, this process's own while it measures."""

    def check(folder: Path) -> None:
        if resume and not (folder / "cells").is_dir():
            raise UserError(
                f"{folder}: holds no cells to go on with; give --out an earlier profile"
            )
        if not resume and not is_empty(folder):
            also = ", or go on with it by --resume" if (folder / "cells").is_dir() else ""
            raise UserError(f"{folder}: is not empty; name another --out{also}")

    if resume and not out:
        raise UserError("--resume: name the earlier profile's folder by --out")
    return take_folder(out, "profile-", check)


def _show(profile: "Profile", out: Path) -> int:
    """Print the table of the cells and write it; returns the number of repetitions that failed."""
    from tools.report.figures import heading, show
    from tools.report.tables import cells_frame

    frame = cells_frame(profile)
    table = frame[list(SHOWN)].copy()
    table.loc[frame["ranks"] == 1, ["speedup", "efficiency"]] = None  # over itself
    table = table.dropna(axis="columns", how="all")
    shown = {heading(c): [show(c, v) for v in table[c]] for c in table.columns}
    click.echo(type(frame)(shown).to_string(index=False))
    failed = [
        f"{cell.id} {cell.name}: failed: {repetition.failed}"
        for cell in profile.cells
        for repetition in cell.repetitions
        if repetition.failed
    ]
    for line in dict.fromkeys([*_remarks(profile), *failed]):
        click.echo(printable(line))
    with writing(out):
        frame.to_csv(out / "profile.csv", index=False)
    click.echo(f"written: {out / 'profile.json'}, {out / 'profile.csv'}")
    return len(failed)


def _remarks(profile: "Profile") -> Iterator[str]:
    """What was noted, what could not be measured here, and what others published."""
    for cell in profile.cells:
        yield from (f"note: {note}" for r in cell.repetitions for note in r.notes)
    for cell in profile.cells:
        if cell.not_measured:
            yield f"{cell.id} {cell.name}: not measured here: {cell.not_measured}"
    for cell in profile.cells:
        if cell.published:
            given = {n: v for n, v in asdict(cell.published).items() if v is not None}
            figures = ", ".join(f"{name} {value}" for name, value in given.items())
            yield f"{cell.id} {cell.name}: published: {figures}"


if __name__ == "__main__":
    guard_outputs()
    main(prog_name="tools/profile", complete_var="_PROFILE_COMPLETE")
