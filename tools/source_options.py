"""The options that say how a source of images is read, for every command that takes sources."""

from collections.abc import Callable
from typing import Any

import click

from engine.data.layouts import LAYOUTS

Decorator = Callable[[Callable[..., Any]], Callable[..., Any]]


def source_options(columns: str, hint: str) -> Decorator:
    """Options named as the fields of engine.data.given.SourceOptions.

    Args:
        columns: what --label-column takes.
        hint: behind its help.
    """
    options = (
        click.option(
            "--layout",
            type=click.Choice(LAYOUTS),
            default="auto",
            show_default=True,
            help="What the sources are; auto: what their bytes say; what was found is printed.",
        ),
        click.option(
            "--images",
            default="",
            metavar="NAME",
            help="The array of an .npz or column of Parquet or Arrow that holds images.  "
            "[default: the only one that may]",
        ),
        click.option("--labels", default="", metavar="NAME", help="Likewise of their labels."),
        click.option(
            "--label-column",
            default="first",
            show_default=True,
            metavar=columns,
            help=f"Where a CSV's labels stand; the other columns are pixels{hint}.",
        ),
        click.option("--no-header", is_flag=True, help="A CSV's first line is a row."),
        click.option(
            "--index-column",
            is_flag=True,
            help="A CSV's first column is row numbers: leave it out.",
        ),
        click.option(
            "--workers",
            type=click.IntRange(1, 64),
            help="Threads, or processes, that read.  [default: the cores, at most 8]",
        ),
    )

    def decorate(command: Callable[..., Any]) -> Callable[..., Any]:
        for option in reversed(options):
            command = option(command)
        return command

    return decorate
