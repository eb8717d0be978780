"""What a training loop commits beside steps: the run directory, state dealt out anew, evaluations, checkpoints.

What is due follows from what was committed and from who is there, so that it is the same on every rank, also on one
that has just joined. An attempt may be made again when a rank is lost under it.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

from torch import nn

from heteromesh.comm.session import Attempt, Committed, Session
from heteromesh.comm.world import World
from heteromesh.errors import UserError
from heteromesh.parallel.state.owner import StateOwner
from heteromesh.planner.cost.devices import LinkCosts
from heteromesh.runtime.engine.member_costs import MemberCosts
from heteromesh.runtime.hooks.api import Stop, TrainingReport
from heteromesh.runtime.hooks.calls import HookCalls
from heteromesh.runtime.records.writer import CheckpointWriter
from heteromesh.runtime.training.progress import TrainingProgress

Evaluation = Callable[[], Mapping[str, float]]


class Transaction(ABC):
    """Something that all ranks do together, or none."""

    @abstractmethod
    def due(self, world: World) -> bool:
        """Whether it is to be done now, before all that comes after it."""

    @abstractmethod
    def attempt(self, world: World) -> Attempt[Any]:
        """Does it, so that it can be done again."""

    def overlap(self, result: Any) -> None:
        """Goes on with the result while the ranks agree on it; by default there is nothing to go on with."""
        del result

    @abstractmethod
    def committed(self, done: Committed[Any]) -> None:
        """Applies it."""


class Refusal(Transaction):
    """Ends training where no plan is possible: what was trained is saved first."""

    def __init__(self, progress: TrainingProgress) -> None:
        self._progress = progress
        self.reason: UserError | None = None

    def due(self, world: World) -> bool:
        return False

    def attempt(self, world: World) -> Attempt[UserError]:
        raise NotImplementedError

    def committed(self, done: Committed[UserError]) -> None:
        self.reason, self._progress.stop = done.result, Stop(failure=str(done.result))


class Begin(Transaction):
    """Makes the run directory, once in the life of a job."""

    def __init__(self, progress: TrainingProgress, create: Callable[[], None]) -> None:
        self._progress, self._create = progress, create

    def due(self, world: World) -> bool:
        return not self._progress.begun

    def attempt(self, world: World) -> Attempt[None]:
        world.once(self._create)
        return Attempt(None, "begun")

    def committed(self, done: Committed[None]) -> None:
        self._progress.begun = True


class Meet(Transaction):
    """Has members tell each other once what they are; a joining member is told by all."""

    def __init__(self, progress: TrainingProgress, members: MemberCosts) -> None:
        self._progress, self._members = progress, members

    def due(self, world: World) -> bool:
        return not set(world.members) <= set(self._progress.met)

    def attempt(self, world: World) -> Attempt[list[int]]:
        self._members.meet(world)
        return Attempt(list(world.members), f"met {world.members}")

    def committed(self, done: Committed[list[int]]) -> None:
        self._progress.met = done.result


class MeasureLinks(Transaction):
    """Measures once in a job what exchanges cost, where nobody has said so."""

    def __init__(self, progress: TrainingProgress, members: MemberCosts) -> None:
        self._progress, self._members = progress, members

    def due(self, world: World) -> bool:
        return self._progress.links is None and world.size > 1 and self._progress.training

    def attempt(self, world: World) -> Attempt[LinkCosts]:
        links: LinkCosts = world.broadcast(self._members.measure_links(world))
        return Attempt(links, f"links {links}")

    def committed(self, done: Committed[LinkCosts]) -> None:
        self._progress.links = self._members.links = done.result


class Reshard(Transaction):
    """Deals out to whoever is there now what no member has whole."""

    def __init__(
        self,
        progress: TrainingProgress,
        state: StateOwner,
        session: Session,
        speeds: Callable[[tuple[int, ...]], Sequence[float]],
        *,
        always: bool = False,
    ) -> None:
        """always: also when training is over, as nothing can be done before."""
        self._progress, self._state, self._session, self._speeds = progress, state, session, speeds
        self._always = always

    def due(self, world: World) -> bool:
        return (self._progress.training or self._always) and not self._state.is_settled(world)

    def attempt(self, world: World) -> Attempt[None]:
        return Attempt(
            None, f"state dealt out {self._progress.done}:{self._state.reshard(world, self._speeds(world.members))}"
        )

    def committed(self, done: Committed[None]) -> None:
        with self._session.busy():
            self._state.finish_reshard()


class Evaluate(Transaction):
    """Calls the hooks that evaluate, with all parameters up to date on all ranks."""

    def __init__(
        self,
        progress: TrainingProgress,
        state: StateOwner,
        model: nn.Module,
        hooks: HookCalls,
        layerwise: Callable[[Evaluation, World], Mapping[str, float]] | None = None,
    ) -> None:
        """layerwise: makes an evaluation of a model that is whole on no rank; None: it is made so first."""
        self._progress, self._state, self._model, self._hooks = progress, state, model, hooks
        self._layerwise = layerwise

    def due(self, world: World) -> bool:
        progress = self._progress
        return (
            bool(progress.done)
            and progress.evaluated != progress.done
            and progress.stop is None
            and self._hooks.evaluates(progress.done)
        )

    def attempt(self, world: World) -> Attempt[tuple[Mapping[str, float], Stop | None]]:
        parameters = self._state.refresh(world)
        evaluate = partial(self._hooks.evaluate, self._progress.done, self._model, world)
        if self._layerwise is None:
            self._state.weights_ready()
            found = evaluate()
        else:
            found = self._layerwise(evaluate, world)
        everyone = world.gather((found, self._hooks.stop))
        stop = next((stop for _, stop in everyone if stop is not None), None)
        return Attempt((everyone[0][0], stop), f"evaluated {self._progress.done}:{parameters}")

    def committed(self, done: Committed[tuple[Mapping[str, float], Stop | None]]) -> None:
        found, self._progress.stop = done.result
        self._progress.evaluated = self._progress.done
        self._hooks.evaluated(self._progress.done, found)


class Save(Transaction):
    """Writes a checkpoint every so many steps and when training is over."""

    def __init__(
        self,
        progress: TrainingProgress,
        state: StateOwner,
        session: Session,
        writer: CheckpointWriter,
        hooks: HookCalls,
    ) -> None:
        self._progress, self._state, self._session = progress, state, session
        self._writer, self._hooks = writer, hooks

    def due(self, world: World) -> bool:
        progress, every = self._progress, self._writer.every
        return progress.saved != progress.done and (
            not progress.training or (bool(every) and progress.done % every == 0)
        )

    def attempt(self, world: World) -> Attempt[None]:
        with self._session.busy(), self._state.gathered(world):
            self._writer.save(world, self._progress.done, self._progress.sampled)
        if not self._progress.training:
            # nothing comes after it that would give its writer the time
            with self._session.busy():
                self._writer.wait()
            world.barrier()
        return Attempt(None, f"saved {self._progress.done}")

    def committed(self, done: Committed[None]) -> None:
        self._progress.saved = self._progress.done
        self._hooks.checkpoint_saved(self._progress.done, self._writer.path_of(self._progress.done))


class End(Transaction):
    """Ends the hooks when all is written; a rank whose hook has raised since the last step tells it here."""

    def __init__(
        self,
        progress: TrainingProgress,
        session: Session,
        writer: CheckpointWriter,
        hooks: HookCalls,
        report: Callable[[], TrainingReport],
        bring: Callable[[], None] | None = None,
    ) -> None:
        """bring: makes of the model here what is to be found after training; in every attempt."""
        self._progress, self._session, self._writer = progress, session, writer
        self._hooks, self._report, self._bring = hooks, report, bring

    def due(self, world: World) -> bool:
        return not self._progress.training

    def attempt(self, world: World) -> Attempt[Stop | None]:
        with self._session.busy():
            self._writer.wait()
        if self._bring is not None:
            self._bring()
        stop = self._progress.stop or self._told(world)
        if stop is None or not stop.failure:
            self._hooks.end(replace(self._report(), signal=stop.signal if stop else None))
            stop = self._told(world) or stop
        return Attempt(stop, f"ended {stop}")

    def committed(self, done: Committed[Stop | None]) -> None:
        self._progress.stop, self._progress.over = done.result, True

    def _told(self, world: World) -> Stop | None:
        return next((stop for stop in world.gather(self._hooks.stop) if stop is not None), None)
