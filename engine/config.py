"""What a run is: frozen dataclasses, the one home of every default, bound, choice and help text.

TOML files and flags only override it (flags.py makes the flags from these fields). A field marked
`environment` says where or how the work is done, not what is computed. It stays out of `digest()`,
so that a run may be resumed with another feed, path or device.
"""

import hashlib
import json
import re
from collections.abc import Iterator, Mapping
from dataclasses import Field, asdict, dataclass, field, fields, is_dataclass, replace
from difflib import get_close_matches
from pathlib import Path
from typing import Any, Literal, get_args, get_origin, get_type_hints

from engine.errors import UserError
from engine.paths import full_path, is_url, said_url

MOST_SHARDS = 64
NO_PAGE = -1
NETWORK_NAMES = ("baseline", "fast", "residual", "vit")
OWN = re.compile(r"(?P<file>.+\.py):(?P<name>[A-Za-z_]\w*)", re.DOTALL)
"""A network of the user's own, as --model names it."""
KernelName = Literal[
    "auto",
    "gather_warp",
    "conv_pool_relu",
    "bias_pool_relu",
    "conv2_pool_relu",
    "softmax_cross_entropy",
    "linear_cross_entropy",
    "adamw",
]
AUTO: tuple[KernelName, ...] = ("auto",)
NOT_IN_ALL: tuple[KernelName, ...] = ("auto", "conv2_pool_relu", "linear_cross_entropy")
"""What `--kernels all` leaves out: a kernel joins it once a result file shows what it is worth."""
TrackerName = Literal["tensorboard", "wandb", "mlflow", "trackio"]


def setting(
    default: Any,
    help: str,
    *,
    bounds: tuple[float | None, float | None] = (None, None),
    flag: str = "",
    environment: bool = False,
    path: bool = False,
) -> Any:
    """A field of the config.

    Args:
        bounds: of a number, both allowed.
        flag: the option of engine.run that sets it.
        environment: whether it leaves the training as it is.
        path: whether it is a path. Those are kept absolute: a run is resumed from any folder.
    """
    low, high = bounds
    facts = {"help": help, "low": low, "high": high, "flag": flag}
    return field(default=default, metadata=facts | {"environment": environment, "path": path})


@dataclass(frozen=True, kw_only=True)
class AugmentConfig:
    """Random distortion of training images, drawn evenly between minus and plus these."""

    shift_pixels: float = setting(0.0, "Across and down, each.", bounds=(0, 1000))
    rotate_degrees: float = setting(0.0, "About the centre.", bounds=(0, 180))
    shear_degrees: float = setting(0.0, "Slant of upright lines.", bounds=(0, 80))
    scale_fraction: float = setting(0.0, "0.1: sizes from 0.9 to 1.1.", bounds=(0, 0.9))

    @property
    def is_on(self) -> bool:
        return any(asdict(self).values())


@dataclass(frozen=True, kw_only=True)
class DataConfig:
    path: str = setting(
        "",
        "Record directory made by tools/pack_tmnist, or its URL (s3://...).  "
        "[default: the packaged sample]",
        flag="--data",
        environment=True,
        path=True,
    )
    feed: Literal["auto", "resident", "dali", "stream", "loader", "loader_batched", "synthetic"] = (
        setting(
            "auto",
            "Which feed supplies the batches; "
            "for the same order all but synthetic supply the same.",
            flag="--feed",
            environment=True,
        )
    )
    order: Literal["exact", "blocked", "stratified"] = setting(
        "exact",
        "exact: any sample at any place of an epoch; blocked: as the stream feed can read it; "
        "stratified: each class spread evenly over the epoch.",
        flag="--order",
    )
    block_samples: int = setting(
        5000,
        "Neighbours in the records that the blocked order keeps in a window.",
        bounds=(1, 2**32),
    )
    window_blocks: int = setting(
        16,
        "Blocks that the blocked order shuffles together; stream holds two such windows in memory.",
        bounds=(1, 2**32),
    )
    cache_gib: float = setting(
        20.0,
        "Limit of this machine's copies of record directories behind URLs.",
        bounds=(0, 2**32),
        environment=True,
    )
    loader_workers: int = setting(
        2, "Worker processes of the loader feeds.", bounds=(0, 256), environment=True
    )


@dataclass(frozen=True, kw_only=True)
class ModelConfig:
    name: str = setting(
        "fast",
        "The network: baseline (the study's), fast (the same function, computed faster), residual, "
        "vit, or FILE.py:NAME, a class of your own.",
        flag="--model",
    )
    first_layer: Literal["trained", "whitened"] = setting(
        "trained",
        "whitened: fixed filters that make the training images' patches white, never trained.",
    )
    vit_size: Literal["tiny", "small", "base"] = setting(
        "tiny", "Of vit: 0.6, 4.8 or 25 million parameters."
    )
    vit_patch_pixels: int = setting(4, "Side of a patch of vit.", bounds=(1, 1024))
    sha256: str = setting("", "Of the file of a network of your own; found by itself.")
    file: str = setting(
        "",
        "Where that file is; found by itself, and in no file of a run.",
        environment=True,
    )

    @property
    def is_own(self) -> bool:
        """Whether the name is FILE.py:NAME."""
        return OWN.fullmatch(self.name) is not None


@dataclass(frozen=True, kw_only=True)
class OptimConfig:
    name: Literal["adam", "adamw"] = setting("adamw", "The torch optimiser.")
    learning_rate: float = setting(0.01, "Highest learning rate of the schedule.", bounds=(0, 1000))
    schedule: Literal["constant", "one_cycle", "linear"] = setting(
        "one_cycle",
        "After a linear warm-up to the highest rate: one_cycle by a cosine to almost zero, "
        "linear straight to zero.",
    )
    warmup_fraction: float = setting(
        0.2, "Part of all steps that warm up (not constant).", bounds=(0, 1)
    )
    beta2: float = setting(
        0.999, "Memory of the squared gradients: 0.99 is some 100 steps.", bounds=(0, 0.999999)
    )
    weight_decay: float = setting(
        0.01, "Decoupled (adamw), on weights only, not on biases.", bounds=(0, 1000)
    )
    label_smoothing: float = setting(
        0.05, "Share of the target spread over all classes; never in evaluation.", bounds=(0, 1)
    )
    fused: bool = setting(True, "One kernel for the whole optimiser.")
    batch_schedule: Literal["fixed", "ramp", "noise"] = setting(
        "fixed",
        "The global batch of each epoch: one for all; a --batch-ramp; or, by the noise scale and "
        "timings, doubled or halved. The learning rate goes with the root of it over global_batch.",
        flag="--batch-schedule",
    )
    batch_ramp: str = setting(
        "",
        "Global batches and their epochs, such as 128x1,256x1,512x2; the last goes on to the end.",
        flag="--batch-ramp",
    )
    batch_min: int = setting(32, "Least global batch of the schedule noise.", bounds=(1, 2**24))
    batch_max: int = setting(4096, "Largest of the schedule noise.", bounds=(1, 2**24))


@dataclass(frozen=True, kw_only=True)
class StepConfig:
    precision: Literal["fp32", "tf32", "bf16", "fp16", "fp8"] = setting(
        "fp32",
        "Arithmetic of forward and backward; parameters and optimiser stay fp32. "
        "fp32 is IEEE's, also where torch would round to TF32 by itself; fp8 is that of linear "
        "layers, and bf16 all else.",
    )
    channels_last: bool = setting(
        True, "NHWC memory format for activations and weights.", flag="--channels-last"
    )
    compile: Literal["off", "default", "max-autotune"] = setting(
        "off",
        "torch.compile from the batch to the loss, in this mode; alone: default.",
        flag="--compile",
        environment=True,
    )
    triton_conv_backward: bool = setting(
        False,
        "torch.compile max-autotune may write convolutions' gradients in Triton, where it times "
        "them as faster (torch 2.13 or newer).",
        environment=True,
    )
    split_under_ddp: bool = setting(
        True,
        "torch.compile on several ranks: a graph for each bucket of gradients, whose all-reduce "
        "starts early; false: one graph.",
        environment=True,
    )
    parallel: Literal["ddp", "fsdp"] = setting(
        "ddp",
        "What several ranks keep: ddp, each of them everything; fsdp, each its part of parameters, "
        "gradients and moments, gathered for each step. fsdp gives way to ddp on one rank and with "
        "--canonical, --noise-scale or --batch-schedule noise, which need whole gradients; "
        "--compile and the kernel adamw give way to it.",
        flag="--parallel",
        environment=True,
    )
    reshard_after_forward: bool = setting(
        True,
        "fsdp frees a large block's parameters after its forward, and gathers them again in the "
        "backward; false: once a step, for more memory.",
        environment=True,
    )
    cudnn_benchmark: bool = setting(
        False,
        "cuDNN times its algorithms in warm-up and takes the fastest; the last bits may then "
        "differ from run to run.",
        environment=True,
    )
    accumulate: int = setting(
        1,
        "Parts of a rank's batch before the one update.",
        bounds=(1, 4096),
        flag="--accumulate",
        environment=True,
    )
    canonical: int = setting(
        0,
        "Shards of a global batch that are added in one order: the same weights to the bit on "
        "every number of ranks that divides it; 0: off.",
        bounds=(0, MOST_SHARDS),
        flag="--canonical",
    )
    noise_scale: bool = setting(
        False,
        "Measure the gradient's noise scale: the batch size beyond which larger ones save few "
        "steps. Takes a batch in 2 parts at least.",
        flag="--noise-scale",
        environment=True,
    )
    cuda_graphs: bool = setting(
        False, "Capture the whole step in one CUDA graph.", flag="--cuda-graphs", environment=True
    )
    steps_per_launch: int = setting(
        1,
        "Steps in one launch; what is left of an epoch runs step by step.",
        bounds=(1, 64),
        flag="--steps-per-launch",
        environment=True,
    )


@dataclass(frozen=True, kw_only=True)
class RunConfig:
    data: DataConfig = DataConfig()
    model: ModelConfig = ModelConfig()
    optim: OptimConfig = OptimConfig()
    step: StepConfig = StepConfig()
    augment: AugmentConfig = AugmentConfig()
    kernels: tuple[KernelName, ...] = setting(
        (),
        "Fused layers, and the optimiser adamw: all, off, names with commas between, or auto: "
        "on a CPU those made for it.",
        flag="--kernels",
        environment=True,
    )
    global_batch: int = setting(
        512, "Samples of all ranks together in one step.", bounds=(1, 2**24)
    )
    epochs: int = setting(
        4,
        "Passes over the training split; the schedule spans them all.",
        bounds=(1, 100_000),
        flag="--epochs",
    )
    seed: int = setting(
        42, "Initial weights and order of samples.", bounds=(0, 2**63 - 1), flag="--seed"
    )
    schedule_epochs: int = setting(
        0,
        "Epochs that the learning rate's schedule spans; 0: as many as are trained.",
        bounds=(0, 100_000),
    )
    checkpoint_every: str = setting(
        "1epoch,60s",
        "When a run is saved: 500steps, 30s, 1epoch, or several with commas between.",
        flag="--checkpoint-every",
        environment=True,
    )
    timeout_s: float = setting(
        60.0,
        "How long ranks wait for one that hangs before the run ends.",
        bounds=(5, 86_400),
        flag="--timeout",
        environment=True,
    )
    log_ids: bool = setting(
        False,
        "Write the ids and pixels' checksums of all batches to OUT/ids, "
        "for tools/verify order; slow.",
        environment=True,
    )
    track: tuple[TrackerName, ...] = setting(
        (),
        "Trackers that get settings and figures, too: tensorboard, wandb, mlflow, trackio; several "
        "with commas between.",
        flag="--track",
        environment=True,
    )
    serve: int = setting(
        NO_PAGE,
        "Show the training on a page at this port of 127.0.0.1; alone, or 0: at a free one.  "
        "[default: no page]",
        bounds=(NO_PAGE, 65_535),
        flag="--serve",
        environment=True,
    )
    evaluate_every: int = setting(
        0,
        "Steps between evaluations within an epoch, off the clock; 0: at epochs' ends only.",
        bounds=(0, 2**31),
        flag="--evaluate-every",
        environment=True,
    )
    target_accuracy: float = setting(
        0.0,
        "Stop at the first evaluation whose validation accuracy (0..1) reaches this; 0: run all "
        "epochs.",
        bounds=(0, 1),
        flag="--target-accuracy",
        environment=True,
    )

    def training_settings(self) -> dict[str, Any]:
        """The settings that decide what is computed, dotted."""
        return flatten(_training(self))

    def digest(self) -> str:
        """16 hex digits that are equal where two configs compute the same training."""
        text = json.dumps(_training(self), sort_keys=True)
        return hashlib.sha256(text.encode()).hexdigest()[:16]


LINEAR = OptimConfig(schedule="linear", warmup_fraction=0.1, beta2=0.99)
RECIPES: dict[str, RunConfig] = {
    "fast": RunConfig(
        data=DataConfig(order="stratified"),
        model=ModelConfig(first_layer="whitened"),
        optim=replace(LINEAR, learning_rate=0.005),
        kernels=AUTO,
        global_batch=128,
        epochs=2,
    ),
    "best": RunConfig(
        data=DataConfig(order="stratified"),
        optim=replace(LINEAR, learning_rate=0.008, weight_decay=0.1, label_smoothing=0.1),
        kernels=AUTO,
        global_batch=128,
        epochs=8,
    ),
    "large-batch": RunConfig(
        data=DataConfig(order="stratified"),
        optim=replace(
            LINEAR,
            learning_rate=0.01,
            weight_decay=0.1,
            label_smoothing=0.1,
            batch_schedule="ramp",
            batch_ramp="512x4,2048x4,8192x4",
        ),
        kernels=AUTO,
        global_batch=512,
        epochs=12,
    ),
    "residual": RunConfig(
        data=DataConfig(order="stratified"),
        model=ModelConfig(name="residual"),
        optim=replace(LINEAR, learning_rate=0.004, weight_decay=0.05, label_smoothing=0.1),
        global_batch=128,
        epochs=6,
    ),
    "vit": RunConfig(
        data=DataConfig(order="stratified"),
        model=ModelConfig(name="vit", vit_patch_pixels=7),
        optim=replace(LINEAR, learning_rate=0.004, weight_decay=0.05, label_smoothing=0.1),
        global_batch=128,
        epochs=8,
    ),
    "study": RunConfig(
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
    ),
}
"""Named configs: --recipe NAME, or `recipe = "NAME"` in a TOML file.

fast is the default: more than the study's accuracy in two epochs, its first layer whitened and
frozen. best is the study's network in eight epochs, all of it trained. large-batch ends with steps
of 8,192 samples, for many ranks. residual and vit are for --model residual and --model vit, which
take them where no recipe is named.
study is what --baseline trains, as the study did: fp32, NCHW, eager, a loader sample by sample,
Adam at a constant 1e-3, batch 64, 12 epochs.
What was measured of them, and what was not yet: bench_configs/README.md.
"""


def settings_of(config: Any, prefix: str = "") -> Iterator[tuple[str, Field[Any], Any, Any]]:
    """(dotted name, field, type, value) of every setting."""
    hints = get_type_hints(type(config))
    for each in fields(config):
        value = getattr(config, each.name)
        if is_dataclass(value):
            yield from settings_of(value, f"{prefix}{each.name}.")
        else:
            yield prefix + each.name, each, hints[each.name], value


def recipe_settings(name: str, where: str) -> dict[str, Any]:
    """What a recipe sets otherwise than the default, dotted.

    Raises:
        UserError: there is none of that name.
    """
    if name not in RECIPES:
        raise UserError(f"{where}: there is no recipe {name!r}; choose from {', '.join(RECIPES)}")
    return changed_settings(RECIPES[name])


def changed_settings(config: RunConfig) -> dict[str, Any]:
    """What a config sets otherwise than the default, dotted."""
    defaults = {dotted: value for dotted, _, _, value in settings_of(RunConfig())}
    found = settings_of(config)
    return {dotted: value for dotted, _, _, value in found if value != defaults[dotted]}


def _training(config: Any) -> dict[str, Any]:
    """The settings that say what is computed, as a tree."""
    kept = [each.name for each in fields(config) if not each.metadata.get("environment")]
    values = {name: getattr(config, name) for name in kept}
    return {name: _training(v) if is_dataclass(v) else v for name, v in values.items()}


def override(config: RunConfig, dotted: Mapping[str, Any], source: str) -> RunConfig:
    """`config` with fields such as "optim.learning_rate" replaced.

    Names, types and bounds are checked.

    Args:
        source: where the values stand (a file, "--set"), for the error's text.
    Raises:
        UserError: unknown field, wrong type, or a value out of bounds.
    """
    for name, value in with_full_paths(dotted, None, source).items():
        config = _replace(config, name.split("."), value, f"{source}: {name}")
    for name, each, _, value in settings_of(config):
        low, high = each.metadata["low"], each.metadata["high"]
        if low is not None and not low <= value <= high:  # also true for NaN
            raise UserError(f"{source}: {name} is {value}; give a value from {low} to {high}")
    config = replace(config, model=_checked_model(config.model, source))
    if config.data.feed == "stream" and config.data.order != "blocked":
        what = "the stream feed serves the blocked order only"
        raise UserError(f"{source}: {what}; set data.order=blocked too")
    if config.step.canonical and config.step.accumulate > 1:
        what = "a canonical step computes its shards one by one already"
        raise UserError(f"{source}: {what}; leave step.accumulate at 1, or step.canonical at 0")
    return config


def _checked_model(model: ModelConfig, source: str) -> ModelConfig:
    """The network's settings, without an earlier file where its name is one of the table."""
    if model.is_own:
        return model
    if model.name not in NETWORK_NAMES:
        choices = ", ".join(NETWORK_NAMES)
        remedy = f"choose one of {choices}, or give FILE.py:NAME"
        raise UserError(f"{source}: model.name: is {model.name!r}; {remedy}")
    return replace(model, file="", sha256="")


def with_full_paths(dotted: Mapping[str, Any], folder: Path | None, source: str) -> dict[str, Any]:
    """`dotted` with its paths made absolute: relative ones from `folder`, None the current one.

    Raises:
        UserError: one cannot be a path.
    """
    full = dict(dotted)
    for name in (name for name, each, _, _ in settings_of(RunConfig()) if each.metadata["path"]):
        value = full.get(name)
        if isinstance(value, str) and value:
            try:
                full[name] = said_url(value) if is_url(value) else str(full_path(value, folder))
            except UserError as error:
                raise UserError(f"{source}: {name}: {error}") from None
    return full


def flatten(tree: dict[str, Any]) -> dict[str, Any]:
    """{"optim": {"fused": true}} -> {"optim.fused": true}, at any depth."""
    dotted: dict[str, Any] = {}
    for name, value in tree.items():
        if isinstance(value, dict):
            dotted |= {f"{name}.{key}": inner for key, inner in flatten(value).items()}
        else:
            dotted[name] = value
    return dotted


def _replace(config: Any, names: list[str], value: Any, where: str) -> Any:
    hints = get_type_hints(type(config))
    name, rest = names[0], names[1:]
    if name not in hints:
        close = get_close_matches(name, hints, 1)
        remedy = f"is {close[0]} meant?" if close else f"choose from {', '.join(hints)}"
        raise UserError(f"{where}: unknown setting; {remedy}")
    if is_dataclass(hints[name]):
        if not rest:
            settings = ", ".join(get_type_hints(hints[name]))
            raise UserError(f"{where}: is a table, not a value; its settings are {settings}")
        return replace(config, **{name: _replace(getattr(config, name), rest, value, where)})
    if rest:
        raise UserError(f"{where}: {name} is a value, not a table; write {name} = ...")
    return replace(config, **{name: _checked(value, hints[name], where)})


def _checked(value: Any, kind: Any, where: str) -> Any:
    if get_origin(kind) is tuple:
        return checked_names(value, get_args(get_args(kind)[0]), where)
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


def checked_names(value: Any, known: tuple[str, ...], where: str) -> tuple[str, ...]:
    """Some of the `known` names, in their order: of a list, of text with commas, or all."""
    given = value.replace(" ", "").split(",") if isinstance(value, str) else value
    if not isinstance(given, (list, tuple)):
        raise UserError(f"{where}: is {value!r}; give a list of names, or all")
    given = [name for name in given if name not in ("", "off")]
    if unknown := [name for name in given if name not in ("all", *known)]:
        choices = ", ".join(("all", *known))
        raise UserError(f"{where}: is {unknown[0]!r}; choose from {choices}")
    if "auto" in given and len(given) > 1:
        raise UserError(f"{where}: is {value!r}; give auto alone")
    if "all" in given:
        return tuple(name for name in known if name not in NOT_IN_ALL)
    return tuple(name for name in known if name in given)
