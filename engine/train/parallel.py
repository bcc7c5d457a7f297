"""What wraps the network for several ranks: DDP.

It does not decide on what: the step hands over the objective, from the batch to the loss.
"""

import warnings

import torch
from torch.nn.parallel import DistributedDataParallel

from engine.train.objective import Objective

NEVER = 2**31 - 1
BUCKET_CAP_MIB = 32
"""More than the baseline's 1.7 MB of gradients: one all-reduce a step."""


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
