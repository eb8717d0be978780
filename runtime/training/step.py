"""One step of a job whose members may be lost at any moment: every sequence exactly once, whoever is left.

An attempt is a loop inside one epoch. The members tell each other which sequences of the batch their gradients hold;
what nobody holds is planned for the members that are here, and worked through; when nothing is missing the gradients
are summed. When a member is lost the epoch ends, and the next attempt begins with what the others still hold: only what
the lost one had is done again.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import torch

from heteromesh.comm.records import Recorder
from heteromesh.errors import UserError
from heteromesh.faults.member.commit import Steps
from heteromesh.faults.member.group import Group
from heteromesh.faults.member.world import EpochWorld
from heteromesh.faults.membership.view import View
from heteromesh.parallel.attention.api import prepare_pass
from heteromesh.parallel.attention.layout import layout_of
from heteromesh.planner.cost.devices import DeviceCosts, LinkCosts
from heteromesh.planner.cost.passes import Costs
from heteromesh.planner.plan import Pass, Step
from heteromesh.runtime.engine.local_costs import OwnCosts
from heteromesh.runtime.engine.passes import StepExecutor
from heteromesh.runtime.training.ledger import Members, StepGradients, Told
from heteromesh.runtime.work.planner import ElasticPlanner, Question
from heteromesh.runtime.work.reader import PassInput, Reader
from heteromesh.runtime.work.sampler import Batch


class PassMeasure(NamedTuple):
    """What a pass of the step's first plan took on one member."""

    position: int
    rank: int
    seconds: float
    sent_bytes: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Tidings:
    """What a member tells the others between two rounds of work."""

    shares: Told
    pace: DeviceCosts
    links: LinkCosts | None
    stop: int
    """The signal that it was sent; 0 for none."""
    begun: bool
    """Whether the run directory is known to be this job's."""
    busy_seconds: float
    """In passes of this step, without waiting for exchanges."""
    passes: tuple[PassMeasure, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class Round:
    """A plan, and who was to execute it."""

    members: Members
    places: tuple[int, ...]
    """Of the plan's sequences in the step's batch."""
    plan: Step


@dataclass(frozen=True, slots=True, kw_only=True)
class Result:
    """A step whose gradients are summed, on its way to be committed."""

    sums: list[torch.Tensor]
    """Of each parameter's gradient: of the losses' sum divided by the batch's tokens."""
    present: list[bool]
    """By parameter, whether any member had a gradient for it."""
    loss: float
    """Sum over all tokens of the batch."""
    valid: int
    rounds: tuple[Round, ...]
    """The first has the whole batch, later ones what was lost."""
    told: tuple[Tidings, ...]
    """By rank."""
    exposed_seconds: float
    """Of the gradient sum."""
    plan_wait_seconds: float


@dataclass(slots=True)
class _Current:
    """The step that this member is in."""

    number: int
    batch: Batch
    gradients: StepGradients
    rounds: list[Round] = field(default_factory=list)
    busy_seconds: float = 0.0
    passes: list[PassMeasure] = field(default_factory=list)
    plan_wait_seconds: float = 0.0


class StepWork:
    """This member's part in the job's steps. `seconds_per_step`: fixed cost of a step, as measured so far."""

    def __init__(
        self,
        executor: StepExecutor,
        reader: Reader,
        own: OwnCosts,
        planner: ElasticPlanner,
        create: Callable[[], None],
    ) -> None:
        """`create` makes the run directory, once in the life of the job, on rank 0."""
        self._executor, self._reader, self._own, self._planner = executor, reader, own, planner
        self._create, self._begun = create, False
        self._parameters = [p for p in executor.model.parameters() if p.requires_grad]
        self._recorder: Recorder = executor.world.recorder
        self._current: _Current | None = None
        self.links: LinkCosts | None = None
        self.stop = 0
        self.seconds_per_step = 0.0

    def attempt(self, group: Group, steps: Steps, number: int, batch: Batch) -> tuple[Result, str]:
        """A body for `Steps.atomic`: step `number` (from 1) on `batch`. Raises GroupAborted; call it again then.

        Raises UserError, on every member, where the batch can't be planned.
        """
        if self._current is None or self._current.number != number:
            self._current = _Current(number, batch, StepGradients(self._parameters))
        now, view = self._current, group.view
        world = EpochWorld(group, self._recorder)
        self._executor.world = world
        while True:
            told = self._gather(group, world, now)
            done = now.gradients.settle({m: t.shares for m, t in zip(view.members, told, strict=True)})
            missing = tuple(i for i in range(len(batch.lengths)) if i not in done)
            if not missing:
                break
            started = time.perf_counter()
            plan, speeds = self._agree_on_plan(world, view, missing, told)
            now.plan_wait_seconds += time.perf_counter() - started
            now.rounds.append(Round(members=view.members, places=missing, plan=plan))
            for position, item in plan.passes_of(world.rank):
                self._work(group, world, now, item, position, speeds)
        return self._sum(group, steps, now, told)

    def prepare(self, batch: Batch, members: Members, paces: Sequence[DeviceCosts]) -> None:
        """Rank 0: the next batch will be asked for, by these members if nothing happens."""
        self._planner.prepare(Question(batch.lengths, members), self._costs(paces))

    def _gather(self, group: Group, world: EpochWorld, now: _Current) -> list[Tidings]:
        mine = Tidings(
            shares=now.gradients.told(),
            pace=self._own.pace,
            links=self.links,
            stop=self.stop,
            begun=self._begun,
            busy_seconds=now.busy_seconds,
            passes=tuple(now.passes),
        )
        told: list[Tidings] = world.gather(mine)
        if not any(t.begun for t in told):
            world.once(self._create)
        self._begun = True
        self.links = next((t.links for t in told if t.links), None)
        if self.links is None and world.size > 1:
            self.links = group.run(lambda _: self._own.measure_links())
        return told

    def _agree_on_plan(
        self, world: EpochWorld, view: View, missing: Sequence[int], told: Sequence[Tidings]
    ) -> tuple[Step, tuple[float, ...]]:
        assert self._current
        lengths = tuple(self._current.batch.lengths[i] for i in missing)
        answer: tuple[Step, tuple[float, ...]] | UserError | None = None
        if world.rank == 0:
            costs = self._costs([t.pace for t in told])
            try:
                answer = self._planner.plan(Question(lengths, view.members), costs), costs.speeds
            except UserError as error:
                answer = error
        answer = world.broadcast(answer)
        if isinstance(answer, UserError):
            raise answer
        assert answer is not None
        return answer

    def _costs(self, paces: Sequence[DeviceCosts]) -> Costs:
        return self._own.of_members(paces, self.links, self.seconds_per_step)

    def _work(
        self, group: Group, world: EpochWorld, now: _Current, item: Pass, position: int, speeds: Sequence[float]
    ) -> None:
        """One pass."""
        last = now.rounds[-1]
        lengths = [last.plan.batch[i] for i in item.sequences]
        places = [last.places[i] for i in item.sequences]
        members = tuple(last.members[rank] for rank in item.ranks)
        batch = self._input(world, now, item, lengths, places)
        world.recorder.take_comm_seconds()
        started, sent = time.perf_counter(), world.recorder.exchanged_bytes
        with (
            now.gradients.into(members, places) as share,
            world.recorder.span(f"pass {position} {item.method} x{len(item.ranks)}", "pass"),
        ):
            losses = group.run(lambda _: self._forward_backward(world, now, item, places, batch, speeds))
            share.loss += float(losses.double().sum())
            share.valid += batch.valid
        took = time.perf_counter() - started
        now.busy_seconds += max(0.0, took - world.recorder.take_comm_seconds())
        if len(now.rounds) == 1:
            now.passes.append(PassMeasure(position, world.rank, took, world.recorder.exchanged_bytes - sent))
        if len(item.ranks) == 1:
            self._own.learn(lengths, took)

    def _input(
        self, world: EpochWorld, now: _Current, item: Pass, lengths: Sequence[int], places: Sequence[int]
    ) -> PassInput:
        indices = [now.batch.sequences[i] for i in places]
        return self._reader.pass_input(layout_of(item, lengths), indices, item.ranks.index(world.rank))

    def _forward_backward(
        self,
        world: EpochWorld,
        now: _Current,
        item: Pass,
        places: Sequence[int],
        batch: PassInput,
        speeds: Sequence[float],
    ) -> torch.Tensor:
        context = prepare_pass(item, [now.batch.lengths[i] for i in places], world, speeds)
        return self._executor.forward_backward(context, batch, now.batch.tokens, item.offload, now.number, places)

    def _sum(self, group: Group, steps: Steps, now: _Current, told: Sequence[Tidings]) -> tuple[Result, str]:
        facts = [now.gradients.loss(), float(now.gradients.valid()), *now.gradients.present()]
        started = time.perf_counter()
        with self._recorder.span("gradient sum, exposed", "wait"):
            summed = steps.sum(group, [*now.gradients.total(), torch.tensor(facts, dtype=torch.float64)])
        *sums, totals = summed.sums
        loss, valid, *present = totals.tolist()
        result = Result(
            sums=sums,
            present=[count > 0 for count in present],
            loss=loss,
            valid=int(valid),
            rounds=tuple(now.rounds),
            told=tuple(told),
            exposed_seconds=time.perf_counter() - started,
            plan_wait_seconds=now.plan_wait_seconds,
        )
        return result, f"{now.number}:{now.batch.index}:{summed.digest}"
