"""The gradient's noise scale: a case with a known answer, and what the step measures of it."""

from typing import Any

import numpy as np
import pytest
import torch

from engine.config import RunConfig, override
from engine.data.records import Records
from engine.errors import UserError
from engine.train.noise import NoiseScale
from engine.train.session import Session, open_session
from engine.world import World

CONFIG = RunConfig(global_batch=32, epochs=1, seed=3)


def quadratic_norms(num_steps: int, small: int, batch: int) -> np.ndarray:
    """norm_2S of gradients g + noise / sqrt(batch) in 64 dimensions: S / G2 is 400 samples."""
    rng = np.random.default_rng(1)
    gradient_P = np.full(64, 0.25)  # G2 = 4
    deviation = np.sqrt(1600 / 64)  # S = 1600
    noise_SBP = rng.normal(0, deviation, (num_steps, batch // small, 64)) / np.sqrt(small)
    parts = gradient_P + noise_SBP
    return np.stack([(parts[:, 0] ** 2).sum(-1), (parts.mean(1) ** 2).sum(-1)])


def test_the_critical_batch_of_a_quadratic_with_gaussian_noise_is_found() -> None:
    norm_2S = quadratic_norms(20_000, small=64, batch=256)
    found = NoiseScale().after(norm_2S[:, :10_000], 64, 256)
    estimates = []
    for step in range(10_000, 20_000):  # the moving average wanders about the true value
        found = found.after(norm_2S[:, step : step + 1], 64, 256)
        estimates.append((found.gradient_variance, found.gradient_squared_norm))
    variance, squared_norm = np.mean(estimates, axis=0)
    assert variance == pytest.approx(1600, rel=0.1)
    assert squared_norm == pytest.approx(4, rel=0.1)
    assert variance / squared_norm == pytest.approx(400, rel=0.1)
    assert found.critical_batch == pytest.approx(400, rel=0.5)


def test_the_estimate_is_debiased_and_does_not_depend_on_when_the_log_was_read() -> None:
    norm_2S = np.array([[5.0] * 7, [3.0] * 7])  # b = 8, B = 32: S = 64/3, G2 = 7/3
    whole = NoiseScale().after(norm_2S, 8, 32)
    parts = NoiseScale().after(norm_2S[:, :3], 8, 32).after(norm_2S[:, 3:], 8, 32)
    assert whole == parts
    assert whole.gradient_variance == pytest.approx(64 / 3)
    assert whole.gradient_squared_norm == pytest.approx(7 / 3)
    assert whole.critical_batch == pytest.approx(64 / 7)
    overflowed = np.array([[np.inf, 5.0], [3.0, np.nan]])
    assert whole.after(overflowed, 8, 32) == whole
    assert NoiseScale().critical_batch is None
    assert NoiseScale().after(np.array([[5.0], [1.0]]), 8, 32).critical_batch is None  # G2 < 0


def opened(records: Records, world: World, **changed: Any) -> Session:
    settings = {name.replace("__", "."): value for name, value in changed.items()}
    return open_session(override(CONFIG, settings, "test"), records, world)


def gradient_norm(session: Session, image_BHW: torch.Tensor, label_B: torch.Tensor) -> float:
    """Squared, of the mean loss, as autograd alone has it."""
    loss, _ = session.step.objective(image_BHW, label_B)
    parameters = [p for p in session.step.model.parameters() if p.requires_grad]
    return float(sum(g.double().square().sum() for g in torch.autograd.grad(loss, parameters)))


@pytest.mark.parametrize("canonical", [0, 4])
def test_the_step_logs_the_norms_of_a_part_and_of_the_whole(
    canonical: int, small: Records, world: World
) -> None:
    session = opened(small, world, step__noise_scale=True, step__canonical=canonical)
    note = "a batch is computed in 2 parts: the noise scale is measured by a part of the batch"
    assert (note in session.notes) == (not canonical)
    batch = next(session.feed.batches(0))
    size = session.step.part_samples
    assert size == (8 if canonical else 16)
    parts = [batch.rows(first, first + size) for first in range(0, 32, size)]
    norms = [gradient_norm(session, part.image_BHW, part.label_B) for part in parts]
    whole = gradient_norm(session, batch.image_BHW, batch.label_B)
    session.step.train(batch)
    found = session.step.read_training().norm_2S
    session.close()
    wanted = np.mean(norms) if canonical else norms[0]
    assert found[:, 0] == pytest.approx([wanted, whole], rel=1e-4)


def test_measuring_changes_no_bit_of_the_training(small: Records, world: World) -> None:
    weights = []
    for measured in (True, False):
        session = opened(
            small,
            world,
            step__noise_scale=measured,
            step__accumulate=2,
            step__steps_per_launch=3,
        )
        for _ in session.step.train_epoch(session.feed, 0):
            pass
        log = session.step.read_training()
        assert log.norm_2S.shape == (2, 7 if measured else 0)
        weights.append([*session.step.model.state_dict().values(), torch.from_numpy(log.loss_S)])
        session.close()
    assert all(torch.equal(a, b) for a, b in zip(*weights, strict=True))


def test_a_batch_without_parts_is_refused(small: Records, world: World) -> None:
    with pytest.raises(UserError, match=r"batch of 5 .* give an even --batch-size"):
        opened(small, world, step__noise_scale=True, global_batch=5)
    with pytest.raises(UserError, match="give --canonical of more"):
        opened(small, world, step__noise_scale=True, step__canonical=1)
