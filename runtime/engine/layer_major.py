"""The layer-major engine: all of this rank's passes through one layer, then the next, forward and backward.

Only what layers are given is kept, and layers are computed again pass by pass in the backward, but for those whose
activations a rank has the memory to keep. What is collective about a
layer (its weights brought here, its gradients summed) happens once a step, whatever the number of passes.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, nullcontext
from contextvars import copy_context
from dataclasses import dataclass
from functools import partial
from typing import TypeVar

import torch
from torch import nn

from heteromesh.comm.gradients.exchange import GradientExchange, Share
from heteromesh.comm.world import World
from heteromesh.errors import UserError
from heteromesh.parallel.attention.api import PassContext, prepare_pass
from heteromesh.parallel.layer_major.forwards import run_forwards
from heteromesh.parallel.layer_major.pass_run import Head, PassBody
from heteromesh.parallel.layer_major.schedule import LayerMajorSchedule, LayerOrder, Timed
from heteromesh.parallel.layer_major.stubs import LayerStubs
from heteromesh.parallel.layer_major.weights import LayerWeights, WholeWeights
from heteromesh.parallel.model.call import uncompiled
from heteromesh.parallel.model.dropout import dropouts_replaced
from heteromesh.parallel.model.layers import outermost_layers, own_parameters
from heteromesh.parallel.model.loss import Loss, PassLosses
from heteromesh.parallel.model.offload import ActivationOffload
from heteromesh.parallel.model.recompute import keep_activations, recompute_layers
from heteromesh.planner.plan import Pass
from heteromesh.runtime.engine.api import Measurements
from heteromesh.runtime.engine.passes import PassMajor, PassTimer, RanPass, measured, prepared
from heteromesh.runtime.work.reader import PassInput, Reader
from heteromesh.runtime.work.source import Assignment

T = TypeVar("T")


@dataclass(frozen=True, slots=True, kw_only=True)
class PassWork:
    """A pass to be worked through."""

    context: PassContext
    batch: PassInput
    places: Sequence[int]
    divisor: float
    number: int
    """Of the step."""
    offload: float = 0.0
    """Share of what layers are given that is kept in host memory."""


def sample_work(reader: Reader, device: torch.device, count: int, divisor: int, place: int = 0) -> PassWork:
    """Returns a pass of `count` tokens of the data's own kind on one device, for trials; place: of its sequence."""
    plan = Pass(ranks=(0,), method="local", sequences=(0,), shards=((count,),), seconds=0.0)
    batch = reader.sample_input(plan, [count], 0)
    context = prepare_pass(*batch.divided(plan, [count]), World(device=device), (1.0,))
    places = range(place, place + len(context.layout.lengths))
    return PassWork(context=context, batch=batch, places=places, divisor=divisor, number=1)


class LayerMajor(PassMajor):
    """The `Engine` of steps in layer-major order, for models whose layers are in module lists.

    Until `attach`, and after `detach`, it is a `PassMajor`, for trials and measurements. Raises UserError for a model
    without layers.
    """

    def __init__(
        self, model: nn.Module, *, seed: int = 0, autocast: torch.dtype | None = None, loss: Loss | None = None
    ) -> None:
        inner = uncompiled(model)  # a graph of the whole model has no place for all passes to stop at
        self.layers: Mapping[str, nn.Module] = outermost_layers(inner)
        if not self.layers:
            raise UserError(
                f"shard_weights needs a model whose layers are in an nn.ModuleList, and {type(inner).__name__} has "
                "none: put them in a list, or turn it off"
            )
        super().__init__(inner, seed=seed, autocast=autocast, loss=loss)
        self._own = own_parameters(inner, self.layers)
        self._stubs: LayerStubs | None = None
        self._schedule: LayerMajorSchedule | None = None
        self._weights: LayerWeights = WholeWeights()
        self._kept_layers: Callable[[int, int], int] | None = None

    @property
    def layer_names(self) -> list[str]:
        """Returns by layer its name in the model."""
        return list(self.layers)

    @property
    def own_parameters(self) -> list[list[nn.Parameter]]:
        """Returns by layer the parameters that are its alone."""
        return self._own

    def recompute(self) -> None:
        """Computes layers again in the backward of ordinary passes: they take as long then as in layer-major order."""
        self._recomputed, self.forwards = recompute_layers(self.layers.values()), 2

    def keep(self) -> None:
        """Undoes `recompute`."""
        keep_activations(self._recomputed)
        self._recomputed, self.forwards = [], 1

    def attach(
        self,
        device: torch.device,
        order: LayerOrder | None = None,
        weights: LayerWeights | None = None,
        kept_layers: Callable[[int, int], int] | None = None,
    ) -> None:
        """Goes on in layer-major order. order: None: that of the lists. weights: None: this rank has them all.

        kept_layers: returns of how many layers, the last ones, this rank keeps activations in a step of so many tokens
        in its largest pass and in all; None: of none. Ranks may differ.
        """
        self._kept_layers = kept_layers
        self.keep()
        self._stubs = LayerStubs(self.model, dict(self.layers), device)
        order = order or LayerOrder(layers=tuple(range(len(self.layers))))
        self._weights = weights or WholeWeights()
        self._schedule = LayerMajorSchedule(self._stubs, order, self._weights, device)

    @property
    def first_backward(self) -> int:
        """Returns the first position in the layers' order that has had anything to do in a backward since `attach`."""
        assert self._schedule is not None
        return self._schedule.first_needed

    def detach(self) -> None:
        """Goes on as before `attach`."""
        if self._stubs is not None:
            self._stubs.close()
            self._stubs = self._schedule = None

    def close(self) -> None:
        if self._stubs is not None:
            self._stubs.close()
            self._stubs = None
        super().close()

    def run(self, assignment: Assignment, world: World, exchange: GradientExchange) -> Measurements:
        if self._schedule is None:
            return super().run(assignment, world, exchange)
        assert assignment.step is not None
        mine = assignment.step.passes_of(world.rank)
        timer, works, shares = PassTimer(world), list[PassWork](), list[Share]()
        names = [f"pass {position} {plan.method} x{len(plan.ranks)}" for position, plan in mine]
        with ExitStack() as stack:
            for position, plan in mine:
                places = tuple(assignment.places[i] for i in plan.sequences)
                shares.append(stack.enter_context(exchange.share(tuple(world.members[r] for r in plan.ranks), places)))
                context, batch = prepared(assignment, world, plan, position)
                works.append(
                    PassWork(
                        context=context,
                        batch=batch,
                        places=places,
                        divisor=assignment.divisor,
                        number=assignment.number,
                        offload=plan.offload,
                    )
                )

            def timed(index: int, part: str) -> AbstractContextManager[None]:
                return timer.time(mine[index][0], f"{names[index]}: {part}")

            made = self.work(
                works, world, timed, lambda layer: exchange.complete(self._own[layer]), kept=self._kept(works)
            )
            ran = [
                RanPass.counted(work.context, work.batch, work.places, losses, share)
                for work, losses, share in zip(works, made, shares, strict=True)
            ]
        return measured(timer, ran, world.rank)

    def forwards_of(self, act: Callable[[], T], world: World) -> T:
        """Returns what comes of code that calls the model without passes, each layer's weights there only while it
        runs. Attached; every rank must call it."""
        return run_forwards(act, self._weights, world.gather, len(self.layers), world.device)

    def forward_only(self, work: PassWork, world: World) -> None:
        """Runs a pass's forward, for what is looked at meanwhile."""
        with self._forward(work.context, work.batch, work.divisor, world, 0.0, work.number, work.places):
            return

    def work(
        self,
        works: Sequence[PassWork],
        world: World,
        timed: Timed,
        done: Callable[[int], None],
        *,
        compared: bool = False,
        inside: Callable[[], AbstractContextManager[None]] = nullcontext,
        kept: int = 0,
    ) -> list[PassLosses]:
        """Runs forward and backward of passes; returns each one's losses.

        done: called with a layer's index when its gradients are complete. compared, kept: see `LayerMajorSchedule.run`.
        inside: entered in every pass's own thread.
        """
        assert self._schedule is not None
        made: list[PassLosses | None] = [None] * len(works)

        def body(index: int, work: PassWork) -> Head:
            forward = self._forward(work.context, work.batch, work.divisor, world, 0.0, work.number, work.places)
            with inside(), forward as (losses, loss):
                made[index] = PassLosses(losses.losses.detach(), losses.weights)
                return Head(loss, copy_context())

        weights = tuple(self.model.parameters())
        bodies = [
            PassBody(
                partial(body, index, work),
                ActivationOffload.of(work.offload, weights, world.device) if work.offload else None,
                alone=work.context.exchange is None,
            )
            for index, work in enumerate(works)
        ]
        # what layers draw when they are computed again, they draw outside the pass's own block
        with dropouts_replaced():
            self._schedule.run(bodies, done=done, timed=timed, compared=compared, kept=kept)
        return [losses for losses in made if losses is not None]

    def _kept(self, works: Sequence[PassWork]) -> int:
        tokens = [work.context.tokens for work in works]
        return self._kept_layers(max(tokens), sum(tokens)) if tokens and self._kept_layers is not None else 0


def untimed(index: int, part: str) -> AbstractContextManager[None]:
    """Is the `Timed` of what nobody measures."""
    del index, part
    return nullcontext()
