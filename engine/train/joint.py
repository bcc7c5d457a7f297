"""A launch that several steps have together: N branches of one CUDA graph.

Each branch is a step's launch on the stream that the step was built and warmed up on: autograd
remembers it. The graph forks from the stream that captures it to those of the branches, and joins
them there again (PyTorch's CUDA notes, "Usage across multiple streams"). Branches of one order
share the batch that the first of them gathers. Steps come to the launch one after the other,
as their trainers' turns come; the last one starts it, so that nothing is trained before all have
read what the launch before left.

Without streams, on a CPU, the branches run one after the other: the same order of events, which
tests can see there.

It does not decide who may launch together (train/members.py).
"""

from collections.abc import Hashable, Sequence
from dataclasses import dataclass
from functools import partial

import torch

from engine.feeds.shared import GatheredOnce
from engine.train.capture import Graph, Replay
from engine.train.step import TrainStep
from engine.world import World


@dataclass(frozen=True)
class Branch:
    """A step of a joint launch."""

    step: TrainStep
    world: World
    """With the stream of this step."""
    order: Hashable
    """Equal for steps that train the same samples in the same order."""


class Joint:
    """The launches of some steps, which all have the same number of steps each time."""

    def __init__(self, branches: Sequence[Branch], world: World) -> None:
        """Capture them where there is a GPU; from then on they stand for the steps' own launches.

        Args:
            world: with the stream that captures and replays.
        Raises:
            Exception: whatever a failed capture raises; the steps keep their own launches.
        """
        self._branches = branches
        self._world = world
        self._gone: set[TrainStep] = set()
        self._num_here = 0
        self._num_steps = 0
        """Of the launch that they come to."""
        self._graphs: dict[int, Graph] = {}
        sizes = sorted({branches[0].step.steps_per_launch, 1}, reverse=True)
        if world.stream:
            self._capture(sizes)
        for branch in branches:
            branch.step.join({size: _Place(self, size) for size in sizes})

    def _capture(self, sizes: list[int]) -> None:
        pool = None
        try:
            with self._world.on_stream():
                for size in sizes:
                    self._graphs[size] = Graph(partial(self._work, size), pool)
                    pool = self._graphs[size].pool
        except Exception:
            self.reset()
            raise

    def _work(self, num_steps: int) -> None:
        """All branches, device work only."""
        gathered: dict[Hashable, GatheredOnce] = {}
        for branch in self._branches:
            if branch.order not in gathered:
                gathered[branch.order] = branch.step.gathered(num_steps)
            self._fork(branch)
            with branch.world.on_stream():
                branch.step.work(num_steps, gathered[branch.order])
        self._meet()

    def _fork(self, branch: Branch) -> None:
        """What is next on a branch's stream waits for what is before on the joint one."""
        if branch.world.stream:
            branch.world.stream.wait_stream(torch.cuda.current_stream())

    def _meet(self) -> None:
        """What is next on the joint stream waits for all branches."""
        for branch in self._branches:
            if branch.world.stream:
                torch.cuda.current_stream().wait_stream(branch.world.stream)

    def come(self, num_steps: int) -> None:
        """One of the steps has come to its next launch; the last one starts it."""
        assert self._num_here == 0 or num_steps == self._num_steps, "they go in step"
        self._num_here += 1
        self._num_steps = num_steps
        self._start_if_all_came()

    def leave(self, step: TrainStep) -> None:
        """A step comes no more: its branch goes on, and others of its order may live on what it
        gathers."""
        self._gone.add(step)
        self._start_if_all_came()

    def _follow(self) -> None:
        """Let each branch that has left stand where one of its order stands that has not."""
        left = {b.order: b.step for b in self._branches if b.step not in self._gone}
        for branch in self._branches:
            if branch.step in self._gone and branch.order in left:
                branch.step.follow(left[branch.order])

    def _start_if_all_came(self) -> None:
        if not self._num_here or self._num_here < len(self._branches) - len(self._gone):
            return
        self._num_here = 0
        with self._world.on_stream():
            self._follow()
        if not self._graphs:
            self._work(self._num_steps)
            return
        with self._world.on_stream():
            self._meet()
            self._graphs[self._num_steps]()
            for branch in self._branches:
                self._fork(branch)

    def reset(self) -> None:
        """Destroy the graphs."""
        for graph in self._graphs.values():
            graph.reset()
        self._graphs.clear()


class _Place(Replay):
    """A step's place in joint launches."""

    def __init__(self, joint: Joint, num_steps: int) -> None:
        self._joint = joint
        self._num_steps = num_steps

    def __call__(self) -> None:
        self._joint.come(self._num_steps)

    def reset(self) -> None:
        """The graphs are the joint's."""
