"""What a run is: a tree of frozen dataclasses, the one home of every default. TOML files and flags only override it.

A field marked `environment` says where or by which road the work is done, not what is computed: it stays out of
`digest()`, so a run may be resumed with another feed, path or device.
"""

import hashlib
import json
import tomllib
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields, is_dataclass, replace
from pathlib import Path
from typing import Any, Literal, get_args, get_origin, get_type_hints

import tomli_w

from engine.errors import UserError
from engine.paths import full_path, path_text

ENVIRONMENT = {"environment": True}
PATH = {"environment": True, "path": True}
"""Of fields that are paths: kept absolute, so that a run is resumed from any folder."""
FeedName = Literal["auto", "resident", "dali", "stream", "loader", "loader_batched", "synthetic"]


@dataclass(frozen=True, kw_only=True)
class AugmentConfig:
    """Random distortion of training images (feeds/augment.py), drawn evenly between minus and plus these."""

    shift_pixels: float = 0.0
    """Across and down, each."""
    rotate_degrees: float = 0.0
    """About the centre."""
    shear_degrees: float = 0.0
    """Slant of upright lines."""
    scale_fraction: float = 0.0
    """0.1: sizes from 0.9 to 1.1."""

    @property
    def is_on(self) -> bool:
        return any(asdict(self).values())


@dataclass(frozen=True, kw_only=True)
class DataConfig:
    path: str = field(default="", metadata=PATH)
    """Record directory; empty: the packaged sample of 128 typefaces."""
    feed: FeedName = field(default="auto", metadata=ENVIRONMENT)
    """The road the batches take; for the same order every feed but synthetic hands out the same batches."""
    order: Literal["exact", "blocked"] = "exact"
    """exact: any sample may come at any place of an epoch; blocked: what can be read from disk in pieces (stream)."""
    block_samples: int = 5000
    """Neighbours in the records that stay in one window of the blocked order."""
    window_blocks: int = 16
    """Blocks whose samples are shuffled together in the blocked order; stream holds two such windows in memory."""
    loader_workers: int = field(default=2, metadata=ENVIRONMENT)
    """Worker processes of the loader feed."""


@dataclass(frozen=True, kw_only=True)
class ModelConfig:
    name: Literal["baseline", "fast"] = "fast"
    """`fast` is `baseline` with the ReLU after the pool: the same function of the same parameters, fewer bytes."""


@dataclass(frozen=True, kw_only=True)
class OptimConfig:
    name: Literal["adam", "adamw"] = "adamw"
    """The torch optimiser."""
    learning_rate: float = 0.01
    """Highest learning rate of the schedule."""
    schedule: Literal["constant", "one_cycle"] = "one_cycle"
    """one_cycle: linear warm-up to the highest rate, then cosine to almost zero."""
    warmup_fraction: float = 0.2
    """Part of all steps spent warming up (one_cycle)."""
    weight_decay: float = 0.01
    """Decoupled weight decay (adamw), on weights only, not on biases."""
    label_smoothing: float = 0.05
    """Share of the target spread over all classes; evaluation's loss is never smoothed."""
    fused: bool = True
    """One kernel for the whole optimiser."""


@dataclass(frozen=True, kw_only=True)
class StepConfig:
    precision: Literal["fp32", "tf32", "bf16", "fp16"] = "fp32"
    """Arithmetic of forward and backward; parameters and optimiser stay fp32. fp32 is IEEE's, also where torch would
    round to TF32 by itself; tf32 allows that in convolutions and products; bf16 and fp16 are autocast's."""
    channels_last: bool = True
    """NHWC memory format for activations and convolution weights."""
    compile: Literal["off", "default", "max-autotune"] = field(default="off", metadata=ENVIRONMENT)
    """torch.compile from the batch to the loss, in this mode, without CUDA graphs of its own."""
    accumulate: int = field(default=1, metadata=ENVIRONMENT)
    """Parts in which a rank's batch goes through the network, one after the other, before the one update."""
    cuda_graphs: bool = field(default=False, metadata=ENVIRONMENT)
    """Capture the whole step into one CUDA graph."""
    steps_per_graph: int = field(default=1, metadata=ENVIRONMENT)
    """Steps in one launch; what is left of an epoch runs step by step."""


@dataclass(frozen=True, kw_only=True)
class KernelConfig:
    use: Literal["off", "triton", "compile", "auto"] = "off"
    """Where fused code comes from: kernels/, torch.compile, or (auto) the one that a result file shows ahead."""
    gather_warp: bool = True
    """With triton: this one of kernels/, too. Batches of the resident feed, and the warp of augmented images."""
    conv_pool_relu: bool = True
    """The first layer, from uint8 pixels."""
    bias_pool_relu: bool = True
    """What follows the second layer's convolution."""
    softmax_cross_entropy: bool = True
    """Loss, its gradient and the right answers."""

    @property
    def fused(self) -> frozenset[str]:
        """The names of those that are used."""
        return frozenset(
            name for name, on in asdict(self).items() if on is True and self.use == "triton"
        )


@dataclass(frozen=True, kw_only=True)
class RunConfig:
    data: DataConfig = DataConfig()
    model: ModelConfig = ModelConfig()
    optim: OptimConfig = OptimConfig()
    step: StepConfig = StepConfig()
    kernels: KernelConfig = field(default=KernelConfig(), metadata=ENVIRONMENT)
    global_batch: int = 512
    """Samples of all ranks together in one step."""
    augment: AugmentConfig = AugmentConfig()
    epochs: int = 4
    """Passes over the training split; the schedule spans them all."""
    seed: int = 42
    """Seeds the initial weights and the order of samples."""
    log_ids: bool = field(default=False, metadata=ENVIRONMENT)
    """Write the ids and pixels' checksums of all batches to OUT/ids, for tools/verify order; slow."""
    tensorboard: bool = field(default=False, metadata=ENVIRONMENT)
    """Write each epoch's figures as TensorBoard events to OUT/tensorboard, too."""
    target_accuracy: float = field(default=0.0, metadata=ENVIRONMENT)
    """Stop at the first epoch whose validation accuracy (0..1) reaches this; 0: run all epochs."""

    @staticmethod
    def baseline() -> "RunConfig":
        """The study's recipe: fp32, NCHW, eager, per-sample loader, Adam 1e-3 constant, batch 64, 12 epochs."""
        return RunConfig(
            data=DataConfig(feed="loader"),
            model=ModelConfig(name="baseline"),
            optim=OptimConfig(
                name="adam",
                learning_rate=1e-3,
                schedule="constant",
                weight_decay=0.0,
                label_smoothing=0.0,
                fused=False,
            ),
            step=StepConfig(channels_last=False),
            global_batch=64,
            epochs=12,
        )

    def digest(self) -> str:
        """16 hex digits that are equal where two configs compute the same training."""
        text = json.dumps(_tree(self, training_only=True), sort_keys=True)
        return hashlib.sha256(text.encode()).hexdigest()[:16]


def _tree(config: Any, training_only: bool = False) -> dict[str, Any]:
    kept = [f.name for f in fields(config) if not (training_only and f.metadata.get("environment"))]
    values = {name: getattr(config, name) for name in kept}
    return {name: _tree(v, training_only) if is_dataclass(v) else v for name, v in values.items()}


def override(config: RunConfig, dotted: Mapping[str, Any], source: str) -> RunConfig:
    """`config` with fields such as "optim.learning_rate" replaced; names, types and bounds are checked.

    Args:
        source: where the values stand (a file, "--set"), for the error's text.
    Raises:
        UserError: unknown field, wrong type, or a value out of bounds.
    """
    for name, value in with_full_paths(dotted, None, source).items():
        config = _replace(config, name.split("."), value, f"{source}: {name}")
    _check_bounds(config, source)
    return config


def load_toml(config: RunConfig, path: str | Path) -> RunConfig:
    """`config` overridden by a TOML file whose tables and keys are the fields of RunConfig."""
    dotted = with_full_paths(flatten(read_toml(path)), Path(path).parent, str(path))
    return override(config, dotted, str(path))


def with_full_paths(dotted: Mapping[str, Any], folder: Path | None, source: str) -> dict[str, Any]:
    """`dotted` with settings that are paths made absolute: relative ones from `folder`, None the current one.

    Raises:
        UserError: one cannot be a path.
    """
    full = dict(dotted)
    for name in _path_settings(RunConfig):
        value = full.get(name)
        if isinstance(value, str) and value:
            try:
                full[name] = str(full_path(value, folder))
            except UserError as error:
                raise UserError(f"{source}: {name}: {error}") from None
    return full


def _path_settings(kind: Any, prefix: str = "") -> list[str]:
    """The dotted names of all fields that are paths."""
    names = []
    for name, hint in get_type_hints(kind).items():
        if is_dataclass(hint):
            names += _path_settings(hint, f"{prefix}{name}.")
        elif kind.__dataclass_fields__[name].metadata.get("path"):
            names.append(prefix + name)
    return names


def read_toml(path: str | Path) -> dict[str, Any]:
    """The tables of a TOML file.

    Raises:
        UserError: it cannot be read, or is no TOML.
    """
    try:
        return tomllib.loads(Path(path).read_bytes().decode("utf-8-sig"))
    except OSError as error:
        raise UserError(
            f"{path}: cannot be read ({error.strerror}); give --config an existing TOML file"
        ) from None
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise UserError(f"{path}: is not TOML ({error}); see bench_configs/ for examples") from None


def parse_assignments(assignments: tuple[str, ...]) -> dict[str, Any]:
    """["optim.learning_rate=0.002"] -> {"optim.learning_rate": 0.002}; values are TOML, else plain text."""
    dotted = {}
    for assignment in assignments:
        name, equals, text = assignment.partition("=")
        if not equals:
            raise UserError(
                f"--set {assignment}: has no '='; write --set optim.learning_rate=0.002"
            )
        try:
            dotted[name] = tomllib.loads(f"value = {text}")["value"]
        except tomllib.TOMLDecodeError:
            dotted[name] = text
    return dotted


def to_toml(config: RunConfig) -> str:
    """The whole config as TOML; `load_toml` gives it back."""
    tree = asdict(config)
    tree["data"]["path"] = path_text(config.data.path)
    return tomli_w.dumps(tree)


def flatten(tree: dict[str, Any]) -> dict[str, Any]:
    """{"optim": {"fused": true}} -> {"optim.fused": true}; tables lie one in another at any depth."""
    dotted: dict[str, Any] = {}
    for name, value in tree.items():
        dotted |= (
            {f"{name}.{k}": v for k, v in flatten(value).items()}
            if isinstance(value, dict)
            else {name: value}
        )
    return dotted


def _replace(config: Any, names: list[str], value: Any, where: str) -> Any:
    hints = get_type_hints(type(config))
    name, rest = names[0], names[1:]
    if name not in hints:
        raise UserError(f"{where}: unknown setting; choose from {', '.join(hints)}")
    if is_dataclass(hints[name]):
        if not rest:
            settings = ", ".join(get_type_hints(hints[name]))
            raise UserError(f"{where}: is a table, not a value; its settings are {settings}")
        return replace(config, **{name: _replace(getattr(config, name), rest, value, where)})
    if rest:
        raise UserError(f"{where}: {name} is a value, not a table; write {name} = ...")
    return replace(config, **{name: _checked(value, hints[name], where)})


def _checked(value: Any, kind: Any, where: str) -> Any:
    if get_origin(kind) is Literal:
        if value in get_args(kind):
            return value
        choices = ", ".join(map(str, get_args(kind)))
        raise UserError(f"{where}: is {value!r}; choose one of {choices}")
    if kind is float and type(value) is int:
        return float(value)
    if type(value) is not kind:
        raise UserError(f"{where}: is {value!r}; give a value of type {kind.__name__}")
    return value


def _check_bounds(config: RunConfig, source: str) -> None:
    o = config.optim
    bounds = [
        ("global_batch", config.global_batch, 1, 2**24),
        ("epochs", config.epochs, 1, 100_000),
        ("seed", config.seed, 0, 2**63 - 1),
        ("target_accuracy", config.target_accuracy, 0, 1),
        ("data.loader_workers", config.data.loader_workers, 0, 256),
        ("data.block_samples", config.data.block_samples, 1, 2**32),
        ("data.window_blocks", config.data.window_blocks, 1, 2**32),
        ("step.accumulate", config.step.accumulate, 1, 4096),
        ("step.steps_per_graph", config.step.steps_per_graph, 1, 64),
        ("augment.shift_pixels", config.augment.shift_pixels, 0, 1000),
        ("augment.rotate_degrees", config.augment.rotate_degrees, 0, 180),
        ("augment.shear_degrees", config.augment.shear_degrees, 0, 80),
        ("augment.scale_fraction", config.augment.scale_fraction, 0, 0.9),
        ("optim.learning_rate", o.learning_rate, 0, 1000),
        ("optim.warmup_fraction", o.warmup_fraction, 0, 1),
        ("optim.weight_decay", o.weight_decay, 0, 1000),
        ("optim.label_smoothing", o.label_smoothing, 0, 1),
    ]
    for name, value, low, high in bounds:
        if not low <= value <= high:  # also true for NaN
            raise UserError(f"{source}: {name} is {value}; give a value from {low} to {high}")
    if config.data.feed == "stream" and config.data.order == "exact":
        raise UserError(
            f"{source}: the stream feed serves the blocked order only; set data.order=blocked too"
        )
