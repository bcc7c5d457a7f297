"""What a training step asks of a GPU: each launch with its bytes and FLOPs, seen without a GPU.

A real TrainStep of the configuration trains on fake tensors (shapes, types and strides without
memory) while a dispatch mode sees every operation of forward, backward and update. Views are no
launches. PyTorch's other operations are the launches that assumed.py says; the operators of
kernels/ run their own launchers, which tell what they would start (started.py).

Bytes are those through device memory: each tensor that a launch reads or writes once, a number of
an expanded tensor once, of a tensor that is read by index as much as is written.

It does not see torch.compile (what that fuses is decided as it compiles), NCCL, or the feed's
copies from the host. Nothing is measured here: ledger.py predicts from it.

Shapes: K steps of a launch, B samples of a step.
"""

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from typing import Any
from unittest.mock import patch

import numpy as np
import torch
from torch._library.custom_ops import OPDEFS
from torch._prims_common import suggest_memory_format
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry

from engine.config import RunConfig
from engine.data.records import Split
from engine.feeds.batch import Batch
from engine.feeds.build import SOURCES
from engine.feeds.resident import ResidentFeed
from engine.models import Network, make_model
from engine.order import Order
from engine.train.backends import backends_kept
from engine.train.step import TrainStep
from engine.world import World
from kernels import launch
from tools.measure.assumed import (
    ASSUMED,
    FOREACH,
    LEFT_OUT,
    SAME_FLOPS,
    UNREAD,
    Call,
    Operation,
)
from tools.measure.started import launched

STUDYS_SHAPE = (28, 28, 94)
"""Height, width, classes."""
_CPU = torch.device("cpu")


class Operations(TorchDispatchMode):
    """Notes the launches of every operation while it is entered."""

    def __init__(self) -> None:
        super().__init__()
        self.found: list[Operation] = []

    def started(self, kernel: Any, args: tuple[Any, ...], constants: dict[str, Any]) -> None:
        """A listener of kernels/launch.py."""
        self.found.append(launched(kernel, args, constants))

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if func.namespace == "tmnist":
            with self:  # its launcher's own operations count
                return OPDEFS[func._schema.name]._init_fn(*args, **(kwargs or {}))
        if func.namespace != "aten":  # prim, profiler
            return func(*args, **(kwargs or {}))
        with self:  # what is made of others
            parts = func.decompose(*args, **(kwargs or {}))
        if parts is not NotImplemented:
            return parts
        out = _as_cudnn_lays_it_out(func, args, func(*args, **(kwargs or {})))
        if not _launches_nothing(func):
            self.found += _launches(_call(func, args, kwargs or {}, out))
        return out


def _launches(call: Call) -> list[Operation]:
    assumed = ASSUMED.get(FOREACH if call.name.startswith("_foreach_") else call.name)
    return assumed.launches(call) if assumed else [call.launch()]


def _launches_nothing(func: Any) -> bool:
    """Whether it makes a view, or leaves what it makes unwritten."""
    name = func.overloadpacket.__name__
    aliases = [result.alias_info for result in func._schema.returns]
    is_view = any(alias is not None and not alias.is_write for alias in aliases)
    return is_view or name in LEFT_OUT


def _call(func: Any, args: Any, kwargs: dict[str, Any], out: Any) -> Call:
    name = func.overloadpacket.__name__
    schema = func._schema.arguments
    given = {argument.name: value for argument, value in zip(schema, args, strict=False)} | kwargs
    reads: list[torch.Tensor] = []
    writes: list[torch.Tensor] = []
    for argument in schema:
        tensors = _tensors(given.get(argument.name))
        is_written = argument.alias_info is not None and argument.alias_info.is_write
        writes += tensors if is_written else []
        unread = is_written and (argument.is_out or name in UNREAD)
        reads += [] if unread else tensors
    if not writes:
        writes = _tensors(out)
    count = flop_registry.get(SAME_FLOPS.get(name, func.overloadpacket))
    flops = int(count(*args, **kwargs, out_val=out)) if count else 0
    return Call(name=name, reads=reads, writes=writes, inputs=list(given.values()), result=out,
                flops=flops)  # fmt: skip


def _tensors(tree: Any) -> list[torch.Tensor]:
    return [leaf for leaf in tree_leaves(tree) if isinstance(leaf, torch.Tensor)]


def _as_cudnn_lays_it_out(func: Any, args: Any, out: Any) -> Any:
    """A convolution's results, channels-last if its input or weight is: cuDNN's rule in torch.

    A CPU goes by what its library supports.
    """
    first = {"convolution": 0, "convolution_backward": 1}.get(func.overloadpacket.__name__)
    if first is None or args[first].dim() != 4:
        return out
    formats = [suggest_memory_format(tensor) for tensor in args[first : first + 2]]
    is_last = torch.channels_last in formats
    layout = torch.channels_last if is_last else torch.contiguous_format
    made = [out] if isinstance(out, torch.Tensor) else out
    laid = [
        made_.contiguous(memory_format=layout) if made_ is not None and made_.dim() == 4 else made_
        for made_ in made
    ]
    return laid[0] if isinstance(out, torch.Tensor) else tuple(laid)


@contextmanager
def _as_on_a_gpu() -> Iterator[None]:
    """Fake CPU tensors go a GPU's ways: multi-tensor optimisers, fp8 products, root gradient."""
    devices = ["cpu", "cuda"]
    types = [torch.Tensor, torch.nn.Parameter, FakeTensor]
    with ExitStack() as stack:
        for name in (
            "torch.optim.optimizer._get_foreach_kernels_supported_devices",
            "torch.optim.adam._get_capturable_supported_devices",
        ):
            stack.enter_context(patch(name, lambda *_, **__: devices))
        stack.enter_context(patch("torch.optim.optimizer._foreach_supported_types", types))
        stack.enter_context(patch("engine.train.precision.is_emulated", lambda tensor: False))
        stack.enter_context(patch("engine.train.step.gives_root_gradient", lambda device: True))
        yield


def step_operations(
    config: RunConfig,
    batch: int,
    processors: int,
    shape: tuple[int, int, int] = STUDYS_SHAPE,
) -> list[Operation]:
    """The launches of one step, those of a launch of K steps divided by K, alike ones as one.

    The step is the second launch of an epoch: the first makes the optimiser's state.

    Args:
        config: as a GPU runs it; one rank, not compiled.
        batch: samples of the step.
        processors: the GPU's multiprocessors.
        shape: height and width of an image, and classes.
    """
    mode = Operations()
    with ExitStack() as stack:
        stack.enter_context(backends_kept())
        step, feed = _step(config, batch, shape)
        stack.enter_context(FakeTensorMode(allow_non_fake_inputs=True))
        stack.enter_context(_as_on_a_gpu())
        stack.enter_context(launch.listening(mode.started, processors))
        stack.enter_context(mode)
        launches = step.train_epoch(feed, 0)
        next(launches)
        mode.found.clear()
        num_steps = next(launches).num_steps
    return _summed(mode.found, num_steps)


def _step(
    config: RunConfig, batch: int, shape: tuple[int, int, int]
) -> tuple[TrainStep, ResidentFeed]:
    """The step and its feed, gathering within the launch where it would.

    They are real, and train on fake tensors. Their batches' memory is never touched, so never
    taken.
    """
    size = shape[:2]
    num_steps = config.step.steps_per_launch
    num = 2 * num_steps * batch
    order = Order(num_samples=num, global_batch=batch, seed=config.seed)
    split = Split(
        image_NHW=np.zeros((num, *size), np.uint8),
        label_N=np.zeros(num, np.uint8),
        font_N=np.zeros(num, np.int32),
    )
    fused = frozenset(config.kernels)
    model = make_model(config.model, *shape, config.seed, fused)
    feed = ResidentFeed(split, order, _CPU, fused)
    static = Batch.empty(num_steps * batch, size, _CPU)
    world = World(rank=0, size=1, device=_CPU, stream=None)
    in_launches = config.step.cuda_graphs or num_steps > 1
    gathers = in_launches and config.data.feed in (*SOURCES, "auto") and not config.augment.is_on
    with _as_on_a_gpu():
        step = TrainStep(model, config, order, static, world, feed if gathers else None)
    return step, feed


def layer_operations(
    layer: torch.nn.Module, x: torch.Tensor, autocast: torch.dtype | None
) -> list[Operation]:
    """The launches of one layer by itself, forward and backward, alike ones as one.

    Args:
        layer: its parameters keep their numbers, and get no gradients.
        x: like what it reads; its gradient is made if it requires one.
        autocast: the type of bf16's or fp16's; None: as the numbers are.
    """
    mode = Operations()
    with ExitStack() as stack:
        stack.enter_context(FakeTensorMode(allow_non_fake_inputs=True))
        stack.enter_context(_as_on_a_gpu())
        given = torch.empty_strided(x.shape, x.stride(), dtype=x.dtype)
        given.requires_grad_(x.requires_grad)
        stack.enter_context(mode)
        with torch.autocast("cpu", autocast or torch.bfloat16, enabled=autocast is not None):
            y = layer(given)
        if wanted := [leaf for leaf in (given, *layer.parameters()) if leaf.requires_grad]:
            torch.autograd.grad(y, wanted, torch.empty_like(y))
    return _summed(mode.found, 1)


def layer_inputs(
    model: Network, batch: int, shape: tuple[int, int, int], autocast: torch.dtype
) -> list[tuple[str, torch.nn.Module, torch.Tensor]]:
    """Each convolution and linear layer that a forward calls, by name, with a tensor like its x."""
    found = list[tuple[str, torch.nn.Module, torch.Tensor]]()
    names = {layer: name for name, layer in model.named_modules()}

    def note(layer: torch.nn.Module, args: Any, y: Any) -> None:
        found.append((names[layer], layer, args[0]))

    kinds = (torch.nn.Conv2d, torch.nn.Linear)
    hooks = [layer.register_forward_hook(note) for layer in names if isinstance(layer, kinds)]
    fake = FakeTensorMode(allow_non_fake_inputs=True)
    with fake, Operations(), torch.autocast("cpu", autocast):  # Operations: for cuDNN's layouts
        model.train()(torch.empty((batch, *shape[:2]), dtype=torch.uint8))
    for hook in hooks:
        hook.remove()
    return found


def _summed(found: list[Operation], num_steps: int) -> list[Operation]:
    """A step's share of a launch's operations, those of one name and one size each as one."""
    groups: dict[tuple[Any, ...], list[Operation]] = {}
    for each in found:
        key = (each.name, each.read_bytes, each.write_bytes, each.flops, each.turns, each.dtype)
        groups.setdefault(key, []).append(each)
    return [
        replace(
            group[0],
            launches=sum(each.launches for each in group) / num_steps,
            read_bytes=sum(each.read_bytes for each in group) / num_steps,
            write_bytes=sum(each.write_bytes for each in group) / num_steps,
            flops=sum(each.flops for each in group) / num_steps,
        )
        for group in groups.values()
    ]
