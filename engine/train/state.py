"""TrainState: every tensor that a run keeps, by name.

Warm-up puts all of it back, checkpoints hold it, parity compares it; none of them walks the model
and the optimiser by itself. The tensors are the live ones: whoever changes them does it in place,
since a captured graph knows their addresses.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch

from engine.models.columns import columns_of
from engine.train.flat import FlatAdamW

Tensors = dict[str, torch.Tensor]


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

    def num_bytes(self) -> int:
        """What a checkpoint of it takes."""
        tensors = (self.model_tensors() | self.optimizer_tensors()).values()
        return sum(tensor.numel() * tensor.element_size() for tensor in tensors)

    def scaler_numbers(self) -> dict[str, float]:
        """The loss scale and its growth counter; empty where there is none."""
        found = self.scaler.state_dict()
        return {key: float(found[key]) for key in ("scale", "_growth_tracker") if key in found}

    def load_scaler(self, numbers: dict[str, float]) -> None:
        """Put back what `scaler_numbers` gave, in place."""
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
        saved = {name: tensor.detach().clone() for name, tensor in before.items()}
        scaler_state = self.scaler.state_dict()
        cpu_rng = torch.get_rng_state()
        cuda_rng = torch.cuda.get_rng_state() if torch.cuda.is_initialized() else None
        try:
            yield
        finally:
            with torch.no_grad():
                for name, tensor in before.items():
                    tensor.copy_(saved[name])
                for name, tensor in self.optimizer_tensors().items():
                    if name not in before:
                        tensor.zero_()
            self.written()
            self.scaler.load_state_dict(scaler_state)
            torch.set_rng_state(cpu_rng)
            if cuda_rng is not None:
                torch.cuda.set_rng_state(cuda_rng)
