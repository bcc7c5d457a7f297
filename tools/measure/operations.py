"""What a training step asks of a GPU: each launch with its bytes and FLOPs, seen without a GPU.

A real TrainStep of the configuration runs on fake tensors (shapes, types and strides without
memory) while a dispatch mode sees every operation of forward, backward and update. Views are no
launches. PyTorch's other operations are the launches that ASSUMED says, one if it says nothing;
the operators of kernels/ run their own launchers, which tell what they would start.

Bytes are those through device memory: each tensor that a launch reads or writes once, a number of
an expanded tensor once, of a tensor that is read by index as much as is written. Which pointers a
Triton kernel loads and stores is read from its source. FLOPs are torch's own count, and those of
FLOPS for kernels with products.

It does not see torch.compile (what that fuses is decided as it compiles), NCCL, or the feed's
copies from the host. Nothing is measured here: ledger.py predicts from it.

Shapes: K steps of a launch, B samples of a step.
"""

import ast
import inspect
import textwrap
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field, replace
from functools import cache
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
from engine.models import make_model
from engine.order import Order
from engine.train.backends import backends_kept
from engine.train.step import TrainStep
from engine.world import World
from kernels import launch

STUDYS_SHAPE = (28, 28, 94)
"""Height, width, classes."""
MULTI_TENSOR_CHUNK = 65_536
"""Numbers that one block of torch's multi-tensor kernels takes (MultiTensorApply.cuh)."""
MULTI_TENSOR_BLOCKS = 320
MULTI_TENSOR_LISTS = (110, 64, 48, 36, 30)
"""Tensors of one launch, by how many lists of tensors it walks; blocks are MULTI_TENSOR_BLOCKS."""
NUMBERS_A_TURN = 2048
"""Of such a block: 512 threads of 4 numbers, each turn waiting for the loads of its own."""
_CPU = torch.device("cpu")


@dataclass(frozen=True, kw_only=True)
class Operation:
    """One launch, or several like it in a step."""

    name: str
    launches: float = 1.0
    """A step's; below 1 for what a launch of K steps does once."""
    read_bytes: float
    """Of all of them, as are the next two."""
    write_bytes: float
    flops: float = 0.0
    turns: int = 1
    """Times that a program of it waits for memory, one after the other."""
    dtype: str = "fp32"
    """Of its numbers: what peak its products have."""

    @property
    def num_bytes(self) -> float:
        return self.read_bytes + self.write_bytes

    @property
    def is_convolution(self) -> bool:
        return self.flops > 0 and "conv" in self.name


@dataclass(frozen=True, kw_only=True)
class Call:
    """An operation of PyTorch as the mode sees it."""

    name: str
    reads: list[torch.Tensor]
    writes: list[torch.Tensor]
    inputs: list[Any]
    """All arguments in their order."""
    result: Any
    flops: int

    def launch(
        self,
        suffix: str = "",
        reads: list[Any] | None = None,
        writes: list[Any] | None = None,
        flops: float | None = None,
        turns: int = 1,
    ) -> Operation:
        """A launch of it; what is left out is that of the whole operation."""
        read = self.reads if reads is None else reads
        written = self.writes if writes is None else writes
        return Operation(
            name=self.name + suffix,
            read_bytes=sum(map(num_bytes, _distinct(read))),
            write_bytes=sum(map(num_bytes, _distinct(written))),
            flops=self.flops if flops is None else flops,
            turns=turns,
            dtype=_dtype(self.reads + self.writes),
        )


def num_bytes(tensor: torch.Tensor) -> int:
    """Of the numbers that a tensor holds; one that is expanded holds each once."""
    pairs = zip(tensor.shape, tensor.stride(), strict=True)
    sizes = [size for size, stride in pairs if stride or not size]
    return int(np.prod(sizes, dtype=np.int64)) * tensor.element_size()


def _distinct(tensors: list[Any]) -> list[torch.Tensor]:
    return list({id(t): t for t in tensors if isinstance(t, torch.Tensor)}.values())


def _dtype(tensors: list[torch.Tensor]) -> str:
    """Of the first float: a product's operand, or the narrowest tensor of a Triton kernel."""
    names = {torch.bfloat16: "bf16", torch.float16: "fp16"}
    floats = [tensor.dtype for tensor in tensors if tensor.dtype.is_floating_point]
    return names.get(floats[0], "fp32") if floats else "fp32"


Launches = Callable[[Call], list[Operation]]


@dataclass(frozen=True)
class Assumption:
    """What a GPU launches for an operation, where that is not one kernel; and how that is known."""

    launches: Launches = field(repr=False)
    text: str
    reason: str


def _one(call: Call) -> list[Operation]:
    return [call.launch()]


def _convolution(call: Call) -> list[Operation]:
    x, weight, bias = call.inputs[:3]
    product = call.launch(reads=[x, weight])
    if bias is None:
        return [product]
    result = [call.result]
    return [product, call.launch(" (bias)", [*result, bias], result, 0)]


def _convolution_backward(call: Call) -> list[Operation]:
    grad, x, weight = call.inputs[:3]
    grad_x, grad_weight, grad_bias = call.result
    num_products = sum(made is not None for made in (grad_x, grad_weight))
    flops = call.flops / max(num_products, 1)
    found = []
    if grad_x is not None:
        found.append(call.launch(" (input)", [grad, weight], [grad_x], flops))
    if grad_weight is not None:
        found.append(call.launch(" (weight)", [grad, x], [grad_weight], flops))
    if grad_bias is not None:
        found.append(call.launch(" (bias)", [grad], [grad_bias], 0))
    return found


def _zeros_first(call: Call) -> list[Operation]:
    return [call.launch(" (zeros)", reads=[]), call.launch()]


def _by_index(call: Call) -> list[Operation]:
    """Rows chosen by an index: as many are read as are written."""
    whole = max(call.reads, key=num_bytes)
    others = [tensor for tensor in call.reads if tensor is not whole]
    return [call.launch(reads=[*others, *call.writes])]


def _multi_tensor(call: Call) -> list[Operation]:
    """Launches of MultiTensorApply: chunks of the tensors' numbers fill one after the other."""
    lists = [given for given in call.inputs if _is_tensor_list(given)]
    sizes = [tensor.numel() for tensor in lists[0]]
    most = MULTI_TENSOR_LISTS[min(len(lists), len(MULTI_TENSOR_LISTS)) - 1]
    launches, tensors, blocks = 1, 0, 0
    for size in sizes:
        chunks = max(1, -(-size // MULTI_TENSOR_CHUNK))
        if tensors == most or blocks + chunks > MULTI_TENSOR_BLOCKS:
            launches, tensors, blocks = launches + 1, 0, 0
        tensors, blocks = tensors + 1, blocks + chunks
    turns = -(-min(max(sizes), MULTI_TENSOR_CHUNK) // NUMBERS_A_TURN)
    return [replace(call.launch(turns=turns), launches=float(launches))]


def _fused_optimizer(call: Call) -> list[Operation]:
    """Gradients are read alone: they are written where they are unscaled, too, as in fp16."""
    (whole,) = _multi_tensor(call)
    parameters, _, averages, squares, *_ = call.inputs
    written = call.launch(writes=[*parameters, *averages, *squares]).write_bytes
    return [replace(whole, write_bytes=written)]


def _is_tensor_list(given: Any) -> bool:
    return isinstance(given, (list, tuple)) and any(isinstance(t, torch.Tensor) for t in given)


_INDEXED = Assumption(_by_index, "1, which reads what it writes", "it reads the chosen rows alone")
_ZEROED = Assumption(
    _zeros_first, "2: zeros, then the gradient", "torch's CUDA source zeroes the result first"
)
_MULTI = Assumption(
    _multi_tensor,
    "1 for each 320 chunks of 65,536 numbers, or 30 to 110 tensors",
    "MultiTensorApply.cuh; the program of a full chunk waits for memory 32 times in turn",
)
_PRODUCT = Assumption(
    _one, "1", "cuBLAS's product with its bias; the sum of one that is split is not counted"
)
FOREACH = "_foreach_..."
"""Stands for every operator whose name begins so."""
_FUSED = replace(_MULTI, launches=_fused_optimizer)
ASSUMED: dict[str, Assumption] = {
    "convolution": Assumption(
        _convolution,
        "1, and 1 for a bias",
        "cuDNN's product; torch adds the bias by a kernel of its own. NCHW conversions inside "
        "cuDNN, and halves of one that is split, are not counted",
    ),
    "convolution_backward": Assumption(
        _convolution_backward,
        "1 for each gradient: input, weight, bias",
        "cuDNN's two products and torch's sum; the sum of a split weight gradient is not counted",
    ),
    "mm": _PRODUCT,
    "addmm": _PRODUCT,
    "max_pool2d_with_indices_backward": _ZEROED,
    "nll_loss_backward": _ZEROED,
    "index_select": _INDEXED,
    "index": _INDEXED,
    "embedding": _INDEXED,
    FOREACH: _MULTI,
    "_amp_foreach_non_finite_check_and_unscale_": _MULTI,
    "_fused_adam_": _FUSED,
    "_fused_adamw_": _FUSED,
}
"""By the operator's name, without its overload. All others are one launch, views none."""
LEFT_OUT = ("empty", "new_empty", "empty_like", "empty_strided", "new_empty_strided", "detach",
            "lift_fresh", "is_pinned", "_unsafe_view")  # fmt: skip
"""Operators that launch nothing although their result is no view."""
SAME_FLOPS = {"_addmm_activation": torch.ops.aten.addmm}
"""Products that torch does not count, and those that are as large."""
UNREAD = ("zero_", "fill_", "copy_")
"""Their first tensor is written and not read; so is every `out`."""


def _conv_flops(given: dict[str, Any]) -> float:
    """Of four 3x3 products per pooled position; of one input channel where no number is given."""
    products = given["CHANNELS"] * given.get("INPUTS", 1)
    return float(2 * 4 * 9 * products * given["num_positions"])


FLOPS: dict[str, Callable[[dict[str, Any]], float]] = {
    "conv_pool_relu_forward": _conv_flops,
    "conv_pool_relu_backward": _conv_flops,
}
"""Of kernels/ with products, from their arguments and constants by name."""
GATHERS = {"gather_warp_forward": ("image_ptr", "label_ptr", "table_ptr")}
"""What kernels read by index: as many bytes as they write."""


@dataclass(frozen=True)
class Pointers:
    """Which of a Triton function's parameters it loads from and stores to."""

    loaded: frozenset[str]
    stored: frozenset[str]
    has_products: bool


@cache
def pointers(kernel: Any, off: frozenset[str] = frozenset()) -> Pointers:
    """What the kernel's source says; functions that it calls are looked into, too.

    Args:
        off: constants that are false, whose branches are left out.
    """
    tree = ast.parse(textwrap.dedent(inspect.getsource(kernel.fn)))
    reader = _Pointers(kernel.fn.__globals__, off)
    reader.visit(tree)
    return Pointers(frozenset(reader.loaded), frozenset(reader.stored), reader.has_products)


class _Pointers(ast.NodeVisitor):
    """Follows `..._ptr` through sums and local names to tl.load, tl.store, and calls."""

    def __init__(self, names: dict[str, Any], off: frozenset[str]) -> None:
        self._names = names
        self._off = off
        self._comes_from: dict[str, set[str]] = {}
        self._tuples: dict[str, list[ast.expr]] = {}
        self.loaded: set[str] = set()
        self.stored: set[str] = set()
        self.has_products = False

    def visit_If(self, node: ast.If) -> None:
        is_off = isinstance(node.test, ast.Name) and node.test.id in self._off
        for statement in node.orelse if is_off else [*node.body, *node.orelse]:
            self.visit(statement)

    def visit_Assign(self, node: ast.Assign) -> None:
        self.visit(node.value)
        for target in node.targets:
            if isinstance(target, ast.Name):
                self._comes_from[target.id] = self._origins(node.value)
                if isinstance(node.value, ast.Tuple):
                    self._tuples[target.id] = node.value.elts

    def visit_Call(self, node: ast.Call) -> None:
        self.generic_visit(node)
        called = ast.unparse(node.func)
        self.has_products |= called == "tl.dot"
        if called == "tl.load":
            self.loaded |= self._origins(node.args[0])
        elif called == "tl.store":
            self.stored |= self._origins(node.args[0])
        elif hasattr(helper := self._names.get(called), "fn"):
            self._called(helper, node)

    def _called(self, helper: Any, node: ast.Call) -> None:
        inside = pointers(helper)
        self.has_products |= inside.has_products
        given = [value for argument in node.args for value in self._unpacked(argument)]
        for name, value in zip(inspect.signature(helper.fn).parameters, given, strict=False):
            origins = self._origins(value)
            self.loaded |= origins if name in inside.loaded else set()
            self.stored |= origins if name in inside.stored else set()

    def _unpacked(self, argument: ast.expr) -> list[ast.expr]:
        if isinstance(argument, ast.Starred) and isinstance(argument.value, ast.Name):
            return self._tuples.get(argument.value.id, [argument])
        return [argument]

    def _origins(self, node: ast.expr) -> set[str]:
        """The pointers that an address is made of; a value that was loaded is none."""
        if isinstance(node, ast.Name):
            if node.id.endswith("_ptr"):
                return {node.id}
            return self._comes_from.get(node.id, set())
        if isinstance(node, ast.BinOp):
            return self._origins(node.left) | self._origins(node.right)
        return set()


def launched(kernel: Any, args: tuple[Any, ...], constants: dict[str, Any]) -> Operation:
    """A launch of a Triton kernel, as launch.listening tells it."""
    name = kernel.fn.__name__
    _check_kernel(kernel)
    found = pointers(kernel, frozenset(key for key, value in constants.items() if value is False))
    named = dict(zip(inspect.signature(kernel.fn).parameters, args, strict=False))
    tensors = {key: value for key, value in named.items() if isinstance(value, torch.Tensor)}
    written, read = (
        sum(map(num_bytes, _distinct([t for key, t in tensors.items() if key in names])))
        for names in (found.stored, found.loaded.difference(GATHERS.get(name, ())))
    )
    if name in GATHERS:
        read += written
    return Operation(
        name=name,
        read_bytes=read,
        write_bytes=written,
        flops=FLOPS[name](named | constants) if name in FLOPS else 0.0,
        turns=_turns(constants),
        dtype=_dtype(sorted(tensors.values(), key=lambda tensor: tensor.element_size())),
    )


@cache
def _check_kernel(kernel: Any) -> None:
    """Raise KeyError where a kernel's launches could not be counted whole."""
    name, found = kernel.fn.__name__, pointers(kernel)
    given = {key for key in inspect.signature(kernel.fn).parameters if key.endswith("_ptr")}
    if unseen := sorted(given - found.loaded - found.stored):
        raise KeyError(f"{name}: neither a load nor a store of {', '.join(unseen)} was found")
    if found.has_products and name not in FLOPS:
        raise KeyError(f"{name} has products; add its FLOPs to {__name__}.FLOPS")


def _turns(constants: dict[str, Any]) -> int:
    if "PARTIALS" in constants:
        return int(-(-constants["PARTIALS"] // constants["BLOCK"]))
    return int(constants.get("TURNS", 1))


def launched_bytes(work: Callable[[], object], processors: int) -> float:
    """Bytes that the Triton kernels of `work` read and write; it runs, and its kernels do not."""
    found: list[Operation] = []
    with launch.listening(lambda *started: found.append(launched(*started)), processors):
        work()
    return sum(operation.num_bytes for operation in found)


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
    """torch.optim takes its multi-tensor and capturable ways for fake CPU tensors, too."""
    devices = ["cpu", "cuda"]
    types = [torch.Tensor, torch.nn.Parameter, FakeTensor]
    with ExitStack() as stack:
        for name in (
            "torch.optim.optimizer._get_foreach_kernels_supported_devices",
            "torch.optim.adam._get_capturable_supported_devices",
        ):
            stack.enter_context(patch(name, lambda *_, **__: devices))
        stack.enter_context(patch("torch.optim.optimizer._foreach_supported_types", types))
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
