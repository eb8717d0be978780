"""A bucket of weights of which each rank owns a range, and which is whole on a rank only while it is gathered."""

from __future__ import annotations

import time
from collections.abc import Collection
from itertools import pairwise

import torch
from torch import nn

from heteromesh.comm.collectives.api import Collectives
from heteromesh.comm.gradients.buckets import Bucket
from heteromesh.comm.interfaces import Work
from heteromesh.comm.records import Recorder
from heteromesh.comm.world import World
from heteromesh.parallel.state.fragments import Piece
from heteromesh.parallel.state.weight_source import WeightSource

OUTSIDE = -1
"""The layer of what is in no layer."""


class WeightShard:
    """A bucket: this rank's range of its weights, and the whole of them while it is gathered.

    Which ranks have all of it follows from the calls, which are the same on all ranks.
    """

    def __init__(
        self,
        number: int,
        bucket: Bucket,
        layer: int,
        world: World,
        keepers: Collection[int],
        working: torch.dtype | None = None,
        source: WeightSource | None = None,
    ) -> None:
        """keepers: the ranks that keep what has been gathered, and the memory for it. working: in which weights are
        gathered for layers; None: as they are owned. source: of this rank's range; None: the parameters have it."""
        assert world.collectives is not None
        self.number, self.bucket, self.layer = number, bucket, layer
        self._everybody = frozenset(range(world.size))
        self._keepers = self._everybody if layer == OUTSIDE else frozenset(keepers)
        self._keeps = world.rank in self._keepers
        self.low, self.high = bucket.bounds(world.collectives)[world.rank :][:2]
        self._working, self._dtype = working or bucket.dtype, bucket.dtype
        """That of what has been gathered last: the owners' own at first, and after `gather(exact=True)`."""
        self._holders = self._everybody if source is None else frozenset()
        """The ranks whose flat tensor has, or gets from the gather under way, what the owners have."""
        self._inside = self._keeps and self._working == bucket.dtype
        self.flat: torch.Tensor | None = None
        if source is None:
            self.flat = torch.cat([p.detach().reshape(-1) for p in bucket.parameters])
        elif self._inside:
            self.flat = bucket.empty()
        self.own = self._owned()
        """(high - low,): what this rank owns, up to date always; where it keeps the whole, a part of that if dtypes are
        equal."""
        self.work: Work | None = None
        """The gather under way."""
        self._only_sends = False
        """Whether that brings nothing here."""
        self._started_ns = 0
        self._shown = False
        if source is None:
            self.show()
        else:
            self._read(source)

    @property
    def arriving(self) -> bool:
        """Returns whether weights are on their way here."""
        return self.work is not None and not self._only_sends

    def gather(self, collectives: Collectives, *, exact: bool = False) -> None:
        """Starts to bring the whole bucket to the ranks that don't have it; exact: as it is owned."""
        dtype = self.own.dtype if exact else self._working
        if dtype != self._dtype:
            self.hide()
            self.free()
            self._dtype, self._holders = dtype, frozenset()
        lacking = self._everybody - self._holders
        if not lacking:
            return
        self._only_sends = collectives.rank in self._holders
        if self.flat is None:
            self.flat = self.own.new_empty(self.bucket.numel, dtype=dtype)
        if not self._inside:
            self.flat[self.low : self.high].copy_(self.own)
        receivers = None if lacking == self._everybody else lacking
        self.work = collectives.all_gather(self.flat, receivers, cuts=self.bucket.cuts)
        self._started_ns = time.time_ns()
        self._holders = self._everybody

    def wait(self, collectives: Collectives, recorder: Recorder) -> float:
        """Returns when the gather is done, how many seconds that took."""
        work, self.work = self.work, None
        assert work is not None
        start, clock, sent = time.time_ns(), time.perf_counter_ns(), collectives.sent_bytes
        work.wait()
        waited, now = time.perf_counter_ns() - clock, time.time_ns()
        sent = collectives.sent_bytes - sent
        recorder.add(f"parameter gather {self.number}", "comm", self._started_ns, now - self._started_ns, sent)
        recorder.add("parameter gather, exposed", "wait", start, waited)
        return waited / 1e9

    def show(self) -> None:
        """Has the parameters use the gathered weights."""
        if self._shown or self.flat is None:
            return
        self._shown = True
        parts = self.flat.split([shape.numel() for shape in self.bucket.shapes])
        for parameter, part, shape in zip(self.bucket.parameters, parts, self.bucket.shapes, strict=True):
            parameter.data = part.view(shape)

    def hide(self) -> None:
        """Leaves the parameters without weights."""
        if self._shown:
            self._shown = False
            for parameter in self.bucket.parameters:
                parameter.data = self.own.new_empty(0)

    def drop(self) -> None:
        """Takes the weights out of the parameters, and gives their memory back where this rank does not keep them."""
        self.hide()
        self._holders &= self._keepers if self._dtype == self._working else frozenset()
        if not self._keeps or self._dtype != self._working:
            self.free()

    def free(self) -> None:
        """Gives the memory of gathered weights back."""
        self.flat = None

    def outdate(self) -> None:
        """Takes note that owners have changed their ranges: nobody has the whole."""
        self._holders = frozenset()

    def _owned(self) -> torch.Tensor:
        """Returns the memory of what this rank owns, with its values where these are here."""
        if self.flat is None:
            device = self.bucket.parameters[0].device
            return torch.empty(self.high - self.low, dtype=self.bucket.dtype, device=device)
        own = self.flat[self.low : self.high]
        return own if self._inside else own.clone()

    def _read(self, source: WeightSource) -> None:
        """Takes the range that this rank owns from elsewhere."""
        for parameter, (start, stop) in zip(self.bucket.parameters, pairwise(self.bucket.offsets), strict=True):
            first, last = max(self.low, start), min(self.high, stop)
            if first < last:
                part = source.read(parameter, first - start, last - start)
                self.own[first - self.low : last - self.low].copy_(part)

    def piece(self, parameter: nn.Parameter) -> Piece:
        """Returns what this rank has of a parameter, in the memory that it is in."""
        index = self.bucket.index(parameter)
        start, stop = self.bucket.offsets[index : index + 2]
        first, last = max(self.low, start), min(self.high, stop)
        own = self.own[first - self.low : last - self.low] if first < last else self.own[:0]
        return Piece(own, self.bucket.shapes[index], max(0, first - start))
