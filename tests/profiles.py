"""Profiles as `tools/profile run` writes them, generated for tests and the report's benchmark."""

import base64
import string
from dataclasses import asdict
from functools import cache
from typing import Any

import numpy as np

from engine.report import environment

LABELS = (*string.digits, *string.ascii_letters, *string.punctuation)
"""TMNIST's 94 characters."""
PRECISIONS = ("fp32", "bf16")
BATCHES = (64, 128, 256, 512, 1024, 2048)
FACTS = {"name": "NVIDIA H100 80GB HBM3", "power_limit_w": 700.0, "driver": "580.1", "cuda": "13.0"}
RUNGS = (
    "eager fp32",
    "channels-last",
    "ReLU after the pool",
    "bf16",
    "fused optimiser",
    "CUDA graphs",
    "8 steps a graph",
)


def make_profile(
    names: list[str] | None = None, classes: tuple[str, ...] = LABELS, num: int = 50
) -> dict[str, Any]:
    """A ladder, then batch sizes x precisions x ranks; one cell failed, one was not measured."""
    rng = np.random.default_rng(0)
    cells = [_cell(rng, rung, 512, 1, {"step.rung": k}, 1.25**k) for k, rung in enumerate(RUNGS)]
    for precision in PRECISIONS:
        for batch in BATCHES:
            for ranks in (1, 2, 4, 8):
                speed = (1 + (precision == "bf16")) * batch / (batch + 256) * ranks**0.95
                name = f"{precision}, batch {batch}, {ranks} ranks"
                cells.append(_cell(rng, name, batch, ranks, {"step.precision": precision}, speed))
    cells = cells[:num]
    cells[0]["repetitions"][0]["confusion"] = _confusion(rng, classes)
    cells[-1]["repetitions"] = [
        {"seed": 0, "failed": "out of memory: 80 GiB", "environment": {}, "notes": []}
    ]
    cells[-2] |= {"repetitions": [], "not_measured": "needs 8 GPUs, there is 1"}
    cells[-2]["published"] = {
        "samples_per_s": 14321.0,
        "train_s": 88.5,
        "test_accuracy_fraction": 0.941,
    }
    cells[-2]["published"] |= {"gpu": "P100 x 4", "source": "the study, table 2"}
    for number, cell in enumerate(cells):
        cell["id"], cell["name"] = (
            f"c{number:03}",
            names[number % len(names)] if names else cell["name"],
        )
    return {
        "format": 1,
        "title": "Example",
        "command": "python -m tools.profile run example.toml",
        "cells": cells,
    }


def _cell(
    rng: np.random.Generator,
    name: str,
    batch: int,
    ranks: int,
    settings: dict[str, Any],
    speed: float,
) -> dict[str, Any]:
    ladder = "step.rung" in settings
    axes = {"batch": batch, "ranks": ranks} | ({} if ladder else settings)
    repetitions = [_repetition(rng, seed, batch, ranks, speed, settings) for seed in range(3)]
    cell = {
        "id": "",
        "name": name,
        "ladder": ladder,
        "axes": axes,
        "settings": settings,
        "published": None,
    }
    return cell | {"not_measured": "", "repetitions": repetitions}


def _repetition(
    rng: np.random.Generator,
    seed: int,
    batch: int,
    ranks: int,
    speed: float,
    settings: dict[str, Any],
) -> dict[str, Any]:
    rate = float(100_000 * speed * rng.normal(1, 0.02))
    step_ms = batch * ranks / rate * 1000
    stages = {"copy": 0.05, "forward": 0.3, "backward": 0.45, "optimiser": 0.12, "launch gap": 0.08}
    owners = {
        "context": 0.52,
        "model": 0.03,
        "NCCL": 0.31 if ranks > 1 else 0.0,
        "graph pool": batch / 900,
    }
    return {
        "seed": seed,
        "failed": "",
        "environment": _environment(),
        "effective": {"precision": settings.get("step.precision", "fp32"), "feed": "resident"},
        "notes": [],
        "num_ranks": ranks,
        "global_batch": batch * ranks,
        "num_steps": 100,
        "samples_per_s": rate,
        "step_ms": step_ms,
        "step_p10_ms": step_ms * 0.97,
        "step_p90_ms": step_ms * 1.06,
        "data_wait_fraction": 0.004,
        "host_peak_rss_gib": 1.4,
        "torch_peak_gib": 0.2 + batch / 4000,
        "device_used_gib": sum(owners.values()),
        "gpu_utilisation_percent": 91.0,
        "power_w": 410.0,
        "energy_j_per_ksample": 410.0 / rate * 1000,
        "roofline_fraction": 0.61,
        "memory_gib_by_owner": owners,
        "stage_ms": {stage: step_ms * part for stage, part in stages.items()},
        "train_s": 151_904 * 12 / rate,
        "time_to_target_s": 151_904 * 5 / rate,
        "val_accuracy_fraction": 0.948,
        "test_accuracy_fraction": 0.945,
        "epochs": [_epoch(e, rate) for e in range(1, 13)]
        if settings.get("step.rung") is not None
        else [],
        "confusion": None,
    }


@cache
def _environment() -> dict[str, Any]:
    return asdict(environment(num_threads=1, allocator="glibc", gpu=FACTS))


def _epoch(epoch: int, rate: float) -> dict[str, Any]:
    share = 1 - 0.6 * 0.62**epoch
    losses = {"train_loss": 3.0 * 0.6**epoch, "val_loss": 0.2 + 2.9 * 0.6**epoch}
    line = {"epoch": epoch, "train_s": epoch * 151_904 / rate, "samples_per_s": rate} | losses
    return line | {"train_accuracy_fraction": 0.97 * share, "val_accuracy_fraction": 0.95 * share}


def _confusion(rng: np.random.Generator, classes: tuple[str, ...]) -> dict[str, Any]:
    index = {label: number for number, label in enumerate(classes)}
    alike = [
        (index[a], index[b])
        for group in ("O0o", "lI1|")
        for a in group
        for b in group
        if a in index and b in index
    ]
    counts = [[t, r, int(rng.integers(2, 60))] for t, r in alike if t != r]
    counts += [[number, number, int(rng.integers(120, 160))] for number in range(len(classes))]
    wrong = sorted((c for c in counts if c[0] != c[1]), key=lambda c: -c[2])[:24]
    return {
        "classes": list(classes),
        "counts": counts,
        "examples": [_example(rng, t, r) for t, r, _ in wrong],
    }


def _example(rng: np.random.Generator, true: int, read: int) -> dict[str, Any]:
    y, x = np.mgrid[:28, :28] - 13.5
    ring = np.exp(-(((np.hypot(y / 1.3, x) - 6 - rng.normal()) / 1.6) ** 2)) * 255
    pixels = base64.b64encode(ring.astype(np.uint8).tobytes()).decode()
    return {"true": true, "read": read, "height": 28, "width": 28, "pixels": pixels}
