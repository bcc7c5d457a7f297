"""Many models in one process: the members of a sweep train together, a launch each in turn.

Each member is a Trainer in a session of its own, as if it were alone, and ends with the same bits.
What a process has only once is each member's in its turn: torch's random numbers, the switches of
its libraries, the clock. The members share the opened records, the images on the device, and the
batches that a feed hands over where their order is the same.

On a CPU one launch follows the other. On a GPU with CUDA graphs, members that go in step have one
graph with a branch each (train/joint.py); others replay graphs of their own, each on a stream of
its own. Without graphs all are on one stream.

A member whose training breaks down (a loss that is not finite) is left behind, and said so.

It makes no folder, and judges no member (train/outcome.py).
"""

from collections.abc import Callable, Hashable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from engine.config import RunConfig
from engine.data.records import Records
from engine.errors import UserError, first_cause, sentence
from engine.feeds.build import SOURCES
from engine.feeds.shared import SharedFeeds
from engine.report import RunReport, read_report
from engine.stop import STOP, Stopped
from engine.train.backends import backends_kept
from engine.train.folder import finished_text, holds_run
from engine.train.joint import Branch, Joint
from engine.train.state import RandomState
from engine.train.sweep import Member, Sweep
from engine.train.trainer import Done, Job, Say, Trainer, launches
from engine.world import World

RECOMPILATIONS = 8
"""Of a member, which torch allows a whole process."""


class Running:
    """A member that trains, or has trained."""

    def __init__(self, member: Member, job: Job) -> None:
        self.member = member
        self.job = job
        self.trainer: Trainer | None = None
        """In charge of its last launch; None: it is not open yet."""
        self.done: Done | None = None
        self.failure = ""
        self._work = launches(job)
        self._random: RandomState | None = None
        self._joint: Joint | None = None
        self._joined: Trainer | None = None

    @property
    def is_over(self) -> bool:
        return self.done is not None or bool(self.failure)

    def advance(self) -> None:
        """Go on to the next launch, or, the first time, up to the first.

        Raises:
            UserError: the first time, where it cannot begin.
        """
        with self._turn():
            try:
                self.trainer = next(self._work)
            except StopIteration as end:
                self.done = end.value
            except UserError as error:
                if self.trainer is None:
                    raise
                self.failure = str(error)
        if self._joint and (self.is_over or self.trainer is not self._joined):
            assert self._joined
            self._joint.leave(self._joined.step)
            self._joint = None

    @contextmanager
    def _turn(self) -> Iterator[None]:
        """What the process has once is this member's."""
        with self.job.world.on_stream():
            if self._random:
                self._random.put_back()
            if self.trainer:
                self.trainer.step.use_backends()
                self.trainer.watch.resume()
            try:
                yield
            finally:
                if self.trainer:
                    self.trainer.watch.pause()
                self._random = RandomState.now() if self._may_draw else None

    @property
    def _may_draw(self) -> bool:
        """Whether random numbers are worth keeping: on a GPU that costs as much as a launch."""
        if self.trainer is None or self.job.world.device.type == "cpu":
            return True
        return self.trainer.step.draws_random

    def join(self, joint: Joint) -> None:
        """Its launches are `joint`'s from now on."""
        self._joint = joint
        self._joined = self.trainer

    def close(self) -> None:
        """End what has not ended by itself."""
        self._work.close()


@dataclass
class Crew:
    """The members of a sweep, trained together."""

    sweep: Sweep
    records: Records
    world: World
    out: Path
    say: Say

    def __post_init__(self) -> None:
        self.signal = 0
        """That stopped the training; 0: it went to its end."""
        self.launches = "one after another"
        self.running: list[Running] = []
        """Those that had something left to train."""
        self.finished: dict[int, RunReport] = {}
        """By their numbers, the reports of those that had nothing left to train."""
        self._noted: dict[str, list[Member]] = {}
        """The notes of the members' opening, and whose they are."""
        self._is_opening = True

    def train(self) -> None:
        """Train all members that are not finished; returns when the last one has ended.

        Raises:
            UserError: a member cannot begin, or the report of one that is finished cannot be read.
        """
        with STOP.polled(), backends_kept(), ExitStack() as stack:
            stack.enter_context(_room_to_compile(self.sweep.config, len(self.sweep.members)))
            self._open(stack)
            self._is_opening = False
            self._say_notes()
            self._launch_together(stack)
            while left := [each for each in self.running if not each.is_over]:
                for each in left:
                    each.advance()
                    self._say_failure(each)
        signals = [each.done[1] for each in self.running if each.done]
        self.signal = max(signals, default=0)

    def _open(self, stack: ExitStack) -> None:
        """Every member up to its first launch."""
        is_captured = self.sweep.config.step.cuda_graphs and self.world.device.type == "cuda"
        is_shared = not is_captured and not self.sweep.config.log_ids  # which are read a turn later
        shared = SharedFeeds() if is_shared else None
        for member in self.sweep.members:
            if STOP.number:  # nothing is trained yet
                raise Stopped(STOP.number)
            run = self.out / member.folder
            if done := finished_text(run, member.config):
                self.say(f"{member.name}: {done}")
                self.finished[member.number] = read_report(run)
                continue
            world = self.world
            if is_captured:  # torch has 32 streams: of more members, some share one
                world = replace(world, stream=torch.cuda.Stream(world.device))
            job = Job(
                config=member.config,
                records=self.records,
                world=world,
                out=run,
                resume=holds_run(run),
                say=self._voice(member),
                shared=shared,
                is_alone=False,
                note=self._note(),
            )
            each = Running(member, job)
            self.running.append(each)
            stack.callback(each.close)
            each.advance()
            if is_captured:
                self._check_feed(each)

    def _voice(self, member: Member) -> Say:
        """Says a member's lines with its name; the notes of its opening later."""

        def speak(line: str) -> None:
            if self._is_opening and line.startswith("note: "):
                self._noted.setdefault(line, []).append(member)
            else:
                self.say(f"{member.name}: {line}")

        return speak

    def _say_notes(self) -> None:
        """Those of all members once, others with the names of those that they are about."""
        for line, members in self._noted.items():
            if len(members) == len(self.running):
                self.say(line)
                continue
            for member in members:
                self.say(f"{member.name}: {line}")

    def _note(self) -> str:
        """What the members' reports say of each other."""
        num = len(self.sweep.members)
        if num == 1:
            return ""
        clock = "the clock stands still in the others' turns"
        if self.world.device.type == "cuda":
            clock = "they train at the same time, and the clock is that of all"
        return f"a sweep of {num} members in one process: {clock}"

    def _check_feed(self, each: Running) -> None:
        """UserError where a feed has threads, which the next member's capture would trip over."""
        if each.trainer and each.trainer.session.feed.name not in SOURCES:
            name = each.trainer.session.feed.name
            why = f"the {name} feed's threads disturb the capture of the next member"
            remedy = f"go on with --resume {self.out} and --no-cuda-graphs"
            raise UserError(f"--sweep with CUDA graphs: {why}; {remedy}")

    def _launch_together(self, stack: ExitStack) -> None:
        """One graph for the launches of members that go in step."""
        paces: dict[Hashable, list[Running]] = {}
        for each in self.running:
            if each.trainer and (pace := pace_of(each.trainer)):
                paces.setdefault(pace, []).append(each)
        if paces:
            self.launches = "a graph a member, on streams of their own"
        sizes = [str(len(g)) for g in paces.values() if len(g) > 1 and self._join(g, stack)]
        if sizes:
            graph = "one graph" if len(sizes) == 1 else "graphs"
            self.launches = f"{graph} of {' and '.join(sizes)} branches"

    def _join(self, group: list[Running], stack: ExitStack) -> bool:
        """Whether the group has joint launches now."""
        branches = [branch_of(each.trainer) for each in group if each.trainer]
        branches[0].step.use_backends()
        try:
            joint = Joint(branches, self.world)
        except Exception as error:  # any: each member has graphs of its own
            why = sentence(first_cause(error))
            self.say(f"note: members' launches are not one graph: {why}; each has its own")
            return False
        stack.callback(joint.reset)
        for each in group:
            each.join(joint)
        return True

    def _say_failure(self, each: Running) -> None:
        if each.failure:
            self.say(f"{each.member.name}: failed: {each.failure}")


def pace_of(trainer: Trainer) -> Hashable:
    """Equal for members that come to every launch together; None: by itself."""
    step, config = trainer.step, trainer.session.config
    is_regular = config.optim.batch_schedule == "fixed" and not config.target_accuracy
    if not (config.step.cuda_graphs and step.gathers and is_regular) or step.draws_random:
        return None
    place = (trainer.position.epoch, trainer.position.step, trainer.steps_per_epoch)
    return (*place, config.epochs, config.step.precision)


def branch_of(trainer: Trainer) -> Branch:
    """The member's branch of a joint launch."""
    config, order = trainer.session.config, trainer.session.feed.order
    is_shared = not config.log_ids  # an own batch has its own log of ids
    same = (config.data, order) if is_shared else id(trainer)
    return Branch(trainer.step, trainer.world, same)


def _room_to_compile(config: RunConfig, num_members: int) -> AbstractContextManager[object]:
    """torch.compile counts the compilations of a class, whichever member they are of."""
    if config.step.compile == "off":
        return nullcontext()
    from torch._dynamo import config as dynamo

    patch: Callable[..., AbstractContextManager[object]] = dynamo.patch
    return patch(recompile_limit=RECOMPILATIONS * num_members)
