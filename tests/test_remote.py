"""Records behind URLs: the same bits as on a disk, whatever the server does, or one clear line."""

import hashlib
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from engine import open_records
from engine.config import DataConfig
from engine.data import remote, server
from engine.data.pack import pack
from engine.data.record_file import BLOCK_BYTES
from engine.durable import MANIFEST, MANIFEST_HASH
from engine.errors import UserError
from engine.feeds.build import open_for
from engine.host import ROOT
from engine.paths import without_credentials
from engine.report import without_folders
from tests.conftest import Command, assert_refused
from tests.remote_server import BUCKET, CREDENTIALS, Proxy, names_in_bucket, serving

URL = f"s3://{BUCKET}/set"
TRAIN = "train-00000.arrow"
NUM_BLOCKS = 3
"""Of train."""


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """4,000 images in an .npz."""
    path = tmp_path_factory.mktemp("npz") / "set.npz"
    rng = np.random.default_rng(0)
    images = rng.integers(0, 256, (4000, 28, 28), dtype=np.uint8)
    np.savez(path, images=images, labels=np.arange(4000) % 4)
    return path


@pytest.fixture(scope="module")
def records(source: Path) -> Path:
    pack(source, source.parent / "records")
    return source.parent / "records"


@pytest.fixture(scope="module")
def served(records: Path) -> Iterator[Proxy]:
    """The S3 server, which has the records at URL."""
    with serving() as proxy:
        # The server's troubles do not hinder publishing, either.
        proxy.faults = {TRAIN: ["500"], "fonts.json": ["500"], MANIFEST: ["fine", "500"]}
        remote.publish(records, URL)
        assert proxy.faults == {TRAIN: [], "fonts.json": [], MANIFEST: []}
        names = [name for method, name, _ in proxy.asked if method == "PUT" and name != BUCKET]
        assert names[-1] == MANIFEST and names_in_bucket("set") == set(os.listdir(records))
        yield proxy


@pytest.fixture(autouse=True)
def fresh(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[None]:
    """A cache of the test's own, a process that uses nothing yet, and less patience."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(server, "PART_BYTES", BLOCK_BYTES)
    monkeypatch.setattr(server, "SHORTEST_PAUSE_S", 0.01)
    be_patient(monkeypatch, 5.0)
    yield
    release()


@pytest.fixture
def proxy(served: Proxy) -> Proxy:
    served.faults, served.asked = {}, []
    return served


def be_patient(monkeypatch: pytest.MonkeyPatch, seconds: float) -> None:
    monkeypatch.setattr(server, "FIRST_WORD_S", seconds)
    monkeypatch.setattr(server, "PATIENCE_S", seconds)


def release() -> None:
    """Give the copies back, as the end of a process does."""
    while remote._held:
        os.close(remote._held.popitem()[1])


def contents(folder: Path) -> dict[str, str]:
    return {file.name: hashlib.sha256(file.read_bytes()).hexdigest() for file in folder.iterdir()}


def copies(tmp_path: Path) -> list[str]:
    folders = (tmp_path / "cache" / "tmnist-engine" / remote.CACHE).iterdir()
    return sorted(folder.name for folder in folders if folder.is_dir())


@pytest.mark.parametrize("kind", ["s3", "http", "http without ranges"])
def test_the_bits_are_those_of_the_disk_whatever_the_server_does(
    kind: str, proxy: Proxy, records: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(server, "READ_S", 1.0)
    whole = ["whole"] if kind == "http without ranges" else []
    proxy.faults = {
        MANIFEST: ["500", "cut", "flip"],
        MANIFEST_HASH: ["flip"],
        "fonts.json": ["flip"],
        TRAIN: ["500", "cut", "slow", "flip", "stuck", *whole],
        "test-00000.arrow": ["cut", "500"],
    }
    url = URL if kind == "s3" else f"{proxy.url}/{BUCKET}/set"
    copy = remote.local(url)
    assert contents(copy) == contents(records)
    assert not any(proxy.faults.values()), "a fault was never met"
    there = open_for(DataConfig(feed="stream"), url)
    assert there.path == str(copy) and there.fingerprint == open_records(records).fingerprint
    num_asked = sum(name == TRAIN for _, name, _ in proxy.asked)
    assert num_asked <= 5 + NUM_BLOCKS, "what is here was fetched again"


def test_a_block_that_stays_damaged_is_refused_by_name(proxy: Proxy, tmp_path: Path) -> None:
    proxy.faults[TRAIN] = ["fine", "flip", "flip"]
    refused: list[str] = []

    def refuse() -> None:
        with pytest.raises(UserError) as caught:
            open_records(URL)
        refused.append(str(caught.value))

    waiting = [threading.Thread(target=refuse) for _ in range(3)]
    for thread in waiting:
        thread.start()
    for thread in waiting:
        thread.join(20)
    what = f"{URL}: damaged: {TRAIN}: the block at byte {BLOCK_BYTES} has not its CRC32, twice"
    assert len(refused) == 3 and all(each.startswith(what) for each in refused), refused
    assert not proxy.faults[TRAIN]
    assert [name for name in copies(tmp_path) if not name.endswith(remote.PART)] == []
    proxy.asked = []
    open_records(URL)
    ranges = sorted(span for _, name, span in proxy.asked if name == TRAIN)
    assert len(ranges) == NUM_BLOCKS - 1, "the first block was here already"
    assert ranges[0].startswith(f"bytes={BLOCK_BYTES}-")


def test_one_downloads_others_wait_and_one_goes_on_where_it_was_killed(
    proxy: Proxy, records: Path, tmp_path: Path
) -> None:
    url = f"{proxy.url}/{BUCKET}/set"
    code = (
        "import sys; from engine.data import remote, server; server.PART_BYTES = 2**20; "
        "remote.local(sys.argv[1])"
    )
    proxy.faults[TRAIN] = ["fine", *["slow"] * 2]
    child = subprocess.Popen([sys.executable, "-c", code, url], cwd=ROOT)
    while sum(name == TRAIN for _, name, _ in proxy.asked) < 2:
        assert child.poll() is None
        time.sleep(0.01)
    found: list[Path] = []
    waiting = [threading.Thread(target=lambda: found.append(remote.local(url))) for _ in range(2)]
    for thread in waiting:
        thread.start()
    time.sleep(0.2)
    assert not found, "the copy is the child's to make"
    child.send_signal(signal.SIGKILL)
    child.wait(10)
    for thread in waiting:
        thread.join(20)
    assert len(found) == 2 and found[0] == found[1] and contents(found[0]) == contents(records)
    starts = [span for _, name, span in proxy.asked if name == TRAIN]
    assert len(starts) == NUM_BLOCKS + 1, "only the block amid which the child was killed, again"
    assert copies(tmp_path) == [found[0].name]


def test_the_least_recently_used_go_but_never_one_in_use(small_dir: Path, tmp_path: Path) -> None:
    def url(name: str) -> str:
        folder = tmp_path / name
        if not folder.exists():
            folder.symlink_to(small_dir)
        return f"local://{folder}"

    def age(copy: Path, seconds: float) -> Path:
        os.utime(copy, (time.time() - seconds,) * 2)
        return copy

    size = remote._size(small_dir)
    limit = 2.5 * size / 2**30
    a, b = age(remote.local(url("a"), limit), 30), age(remote.local(url("b"), limit), 20)
    with pytest.raises(UserError, match="beside .* GiB that are in use within the limit"):
        remote.local(url("c"), limit)
    release()
    assert remote.local(url("a"), limit) == a  # used again, so that b is the one to go
    release()
    c = remote.local(url("c"), limit)
    assert copies(tmp_path) == sorted([a.name, c.name]) and not b.exists()
    assert not list(a.parent.glob(f".{b.name}*"))
    with pytest.raises(UserError, match=r"do not fit within the limit of 1e-06 GiB; give .*cache_"):
        remote.local(url("d"), 1e-6)


def test_without_the_server_the_copy_is_used_and_said(
    proxy: Proxy, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    url = f"{proxy.url}/{BUCKET}/set"
    copy = remote.local(url)
    release()
    capsys.readouterr()
    proxy.faults = {MANIFEST: ["500", "always"]}
    be_patient(monkeypatch, 0.2)
    assert remote.local(url) == copy
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith(f"note: {url}/{MANIFEST}: HTTP 500, tried") and line.endswith(
        f"{copy} is used"
    )
    with pytest.raises(UserError, match="tried for 0.2 s; start again later"):
        remote.local(url + "2")


def test_damage_of_a_copy_says_what_to_do(proxy: Proxy) -> None:
    url = f"{proxy.url}/{BUCKET}/set"
    copy = remote.local(url)
    data = bytearray((copy / TRAIN).read_bytes())
    data[-1] ^= 1
    (copy / TRAIN).write_bytes(data)
    with pytest.raises(UserError, match="CRC32.*; delete this copy; it is fetched again"):
        open_records(url)
    shutil.rmtree(copy)
    assert open_records(url).path == str(copy)


def test_packing_publishes_whole_or_not_at_all(
    proxy: Proxy,
    command: Command,
    source: Path,
    records: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    new = f"s3://{BUCKET}/new"
    proxy.faults = {"val-00000.arrow": ["500", "always"]}
    with monkeypatch.context() as patch:
        be_patient(patch, 0.2)
        refused = command("tools/pack_tmnist", source, new)
    assert_refused(refused, f"{new}/val-00000.arrow: ", "tried")
    assert names_in_bucket("new") == set()
    proxy.faults = {}
    done = command("tools/pack_tmnist", source, new)
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[-1].startswith(f"{new}: ")
    assert contents(remote.local(new)) == contents(records)
    assert_refused(command("tools/pack_tmnist", source, new), f"{new}: holds records already")
    refused = command("tools/pack_tmnist", "--force", source, new)
    assert_refused(refused, f"{new}: is never replaced")
    web = f"{proxy.url}/{BUCKET}/x"
    assert_refused(command("tools/pack_tmnist", source, web), f"{web}: cannot be written to")
    assert_refused(command("tools/pack_tmnist", URL, "x"), f"{URL}: a source is no URL")


def test_of_two_that_publish_at_once_one_is_refused(proxy: Proxy, records: Path) -> None:
    new, together, said = f"s3://{BUCKET}/twice", threading.Barrier(2), list[str]()

    def publish() -> None:
        together.wait()
        try:
            remote.publish(records, new)
            said.append("published")
        except UserError as error:
            said.append(str(error))

    threads = [threading.Thread(target=publish) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    refused, published = sorted(said, key="published".__eq__)
    assert published == "published"
    assert refused.startswith(f"{new}: "), refused
    assert f"process {os.getpid()} on " in refused or "holds records already" in refused
    assert names_in_bucket("twice") == set(os.listdir(records))
    assert contents(remote.local(new)) == contents(records)


def test_a_claim_is_known_as_ones_own_and_a_killed_ones_is_named(
    proxy: Proxy, records: Path
) -> None:
    new = f"s3://{BUCKET}/claimed"
    proxy.faults = {server.CLAIM: ["lost"]}  # written, but the answer says 500
    remote.publish(records, new)
    assert names_in_bucket("claimed") == set(os.listdir(records))
    left = server.RemoteFolder(f"s3://{BUCKET}/left")
    left.claim("process 7 on elsewhere (then, 0)")
    with pytest.raises(UserError) as refused:
        remote.publish(records, f"s3://{BUCKET}/left")
    assert str(refused.value) == (
        f"s3://{BUCKET}/left: process 7 on elsewhere (then, 0) publishes there; "
        f"wait for it, or delete s3://{BUCKET}/left/publishing if it was killed"
    )
    assert names_in_bucket("left") == {server.CLAIM}
    left.remove([server.CLAIM])
    remote.publish(records, f"s3://{BUCKET}/left")
    assert names_in_bucket("left") == set(os.listdir(records))


def test_what_cannot_be_fetched_is_one_line(
    proxy: Proxy, command: Command, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def verify(url: str, *texts: str, **environment: str) -> None:
        done = command("tools/pack_tmnist", "--verify", url, **environment)
        assert_refused(done, *texts)
        assert "secret" not in done.stderr

    cache = {"XDG_CACHE_HOME": str(tmp_path / "cache")}
    verify(f"s3://{BUCKET}/none", f"{BUCKET}/none/{MANIFEST}: ", "name the folder", **cache)
    verify("s3://no-bucket/x", "bucket does not exist; name the folder", **cache)
    verify("s4://x/y", "s4://x/y: ", "write s3://, gs:// or https://", **cache)
    verify("http://[x/y", "cannot be understood", **cache)
    monkeypatch.setitem(sys.modules, "gcsfs", None)
    verify("gs://x/y", "gs://x/y: a package is missing", "pip install fsspec s3fs gcs", **cache)
    page = f"http://user:secret@127.0.0.1:{proxy.server_port}/{BUCKET}?X-Amz-Signature=secret"
    verify(page, f"/{BUCKET}/{MANIFEST}: ", "name the folder", **cache)
    proxy.faults = {MANIFEST: ["deny", "always"]}
    verify(f"{page}&x", f"{proxy.url}/{BUCKET}/{MANIFEST}: HTTP 403; give credentials", **cache)
    proxy.faults = {}
    nobody = dict.fromkeys(CREDENTIALS, "") | {"AWS_EC2_METADATA_DISABLED": "true"}
    verify(f"s3://{BUCKET}/x", "NoCredentialsError", "; give credentials", **cache, **nobody)
    (tmp_path / "cache" / "tmnist-engine" / remote.CACHE).rmdir()
    (tmp_path / "cache" / "tmnist-engine" / remote.CACHE).touch()
    verify(URL, f"{remote.CACHE}: cannot be written", **cache)


def test_a_file_url_with_a_host_is_refused() -> None:
    """As one of two slashes has."""
    with pytest.raises(UserError, match="names a host, 'tmp'; write file:///, then the whole path"):
        remote.local("file://tmp/records")


def test_a_run_on_a_url_keeps_no_credentials(
    proxy: Proxy, command: Command, tmp_path: Path, cache: Path, tiny_dir: Path
) -> None:
    remote.publish(tiny_dir, f"s3://{BUCKET}/tiny")
    url = f"http://user:secret@127.0.0.1:{proxy.server_port}/{BUCKET}/tiny"
    out = tmp_path / "run"
    trained = command(
        "python", "-m", "engine.run", "--data", f"{url}?X-Amz-Signature=secret", "--epochs", 1,
        "--batch-size", 16, "--out", out, "--kernels", "off", "--set", "data.cache_gib=0.1",
    )  # fmt: skip
    assert trained.returncode == 0, trained.stderr
    evaluated = command("tools/evaluate", out)
    assert evaluated.returncode == 0, evaluated.stderr
    said = trained.stdout + trained.stderr + evaluated.stdout + evaluated.stderr
    files = [file.read_bytes() for file in out.rglob("*") if file.is_file()]
    assert b"secret" not in said.encode() + b"".join(files)
    kept = without_credentials(url)
    assert f'path = "{kept}"' in (out / "config.toml").read_text()
    assert kept in (out / "report.json").read_text()
    assert not [file for file in cache.rglob("*") if "secret" in file.name]
    assert without_folders(f"at {url}/x?a=b, not file:///a/b") == f"at {kept}/x, not file:///a/b"


@pytest.mark.slow
def test_ranks_share_one_download_and_one_refusal(
    proxy: Proxy, command: Command, tmp_path: Path
) -> None:
    proxy.faults = {TRAIN: ["500", "flip", "flip"]}
    words = ["--nproc-per-node", 2, "-m", "engine.run", "--data", URL, "--out", tmp_path / "run"]
    done = command("torchrun", *words)
    (line,) = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
    assert done.returncode and line.startswith(f"error: {URL}: damaged: {TRAIN}: the block at byte")
    assert sum(name == TRAIN for _, name, _ in proxy.asked) == 3, "each rank has tried"
    assert not (tmp_path / "run").exists()
