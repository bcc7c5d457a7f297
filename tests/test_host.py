"""The process and its machine: homes, caches, what children may import, limits of containers."""

import os
import pwd
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from engine import host
from engine.config import DataConfig
from engine.errors import UserError
from engine.feeds.build import open_for

CHILDREN = (
    "PYTHONSAFEPATH",
    "PYTHONPATH",
    "HOME",
    host.ORIGINAL_HOME,
    "XDG_CACHE_HOME",
    *host.COMPILED,
)


@pytest.fixture
def process(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """A process that was not prepared, of a user with new folders; returns their parent."""
    for name in CHILDREN:
        monkeypatch.setenv(name, "")  # so that it is put back
        monkeypatch.delenv(name)
    for name in ("home", "tmp"):
        (tmp_path / name).mkdir()
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path / "tmp"))
    return tmp_path


def mode(folder: Path) -> int:
    return folder.stat().st_mode & 0o777


def test_caches_are_the_users_alone(process: Path) -> None:
    host.prepare_process()
    cache = process / "home" / ".cache" / "tmnist-engine"
    assert host.user_cache() == cache and mode(cache) == 0o700
    for name, folder in host.COMPILED.items():
        assert os.environ[name] == str(cache / folder) and mode(cache / folder) == 0o700
    assert os.environ["HOME"] == str(process / "home") and host.cache_notes() == []


def test_a_users_own_choices_stay(process: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TRITON_CACHE_DIR", "/elsewhere")
    monkeypatch.setenv("XDG_CACHE_HOME", str(process / "mine"))
    monkeypatch.setenv("PYTHONPATH", f":/a::{host.ROOT}:/b")
    host.prepare_process()
    assert os.environ["TRITON_CACHE_DIR"] == "/elsewhere"
    assert host.user_cache() == process / "mine" / "tmnist-engine"
    assert (
        os.environ["PYTHONPATH"] == f"{host.ROOT}:/a:/b"
    )  # an empty part would be the current folder
    monkeypatch.setenv("XDG_CACHE_HOME", "relative")
    assert host.user_cache().is_relative_to(process / "home")
    monkeypatch.setenv("XDG_CACHE_HOME", "/proc/no")
    with pytest.raises(UserError, match="/proc/no/tmnist-engine: .*set XDG_CACHE_HOME"):
        host.user_cache()


@pytest.mark.parametrize("home", [None, "/nonexistent", "relative", "/proc/sys"])
def test_without_a_home_one_line_says_where_caches_go(
    home: str | None,
    process: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def no_entry(uid: int) -> pwd.struct_passwd:
        raise KeyError(uid)

    monkeypatch.setattr(pwd, "getpwuid", no_entry)
    monkeypatch.delenv("HOME") if home is None else monkeypatch.setenv("HOME", home)
    monkeypatch.chdir(process)
    host.prepare_process()
    fallback = process / "tmp" / f"tmnist-engine-{os.getuid()}"
    (said,) = host.cache_notes()
    assert str(fallback) in said and "set XDG_CACHE_HOME" in said
    assert host.user_cache() == fallback and mode(fallback) == 0o700
    assert os.path.expanduser("~") == str(fallback), "libraries would make a folder called ~"
    host.prepare_process()  # in a child, which inherits all that
    assert host.cache_notes() == [said] and host.user_cache() == fallback
    assert host.home() == (Path("/proc/sys") if home == "/proc/sys" else None)


def test_a_folder_of_somebody_else_is_not_used(
    process: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HOME", "/nonexistent")
    fallback = process / "tmp" / f"tmnist-engine-{os.getuid()}"
    fallback.mkdir(mode=0o755)
    with pytest.raises(UserError, match="only this user may enter; set XDG_CACHE_HOME"):
        host.prepare_process()
    fallback.rmdir()
    (process / "theirs").mkdir(mode=0o700)
    fallback.symlink_to(process / "theirs")
    with pytest.raises(UserError, match="only this user may enter"):
        host.prepare_process()
    fallback.unlink()
    fallback.mkdir(mode=0o700)
    monkeypatch.setattr(os, "getuid", lambda: 4711)
    fallback.rename(fallback.with_name("tmnist-engine-4711"))
    with pytest.raises(UserError, match="only this user may enter"):
        host.prepare_process()


def test_a_current_folder_with_foreign_modules_is_not_imported_from(tmp_path: Path) -> None:
    """By the commands, their children, and the children's own (torchrun's ranks, compilers)."""
    for name in ("click", "engine", "numpy", "tools", "torch", "kernels"):
        (tmp_path / f"{name}.py").write_text("print('foreign code runs')\nraise SystemExit(3)\n")
    for tool in ("pack_tmnist", "profile", "verify", "render_glyphs"):
        command = [host.ROOT / "tools" / tool, "--help"]
        done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
        assert done.returncode == 0 and done.stdout.startswith("Usage"), done
    code = (
        "import subprocess, sys\n"
        "from engine.host import prepare_process\n"
        "prepare_process()\n"
        "sys.exit(subprocess.call([sys.executable, '-m', 'tools.pack_tmnist', '--help']))"
    )
    command = [sys.executable, "-P", "-c", code]
    variables = os.environ | {"PYTHONPATH": str(host.ROOT)}
    variables.pop("PYTHONSAFEPATH", None)
    done = subprocess.run(command, cwd=tmp_path, env=variables, capture_output=True, text=True)
    assert done.returncode == 0 and done.stdout.startswith("Usage"), done


def test_compiled_code_is_private_whatever_is_imported_first(tmp_path: Path) -> None:
    """engine.run sets the place before torch._dynamo would choose a shared one."""
    code = (
        "import sys, click\n"
        "from engine.run import main\n"
        "try: main(['--data', 'nowhere', '--compile'])\n"
        "except SystemExit: pass\n"
        "import torch._dynamo\n"
        "from torch._inductor.runtime.cache_dir_utils import cache_dir\n"
        "print(cache_dir())"
    )
    variables = os.environ | {"XDG_CACHE_HOME": str(tmp_path), "PYTHONPATH": str(host.ROOT)}
    for name in host.COMPILED:
        variables.pop(name, None)
    command = [sys.executable, "-c", code]
    done = subprocess.run(command, env=variables, capture_output=True, text=True)
    assert done.stdout.strip() == str(tmp_path / "tmnist-engine" / "inductor"), done


def cgroup(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, lines: str, files: dict[str, object]
) -> None:
    """A machine of 10 GiB free whose /proc and /sys/fs/cgroup say this."""
    files = {
        "proc/self/cgroup": lines,
        "proc/meminfo": f"MemTotal: 99 kB\nMemAvailable:   {10 * 2**20} kB\n",
        **{f"cgroup/{name}": text for name, text in files.items()},
    }
    for name, text in files.items():
        file = tmp_path / name
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(f"{text}\n")
    monkeypatch.setattr(host, "PROC", tmp_path / "proc")
    monkeypatch.setattr(host, "CGROUP", tmp_path / "cgroup")
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: set(range(16)))


def test_limits_of_cgroups_version_2(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    files = {
        "pod/memory.max": 4 * 2**30,
        "pod/memory.current": 3 * 2**30,
        "pod/memory.stat": f"active_file 5\ninactive_file {2**29}",
        "pod/job/memory.max": "max",
        "pod/job/memory.current": 2**30,
        "pod/job/cpu.max": "250000 100000",
        "pod/cpu.max": "max 100000",
    }
    cgroup(monkeypatch, tmp_path, "0::/pod/job", files)
    assert (
        host.free_memory_bytes() == 3 * 2**29
    )  # the parent's limit; what it can drop counts as free
    assert host.num_cpus() == 3  # 2.5 cores


def test_limits_of_cgroups_version_1(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    files = {
        "memory/memory.limit_in_bytes": 2**31,  # a container sees its own group as the root
        "memory/memory.usage_in_bytes": 2**30,
        "memory/memory.stat": "total_inactive_file 1024",
        "cpu,cpuacct/docker/ab/cpu.cfs_quota_us": 400000,
        "cpu,cpuacct/docker/ab/cpu.cfs_period_us": 100000,
    }
    cgroup(monkeypatch, tmp_path, "4:memory:/docker/ab\n3:cpu,cpuacct:/docker/ab", files)
    assert host.free_memory_bytes() == 2**30 + 1024
    assert host.num_cpus() == 4


def test_no_limit_is_no_limit(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    files = {
        "memory/memory.limit_in_bytes": 9223372036854771712,
        "memory/memory.usage_in_bytes": 1,
        "cpu/cpu.cfs_quota_us": -1,
        "cpu/cpu.cfs_period_us": 100000,
    }
    cgroup(monkeypatch, tmp_path, "4:memory:/\n1:cpu:/\n0::/", files)
    assert host.free_memory_bytes() == 10 * 2**30 and host.num_cpus() == 16
    (tmp_path / "proc" / "self" / "cgroup").unlink()
    assert host.free_memory_bytes() == 10 * 2**30 and host.num_cpus() == 16


def test_a_containers_memory_decides_where_records_are_read(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, small_dir: Path
) -> None:
    cgroup(monkeypatch, tmp_path, "0::/", {"memory.max": 300_000, "memory.current": 0})
    image_NHW = open_for(DataConfig(), small_dir).split("train").image_NHW
    assert not isinstance(image_NHW, np.ndarray)


def test_a_quota_limits_torchs_threads(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    import torch

    before = torch.get_num_threads()
    monkeypatch.setenv("OMP_NUM_THREADS", "")
    monkeypatch.delenv("OMP_NUM_THREADS")
    cgroup(monkeypatch, tmp_path, "0::/", {"cpu.max": "100000 100000"})
    try:
        host.limit_threads()
        assert torch.get_num_threads() == 1 and os.environ["OMP_NUM_THREADS"] == "1"
    finally:
        torch.set_num_threads(before)


def in_a_container(code: str) -> subprocess.CompletedProcess[str]:
    """Run Python as process 1, as a container's command runs."""
    enter = ["unshare", "--user", "--map-root-user", "--pid", "--fork", "--mount-proc"]
    if subprocess.run([*enter, "true"], capture_output=True).returncode:
        pytest.skip("namespaces of processes are not allowed here")
    command = [*enter, sys.executable, "-c", code]
    return subprocess.run(command, cwd=host.ROOT, capture_output=True, text=True, timeout=60)


def test_ranks_of_a_containers_first_process_are_no_orphans() -> None:
    code = """
import os, subprocess, sys
assert os.getpid() == 1
os.environ["TORCHELASTIC_RUN_ID"] = "1"
rank = "from engine.stop import end_with_launcher; end_with_launcher(); print('trains')"
sys.exit(subprocess.call([sys.executable, "-c", rank]))
"""
    done = in_a_container(code)
    assert (done.returncode, done.stdout) == (0, "trains\n"), done.stderr


def test_a_containers_first_process_may_have_processes_that_read() -> None:
    code = """
import os
from engine.data.processes import processes
with processes(2, "tree") as pool:
    print(os.getpid(), pool.submit(max, 3, 4).result())
"""
    done = in_a_container(code)
    assert (done.stdout, done.stderr) == ("1 4\n", "")


def test_a_rank_whose_launcher_died_before_it_asked_is_stopped() -> None:
    """Process 1 is then its parent, and no Python."""
    code = """
import os, subprocess, sys
os.environ["TORCHELASTIC_RUN_ID"] = "1"
rank = "from engine.stop import end_with_launcher; end_with_launcher(); print('trains')"
orphan = f"import os, time; os.getppid() == 1 or time.sleep(0.5); {rank}"
pid = os.fork()
if not pid:
    subprocess.Popen([sys.executable, "-c", orphan])
    os._exit(0)
os.waitpid(pid, 0)
os.execvp("sleep", ["sleep", "4"])
"""
    assert in_a_container(code).stdout == ""
