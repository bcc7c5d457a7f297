"""The products of any network's training step: bytes and FLOPs of each convolution and matmul.

They are seen where torch calls them, forward and backward, on the CPU with a few samples; what
stands between two products is taken to be fused into them, so that each reads its inputs once and
writes its result once, and nothing else passes through the device's memory. Attention is one
product, its scores stay on the chip.

What two sizes of a batch differ by is a sample's: weights and their gradients cancel out. This is
no floor for a network that pools: a convolution's whole result is counted, a fused pool would leave
a quarter of it. The study's network has a floor of its own (roofline.py).
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch.nn import functional
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry, sdpa_backward_flop_count, sdpa_flop_count

from engine.models import Network
from tools.measure.roofline import Work

FEW = 2
ATTENTION = "_scaled_dot_product_flash_attention_for_cpu"


@dataclass(frozen=True)
class Product:
    """One product of a batch: numbers read and written, FLOPs."""

    name: str
    num_read: int
    num_written: int
    flops: int


class _Products(TorchDispatchMode):
    """Notes every product while it is entered."""

    def __init__(self) -> None:
        super().__init__()
        self.found: list[Product] = []

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        out = func(*args, **(kwargs or {}))
        flops = _flops(func, args, kwargs or {}, out)
        if flops:
            name = str(func).removeprefix("aten.").removesuffix(".default")
            self.found.append(Product(name, _numbers(args), _numbers(out), flops))
        return out


def _numbers(tree: Any) -> int:
    return sum(leaf.numel() for leaf in tree_leaves(tree) if isinstance(leaf, torch.Tensor))


def _flops(func: Any, args: Any, kwargs: dict[str, Any], out: Any) -> int:
    """FLOPs of a product, 0 of anything else; torch's own counter does not know the CPU's."""
    name = func.overloadpacket.__name__
    if name == ATTENTION:
        return int(sdpa_flop_count(*(tensor.shape for tensor in args[:3])))
    if name == f"{ATTENTION}_backward":
        return int(sdpa_backward_flop_count(*(tensor.shape for tensor in args[:4])))
    count = flop_registry.get(func.overloadpacket)
    return int(count(*args, **kwargs, out_val=out)) if count else 0


def products(
    network: Network, height: int, width: int, num_classes: int, item_bytes: int = 2
) -> list[Work]:
    """A sample's share of each product of a training step, in their order.

    Args:
        network: on the CPU; its gradients and buffers stay as they are.
        item_bytes: of a number between two products.
    """
    one, two = (_products_of(network, num, height, width, num_classes) for num in (FEW, 2 * FEW))
    return list(_works(one, two, item_bytes))


def _works(one: list[Product], two: list[Product], item_bytes: int) -> Iterator[Work]:
    for few, more in zip(one, two, strict=True):
        yield Work(
            name=few.name,
            read_bytes=(more.num_read - few.num_read) / FEW * item_bytes,
            write_bytes=(more.num_written - few.num_written) / FEW * item_bytes,
            flops=(more.flops - few.flops) / FEW,
        )


def _products_of(
    network: Network, num_samples: int, height: int, width: int, num_classes: int
) -> list[Product]:
    """Of a forward and a backward."""
    generator = torch.Generator().manual_seed(0)
    shape = (num_samples, height, width)
    image_BHW = torch.randint(256, shape, dtype=torch.uint8, generator=generator)
    label_B = torch.arange(num_samples) % num_classes
    parameters = list(network.parameters())
    seen = _Products()
    with seen:
        loss = functional.cross_entropy(network(image_BHW).float(), label_B)
        torch.autograd.grad(loss, parameters, allow_unused=True)
    return seen.found
