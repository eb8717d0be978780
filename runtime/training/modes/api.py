"""The parts of a step that depend on where the model is."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

from torch import nn

from heteromesh.comm.collectives.int8 import Int8Collectives
from heteromesh.comm.gradients.exchange import GradientExchange
from heteromesh.comm.world import World
from heteromesh.parallel.model.pass_buffers import PassBuffers
from heteromesh.parallel.state.owner import StateOwner
from heteromesh.planner.cost.passes import Costs
from heteromesh.planner.ownership.memory import MemoryByKind
from heteromesh.runtime.engine.api import Engine
from heteromesh.runtime.engine.baselines import EvenSplit
from heteromesh.runtime.hooks.api import Hook
from heteromesh.runtime.memory.offload import NOTHING_OFFLOADED, OptimizerOffload
from heteromesh.runtime.work.source import WorkSource

T = TypeVar("T")


class Mode(ABC):
    """The parts of a step that depend on where the model is. What it opens is closed by the stack that it is given."""

    engine: Engine
    exchange: GradientExchange
    state: StateOwner
    buffers: PassBuffers
    held: nn.Module
    """What this rank writes into checkpoints: the model, or its part of it."""
    offload: OptimizerOffload = NOTHING_OFFLOADED
    """Where the optimizer's state lies."""
    is_tight: bool = False
    """Whether memory is planned for: then nothing is held that need not be."""

    def measure(self) -> Costs | None:
        """Measures what passes cost on this world's ranks; None where the plan has fixed who works."""
        return None

    @property
    def dealt_out(self) -> bool:
        """Whether no rank ever has the whole model, at the end neither."""
        return False

    def evaluate(self, act: Callable[[], T], world: World) -> T:
        """Returns what an evaluation finds, of a model that is dealt out."""
        raise NotImplementedError("a model that is whole is evaluated as it is")

    @abstractmethod
    def start(self, done: int) -> Sequence[Hook]:
        """Prepares for step `done` + 1; returns hooks."""

    @abstractmethod
    def work(self, done: int) -> WorkSource:
        """Returns where the work comes from, after `done` steps."""

    @abstractmethod
    def resolved(self) -> dict[str, Any]:
        """Returns what config.json has of it."""

    def memory(self, of_pass: Sequence[float], of_step: Sequence[float]) -> tuple[MemoryByKind, ...]:
        """Returns by rank what it is predicted to hold at the most in a step of so many tokens, in its largest pass and
        in all, by rank; empty where that isn't known. Known from `start` on."""
        return ()

    def compare(self, asked: Callable[[], int | None]) -> tuple[EvenSplit, ...]:
        """Compares the last steps with the static layouts, where the user wants it."""
        return ()


def compression_of(world: World) -> str:
    """Returns how gradients travel."""
    return "int8" if isinstance(world.collectives, Int8Collectives) else "none"
