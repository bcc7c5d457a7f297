"""What a network reads in images, as lines for people and as CSV.

Does not: compute an answer. Shapes: T answers of an image.
"""

import csv
import io
import re
from collections.abc import Iterator, Sequence

from engine.data.foreign import listed
from engine.data.inputs import Inputs
from engine.errors import printable
from engine.report import NetworkFacts
from tools.measure.predictions import MIDDLE, Predictions

FORMULA = re.compile(r"[=+\-@].+", re.DOTALL)
NUMBER = re.compile(r"[+-]?[0-9]+(\.[0-9]+)?")


def lines(predictions: Predictions, facts: NetworkFacts, inputs: Inputs) -> Iterator[str]:
    """A line per image: where it is, the answer, the next likely ones; and the label if another."""
    for place, names, shares, label in _rows(predictions, facts, inputs):
        first, *others = [f"{name} {share:.2%}" for name, share in zip(names, shares, strict=True)]
        rest = f"  ({', '.join(others)})" if others else ""
        wrong = f"  labelled {label}" if label not in (None, names[0]) else ""
        yield printable(f"{place}: {first}{rest}{wrong}")


def csv_text(predictions: Predictions, facts: NetworkFacts, inputs: Inputs) -> str:
    """A row per image: image, label, probability, label_2, probability_2, ... and, where labels
    are known, true_label.

    Controls are escaped. A text that a spreadsheet would take for a formula gets a ' before it;
    one of a single character, as + or =, is none.
    """
    num_answers = predictions.answer_NT.shape[1]
    head = ["image", "label", "probability"]
    for number in range(2, num_answers + 1):
        head += [f"label_{number}", f"probability_{number}"]
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(head + ["true_label"] * bool(inputs.classes))
    for place, names, shares, label in _rows(predictions, facts, inputs):
        row = [_guarded(place)]
        for name, share in zip(names, shares, strict=True):
            row += [_guarded(name), f"{share:.6f}"]
        writer.writerow(row if label is None else [*row, _guarded(label)])
    return text.getvalue()


def ground_note(predictions: Predictions, facts: NetworkFacts, *, is_inverted: bool) -> str:
    """That most images look like negatives of what the network was trained on; "" if not."""
    num, num_images = predictions.num_opposite, len(predictions.answer_NT)
    if 2 * num <= num_images:
        return ""
    kinds = ["light on dark", "dark on light"]
    trained, found = kinds if facts.pixel_mean < MIDDLE else reversed(kinds)
    remedy = "leave --invert out" if is_inverted else "give --invert"
    return (
        f"note: {num:,} of {num_images:,} images look {found}, and the network was trained on "
        f"{trained}; {remedy}"
    )


def label_note(facts: NetworkFacts, inputs: Inputs) -> str:
    """That the images bear labels which the network cannot answer; "" if they do not."""
    unknown = [repr(name) for name in inputs.classes if name not in facts.classes]
    if not unknown:
        return ""
    what = f"{len(unknown)} of the {len(inputs.classes)} labels are no classes of this network"
    return f"note: {what} ({listed(unknown)}); images that bear them count as wrong"


def _rows(
    predictions: Predictions, facts: NetworkFacts, inputs: Inputs
) -> Iterator[tuple[str, list[str], Sequence[float], str | None]]:
    """(Place, answers, their probabilities, the label if known) of each image."""
    answers, probabilities = predictions.answer_NT.tolist(), predictions.probability_NT.tolist()
    images = zip(inputs.places, answers, probabilities, strict=True)
    for number, (place, answer_T, probability_T) in enumerate(images):
        names = [facts.classes[answer] for answer in answer_T]
        label = inputs.classes[inputs.label_N[number]] if inputs.classes else None
        yield place, names, probability_T, label


def _guarded(text: str) -> str:
    is_formula = FORMULA.fullmatch(text) and not NUMBER.fullmatch(text)
    return printable(f"'{text}" if is_formula else text)
