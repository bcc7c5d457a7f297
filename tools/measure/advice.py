"""tools/profile advise: in which precision a GPU computes which layer faster, by a model.

Each convolution and linear layer is run by itself, forward and backward, in the code that trains,
on tensors without memory. operations.py counts its launches, those that cast and scale among them,
and ledger.py's model of the GPU gives each its time: the longer of its bytes over the bandwidth and
its FLOPs over the peak, and what a launch costs. The step, counted in the same way, says what the
layer is of the whole.

It measures nothing and needs no GPU; of one that the tables do not name it says no more than FLOPs
and bytes. It counts PyTorch's own operations on a batch in one part: neither `--kernels` nor
`step.accumulate`, nor torch.compile, which fuses part of the casts into what stands before them.

Shapes: B samples of a step, H x W pixels.
"""

import copy
from collections.abc import Iterable
from dataclasses import dataclass, field, replace

import torch
from torch import nn

from engine.config import RunConfig, StepConfig
from engine.models import make_model
from engine.train.precision import AUTOCAST, IN_FP8, why_not_fp8
from tools.measure.assumed import Operation
from tools.measure.ledger import MACHINES, Machine, model_in_words
from tools.measure.operations import STUDYS_SHAPE, layer_inputs, layer_operations, step_operations
from tools.measure.roofline import PEAK_FLOPS
from tools.report.rows import markdown_table

PRECISIONS = ("fp32", "tf32", "bf16", "fp16", "fp8")
NAMES = {"tf32": "TF32"}
COUNTED = {"tf32": "fp32", "fp16": "bf16"}
"""Precisions whose launches are another's: the same bytes at another peak, or at the same."""
WORTH = 0.02
"""Part of a step that fp8 must save to be worth its rounding."""
BLACKWELL = "MXFP8 and NVFP4 need Blackwell (compute capability 10.0 or newer)"


@dataclass(frozen=True, kw_only=True)
class Layer:
    """A layer of a network, or `count` alike."""

    name: str
    module: nn.Module
    x: torch.Tensor
    """Like what it reads: shape, strides, type, and whether a gradient of it is wanted."""
    count: int = 1


@dataclass(frozen=True, kw_only=True)
class LayerAdvice:
    name: str
    flops: float
    """Of a step, forward and backward; of all layers alike, as are bytes and times."""
    num_bytes: float
    """In bf16."""
    bound: str = ""
    """What takes most of its time in bf16: bytes, FLOPs, waiting or launches; empty: not known."""
    us: dict[str, float] = field(default_factory=dict)
    """By precision, where it is known; a model's, as `verdict` is."""
    verdict: str = ""


@dataclass(frozen=True, kw_only=True)
class Advice:
    network: str
    batch: int
    device: str
    """The GPU's whole name; empty where none was named and none is here."""
    layers: list[LayerAdvice]
    step_us: dict[str, float]
    """By precision; empty where the device is not known."""


def advise(config: RunConfig, device: str, shape: tuple[int, int, int] = STUDYS_SHAPE) -> Advice:
    """Advice on each layer of a configuration's network, trained on one GPU.

    Args:
        device: a whole name, as torch.cuda.get_device_name gives it.
        shape: height and width of an image, and classes.
    """
    machine = MACHINES.get(device)
    step_us = dict[str, float]()
    if machine:
        known = _known(machine)
        counted = {p: _step(config, p, shape) for p in _to_count(known)}
        step_us = {p: _us(counted[COUNTED.get(p, p)], machine, p) for p in known}
    step_bf16_us = step_us.get("bf16", 0.0)
    layers = [layer_advice(each, machine, step_bf16_us) for each in layers_of(config, shape)]
    return Advice(
        network=config.model.name,
        batch=config.global_batch,
        device=device,
        layers=layers,
        step_us=step_us,
    )


def layers_of(config: RunConfig, shape: tuple[int, int, int]) -> list[Layer]:
    """The convolutions and linear layers that a step calls, those alike as one."""
    model = make_model(config.model, *shape, config.seed)
    if config.step.channels_last:
        model.use_channels_last()
    alike: dict[tuple[object, ...], Layer] = {}
    for name, module, x in layer_inputs(model, config.global_batch, shape, AUTOCAST["bf16"]):
        weights = [(p.shape, p.requires_grad) for p in module.parameters()]
        key = (repr(module), *weights, x.shape, x.stride(), x.dtype, x.requires_grad)
        seen = alike.get(key, Layer(name=name, module=module, x=x, count=0))
        alike[key] = replace(seen, count=seen.count + 1)
    return list(alike.values())


def layer_advice(layer: Layer, machine: Machine | None, step_bf16_us: float) -> LayerAdvice:
    """Advice on a layer.

    Args:
        machine: None: what is counted in bf16, and no verdict.
        step_bf16_us: of the whole step; read where there is a machine.
    """
    known = _known(machine) if machine else ["bf16"]
    modules = {p: _in_fp8(layer.module) if p == "fp8" else layer.module for p in _to_count(known)}
    found = {
        p: _counted(module, layer.x, p) * layer.count for p, module in modules.items() if module
    }
    others = f" and {layer.count - 1} alike" if layer.count > 1 else ""
    advice = LayerAdvice(
        name=layer.name + others,
        flops=sum(each.flops for each in found["bf16"]),
        num_bytes=sum(each.num_bytes for each in found["bf16"]),
    )
    if machine is None:
        return advice
    counted = {p: found.get(COUNTED.get(p, p)) for p in known}
    us = {p: _us(each, machine, p) for p, each in counted.items() if each is not None}
    verdict = _cannot(layer.module, machine) or _verdict(found, machine, step_bf16_us)
    return replace(advice, bound=_bound(found["bf16"], machine), us=us, verdict=verdict)


def _step(config: RunConfig, precision: str, shape: tuple[int, int, int]) -> list[Operation]:
    """What a step launches that is captured, of PyTorch's operations alone."""
    step = StepConfig(
        precision=precision,  # type: ignore[arg-type]
        channels_last=config.step.channels_last,
        cuda_graphs=True,
        steps_per_launch=config.step.steps_per_launch,
    )
    plain = replace(config, step=step, kernels=())
    return step_operations(plain, config.global_batch, processors=1, shape=shape)


def _counted(layer: nn.Module, x: torch.Tensor, precision: str) -> list[Operation]:
    autocast = AUTOCAST.get(precision)
    if autocast is None:  # in fp32 layers hand each other fp32
        x = torch.empty_strided(x.shape, x.stride(), device="meta", requires_grad=x.requires_grad)
    return layer_operations(layer, x, autocast)


def _in_fp8(layer: nn.Module) -> nn.Module | None:
    """The layer as fp8 computes it, with the same parameters; None where it does not."""
    if not isinstance(layer, nn.Linear) or why_not_fp8(layer):
        return None
    twin = copy.copy(layer)
    twin.__class__ = IN_FP8[type(layer)]
    return twin.train()


def _known(machine: Machine) -> list[str]:
    return [p for p in PRECISIONS if p in PEAK_FLOPS[machine.name]]


def _to_count(precisions: Iterable[str]) -> list[str]:
    """Those whose launches must be counted; the others have the launches of one of these."""
    return list(dict.fromkeys(COUNTED.get(p, p) for p in precisions))


def _us(operations: Iterable[Operation], machine: Machine, precision: str) -> float:
    """Microseconds by the model, numbers of the counted precision being those of `precision`."""
    counted = COUNTED.get(precision)
    return sum(
        machine.us(replace(each, dtype=precision) if each.dtype == counted else each)
        for each in operations
    )


def _bound(operations: list[Operation], machine: Machine) -> str:
    """What takes most time if all else took none."""
    each_us = [machine.parts_us(each) for each in operations]
    return max(each_us[0], key=lambda part: sum(parts_us[part] for parts_us in each_us))


def _cannot(layer: nn.Module, machine: Machine) -> str:
    """Why fp8 is out of the question, or ""."""
    if not isinstance(layer, nn.Linear):
        return "fp8 cannot help: torch has no convolution in it"
    if why := why_not_fp8(layer):
        return f"fp8 is not used: {why}"
    return "" if "fp8" in PEAK_FLOPS[machine.name] else "fp8 cannot help: this GPU has none"


def _verdict(found: dict[str, list[Operation]], machine: Machine, step_us: float) -> str:
    """fp8 against bf16: what its products save, what casts and scales cost."""
    products, others = (
        {
            p: _us((each for each in found[p] if bool(each.flops) is are_products), machine, p)
            for p in ("bf16", "fp8")
        }
        for are_products in (True, False)
    )
    saved_us = products["bf16"] - products["fp8"]
    cost_us = others["fp8"] - others["bf16"]
    part = (saved_us - cost_us) / step_us
    if part <= 0:
        share = (products["bf16"] + others["bf16"]) / step_us
        saved = f"products save {saved_us:,.1f} us" if saved_us > 0 else "products save nothing"
        why = f"{saved}, casts and scales cost {cost_us:,.1f} us"
        return f"fp8 cannot help: {share:.0%} of the time, casts cost more ({why})"
    if part < WORTH:
        return f"fp8 is not worth it: it saves {part:.1%} of the step"
    return f"fp8 helps: it saves {part:.0%} of the step"


def to_markdown(advice: Advice) -> str:
    """A table and what follows of it."""
    if not advice.step_us:
        return _without_verdict(advice)
    known = list(advice.step_us)
    columns = " | ".join(f"{NAMES.get(p, p)} us" for p in known)
    rows = [
        (each.name, f"{each.flops / 1e6:,.0f}", f"{each.num_bytes / 1e6:,.1f}", each.bound,
         *(f"{each.us[p]:,.1f}" if p in each.us else "" for p in known), each.verdict)
        for each in advice.layers
    ]  # fmt: skip
    step = (f"{advice.step_us[p]:,.1f}" for p in known)
    rows.append(("**the step**", "", "", "", *step, _of_step(advice)))
    lines = [
        f"## {advice.network}, batch {advice.batch}, one {advice.device}: a model, not measured",
        "",
        *markdown_table(
            f"| layer | MFLOP | MB | bound by | {columns} | verdict |",
            "lrrl" + "r" * len(known) + "l",
            rows,
        ),
        "",
        _in_words(MACHINES[advice.device]),
        f"{BLACKWELL}.",
    ]
    return "\n".join(lines) + "\n"


def _of_step(advice: Advice) -> str:
    best = min(advice.step_us, key=lambda p: advice.step_us[p])
    text = f"fastest in {NAMES.get(best, best)}"
    if "fp8" not in advice.step_us:
        return text
    return f"{text}; fp8 takes {advice.step_us['fp8'] / advice.step_us['bf16']:.2f} of bf16's time"


def _in_words(machine: Machine) -> str:
    return (
        "MFLOP and MB are a step's, forward and backward, in bf16; fp16 is taken to be as fast. "
        f"{model_in_words(machine, f'{machine.launch_us:g}')} Casts and scales are counted as they "
        "are launched; torch.compile would fuse part of them."
    )


def _without_verdict(advice: Advice) -> str:
    why = f"nothing is known of {advice.device}" if advice.device else "this machine has no GPU"
    known = ", ".join(MACHINES)
    rows = [
        (each.name, f"{each.flops / 1e6:,.0f}", f"{each.num_bytes / 1e6:,.1f}")
        for each in advice.layers
    ]
    lines = [
        f"## {advice.network}, batch {advice.batch}: counted, not measured",
        "",
        *markdown_table("| layer | MFLOP | MB in bf16 |", "lrr", rows),
        "",
        f"No verdict: {why}. Name one of these by --device: {known}.",
    ]
    return "\n".join(lines) + "\n"
