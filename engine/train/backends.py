"""Switches of torch's libraries that hold for a whole process: precision, cuDNN, dynamo, inductor.

A step sets all of them when it is made and again when its turn comes, so that steps of several
configurations may share a process. What a machine does not support of them available.py has taken
back before.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch

from engine import late_dynamo
from engine.config import StepConfig

CONV_BACKWARD = ("max_autotune_conv_bwd_weight_backends", "max_autotune_conv_bwd_input_backends")
"""Of torch._inductor.config, since torch 2.13."""


def use_backends(step: StepConfig) -> None:
    """Make the process what the step's config says."""
    set_fp32_precision(step.precision)
    torch.backends.cudnn.benchmark = step.cudnn_benchmark
    if step.compile != "off":
        from torch._dynamo import config

        config.optimize_ddp = step.split_under_ddp


@contextmanager
def backends_kept() -> Iterator[None]:
    """Put back at the end what a session's steps make of cuDNN and of dynamo.

    Not the precision: `set_fp32_precision` is called wherever it matters.
    """
    cudnn_benchmark = torch.backends.cudnn.benchmark
    optimize_ddp = torch._dynamo.config.optimize_ddp if late_dynamo.is_loaded() else True
    try:
        yield
    finally:
        torch.backends.cudnn.benchmark = cudnn_benchmark
        if late_dynamo.is_loaded():
            torch._dynamo.config.optimize_ddp = optimize_ddp


def set_fp32_precision(precision: str) -> None:
    """What fp32 is on this process's GPU: IEEE's, or TF32 in convolutions and products.

    By the older switches, since they set the `fp32_precision` ones too. Those alone leave the older
    ones behind, and inductor, which reads them, then raises (torch 2.13).
    """
    torch.backends.cuda.matmul.allow_tf32 = precision == "tf32"
    torch.backends.cudnn.allow_tf32 = precision == "tf32"  # torch's default is True


def check_fp32_precision(precision: str) -> None:
    """RuntimeError if fp32 is another now than `set_fp32_precision(precision)` left it."""
    if torch.backends.cuda.matmul.allow_tf32 != (precision == "tf32"):
        raise RuntimeError(
            f"fp32 was set otherwise since this step of precision {precision} was made, by another "
            "step of this process; call use_backends() before going on with this one"
        )


def has_conv_backward() -> bool:
    """Whether this torch's inductor can write convolution gradients in Triton."""
    from torch._inductor import config

    return all(hasattr(config, name) for name in CONV_BACKWARD)


def compile_arguments(step: StepConfig) -> dict[str, Any]:
    """What torch.compile is given: a mode, or that mode's options and those of the switches.

    Never its own graphs: the step is captured as a whole.
    """
    mode = None if step.compile == "default" else f"{step.compile}-no-cudagraphs"
    if not step.triton_conv_backward or not mode:
        return {"mode": mode, "dynamic": False}
    options: dict[str, Any] = dict(torch._inductor.list_mode_options(mode))
    return {"options": options | dict.fromkeys(CONV_BACKWARD, "ATEN,TRITON"), "dynamic": False}
