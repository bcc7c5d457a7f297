"""tools/verify: is this machine fit (doctor), is fast training the same (parity)? Bare: both.

`tools/verify doctor --nodes`: can several nodes meet, and are they alike? `tools/verify order RUN`:
did a run see the samples that it should have?
"""

from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING

import click

from engine.config import NETWORK_NAMES
from engine.data.records import open_records
from engine.data.remote import RECORDS
from engine.errors import UserError, exit_on_user_error, printable
from engine.host import end_rank, env_local_rank, prepare_process
from engine.paths import PATH
from engine.ui import guard_outputs

if TYPE_CHECKING:  # it imports torch
    from tools.checks.doctor import Finding

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
            good &= run_parity(device, (), "fast")
        raise SystemExit(not good)


@main.command()
@DEVICE
@click.option(
    "--nodes",
    is_flag=True,
    help="Look at the network instead: can several nodes meet? Under torchrun on each: are they "
    "alike, and how fast do they talk?",
)
@click.option(
    "--rendezvous",
    default="",
    metavar="HOST:PORT",
    help="With --nodes: torchrun's --rdzv-endpoint; is its node found?",
)
@click.option(
    "--data",
    type=RECORDS,
    help="With --nodes: the records that all should have.  [default: the packaged sample]",
)
def doctor(device: str, nodes: bool, rendezvous: str, data: Path | None) -> None:
    """Look for what makes training slow or graphs impossible."""
    with exit_on_user_error(end_rank):
        if not nodes and (rendezvous or data):
            raise UserError("--rendezvous and --data: are of doctor --nodes; give --nodes, too")
        good = run_node_doctor(device, rendezvous, data) if nodes else run_doctor(device)
    end_rank(int(not good))


@main.command()
@DEVICE
@click.option(
    "--precision",
    "precisions",
    multiple=True,
    type=click.Choice(["fp32", "tf32", "bf16", "fp16", "fp8"]),
    help="[default: fp32, and bf16 where it is fast]",
)
@click.option("--model", type=click.Choice(NETWORK_NAMES), default="fast", show_default=True)
def parity(device: str, precisions: tuple[str, ...], model: str) -> None:
    """Train the same two epochs in every way, and compare what each leaves with the eager step."""
    with exit_on_user_error():
        raise SystemExit(not run_parity(device, precisions, model))


def run_doctor(device: str) -> bool:
    """Print the findings; whether none is bad."""
    from engine.data.sample import ensure_sample
    from engine.world import start_world
    from tools.checks.doctor import doctor as examine

    with start_world(device) as world, world.on_stream():
        return show_findings(examine(open_records(ensure_sample()), world))


def run_node_doctor(device: str, rendezvous: str, data: Path | None) -> bool:
    """Print the findings, once per node; whether none is bad on any of them."""
    from engine.data.sample import ensure_sample
    from engine.ranks import join_ranks

    ranks = join_ranks()  # before torch, whose native parts it quiets
    from engine.world import start_world
    from tools.checks.nodes import alone, together

    path = ranks.agree(lambda: data or ensure_sample())
    records = ranks.agree(lambda: open_records(path, in_memory=False))
    good = ranks.agree(lambda: show_findings(alone(rendezvous, device)))
    if ranks.size == 1:
        click.echo("The rest takes all nodes: start this by torchrun on each of them.")
        return good
    with start_world(device, ranks) as world:
        good &= show_findings(together(ranks, world, records.fingerprint))
        return world.most([float(not good)])[0] == 0.0


def show_findings(findings: "Iterable[Finding]") -> bool:
    """Print them, on one rank of each node; whether none is bad."""
    good = True
    for grade, name, text in findings:
        if env_local_rank() == 0:
            click.echo(printable(f"{grade:<5} {name:<20} {text}"))
        good &= grade != "BAD"
    return good


def run_parity(device: str, precisions: tuple[str, ...], model: str) -> bool:
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
        for verdict in compare(open_records(ensure_sample()), world, tried, model):
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
    "--data", type=RECORDS, help="The records, if they are no longer where the run found them."
)
def order(run: Path, data: str | None) -> None:
    """Compare each id and image that RUN consumed with order and records. Exit 1 if one differs."""
    from tools.checks.order import check_order

    with exit_on_user_error():
        checked, faults = check_order(run, data)
        for fault in faults[:20]:
            click.echo(printable(fault))
        click.echo(f"{printable(str(run))}: {checked:,} samples checked, {len(faults)} faults")
    raise SystemExit(1 if faults else 0)


if __name__ == "__main__":
    guard_outputs()
    main()
