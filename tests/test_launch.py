"""The files that start several nodes: bash takes them, run dry they start what they should."""

import os
import subprocess
from argparse import Namespace
from pathlib import Path
from typing import Any

import pytest
import yaml
from torch.distributed.run import get_args_parser

from engine.host import ROOT
from tests.test_readmes import check_options

LAUNCH = ROOT / "bench_configs" / "launch"
SCRIPTS = ("torchrun.sh", "slurm.sbatch")
FAKES = {
    "torchrun": 'printf "%s\\n" "$@" > "$LOG.${SLURM_NODEID:-0}"',
    "srun": """while [[ $1 == --* ]]; do echo "$1" >> "$LOG.srun"; shift; done
for node in 0 1; do SLURM_NODEID=$node SLURMD_NODENAME=tall$node "$@"; done
${SRUN_DOES:-:}
exit "${SRUN_CODE:-0}" """,
    "scontrol": """if [[ $1 == show ]]; then printf "tall0\\ntall1\\n"
else echo "$@" > "$LOG.scontrol"; fi""",
}
"""What a cluster has and this machine has not: SLURM's commands, and a torchrun that trains."""


@pytest.fixture
def cluster(tmp_path: Path) -> dict[str, str]:
    """The variables of a job of two nodes on such a cluster; its commands log to LOG."""
    folder = tmp_path / "bin"
    folder.mkdir()
    for name, script in FAKES.items():
        (folder / name).write_text(f"#!/usr/bin/env bash\n{script}\n")
        (folder / name).chmod(0o755)
    job = {"SLURM_JOB_ID": "47", "SLURM_JOB_NODELIST": "tall[0-1]", "SLURM_JOB_NUM_NODES": "2"}
    job["SLURM_CPUS_PER_TASK"] = "32"
    path = {"PATH": f"{folder}:{os.environ['PATH']}", "LOG": str(tmp_path / "log")}
    return os.environ | path | job


def bash(*words: object, variables: dict[str, str] | None = None) -> int:
    folder = Path((variables or {}).get("LOG", "/")).parent
    return subprocess.run(["bash", *map(str, words)], cwd=folder, env=variables).returncode


def parsed(words: list[str]) -> Namespace:
    """A torchrun's command line as its parser takes it; engine.run's as that one's does."""
    found = get_args_parser().parse_args(words)
    assert found.module and found.training_script == "engine.run"
    check_options("engine.run", found.training_script_args)
    return found


def started(variables: dict[str, str], node: int) -> Namespace:
    return parsed(Path(f"{variables['LOG']}.{node}").read_text().splitlines())


def test_every_file_is_known_here() -> None:
    assert {file.name for file in LAUNCH.iterdir()} == {*SCRIPTS, "pytorchjob.yaml"}


@pytest.mark.parametrize("script", SCRIPTS)
def test_bash_takes_the_script(script: str) -> None:
    assert bash("-n", LAUNCH / script) == 0


@pytest.mark.parametrize(("own", "is_host"), [("10.0.0.1", 1), ("10.0.0.2", 0)])
def test_by_hand_only_the_first_node_opens_the_store(
    cluster: dict[str, str], own: str, is_host: int
) -> None:
    words = ("10.0.0.1", own, 3, "--data", "my records", "--epochs", 2)
    assert bash(LAUNCH / "torchrun.sh", *words, variables=cluster) == 0
    found = started(cluster, 0)
    assert (found.nnodes, found.rdzv_backend, found.local_addr) == ("3", "c10d", own)
    assert (found.rdzv_endpoint, found.rdzv_conf) == ("10.0.0.1:29400", f"is_host={is_host}")
    assert found.training_script_args[-4:] == ["--data", "my records", "--epochs", "2"]
    assert bash(LAUNCH / "torchrun.sh", "10.0.0.1", own, variables=cluster) != 0


def test_slurm_starts_every_node_once(cluster: dict[str, str]) -> None:
    assert bash(LAUNCH / "slurm.sbatch", "--data", "my records", variables=cluster) == 0
    for node in (0, 1):
        found = started(cluster, node)
        assert (found.nnodes, found.rdzv_id, found.local_addr) == ("2", "47", f"tall{node}")
        assert (found.rdzv_endpoint, found.rdzv_conf) == ("tall0:20047", f"is_host={1 - node}")
        wanted = ["--out", "runs/slurm-47", "--resume", "auto", "--data", "my records"]
        assert found.training_script_args == wanted
        assert found.max_restarts == 3
    assert not Path(f"{cluster['LOG']}.scontrol").exists()
    options = Path(f"{cluster['LOG']}.srun").read_text().split()
    assert options == ["--cpus-per-task=32", "--kill-on-bad-exit=0", "--wait=0"]
    asked = (LAUNCH / "slurm.sbatch").read_text()
    assert "#SBATCH --signal=TERM@120\n" in asked and "#SBATCH --requeue\n" in asked


@pytest.mark.parametrize("is_saved", [True, False])
def test_slurm_queues_a_job_again_that_was_stopped_and_saved(
    cluster: dict[str, str], is_saved: bool
) -> None:
    out = Path(cluster["LOG"]).parent / "x"
    out.mkdir()
    (out / "preempted").touch()  # of an earlier try, which is not this one's
    saves = f"touch {out}/preempted" if is_saved else ":"
    variables = cluster | {"SRUN_CODE": "143", "RUN_OUT": str(out), "SRUN_DOES": saves}
    assert bash(LAUNCH / "slurm.sbatch", variables=variables) == 143
    log = Path(f"{cluster['LOG']}.scontrol")
    assert log.exists() is is_saved
    assert not is_saved or log.read_text() == "requeue 47\n"


def job() -> dict[str, Any]:
    found: dict[str, Any] = yaml.safe_load((LAUNCH / "pytorchjob.yaml").read_text())
    return found


def test_kubernetes_starts_what_it_should() -> None:
    found = job()
    assert (found["apiVersion"], found["kind"]) == ("kubeflow.org/v1", "PyTorchJob")
    replicas = found["spec"]["pytorchReplicaSpecs"]
    assert set(replicas) == {"Master", "Worker"}
    for each in replicas.values():
        container = each["template"]["spec"]["containers"][0]
        assert container["name"] == "pytorch"  # the operator looks for it
        program, *words = container["command"] + container["args"]
        line = parsed(words)
        assert program == "torchrun" and line.rdzv_backend == "c10d"
        assert line.nnodes == str(sum(each["replicas"] for each in replicas.values()))
        port = container["ports"][0]["containerPort"]
        assert line.rdzv_endpoint == f"{found['metadata']['name']}-master-0:{port}"
        assert line.local_addr == f"$({container['env'][0]['name']})"
        volumes = {each["name"] for each in each["template"]["spec"]["volumes"]}
        assert volumes == {each["name"] for each in container["volumeMounts"]}
