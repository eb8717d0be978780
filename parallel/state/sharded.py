"""Sharded optimizer state: each rank holds and updates uneven ranges of the parameters, once or twice in the world.

A fixed world (ZeRO-1 and 2, arXiv 1910.02054) holds one copy: gradients of a bucket are summed by their owners alone
(reduce-scatter, during the last backward), each owner updates its range, and the updated parameters are gathered while
the next forward already runs. In a world of changing members each holds its own range and a neighbour's: owner and
mirror do the same arithmetic on the same sums, so that when a member is lost its range lives on in the mirror, and
nothing is recomputed. Parameters are brought up to date, and state is dealt out anew, in attempts that may be aborted.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from typing import Any

import torch
from torch import nn

from heteromesh.comm.gradients.buckets import Bucket
from heteromesh.comm.gradients.exchange import GradientExchange, Summed
from heteromesh.comm.world import World
from heteromesh.errors import UserError
from heteromesh.parallel.state.flats import FlatBuckets, check_parameters
from heteromesh.parallel.state.fragmented import FragmentedOptimizer
from heteromesh.parallel.state.fragments import Fragment
from heteromesh.parallel.state.gather import ParameterGather
from heteromesh.parallel.state.owner import StateOwner, StoredState, clip_whole, scale_in
from heteromesh.parallel.state.parts import StatePart, collect, dealt_out, transport_of
from heteromesh.parallel.state.ranges import clip_ranges, hand_out_ranges
from heteromesh.parallel.state.separable import check_cut_anywhere, deal_buckets
from heteromesh.planner.ownership.ownership import Ownership, Range

COPIES = 2
"""Of each range where members come and go."""


class Sharded(StateOwner):
    """Runs an optimizer over the ranges of the buckets that this rank holds.

    Any element-wise optimizer will do, and in a world that stays any that updates each parameter by itself, which then
    has one owner (parallel/state/separable.py); it is tried out here. From here to `close` the optimizer's groups hold
    this rank's fragments (their hyperparameters, and schedules over them, work as before) and the parameters of a
    bucket lie one after the other in memory. State that the optimizer has already is kept.

    `world`: one that stays; its collectives say who owns what, and gradients come as this rank's ranges. Without one
    nothing is dealt out until the first `reshard`, and gradients come whole.

    Raises UserError for optimizers that can't be dealt out, for parameters that are not the model's, and for embeddings
    with sparse gradients.
    """

    def __init__(
        self,
        optimizer: torch.optim.Optimizer,
        model: nn.Module,
        buckets: Sequence[Bucket],
        world: World | None = None,
    ) -> None:
        check_parameters(optimizer, model, buckets)
        self._world = world or World()
        # torch.compile's wrapper is no part of a name, as in torch's own checkpoints
        names = {p: name.replace("_orig_mod.", "") for name, p in model.named_parameters()}
        self._optimizer = FragmentedOptimizer(optimizer, names)
        if self._world.collectives is not None:
            deal_buckets(buckets, self._optimizer.whole, self._world)
        else:
            check_cut_anywhere(optimizer, "shard_optimizer")
        self._flats = FlatBuckets(buckets)
        self.ownership = Ownership.whole()
        self.params_synced = True
        """Whether all parameters are up to date on all members."""
        self._arrived_over: object = None
        """The transport over which all parameters have come here, since the last update."""
        self._next: tuple[Ownership, list[list[Range]], list[StatePart]] | None = None
        own = [self._own_range(bucket) for bucket in self._flats.buckets]
        self._starts = [low for low, _ in own]
        """Where in its bucket each summed tensor begins."""
        before = optimizer.state_dict()
        self._optimizer.hold(self._flats.fragments([[range_] for range_ in own]))
        self._optimizer.load_state_dict(before)
        self._gather: ParameterGather | None = None
        if self._world.collectives is not None:
            self._gather = ParameterGather(model, self._flats, self._world.collectives, self._world.recorder)

    @property
    def fragments(self) -> list[Fragment]:
        """Returns what this rank holds, in the order of the optimizer's groups."""
        return self._optimizer.fragments

    @property
    def state_bytes(self) -> int:
        """Bytes of optimizer state that this rank holds now."""
        return self._optimizer.state_bytes

    def weights_ready(self) -> None:
        if self._gather is not None:
            self._gather.wait_all()

    def refresh(self, world: World) -> str:
        """Raises LostState where owner and mirror of a range are gone."""
        if self._gather is not None:
            return ""
        transport = transport_of(world)
        if not self.params_synced and self._arrived_over is not transport:
            with world.recorder.span("parameters gathered, exposed", "wait"):
                self._flats.exchange(transport, self.ownership, world.members)
            self._arrived_over = transport
        return self._flats.digest()

    def apply(self, summed: Summed, limit: float) -> float:
        norm = self.take(summed, limit, self._world)
        if math.isfinite(norm):
            self.update()
        return norm

    def take(self, summed: Summed, limit: float, world: World) -> float:
        scale_in(summed)
        if self._gather is None:  # all members have the whole sums
            norm = clip_whole(summed, self._flats.buckets, limit)
            self._hand_out(summed)
            return norm
        self._hand_out(summed)
        return clip_ranges(self.fragments, limit, world)

    def update(self) -> None:
        """Updates and starts to gather the parameters, in a world that stays."""
        self.weights_ready()
        self._optimizer.step()
        self.params_synced, self._arrived_over = False, None
        if self._gather is not None:
            self._gather.start()

    def skip(self) -> None:
        self._optimizer.drop()

    def is_settled(self, world: World) -> bool:
        return self._gather is not None or self.ownership.members == world.members

    def reshard(self, world: World, speeds: Sequence[float]) -> str:
        """Raises LostState where owner and mirror of a range are gone."""
        parameters = self.refresh(world)
        ownership = dealt_out(world, speeds, COPIES, "the optimizer state")
        parts = self._collect(world, ownership.ranges_held_by)
        mine = [ownership.ranges_held_by(world.members[world.rank], size) for size in self._flats.sizes]
        # what is held now stays until the new ranges are whole everywhere
        self._next = ownership, mine, parts
        return f"{ownership.members}:{ownership.fractions}:{parameters}"

    def finish_reshard(self) -> None:
        if self._next is None:
            return
        (self.ownership, ranges, parts), self._next, self.params_synced = self._next, None, True
        self._optimizer.hold_parts(self._flats.fragments(ranges), parts)

    @contextmanager
    def gathered(self, world: World) -> Iterator[None]:
        self.weights_ready()
        if self._gather is not None:
            yield
            return
        self.refresh(world)
        parts = self._collect(world, lambda member, size: [(0, size)] if member == min(world.members) else [])
        if not world.writes:
            yield
            return
        with self._optimizer.holding(self._flats.fragments(self._flats.whole), parts):
            yield

    def snapshot(self) -> Any:
        """Leaves out what the others hold, unless nothing is dealt out yet."""
        everything = [(number, 0, size) for number, size in enumerate(self._flats.sizes)]
        parts = self._optimizer.parts(everything) if self.ownership.is_whole else []
        return {
            "groups": self._optimizer.options,
            "ownership": asdict(self.ownership),
            "parts": [tuple(part) for part in parts],
            "params_synced": self.params_synced,
        }

    def adopt(self, state: Any) -> None:
        self._optimizer.set_options(state["groups"])
        self.params_synced, self._arrived_over = state["params_synced"], None
        self.ownership, parts = Ownership(**state["ownership"]), [StatePart(*part) for part in state["parts"]]
        ranges = self._flats.whole if self.ownership.is_whole else []
        self._optimizer.hold_parts(self._flats.fragments(ranges), parts)

    def checkpoint_entries(self) -> dict[str, Any]:
        self.weights_ready()
        return self._optimizer.checkpoint_entries()

    def checkpoint_buffers(self, stored: StoredState) -> dict[str, Any]:
        self.weights_ready()
        return self._optimizer.checkpoint_buffers(stored)

    def load_entries(self, entries: dict[str, Any], stored: StoredState) -> None:
        self._optimizer.load_entries(entries)

    def state_dict(self) -> dict[str, Any]:
        """Returns the unsharded optimizer's, whole, on the CPU, on every rank: it loads there and the other way round.

        Every rank must call it. Takes the memory that sharding saves; checkpoints do without.
        """
        return self._optimizer.state_dict(self._world)

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Takes this rank's part of the unsharded optimizer's state. Raises ValueError for one of other groups."""
        self._optimizer.load_state_dict(state)

    def take_exposed_seconds(self) -> float:
        if self._gather is None:
            return 0.0
        seconds, self._gather.exposed_seconds = self._gather.exposed_seconds, 0.0
        return seconds

    def close(self) -> None:
        """Gives the optimizer the model's parameters back, but no state: that is in checkpoints."""
        try:
            self.weights_ready()
        finally:
            if self._gather is not None:
                self._gather.close()
            self._optimizer.restore()

    def _own_range(self, bucket: Bucket) -> Range:
        if self._world.collectives is None:
            return 0, bucket.numel
        low, high = bucket.bounds(self._world.collectives)[self._world.rank :][:2]
        return low, high

    def _hand_out(self, summed: Summed) -> None:
        """Makes the sums the fragments' gradients, as views."""
        hand_out_ranges(self.fragments, self._starts, summed)

    def _collect(self, world: World, wanted: Callable[[int, int], Sequence[Range]]) -> list[StatePart]:
        """Returns the state that this rank wants, from those who hold it.

        wanted: by member and the elements of a bucket, the ranges that it wants.
        """
        return collect(world, self.ownership, self._flats.sizes, wanted, self._optimizer.parts)


class ShardedOptimizer(Sharded):
    """A `Sharded` of a world that stays, for a loop of one's own, in place of the optimizer:

        executor = StepExecutor(model, world, scatter=True)
        optimizer = ShardedOptimizer(torch.optim.AdamW(model.parameters()), model, executor.exchange, world)
        summed = executor.run(...).summed
        optimizer.clip_gradients(summed, 1.0); optimizer.step(summed)

    Parameters are up to date when the model's forward uses them; before they are used otherwise, call `wait`. Every
    rank makes the same calls.
    """

    def __init__(
        self, optimizer: torch.optim.Optimizer, model: nn.Module, exchange: GradientExchange, world: World
    ) -> None:
        if world.size == 1:
            raise UserError("one rank has nothing to shard: use the optimizer as it is, or start more ranks")
        super().__init__(optimizer, model, exchange.buckets, world)

    @property
    def param_groups(self) -> list[dict[str, Any]]:
        """Returns the optimizer's own."""
        return self._optimizer.inner.param_groups

    def clip_gradients(self, summed: Summed, limit: float = math.inf) -> float:
        """Scales the step's gradients so that their norm over all ranks is at most `limit`.

        Returns the norm before, equal on every rank.
        """
        return self.take(summed, limit, self._world)

    def step(self, summed: Summed) -> None:
        """Updates what this rank owns and starts to gather the parameters."""
        if not isinstance(summed, Summed):
            raise UserError(
                f"step was given a {type(summed).__name__}: give it the step's summed gradients; a closure can't be "
                "called again by a sharded optimizer"
            )
        self._hand_out(summed)
        self.update()

    def wait(self) -> None:
        """Returns when all parameters are up to date on this rank: before they are saved or used outside a forward."""
        self.weights_ready()
