"""Sharded weights: each rank keeps its ranges of weights and optimizer state; a layer is whole only while it is used.

For worlds that stay, and an engine that goes layer by layer (ZeRO-3, arXiv 1910.02054, with uneven ranges and once a
step instead of once a pass). A layer's weights are gathered from their owners before it runs, while the layer before
computes, and their memory is given back after it. Ranks with memory to spare keep layers from the forward to the
backward, which are gathered only on the others then. What is outside layers stays gathered on all ranks: it is sent
once a step, when the optimizer has updated it. What is frozen is sent only to ranks that don't keep it.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from heteromesh.comm.gradients.buckets import Bucket, pack
from heteromesh.comm.gradients.exchange import Summed
from heteromesh.comm.world import World
from heteromesh.errors import UserError
from heteromesh.parallel.state.flats import check_parameters, fragments_of, take_out
from heteromesh.parallel.state.fragmented import FragmentedOptimizer
from heteromesh.parallel.state.fragments import Fragment
from heteromesh.parallel.state.owner import StateOwner, StoredState, scale_in
from heteromesh.parallel.state.ranges import clip_ranges, hand_out_ranges
from heteromesh.parallel.state.separable import deal_buckets
from heteromesh.parallel.state.weight_shard import OUTSIDE, WeightShard
from heteromesh.parallel.state.weight_source import WeightSource

_NONE: Mapping[nn.Parameter, torch.dtype] = {}


class ShardedWeights(StateOwner):
    """Keeps this rank's range of every bucket of weights and of their optimizer state.

    It begins with whole weights, as the model has them, until the first `begin` leaves what is outside layers; from a
    source it begins with this rank's ranges alone. A parameter whose weights are not here has no elements: what uses it
    fails. Frozen weights are dealt out too.

    Raises UserError as `Sharded` does.
    """

    def __init__(
        self,
        optimizer: torch.optim.Optimizer,
        model: nn.Module,
        buckets: Sequence[Bucket],
        world: World,
        layers: Sequence[Sequence[nn.Parameter]],
        *,
        resident: Sequence[Collection[int]] = (),
        working: Mapping[nn.Parameter, torch.dtype] = _NONE,
        source: WeightSource | None = None,
    ) -> None:
        """buckets: of the gradients, none with parameters of two layers. layers: by index, the parameters that are a
        layer's alone. resident: by rank, the indices of layers that it keeps, the same on all ranks; empty: none.
        working: the dtype in which weights are gathered for layers where it isn't their own; the optimizer updates them
        as they are, and gradients are summed in that. None in a bucket with others (see `GradientReducer`). source: of
        the weights, of which each rank reads its own ranges; None: the model has them."""
        check_parameters(optimizer, model, buckets)
        if world.collectives is None:
            raise UserError("one rank has no weights to deal out: use Replicated, or start more ranks")
        names = {p: _plain(name) for name, p in model.named_parameters()}
        self._optimizer = FragmentedOptimizer(optimizer, names)
        deal_buckets(buckets, self._optimizer.whole, world)
        before = optimizer.state_dict()
        self._buckets, self._count = (*buckets, *_frozen((*layers, _outside(model, layers)), working)), len(buckets)
        self._working, self._inside = working, {p: index for index, own in enumerate(layers) for p in own}
        keepers = {i: [rank for rank, kept in enumerate(resident) if i in kept] for i in range(len(layers))}
        self._deal(world, keepers, source)
        self._optimizer.hold(self._own_fragments())
        self._optimizer.load_state_dict(before)
        self._exposed = 0.0
        self._exact = False
        self.most_bytes = 0
        """The most that has been in buffers for gathered weights at once, those that are kept included."""

    def _deal(self, world: World, keepers: Mapping[int, Collection[int]], source: WeightSource | None) -> None:
        """Has this rank own its ranges of this world; keepers: by layer, the ranks that keep it."""
        assert world.collectives is not None
        self._world, self._collectives = world, world.collectives
        if source is not None:
            for parameter in (p for bucket in self._buckets for p in bucket.parameters):
                take_out(parameter)  # whatever stood in for its weights
        self._shards = []
        for number, bucket in enumerate(self._buckets):
            layer = self._inside.get(bucket.parameters[0], OUTSIDE)
            dtype = _working_dtype(bucket, self._working)
            self._shards.append(WeightShard(number, bucket, layer, world, keepers.get(layer, ()), dtype, source))
        self._trained = self._shards[: self._count]
        self._starts = [shard.low for shard in self._trained]
        self._homes = {p: shard for shard in self._shards for p in shard.bucket.parameters}
        self._layers: dict[int, list[WeightShard]] = defaultdict(list)
        for shard in self._shards:
            self._layers[shard.layer].append(shard)
        self._outside = self._layers.pop(OUTSIDE, [])

    def _own_fragments(self) -> list[Fragment]:
        return [f for s in self._trained for f in fragments_of(s.bucket, s.number, s.low, s.own)]

    @property
    def fragments(self) -> list[Fragment]:
        """Returns what this rank holds, in the order of the optimizer's groups."""
        return self._optimizer.fragments

    @property
    def state_bytes(self) -> int:
        """Bytes of optimizer state that this rank holds now."""
        return self._optimizer.state_bytes

    @property
    def gathered_bytes(self) -> int:
        """Bytes of the buffers for gathered weights now."""
        return sum(shard.flat.nbytes for shard in self._shards if shard.flat is not None)

    def begin(self, *, exact: bool = False) -> None:
        """Returns when what is outside layers is here; the layers' weights are taken away.

        exact: until the next call they are gathered as they are owned.
        """
        self._exact = exact
        for layer in self._layers:
            self.drop(layer)
        self._gather(self._outside)
        self._show(self._outside)

    def fetch(self, layer: int) -> None:
        """Starts to bring a layer's weights to the ranks that don't have them yet; returns at once."""
        self._gather(self._layers[layer], exact=self._exact)

    def show(self, layer: int) -> None:
        """Returns when the layer's weights are here and in its parameters."""
        self.fetch(layer)
        self._show(self._layers[layer])

    def hide(self, layer: int) -> None:
        """Takes the weights out of the layer's parameters, but keeps them here."""
        for shard in self._layers[layer]:
            shard.hide()

    def drop(self, layer: int) -> None:
        """Takes the weights out of the layer's parameters, and gives their memory back where they are not kept."""
        self._wait(self._layers[layer], sent=True)
        for shard in self._layers[layer]:
            shard.drop()

    def weights_ready(self) -> None:
        """Gathers all weights: every rank has the whole model until the next `begin`."""
        self._gather(self._shards, exact=True)
        self._show(self._shards)
        self._wait(self._shards, sent=True)

    def refresh(self, world: World) -> str:
        return ""

    def apply(self, summed: Summed, limit: float) -> float:
        norm = self.take(summed, limit, self._world)
        if math.isfinite(norm):
            self.update()
        return norm

    def take(self, summed: Summed, limit: float, world: World) -> float:
        scale_in(summed)
        hand_out_ranges(self.fragments, self._starts, summed)
        return clip_ranges(self.fragments, limit, world)

    def update(self) -> None:
        """Updates, and starts to gather what is outside layers."""
        self._optimizer.step()
        self._renew(self._trained)

    def skip(self) -> None:
        self._optimizer.drop()

    @contextmanager
    def gathered(self, world: World) -> Iterator[None]:
        """Every rank writes its part: nothing is gathered."""
        yield

    def snapshot(self) -> Any:
        raise NotImplementedError("sharded weights are of worlds that stay: nobody joins")

    def adopt(self, state: Any) -> None:
        raise NotImplementedError("sharded weights are of worlds that stay: nobody joins")

    def model_entries(self, model: nn.Module) -> dict[str, Any]:
        entries = super().model_entries(model)
        for name, tensor in model.state_dict(keep_vars=True).items():
            if tensor in self._homes:
                entries[_plain(name)] = self._homes[tensor].piece(tensor)
        return entries

    def checkpoint_entries(self) -> dict[str, Any]:
        return self._optimizer.checkpoint_entries()

    def checkpoint_buffers(self, stored: StoredState) -> dict[str, Any]:
        return self._optimizer.checkpoint_buffers(stored)

    def load_entries(self, entries: dict[str, Any], stored: StoredState) -> None:
        """Gathers nothing but what is outside layers: the others' weights are with their owners from here on."""
        self._optimizer.load_entries(entries)
        self._renew(self._shards)

    def take_exposed_seconds(self) -> float:
        seconds, self._exposed = self._exposed, 0.0
        return seconds

    def close(self) -> None:
        """Gives the optimizer the model's parameters back, but no state: that is in checkpoints.

        Weights that are not here stay away: where a run has failed the other ranks may not be there to give them.
        """
        self._optimizer.restore()

    def _renew(self, changed: Iterable[WeightShard]) -> None:
        """Drops layers whose weights are no longer those of their owners; starts to gather what is outside layers."""
        for layer in self._layers:
            self.drop(layer)
        for shard in changed:
            shard.outdate()
        self._gather(self._outside)

    def _gather(self, shards: Iterable[WeightShard], *, exact: bool = False) -> None:
        for shard in shards:
            shard.gather(self._collectives, exact=exact)
        self.most_bytes = max(self.most_bytes, self.gathered_bytes)

    def _show(self, shards: Sequence[WeightShard]) -> None:
        self._wait(shards)
        for shard in shards:
            shard.show()

    def _wait(self, shards: Iterable[WeightShard], *, sent: bool = False) -> None:
        """Returns when the weights are here; sent: and are with all ranks that get them from here."""
        for shard in shards:
            if shard.arriving or (sent and shard.work is not None):
                self._exposed += shard.wait(self._collectives, self._world.recorder)


def _plain(name: str) -> str:
    """Returns a name without torch.compile's wrapper, as in torch's own checkpoints."""
    return name.replace("_orig_mod.", "")


def _working_dtype(bucket: Bucket, working: Mapping[nn.Parameter, torch.dtype]) -> torch.dtype | None:
    dtype, *others = {working.get(p) for p in bucket.parameters}
    if others:
        raise ValueError("a bucket's weights are gathered in several dtypes: give its reducer the same `working`")
    return dtype


def _frozen(groups: Iterable[Sequence[nn.Parameter]], working: Mapping[nn.Parameter, torch.dtype]) -> list[Bucket]:
    buckets = [bucket for own in groups for bucket in pack(own, working=working)]
    return [bucket for bucket in buckets if not bucket.parameters[0].requires_grad]


def _outside(model: nn.Module, layers: Sequence[Sequence[nn.Parameter]]) -> list[nn.Parameter]:
    inside = {p for own in layers for p in own}
    return [p for p in model.parameters() if p not in inside]
