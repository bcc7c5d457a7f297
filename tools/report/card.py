"""The model card: README.md beside exported networks, for those who have nothing else of the run.

Every figure in it is the run's report's or the check's. Does not: measure. Shapes: none.
"""

import json
from collections.abc import Sequence
from dataclasses import dataclass

from engine.config import RunConfig
from engine.errors import printable
from engine.report import Environment, NetworkFacts, RunReport, without_folders
from tools.measure.forms import FACTS, Check
from tools.report.rows import markdown_table, number

NAME = "README.md"
READING = {
    "onnx": (
        "session = onnxruntime.InferenceSession('model.onnx')",
        "(logits,) = session.run(['logits'], {'image': images})  # NumPy, uint8",
        "classes = json.loads(session.get_modelmeta().custom_metadata_map['classes'])",
    ),
    "torch": (
        f"facts = {{'{FACTS}': ''}}",
        "network = torch.export.load('model.pt2', extra_files=facts).module()",
        "logits = network(images)  # a tensor, uint8",
        f"classes = json.loads(json.loads(facts['{FACTS}'])['classes'])",
    ),
    "safetensors": (
        "weights = safetensors.torch.load_file('model.safetensors')  # for the project's own class",
    ),
}
"""How each form is read, by its name."""


@dataclass(frozen=True, kw_only=True)
class Card:
    """What a model card says."""

    facts: NetworkFacts
    config: RunConfig
    split: str
    checks: Sequence[Check]
    report: RunReport | None
    """None: of a checkpoint."""
    checkpoint: str
    """Whose weights these are; empty: the run's last."""
    environment: Environment
    """Where it was exported."""


def card_text(card: Card) -> str:
    """The card as Markdown."""
    parts = [_head(card), _files(card), _use(card), _figures(card), _circumstances(card)]
    return "\n\n".join([*parts, _limits(card)]) + "\n"


def _head(card: Card) -> str:
    facts = card.facts
    network = printable(without_folders(facts.model.name))
    names = json.dumps(facts.classes, ensure_ascii=False)
    fence = "`" * (3 + names.count("`"))  # longer than any run of them in a name
    return "\n".join(
        [
            f"# A network of {len(facts.classes)} classes: `{network}`",
            "",
            f"It reads grey images of {facts.height_pixels} x {facts.width_pixels} pixels "
            "(`uint8`, one value per pixel, as in its training data) and gives a logit per class. "
            "The classes, in the logits' order:",
            "",
            f"{fence}json",
            printable(names),
            fence,
        ]
    )


def _files(card: Card) -> str:
    rows = [
        (
            f"`{check.file}`",
            check.runs_by,
            f"{check.num_same:,} of {check.num_samples:,}",
            f"{check.largest_difference:.2g}",
            f"{check.largest_logit:.3g}",
        )
        for check in card.checks
    ]
    head = "| file | run by | same class | largest difference | largest logit |"
    text = (
        f"Each file was opened again and run on the whole {card.split} split, in batches and with "
        "a single image, beside the network that it was made from, in fp32. The differences are "
        "of logits."
    )
    return "\n".join(["## Files", "", text, "", *markdown_table(head, "llrrr", rows)])


def _use(card: Card) -> str:
    blocks = ["\n".join(["```python", *READING[check.form], "```"]) for check in card.checks]
    return "\n\n".join(["## Use", *blocks])


def _figures(card: Card) -> str:
    check = card.checks[0]
    rows = [(f"accuracy on {card.split}, as exported", f"{check.accuracy_fraction:.2%}")]
    if card.report:
        rows += _reported(card.report)
    return "\n".join(["## Figures", "", *markdown_table("| what | figure |", "lr", rows)])


def _reported(report: RunReport) -> list[tuple[str, str]]:
    shares = {
        "accuracy on val, by the run's report": report.val_accuracy_fraction,
        "accuracy on test, by the run's report": report.test_accuracy_fraction,
    }
    rows = [(name, f"{share:.2%}") for name, share in shares.items() if share is not None]
    if report.test_loss is not None:
        rows.append(("loss on test, by the run's report", f"{report.test_loss:.4f}"))
    return [
        *rows,
        ("parameters", f"{report.num_parameters:,}"),
        ("training images", f"{report.num_train_samples:,}"),
        ("epochs trained", number(report.num_epochs)),
        ("training time", f"{report.train_s:.2f} s"),
    ]


def _circumstances(card: Card) -> str:
    config, here = card.config, card.environment
    rows = [
        ("training data's fingerprint", f"`{card.facts.dataset_fingerprint}`"),
        ("seed, global batch", f"{config.seed}, {config.global_batch}"),
        ("precision of training", config.step.precision),
    ]
    if card.checkpoint:
        rows.append(("weights of the checkpoint", f"`{card.checkpoint}`"))
    if card.report:
        there = card.report.environment
        rows += [
            ("status of the run", card.report.status),
            ("trained on", f"{_machine(there)}, {card.report.num_ranks} rank(s)"),
            ("trained by", _versions(there)),
            ("command", f"`{printable(there.command)}`"),
        ]
    rows += [("exported on", _machine(here)), ("exported by", _versions(here))]
    return "\n".join(["## Circumstances", "", *markdown_table("| what | |", "ll", rows)])


def _machine(there: Environment) -> str:
    return there.gpu_name or there.cpu_name


def _versions(there: Environment) -> str:
    changed = " with changes" if there.dirty else ""
    return f"torch {there.torch}, commit `{there.commit}`{changed}"


def _limits(card: Card) -> str:
    kinds = len(card.facts.classes)
    return "\n".join(
        [
            "## Limits",
            "",
            f"- It knows {kinds} classes and answers one of them to any image, whatever is on it.",
            "- Its answers are worth what the figures say on images like its training data: the "
            "same size, background and stroke brightness, one character, centred alike.",
            "- Where typefaces were dealt at random, train and test share them, and the accuracy "
            "says nothing about new ones.",
            "- The logits' softmax is no calibrated probability.",
            "- A fingerprint finds damage, not forgery: it is no signature.",
        ]
    )
