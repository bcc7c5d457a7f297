"""A sweep from its folder to its result: what was asked is checked, trained, and summed up.

The training is train/members.py's, the vote train/vote.py's.
"""

import time
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path

from engine.data.records import Records
from engine.durable import take_folder, writing
from engine.errors import UserError
from engine.ranks import Ranks
from engine.report import write_json
from engine.train.folder import check_records
from engine.train.members import Crew, Running
from engine.train.session import check_batches, open_run_records
from engine.train.sweep import (
    RESULT,
    Member,
    MemberResult,
    Sweep,
    SweepResult,
    result_text,
    write_sweep,
)
from engine.train.trainer import Say, check_run
from engine.train.vote import Ballot
from engine.world import start_world

FAILED = 1
"""Exit code where a member broke down."""


def train_sweep(sweep: Sweep, out: Path, device: str, ranks: Ranks, say: Say) -> int:
    """Train what is left of a sweep in OUT, which is this process's; the exit code.

    Raises:
        UserError: a member cannot be trained here. Where that shows before any is opened, nothing
            is written.
    """
    records = _checked(sweep, out, device)
    with ExitStack() as stack, start_world(device, ranks, sweep.config.timeout_s) as world:
        with writing(out):
            write_sweep(out, sweep)  # first: from now on it is a sweep
        for member in sweep.members:
            stack.enter_context(take_folder(out / member.folder))
        start_s = time.perf_counter()
        crew = Crew(sweep, records, world, out, say)
        crew.train()
        result = result_of(crew, time.perf_counter() - start_s)
        with writing(out):
            write_json(result, out / RESULT)
        say(result_text(result))
        say(f"written: {out / RESULT}")
    if crew.signal:
        say(f"the sweep was stopped; go on with --resume {out}")
        return 128 + crew.signal
    return FAILED if any(member.failure for member in result.members) else 0


def _checked(sweep: Sweep, out: Path, device: str) -> Records:
    """The records, once every member is known to be possible with them."""
    for member in sweep.members:
        check_run(member.config, device)
    records = open_run_records(sweep.members[0].config, 1)
    for member in sweep.members:
        check_batches(member.config, records, 1)
        check_records(out / member.folder, records.fingerprint, resume=True)
    return records


def result_of(crew: Crew, wall_s: float) -> SweepResult:
    """What became of the members, and the vote of those that are finished."""
    running = {each.member.number: each for each in crew.running}
    ballot = Ballot(crew.records, crew.world.device)
    members = []
    for member in crew.sweep.members:
        found = _member_result(crew, member, running.get(member.number))
        if found.status == "finished" and not crew.signal:
            found = replace(found, temperature=_voted(crew, ballot, member))
        members.append(found)
    return SweepResult(
        status="stopped" if crew.signal else "finished",
        environment=crew.world.environment(),
        dataset_fingerprint=crew.records.fingerprint,
        launches=crew.launches,
        wall_s=wall_s,
        members=members,
        votes=ballot.votes(),
    )


def _voted(crew: Crew, ballot: Ballot, member: Member) -> float | None:
    """Count a member's network in; its temperature, None where it has none, or no weights."""
    try:
        return ballot.add(member.config, crew.out / member.folder)
    except UserError as error:
        crew.say(f"{member.name}: takes no part in the vote: {error}")
        return None


def _member_result(crew: Crew, member: Member, each: Running | None) -> MemberResult:
    """`each` is None for one that was finished before."""
    if each and each.failure and each.trainer:  # its report is that of its start
        position = each.trainer.position
        return MemberResult(
            number=member.number,
            folder=member.folder,
            settings=list(member.settings),
            status="failed",
            failure=each.failure,
            num_epochs=position.epoch,
            train_s=position.train_s,
            val_accuracy_fraction=position.best_val_accuracy_fraction,
        )
    report = each.done[0] if each and each.done else crew.finished[member.number]
    return MemberResult(
        number=member.number,
        folder=member.folder,
        settings=list(member.settings),
        status="finished" if report.status == "finished" else "stopped",
        num_epochs=report.num_epochs,
        train_s=report.train_s,
        val_accuracy_fraction=report.val_accuracy_fraction,
        test_accuracy_fraction=report.test_accuracy_fraction,
    )
