"""tools/pack_tmnist SOURCE... OUT: pack images into checksummed records, by engine/data/pack.py."""

import signal
import sys
import time
from pathlib import Path
from typing import Any

import click

from engine.data.foreign import listed
from engine.data.layouts import LAYOUTS
from engine.data.pack import PackOptions, check, pack
from engine.data.records import verify_records
from engine.errors import EXIT_USER_ERROR, UserError, exit_on_user_error, printable
from engine.host import cache_notes, prepare_process
from engine.paths import PATH
from engine.ui import guard_outputs, progress_bar
from tools.describe import class_table, describe

EPILOG = """\b
tools/pack_tmnist 94_character_TMNIST.csv records  pack; .csv.gz, .zip and - (a pipe) work as well
tools/pack_tmnist --check 94_character_TMNIST.csv  list what is wrong with it, pack nothing
tools/pack_tmnist train-images-idx3-ubyte.gz train-labels-idx1-ubyte.gz records
tools/pack_tmnist --verify records                 compare every byte with the manifest
tools/pack_tmnist --describe records               classes, typefaces, statistics, sheet of glyphs
"""


@click.command(context_settings={"help_option_names": ["-h", "--help"]}, epilog=EPILOG)
@click.argument("paths", type=PATH, nargs=-1, required=True, metavar="SOURCE... OUT")
@click.option(
    "--layout",
    type=click.Choice(LAYOUTS),
    default="auto",
    show_default=True,
    help="What SOURCE is; auto: what its bytes say, and it is printed.",
)
@click.option(
    "--images",
    default="",
    metavar="NAME",
    help="The array of an .npz or column of Parquet or Arrow that holds images.  "
    "[default: the only one that may]",
)
@click.option("--labels", default="", metavar="NAME", help="Likewise of their labels.")
@click.option(
    "--label-column",
    default="first",
    show_default=True,
    metavar="first|last|N",
    help="Where a CSV's labels stand; the other columns are pixels.",
)
@click.option("--no-header", is_flag=True, help="A CSV's first line is a row.")
@click.option(
    "--index-column", is_flag=True, help="A CSV's first column is row numbers: leave it out."
)
@click.option(
    "--split",
    type=click.Choice(["random", "font", "none"]),
    default="random",
    show_default=True,
    help="70/15/15 in each class, or by whole typeface families; none: all is train.",
)
@click.option("--balance", is_flag=True, help="Cut every class to the smallest one's size.")
@click.option(
    "--seed",
    type=click.IntRange(0, 2**63 - 1),
    default=42,
    show_default=True,
    help="Draws the split.",
)
@click.option(
    "--classes", type=click.IntRange(1, 256), help="Refuse another number of labels than this."
)
@click.option("--force", is_flag=True, help="Replace OUT if it is a record directory.")
@click.option(
    "--workers", type=click.IntRange(1, 64), help="Threads.  [default: the cores, at most 8]"
)
@click.option(
    "--check", "action", flag_value="check", help="Only read SOURCE; list up to 100 faults."
)
@click.option(
    "--verify", "action", flag_value="verify", help="SOURCE is a record directory: is it whole?"
)
@click.option(
    "--describe",
    "action",
    flag_value="describe",
    help="SOURCE is a record directory: what is in it?",
)
@click.option(
    "--fingerprint", default="", help="With --verify: its fingerprint, or the beginning of it."
)
@click.option(
    "--sheet",
    type=PATH,
    help="With --describe: the picture.  [default: SOURCE.png]",
)
def main(
    paths: tuple[Path, ...],
    action: str | None,
    fingerprint: str,
    sheet: Path | None,
    **options: Any,
) -> None:
    """Pack SOURCE (TMNIST's CSV, an MNIST-like one, IDX files, an .npz, a folder of PNGs per class,
    Parquet, Arrow) into the record directory OUT. Several sources of one layout become one pack."""
    # Ended by SIGTERM, temporary files go, too.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))
    with exit_on_user_error():
        prepare_process()
        source = paths[0]
        if action == "check":
            _check(paths, PackOptions(**options))
        elif action and len(paths) > 1:
            raise UserError(f"--{action} takes one path, got {' and '.join(map(str, paths))}")
        elif action == "verify":
            manifest = verify_records(source, fingerprint)
            click.echo(f"{printable(str(source))}: whole, fingerprint {manifest['fingerprint']}")
        elif action == "describe":
            click.echo(describe(source, sheet or Path(f"{source.resolve()}.png")))
        elif len(paths) == 1:
            raise UserError(
                f"{source}: name the record directory to pack it into: "
                f"tools/pack_tmnist {source} OUT"
            )
        else:
            _pack(paths[:-1], paths[-1], PackOptions(**options))


def _pack(sources: tuple[Path, ...], out: Path, options: PackOptions) -> None:
    start = time.perf_counter()
    with progress_bar(f"packing {printable(sources[0].name)}", 1.0) as show:
        report = pack(sources, out, options, lambda rows, part: show(part, f"{rows:,} rows"))
    manifest = report.manifest
    pixels = manifest["train_pixels"]
    took_s = time.perf_counter() - start
    lines = [
        *(f"read as {printable(found)}" for found in report.found),
        f"{manifest['source_rows']['rows']:,} rows read",
        *class_table(
            manifest["classes"], {n: s["rows_per_class"] for n, s in manifest["splits"].items()}
        ),
        f"train pixels: mean {pixels['mean']:.3f}, standard deviation {pixels['std']:.3f} (0..255)",
        *(f"note: {printable(note)}" for note in (*report.warnings, *cache_notes())),
        f"{printable(str(out))}: {took_s:.2f} s, fingerprint {manifest['fingerprint'][:16]}",
    ]
    click.echo("\n".join(lines))


def _check(sources: tuple[Path, ...], options: PackOptions) -> None:
    num_rows, faults, warnings = check(sources, options)
    notes = [f"note: {warning}" for warning in warnings]
    names = listed([str(source) for source in sources])
    for line in [*faults, *notes, f"{names}: {num_rows:,} rows, {len(faults)} faults"]:
        click.echo(printable(line))
    if faults:
        raise SystemExit(EXIT_USER_ERROR)


if __name__ == "__main__":
    guard_outputs()
    main(prog_name="tools/pack_tmnist", complete_var="_PACK_TMNIST_COMPLETE")
