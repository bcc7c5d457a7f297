"""The arithmetic of forward and backward, by the config's `step.precision`."""

import torch

AUTOCAST = {"bf16": torch.bfloat16, "fp16": torch.float16}
"""By precision, the type of what autocast rounds; fp32 and tf32 have none."""
