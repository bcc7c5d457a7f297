"""What wraps the network for several ranks: DDP, or FSDP2 (torch's `fully_shard`).

DDP keeps everything whole on each rank, and adds the gradients up. FSDP keeps of each parameter, of
its gradient and of its moments the rank's part of the rows, as a DTensor, and gathers parameters
for the time they are computed with: 1/R of the memory on R ranks. Gathering before the forward and
scattering the gradients' sums move as many bytes as DDP's all-reduce; gathering again in the
backward half as many more. The sums are in fp32.

A large *block* (an element of an nn.ModuleList or nn.Sequential) is gathered by itself, all else
together, from the forward to the end of the backward. A block is called as a module, and nothing
reads its weights past it.

Between two steps nothing is gathered: the model's parameters are the parts that the optimiser has,
and whoever writes them need not tell FSDP. So an evaluation ends with `let_go`.

It does not decide where FSDP is used: train/available.py does.
"""

import warnings
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from itertools import chain
from typing import Any, cast

import torch
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm as BatchNorm
from torch.nn.parallel import DistributedDataParallel

from engine.config import StepConfig
from engine.errors import UserError
from engine.train.objective import Objective
from engine.world import World

NEVER = 2**31 - 1
BUCKET_CAP_MIB = 32
"""More than the baseline's 1.7 MB of gradients: one all-reduce a step."""
LARGE = 2**19
"""Parameters of a block from which it is gathered by itself: 2 MiB in fp32. Less is little to free,
and each block costs collectives of its own. Not tuned by a measurement."""


def replicated(objective: Objective, device: torch.device) -> DistributedDataParallel:
    """DDP of one all-reduce, whose buffers are Statistics' to make the same."""
    with warnings.catch_warnings():  # torch 2.13's other name for it is not in older ones
        warnings.filterwarnings("ignore", ".*broadcast_buffers", FutureWarning)
        ddp = DistributedDataParallel(
            objective,
            device_ids=[device.index] if device.type == "cuda" else None,
            bucket_cap_mb=BUCKET_CAP_MIB,
            gradient_as_bucket_view=True,
            broadcast_buffers=False,
        )
    ddp._set_ddp_runtime_logging_sample_rate(NEVER)
    return ddp


def shard(objective: Objective, step: StepConfig, world: World) -> None:
    """Leave of each parameter this rank's part, of rank 0's values; before the optimiser is made.

    Collective. Buffers stay whole, and become rank 0's, too. In bf16 the large blocks are gathered,
    and compute, in bf16 (but for those with BatchNorm, whose statistics are fp32); all else is
    gathered in fp32 and cast by autocast, as under DDP. In fp8 all is: it rounds fp32 weights.

    Raises:
        UserError: a parameter is a single number, or is not fp32.
    """
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard, register_fsdp_forward_method

    for name, parameter in objective.model.named_parameters():
        _check(name, parameter)
        parameter.data = parameter.data.contiguous()  # parts of rows: NHWC is refused by torch
    for tensor in chain(objective.parameters(), objective.buffers()):
        world.copy_from_first(tensor)
    # Always a mesh: without one torch takes the GPU where it sees one, whatever device is ours.
    mesh = init_device_mesh(world.device.type, (world.size,))
    again = step.reshard_after_forward
    for block in large_blocks(objective.model):
        policy = _policy(block, step.precision)
        fully_shard(block, mesh=mesh, reshard_after_forward=again, mp_policy=policy)
    # What is left is needed first in the backward; and freed, it could not be captured in a graph.
    fully_shard(objective, mesh=mesh, reshard_after_forward=False)
    register_fsdp_forward_method(objective, "logits")


def large_blocks(model: nn.Module) -> list[nn.Module]:
    """The outermost elements of lists of modules that have LARGE parameters or more."""
    found: list[nn.Module] = []
    for module in model.children():
        if isinstance(module, (nn.ModuleList, nn.Sequential)):
            found += [block for block in module if _num_parameters(block) >= LARGE]
        else:
            found += large_blocks(module)
    return found


def apart(net: nn.Module) -> AbstractContextManager[object]:
    """No sum over the ranks after the backwards in it: gradients stay with this rank."""
    if isinstance(net, DistributedDataParallel):
        return net.no_sync()
    return _unreduced(net) if is_sharded(net) else nullcontext()


@contextmanager
def _unreduced(net: Any) -> Iterator[None]:
    net.set_requires_gradient_sync(False)
    try:
        yield
    finally:
        net.set_requires_gradient_sync(True)


def is_sharded(net: nn.Module) -> bool:
    """Whether `shard` was called with it."""
    return hasattr(net, "set_requires_gradient_sync")  # torch's FSDP is not imported to ask


def let_go(net: nn.Module) -> None:
    """Free what a forward without a backward left gathered."""
    if is_sharded(net):
        for module in net.modules():
            if is_sharded(module):
                cast(Any, module).reshard()


def can_recover() -> bool:
    """Whether this torch has what `recover` takes."""
    from torch.distributed.fsdp import FSDPModule

    return hasattr(FSDPModule, "reset_iter_state")


def recover(net: nn.Module) -> None:
    """Make a sharded net ready for a step, after one that failed in its middle."""
    cast(Any, net).reset_iter_state()


def own_part(tensor: torch.Tensor) -> torch.Tensor:
    """What this rank holds of it, in the same memory: its rows, or all where it is whole."""
    if not hasattr(tensor, "to_local"):
        return tensor
    part: Any = tensor.detach()
    return cast(torch.Tensor, part.to_local())


def whole(tensor: torch.Tensor) -> torch.Tensor:
    """The tensor itself, or gathered from all ranks' parts: then collective."""
    if not hasattr(tensor, "full_tensor"):
        return tensor
    part: Any = tensor.detach()
    return cast(torch.Tensor, part.full_tensor())


@torch.no_grad()
def put(live: torch.Tensor, values: torch.Tensor) -> None:
    """Copy this rank's part of a whole tensor into the live one; nothing is exchanged."""
    if hasattr(live, "full_tensor"):
        from torch.distributed.tensor import distribute_tensor

        place: Any = live
        values = values.to(place.device)
        mesh, places = place.device_mesh, place.placements
        values = distribute_tensor(values, mesh, places, src_data_rank=None).to_local()
    own_part(live).copy_(values)


def _check(name: str, parameter: nn.Parameter) -> None:
    remedy = "use --parallel ddp"
    if parameter.dim() == 0:
        what = f"the network's parameter {name} is a single number, which has no rows to divide"
        raise UserError(f"--parallel fsdp: {what}; make it of shape [1], or {remedy}")
    if parameter.dtype != torch.float32:
        what = f"the network's parameter {name} is {str(parameter.dtype).removeprefix('torch.')}"
        raise UserError(f"--parallel fsdp: {what}; make it float32, or {remedy}")


def _policy(block: nn.Module, precision: str) -> Any:
    """Parameters and inputs in bf16 and sums of gradients in fp32, or all as they are."""
    from torch.distributed.fsdp import MixedPrecisionPolicy

    has_norm = any(isinstance(module, BatchNorm) for module in block.modules())
    if precision != "bf16" or has_norm:
        return MixedPrecisionPolicy()
    return MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)


def _num_parameters(module: nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())
