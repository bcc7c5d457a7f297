"""From uint8 images and labels to the loss.

Shapes: B samples, H x W pixels, C classes.
"""

from operator import attrgetter

import torch
from torch.func import functional_call
from torch.nn import functional

from engine.config import RunConfig
from engine.models import HeadNetwork, Network
from engine.train.precision import AUTOCAST


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
        self._fused_head = "linear_cross_entropy" in config.kernels
        self._device_type, self._dtype = device.type, AUTOCAST.get(config.step.precision)

    def forward(
        self, image_BHW: torch.Tensor, label_B: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        if self._fused_head:
            return self._head_loss(image_BHW, label_B)
        if self._fused_loss:
            from kernels.softmax_cross_entropy import softmax_cross_entropy

            return softmax_cross_entropy(self._raw_logits(image_BHW), label_B, self._smoothing)
        logits_BC, target_B = self._raw_logits(image_BHW).float(), label_B.long()
        loss = functional.cross_entropy(logits_BC, target_B, label_smoothing=self._smoothing)
        return loss, (logits_BC.detach().argmax(1) == target_B).sum()

    def _head_loss(
        self, image_BHW: torch.Tensor, label_B: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """The last layer and the loss in one kernel: there are no logits."""
        from kernels.linear_cross_entropy import linear_cross_entropy

        assert isinstance(self.model, HeadNetwork), "train/available.py asks its `kernels`"
        rounded = {f"model.{name}": tensor for name, tensor in self.rounded.items()}
        with self._autocast():
            hidden_BD = functional_call(_Hidden(self.model), rounded, (image_BHW,))
        hidden_BD = hidden_BD.to(self._dtype or hidden_BD.dtype)
        last = self.model.last_layer
        return linear_cross_entropy(
            hidden_BD, last.weight, last.bias, label_B, self._smoothing, self._relu_bias()
        )

    def _relu_bias(self) -> torch.Tensor | None:
        """The bias whose gradient the head makes, as the network computes with it; None: none."""
        assert isinstance(self.model, HeadNetwork)
        name = self.model.relu_bias
        if not name:
            return None
        given: torch.Tensor = self.rounded.get(name, attrgetter(name)(self.model))
        return given

    def logits(self, image_BHW: torch.Tensor) -> torch.Tensor:
        """fp32 logits_BC of evaluation: BatchNorm goes by its running statistics."""
        was_training = self.model.training
        self.model.train(False)
        try:
            return self._raw_logits(image_BHW).float()
        finally:
            self.model.train(was_training)

    def _raw_logits(self, image_BHW: torch.Tensor) -> torch.Tensor:
        with self._autocast():
            logits_BC: torch.Tensor
            if self.rounded:
                logits_BC = functional_call(self.model, self.rounded, (image_BHW,))
            else:
                logits_BC = self.model(image_BHW)
        return logits_BC

    def _autocast(self) -> torch.autocast:
        is_on = self._dtype is not None
        return torch.autocast(self._device_type, self._dtype or torch.bfloat16, enabled=is_on)


class _Hidden(torch.nn.Module):
    """`hidden` as a module's `forward`, which is what can be called with other parameters."""

    def __init__(self, model: HeadNetwork) -> None:
        super().__init__()
        self.model = model

    def forward(self, image_BHW: torch.Tensor) -> torch.Tensor:
        return self.model.hidden(image_BHW)
