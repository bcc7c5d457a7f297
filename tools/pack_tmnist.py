"""tools/pack_tmnist CSV OUT: pack a TMNIST CSV into checksummed record files. The work is engine/pack.py."""

from pathlib import Path
from typing import Any

import click

from engine.errors import exit_on_user_error, printable
from engine.ui import Progress


@click.command(context_settings={"help_option_names": ["-h", "--help"]})
@click.argument("csv", type=click.Path(path_type=Path))
@click.argument("out", type=click.Path(path_type=Path))
@click.option("--split", type=click.Choice(["random", "none"]), default="random", show_default=True,
              help="random: 70/15/15 in each class; none: everything is train.")  # fmt: skip
@click.option("--balance", is_flag=True, help="Cut every class to the smallest one's size.")
@click.option("--seed", type=click.IntRange(0, 2**63 - 1), default=42, show_default=True, help="Draws the split.")
@click.option("--force", is_flag=True, help="Replace OUT if it is a record directory.")
def main(csv: Path, out: Path, split: Any, balance: bool, seed: int, force: bool) -> None:
    """Pack CSV (TMNIST's .csv, .csv.gz, or Kaggle's .zip) into the record directory OUT."""
    with exit_on_user_error():
        from engine.pack import pack

        with Progress(f"packing {csv.name}", total=1.0) as bar:
            report = pack(csv, out, mode=split, balance=balance, seed=seed, force=force,
                          progress=lambda rows, part: bar.update(part, f"{rows:,} rows"))  # fmt: skip
        click.echo(_summary(report.manifest, report.rows_read))
        click.echo(
            f"{printable(str(out))}: {report.out_bytes:,} bytes in {report.seconds:.2f} s, "
            f"fingerprint {report.manifest['fingerprint'][:16]}"
        )


def _summary(manifest: dict[str, Any], rows_read: int) -> str:
    splits = manifest["splits"]
    lines = [f"{rows_read:,} rows read", "class " + "".join(f"{name:>9}" for name in splits)]
    for index, label in enumerate(manifest["classes"]):
        counts = "".join(f"{split['rows_per_class'][index]:>9,}" for split in splits.values())
        lines.append(f"{printable(label):<6}{counts}")
    lines.append("all   " + "".join(f"{split['rows']:>9,}" for split in splits.values()))
    pixels = manifest["train_pixels"]
    lines.append(f"train pixels: mean {pixels['mean']:.3f}, standard deviation {pixels['std']:.3f} (0..255)")
    return "\n".join(lines)


if __name__ == "__main__":
    main()
