"""How far accuracies are from the highest known: tools/evaluate's figures beside a profile's cells.

evaluation.json gives the runs and their ensembles, data_facts.json what the images alone allow; the
section stands where one of them lies in the profile's folder.

Does not: check that the cells are of the same records; a profile does not name its own.
"""

from collections.abc import Iterator
from pathlib import Path

import pandas as pd

from engine.errors import UserError
from tools.measure import evaluation, neighbours
from tools.measure.results import clean

SEEN = (
    "Accuracy on the test split, and the points that are missing to the highest that any network "
    "or ensemble reached here. {bound}The evaluation and the facts of the data are those of "
    "tools/evaluate, of the records {records}; the cells are worth comparing where theirs are the "
    "same."
)
BOUND = "No function of the pixels can be right on more than {:.2%}. "
Line = tuple[str, float]
"""What answered, and its accuracy."""


def distances(folder: Path, frame: pd.DataFrame) -> tuple[str, pd.DataFrame] | None:
    """What is seen, and the table; None where neither file lies in the folder.

    Args:
        frame: of the cells, as `cells_frame` makes it.
    Raises:
        UserError: a file is damaged, or of another format; or the two are of other records.
    """
    lines, reached, records, bound = list[Line](), list[Line](), "", ""
    if (folder / neighbours.NAME).exists():
        facts = neighbours.read_facts(folder)
        records, bound = facts.dataset_fingerprint, BOUND.format(facts.ceiling_fraction)
        lines.append(("the nearest training image", facts.nearest.accuracy_fraction))
    if (folder / evaluation.NAME).exists():
        found = evaluation.read_evaluation(folder)
        of_facts, records = records, found.runs[0].dataset_fingerprint
        if of_facts not in ("", records):
            what = f"{neighbours.NAME} and {evaluation.NAME} are of other records than each other"
            raise UserError(f"{folder}: {what}; make one of them anew with tools/evaluate")
        if found.split == "test":
            reached = list(_evaluated(found))
    if not records:
        return None
    lines += [
        (name, accuracy)
        for name, accuracy in zip(frame["name"], frame["test_accuracy_fraction"], strict=True)
        if pd.notna(accuracy)
    ]
    lines += reached
    highest = max((accuracy for _, accuracy in lines), default=0.0)
    table = pd.DataFrame(
        [(name, accuracy, 100 * (highest - accuracy)) for name, accuracy in lines],
        columns=["name", "test_accuracy_fraction", "points below the highest"],
    )
    return SEEN.format(bound=bound, records=records[:16]), table


def _evaluated(found: evaluation.Evaluation) -> Iterator[Line]:
    for run in found.runs:
        yield f"run {clean(run.name)}", run.scores.accuracy_fraction
    named = (("ensemble", found.ensemble), ("best ensemble found", found.best_ensemble))
    for title, ensemble in named:
        if ensemble:
            yield f"{title}, {len(ensemble.runs)} runs", ensemble.scores.accuracy_fraction
