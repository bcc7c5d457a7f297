"""TrainState: every tensor that a run keeps, by name.

Warm-up puts all of it back, checkpoints hold it, parity compares it; none of them walks the model
and the optimiser by itself. The tensors are the live ones: whoever changes them does it in place,
since a captured graph knows their addresses. Under FSDP each is this rank's part, in the shape of
the whole: train/parallel.py reads and writes those.
"""

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch

from engine.models.columns import columns_of
from engine.report import RankBytes
from engine.train.flat import FlatAdamW
from engine.train.parallel import own_part, whole

Tensors = dict[str, torch.Tensor]


@dataclass(frozen=True, eq=False)
class RandomState:
    """torch's random numbers of the whole process, at a moment."""

    cpu: torch.Tensor
    gpu: torch.Tensor | None
    """Of the current device; None where none is in use."""

    @staticmethod
    def now() -> "RandomState":
        gpu = torch.cuda.get_rng_state() if torch.cuda.is_initialized() else None
        return RandomState(torch.get_rng_state(), gpu)

    def put_back(self) -> None:
        torch.set_rng_state(self.cpu)
        if self.gpu is not None:
            torch.cuda.set_rng_state(self.gpu)

    def is_now(self) -> bool:
        """Whether none were drawn since."""
        now = RandomState.now()
        pairs = ((self.cpu, now.cpu), (self.gpu, now.gpu))
        return all(a is b or (a is not None and b is not None and a.equal(b)) for a, b in pairs)


@dataclass(frozen=True)
class TrainState:
    """What a training step changes and the next one needs."""

    model: torch.nn.Module
    optimizer: torch.optim.Optimizer
    scaler: torch.amp.GradScaler
    counters: Tensors
    """Steps done, sums: tensors of the step's own."""

    def model_tensors(self) -> Tensors:
        """Parameters and buffers."""
        live = {name: p.detach() for name, p in self.model.named_parameters()}
        return {name: live.get(name, t) for name, t in self.model.state_dict().items()}

    def in_files(self, tensors: Tensors) -> Tensors:
        """Some of these tensors in the shapes that files hold."""
        merged = columns_of(self.model)
        return {
            name: tensor.flatten(1) if name.split("/")[0] in merged and tensor.dim() > 2 else tensor
            for name, tensor in tensors.items()
        }

    def optimizer_tensors(self) -> Tensors:
        """The optimiser's state, "conv1.weight/exp_avg" and so on; empty before its first step."""
        names: dict[torch.Tensor, str] = {p: name for name, p in self.model.named_parameters()}
        return {
            f"{names[parameter]}/{key}": value
            for parameter, values in self.optimizer.state.items()
            for key, value in values.items()
            if isinstance(value, torch.Tensor)
        }

    def whole_model(self) -> Tensors:
        """Parameters and buffers, whole, in the shapes that files hold. Collective under FSDP."""
        return self.in_files({name: whole(t) for name, t in self.model_tensors().items()})

    def num_bytes(self) -> int:
        """What a checkpoint of it takes."""
        tensors = self.model_tensors() | self.optimizer_tensors()
        return _num_bytes(tensors.values())

    def rank_bytes(self, *, is_whole: bool) -> RankBytes:
        """What lies on this rank between two steps; `is_whole`: what does so under DDP."""
        parameters = list(self.model.parameters())
        groups = {
            "parameters": [p.detach() for p in parameters],
            "gradients": [p.detach() for p in parameters if p.requires_grad],
            "optimizer": list(self.optimizer_tensors().values()),
        }
        if not is_whole:
            groups = {name: [own_part(t) for t in group] for name, group in groups.items()}
        return RankBytes(**{f"{name}_bytes": _num_bytes(t) for name, t in groups.items()})

    def scaler_numbers(self) -> dict[str, float]:
        """The loss scale and its growth counter; empty where there is none."""
        found = self.scaler.state_dict()
        return {key: float(found[key]) for key in ("scale", "_growth_tracker") if key in found}

    def load_scaler(self, numbers: dict[str, float]) -> None:
        """Put back what `scaler_numbers` gave, in place; nothing where there is no scaler."""
        if not self.scaler.is_enabled():
            return
        found = self.scaler.state_dict()
        kinds = {key: type(found[key]) for key in numbers if key in found}
        self.scaler.load_state_dict(found | {key: kinds[key](numbers[key]) for key in kinds})

    def written(self) -> None:
        """Call it after others wrote parameters: what is kept of them elsewhere follows."""
        if isinstance(self.optimizer, FlatAdamW):
            self.optimizer.round()

    @contextmanager
    def kept(self) -> Iterator[None]:
        """Let warm-up train, then put everything back in place, random state included.

        Optimiser state that warm-up created (Adam's moments and step) becomes zero, its start.
        """
        before = self.model_tensors() | dict(self.model.named_buffers())
        before |= self.optimizer_tensors() | self.counters
        saved = {name: own_part(tensor).detach().clone() for name, tensor in before.items()}
        scaler_state = self.scaler.state_dict()
        random = RandomState.now()
        try:
            yield
        finally:
            with torch.no_grad():
                for name, tensor in before.items():
                    own_part(tensor).copy_(saved[name])
                for name, tensor in self.optimizer_tensors().items():
                    if name not in before:
                        own_part(tensor).zero_()
            self.written()
            self.scaler.load_state_dict(scaler_state)
            random.put_back()


def _num_bytes(tensors: Iterable[torch.Tensor]) -> int:
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)
