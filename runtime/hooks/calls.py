"""Calls hooks so that one that raises ends the run in order, on all ranks, and not this rank's process."""

from __future__ import annotations

import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from functools import partial
from pathlib import Path

import torch
from torch import nn

from heteromesh.comm.tcp.abort import GroupAborted
from heteromesh.comm.world import World
from heteromesh.parallel.layer_major.forwards import take_turn
from heteromesh.parallel.model.undisturbed import modes_kept
from heteromesh.runtime.hooks.api import Hook, StepCommitted, Stop, TrainingReport
from heteromesh.runtime.hooks.world import HookWorld, PeerRaised


class HookCalls:
    """The hooks of a run: the runtime's own, whose errors are the run's, and the user's, whose errors are kept here
    for `stop` until the other ranks are told of them."""

    def __init__(
        self, ours: Sequence[Hook], users: Sequence[Hook], busy: Callable[[], AbstractContextManager[None]]
    ) -> None:
        """`busy`: a context for what takes long (`Session.busy`)."""
        self._ours, self._users, self._busy = tuple(ours), tuple(users), busy
        self._failure = ""
        self._step, self._where = 0, ""
        self._ended = False

    @property
    def stop(self) -> Stop | None:
        """Why this rank's hooks want the run to end, if they do."""
        return Stop(failure=self._failure) if self._failure else None

    def step_committed(self, step: StepCommitted) -> None:
        self._step, self._where = step.metrics.step, step.world.names[step.world.rank]
        self._tell("step_committed", lambda hook: hook.step_committed(step))

    def evaluates(self, step: int) -> bool:
        """Whether a hook evaluates after this step."""
        return bool(self._evaluators(step))

    def evaluate(self, step: int, model: nn.Module, world: World) -> Mapping[str, float]:
        """Returns what the hooks that evaluate after this step find on this rank.

        Where one raises on a rank, it has raised on all: nobody waits for that rank in `world`.
        """
        self._step, self._where = step, world.names[world.rank]
        found: dict[str, float] = {}
        with torch.no_grad(), _as_in_use(model):
            for hook in self._evaluators(step):
                with self._guarded(hook, "evaluate"):
                    values = HookWorld(world, take_turn).run(partial(hook.evaluate, step, model))
                    found.update(values or {})
        return found

    def evaluated(self, step: int, values: Mapping[str, float]) -> None:
        self._tell("evaluated", lambda hook: hook.evaluated(step, values))

    def checkpoint_saved(self, step: int, path: Path) -> None:
        self._tell("checkpoint_saved", lambda hook: hook.checkpoint_saved(step, path))

    def end(self, report: TrainingReport) -> None:
        if not self._ended:
            self._ended = True
            self._tell("end", lambda hook: hook.end(report))

    def _evaluators(self, step: int) -> list[Hook]:
        return [h for h in self._users if h.evaluate_every and step % h.evaluate_every == 0]

    def _tell(self, method: str, call: Callable[[Hook], None]) -> None:
        for hook in self._ours:
            call(hook)
        for hook in self._users:
            with self._guarded(hook, method):
                call(hook)

    @contextmanager
    def _guarded(self, hook: Hook, method: str) -> Iterator[None]:
        try:
            with self._busy():
                yield
        except PeerRaised:
            pass  # that rank tells why
        except Exception as error:
            if isinstance(error, GroupAborted) and method == "evaluate":
                raise
            traceback.print_exc()
            self._failure = self._failure or (
                f"hook {hook.name}.{method} raised {type(error).__name__}: {error} at step {self._step} on "
                f"{self._where or 'this rank'} (mend the hook, then resume)"
            )


@contextmanager
def _as_in_use(model: nn.Module) -> Iterator[None]:
    """Has all modules in evaluation mode inside, and each in its own again outside."""
    with modes_kept(model):
        model.eval()
        yield
