"""`FlatAdamW`: AdamW whose parameters and moments lie in flat buffers, one step in few launches.

The parameters become views of one fp32 buffer, each in a slot of its own of whole 32 bytes, laid
out as it was (NHWC or not), and so do their moments. A step joins the gradients in a buffer of the
same slots and calls kernels/adamw.py, which also finds those that are not finite. Its state has
torch's form, by parameter: a run goes on with torch's optimiser and the other way round.

It makes no bf16 copies of the parameters, and has one learning rate and one decay.

Shapes: P numbers of the flat buffers, T parameters.
"""

from collections.abc import Callable, Iterable
from typing import Any

import torch

from engine.errors import UserError

SLOT = 8
"""Numbers whose whole multiples begin a parameter: 32 bytes in fp32, 16 in bf16."""
EPS = 1e-8
"""torch's."""


class FlatAdamW(torch.optim.Optimizer):
    """torch.optim.AdamW(fused=True, capturable=True), within its rounding.

    Args:
        groups: with "params" (fp32, of one device) and "weight_decay", which is the same in all
            where it is not 0. The parameters are moved.
        rate: the learning rate of all groups; a tensor on the device, or a number.
        capturable: noted in the groups; nothing is read on the host in any case.
    """

    _step_supports_amp_scaling = True
    """GradScaler hands over what it found, and reads nothing on the host."""
    found_inf: torch.Tensor | None = None
    """1 where the next step is not to be done; set by who calls."""

    def __init__(
        self,
        groups: list[dict[str, Any]],
        rate: float | torch.Tensor,
        betas: tuple[float, float],
        *,
        capturable: bool,
    ) -> None:
        torch_ones = {"amsgrad": False, "maximize": False, "foreach": None, "fused": True}
        torch_ones |= {"differentiable": False, "decoupled_weight_decay": True}
        given = {"lr": rate, "betas": betas, "eps": EPS, "capturable": capturable}
        super().__init__(groups, given | torch_ones)
        decays = {group["weight_decay"] for group in self.param_groups} - {0}
        assert len(decays) <= 1, "one decay for all that decay"
        self._decay = max(decays, default=0.0)
        ordered = sorted(self.param_groups, key=lambda group: group["weight_decay"] == 0)
        self._parameters = [p for group in ordered for p in group["params"]]
        num_decayed = sum(len(group["params"]) for group in ordered if group["weight_decay"])
        self._sizes = [-(-p.numel() // SLOT) * SLOT for p in self._parameters]
        self._num_decayed = sum(self._sizes[:num_decayed])
        self._make_buffers()
        self._move_parameters()

    def _make_buffers(self) -> None:
        like = self._parameters[0]
        assert all((p.dtype, p.device) == (torch.float32, like.device) for p in self._parameters)
        size = sum(self._sizes)
        self._param_P = like.new_zeros(size, requires_grad=False)
        self._exp_avg_P = torch.zeros_like(self._param_P)
        self._exp_avg_sq_P = torch.zeros_like(self._param_P)
        self._grad_P = torch.zeros_like(self._param_P)
        self._step_T = self._param_P.new_zeros(len(self._parameters))
        self._rate, self._bad = self._param_P.new_zeros(2)
        self._scalars_4 = self._param_P.new_zeros(4)
        self._gaps = [
            self._param_P.new_zeros(size - p.numel())
            for p, size in zip(self._parameters, self._sizes, strict=True)
        ]

    @torch.no_grad()
    def _move_parameters(self) -> None:
        params, exp_avgs, exp_avg_sqs = (
            self._views(flat_P) for flat_P in (self._param_P, self._exp_avg_P, self._exp_avg_sq_P)
        )
        self._kept: dict[torch.Tensor, dict[str, torch.Tensor]] = {}
        """What `state` holds of each parameter: views, whatever is loaded."""
        for number, parameter in enumerate(self._parameters):
            params[number].copy_(parameter)
            parameter.data = params[number]
            self._kept[parameter] = {
                "step": self._step_T[number],
                "exp_avg": exp_avgs[number],
                "exp_avg_sq": exp_avg_sqs[number],
            }
            self.state[parameter] = self._kept[parameter]

    def _views(self, flat_P: torch.Tensor) -> list[torch.Tensor]:
        """Each parameter's slot, in its shape and layout."""
        slots = flat_P.split(self._sizes)
        return [
            slot.as_strided(p.shape, torch.empty_like(p, device="meta").stride())
            for slot, p in zip(slots, self._parameters, strict=True)
        ]

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> None:  # type: ignore[override]
        """One step; none where `found_inf`, set from outside, is not 0 or a gradient not finite.

        Then `found_inf` becomes 1.

        Raises:
            UserError: a parameter has no gradient.
        """
        from kernels.adamw import Flat, Rates, adamw

        assert closure is None and getattr(self, "grad_scale", None) is None, "unscale first"
        bad = self._bad.zero_() if self.found_inf is None else self.found_inf
        group = self.param_groups[0]
        rate = group["lr"]
        if not isinstance(rate, torch.Tensor):
            rate = self._rate.fill_(rate)
        torch.cat(list(self._gradients()), out=self._grad_P)
        buffers = (self._param_P, self._exp_avg_P, self._exp_avg_sq_P, self._grad_P)
        on_device = (rate, self._step_T, bad, self._scalars_4)
        rates = Rates(*on_device, group["betas"], self._decay, group["eps"])
        adamw([Flat(*buffers, self._num_decayed)], rates)

    def _gradients(self) -> Iterable[torch.Tensor]:
        """Each parameter's gradient as it lies in memory, and the gap behind it."""
        for parameter, gap in zip(self._parameters, self._gaps, strict=True):
            gradient = parameter.grad
            if gradient is None:
                shape = list(parameter.shape)
                what = f"a parameter of shape {shape} has no gradient, which the kernel adamw needs"
                raise UserError(f"{what}; leave it off (--kernels), or freeze the parameter")
            if gradient.stride() != parameter.stride():
                gradient = torch.empty_like(parameter).copy_(gradient)
            yield gradient.as_strided((gradient.numel(),), (1,))
            if gap.numel():
                yield gap

    @torch.no_grad()
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Torch's or this one's; copied into the buffers, zero where it holds nothing."""
        super().load_state_dict(state_dict)
        for parameter, kept in self._kept.items():
            loaded = self.state[parameter]
            for key, view in kept.items():
                view.copy_(loaded[key]) if key in loaded else view.zero_()
            self.state[parameter] = kept
