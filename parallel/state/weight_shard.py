"""A bucket of weights of which each rank owns a range, and which is whole on a rank only while it is gathered."""

from __future__ import annotations

import time
from itertools import pairwise

import torch
from torch import nn

from heteromesh.comm.collectives.api import Collectives
from heteromesh.comm.gradients.buckets import Bucket
from heteromesh.comm.interfaces import Work
from heteromesh.comm.records import Recorder
from heteromesh.comm.world import World
from heteromesh.parallel.state.flats import take_out
from heteromesh.parallel.state.fragments import Piece
from heteromesh.parallel.state.weight_source import WeightSource

OUTSIDE = -1
"""The layer of what is in no layer."""


class WeightShard:
    """A bucket: this rank's range of its weights, and the whole of them while it is gathered."""

    def __init__(
        self,
        number: int,
        bucket: Bucket,
        layer: int,
        world: World,
        resident: bool,
        source: WeightSource | None = None,
    ) -> None:
        """source: of this rank's range; None: the parameters have their weights."""
        assert world.collectives is not None
        self.number, self.bucket, self.layer = number, bucket, layer
        self.resident = resident or layer == OUTSIDE
        self.low, self.high = world.collectives.bounds(bucket.numel)[world.rank :][:2]
        self.flat: torch.Tensor | None = None
        if source is None:
            self.flat = torch.cat([p.detach().reshape(-1) for p in bucket.parameters])
            own = self.flat[self.low : self.high]
            self.own = own if self.resident else own.clone()
            """(high - low,): what this rank owns, up to date always."""
        else:
            if self.resident:
                self.flat = bucket.empty()
            self.own = self._read(source)
        self.work: Work | None = None
        """The gather under way."""
        self._started_ns = 0
        self._shown = False
        if source is None:
            self.show()

    def gather(self, collectives: Collectives) -> None:
        """Starts to bring the whole bucket here."""
        if self.flat is None:
            self.flat = self.own.new_empty(self.bucket.numel)
        if not self.resident:
            self.flat[self.low : self.high].copy_(self.own)
        self.work, self._started_ns = collectives.all_gather(self.flat), time.time_ns()

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
                take_out(parameter)

    def drop(self) -> None:
        """Gives the memory of gathered weights back."""
        self.hide()
        self.flat = None

    def _read(self, source: WeightSource) -> torch.Tensor:
        """Returns the range that this rank owns, from elsewhere."""
        like = self.bucket.parameters[0]
        own = torch.empty(self.high - self.low, dtype=like.dtype, device=like.device)
        if self.flat is not None:
            own = self.flat[self.low : self.high]
        for parameter, (start, stop) in zip(self.bucket.parameters, pairwise(self.bucket.offsets), strict=True):
            first, last = max(self.low, start), min(self.high, stop)
            if first < last:
                own[first - self.low : last - self.low].copy_(source.read(parameter, first - start, last - start))
        return own

    def piece(self, parameter: nn.Parameter) -> Piece:
        """Returns what this rank has of a parameter, in the memory that it is in."""
        index = next(i for i, p in enumerate(self.bucket.parameters) if p is parameter)
        start, stop = self.bucket.offsets[index : index + 2]
        first, last = max(self.low, start), min(self.high, stop)
        own = self.own[first - self.low : last - self.low] if first < last else self.own[:0]
        return Piece(own, self.bucket.shapes[index], max(0, first - start))
