"""What the pages share: colours, light and dark, and the templates that take them.

Whatever comes from data is escaped by Jinja.
"""

from pathlib import Path
from typing import Any

import jinja2

FOLDER = Path(__file__).parent
INK, MUTED, RULE, PAPER = "#1c2024", "#666d74", "#dfe2e6", "#fefefe"
SERIES = ("#1f6fb4", "#c8500a", "#00805d", "#9a4fa0", "#8a6a00", "#2b93b8", "#c2457a", "#5f6671")
"""With MARKERS told apart by any colour vision; 3:1 against the paper, as NIGHT's against its."""
PALETTE = {INK: "ink", MUTED: "muted", RULE: "rule", PAPER: "paper"} | {
    c: f"s{n}" for n, c in enumerate(SERIES)
}
NIGHT = {
    "ink": "#e6e9ec", "muted": "#98a1ab", "rule": "#30363c", "paper": "#14171a",
    "s0": "#63b0f0", "s1": "#f58a4b", "s2": "#3cc79c", "s3": "#cf8fd6", "s4": "#d3b04a",
    "s5": "#6fcbe8", "s6": "#f08ab2", "s7": "#a6adb6",
}  # fmt: skip


def render(template: str, **facts: Any) -> str:
    """A page of this folder."""
    pages = jinja2.Environment(
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        loader=jinja2.FileSystemLoader(FOLDER),
    )
    return pages.get_template(template).render(palette=PALETTE, night=NIGHT, **facts)
