"""Sharded weights: each rank keeps its ranges of weights and optimizer state; a layer is whole only while it is used.

For worlds that stay, and an engine that goes layer by layer (ZeRO-3, arXiv 1910.02054, with uneven ranges and once a
step instead of once a pass). A layer's weights are gathered from their owners before it runs, while the layer before
computes, and their memory is given back after it. What is outside layers stays gathered, as do buckets that are
resident: gathered once, when the optimizer has updated them.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Collection, Iterable, Iterator, Sequence
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
from heteromesh.parallel.state.weight_shard import OUTSIDE, WeightShard
from heteromesh.parallel.state.weight_source import WeightSource


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
        resident: Collection[int] = (),
        source: WeightSource | None = None,
    ) -> None:
        """buckets: of the gradients, none with parameters of two layers. layers: by index, the parameters that are a
        layer's alone. resident: numbers of buckets that stay gathered on all ranks. source: of the weights, each rank
        reads its own ranges; None: the model has them."""
        check_parameters(optimizer, model, buckets)
        if world.collectives is None:
            raise UserError("one rank has no weights to deal out: use Replicated, or start more ranks")
        self._world = world
        self._collectives = world.collectives
        names = {p: _plain(name) for name, p in model.named_parameters()}
        self._optimizer = FragmentedOptimizer(optimizer, names)
        before = optimizer.state_dict()
        frozen = [
            b for own in (*layers, _outside(model, layers)) for b in pack(own) if not b.parameters[0].requires_grad
        ]
        homes = {p: index for index, own in enumerate(layers) for p in own}
        if source is not None:
            for parameter in model.parameters():
                take_out(parameter)  # whatever stood in for its weights
        self._shards = [
            WeightShard(number, bucket, homes.get(bucket.parameters[0], OUTSIDE), world, number in resident, source)
            for number, bucket in enumerate((*buckets, *frozen))
        ]
        trained = self._shards[: len(buckets)]
        self._starts = [shard.low for shard in trained]
        self._homes = {p: shard for shard in self._shards for p in shard.bucket.parameters}
        self._optimizer.hold([f for s in trained for f in fragments_of(s.bucket, s.number, s.low, s.own)])
        self._optimizer.load_state_dict(before)
        self._layers: dict[int, list[WeightShard]] = defaultdict(list)
        for shard in self._shards:
            if not shard.resident:
                self._layers[shard.layer].append(shard)
        self._exposed = 0.0
        self._stale = source is not None
        """Whether what is resident has not been gathered yet."""
        self.most_bytes = 0
        """The most that has been in gathered buffers at once, what is resident included."""

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
        """Bytes of the buffers that hold gathered weights now."""
        return sum(shard.flat.nbytes for shard in self._shards if shard.flat is not None)

    def begin(self) -> None:
        """Returns when what is resident is here; all else is taken away."""
        for layer in self._layers:
            self.drop(layer)
        self._gather_resident()
        self._wait(shard for shard in self._shards if shard.resident)

    def fetch(self, layer: int) -> None:
        """Starts to gather a layer's weights, unless they are here or on their way; returns at once."""
        self._gather(self._layers[layer])

    def show(self, layer: int) -> None:
        """Returns when the layer's weights are here and in its parameters."""
        self.fetch(layer)
        self._wait(self._layers[layer])

    def hide(self, layer: int) -> None:
        """Takes the weights out of the layer's parameters, but keeps them here."""
        for shard in self._layers[layer]:
            shard.hide()

    def drop(self, layer: int) -> None:
        """Takes the weights out of the layer's parameters, and gives their memory back."""
        self._wait(shard for shard in self._layers[layer] if shard.work is not None)
        for shard in self._layers[layer]:
            shard.drop()

    def weights_ready(self) -> None:
        """Gathers all weights: every rank has the whole model until the next `begin`."""
        self._gather_resident()
        self._gather(self._shards)
        self._wait(self._shards)

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
        """Updates, and starts to gather what is resident."""
        self._optimizer.step()
        self._renew()

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
        """Gathers nothing but what is resident: layers' weights are with their owners from here on."""
        self._optimizer.load_entries(entries)
        self._renew()

    def take_exposed_seconds(self) -> float:
        seconds, self._exposed = self._exposed, 0.0
        return seconds

    def close(self) -> None:
        """Gives the optimizer the model's parameters back, but no state: that is in checkpoints.

        Weights that are not here stay away: where a run has failed the other ranks may not be there to give them.
        """
        self._optimizer.restore()

    def _renew(self) -> None:
        """Drops gathered weights that are no longer those of their owners; starts to gather what is resident."""
        for layer in self._layers:
            self.drop(layer)
        self._stale = True
        self._gather_resident()

    def _gather_resident(self) -> None:
        """Starts to gather what is resident, where it is no longer, or not yet, that of its owners."""
        if self._stale:
            self._stale = False
            self._gather((shard for shard in self._shards if shard.resident), again=True)

    def _gather(self, shards: Iterable[WeightShard], *, again: bool = False) -> None:
        for shard in shards:
            if shard.flat is None or again:
                shard.gather(self._collectives)
        self.most_bytes = max(self.most_bytes, self.gathered_bytes)

    def _wait(self, shards: Iterable[WeightShard]) -> None:
        for shard in shards:
            if shard.work is not None:
                self._exposed += shard.wait(self._collectives, self._world.recorder)
            shard.show()


def _plain(name: str) -> str:
    """Returns a name without torch.compile's wrapper, as in torch's own checkpoints."""
    return name.replace("_orig_mod.", "")


def _outside(model: nn.Module, layers: Sequence[Sequence[nn.Parameter]]) -> list[nn.Parameter]:
    inside = {p for own in layers for p in own}
    return [p for p in model.parameters() if p not in inside]
