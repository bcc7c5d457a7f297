"""One measurement in processes of its own, so that no side of a comparison inherits the other's heap."""

import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

from engine.report import ROOT, Environment


def samples_per_s(
    config: str, *, batch_size: int, num_steps: int, num_ranks: int = 1, num_threads: int | None = None
) -> tuple[float, Environment]:
    """Throughput of bench_configs/`config`.toml over all ranks, by torchrun of tools.profile on the CPU."""
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={num_ranks}"]
        command += ["-m", "tools.profile", "run", str(ROOT / "bench_configs" / f"{config}.toml"), "--device=cpu"]
        command += [f"--steps={num_steps}", f"--batch-size={batch_size}", f"--out={folder}"]
        threads = {"OMP_NUM_THREADS": str(num_threads)} if num_threads else {}
        subprocess.run(command, cwd=ROOT, env=os.environ | threads, check=True, capture_output=True, timeout=300)
        profile = json.loads((Path(folder) / "profile.json").read_text())
    return profile["rows"][0]["samples_per_s"], Environment(**profile["environment"])
