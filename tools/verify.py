"""tools/verify: is this machine fit (doctor), is fast training the same (parity)? Bare: both.

`tools/verify order RUN`: did a run see the samples it should have, in the order it should have,
with the right pixels? The evidence is what the run wrote with `--set log_ids=true`
(engine/train/idlog.py).
"""

import zlib
from pathlib import Path

import click
import numpy as np

from engine.config import RunConfig, load_toml
from engine.data.records import open_records
from engine.data.sample import sample_path
from engine.errors import UserError, exit_on_user_error, printable
from engine.host import prepare_process
from engine.paths import PATH
from engine.report import read_report
from engine.ui import guard_outputs

ROWS_READ = 4096
DEVICE = click.option(
    "--device",
    type=click.Choice(["cpu", "cuda"]),
    callback=lambda _, __, value: value or "",
    help="[default: cuda where there is a GPU]",
)


@click.group(invoke_without_command=True, context_settings={"help_option_names": ["-h", "--help"]})
@DEVICE
@click.pass_context
def main(context: click.Context, device: str) -> None:
    """Check this machine and the engine on it: doctor, then parity. Exit 1 if something is bad."""
    with exit_on_user_error():
        prepare_process()
    if context.invoked_subcommand is None:
        with exit_on_user_error():
            good = run_doctor(device)
            click.echo()
            good &= run_parity(device, ())
        raise SystemExit(not good)


@main.command()
@DEVICE
def doctor(device: str) -> None:
    """Look for what makes training slow or graphs impossible."""
    with exit_on_user_error():
        raise SystemExit(not run_doctor(device))


@main.command()
@DEVICE
@click.option(
    "--precision",
    "precisions",
    multiple=True,
    type=click.Choice(["fp32", "tf32", "bf16", "fp16"]),
    help="[default: fp32, and bf16 where it is fast]",
)
def parity(device: str, precisions: tuple[str, ...]) -> None:
    """Train the same two epochs in every way, and compare what each leaves with the eager step."""
    with exit_on_user_error():
        raise SystemExit(not run_parity(device, precisions))


def run_doctor(device: str) -> bool:
    """Print the findings; whether none is bad."""
    from engine.data.sample import ensure_sample
    from engine.world import start_world
    from tools.checks.doctor import doctor as examine

    good = True
    with start_world(device) as world, world.on_stream():
        for grade, name, text in examine(open_records(ensure_sample()), world):
            click.echo(printable(f"{grade:<5} {name:<20} {text}"))
            good &= grade != "BAD"
    return good


def run_parity(device: str, precisions: tuple[str, ...]) -> bool:
    """Print the table; whether every variant is the same training."""
    from engine.data.sample import ensure_sample
    from engine.world import has_fast_bf16, start_world
    from tools.checks.parity import GROUPS
    from tools.checks.parity import parity as compare

    good = True
    missing = []
    with start_world(device) as world, world.on_stream():
        tried = list(precisions) or ["fp32", *(["bf16"] if has_fast_bf16(world.device) else [])]
        head = "  ".join(f"{group:>10}" for group in GROUPS)
        click.echo(f"{'compared with the eager step':<36} {'':<5} {head}  verdict")
        for verdict in compare(open_records(ensure_sample()), world, tried):
            if verdict.missing:
                missing.append(
                    f"{verdict.variant} ({verdict.precision}): not tried, {verdict.missing}"
                )
                continue
            found = [verdict.difference[group] for group in GROUPS]
            cells = "  ".join(f"{value:>10.1e}" if value else f"{'=':>10}" for value in found)
            text = "within tolerance" if verdict.ok else "DIFFERS"
            if not any(found):
                text = "equal to the bit"
            click.echo(f"{verdict.variant:<36} {verdict.precision:<5} {cells}  {text}")
            good &= verdict.ok
    click.echo("\n".join(missing), nl=bool(missing))
    return good


@main.command()
@click.argument("run", type=PATH)
@click.option(
    "--data", type=PATH, help="The records, if they are no longer where the run found them."
)
def order(run: Path, data: str | None) -> None:
    """Compare each id and image that RUN consumed with order and records. Exit 1 if one differs."""
    with exit_on_user_error():
        checked, faults = check_order(run, data)
        for fault in faults[:20]:
            click.echo(printable(fault))
        click.echo(f"{printable(str(run))}: {checked:,} samples checked, {len(faults)} faults")
    raise SystemExit(1 if faults else 0)


def check_order(run: Path, data: str | None) -> tuple[int, list[str]]:
    """(samples checked, a sentence for each fault).

    Raises:
        UserError: RUN has no ids, or its records are others now.
    """
    from engine.train import idlog
    from engine.train.session import make_order

    report = read_report(run)
    config = load_toml(RunConfig(), run / "config.toml")
    records = open_records(
        data or config.data.path or sample_path(), in_memory=config.data.feed != "stream"
    )
    if records.fingerprint != report.dataset_fingerprint:
        raise UserError(f"{records.path}: are not the records of {run}; name them by --data")
    train = records.split("train")
    faults = []
    checked = 0
    images = (
        train.image_NHW[start : start + ROWS_READ] for start in range(0, len(train), ROWS_READ)
    )
    crc_N = (
        None
        if config.augment.is_on
        else np.array([zlib.crc32(image) for part in images for image in part])
    )
    for epoch in range(report.num_epochs):
        seen = []
        for rank in range(report.num_ranks):
            planned = make_order(config, len(train), rank, report.num_ranks)
            path = idlog.path_of(run, rank, epoch)
            if not path.exists():
                raise UserError(
                    f"{run}: holds no ids of rank {rank}, epoch {epoch}; "
                    f"train it with --set log_ids=true"
                )
            id_SB, crc_SB = idlog.read(path, planned.rank_batch)
            where = f"epoch {epoch}, rank {rank}"
            if len(id_SB) != planned.steps_per_epoch:
                faults.append(f"{where}: {len(id_SB)} steps, want {planned.steps_per_epoch}")
                continue
            wrong_SB = id_SB != planned.ids(epoch, 0, len(id_SB))
            if wrong_SB.any():
                first = int(np.argwhere(wrong_SB)[0][0])
                faults.append(f"{where}: step {first} is the first that has other samples")
                continue
            if crc_N is not None and (wrong_SB := crc_N[id_SB] != crc_SB).any():
                step, row = np.argwhere(wrong_SB)[0]
                what = f"the image is not that of sample {id_SB[step, row]}"
                faults.append(f"{where}: step {step}, row {row}: {what}")
            seen.append(id_SB.reshape(-1))
            checked += id_SB.size
        if seen and len(np.unique(ids := np.concatenate(seen))) < len(ids):
            faults.append(f"epoch {epoch}: a sample came twice")
        if len(train) - sum(map(len, seen)) >= config.global_batch and not faults:
            faults.append(f"epoch {epoch}: more samples were left out than one batch less one")
    return checked, faults


if __name__ == "__main__":
    guard_outputs()
    main()
