"""The reliability suite works: each row at a few tries, its oracle, and its command."""

import json
from pathlib import Path
from typing import Any

import pytest

from tests.conftest import Command
from tests.reliability.common import Tally
from tests.reliability.oracle import judge
from tests.reliability.rows import ROWS, run_rows


@pytest.fixture(scope="module")
def results() -> list[dict[str, Any]]:
    return run_rows("tiny", set())


@pytest.mark.slow
@pytest.mark.parametrize(
    "number", range(len(ROWS)), ids=[f"{row[0]}-{row[2].__name__}" for row in ROWS]
)
def test_a_row_holds_at_a_few_tries(number: int, results: list[dict[str, Any]]) -> None:
    assert results[number]["failed"] == 0, results[number]["notes"]
    assert results[number]["tried"] or results[number]["notes"][0].startswith("skipped")


@pytest.mark.parametrize(
    ("text", "row"),
    [
        ("names,labels,1\nF,a,0\n", None),
        ('label,pixel0\r\n"""",255.00\r\n\r\n', None),
        ("names,labels,1\nF,a,0\nF,a,256\n", 2),
        ("names,labels,1\nF,a,-0.0\n", 1),
        ('names,labels,1\nF,"a\nb",0\n', 1),
        ('names,labels,1\nF,a,0\nF,a"b,0\n', 2),
        ("names,labels,1\nF,a,0\n\n\n", 2),
        ("names,labels,1\nF,\u00e9,0\nF,e\u0301,0\n", 2),
        ("names,labels,1\nF,a,0\rF,a,0\n", 1),
        ("names,labels,2\nF,a,0\n", 0),
        ("names,labels,1\n\n", 0),
    ],
)
def test_the_oracle_knows_the_language(text: str, row: int | None) -> None:
    assert judge(text.encode())[0] == row


def test_a_failure_is_counted_and_noted(tmp_path: Path) -> None:
    tally = Tally("ci", tmp_path, tmp_path)
    assert tally.check(True, "right") and not tally.check(False, "wrong")
    assert (tally.tried, tally.failed, tally.notes) == (2, 1, ["FAILED wrong"])


def test_the_command_writes_its_table(command: Command, tmp_path: Path) -> None:
    suite = ("python", "-m", "tests.reliability")
    done = command(*suite, "--tiny", "--only=R2", "--json", tmp_path / "r.json")
    report = json.loads((tmp_path / "r.json").read_text())
    assert [row["row"] for row in report["rows"]] == ["R2"] and report["environment"]["python"]
    assert done.returncode == (1 if report["rows"][0]["failed"] else 0), done.stdout
    assert command(*suite, "--only", "R99").returncode == 2
