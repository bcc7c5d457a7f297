"""tools/pack_tmnist SOURCE... OUT: pack images into checksummed records, by engine/data/pack.py."""

import signal
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import click

from engine.data.foreign import listed
from engine.data.pack import PackOptions, check, pack
from engine.data.record_file import SPLITS
from engine.data.records import GIVEN, verify_records
from engine.data.remote import check_free, local, publish
from engine.durable import writing
from engine.errors import EXIT_USER_ERROR, UserError, exit_on_user_error, printable
from engine.host import cache_notes, prepare_process
from engine.paths import PATH, PATH_OR_URL
from engine.ui import guard_outputs, options_given, progress_bar
from tools.describe import class_table, describe, given_lines
from tools.source_options import source_options

Sources = tuple[Path, ...] | dict[str, tuple[Path, ...]]
"""Files, or files by the split that they are given for."""
ACTIONS = CHECK, VERIFY, DESCRIBE = ("check", "verify", "describe")
"""What is done instead of packing."""
OF_ACTIONS = {"fingerprint": VERIFY, "sheet": DESCRIBE}
"""Options that only one of them has a use for."""
EPILOG = """\b
tools/pack_tmnist 94_character_TMNIST.csv records  pack; .csv.gz, .zip and - (a pipe) work as well
tools/pack_tmnist --check 94_character_TMNIST.csv  list what is wrong with it, pack nothing
tools/pack_tmnist train-images-idx3-ubyte.gz train-labels-idx1-ubyte.gz records
tools/pack_tmnist --train a.csv --test b.csv records   splits that are given
tools/pack_tmnist 94_character_TMNIST.csv s3://bucket/tmnist   pack and publish
tools/pack_tmnist --verify records                 compare every byte with the manifest
tools/pack_tmnist --describe records               classes, typefaces, statistics, sheet of glyphs
"""


@click.command(context_settings={"help_option_names": ["-h", "--help"]}, epilog=EPILOG)
@click.argument("paths", type=PATH_OR_URL, nargs=-1, metavar="[SOURCE]... OUT")
@source_options("first|last|N", "")
@click.option(
    "--train",
    "train",
    type=PATH,
    multiple=True,
    metavar="SOURCE",
    help="Instead of SOURCE...: what to train on; with --test or --val. May be repeated.",
)
@click.option("--test", "test", type=PATH, multiple=True, metavar="SOURCE", help="The test split.")
@click.option(
    "--val",
    "val",
    type=PATH,
    multiple=True,
    metavar="SOURCE",
    help="The val split.  [default: 15 % of --train, drawn as --split says]",
)
@click.option(
    "--split",
    type=click.Choice(["random", "font", "none"]),
    default="random",
    show_default=True,
    help="70/15/15 in each class, or by whole typeface families; none: all is train. With --train "
    "it says how val is drawn.",
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
@click.option("--check", is_flag=True, help="Only read SOURCE; list up to 100 faults.")
@click.option("--verify", is_flag=True, help="SOURCE is a record directory: is it whole?")
@click.option("--describe", is_flag=True, help="SOURCE is a record directory: what is in it?")
@click.option(
    "--fingerprint", default="", help="With --verify: its fingerprint, or the beginning of it."
)
@click.option(
    "--sheet",
    type=PATH,
    help="With --describe: the picture.  [default: SOURCE.png]",
)
def main(
    paths: tuple[Path | str, ...],
    fingerprint: str,
    sheet: Path | None,
    train: tuple[Path, ...],
    test: tuple[Path, ...],
    val: tuple[Path, ...],
    **options: Any,
) -> None:
    """Pack SOURCE (TMNIST's CSV, an MNIST-like one, IDX files, an .npz, a folder of PNGs per class,
    Parquet, Arrow) into the record directory OUT, or the URL of one (s3://...). Several sources of
    one layout become one pack."""
    # Ended by SIGTERM, temporary files go, too.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))
    with exit_on_user_error():
        prepare_process()
        action = _action(options_given())
        options = {name: value for name, value in options.items() if name not in ACTIONS}
        given = {"train": train, "val": val, "test": test}
        if any(given.values()):
            _given(given, paths, action, PackOptions(**options))
            return
        if not paths:
            raise UserError(
                "there is no source; name one, and the record directory to pack it into"
            )
        source = paths[0]
        if action == CHECK:
            _check(_sources(paths), PackOptions(**options))
        elif action and len(paths) > 1:
            raise UserError(f"--{action} takes one path, got {' and '.join(map(str, paths))}")
        elif action == VERIFY:
            records = local(source)
            manifest = verify_records(records, fingerprint)
            click.echo(f"{printable(str(records))}: whole, fingerprint {manifest['fingerprint']}")
        elif action == DESCRIBE:
            place = Path(source).name if isinstance(source, str) else source.resolve()
            click.echo(describe(local(source), sheet or Path(f"{place}.png")))
        elif len(paths) == 1:
            raise UserError(
                f"{source}: name the record directory to pack it into: "
                f"tools/pack_tmnist {source} OUT"
            )
        else:
            _pack(_sources(paths[:-1]), paths[-1], PackOptions(**options))


def _action(given: dict[str, str]) -> str | None:
    """What to do instead of packing, if anything.

    Args:
        given: all options on the command line, by parameter.
    Raises:
        UserError: two are asked for, or an option is given that has no use there.
    """
    actions = [name for name in ACTIONS if name in given]
    if len(actions) > 1:
        raise UserError(f"--{actions[0]}: does not go with --{actions[1]}; give one of them")
    action = actions[0] if actions else None
    for option, wanted in OF_ACTIONS.items():
        if option in given and action != wanted:
            raise UserError(f"--{option}: goes with --{wanted} only; leave it out")
    passed = {"paths", *ACTIONS, *OF_ACTIONS, *SPLITS}
    others = [option for name, option in given.items() if name not in passed]
    if action in (VERIFY, DESCRIBE) and others:
        raise UserError(f"{others[0]}: is of packing, and --{action} packs nothing; leave it out")
    return action


def _sources(paths: tuple[Path | str, ...]) -> tuple[Path, ...]:
    """The paths; UserError if one is a URL."""
    for path in paths:
        if isinstance(path, str):
            raise UserError(f"{path}: a source is no URL, only OUT may be one; download it first")
    return tuple(map(Path, paths))


def _given(
    given: dict[str, tuple[Path, ...]],
    paths: tuple[Path | str, ...],
    action: str | None,
    options: PackOptions,
) -> None:
    """Pack or check splits that are given."""
    if action not in (None, CHECK):
        raise UserError(f"--{action}: takes a record directory; leave --train, --test, --val out")
    if len(paths) != (action is None):
        want = "OUT alone" if action is None else "no SOURCE"
        got = " ".join(map(str, paths)) or "nothing"
        raise UserError(f"--train, --test and --val name the sources: give {want}, not {got}")
    if action:
        _check(given, options)
    else:
        _pack(given, paths[0], options)


def _pack(sources: Sources, out: Path | str, options: PackOptions) -> None:
    start = time.perf_counter()
    name = _paths(sources)[0].name
    with _folder(out, options) as folder:
        with progress_bar(f"packing {printable(name)}", 1.0) as show:
            report = pack(sources, folder, options, lambda rows, part: show(part, f"{rows:,} rows"))
        if isinstance(out, str):
            publish(folder, out)
    manifest = report.manifest
    pixels = manifest["train_pixels"]
    took_s = time.perf_counter() - start
    lines = [
        *(f"read as {printable(found)}" for found in report.found),
        f"{manifest['source_rows']['rows']:,} rows read",
        *class_table(
            manifest["classes"], {n: s["rows_per_class"] for n, s in manifest["splits"].items()}
        ),
        *given_lines(manifest.get(GIVEN, ()), manifest["splits"]),
        f"train pixels: mean {pixels['mean']:.3f}, standard deviation {pixels['std']:.3f} (0..255)",
        *(f"note: {printable(note)}" for note in (*report.warnings, *cache_notes())),
        f"{printable(str(out))}: {took_s:.2f} s, fingerprint {manifest['fingerprint'][:16]}",
    ]
    click.echo("\n".join(lines))


@contextmanager
def _folder(out: Path | str, options: PackOptions) -> Iterator[Path]:
    """Where to pack to: OUT itself, or a temporary folder for a URL that holds no records yet."""
    if isinstance(out, Path):
        yield out
        return
    if options.force:
        raise UserError(f"{out}: is never replaced; leave out --force, and name another URL")
    check_free(out)
    with writing(Path("the temporary folder (TMPDIR)")), tempfile.TemporaryDirectory() as folder:
        yield Path(folder) / "records"


def _paths(sources: Sources) -> list[Path]:
    """All files, those by split one split after the other."""
    if isinstance(sources, tuple):
        return list(sources)
    return [path for paths in sources.values() for path in paths]


def _check(sources: Sources, options: PackOptions) -> None:
    num_rows, faults, warnings = check(sources, options)
    notes = [f"note: {warning}" for warning in warnings]
    names = listed([str(source) for source in _paths(sources)])
    for line in [*faults, *notes, f"{names}: {num_rows:,} rows, {len(faults)} faults"]:
        click.echo(printable(line))
    if faults:
        raise SystemExit(EXIT_USER_ERROR)


if __name__ == "__main__":
    guard_outputs()
    main(prog_name="tools/pack_tmnist", complete_var="_PACK_TMNIST_COMPLETE")
