"""What a launch of a Triton kernel reads and writes, from its source and its arguments.

A pointer is read if its address, or one made from it, comes to a `tl.load`, here or in a function
that is called; it is written if it comes to a `tl.store`. Branches of a constant that is false do
not count. Bytes are those of the whole tensors, once; FLOPs are those of FLOPS.

It starts nothing: kernels/launch.py tells a listener what would be started.
"""

import ast
import inspect
import textwrap
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch

from kernels import launch
from tools.measure.assumed import Operation, distinct, dtype_of, num_bytes


def _conv_flops(given: dict[str, Any]) -> float:
    """Of four 3x3 products per pooled position; of one input channel where no number is given."""
    products = given["CHANNELS"] * given.get("INPUTS", 1)
    return float(2 * 4 * 9 * products * given["num_positions"])


def _head_flops(given: dict[str, Any]) -> float:
    """Of logits, and the gradients of the layer's input and weight."""
    return float(3 * 2 * given["num_samples"] * given["WIDTH"] * given["CLASSES"])


FLOPS: dict[str, Callable[[dict[str, Any]], float]] = {
    "conv_pool_relu_forward": _conv_flops,
    "conv_pool_relu_backward": _conv_flops,
    "conv2_pool_relu_forward": _conv_flops,
    "conv2_pool_relu_input_backward": _conv_flops,
    "conv2_pool_relu_weight_backward": _conv_flops,
    "linear_cross_entropy_forward": _head_flops,
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
        sum(map(num_bytes, distinct([t for key, t in tensors.items() if key in names])))
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
        dtype=dtype_of(sorted(tensors.values(), key=lambda tensor: tensor.element_size())),
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
