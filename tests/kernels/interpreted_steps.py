"""Whole training steps by the kernels in Triton's interpreter, against plain ones.

Run by TRITON_INTERPRET=1 pytest tests/kernels/interpreted_steps.py.
"""

import pytest

from kernels import adamw as optimiser
from kernels import conv2_pool_relu as whole
from tests.kernels.interpreting import poisoned_and_recorded

__all__ = ["poisoned_and_recorded"]  # a fixture of every test

NEW = "gather_warp,conv_pool_relu,conv2_pool_relu,linear_cross_entropy"
"""The second layer and the head by the kernels that `all` leaves out."""


@pytest.mark.parametrize("precision, names", [("fp32", "all"), ("fp16", "all"), ("fp32", NEW)])
def test_a_training_step_with_kernels_is_the_plain_step(
    precision: str, names: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """6 steps of 6 samples, fp16 by autocast on the CPU; 2 a launch: gather_warp gathers.

    conv2_pool_relu and adamw take all at once, for speed; the former takes half a minute all the
    same, so its steps are in fp32 alone.
    """
    from tests.kernels.training import train

    monkeypatch.setattr(optimiser, "BLOCK", 2**17)
    for blocks in ("FORWARD", "INPUT_BACKWARD", "WEIGHT_BACKWARD"):
        monkeypatch.setattr(whole, blocks, whole.Blocks(512, 32, 64))
        monkeypatch.setattr(whole, f"{blocks}_FP32", whole.Blocks(512, 32, 64))
    plain = train(precision, "off")
    fused = train(precision, names)
    tight = precision == "fp32"
    assert fused.loss_S == pytest.approx(plain.loss_S, rel=1e-5 if tight else 2e-2)
    falls = plain.loss_S[-2:].mean() < 0.75 * plain.loss_S[:2].mean()
    assert falls, "the loss must fall, or equality shows nothing"
    for name, wanted in plain.parameters.items():
        distance = (fused.parameters[name] - wanted).norm() / (wanted - plain.start[name]).norm()
        assert distance < (1e-3 if tight else 0.2), f"{name}: {distance:.1e} of the way it went"
    assert fused.accuracy == pytest.approx(plain.accuracy, abs=0 if tight else 0.05)
