"""Sharded weights of members that come and go: every range is held twice, by its owner and by another member.

Owner and mirror make the same update from the same sums, which the owner sends to the mirror once a step, so both have
the same bits after every commit. When members are lost or join, ranges are dealt out anew from whoever is left that
holds them, and nothing is recomputed but the step that was under way.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import asdict, replace
from itertools import pairwise
from typing import Any, NamedTuple

import torch
from torch import nn

from heteromesh.comm.collectives.api import Collectives
from heteromesh.comm.gradients.buckets import Bucket
from heteromesh.comm.gradients.exchange import Summed
from heteromesh.comm.interfaces import OnceWork, Work
from heteromesh.comm.tags import Tag
from heteromesh.comm.tcp.collectives import wait_all
from heteromesh.comm.tcp.frame import bytes_of
from heteromesh.comm.world import World
from heteromesh.parallel.state.flats import fragments_of, take_out
from heteromesh.parallel.state.fragments import Fragment
from heteromesh.parallel.state.owner import StoredState, scale_in
from heteromesh.parallel.state.parts import Slice, StatePart, collect, dealt_out, transport_of
from heteromesh.parallel.state.ranges import hand_out_ranges, squared_norm
from heteromesh.parallel.state.separable import check_cut_anywhere
from heteromesh.parallel.state.sharded import COPIES
from heteromesh.parallel.state.sharded_weights import ShardedWeights
from heteromesh.parallel.state.weight_source import WeightSource
from heteromesh.planner.ownership.ownership import Ownership, Range

_WEIGHTS = "weights"
"""The key of a part that has weights and no state."""
_NONE: Mapping[nn.Parameter, torch.dtype] = {}


class Alone(Collectives):
    """Those of one rank, which owns everything, or nothing yet."""

    def __init__(self, *, owns: bool) -> None:
        self.rank, self.size, self.sent_bytes = 0, 1, 0
        self._owns = owns

    def bounds(self, numel: int) -> tuple[int, ...]:
        return 0, numel * self._owns

    def all_reduce(self, flat: torch.Tensor, key: int | None = None) -> Work:
        return OnceWork(lambda: None)

    def reduce_scatter(self, flat: torch.Tensor, key: int | None = None, *, cuts: Sequence[int] = ()) -> Work:
        return OnceWork(lambda: None)

    def all_gather(
        self, flat: torch.Tensor, receivers: Collection[int] | None = None, *, cuts: Sequence[int] = ()
    ) -> Work:
        return OnceWork(lambda: None)

    def close(self) -> None:
        return


class HeldRange(NamedTuple):
    """Elements [low, low + n) of a bucket, and the memory (n,) that they are in."""

    low: int
    memory: torch.Tensor

    def covers(self, low: int, high: int) -> bool:
        """Whether elements [low, high) of the bucket lie in the range."""
        return self.low <= low and high <= self.low + self.memory.numel()


class ArrivedWeights(WeightSource):
    """Weights as parts, in the order of their buckets' elements or not."""

    def __init__(self, buckets: Sequence[Bucket], parts: Iterable[StatePart]) -> None:
        """parts: those that have weights; others are not looked at."""
        self._buckets = buckets
        self._places = {
            parameter: (number, start)
            for number, bucket in enumerate(buckets)
            for parameter, start in zip(bucket.parameters, bucket.offsets, strict=False)
        }
        self._parts: dict[int, list[StatePart]] = defaultdict(list)
        for part in parts:
            if _WEIGHTS in part.by_element:
                self._parts[part.bucket].append(part)

    def read(self, parameter: nn.Parameter, start: int, stop: int) -> torch.Tensor:
        number, first = self._places[parameter]
        return self.elements(number, first + start, first + stop)

    def elements(self, number: int, low: int, high: int) -> torch.Tensor:
        """Returns elements [low, high) of a bucket, all of which must have arrived: (high - low,)."""
        bucket, missing = self._buckets[number], high - low
        found = torch.empty(high - low, dtype=bucket.dtype, device=bucket.parameters[0].device)
        for part in self._parts[number]:
            first, last = max(low, part.first), min(high, part.last)
            if first < last:
                values = part.by_element[_WEIGHTS][first - part.first : last - part.first]
                found[first - low : last - low].copy_(values)
                missing -= last - first
        assert not missing, f"{missing} elements of bucket {number} have not arrived, or twice"
        return found


class MirroredWeights(ShardedWeights):
    """Keeps this member's range of every bucket of weights and of their optimizer state, and another member's too.

    Until the first `reshard` every member has everything, as the model and the optimizer have it, or can read it from
    the source. From then on what is held is right for one epoch: in the next, `is_settled` says no and a `reshard` must
    come before all else, also where the members are the same. Its `speeds` are the shares by which the world's
    collectives cut tensors.

    Raises UserError as `ShardedWeights` does.
    """

    def __init__(
        self,
        optimizer: torch.optim.Optimizer,
        model: nn.Module,
        buckets: Sequence[Bucket],
        layers: Sequence[Sequence[nn.Parameter]],
        *,
        working: Mapping[nn.Parameter, torch.dtype] = _NONE,
        source: WeightSource | None = None,
        restore: Callable[[], None] | None = None,
    ) -> None:
        """buckets, layers, working, source: as for `ShardedWeights`. restore: called when this member has got its first
        ranges in a job that had not dealt anything out; where `restores` is set it loads them from a checkpoint."""
        check_cut_anywhere(optimizer, "shard_weights")
        everything = () if source is not None else [range(len(layers))]
        alone = World(collectives=Alone(owns=source is None))
        super().__init__(optimizer, model, buckets, alone, layers, resident=everything, working=working, source=source)
        self.ownership = Ownership.whole()
        self._source, self._restore = source, restore
        self.restores = False
        """Whether `restore` loads what this member owns; then second copies are made of that."""
        self._sizes = [bucket.numel for bucket in self._buckets]
        self._copies: list[HeldRange] = []
        """By bucket, the other member's range that is held here; none while everybody has everything."""
        self._copied: tuple[torch.Tensor, ...] = ()
        """By bucket of gradients, the sums of those ranges."""
        self._squares = 0.0
        """The squared norm of all sums."""
        self._next: tuple[World, Ownership, list[StatePart]] | None = None
        self._mirroring: frozenset[Fragment] = frozenset()
        """Those of the fragments that are in that range."""

    def is_settled(self, world: World) -> bool:
        return self._world is world and self.ownership.copies == COPIES

    def reshard(self, world: World, speeds: Sequence[float]) -> str:
        """Raises LostState where both holders of a range are gone."""
        copies = 1 if self.ownership.is_whole and self.restores else COPIES
        ownership = dealt_out(world, speeds, copies, "the weights and the optimizer state")
        # what is held now stays until the new ranges are whole everywhere
        self._next = world, ownership, self._collect(world, ownership.ranges_held_by)
        return f"{ownership.members}:{ownership.fractions}:{ownership.stride}:{ownership.copies}"

    def described(self) -> str:
        """Says what the members hold, as far as it depends on who is there."""
        trained, sizes = self._buckets[: self._count], []
        elements = sum(fragment.tensor.numel() for fragment in self.fragments)
        state = self.state_bytes / max(1, elements)
        for member in self.ownership.members:
            numels = [sum(b - a for a, b in self.ownership.ranges_held_by(member, size)) for size in self._sizes]
            weights = sum(n * bucket.dtype.itemsize for n, bucket in zip(numels, self._buckets, strict=True))
            sizes.append((weights + state * sum(numels[: len(trained)])) / 1e6)
        told = " ".join(f"{size:.1f}" for size in sizes)
        return f"weights and optimizer state per rank, second copies included, MB: {told}"

    def finish_reshard(self) -> None:
        if self._next is None:
            return
        began = self.ownership.is_whole
        (world, self.ownership, parts), self._next = self._next, None
        arrived, mirrored = ArrivedWeights(self._buckets, parts), _mirrored(self.ownership, world.rank)
        copies = []
        for number, size in enumerate(self._sizes):
            low, high = (0, 0) if mirrored is None else self.ownership.ranges(size)[mirrored]
            copies.append(HeldRange(low, arrived.elements(number, low, high)))
        self._deal(world, {}, arrived)
        self._copies = copies
        for shard, size in zip(self._shards, self._sizes, strict=True):
            assert (shard.low, shard.high) == self.ownership.ranges(size)[world.rank], "the collectives cut otherwise"
        trained = enumerate(zip(self._buckets[: self._count], copies, strict=False))
        mirroring = [fragment for n, (bucket, copy) in trained for fragment in fragments_of(bucket, n, *copy)]
        states = [part for part in parts if _WEIGHTS not in part.by_element]
        held = [*self._own_fragments(), *mirroring]
        if states:
            self._optimizer.hold_parts(held, states)
        else:
            self._optimizer.hold(held)  # what comes from a source has no state yet
        self._mirroring, self._source = frozenset(mirroring), None
        if began and self._restore is not None:
            self._restore()

    def load_entries(self, entries: dict[str, Any], stored: StoredState) -> None:
        """Takes what has been loaded into this member's own ranges; nothing is gathered before the next attempt."""
        self._optimizer.load_entries(entries)
        for shard in self._shards:
            shard.outdate()

    def copy_sums(self, summed: Summed, world: World) -> str:
        """Sends the sums of the own range to its mirror, and receives those of the range that is mirrored here."""
        transport, held = transport_of(world), self.ownership
        mirrors = [world.members.index(member) for member in held.holders(world.rank)[1:]]
        owner = _mirrored(held, world.rank)
        self._copied = tuple(torch.empty_like(copy.memory) for copy in self._copies[: self._count])
        works: list[Work] = []
        for mine, copy in zip(summed.tensors, self._copied, strict=True):
            if copy.numel() and owner is not None:
                works.append(transport.recv_bytes(owner, bytes_of(copy), Tag.SUMS))
            for mirror in mirrors if mine.numel() else ():
                works.append(transport.send_bytes(mirror, bytes_of(mine), Tag.SUMS, checked=True, keep=mine))
        wait_all(works)
        squares: list[float] = world.gather(squared_norm(summed.tensors))
        self._squares = sum(squares)  # in rank order: the same bits everywhere
        return f"{summed.loss!r}:{summed.valid!r}:{squares!r}"

    def take(self, summed: Summed, limit: float, world: World) -> float:
        """As `StateOwner.take`; `copy_sums` has brought all that is needed of other ranks."""
        scale_in(summed)
        scale_in(summed, self._copied)
        hand_out_ranges([f for f in self.fragments if f not in self._mirroring], self._starts, summed)
        mirrored = [f for f in self.fragments if f in self._mirroring]
        hand_out_ranges(mirrored, [copy.low for copy in self._copies], replace(summed, tensors=self._copied))
        norm = math.sqrt(self._squares) * abs(summed.scale)
        if math.isfinite(norm):
            # of a dtype that doesn't depend on what is held here: owner and mirror must scale alike
            wide = max((bucket.dtype for bucket in self._buckets[: self._count]), key=lambda dtype: dtype.itemsize)
            total = torch.tensor(norm, dtype=torch.promote_types(wide, torch.float32))
            nn.utils.clip_grads_with_norm_([f.tensor for f in self.fragments], limit, total)
        return norm

    def update(self) -> None:
        """Updates both ranges. What is outside layers is gathered in the next attempt, which may be aborted."""
        self._optimizer.step()
        self._copied = ()
        for layer in self._layers:
            self.drop(layer)
        for shard in self._trained:
            shard.outdate()

    def checkpoint_entries(self) -> dict[str, Any]:
        """Has this member's own range: each member writes its share."""
        return self._optimizer.checkpoint_entries(without=self._mirroring)

    def snapshot(self) -> Any:
        """Leaves out what members hold, unless everybody has everything."""
        everything = [(number, 0, size) for number, size in enumerate(self._sizes)]
        parts = self._optimizer.parts(everything) if self.ownership.is_whole else []
        return {
            "groups": self._optimizer.options,
            "ownership": asdict(self.ownership),
            "parts": [tuple(part) for part in parts],
        }

    def model_snapshot(self, model: nn.Module) -> dict[str, Any]:
        """Returns all of it while everybody has everything, then its buffers: weights are dealt out at a commit."""
        if self.ownership.is_whole and self._source is None:
            return super().model_snapshot(model)
        return {name: t for name, t in model.state_dict(keep_vars=True).items() if t not in self._homes}

    def adopt(self, state: Any) -> None:
        """Takes a member's snapshot. Where ranges are dealt out, this rank holds nothing until the next `reshard`."""
        self._optimizer.set_options(state["groups"])
        self.ownership, parts = Ownership(**state["ownership"]), [StatePart(*part) for part in state["parts"]]
        if self.ownership.is_whole:
            self._optimizer.hold_parts(self._own_fragments(), parts)
            return
        self._optimizer.hold([])
        for parameter in self._homes:
            take_out(parameter)
        self._shards, self._trained, self._outside, self._copies = [], [], [], []
        self._layers.clear()
        self._world, self._source = World(), None

    def _collect(self, world: World, wanted: Callable[[int, int], Sequence[Range]]) -> list[StatePart]:
        def cut(slices: Sequence[Slice]) -> list[StatePart]:
            return self._optimizer.parts(slices) + [self._weights(*each) for each in slices]

        return collect(world, self.ownership, self._sizes, wanted, cut)

    def _weights(self, number: int, low: int, high: int) -> StatePart:
        """Returns the weights of elements [low, high) of a bucket, which are held here, without copies."""
        if self._source is not None:
            return StatePart(number, low, high, {_WEIGHTS: self._read(self._source, number, low, high)}, {})
        shard = self._shards[number]
        held = [HeldRange(shard.low, shard.own), *self._copies[number : number + 1]]
        start, memory = next(each for each in held if each.covers(low, high))
        return StatePart(number, low, high, {_WEIGHTS: memory[low - start : high - start]}, {})

    def _read(self, source: WeightSource, number: int, low: int, high: int) -> torch.Tensor:
        bucket = self._buckets[number]
        places = zip(bucket.parameters, pairwise(bucket.offsets), strict=True)
        cuts = [(p, max(low, start) - start, min(high, stop) - start) for p, (start, stop) in places]
        return torch.cat([source.read(*cut).to(bucket.dtype) for cut in cuts if cut[1] < cut[2]])


def _mirrored(ownership: Ownership, rank: int) -> int | None:
    """Returns the owner's rank of the range that a rank holds beside its own, if any."""
    member = ownership.members[rank]
    others = (i for i in range(len(ownership.members)) if i != rank and member in ownership.holders(i))
    return next(others, None)
