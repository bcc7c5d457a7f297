"""What this machine supports of a config: a table of rules.

Each says what it takes back, and why.
"""

from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import torch

from engine.config import AUTO, AugmentConfig, RunConfig, override
from engine.data.records import Records
from engine.errors import UserError
from engine.feeds.build import choose_feed, gathers
from engine.feeds.stream import NUM_WINDOWS
from engine.models import network_class
from engine.train.backends import has_conv_backward
from engine.train.flat import why_not_rounded
from engine.train.parallel import can_recover
from engine.train.precision import AUTOCAST
from engine.world import (
    World,
    cannot_compile,
    cannot_fp8,
    cannot_fuse,
    fused_on_cpu,
    has_fast_bf16,
)


def effective_config(
    config: RunConfig, records: Records, world: World
) -> tuple[RunConfig, list[str]]:
    """What this machine supports of `config`, and a sentence for each thing that differs."""
    config, notes = _chosen_kernels(config, world), list[str]()
    for rule in RULES:
        for change, note in rule(config, records, world):
            config = change
            notes.append(note)
    return config, notes


Changes = Iterator[tuple[RunConfig, str]]
"""The config as it is to be instead, and why; nothing where it may stay."""


def _tf32(config: RunConfig, records: Records, world: World) -> Changes:
    if config.step.precision == "tf32" and not _is_ampere(world):
        why = "this device has none; fp32 is computed as IEEE has it"
        yield _step(config, precision="fp32"), f"TF32 is not used: {why}"


def _bf16(config: RunConfig, records: Records, world: World) -> Changes:
    if config.step.precision == "bf16" and not has_fast_bf16(world.device):
        why = "this device has no bf16 instructions and would be slower than in fp32"
        yield _step(config, precision="fp32"), f"bf16 is not used: {why}"


def _fp16(config: RunConfig, records: Records, world: World) -> Changes:
    if config.step.precision == "fp16" and world.device.type == "cpu":
        why = "CPUs compute it many times slower than fp32; --amp bf16 is the fast one"
        yield _step(config, precision="fp32"), f"fp16 is not used: {why}"


def _fp8(config: RunConfig, records: Records, world: World) -> Changes:
    if config.step.precision != "fp8":
        return
    if why := cannot_fp8(world.device):
        raise UserError(f"--amp fp8: {why}; use --amp bf16")
    if not has_fast_bf16(world.device):
        why = "this device has no bf16 instructions, in which all but the products is computed"
        yield _step(config, precision="fp32"), f"fp8 is not used: {why}"
    elif world.device.type == "cpu":
        yield config, "fp8 is emulated on a CPU: that shows its accuracy, and is slower than bf16"


def _graphs(config: RunConfig, records: Records, world: World) -> Changes:
    if not config.step.cuda_graphs:
        return
    if world.device.type == "cpu":
        why = "there is no GPU; the same step runs eagerly"
        yield _step(config, cuda_graphs=False), f"CUDA graphs are not used: {why}"
    elif config.step.precision == "fp16" and not config.optim.fused:
        why = "fp16 with an optimiser that is not fused reads the host in each step"
        yield _step(config, cuda_graphs=False), f"CUDA graphs are not used: {why}"


def _chosen_kernels(config: RunConfig, world: World) -> RunConfig:
    """What `auto` means: on a CPU what is compiled for it; on a GPU nothing, until measured."""
    if config.kernels != AUTO:
        return config
    fitting = network_class(config.model).kernels
    kept = [name for name in fused_on_cpu(world.device) if name in fitting]
    return override(config, {"kernels": kept}, "auto")


def _kernels(config: RunConfig, records: Records, world: World) -> Changes:
    if not config.kernels or not (why := cannot_fuse(world.device)):
        return
    on_cpu = fused_on_cpu(world.device)
    kept = tuple(name for name in config.kernels if name in on_cpu)
    if others := [name for name in config.kernels if name not in on_cpu]:
        names = f" {', '.join(others)}" if kept else ""
        why = f"{why}; PyTorch's operations compute the same"
        yield replace(config, kernels=kept), f"Triton kernels{names} are not used: {why}"


def _layers(config: RunConfig, records: Records, world: World) -> Changes:
    fitting = network_class(config.model).kernels
    if others := [name for name in config.kernels if name not in fitting]:
        kept = tuple(name for name in config.kernels if name in fitting)
        are = "kernel {} is" if len(others) == 1 else "kernels {} are"
        why = f"the network {config.model.name} has no such layers"
        yield replace(config, kernels=kept), f"the {are.format(', '.join(others))} not used: {why}"


def _fp8_layers(config: RunConfig, records: Records, world: World) -> Changes:
    """The kernel brings the ReLU of the layer before, in a product of its own."""
    if config.step.precision == "fp8" and "linear_cross_entropy" in config.kernels:
        why = "its product for the layer before is bf16's"
        kept = _without(config, "linear_cross_entropy")
        yield kept, f"the kernel linear_cross_entropy is not used: {why}"


def _loss(config: RunConfig, records: Records, world: World) -> Changes:
    names = config.kernels
    if "linear_cross_entropy" in names and "softmax_cross_entropy" in names:
        why = "linear_cross_entropy computes the loss"
        kept = _without(config, "softmax_cross_entropy")
        yield kept, f"softmax_cross_entropy is not used: {why}"


def _second_layer(config: RunConfig, records: Records, world: World) -> Changes:
    """Two kernels compute it: one what follows the library's convolution, one all of it."""
    if {"bias_pool_relu", "conv2_pool_relu"} <= set(config.kernels):
        why = "conv2_pool_relu computes the whole layer"
        kept = _without(config, "bias_pool_relu")
        yield kept, f"the kernel bias_pool_relu is not used: {why}"


def _optimizer(config: RunConfig, records: Records, world: World) -> Changes:
    if "adamw" in config.kernels and config.optim.name != "adamw":
        why = f"the optimiser is {config.optim.name}"
        kept = _without(config, "adamw")
        yield kept, f"the kernel adamw is not used: {why}"


def _shadows(config: RunConfig, records: Records, world: World) -> Changes:
    if "adamw" not in config.kernels or AUTOCAST.get(config.step.precision) is not torch.bfloat16:
        return
    if why := why_not_rounded(config, world.size):
        yield config, f"weights are cast to bf16 in each step: {why}"


def _fsdp(config: RunConfig, records: Records, world: World) -> Changes:
    """Whether parameters are sharded; and what else goes by whole ones."""
    if config.step.parallel != "fsdp":
        return
    if why := _why_not_sharded(config, world):
        yield _step(config, parallel="ddp"), f"FSDP is not used: {why}"
        return
    if config.step.compile != "off":
        config = _step(config, compile="off")
        yield config, "torch.compile is not used: with FSDP it has not been tried"
    if "adamw" in config.kernels:
        config = _without(config, "adamw")
        yield config, "the kernel adamw is not used: FSDP has a part of each parameter on each rank"
    if config.step.cuda_graphs and not can_recover():
        why = "this torch cannot go on after a capture of FSDP that failed; it takes 2.13 or newer"
        config = _step(config, cuda_graphs=False)
        yield config, f"CUDA graphs are not used: {why}"


def _why_not_sharded(config: RunConfig, world: World) -> str:
    if world.size == 1:
        return "there is one rank, which keeps everything"
    if config.step.canonical:
        return "--canonical adds whole gradients, shard by shard"
    if config.step.noise_scale:
        return "the noise scale takes norms of whole gradients"
    return ""


def _compile(config: RunConfig, records: Records, world: World) -> Changes:
    if config.step.compile != "off" and (why := cannot_compile(world.device)):
        yield _step(config, compile="off"), f"torch.compile is not used: {why}"


def _conv_backward(config: RunConfig, records: Records, world: World) -> Changes:
    if not config.step.triton_conv_backward:
        return
    why = ""
    if config.step.compile != "max-autotune":
        why = "they take --compile max-autotune"
    elif world.device.type == "cpu":
        why = "there is no GPU"
    elif not has_conv_backward():
        why = "this torch cannot write them; it takes 2.13 or newer"
    if why:
        step = _step(config, triton_conv_backward=False)
        yield step, f"Triton's convolution gradients are not used: {why}"


def _cudnn(config: RunConfig, records: Records, world: World) -> Changes:
    if not config.step.cudnn_benchmark:
        return
    why = "there is no GPU" if world.device.type == "cpu" else ""
    if config.step.canonical:
        why = "--canonical takes fixed algorithms"
    if why:
        yield _step(config, cudnn_benchmark=False), f"cuDNN's benchmark is not used: {why}"


def _canonical(config: RunConfig, records: Records, world: World) -> Changes:
    if config.step.canonical and world.device.type == "cpu" and torch.get_num_threads() > 1:
        why = "more would add in another order on another machine"
        yield config, f"--canonical computes with one thread per rank: {why}"


def _noise_scale(config: RunConfig, records: Records, world: World) -> Changes:
    """The small batch beside the whole one is its first part, or a shard."""
    if not config.step.noise_scale:
        return
    if config.step.canonical == 1:
        raise UserError("--noise-scale: one shard is no part of a batch; give --canonical of more")
    if config.step.canonical or config.step.accumulate > 1:
        return
    rank_batch = config.global_batch // world.size
    if rank_batch % 2:
        what = f"a rank's batch of {rank_batch} cannot be divided into 2 parts"
        raise UserError(f"--noise-scale: {what}; give an even --batch-size")
    why = "the noise scale is measured by a part of the batch"
    yield _step(config, accumulate=2), f"a batch is computed in 2 parts: {why}"


def _first_layer(config: RunConfig, records: Records, world: World) -> Changes:
    is_whitened = config.model.first_layer == "whitened"
    if is_whitened and not network_class(config.model).can_whiten:
        why = f"the network {config.model.name} has none that could be whitened"
        model = replace(config.model, first_layer="trained")
        yield replace(config, model=model), f"the first layer is trained: {why}"


def _launches(config: RunConfig, records: Records, world: World) -> Changes:
    most = len(records.split("train")) // config.global_batch
    if config.step.steps_per_launch > most:
        yield (
            _step(config, steps_per_launch=most),
            f"{most} steps in a launch: an epoch has no more",
        )


def _feed(config: RunConfig, records: Records, world: World) -> Changes:
    if config.data.feed == "auto":
        feed, why = choose_feed(config.data, records.split("train"), world.device)
        data: Any = replace(config.data, feed=feed)  # type: ignore[arg-type]
        yield replace(config, data=data), f"the feed is {feed}: {why}"


def _gather(config: RunConfig, records: Records, world: World) -> Changes:
    if "gather_warp" in config.kernels and config.data.feed != "resident":
        why = f"the feed {config.data.feed} gathers in its own way"
        kept = _without(config, "gather_warp")
        yield kept, f"the kernel gather_warp is not used: {why}"


def _stream(config: RunConfig, records: Records, world: World) -> Changes:
    if config.data.feed == "stream":
        window = min(
            config.data.block_samples * config.data.window_blocks, len(records.split("train"))
        )
        height, width = records.height_width
        size = f"{NUM_WINDOWS} windows of {window * height * width / 1e6:,.0f} MB"
        yield config, f"stream reads ahead in {size}; evaluation does so, too"


def _distortion(config: RunConfig, records: Records, world: World) -> Changes:
    if config.augment.is_on and gathers(replace(config, augment=AugmentConfig())):
        yield config, "images are gathered and distorted before a launch, not within it"


RULES: tuple[Callable[[RunConfig, Records, World], Changes], ...] = (
    _tf32,
    _bf16,
    _fp16,
    _fp8,
    _graphs,
    _fsdp,
    _kernels,
    _layers,
    _fp8_layers,
    _loss,
    _second_layer,
    _optimizer,
    _compile,
    _conv_backward,
    _cudnn,
    _canonical,
    _noise_scale,
    _shadows,
    _first_layer,
    _launches,
    _feed,
    _gather,
    _stream,
    _distortion,
)
"""In this order: a later rule sees what earlier ones left."""


def _step(config: RunConfig, **changed: Any) -> RunConfig:
    return replace(config, step=replace(config.step, **changed))


def _without(config: RunConfig, kernel: str) -> RunConfig:
    return replace(config, kernels=tuple(name for name in config.kernels if name != kernel))


def _is_ampere(world: World) -> bool:
    device = world.device
    return device.type == "cuda" and torch.cuda.get_device_capability(device) >= (8, 0)
