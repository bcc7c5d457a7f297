"""model.safetensors: a network's parameters and, in the file's metadata, what its answers mean.

The metadata are one entry, `network`, JSON of a NetworkFacts: of several, safetensors writes the
order anew each time, and the same weights would not be the same bytes. Readers of other makers see
a text there, or nothing.

Does not: verify a checkpoint (checkpoint.py), nor find a file (tools/measure/trained.py).
"""

import json
from dataclasses import asdict, replace
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save

from engine import __version__
from engine.config import ModelConfig
from engine.data.records import MAX_CLASSES, MAX_PIXELS, Records
from engine.durable import Damaged, parse_json, write_file
from engine.errors import UserError
from engine.models import Network, make_model, network_class
from engine.report import UNKNOWN, Environment, NetworkFacts, without_folders
from engine.train.state import Tensors
from engine.typed import typed

KEY = "network"
"""Of the metadata's entry."""
LIMIT_BYTES = 4 * 2**20
"""Of the entry: 256 names of classes of at most 4,096 bytes are a quarter of it."""
REMEDY = "name the folder of a finished run, or train it again"


def network_facts(
    model: ModelConfig, records: Records, environment: Environment | None = None
) -> NetworkFacts:
    """What a network trained on these records takes and answers.

    Args:
        environment: of its training; None: not known.
    """
    height, width = records.height_width
    return NetworkFacts(
        model=replace(model, file=""),
        classes=list(records.classes),
        height_pixels=height,
        width_pixels=width,
        scaling=network_class(model).scaling,
        pixel_mean=records.pixel_mean,
        dataset_fingerprint=records.fingerprint,
        version=__version__ if environment else UNKNOWN,
        commit=environment.commit if environment else UNKNOWN,
        dirty=environment.dirty if environment else None,
    )


def packed(tensors: Tensors, metadata: dict[str, str] | None = None) -> bytes:
    """As safetensors, which keeps no strides: channels-last weights are written in plain order."""
    whole = {name: tensor.contiguous() for name, tensor in tensors.items()}
    return save(whole, metadata=metadata)


def metadata_of(facts: NetworkFacts) -> dict[str, str]:
    """The metadata that say these facts."""
    return {KEY: json.dumps(asdict(facts), ensure_ascii=False, allow_nan=False)}


def plain_metadata(facts: NetworkFacts) -> dict[str, str]:
    """What other programs need of these facts, an entry each."""
    return {
        "model": without_folders(facts.model.name),
        "input": f"uint8 [B, {facts.height_pixels}, {facts.width_pixels}]",
        "classes": json.dumps(facts.classes, ensure_ascii=False),
        "dataset_fingerprint": facts.dataset_fingerprint,
    }


def metadata_for_others(facts: NetworkFacts) -> dict[str, str]:
    """The metadata that this project and other programs can read."""
    return {"format": "pt"} | plain_metadata(facts) | metadata_of(facts)


def save_model(path: Path, tensors: Tensors, facts: NetworkFacts | None) -> None:
    """Write a network's parameters and buffers as one safetensors file."""
    write_file(path, packed(tensors, metadata_of(facts) if facts else None))


def read_facts(file: Path) -> NetworkFacts | None:
    """What a file of weights says of its network; None where it says nothing.

    Raises:
        UserError: it is no safetensors file, or what it says cannot be.
    """
    if not file.is_file():
        raise UserError(f"{file.parent}: holds no {file.name}; {REMEDY}")
    try:
        with safe_open(file, "pt") as opened:
            metadata = opened.metadata() or {}
    except (OSError, SafetensorError) as error:
        raise _unreadable(file, error) from None
    if KEY not in metadata:
        return None
    try:
        if len(metadata[KEY]) > LIMIT_BYTES:
            raise Damaged(f"larger than {LIMIT_BYTES:,} bytes")
        facts = typed(NetworkFacts, parse_json(metadata[KEY].encode(), KEY), KEY)
        _check(facts)
    except Damaged as error:
        raise UserError(f"{file}: its metadata are no network's ({error}); {REMEDY}") from None
    return facts


def _check(facts: NetworkFacts) -> None:
    """Damaged where facts are not those of any network that is trained here."""
    num_pixels = facts.height_pixels * facts.width_pixels
    if min(facts.height_pixels, facts.width_pixels) < 1 or num_pixels > MAX_PIXELS:
        raise Damaged(f"images of {facts.height_pixels} x {facts.width_pixels} pixels cannot be")
    if not 0 < len(set(facts.classes)) == len(facts.classes) <= MAX_CLASSES:
        raise Damaged(f"the classes are not 1 to {MAX_CLASSES} different texts")
    if not 0 <= facts.pixel_mean <= 255:
        raise Damaged(f"pixels cannot have a mean of {facts.pixel_mean}")
    if facts.model.vit_patch_pixels < 1:
        raise Damaged("a patch has no pixels")
    if facts.model.file:
        raise Damaged("they name a file of code, which only a command line may")


def load_network(model: ModelConfig, facts: NetworkFacts, file: Path) -> Network:
    """The network on the CPU with the weights of a file, as it answers: it is not in training.

    Args:
        model: the run's, with the place of a file of the user's own.
    Raises:
        UserError: the weights are not there, damaged, or another network's.
    """
    found = _read_weights(file)
    size = facts.height_pixels, facts.width_pixels
    if not model.is_own:  # a file may speak of images so large that no memory holds such a network
        with torch.device("meta"):
            _check_forms(make_model(model, *size, len(facts.classes), seed=0), found, file)
    network = make_model(model, *size, len(facts.classes), seed=0)
    _check_forms(network, found, file)
    network.load_state_dict(found)
    return network


def _read_weights(file: Path) -> Tensors:
    """The parameters in a safetensors file."""
    if not file.is_file():
        raise UserError(f"{file.parent}: holds no {file.name}; {REMEDY}")
    try:
        return load_file(file)
    except (OSError, SafetensorError) as error:
        raise _unreadable(file, error) from None


def _unreadable(file: Path, error: Exception) -> UserError:
    if file.suffix in (".onnx", ".pt2"):
        remedy = "name its run, or a model.safetensors"
        return UserError(f"{file}: is an exported network, which other programs run; {remedy}")
    return UserError(f"{file}: is damaged or no safetensors file ({error}); {REMEDY}")


def _check_forms(network: torch.nn.Module, found: Tensors, file: Path) -> None:
    """UserError if the parameters are not those of such a network."""
    if _forms(found) != _forms(network.state_dict()):
        raise UserError(f"{file}: holds the weights of another network; {REMEDY}")


def _forms(tensors: Tensors) -> dict[str, tuple[torch.Size, torch.dtype]]:
    return {name: (tensor.shape, tensor.dtype) for name, tensor in tensors.items()}
