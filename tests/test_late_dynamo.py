"""torch._dynamo is imported when it is needed: not by training, and whole by who compiles.

Each in a process of its own, since an import is for good.
"""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from engine.host import ROOT

EAGER = """
import sys, torch
from torch import distributed
from torch.nn.parallel import DistributedDataParallel
from engine import late_dynamo

late_dynamo.import_late()

@torch.library.custom_op("late::double", mutates_args=())
def double(x: torch.Tensor) -> torch.Tensor:
    return 2 * x

double.register_fake(torch.empty_like)

@torch._disable_dynamo
def kept_out(x):
    return x + (0 if torch.compiler.is_compiling() else 1)

distributed.init_process_group("gloo", store=distributed.HashStore(), rank=0, world_size=1)
net = DistributedDataParallel(torch.nn.Linear(3, 3))
optimizer = torch.optim.AdamW(net.parameters())

def step(net):
    kept_out(double(net(torch.ones(2, 3)).sum().detach()))
    net(torch.ones(2, 3)).sum().backward()
    optimizer.step()
    optimizer.zero_grad()

step(net)
distributed.destroy_process_group()
distributed.init_process_group("gloo", store=distributed.HashStore(), rank=0, world_size=1)
stand_in = sys.modules["torch._dynamo"]
ddp_mode = stand_in.utils.get_optimize_ddp_mode()
assert not late_dynamo.is_loaded()
"""
"""A step as users write it, with all that asks for torch._dynamo."""
COMPILED = """
traced = []

def backend(graph, inputs):
    traced.append(graph)
    return graph

compiled = torch.compile(lambda x: kept_out(double(x)), backend=backend)
assert compiled(torch.ones(2)).tolist() == [3, 3] and len(traced) == 1
"""
WHOLE = """
assert late_dynamo.is_loaded() and late_dynamo.load() is torch._dynamo is not stand_in
import torch._dynamo.config
import torch._dynamo.eval_frame
assert torch._dynamo.config is sys.modules["torch._dynamo.config"]
assert torch._dynamo.eval_frame.config is torch._dynamo.config, "two of one module"
assert torch._dynamo.config.__spec__.name == "torch._dynamo.config"
for module in (torch._dynamo.config, torch._dynamo):
    assert type(module.__spec__.loader).__module__ != "engine.late_dynamo"
assert torch._dynamo.utils.get_optimize_ddp_mode() == ddp_mode
assert stand_in.trace_rules is torch._dynamo.trace_rules
net = DistributedDataParallel(torch.nn.Linear(3, 3))
optimizer = torch.optim.AdamW(net.parameters())
step(net)
"""


def run(code: str, *words: str) -> None:
    """Run Python in a process of its own, which must end well."""
    done = subprocess.run(
        [sys.executable, "-c", code, *words],
        cwd=ROOT,
        env=os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.parametrize("way", [COMPILED, "import torch._dynamo.backends.common"])
def test_a_step_needs_no_compiler_and_who_wants_it_gets_it_whole(way: str) -> None:
    run(EAGER + way + WHOLE)


def test_a_run_on_a_cpu_imports_no_compiler(small_dir: Path, tmp_path: Path) -> None:
    code = (
        "import sys\n"
        "from engine.run import main\n"
        "try:\n    main(prog_name='engine.run')\n"
        "except SystemExit as end:\n    assert not end.code\n"
        "assert 'torch' in sys.modules and 'sympy' not in sys.modules\n"
        "from engine.late_dynamo import is_loaded\n"
        "assert not is_loaded()\n"
    )
    words = ["--data", small_dir, "--batch-size", 32, "--epochs", 1, "--device", "cpu"]
    run(code, *map(str, [*words, "--out", tmp_path / "run"]))
