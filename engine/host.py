"""The process and its machine, without torch: rank, home, caches, cores, memory, environment.

The only reader of RANK and its relatives, and the only writer of the process's environment. What
needs torch (device, process group) is world.py's.
"""

import ctypes
import math
import os
import platform
import pwd
import re
import stat
import sys
import tempfile
from contextlib import suppress
from pathlib import Path

from engine.errors import UserError
from engine.late_dynamo import import_late

ROOT = Path(__file__).resolve().parent.parent
"""The checkout; site-packages where the project was installed as a wheel."""
HEAP_THRESHOLD_BYTES = 32 * 2**20
"""glibc's largest mmap threshold on 64 bit (HEAP_MAX_SIZE / 2); smaller blocks are kept, not
returned after a step."""
COMPILED = {"TORCHINDUCTOR_CACHE_DIR": "inductor", "TRITON_CACHE_DIR": "triton"}
"""Variables that name where compiled code is kept; inductor's own choice is shared, in /tmp."""
ORIGINAL_HOME = "TMNIST_ENGINE_HOME"
"""Variable that keeps the user's home, empty if there is none, where HOME had to be moved."""
UNLIMITED_BYTES = 2**60
"""A cgroup of version 1 without a limit names a number beyond any memory."""
PROC = Path("/proc")
CGROUP = Path("/sys/fs/cgroup")


def prepare_process() -> None:
    """Set what must be set before torch._dynamo is imported; every command calls this first.

    - Children (ranks, cells, compilers, joblib's workers) do not import from the current folder,
      whatever modules lie there, and find this checkout.
    - Compiled code is kept in the user's own cache folder.
    - Where the user has no home folder that can be written, HOME is the cache folder: libraries
      that look for a home would otherwise make a folder called "~".
    - torch imports its compiler when something is compiled.

    Raises:
        UserError: the cache folder cannot be made, or is somebody else's.
    """
    import_late()
    os.environ["PYTHONSAFEPATH"] = "1"
    if (ROOT / "pyproject.toml").exists():
        given = os.environ.get("PYTHONPATH", "").split(os.pathsep)
        others = [folder for folder in given if folder not in ("", str(ROOT))]
        os.environ["PYTHONPATH"] = os.pathsep.join([str(ROOT), *others])
    keep_large_blocks()
    if ORIGINAL_HOME not in os.environ:
        _move_home()
    for name, folder in COMPILED.items():
        if not os.environ.get(name):
            os.environ[name] = str(_made(user_cache() / folder))


def quiet_native_log() -> None:
    """Let torch's C++ parts print errors only; call it before torch is imported.

    A store that ends with its machine would print a stack for each rank; we say it in a sentence.
    """
    os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")


def _move_home() -> None:
    """Give libraries the cache folder for a home if the user has none that can be written."""
    found = home()
    if found is not None and os.access(found, os.W_OK):
        return
    cache = user_cache()
    os.environ[ORIGINAL_HOME] = str(found or "")
    os.environ["HOME"] = str(cache)


def cache_notes() -> list[str]:
    """A sentence if caches are not where users expect them."""
    if ORIGINAL_HOME not in os.environ or os.environ.get("XDG_CACHE_HOME"):
        return []
    found = os.environ[ORIGINAL_HOME]
    what = f"{found} cannot be written" if found else "this user has no home folder"
    return [f"{what}: caches go to {user_cache()}; set XDG_CACHE_HOME for another place"]


def home() -> Path | None:
    """The user's home: $HOME, or the password file's; None if neither is an existing folder."""
    named = os.environ.get(ORIGINAL_HOME, os.environ.get("HOME", ""))
    if not named and ORIGINAL_HOME not in os.environ:
        try:
            named = pwd.getpwuid(os.getuid()).pw_dir
        except KeyError:  # a container's user without an entry
            return None
    folder = Path(named)
    return folder if folder.is_absolute() and folder.is_dir() else None


def user_cache() -> Path:
    """The user's own folder for what may be made anew, mode 0700; it is made if it is missing.

    $XDG_CACHE_HOME/tmnist-engine, or ~/.cache/tmnist-engine, or (no home folder, or one that cannot
    be written) a folder in the temporary folder that is this user's alone.

    Raises:
        UserError: it cannot be made, or the one in the temporary folder is somebody else's.
    """
    chosen = os.environ.get("XDG_CACHE_HOME", "")
    if os.path.isabs(chosen):  # the specification: relative ones are ignored
        return _made(Path(chosen) / "tmnist-engine")
    if at_home := home():
        with suppress(UserError):
            folder = _made(at_home / ".cache" / "tmnist-engine")
            if os.access(folder, os.W_OK):
                return folder
    return _private(_fallback())


def _made(folder: Path) -> Path:
    """`folder`, made with mode 0700 if it is missing."""
    try:
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    except OSError as error:
        why = f"cannot be written ({error.strerror})"
        raise UserError(f"{folder}: {why}; set XDG_CACHE_HOME to a folder of yours") from None
    return folder


def _fallback() -> Path:
    return Path(tempfile.gettempdir()) / f"tmnist-engine-{os.getuid()}"


def _private(folder: Path) -> Path:
    """`folder`, made if it is missing, and certainly of this user alone."""
    found = os.lstat(_made(folder))
    is_ours = stat.S_ISDIR(found.st_mode) and found.st_uid == os.getuid()
    if not is_ours or stat.S_IMODE(found.st_mode) & 0o077:
        remedy = "set XDG_CACHE_HOME to a folder of yours"
        raise UserError(f"{folder}: is not a folder that only this user may enter; {remedy}")
    return folder


def env_rank() -> int:
    """This process's rank as torchrun gave it; 0 without torchrun."""
    return int(os.environ.get("RANK", 0))


def env_local_rank() -> int:
    """This process's rank among those of its machine, as torchrun gave it."""
    return int(os.environ.get("LOCAL_RANK", 0))


def env_has_local_rank() -> bool:
    """Whether torchrun, or a launcher that sets what it does, started this process."""
    return "LOCAL_RANK" in os.environ


def env_machine() -> int:
    """The number of this process's machine among those of the run, as torchrun gave it."""
    return int(os.environ.get("GROUP_RANK", 0))


def env_world_size() -> int:
    """Number of processes as torchrun gave it; 1 without torchrun."""
    return int(os.environ.get("WORLD_SIZE", 1))


def end_rank(code: int = 0) -> None:
    """End a rank of several at once, without the interpreter's shutdown.

    Gloo's threads may still be letting go of the last collective's tensors; one that asks for the
    interpreter while it shuts down aborts the process ("terminate called without an active
    exception": once in some 70 runs of two ranks).
    """
    if env_world_size() > 1:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)
    if code:
        raise SystemExit(code)


def env_local_world_size() -> int:
    """Number of processes on this machine as torchrun gave it."""
    return int(os.environ.get("LOCAL_WORLD_SIZE", 1))


def env_num_machines() -> int:
    """Number of machines, each with a torchrun of its own, as that gave it."""
    return int(os.environ.get("GROUP_WORLD_SIZE", 1))


def env_meeting_place() -> tuple[str, str]:
    """(address, port) of the ranks' store as torchrun gave them; "" without torchrun."""
    return os.environ.get("MASTER_ADDR", ""), os.environ.get("MASTER_PORT", "")


def is_last_try() -> bool:
    """Whether there is a torchrun, and it would not start this process again."""
    if "TORCHELASTIC_RUN_ID" not in os.environ:
        return False
    tried = int(os.environ.get("TORCHELASTIC_RESTART_COUNT", 0))
    return tried >= int(os.environ.get("TORCHELASTIC_MAX_RESTARTS", 0))


def prefer_interface(name: str) -> None:
    """Let gloo tell the other ranks the address of this interface, if the user named none."""
    os.environ.setdefault("GLOO_SOCKET_IFNAME", name)


def keep_large_blocks() -> bool:
    """Make glibc keep freed blocks of up to 32 MiB instead of unmapping them.

    A CPU step at batch 512 frees some 200 MB of activations; by default each step maps and zeroes
    them anew, and page faults cost a third of its time. As MALLOC_MMAP_THRESHOLD_ and
    MALLOC_TRIM_THRESHOLD_ would, without a restart.

    Call it at the process's start: after records were read it is worth less (9.9k, 11.2k, 12.1k
    against 11.8k, 12.8k, 13.3k samples/s, medians of interleaved processes on two cores,
    2026-11-22).

    Returns:
        Whether the setting took (false where the C library is not glibc).
    """
    if platform.libc_ver()[0] != "glibc":
        return False
    mallopt = ctypes.CDLL(None).mallopt
    settings = (  # the names as in malloc.h
        (-3, HEAP_THRESHOLD_BYTES),  # M_MMAP_THRESHOLD
        (-1, 2**31 - 1),  # M_TRIM_THRESHOLD
        (-2, 64 * 2**20),  # M_TOP_PAD
    )
    return all(mallopt(name, value) == 1 for name, value in settings)


def num_cpus() -> int:
    """CPU cores this process may keep busy: its affinity, or its cgroup's quota, if less."""
    num_allowed = len(os.sched_getaffinity(0))
    quotas = [_quota(folder) for folder in _cgroups("cpu")]
    return max(1, min([num_allowed, *(math.ceil(quota) for quota in quotas if quota)]))


def limit_threads() -> None:
    """Let torch and OpenMP take no more threads than a cgroup allows, before torch is used."""
    if "OMP_NUM_THREADS" not in os.environ and num_cpus() < len(os.sched_getaffinity(0)):
        os.environ["OMP_NUM_THREADS"] = str(num_cpus())
        if "torch" in sys.modules:
            sys.modules["torch"].set_num_threads(num_cpus())


def free_memory_bytes() -> int:
    """Memory that this process can still have, by the machine and by each cgroup it is in.

    The page cache counts as free, since it gives way.
    """
    text = (PROC / "meminfo").read_text(encoding="ascii")
    found = re.search(r"^MemAvailable:\s+([0-9]+) kB", text, re.MULTILINE)
    machine_bytes = int(found[1]) * 1024 if found else UNLIMITED_BYTES
    left = [_memory_left(folder) for folder in _cgroups("memory")]
    return min([machine_bytes, *(num_bytes for num_bytes in left if num_bytes is not None)])


def _cgroups(controller: str) -> list[Path]:
    """The folders of this process's cgroups, of versions 1 and 2, from its own up to the root."""
    folders: list[Path] = []
    for line in _text(PROC / "self" / "cgroup").splitlines():
        number, names, path = line.split(":", 2)
        if controller in names.split(","):
            mounts = [CGROUP / controller, CGROUP / names]
        elif number == "0" and not names:
            mounts = [CGROUP, CGROUP / "unified"]
        else:
            continue
        mount = next((mount for mount in mounts if mount.is_dir()), None)
        if mount is None:
            continue
        own = mount / path.strip("/")
        # A container sees its own cgroup as the root.
        inside = own if own.is_dir() and ".." not in own.parts else mount
        folders += [inside, *(folder for folder in inside.parents if folder.is_relative_to(mount))]
    return folders


def _quota(folder: Path) -> float | None:
    """Cores that a cgroup's bandwidth comes to; None where it has no limit."""
    quota, _, period = _text(folder / "cpu.max").strip().partition(" ")
    if not quota:
        quota = _text(folder / "cpu.cfs_quota_us").strip()
        period = _text(folder / "cpu.cfs_period_us").strip()
    limited = quota.isdigit() and period.isdigit() and int(period) > 0
    return int(quota) / int(period) if limited else None


def _memory_left(folder: Path) -> int | None:
    """Bytes a cgroup may still take, with what its page cache can drop; None without a limit."""
    for limit_name, used_name, cache_name in (
        ("memory.max", "memory.current", "inactive_file"),
        ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file"),
    ):
        limit = _text(folder / limit_name).strip()
        used = _text(folder / used_name).strip()
        if not (limit.isdigit() and used.isdigit()) or int(limit) >= UNLIMITED_BYTES:
            continue
        dropped = re.search(rf"^{cache_name} ([0-9]+)", _text(folder / "memory.stat"), re.MULTILINE)
        return max(0, int(limit) - int(used) + (int(dropped[1]) if dropped else 0))
    return None


def _text(file: Path) -> str:
    try:
        return file.read_text(encoding="utf-8", errors="replace")
    except OSError:
        return ""
