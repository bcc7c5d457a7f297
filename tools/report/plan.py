"""A plan as tables of text: the advice first, then what it is made of.

What was measured and what a model says stand in tables of their own.
"""

from tools.measure.fit import Link
from tools.measure.plan import Plan
from tools.measure.predicted import Prediction
from tools.measure.timings import MODEL
from tools.report.rows import markdown_table, number

SHOWN_EACH = 3
"""Ways of training that are shown of each number of ranks."""


def to_markdown(plan: Plan) -> str:
    """All of it; plan.json has what is left out here."""
    parts = [_advice(plan), _predictions(plan), _steps(plan)]
    if plan.model.link:
        parts += [_link(plan.model.link), _counted(plan)]
    return "\n".join(parts)


def _advice(plan: Plan) -> str:
    best = plan.recommended
    ranks = "1 rank" if best.num_ranks == 1 else f"{best.num_ranks} ranks, {best.parallel}"
    way = f"{ranks}, batch {best.batch} a rank, {best.precision}"
    rate = f"{number(best.samples_per_s)} samples/s, {number(best.step_ms)} ms a step"
    share = f"{best.efficiency_fraction:.1%} of as many times one rank"
    lines = [
        f"## {plan.network} on {plan.model.timings.device}: {way}",
        "",
        f"Why: {plan.reason}.",
        "",
        f"It is {rate}, {share} ({best.basis}).",
        *(f"note: {note}" for note in plan.model.timings.notes),
    ]
    return "\n".join(lines) + "\n"


def _predictions(plan: Plan) -> str:
    head = (
        "| ranks | batch a rank | | step ms | of it collectives | samples/s | efficiency "
        "| GiB a rank | epoch s | to the accuracy s | |"
    )
    cells = [
        (each.num_ranks, each.batch, f"{each.precision} {each.parallel}" if each.num_ranks > 1
         else each.precision, number(each.step_ms), f"{each.collectives_ms / each.step_ms:.1%}",
         number(each.samples_per_s), f"{each.efficiency_fraction:.1%}", f"{each.rank_gib:.2f}",
         _seconds(each.epoch_s), _seconds(each.accuracy_s),
         each.basis + ", too large for the memory" * (not each.fits))
        for each in _shown(plan)
    ]  # fmt: skip
    first = "soonest to the accuracy" if plan.model.reached else "of most samples/s"
    shown = f"Of each number of ranks the {SHOWN_EACH} {first}, what fits into the memory first; "
    shown += "of the recommended number all with its global batch, too. plan.json has the others."
    if reached := plan.model.reached:
        shown += f" The accuracy: {reached.accuracy_fraction:.2%} on val, as {reached.num_epochs} "
        shown += f"epochs with a global batch of {reached.global_batch} reached it."
    title = f"### Ways of training ({MODEL}, but for steps of one rank)"
    if plan.model.timings.basis == MODEL:
        title = f"### Ways of training ({MODEL})"
    return "\n".join([title, "", shown, "", *markdown_table(head, "rrlrrrrrrrl", cells), ""])


def _shown(plan: Plan) -> list[Prediction]:
    """The first of each number of ranks, and what stands beside the recommended."""
    best = plan.recommended
    rows = []
    for num_ranks in dict.fromkeys(each.num_ranks for each in plan.predictions):
        of = [each for each in plan.predictions if each.num_ranks == num_ranks]
        for place, each in enumerate(sorted(of, key=_order)):
            is_beside = (num_ranks, each.global_batch) == (best.num_ranks, best.global_batch)
            if place < SHOWN_EACH or is_beside:
                rows.append(each)
    return rows


def _order(it: Prediction) -> tuple[bool, bool, float, float]:
    """What fits, by time to the accuracy where it is known, else by samples/s."""
    return not it.fits, it.accuracy_s is None, it.accuracy_s or 0.0, -it.samples_per_s


def _seconds(value: float | None) -> str:
    return "" if value is None else number(value)


def _steps(plan: Plan) -> str:
    timings = plan.model.timings
    cells = [
        (each.precision, each.batch, number(each.step_ms), number(each.low_ms),
         number(each.high_ms), each.n or "", number(each.batch / each.step_ms * 1000),
         "" if each.peak_gib is None else f"{each.peak_gib:.2f}")
        for each in timings.steps
    ]  # fmt: skip
    head = "| | batch | step ms | low | high | n | samples/s | peak GiB |"
    lines = [
        f"### Steps of one rank: {timings.basis}",
        "",
        *markdown_table(head, "lrrrrrrr", cells),
    ]
    for each in timings.slowdowns:
        what = f"{each.num_ranks} at once, that share nothing but this machine"
        lines += ["", f"{what}: {each.factor:.3f} of the time alone, measured."]
    return "\n".join([*lines, ""])


def _link(link: Link) -> str:
    rate = f"alpha {number(link.alpha_us)} us a message, beta {number(link.beta_gbps)} Gbit/s"
    lines = [f"### The link: {rate}, {link.source}", ""]
    cells = [
        (point.kind, point.num_ranks, f"{point.num_bytes:,}", number(point.us),
         number(link.fitted_us(point.kind, point.num_bytes, point.num_ranks)), f"{missed:+.0%}")
        for point, missed in zip(link.points, link.missed(), strict=True)
    ]  # fmt: skip
    if cells:
        lines += [
            "Alpha and beta fit the all-reduces. Of as many ranks as were measured a time is taken "
            "between two measured ones; alpha and beta stand for other ranks and more bytes.",
            "",
            *markdown_table("| | ranks | bytes | us | by the fit us | off |", "lrrrrr", cells),
            "",
        ]
    return "\n".join(lines)


def _counted(plan: Plan) -> str:
    cells = [
        (each.num_ranks, f"{each.precision} {each.parallel}",
         ", ".join(f"{c.times} {c.kind} of {c.num_bytes:,}" for c in each.collectives),
         f"{each.kept.total_bytes / 1e6:,.2f}", f"{each.gathered_bytes / 1e6:,.2f}")
        for each in plan.counted if each.num_ranks > 1
    ]  # fmt: skip
    head = "| ranks | | collectives of a step, bytes | MB kept a rank | and gathered, at most |"
    title = "### What ranks send and keep: counted, with the real network in its wrapper"
    return "\n".join([title, "", *markdown_table(head, "rllrr", cells), ""])
