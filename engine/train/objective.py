"""From uint8 images and labels to the loss.

Shapes: B samples, H x W pixels, C classes.
"""

import torch
from torch.func import functional_call
from torch.nn import functional

from engine.config import RunConfig
from engine.models import Network

_AUTOCAST = {"bf16": torch.bfloat16, "fp16": torch.float16}


class Objective(torch.nn.Module):
    """From uint8 images and labels to (mean loss, right answers).

    What DDP wraps, torch.compile compiles, and kernels/ shorten.
    """

    def __init__(self, model: Network, config: RunConfig, device: torch.device) -> None:
        super().__init__()
        self.model = model
        self.rounded: dict[str, torch.Tensor] = {}
        """By name, what the network computes with instead of its parameters."""
        self._smoothing = config.optim.label_smoothing
        self._fused_loss = "softmax_cross_entropy" in config.kernels
        self._device_type, self._dtype = device.type, _AUTOCAST.get(config.step.precision)

    def forward(
        self, image_BHW: torch.Tensor, label_B: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        if self._fused_loss:
            from kernels.softmax_cross_entropy import softmax_cross_entropy

            return softmax_cross_entropy(self._raw_logits(image_BHW), label_B, self._smoothing)
        logits_BC, target_B = self._raw_logits(image_BHW).float(), label_B.long()
        loss = functional.cross_entropy(logits_BC, target_B, label_smoothing=self._smoothing)
        return loss, (logits_BC.detach().argmax(1) == target_B).sum()

    def logits(self, image_BHW: torch.Tensor) -> torch.Tensor:
        """fp32 logits_BC of evaluation: BatchNorm goes by its running statistics."""
        was_training = self.model.training
        self.model.train(False)
        try:
            return self._raw_logits(image_BHW).float()
        finally:
            self.model.train(was_training)

    def _raw_logits(self, image_BHW: torch.Tensor) -> torch.Tensor:
        with torch.autocast(
            self._device_type, self._dtype or torch.bfloat16, enabled=self._dtype is not None
        ):
            logits_BC: torch.Tensor
            if self.rounded:
                logits_BC = functional_call(self.model, self.rounded, (image_BHW,))
            else:
                logits_BC = self.model(image_BHW)
        return logits_BC


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
            "step of this process; call use_precision() before going on with this one"
        )
