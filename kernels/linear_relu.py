"""relu(x weight' + bias) in one launch of the library's: bias and ReLU in the product's epilogue.

On a GPU `torch._addmm_activation` is cuBLASLt's product with that epilogue; it has no derivative of
its own. Backward passes the gradient where the result is above 0, then makes the products of any
linear layer and sums up the bias's gradient. The first and the last are left out where
linear_cross_entropy, given this layer's bias, does so.

It needs no Triton and is no kernel of this project; it comes with linear_cross_entropy.

Shapes: B samples, D numbers in, E numbers out.
"""

from typing import Any

import torch


class _LinearReLU(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x_BD: torch.Tensor,
        weight_ED: torch.Tensor,
        bias_E: torch.Tensor,
        masked: bool,
    ) -> torch.Tensor:
        y_BE = torch._addmm_activation(bias_E, x_BD, weight_ED.t())
        ctx.save_for_backward(x_BD, weight_ED, y_BE)
        ctx.masked = masked
        return y_BE

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        x_BD, weight_ED, y_BE = ctx.saved_tensors
        live_BE = grads[0]
        if not ctx.masked:
            live_BE = torch.ops.aten.threshold_backward(live_BE, y_BE, 0)
        wants_x, wants_weight, wants_bias, _ = ctx.needs_input_grad
        return (
            live_BE @ weight_ED if wants_x else None,
            live_BE.t() @ x_BD if wants_weight else None,
            live_BE.sum(0) if wants_bias else None,
            None,
        )


def linear_relu(
    x_BD: torch.Tensor, weight_ED: torch.Tensor, bias_E: torch.Tensor, masked: bool = False
) -> torch.Tensor:
    """relu(linear(x, weight, bias)) [B, E], differentiable in all three; in autocast's type.

    Equal to PyTorch's linear and relu to the bit on a CPU, forward and gradients.

    Args:
        masked: linear_cross_entropy has the bias as its `relu_bias`. The gradient is then 0
            wherever the result is not above 0, and is taken as it comes; the bias gets none here.
    """
    if masked:
        bias_E = bias_E.detach()
    device = x_BD.device.type
    if torch.is_autocast_enabled(device):
        dtype = torch.get_autocast_dtype(device)
        x_BD, weight_ED, bias_E = x_BD.to(dtype), weight_ED.to(dtype), bias_E.to(dtype)
    y_BE: torch.Tensor = _LinearReLU.apply(x_BD, weight_ED, bias_E, masked)
    return y_BE
