"""`FlatAdamW`: AdamW whose parameters and moments lie in flat buffers, one step in few launches.

The parameters become views of one fp32 buffer, each in a slot of its own of whole 64 bytes, laid
out as it was (NHWC or not), and so do their moments. A step joins the gradients in buffers of the
same slots and calls kernels/adamw.py, which also finds those that are not finite. Its state has
torch's form, by parameter: a run goes on with torch's optimiser and the other way round.

Beside them it may keep *shadows*, the parameters rounded to bf16, which every step writes anew. The
network then computes with them, where autocast would cast each weight forward and its gradient back
in every step; the rounding is the same. They are leaves, and their gradients come in bf16.

It has one learning rate and one decay.

Shapes: P = R + F numbers of the flat buffers, those of R with shadows; T parameters.
"""

from collections.abc import Callable, Collection, Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

from engine.config import RunConfig
from engine.errors import UserError
from engine.train.precision import AUTOCAST

if TYPE_CHECKING:
    from kernels.adamw import Flat

SLOT = 16
"""Numbers whose whole multiples begin a parameter, as Triton wants them for its widest loads."""
EPS = 1e-8
"""torch's."""


class FlatAdamW(torch.optim.Optimizer):
    """torch.optim.AdamW(fused=True, capturable=True), within its rounding.

    Args:
        groups: with "params" (fp32, of one device) and "weight_decay", which is the same in all
            where it is not 0. The parameters are moved.
        rate: the learning rate of all groups; a tensor on the device, or a number.
        capturable: noted in the groups; nothing is read on the host in any case.
        rounded: the parameters that get shadows.
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
        rounded: Collection[torch.Tensor] = (),
    ) -> None:
        torch_ones = {"amsgrad": False, "maximize": False, "foreach": None, "fused": True}
        torch_ones |= {"differentiable": False, "decoupled_weight_decay": True}
        given = {"lr": rate, "betas": betas, "eps": EPS, "capturable": capturable}
        super().__init__(groups, given | torch_ones)
        decays = {group["weight_decay"] for group in self.param_groups} - {0}
        assert len(decays) <= 1, "one decay for all that decay"
        self._decay = max(decays, default=0.0)
        self.shadows: dict[torch.Tensor, torch.Tensor] = {}
        """By parameter: bf16 leaves."""
        self._kept: dict[torch.Tensor, dict[str, torch.Tensor]] = {}
        """What `state` holds of each parameter: views, whatever is loaded."""
        like = self.param_groups[0]["params"][0]
        num_parameters = sum(len(group["params"]) for group in self.param_groups)
        self._step_T = torch.zeros(num_parameters, device=like.device)
        self._rate, self._bad = torch.zeros(2, device=like.device)
        self._scalars_4 = torch.zeros(4, device=like.device)
        chosen = {id(p) for p in rounded}
        self._rounded = _part_of(self.param_groups, lambda p: id(p) in chosen, torch.bfloat16)
        self._plain = _part_of(self.param_groups, lambda p: id(p) not in chosen, torch.float32)
        self._flat = _flat_of(self._rounded, self._plain)
        self._move()
        self.round()

    @torch.no_grad()
    def _move(self) -> None:
        """Make the parameters, their shadows and what `state` holds views of the flat buffers."""
        parameters = self._rounded.parameters + self._plain.parameters
        sizes = self._rounded.sizes + self._plain.sizes
        views = [_views(buffer_P, parameters, sizes) for buffer_P in self._flat[:3]]
        for number, (parameter, moved, exp_avg, exp_avg_sq) in enumerate(
            zip(parameters, *views, strict=True)
        ):
            moved.copy_(parameter)
            parameter.data = moved
            self.state[parameter] = self._kept[parameter] = {
                "step": self._step_T[number],
                "exp_avg": exp_avg,
                "exp_avg_sq": exp_avg_sq,
            }
        part = self._rounded
        shadows = _views(self._flat.shadow_R, part.parameters, part.sizes)
        for parameter, shadow in zip(part.parameters, shadows, strict=True):
            self.shadows[parameter] = shadow.requires_grad_()

    @torch.no_grad()
    def round(self) -> None:
        """Make the shadows anew, after parameters were written by others."""
        shadow_R = self._flat.shadow_R
        shadow_R.copy_(self._flat.param_P[: len(shadow_R)])

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Of parameters and shadows; always to None."""
        for parameter in self._kept:
            parameter.grad = None
        for shadow in self.shadows.values():
            shadow.grad = None

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> None:  # type: ignore[override]
        """One step; none where `found_inf`, set from outside, is not 0 or a gradient not finite.

        Then `found_inf` becomes 1.

        Raises:
            UserError: a parameter has no gradient.
        """
        from kernels.adamw import Rates, adamw

        assert closure is None and getattr(self, "grad_scale", None) is None, "unscale first"
        bad = self._bad.zero_() if self.found_inf is None else self.found_inf
        group = self.param_groups[0]
        rate = group["lr"]
        if not isinstance(rate, torch.Tensor):
            rate = self._rate.fill_(rate)
        for part in (self._rounded, self._plain):
            if part.parameters:
                torch.cat(list(self._gradients(part)), out=part.grad_P)
        on_device = (rate, self._step_T, bad, self._scalars_4)
        rates = Rates(*on_device, group["betas"], self._decay, group["eps"])
        adamw(self._flat, rates)

    def _gradients(self, part: "_Part") -> Iterable[torch.Tensor]:
        """Each parameter's gradient as it lies in memory, and the gap behind it."""
        for parameter, gap in zip(part.parameters, part.gaps, strict=True):
            leaf = self.shadows.get(parameter, parameter)
            gradient = leaf.grad
            if gradient is None:
                shape = list(parameter.shape)
                what = f"a parameter of shape {shape} has no gradient, which the kernel adamw needs"
                raise UserError(f"{what}; leave it off (--kernels), or freeze the parameter")
            if not _lies_as(gradient, leaf):
                gradient = torch.empty_like(leaf).copy_(gradient)
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


@dataclass
class _Part:
    """Parameters whose gradients are of one type, in slots one behind the other."""

    parameters: list[torch.Tensor]
    """First those that decay."""
    sizes: list[int]
    """Of the slots."""
    num_decayed: int
    """Numbers of the slots that decay."""
    grad_P: torch.Tensor
    gaps: list[torch.Tensor]
    """Zeros: what a slot has behind a gradient."""


def _views(
    flat_P: torch.Tensor, parameters: list[torch.Tensor], sizes: list[int]
) -> list[torch.Tensor]:
    """Each parameter's slot, in its shape and layout."""
    return [
        slot.as_strided(p.shape, torch.empty_like(p, device="meta").stride())
        for slot, p in zip(flat_P.split(sizes), parameters, strict=True)
    ]


def _lies_as(one: torch.Tensor, other: torch.Tensor) -> bool:
    """Whether both have their numbers in the same order; strides of one number say nothing."""
    strides = zip(one.shape, one.stride(), other.stride(), strict=True)
    return all(size == 1 or ours == theirs for size, ours, theirs in strides)


def _part_of(
    groups: list[dict[str, Any]], is_mine: Callable[[torch.Tensor], bool], dtype: torch.dtype
) -> _Part:
    """The part of the groups' parameters that are its own; its gradients are of `dtype`."""
    decayed: list[torch.Tensor] = []
    others: list[torch.Tensor] = []
    for group in groups:
        chosen = decayed if group["weight_decay"] else others
        chosen += filter(is_mine, group["params"])
    parameters = decayed + others
    sizes = [-(-p.numel() // SLOT) * SLOT for p in parameters]
    num_decayed = sum(sizes[: len(decayed)])
    grad_P = torch.zeros(sum(sizes), dtype=dtype, device=groups[0]["params"][0].device)
    gaps = [grad_P.new_zeros(n - p.numel()) for n, p in zip(sizes, parameters, strict=True)]
    return _Part(parameters, sizes, num_decayed, grad_P, gaps)


def _flat_of(rounded: _Part, plain: _Part) -> "Flat":
    from kernels.adamw import Flat

    parameters = rounded.parameters + plain.parameters
    assert len({(p.dtype, p.device) for p in parameters}) == 1, "fp32, of one device"
    device = parameters[0].device
    size = len(rounded.grad_P) + len(plain.grad_P)
    param_P, exp_avg_P, exp_avg_sq_P = (torch.zeros(size, device=device) for _ in range(3))
    moving = (param_P, exp_avg_P, exp_avg_sq_P, rounded.grad_P, torch.zeros_like(rounded.grad_P))
    return Flat(*moving, plain.grad_P, (rounded.num_decayed, plain.num_decayed))


def why_not_rounded(config: RunConfig, num_ranks: int) -> str:
    """Why FlatAdamW keeps no shadows in this run, or "".

    All gradients must be one backward's: in bf16 their sums over parts or ranks would be worse
    than autocast's, which are in fp32.
    """
    if AUTOCAST.get(config.step.precision) is not torch.bfloat16:
        return "the precision is not bf16"
    if config.step.accumulate > 1 or config.step.canonical or config.step.noise_scale:
        return "a batch is computed in parts"
    if num_ranks > 1:
        return "several ranks add their gradients in fp32"
    return "torch.compile casts in its own kernels" if config.step.compile != "off" else ""
