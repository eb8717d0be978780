"""What a training loop commits beside steps: the run directory, state dealt out anew, evaluations, checkpoints.

What is due follows from what was committed and from who is there, so that it is the same on every rank, also on one
that has just joined. An attempt may be made again when a rank is lost under it.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from torch import nn

from heteromesh.comm.session import Attempt, Committed, Session
from heteromesh.comm.tcp.abort import GroupAborted
from heteromesh.comm.world import World
from heteromesh.parallel.state.owner import StateOwner
from heteromesh.planner.cost.devices import LinkCosts
from heteromesh.runtime.engine.member_costs import MemberCosts
from heteromesh.runtime.hooks.api import Hook
from heteromesh.runtime.records.writer import CheckpointWriter
from heteromesh.runtime.training.progress import TrainingProgress


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
        return self._progress.training and not set(world.members) <= set(self._progress.met)

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
    """Deals the optimizer's state out to whoever is there now."""

    def __init__(
        self,
        progress: TrainingProgress,
        state: StateOwner,
        session: Session,
        speeds: Callable[[tuple[int, ...]], Sequence[float]],
    ) -> None:
        self._progress, self._state, self._session, self._speeds = progress, state, session, speeds

    def due(self, world: World) -> bool:
        return self._progress.training and not self._state.is_settled(world)

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
        session: Session,
        model: nn.Module,
        hooks: Sequence[Hook],
        failed: Callable[[Hook, str, Exception], None],
    ) -> None:
        self._progress, self._state, self._session, self._model = progress, state, session, model
        self._hooks, self._failed = hooks, failed

    def due(self, world: World) -> bool:
        done = self._progress.done
        return bool(done) and self._progress.evaluated != done and bool(self._due_hooks())

    def attempt(self, world: World) -> Attempt[Mapping[str, float]]:
        parameters = self._state.refresh(world)
        self._state.weights_ready()
        found: dict[str, float] = {}
        training = self._model.training
        with self._session.busy():
            for hook in self._due_hooks():
                found.update(self._evaluate(hook, world))
        self._model.train(training)
        found = world.gather(found)[0]
        return Attempt(found, f"evaluated {self._progress.done}:{parameters}")

    def committed(self, done: Committed[Mapping[str, float]]) -> None:
        self._progress.evaluated = self._progress.done
        for hook in self._hooks:
            hook.evaluated(self._progress.done, done.result)

    def _due_hooks(self) -> list[Hook]:
        return [h for h in self._hooks if h.evaluate_every and self._progress.done % h.evaluate_every == 0]

    def _evaluate(self, hook: Hook, world: World) -> Mapping[str, float]:
        try:
            return hook.evaluate(self._progress.done, self._model, world) or {}
        except GroupAborted:
            raise
        except Exception as error:
            self._failed(hook, "evaluate", error)
        return {}


class Save(Transaction):
    """Writes a checkpoint every so many steps and at the end."""

    def __init__(
        self,
        progress: TrainingProgress,
        state: StateOwner,
        session: Session,
        writer: CheckpointWriter,
        hooks: Sequence[Hook],
    ) -> None:
        self._progress, self._state, self._session = progress, state, session
        self._writer, self._hooks = writer, hooks

    def due(self, world: World) -> bool:
        progress, every = self._progress, self._writer.every
        if not progress.training:
            return True
        return bool(every) and progress.done % every == 0 and progress.saved != progress.done

    def attempt(self, world: World) -> Attempt[bool]:
        done, last = self._progress.done, not self._progress.training
        write = self._progress.saved != done
        if write:
            with self._session.busy(), self._state.gathered(world):
                self._writer.save(world, done, self._progress.sampled)
        if last:
            with self._session.busy():
                self._writer.wait()
            world.barrier()
        return Attempt(write, f"saved {done}")

    def committed(self, done: Committed[bool]) -> None:
        self._progress.saved = self._progress.done
        self._progress.over = not self._progress.training
        if done.result:
            for hook in self._hooks:
                hook.checkpoint_saved(self._progress.done, self._writer.path_of(self._progress.done))
