"""A trained network as a file that others can run: ONNX, torch.export or safetensors; each checked.

The first two take uint8 pixels, any number of images at once, and give logits; the third holds the
weights alone. All say in their metadata which classes the logits are of. What was written is opened
again by the library that will run it, and answers the whole split; where it answers otherwise than
the network, that is an error, and the command leaves nothing.

Does not: find or open the run (trained.py), or write for people (report/card.py).

Shapes: B images of H x W pixels, N images of the split, K classes.
"""

import json
import logging
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from io import BytesIO
from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import nn

from engine.config import RunConfig
from engine.data.records import Split
from engine.errors import UserError, sentence
from engine.models import make_model
from engine.report import NetworkFacts, without_folders
from engine.train.answers import Network, all_logits
from engine.train.backends import set_fp32_precision
from engine.train.weights import load_network, metadata_for_others, packed, plain_metadata
from tools.measure.forms import FACTS, FORMS, Check

TOLERANCE = 1e-4
"""Of the largest logit, at least of 1: other libraries add in another order. Sums of 3,136 products
in fp32 differ by some 1e-6."""
EXAMPLES = 2
"""Images that a network is traced with: not one, which torch.export would take for a constant."""


def export(
    forms: tuple[str, ...],
    folder: Path,
    weights: Path,
    config: RunConfig,
    facts: NetworkFacts,
    split: Split,
) -> list[Check]:
    """Write each form into `folder`, opened again and compared with the network.

    Args:
        weights: the network's file.
        split: what the files are checked on.
    Raises:
        UserError: the weights are not there or not finite, or a file answers otherwise.
    """
    set_fp32_precision("fp32")
    network = load_network(config.model, facts, weights)
    wanted_NK = all_logits(network, split.image_NHW, torch.device("cpu"))
    if not wanted_NK.isfinite().all():
        raise UserError(f"{weights}: answers with numbers that are not finite; train it again")
    size = facts.height_pixels, facts.width_pixels
    like = make_model(config.model, *size, len(facts.classes), seed=1)
    checks = []
    for name in forms:
        path = write_form(name, folder, network, facts)
        checks.append(check_form(name, path, split, wanted_NK, like))
    return checks


def write_form(name: str, folder: Path, network: nn.Module, facts: NetworkFacts) -> Path:
    """Write the network to its file in `folder`.

    Raises:
        UserError: a network of the user's own cannot be exported so.
    """
    form = FORMS[name]
    what = f"the network {without_folders(facts.model.name)} cannot be exported"
    remedy = "write its forward without branches that depend on pixels, or give --to safetensors"
    with _explained(f"--to {name}: {what}", remedy):
        data = PACK[name](network, facts)
    path = folder / form.file
    path.write_bytes(data)
    return path


def check_form(
    name: str, path: Path, split: Split, wanted_NK: torch.Tensor, like: nn.Module
) -> Check:
    """Open the file as its users will, and compare its answers with the network's.

    Args:
        wanted_NK: the network's logits of the whole split.
        like: a network of the same kind with other weights.
    Raises:
        UserError: it answers otherwise.
    """
    form = FORMS[name]
    remedy = f"update {', '.join(form.packages) or 'torch'}, or give another --to"
    with _explained(f"--to {name}: {form.runs_by} cannot run {form.file}", remedy):
        run = OPEN[name](path, like)
        found_NK = all_logits(run, split.image_NHW, torch.device("cpu"))
        alone_1K = all_logits(run, split.image_NHW[:1], torch.device("cpu"))
    largest = wanted_NK.abs().max().item()
    apart = torch.cat([found_NK - wanted_NK, alone_1K - wanted_NK[:1]])
    difference = apart.abs().max().item()
    if not difference <= TOLERANCE * max(largest, 1.0):  # also of NaN
        what = f"{form.file} answers otherwise than the network, by {difference:.3g} in a logit"
        raise UserError(f"--to {name}: {what}; {remedy}")
    answer_N = found_NK.argmax(1)
    return Check(
        form=name,
        file=form.file,
        runs_by=form.runs_by,
        num_samples=len(split),
        num_same=int((answer_N == wanted_NK.argmax(1)).sum()),
        largest_difference=difference,
        largest_logit=largest,
        accuracy_fraction=float((answer_N == torch.from_numpy(split.label_N)).float().mean()),
    )


@contextmanager
def _explained(what: str, remedy: str) -> Iterator[None]:
    """Whatever other libraries, and a stranger's `forward` in them, raise is a sentence.

    What they say of packages that nobody asked for is not shown.
    """
    logger = logging.getLogger("torch.onnx")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    except Exception as error:
        raise UserError(f"{what} ({sentence(error)}); {remedy}") from None
    finally:
        logger.setLevel(level)


def _program(network: nn.Module, facts: NetworkFacts) -> torch.export.ExportedProgram:
    """The network as torch.export sees it, for any number of images."""
    image_BHW = torch.zeros(EXAMPLES, facts.height_pixels, facts.width_pixels, dtype=torch.uint8)
    batch = torch.export.Dim("batch", min=1)
    with torch.no_grad():
        return torch.export.export(network, (image_BHW,), dynamic_shapes=({0: batch},))


def _pack_onnx(network: nn.Module, facts: NetworkFacts) -> bytes:
    program = torch.onnx.export(
        _program(network, facts),
        dynamo=True,
        input_names=["image"],
        output_names=["logits"],
        dynamic_shapes=({0: "batch"},),
        verbose=False,
    )
    assert program is not None
    model = program.model_proto
    for key, value in plain_metadata(facts).items():
        entry = model.metadata_props.add()
        entry.key = key
        entry.value = value
    data: bytes = model.SerializeToString()
    return data


def _open_onnx(path: Path, like: nn.Module) -> Network:
    import onnxruntime

    session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])

    def run(image_BHW: torch.Tensor) -> torch.Tensor:
        (logits_BK,) = session.run(["logits"], {"image": image_BHW.numpy()})
        return torch.from_numpy(logits_BK)

    return run


def _pack_program(network: nn.Module, facts: NetworkFacts) -> bytes:
    program = _program(network, facts)
    program.example_inputs = None  # they would be pickled
    file = BytesIO()
    torch.export.save(program, file, extra_files={FACTS: json.dumps(plain_metadata(facts))})
    return file.getvalue()


def _open_program(path: Path, like: nn.Module) -> Network:
    return torch.export.load(path).module()


def _pack_weights(network: nn.Module, facts: NetworkFacts) -> bytes:
    return packed(network.state_dict(), metadata_for_others(facts))


def _open_weights(path: Path, like: nn.Module) -> Network:
    like.load_state_dict(load_file(path))
    return like


PACK: dict[str, Callable[[nn.Module, NetworkFacts], bytes]] = {
    "onnx": _pack_onnx,
    "torch": _pack_program,
    "safetensors": _pack_weights,
}
OPEN: dict[str, Callable[[Path, nn.Module], Network]] = {
    "onnx": _open_onnx,
    "torch": _open_program,
    "safetensors": _open_weights,
}
"""From a form's file, and a network of the same kind with other weights."""
