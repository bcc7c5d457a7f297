"""The fast step as a bare loop of PyTorch's operations: what the engine's overhead is measured against.

python -m tests.bench.minimal BATCH STEPS prints the samples/s. The operations are those of `rung_bf16`: gather by id
from uint8 images, scale to 0..1, channels-last, bf16 autocast, cross entropy with smoothing, fused AdamW. What the
engine adds: the order's ids, the table of rates, right answers, the check of gradients, the log.
"""

import sys
import time

import torch
from torch.nn import functional

from engine.config import ModelConfig
from engine.model import make_model
from engine.records import open_records
from engine.sample import ensure_sample
from engine.world import World, keep_large_blocks

UNTIMED = 8
"""Steps before the clock: as many as the engine's warm-up and its benchmark do."""


def main(batch_size: int, num_steps: int) -> float:
    """Samples/s of `num_steps` steps on the packaged sample."""
    keep_large_blocks()
    world = World(rank=0, size=1, device=torch.device("cpu"), stream=None)
    records = open_records(ensure_sample(world))
    train = records.split("train")
    image_NHW, label_N = torch.from_numpy(train.image_NHW), torch.from_numpy(train.label_N)
    model = make_model(ModelConfig(), 28, 28, len(records.classes), seed=42).to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01, fused=True)
    shuffled = torch.randperm(len(train)).repeat(1 + (UNTIMED + num_steps) * batch_size // len(train))
    for step in range(UNTIMED + num_steps):
        if step == UNTIMED:
            start = time.perf_counter()
        id_B = shuffled[step * batch_size : (step + 1) * batch_size]
        image_B1HW = image_NHW.index_select(0, id_B).unsqueeze(1).to(torch.float32).mul_(1 / 255)
        optimizer.zero_grad(set_to_none=True)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            logits_BC = model(image_B1HW.contiguous(memory_format=torch.channels_last))
        label_B = label_N.index_select(0, id_B).long()
        functional.cross_entropy(logits_BC.float(), label_B, label_smoothing=0.05).backward()
        optimizer.step()
    return num_steps * batch_size / (time.perf_counter() - start)


if __name__ == "__main__":
    print(main(int(sys.argv[1]), int(sys.argv[2])))
