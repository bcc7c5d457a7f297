"""The optimiser and the learning rate, which is a pure function of the step."""

import math
from collections.abc import Collection

import numpy as np
import torch

from engine.config import OptimConfig
from engine.models import Network
from engine.train.flat import FlatAdamW

ONE_CYCLE_START = 1 / 25
"""First learning rate as a part of the highest: OneCycleLR's div_factor in torch."""
ONE_CYCLE_END = 1e-4 / 25
"""Last learning rate as a part of the highest (final_div_factor)."""

BETA1 = 0.9
"""Memory of the gradients: torch's default, which no recipe changes."""


def lr_table(config: OptimConfig, num_steps: int) -> np.ndarray:
    """float32 [num_steps + 1]: the learning rate of every step.

    The spare last entry is read after the last step.
    """
    step = np.arange(num_steps + 1)
    if config.schedule == "constant":
        return np.full(num_steps + 1, config.learning_rate, np.float32)
    warmup = max(1, round(config.warmup_fraction * num_steps))
    rising = ONE_CYCLE_START + (1 - ONE_CYCLE_START) * step / warmup
    progress = np.clip((step - warmup) / max(1, num_steps - warmup), 0, 1)
    falling = 1 - progress
    if config.schedule == "one_cycle":
        falling = ONE_CYCLE_END + (1 - ONE_CYCLE_END) * (1 + np.cos(math.pi * progress)) / 2
    return (config.learning_rate * np.where(step < warmup, rising, falling)).astype(np.float32)


def make_optimizer(
    config: OptimConfig,
    model: Network,
    rate: float | torch.Tensor,
    *,
    capturable: bool,
    flat: bool = False,
    rounded: Collection[str] = (),
) -> torch.optim.Optimizer:
    """Adam or AdamW over two groups: weights with decay; biases, norms and `undecayed` without.

    Args:
        rate: the learning rate; a tensor for a fused or capturable optimiser, so that none is
            baked into a graph.
        flat: AdamW by kernels/adamw.py.
        rounded: names of parameters that get bf16 shadows then.
    """
    decayed, plain = list[torch.Tensor](), list[torch.Tensor]()
    for name, parameter in model.named_parameters():
        is_decayed = parameter.dim() > 1 and name not in model.undecayed
        if parameter.requires_grad:
            (decayed if is_decayed else plain).append(parameter)
    groups = [
        {"params": decayed, "weight_decay": config.weight_decay},
        {"params": plain, "weight_decay": 0.0},
    ]
    if flat:
        chosen = [p for name, p in model.named_parameters() if name in rounded]
        betas = (BETA1, config.beta2)
        return FlatAdamW(groups, rate, betas, capturable=capturable, rounded=chosen)
    kind = torch.optim.AdamW if config.name == "adamw" else torch.optim.Adam
    fused = config.fused or None  # False would turn off torch's foreach, too: 100 launches
    betas = (BETA1, config.beta2)
    return kind(groups, lr=rate, betas=betas, fused=fused, capturable=capturable)
