"""The page of a run: what the run leaves for it, who is answered, and what a real browser shows."""

import http.client
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from itertools import islice
from pathlib import Path
from typing import Any
from urllib.parse import quote, urlsplit

import numpy as np
import pytest
from PIL import Image
from safetensors.numpy import load_file

from engine import serve
from engine.config import RunConfig
from engine.data.records import Records
from engine.serve import Page
from engine.train.answers import answers
from engine.train.folder import Position
from engine.train.live import GLYPHS, LIVE, Line, Live, parse_line
from engine.train.session import evaluate, open_session
from engine.world import World
from tests.browser import Browser
from tests.conftest import CLASSES, Command, assert_refused, child
from tools.report.curves import read_run, runs_in, stamp_of

SHORT = ("--epochs", 3, "--batch-size", 32, "--device", "cpu", "--kernels", "off")
HOSTILE = "<img src=x onerror=alert(1)>"
HANGS_S = 20


def lines_of(run: Path) -> list[Line]:
    found = [parse_line(text) for text in (run / LIVE).read_bytes().splitlines()]
    assert all(found)
    return [line for line in found if line]


def metrics_of(run: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


@pytest.fixture(scope="module")
def run(tiny_dir: Path, command: Command, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run with a page that nobody looked at."""
    out = tmp_path_factory.mktemp("runs") / HOSTILE
    words = ("--serve", "--evaluate-every", 5, "--data", tiny_dir, "--out", out)
    done = command("python", "-m", "engine.run", *words, *SHORT)
    assert done.returncode == 0 and not done.stderr, done.stderr
    assert done.stdout.count("page: http://127.0.0.1:") == 1
    return out


def test_a_run_leaves_what_its_page_shows(run: Path, tiny: Records) -> None:
    lines, metrics = lines_of(run), metrics_of(run)
    trained = [line for line in lines if line.reading]
    assert sum(line.reading.num_steps for line in trained if line.reading) == 21
    losses = [loss for line in trained if line.reading for loss in line.reading.losses]
    assert np.mean(losses[:7]) == pytest.approx(metrics[0]["train_loss"], rel=1e-6)
    seen = [(line.step, line.evaluation) for line in lines if line.evaluation]
    assert [step for step, _ in seen] == [5, 7, 10, 14, 15, 20, 21, 21]
    assert [it.split for _, it in seen] == ["val"] * 7 + ["test"]
    for _, it in seen:
        num = len(tiny.split(it.split))
        assert sum(times for _, _, times in it.pairs) == round((1 - it.accuracy_fraction) * num)
        assert all(true != read for true, read, _ in it.pairs)
    last_val = seen[-2][1]
    assert last_val.accuracy_fraction == metrics[-1]["val_accuracy_fraction"]
    picture = np.asarray(Image.open(run / GLYPHS))
    assert picture.shape == (12, 12 * len(CLASSES))
    train = tiny.split("train")
    for label in range(len(CLASSES)):
        glyph = 255 - picture[:, 12 * label : 12 * (label + 1)]
        assert (train.image_NHW[train.label_N == label] == glyph).all((1, 2)).any()


def test_a_page_leaves_the_training_as_it_is(
    run: Path, tiny_dir: Path, command: Command, tmp_path: Path
) -> None:
    words = ("--data", tiny_dir, "--out", tmp_path / "plain", *SHORT)
    assert command("python", "-m", "engine.run", *words).returncode == 0
    assert not (tmp_path / "plain" / LIVE).exists()
    plain, shown = (load_file(it / "model.safetensors") for it in (tmp_path / "plain", run))
    assert all(np.array_equal(plain[name], shown[name]) for name in plain)


def test_the_confusion_is_what_the_network_answers(small: Records, world: World) -> None:
    session = open_session(RunConfig(global_batch=16, serve=0), small, world)
    val = small.split("val")
    for _ in islice(session.step.train_epoch(session.feed, 0), 3):  # so few that it errs
        pass
    evaluate(session, "val")
    count_CC = session.step.read_confusion()
    answer_N = answers(session.step.objective.logits, val.image_NHW, world.device)
    wanted_CC = np.zeros_like(count_CC)
    np.add.at(wanted_CC, (val.label_N, answer_N), 1)
    assert np.array_equal(count_CC, wanted_CC) and len(set(answer_N)) > 1
    assert not session.step.read_confusion().any()
    session.close()


def test_a_run_that_goes_on_forgets_what_came_after(
    run: Path, tiny: Records, tmp_path: Path
) -> None:
    shutil.copy(run / LIVE, tmp_path)
    with open(tmp_path / LIVE, "a") as file:
        file.write('{"step": 1')  # cut short
    live = Live(tmp_path, 7, print)
    here, count_CC = Position(epoch=2, num_steps=14), np.zeros((8, 8), int)
    live.start(here, tiny.split("train"), len(tiny.classes))
    live.evaluated(here, "val", (float("nan"), 0.0), count_CC)  # the trainer refuses it
    assert [line.step for line in lines_of(tmp_path)] == [5, 5, 7, 7, 10, 10, 14, 14]


def test_what_is_no_line_is_left_out(run: Path, tmp_path: Path) -> None:
    good = (run / "metrics.jsonl").read_bytes()
    bad = (b"", b"{", b"[]", b"null", b"\xff", b'{"epoch": 1}', b'{"epoch": 1, "epoch": 2}',
           good.splitlines()[0].replace(b'"epoch": 1', b'"epoch": NaN'),
           good.splitlines()[0].replace(b'"epoch": 1', b'"epoch": 1e300'), b"[" * 9000)  # fmt: skip
    (tmp_path / "metrics.jsonl").write_bytes(good + b"\n".join(bad))
    (tmp_path / LIVE).write_bytes(b"\n".join(bad))
    os.mkfifo(tmp_path / "report.json")  # nobody writes to it
    shown = read_run("x", tmp_path, stamp_of(tmp_path))
    assert [point.num_epochs for point in shown.curves["val loss"]] == [1, 2, 3]
    assert shown.figures == {"status": "starting"} and not shown.confusions


def test_runs_of_one_name_are_told_apart(tmp_path: Path) -> None:
    for name in ("a/x", "b/x", "b/y"):
        (tmp_path / name).mkdir(parents=True)
        (tmp_path / name / "config.toml").touch()
    found = runs_in([tmp_path / "a" / "x", tmp_path / "b", tmp_path / "a", tmp_path / "none"])
    assert found == {
        "x": tmp_path / "a/x",
        "b/x": tmp_path / "b/x",
        "y": tmp_path / "b/y",
    }


class Served:
    """A run in a folder of its own, and its page's server."""

    def __init__(self, run: Path, url: str) -> None:
        self.run, self.url = run, url
        parts = urlsplit(url)
        self.host, self.path = parts.netloc, parts.path

    def ask(self, path: str, method: str = "GET", **headers: str) -> tuple[int, bytes]:
        """Status and body; `path` is from the token on, or, with a / before it, whole."""
        connection = http.client.HTTPConnection(self.host, timeout=HANGS_S)
        whole = path if path.startswith("/") else self.path + path
        connection.request(method, whole, headers=headers)
        self.answer = connection.getresponse()
        body = self.answer.read()
        connection.close()
        return self.answer.status, body

    def events(self, query: str = "") -> Iterator[tuple[str, Any]]:
        connection = http.client.HTTPConnection(self.host, timeout=HANGS_S)
        connection.request("GET", f"{self.path}events{query}")
        answer = connection.getresponse()
        end_s = time.monotonic() + HANGS_S
        while line := answer.readline():
            assert time.monotonic() < end_s, "nothing but signs of life"
            if line.startswith(b"event: "):
                data = answer.readline().removeprefix(b"data: ")
                yield line[7:].strip().decode(), json.loads(data)
        connection.close()


@pytest.fixture
def served(run: Path, tmp_path: Path) -> Iterator[Served]:
    """The run as it stood after its first epoch."""
    copy = tmp_path / HOSTILE
    shutil.copytree(run, copy)
    for name, num in (("metrics.jsonl", 1), (LIVE, 4)):
        kept = (run / name).read_bytes().splitlines(keepends=True)[:num]
        (copy / name).write_bytes(b"".join(kept))
    report = json.loads((copy / "report.json").read_text())
    report |= {"status": "unfinished", "num_epochs": 0, "train_s": 0.0}
    (copy / "report.json").write_text(json.dumps(report))
    with Page(0) as page:
        yield Served(copy, page.start(copy).removeprefix("page: "))


def test_only_who_knows_the_token_is_answered(served: Served) -> None:
    status, page = served.ask("")
    headers = served.answer.headers
    assert status == 200 and b"<script nonce=" in page
    policy = headers["Content-Security-Policy"]
    assert policy.startswith("default-src 'none'; script-src 'nonce-") and "unsafe" not in policy
    assert headers["Cache-Control"] == "no-store" and headers["Referrer-Policy"] == "no-referrer"
    token = served.path.strip("/")
    for path in (
        "/",
        "/x/",
        f"/{token[:-1]}/",
        f"/{token}x/",
        "/favicon.ico",
        "//",
        f"/x/{token}/",
    ):
        assert served.ask(path) == (403, b""), path
    for host in ("evil.example", "evil.example:80", "127.0.0.1.evil.example", "[::1", ""):
        assert served.ask("", Host=host) == (403, b""), host
    assert served.ask("", Host="localhost:1")[0] == 200, "a tunnel has a port of its own"
    for method in ("POST", "PUT", "DELETE", "OPTIONS"):
        assert served.ask("", method) == (405, b""), method


def test_a_run_is_a_name_that_was_offered_and_no_path(served: Served) -> None:
    (served.run.parent / "secret").mkdir()
    shutil.copy(served.run / GLYPHS, served.run.parent / "secret")  # no run, as it has no config
    assert served.ask(f"glyphs?run={quote(served.run.name)}") == (
        200,
        (served.run / GLYPHS).read_bytes(),
    )
    for name in (
        "",
        "..",
        "secret",
        f"../{served.run.parent.name}/secret",
        "/etc",
        str(served.run),
    ):
        assert served.ask(f"glyphs?run={quote(name, '')}")[0] == 404, name
        assert next(served.events(f"?run={quote(name, '')}"))[1]["chosen"] == [], name
    assert served.ask("../../../../etc/passwd")[0] in (403, 404)
    assert served.ask("%2e%2e/%2e%2e/etc/passwd")[0] in (403, 404)


def test_what_is_new_comes_by_itself_and_the_end_is_said(run: Path, tmp_path: Path) -> None:
    copy = tmp_path / "x"
    shutil.copytree(run, copy)
    (copy / "report.json").unlink()
    with Page(0) as page:
        served = Served(copy, page.start(copy).removeprefix("page: "))
        events = served.events()
        assert next(events) == ("runs", {"offered": ["x"], "chosen": ["x"]})
        kind, shown = next(events)
        assert kind == "run" and shown["figures"] == {"status": "starting"}
        shutil.copy(run / "report.json", copy)
        kind, shown = next(events)
        assert kind == "run" and shown["figures"]["epochs"] == "3 of 3"
        assert (
            shown["classes"] == sorted(CLASSES) and shown["confusions"][-1]["title"][:4] == "test"
        )
        (tmp_path / "y").mkdir()
        (tmp_path / "y" / "config.toml").touch()
        assert next(events) == ("runs", {"offered": ["x", "y"], "chosen": ["x"]})
    assert list(events) == [("end", {})]
    with pytest.raises(ConnectionRefusedError):
        served.ask("")


def test_the_server_ends_with_a_run_that_is_killed(tmp_path: Path) -> None:
    code = (
        "import sys, time; from pathlib import Path; from engine.serve import Page\n"
        "with Page(0) as page: print(page.start(Path(sys.argv[1])), flush=True); time.sleep(60)"
    )
    with subprocess.Popen(
        [sys.executable, "-c", code, tmp_path], stdout=subprocess.PIPE
    ) as process:
        assert process.stdout
        served = Served(tmp_path, process.stdout.readline().decode().split()[-1])
        assert served.ask("")[0] == 200
        process.send_signal(signal.SIGKILL)
    until(lambda: not listens(served.host))


def listens(host: str) -> bool:
    name, _, port = host.partition(":")
    with socket.socket() as client:
        return client.connect_ex((name, int(port))) == 0


def until(is_true: Callable[[], object]) -> None:
    """Wait for it; fails where it does not come."""
    start_s = time.monotonic()
    while not is_true():
        assert time.monotonic() - start_s < HANGS_S, "it did not come"
        time.sleep(0.05)


def test_a_port_that_is_taken_is_said_before_training(command: Command, tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as other:
        port = other.getsockname()[1]
        run_it = ("python", "-m", "engine.run", "--out", tmp_path / "out", "--serve", port)
        for words in (run_it, (*run_it, "--sweep", "seed=1,2")):
            assert_refused(command(*words), f"--serve: port {port} is not free", "name another")
    assert list(tmp_path.iterdir()) == []
    done = command("python", "-m", "engine.run", "--serve", 65_536, "--out", tmp_path / "out")
    assert done.returncode == 2 and "'--serve': 65536 is not in the range" in done.stderr


def test_what_cannot_be_served_is_refused(
    command: Command, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    report = ("tools/profile", "report")
    assert_refused(command(*report, "--serve", tmp_path), "is no run's folder, and holds none")
    assert_refused(command(*report, "--serve", tmp_path / "x"), "is no run's folder")
    assert_refused(command(*report, tmp_path, tmp_path), "give one DIR, or --serve")
    monkeypatch.setattr(serve, "find_spec", lambda name: None)
    assert_refused(command(*report, "--serve", tmp_path), "pip install starlette uvicorn")
    done = command("python", "-m", "engine.run", "--serve", "--out", tmp_path / "out")
    assert_refused(done, "--serve: the package starlette is not installed")
    assert list(tmp_path.iterdir()) == []


def test_the_members_of_a_sweep_are_runs_of_a_page(
    tiny_dir: Path, command: Command, tmp_path: Path
) -> None:
    words = ("--sweep", "seed=1,2", "--serve", "--data", tiny_dir, "--out", tmp_path / "s")
    done = command("python", "-m", "engine.run", *words, *SHORT, "--epochs", 1)
    assert done.returncode == 0 and done.stdout.count("page: http://") == 1, done.stderr
    found = runs_in([tmp_path / "s"])
    assert list(found) == ["001_seed=1", "002_seed=2"]
    for name, folder in found.items():
        shown = read_run(name, folder, stamp_of(folder))
        assert shown.has_glyphs and len(shown.confusions) == 2


@pytest.mark.slow
def test_two_ranks_have_one_page_and_one_confusion(
    tiny: Records, tiny_dir: Path, tmp_path: Path
) -> None:
    words = ("--nproc-per-node", "2", "-m", "engine.run", "--serve", "--out", str(tmp_path / "x"))
    short = ("--data", str(tiny_dir), "--epochs", "1", "--batch-size", "16", "--device", "cpu")
    done = child(["torchrun", *words, *short], {"OMP_NUM_THREADS": "1"})
    assert done.returncode == 0 and done.stdout.count("page: http://") == 1, done.stderr
    evaluations = [line.evaluation for line in lines_of(tmp_path / "x") if line.evaluation]
    assert [it.split for it in evaluations] == ["val", "test"]
    for it in evaluations:
        num_wrong = round((1 - it.accuracy_fraction) * len(tiny.split(it.split)))
        assert sum(times for _, _, times in it.pairs) == num_wrong > 0


@pytest.mark.parametrize(
    ("width", "dark"),
    [
        pytest.param(1200, False, id="wide", marks=pytest.mark.slow),
        pytest.param(390, True, id="phone"),
    ],
)
def test_a_browser_sees_a_run_go_on(
    browser: Browser, served: Served, run: Path, width: int, dark: bool, tmp_path: Path
) -> None:
    browser.open(served.url, width, dark)

    def text(selector: str) -> str:
        return str(browser.value(f"document.querySelector({selector!r})?.textContent ?? ''"))

    until(lambda: "1 of 3" in text("#figures"))
    assert HOSTILE in text("#figures") and "not finished" in text("#figures")
    assert text("#evaluation").startswith(f"{HOSTILE}, val after 1 epochs")
    first = browser.value("document.querySelector('svg path').getAttribute('d').length")
    for name in ("metrics.jsonl", LIVE, "report.json"):
        shutil.copy(run / name, served.run)
    until(lambda: "finished3 of 3" in text("#figures") and "test after 3" in text("#evaluation"))
    assert browser.value("document.querySelector('svg path').getAttribute('d').length") > first
    titles = browser.value("[...document.querySelectorAll('h3')].map(h => h.firstChild.data)")
    assert titles == ["Loss ", "Accuracy ", "Samples/s ", "Memory, GiB "]
    browser.value("document.querySelector('[value=train_s]').click()")
    browser.value("document.querySelectorAll('details').forEach(d => d.open = true)")
    browser.value("document.querySelector('#which').value = 0")
    browser.value("document.querySelector('#which').dispatchEvent(new Event('input'))")
    assert "val after 0.714" in text("#evaluation")
    background = "document.querySelector('.glyph span').style.backgroundImage"
    assert browser.value(background).startswith('url("glyphs?run=%3Cimg')
    assert browser.value("document.documentElement.scrollWidth") <= width
    paper = browser.value("getComputedStyle(document.body).backgroundColor")
    assert paper == ("rgb(20, 23, 26)" if dark else "rgb(254, 254, 254)")
    names = {event["method"] for event in browser.events}
    assert not names & {"Log.entryAdded", "Audits.issueAdded", "Runtime.exceptionThrown",
                        "Runtime.consoleAPICalled"}  # fmt: skip
    wanted = [e["params"]["request"]["url"] for e in browser.events
              if e["method"] == "Network.requestWillBeSent"]  # fmt: skip
    assert len(wanted) > 2 and all(url.startswith((served.url, "data:,")) for url in wanted), wanted
    other = served.run.parent / "other"
    shutil.copytree(run, other)
    until(lambda: "other" in text("#offered"))
    browser.value("document.querySelector('[value=other]').click()")
    until(lambda: "other" in text("#figures"))
    assert browser.value("document.querySelectorAll('tbody tr').length") == 2


@pytest.mark.slow
def test_the_browser_says_that_the_run_has_ended(browser: Browser, run: Path) -> None:
    with Page(0) as page:
        browser.open(page.start(run).removeprefix("page: "), 390, False)
        script = "document.querySelector('#news').textContent"
        until(lambda: "last news" in str(browser.value(script)))
        left_ms = "dueMs - performance.now()"
        assert browser.value(f"draw(), drawNews(), {left_ms}") > 4000, "news may wait"
        assert browser.value(f"drawSoon(), {left_ms}") < 1000, "what the user does may not"
    until(lambda: str(browser.value(script)).startswith("the command has ended"))
    time.sleep(0.5)
    browser.value("1")
    assert "Log.entryAdded" not in {event["method"] for event in browser.events}, "asks no more"
