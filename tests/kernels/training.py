"""Some steps of training, plain or with every kernel, for the proof that both are the same."""

from dataclasses import dataclass

import numpy as np
import torch

from engine.config import RunConfig, override
from engine.data.records import Split
from engine.feeds.resident import ResidentFeed
from engine.feeds.synthetic import random_batch
from engine.models import make_model
from engine.order import Order
from engine.train.step import TrainStep
from engine.world import World

BATCH, STEPS, CLASSES, SIDE = 6, 6, 5, 16


@dataclass(frozen=True)
class Trained:
    loss_S: np.ndarray
    accuracy: float
    start: dict[str, torch.Tensor]
    parameters: dict[str, torch.Tensor]


def train(precision: str, names: str | tuple[str, ...]) -> Trained:
    """The same 6 steps, two in a launch, on drawn bars, from the same weights."""
    settings = {
        "step.precision": precision,
        "step.steps_per_launch": 2,
        "kernels": names,
        "global_batch": BATCH,
        "optim.learning_rate": 4e-3,
        "optim.schedule": "constant",
        "epochs": 1,
    }
    config = override(RunConfig(), settings, "proof")
    rng = np.random.default_rng(0)
    label_N = rng.integers(0, CLASSES, STEPS * BATCH, dtype=np.uint8)
    image_NHW = rng.integers(0, 45, (len(label_N), SIDE, SIDE), dtype=np.uint8)
    for image_HW, label in zip(image_NHW, label_N, strict=True):
        image_HW[3 * label : 3 * label + 3, 2:14] += 150
    split = Split(image_NHW=image_NHW, label_N=label_N, font_N=np.zeros(len(label_N), np.int32))
    order = Order(num_samples=len(label_N), global_batch=BATCH, seed=1)
    cpu = torch.device("cpu")
    fused = frozenset(config.kernels)
    model = make_model(config.model, SIDE, SIDE, CLASSES, seed=1, fused=fused)
    start = parameters(model)
    source = ResidentFeed(split, order, cpu, fused)
    static = random_batch(BATCH, (SIDE, SIDE), CLASSES, cpu, copies=2)
    world = World(rank=0, size=1, device=cpu, stream=None)
    step = TrainStep(model, config, order, static, world, source)
    for _ in step.train_epoch(source, 0):
        pass
    log = step.read_training()
    return Trained(log.loss_S, log.accuracy, start, parameters(model))


def parameters(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    return {name: p.detach().clone() for name, p in model.named_parameters()}
