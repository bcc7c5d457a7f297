"""The report: its figures, its escaping (R19), its bytes, and what a real browser makes of it."""

import base64
import csv
import json
import re
import shutil
import xml.etree.ElementTree as ElementTree
from itertools import islice
from pathlib import Path
from typing import Any

import html5lib
import numpy as np
import pandas as pd
import pytest
from markdown_it import MarkdownIt

from engine.config import RunConfig
from engine.data.records import Records
from engine.errors import UserError, printable
from engine.host import ROOT
from engine.train.answers import answers
from engine.train.session import evaluate, open_session
from engine.typed import typed
from engine.world import World
from tests.browser import Browser
from tests.conftest import Command
from tests.profiles import LABELS, make_profile
from tools.measure.results import Profile
from tools.report.charts import bars, draw
from tools.report.confusion import confusion_of
from tools.report.page import write_report
from tools.report.statistics import median_interval95
from tools.report.tables import cells_frame

HOSTILE = (
    "<script>alert(1)</script>", "<img src=x onerror=alert(1)>", "</svg><script>x</script>",
    "--><b>", "]]><b>", "&lt;b&gt;", "&", "\" onmouseover=\"x", "' onload='x", "`code`", "a|b",
    "\\", "\\|", "|", "||", "<a href=x>", "[x](javascript:alert(1))",
    "![x](http://e.example/x.png)", "<http://e.example>", "www.example.com", "# title",
    "https://e.example/", "- item", "*bold* _it_", "~~no~~", "=1+1", "+1", "-1", "@SUM(A1)",
    "=cmd|' /C calc'!A0", "$x^2$", "$\\frac{", "_hidden", "{{ 7*7 }}", "{% raw %}",
    "../../etc/passwd", "%n%s", "é字🙂", "</title><b>", "<!--", "</style><b>", "fill: #1c2024",
    "url(http://e.example)", "&#x3c;b&#x3e;", "\u202egnp.exe", "\u2066x\u2069", "\x1b[31mred",
    "\x00", "a\nb\r\nc",
)  # fmt: skip
assert len(HOSTILE) >= 40
PLAIN = {"format": 1, "title": "T", "command": "C"}
COMMITTED = sorted((ROOT / "bench_configs" / "results").glob("*/profile.json"))


def build(profile: dict[str, Any], folder: Path) -> Path:
    folder.mkdir(exist_ok=True)
    (folder / "profile.json").write_text(json.dumps(profile))
    return write_report(folder, folder).parent


def named(texts: tuple[str, ...]) -> dict[str, Any]:
    """A profile in which every text that comes from data is one of `texts`."""
    profile = make_profile(names=list(texts), classes=(*LABELS, *texts), num=60)
    profile |= {"title": texts[0], "command": texts[1]}
    cells = profile["cells"]
    for number, cell in enumerate(cells):
        words = {"fp32": texts[8], "bf16": texts[9]}
        cell["axes"] = {
            texts[7] if a == "step.precision" else a: words.get(v, v)
            for a, v in cell["axes"].items()
        }
        for repetition in cell["repetitions"]:
            repetition["notes"] = list(texts)
            repetition["environment"] |= (
                {"allocator": texts[number % 20]} if repetition["environment"] else {}
            )
            repetition["memory_gib_by_owner"] = {text: 0.1 for text in texts[20:27]}
            repetition["stage_ms"] = {text: 0.1 for text in texts[30:37]}
    confusion = cells[0]["repetitions"][0]["confusion"]
    confusion["counts"] += [[94 + n, 95 + n, 3] for n in range(20)]
    confusion["examples"] += [
        confusion["examples"][0] | {"true": 94 + n, "read": 95 + n} for n in range(20)
    ]
    cells[-1]["repetitions"][0]["failed"], cells[-2]["not_measured"] = texts[2], texts[3]
    cells[-2]["published"] |= {"gpu": texts[4], "source": texts[5]}
    return profile


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build(
        named(tuple(f"text {n}" for n in range(len(HOSTILE)))), tmp_path_factory.mktemp("plain")
    )


@pytest.fixture(scope="module")
def hostile(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build(named(HOSTILE), tmp_path_factory.mktemp("hostile"))


def elements(page: Path) -> list[Any]:
    """Every element of a page, as an HTML5 parser that forgives nothing reads it."""
    return list(
        html5lib.HTMLParser(strict=True, namespaceHTMLElements=False).parse(page.read_text()).iter()
    )


def test_data_adds_no_element_and_no_attribute_to_the_page(plain: Path, hostile: Path) -> None:
    ours, theirs = elements(plain / "report.html"), elements(hostile / "report.html")
    assert [(e.tag, set(e.attrib)) for e in theirs] == [
        (e.tag, set(e.attrib)) for e in ours
    ] and len(ours) > 3000
    (policy,) = (
        e.get("content") for e in theirs if e.get("http-equiv") == "Content-Security-Policy"
    )
    assert policy == "default-src 'none'; style-src 'unsafe-inline'; img-src data:"
    assert {e.tag for e in ours}.isdisjoint({"script", "iframe", "link", "object", "form", "base"})
    assert all(e.get("href", "#").startswith("#") for e in theirs)
    assert all(e.get("src", "data:image/png;").startswith("data:image/png;") for e in theirs)
    assert {printable(text) for text in HOSTILE} <= {e.text for e in theirs}, (
        "what the data says is shown as it is"
    )


def test_data_adds_nothing_to_pictures(plain: Path, hostile: Path) -> None:
    names = [
        sorted(path.name for path in (folder / "figures").iterdir()) for folder in (plain, hostile)
    ]
    assert names[0] == names[1] and len(names[0]) > 20
    for name in names[0]:
        if name.endswith(".svg"):
            counts = [
                sum(1 for _ in ElementTree.parse(f / "figures" / name).iter())
                for f in (plain, hostile)
            ]
            assert counts[0] == counts[1], name
    drawn = (hostile / "figures" / "ladder.svg").read_text()
    assert "&lt;script&gt;" in drawn and "--&gt;&lt;b&gt;" in drawn
    legend = (hostile / "figures" / "stages.svg").read_text() + (
        hostile / "figures" / "classes.svg"
    ).read_text()
    assert "> _hidden<" in legend and "> $x^2$<" in legend


def test_a_learning_curve_is_drawn_whole(plain: Path) -> None:
    paths = [
        e.get("d", "")
        for e in ElementTree.parse(plain / "figures" / "learning.svg").iter()
        if e.get("clip-path")
    ]
    assert sum(len(re.findall("[ML]", path)) == 12 for path in paths) == 7, "7 rungs of 12 epochs"


def test_a_label_that_reads_like_a_colour_is_left_alone() -> None:
    series = pd.Series([1.0, 2.0])
    picture = draw("x", lambda: bars(["fill: #1c2024", '<g id="a_1" a'], series, ["a", "b"], "x"))
    assert ">fill: #1c2024<" in picture.inline("x") and '>&lt;g id="a_1" a<' in picture.inline("x")
    assert "fill: var(--ink)" in picture.inline("x") and "#1c2024" not in picture.inline(
        "x"
    ).replace(">fill: #1c2024<", "")


def test_data_adds_no_formula_and_no_column_to_csv(plain: Path, hostile: Path) -> None:
    for path in (hostile / "figures").glob("*.csv"):
        rows = list(csv.reader(path.read_text().splitlines()))
        assert len(rows) == len((plain / "figures" / path.name).read_text().splitlines()), path.name
        assert len({len(row) for row in rows}) == 1, path.name
        cells = [
            cell
            for row in rows
            for cell in row
            if not cell.replace(".", "").replace("-", "").replace("e", "").isdigit()
        ]
        assert not [cell for cell in cells if cell.startswith(("=", "+", "-", "@"))], path.name
    assert "'=1+1" in (hostile / "figures" / "cells.csv").read_text()


def test_data_adds_nothing_to_markdown(plain: Path, hostile: Path) -> None:
    read = MarkdownIt("commonmark").enable(["table", "strikethrough"]).parse
    ours, theirs = (read((folder / "report.md").read_text()) for folder in (plain, hostile))
    assert [token.type for token in theirs] == [token.type for token in ours]
    children = {child.type for token in theirs for child in token.children or []}
    assert children <= {"text", "image", "text_special"}, children
    shown = {
        "".join(c.content for c in token.children or [])
        for token in theirs
        if token.type == "inline"
    }
    assert {printable(text).strip() for text in HOSTILE} <= shown


def test_the_same_profile_gives_the_same_bytes(
    tmp_path: Path, plain: Path, command: Command
) -> None:
    (tmp_path / "matplotlibrc").write_text(
        "svg.fonttype: path\naxes.labelsize: 20\nxtick.direction: in\n"
    )
    done = command("python", "-m", "tools.profile", "report", plain, "--out", tmp_path / "out",
                   PYTHONHASHSEED="7", MATPLOTLIBRC=str(tmp_path))  # fmt: skip
    assert done.returncode == 0, done.stderr
    again = [path.relative_to(tmp_path / "out") for path in (tmp_path / "out").rglob("*.*")]
    assert len(again) > 20
    for path in again:
        assert (tmp_path / "out" / path).read_bytes() == (plain / path).read_bytes(), path


def test_committed_reports_are_what_their_profiles_say(tmp_path: Path) -> None:
    assert COMMITTED, "no bench_configs/results/*/profile.json is committed"
    for path in COMMITTED:
        made = write_report(path.parent, tmp_path / path.parent.name)
        for file in [path.parent / "report.html", *(path.parent / "figures").iterdir()]:
            drawn = made.parent / file.relative_to(path.parent)
            assert drawn.read_bytes() == file.read_bytes(), (
                f"{file}: run `tools/profile report {path.parent}`"
            )


def test_sixty_cells_stay_small(hostile: Path) -> None:
    assert (hostile / "report.html").stat().st_size < 5e6


def test_sections_stand_only_where_there_is_data(tmp_path: Path) -> None:
    profile = make_profile(num=4)
    cell = profile["cells"][1]
    for name in (
        "roofline_fraction",
        "memory_gib_by_owner",
        "stage_ms",
        "time_to_target_s",
        "test_accuracy_fraction",
    ):
        cell["repetitions"][0][name] = None
    cell |= {"repetitions": [cell["repetitions"][0] | {"epochs": []}], "ladder": False}
    build(profile | {"cells": [cell]}, tmp_path)
    assert [path.name for path in (tmp_path / "figures").iterdir()] == ["cells.csv"]
    sections = re.findall("^## (.*)", (tmp_path / "report.md").read_text(), re.MULTILINE)
    assert sections == ["All cells", "Circumstances"]
    (tmp_path / "gpu_kernels.json").write_text(
        json.dumps({"title": "K", "rows": [{"name": "gather", "value": 1.0}]})
    )
    write_report(tmp_path, tmp_path)
    assert "| gather | 1 |" in (tmp_path / "report.md").read_text()


def test_only_like_is_compared_with_like() -> None:
    cells = [cell for cell in make_profile(num=60)["cells"] if not cell["ladder"]][
        :8
    ]  # 1, 2, 4, 8 ranks, twice
    for number, cell in enumerate(cells):
        for repetition in cell["repetitions"]:
            repetition["samples_per_s"] = 100.0 * (
                1.5 if cell["axes"]["ranks"] == 2 else 3.0 if number % 4 else 1.0
            )
    for repetition in cells[4]["repetitions"]:
        repetition["environment"] = repetition["environment"] | {"gpu_name": "another"}
    frame = cells_frame(typed(Profile, PLAIN | {"cells": cells}, ""))
    assert list(frame["speedup"][:4]) == [1.0, 1.5, 3.0, 3.0] and list(frame["efficiency"][:4]) == [
        1.0,
        0.75,
        0.75,
        0.375,
    ]
    assert frame["speedup"][4] == 1.0 and frame["speedup"][5:].isna().all(), (
        "another GPU's cell is no measure"
    )
    for cell in cells[:2]:
        cell["ladder"] = True
    assert cells_frame(typed(Profile, PLAIN | {"cells": cells}, ""))["gain"][1] == 1.5


def test_a_gain_is_over_the_base_that_a_rung_names() -> None:
    cells = make_profile(num=6)["cells"][:4]
    for cell, rung, base, rate in zip(cells, "abcd", ("", "", "a", ""), (1, 2, 4, 6), strict=True):
        cell |= {"name": rung, "rung": rung, "base": base}
        for repetition in cell["repetitions"]:
            repetition["samples_per_s"] = float(rate)
    frame = cells_frame(typed(Profile, PLAIN | {"cells": cells}, ""))
    assert frame["base"].fillna("").tolist() == ["", "a", "a", "c"]
    assert frame["gain"].fillna(0).tolist() == [0, 2, 4, 1.5]
    cells[0]["axes"] = cells[0]["axes"] | {"batch": 9}
    frame = cells_frame(typed(Profile, PLAIN | {"cells": cells}, ""))
    assert frame["gain"].isna().tolist() == [True, True, True, False], "no base at this batch"


def test_the_interval_is_the_medians() -> None:
    values = np.random.default_rng(1).normal(100, 10, 200)
    low, high = median_interval95(values)
    assert low < np.median(values) < high and 2 < high - low < 6, (
        "about 2 x 1.96 x 1.25 x 10 / sqrt(200)"
    )
    assert np.isnan(median_interval95(values[:2])).all() and median_interval95(values) == (
        low,
        high,
    )


def test_confusion_counts_what_evaluation_counts(small: Records, world: World) -> None:
    session, test = open_session(RunConfig(global_batch=16), small, world), small.split("test")
    for _ in islice(
        session.step.train_epoch(session.feed, 0), 3
    ):  # so few that it errs in many ways
        pass
    confusion = confusion_of(session)
    right = sum(count for true, read, count in confusion.counts if true == read)
    assert right / len(test) == evaluate(session, "test")[1] and confusion.classes == list(
        small.classes
    )
    for label in range(len(small.classes)):
        assert (
            sum(count for true, _, count in confusion.counts if true == label)
            == (test.label_N == label).sum()
        )
    answer_N = answers(session.step.objective.logits, test.image_NHW, world.device)
    for example in confusion.examples:
        image = np.frombuffer(base64.b64decode(example.pixels), np.uint8).reshape(28, 28)
        (row,) = np.flatnonzero((test.image_NHW == image).all((1, 2)))
        assert (test.label_N[row], answer_N[row]) == (example.true, example.read)
    wrong = {(true, read) for true, read, _ in confusion.counts if true != read}
    assert {(e.true, e.read) for e in confusion.examples} == wrong and len(wrong) > 1
    session.close()


def test_what_is_no_profile_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"profile.json: cannot be read.*name a folder"):
        write_report(tmp_path, tmp_path)
    good = json.dumps(make_profile(num=3))
    counts, huge = '"counts": [', f'"counts": [[0, 0, {10**30}], '
    changes = [
        ('"format": 1', '"format": 2'), ('"step_ms"', '"step_ms": NaN, "x"'), ('"axes"', '"axe"'),
        ('"pixels": "', '"pixels": "A'), (counts, counts + "[999, 0, 1], "), (counts, huge),
        ('"stage_ms": {', '"stage_ms": [1], "x": {'),
        ('"samples_per_s": ', '"samples_per_s": 0, "x": '),
        ('"samples_per_s": ', '"samples_per_s": true, "x": '),
        ('"step_ms": ', '"step_ms": 1e300, "x": '),
        ('"environment": {', '"environment": null, "x": {'), ('"ranks": 1', '"ranks": "1"'),
        ('"ranks": 1', '"ranks": 1, "name": "n"'), ('"id": "c001"', '"id": "c000"'),
        ('"settings": {', '"settings": {"x": [[]], '), ('"notes": []', '"notes": [1]'),
    ]  # fmt: skip
    damaged = [good.replace(old, new) for old, new in changes]
    assert good not in damaged
    for text in [*damaged, "[]", "1", good[:999], '{"format": 1, "cells": []}']:
        (tmp_path / "profile.json").write_text(text)
        with pytest.raises(UserError, match="make it anew"):
            write_report(tmp_path, tmp_path / "out")
        assert not (tmp_path / "out").exists(), "nothing half-written"


@pytest.mark.parametrize("dark", [False, True], ids=["light", "dark"])
@pytest.mark.parametrize("width", [390, 1200])
@pytest.mark.parametrize("kind", ["plain", "hostile"])
def test_a_browser_shows_the_page(
    browser: Browser,
    kind: str,
    width: int,
    dark: bool,
    request: pytest.FixtureRequest,
    tmp_path: Path,
) -> None:
    shutil.copy(
        request.getfixturevalue(kind) / "report.html", tmp_path
    )  # alone: it needs no other file
    browser.open((tmp_path / "report.html").as_uri(), width, dark)
    assert browser.value("document.documentElement.scrollWidth") <= width
    browser.value("document.querySelectorAll('details').forEach(d => d.open = true)")
    assert browser.value("document.documentElement.scrollWidth") <= width, (
        "wide tables scroll in their own box"
    )
    assert browser.value("document.querySelectorAll('svg').length") > 5
    assert browser.value("[...document.images].every(i => i.complete && i.naturalWidth == 28)")
    paper = browser.value("getComputedStyle(document.body).backgroundColor")
    assert paper == ("rgb(20, 23, 26)" if dark else "rgb(254, 254, 254)")
    names = [event["method"] for event in browser.events]
    assert not {
        "Log.entryAdded",
        "Audits.issueAdded",
        "Runtime.exceptionThrown",
        "Runtime.consoleAPICalled",
    } & set(names)
    wanted = [
        e["params"]["request"]["url"]
        for e in browser.events
        if e["method"] == "Network.requestWillBeSent"
    ]
    assert [url for url in wanted if not url.startswith("data:image/png;")] == [
        (tmp_path / "report.html").as_uri()
    ]


def test_the_browser_would_tell_of_a_violation(
    browser: Browser, tmp_path: Path, plain: Path
) -> None:
    bad = (
        "<script>alert(1)</script><img src=http://127.0.0.1:9/x.png>"
        "<div style='width: 2000px'>x</div></body>"
    )
    page = tmp_path / "bad.html"
    page.write_text((plain / "report.html").read_text().replace("</body>", bad))
    browser.open(page.as_uri(), 390, False)
    assert browser.value("document.documentElement.scrollWidth") > 390
    assert {"Log.entryAdded", "Audits.issueAdded"} & {event["method"] for event in browser.events}
