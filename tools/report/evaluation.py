"""Evaluations and facts of data as tables of text.

Does not: compute a figure. Shapes: none.
"""

from collections.abc import Sequence

from engine.errors import printable
from tools.measure.evaluation import Ensemble, Evaluation, figures
from tools.measure.neighbours import DataFacts
from tools.measure.scores import Scores
from tools.report.figures import percent

LOSSES = frozenset({"loss"})
"""Figures that are no shares."""
ENSEMBLE, BEST = "ensemble", "best ensemble found"


def evaluation_text(found: Evaluation) -> str:
    """Everything for people: figures with runs side by side, what the merges are, the classes."""
    parts = [_head(found), *_figures(found), *_members(found), *found.notes]
    shown = found.ensemble.scores if found.ensemble else found.runs[0].scores
    parts += ["", *_merges(shown)]
    if found.ensemble or len(found.runs) == 1:
        parts += ["", *_classes(shown), "", *_confusions(shown)]
    return printable_lines(parts)


def printable_lines(lines: Sequence[str]) -> str:
    return "\n".join(printable(line) for line in lines)


def _head(found: Evaluation) -> str:
    num = found.runs[0].scores.num_samples
    elsewhere = ", not of the records trained on" if found.runs[0].is_elsewhere else ""
    shifts = ", the mean over each image and its four one-pixel shifts" if found.shifts else ""
    return f"{found.split} split, {num:,} samples{elsewhere}{shifts}; in fp32"


def _figures(found: Evaluation) -> list[str]:
    columns = [(run.name, run.scores) for run in found.runs]
    columns += [
        (title, ensemble.scores)
        for title, ensemble in ((ENSEMBLE, found.ensemble), (BEST, found.best_ensemble))
        if ensemble
    ]
    head = ["", *(title for title, _ in columns)]
    if found.pooled:
        head += ["pooled", "from", "to", "deviation"]
    pooled = {each.name: each for each in found.pooled}
    names = list(dict.fromkeys(name for _, scores in columns for name in figures(scores)))
    rows = []
    for name in names:
        row = [name, *(_figure(name, figures(scores).get(name)) for _, scores in columns)]
        if each := pooled.get(name):
            row += [
                _figure(name, value) for value in (each.value, each.low, each.high, each.deviation)
            ]
        rows.append(row)
    return table(head, rows + _calibration([scores for _, scores in columns]))


def _figure(name: str, value: float | None) -> str:
    if value is None:
        return "-"
    return f"{value:.4f}" if name in LOSSES else percent(value)


def _calibration(columns: Sequence[Scores]) -> list[list[str]]:
    each = [scores.calibration for scores in columns]
    rows = [["calibration error", *(percent(one.error_fraction) for one in each)]]
    if any(one.temperature for one in each):
        rows += [
            ["temperature, by val", *(_plain(one.temperature) for one in each)],
            ["loss at it", *(_plain(one.scaled_loss) for one in each)],
            [
                "calibration error at it",
                *(_figure("", one.scaled_error_fraction) for one in each),
            ],
        ]
    return rows


def _plain(value: float | None) -> str:
    return "-" if value is None else f"{value:.4f}"


def _members(found: Evaluation) -> list[str]:
    best: Ensemble | None = found.best_ensemble
    return [f"{BEST} (chosen on val): {', '.join(best.runs)}"] if best else []


def _merges(scores: Scores) -> list[str]:
    lines = ["What counts as one:"]
    for merge in scores.merges:
        groups = " ".join("".join(group) for group in merge.groups) or "nothing"
        lines += [
            f"  {merge.name} ({merge.num_classes} classes left): {groups}",
            f"    {merge.why}",
        ]
    return lines


def _classes(scores: Scores) -> list[str]:
    rows = [
        [
            each.name,
            f"{each.num_samples:,}",
            percent(each.accuracy_fraction),
            each.mistaken_for or "-",
            f"{each.num_mistaken:,}",
        ]
        for each in sorted(scores.classes, key=lambda each: each.accuracy_fraction)
    ]
    return table(["class", "samples", "right", "most read as", "times"], rows)


def _confusions(scores: Scores) -> list[str]:
    if not scores.confusions:
        return ["no sample was read as another class"]
    rows = [
        [each.true, each.read, f"{each.num_samples:,}", percent(each.share_fraction)]
        for each in scores.confusions
    ]
    return table(["class", "read as", "times", "of the class"], rows)


def facts_text(facts: DataFacts) -> str:
    """The facts of data for people."""
    rows = [
        [
            f"{each.split} in {each.among}",
            f"RMS < {each.below_rms}" if each.below_rms else "identical pixels",
            _share(each.num_with_twins, each.num_images),
            _share(each.num_with_other_label, each.num_images),
            _share(each.num_mostly_other_label, each.num_images),
        ]
        for each in facts.twins
    ]
    near = facts.nearest
    sizes = ", ".join(f"{num:,} {name}" for name, num in facts.num_images.items())
    return printable_lines(
        [
            f"images: {sizes}; fingerprint {facts.dataset_fingerprint[:16]}",
            *table(["", "twins", "have twins", "one of another label", "most of another"], rows),
            f"no function of the pixels is right on more than {percent(facts.ceiling_fraction)} "
            "of test (equal images, several labels)",
            f"nearest of {near.num_train:,} training images: "
            f"{percent(near.accuracy_fraction)} right; an image of another class is nearer for "
            f"{percent(near.other_nearer_fraction)}, equally near for "
            f"{percent(near.num_tied / near.num_images)}",
            f"one of the own class among the 5 nearest: {percent(near.own_in_five_fraction)}",
        ]
    )


def _share(num: int, of: int) -> str:
    return f"{num:,} ({percent(num / of)})" if of else "0"


def table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    """Lines with columns as wide as what stands in them: the first to the left, others right."""
    padded = [[printable(cell) for cell in row] + [""] * (len(head) - len(row)) for row in rows]
    widths = [max(map(len, column)) for column in zip(head, *padded, strict=True)]
    return [
        "  ".join(
            cell.rjust(width) if number else cell.ljust(width)
            for number, (cell, width) in enumerate(zip(row, widths, strict=True))
        ).rstrip()
        for row in ([printable(cell) for cell in head], *padded)
    ]
