"""Gradient sums with int8 on the wire: values in blocks with a scale each, and error feedback.

Each rank sends every owner its part in int8; the owner adds the contributions up in fp32, in rank order, and sends the
sum back in int8. Everybody applies what was sent, the owner too, so that all ranks have the same bits. What rounding
took away stays on the rank that rounded and is added to what it sends in the next step (error feedback: Seide et al.
2014; Karimireddy et al., arXiv 1901.09847), so that it is late but not lost.
"""

from __future__ import annotations

import time
from collections.abc import Collection, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from itertools import pairwise
from typing import NamedTuple

import torch

from heteromesh.comm.collectives.api import Collectives
from heteromesh.comm.interfaces import OnceWork, Transport, Work
from heteromesh.comm.tags import Tag

BLOCK = 256
"""Values that share a scale (fp32): 1.016 bytes a value."""
_TAGS = 1 << 13
"""Sums told apart by tag."""
_LEVELS = 127


class ErrorFeedback:
    """What rounding has taken away on this rank, one tensor for each key; it outlives the collectives of an epoch.

    Own ranges hold what the results lack, the other owners' ranges what this rank's contributions lacked: when owners
    change nothing is lost. Twice the size of the tensors is kept: sums that are repeated start from the same errors.
    """

    def __init__(self) -> None:
        self._committed: dict[int, torch.Tensor] = {}
        self._attempt: dict[int, torch.Tensor] = {}
        self._spare: dict[int, torch.Tensor] = {}

    def begin(self, key: int, like: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Returns the last committed errors of a tensor and where those of this attempt go."""
        if key not in self._committed:
            self._committed[key] = torch.zeros_like(like)
        # never the tensor of an attempt that was given up: its threads may still write there
        spare = self._spare.pop(key, None)
        self._attempt[key] = torch.empty_like(like) if spare is None else spare
        return self._committed[key], self._attempt[key]

    def commit(self) -> None:
        """Makes the errors of the last attempt those that the next sums start from."""
        for key, errors in self._attempt.items():
            self._spare[key], self._committed[key] = self._committed[key], errors
        self._attempt.clear()


class Int8Collectives(Collectives):
    """Sums fp32 tensors that have a key in int8 over a transport; everything else goes through `inner`.

    The owners are those of `inner`, and the transport may be its own (the tags differ). CPU tensors only. A value that
    is not finite makes its block NaN everywhere and leaves no error behind. `errors`: those of an earlier epoch.
    """

    def __init__(self, inner: Collectives, transport: Transport, errors: ErrorFeedback | None = None) -> None:
        self.inner = inner
        self.rank, self.size, self.sent_bytes = inner.rank, inner.size, inner.sent_bytes
        self._transport, self._errors = transport, errors or ErrorFeedback()
        self._count = 0
        # no stage waits for a later one: contributions are summed in one thread, results unpacked in another
        self._summing = ThreadPoolExecutor(1, thread_name_prefix="heteromesh-int8-sum")
        self._unpacking = ThreadPoolExecutor(1, thread_name_prefix="heteromesh-int8-result")

    def bounds(self, numel: int) -> tuple[int, ...]:
        return self.inner.bounds(numel)

    def all_reduce(self, flat: torch.Tensor, key: int | None = None) -> Work:
        if key is None or flat.dtype != torch.float32:
            return self._through(self.inner.all_reduce(flat, key))
        return self._start(key, flat, gather=True)

    def reduce_scatter(self, flat: torch.Tensor, key: int | None = None, *, cuts: Sequence[int] = ()) -> Work:
        if key is None or flat.dtype != torch.float32:
            return self._through(self.inner.reduce_scatter(flat, key, cuts=cuts))
        return self._start(key, flat, gather=False, cuts=cuts)

    def all_gather(
        self, flat: torch.Tensor, receivers: Collection[int] | None = None, *, cuts: Sequence[int] = ()
    ) -> Work:
        return self._through(self.inner.all_gather(flat, receivers, cuts=cuts))

    def commit(self) -> None:
        self._errors.commit()

    def close(self) -> None:
        self._summing.shutdown()
        self._unpacking.shutdown()
        self.inner.close()

    def _through(self, work: Work) -> Work:
        def finish() -> None:
            before = self.inner.sent_bytes
            work.wait()
            self.sent_bytes += self.inner.sent_bytes - before

        return OnceWork(finish)

    def _start(self, key: int, flat: torch.Tensor, *, gather: bool, cuts: Sequence[int] = ()) -> Work:
        bounds = cuts or self.bounds(flat.numel())
        errors, left = self._errors.begin(key, flat)
        ranges = [_Range(flat[low:high], errors[low:high], left[low:high]) for low, high in pairwise(bounds)]
        run = _Int8Sum(self._transport, ranges, Tag.INT8 + self._count % _TAGS * 2, gather=gather)
        self._count += 1
        run.post()
        summed = self._summing.submit(run.add_up)
        done = self._unpacking.submit(run.unpack, summed)

        def finish() -> None:
            self.sent_bytes += done.result()

        return OnceWork(finish)


class _Range(NamedTuple):
    """One owner's part of a tensor."""

    values: torch.Tensor
    errors: torch.Tensor
    """What is still to be added to it."""
    left: torch.Tensor
    """What will be."""

    def quantise(self) -> torch.Tensor:
        """Returns values plus errors as bytes, and keeps what rounding has taken away."""
        wanted = self.values + self.errors
        payload = quantise(wanted)
        dequantise(payload, self.left).neg_().add_(wanted).nan_to_num_(0.0, 0.0, 0.0)
        return payload


class _Int8Sum:
    """One sum under way on one rank: `post`, then `add_up` and `unpack` in threads."""

    def __init__(self, transport: Transport, ranges: Sequence[_Range], tag: int, *, gather: bool) -> None:
        self._transport, self._ranges, self._tag, self._gather = transport, ranges, tag, gather
        me, size = transport.rank, transport.size
        self._own = ranges[me]
        self._peers = [(me + i) % size for i in range(1, size)]
        self._arriving: dict[int, tuple[Work, torch.Tensor]] = {}
        self._results: dict[int, tuple[Work, torch.Tensor]] = {}
        self._sends: list[Work] = []
        self._sent: list[torch.Tensor] = []

    def post(self) -> None:
        """Posts the receives and sends every other owner this rank's contribution."""
        for peer in self._peers:
            if len(self._own.values):
                self._arriving[peer] = self._receive(peer, len(self._own.values), self._tag)
            if self._gather and len(self._ranges[peer].values):
                self._results[peer] = self._receive(peer, len(self._ranges[peer].values), self._tag + 1)
        for peer in self._peers:
            if len(self._ranges[peer].values):
                self._send(peer, self._ranges[peer].quantise(), self._tag)

    def add_up(self) -> None:
        """Sums the own range in rank order, with what the last result lacked, and sends the sum to all."""
        own = self._own
        if not len(own.values):
            return
        for rank in sorted(self._arriving):
            self._arriving[rank][0].wait()
        _sum_in_rank_order(own.values, self._transport.rank, {r: room for r, (_, room) in self._arriving.items()})
        if not self._gather:
            own.values.add_(own.errors)
            own.left.zero_()
            return
        payload = own.quantise()
        dequantise(payload, own.values)
        for peer in self._peers:
            self._send(peer, payload, self._tag + 1)

    def unpack(self, summed: Future[None]) -> int:
        """Fills the other ranges with their owners' sums; returns the bytes sent."""
        summed.result()
        for rank, (work, payload) in self._results.items():
            work.wait()
            dequantise(payload, self._ranges[rank].values)
        for work in self._sends:
            work.wait()
        return sum(payload.nbytes for payload in self._sent)

    def _receive(self, peer: int, values: int, tag: int) -> tuple[Work, torch.Tensor]:
        payload = _payload(values)
        return self._transport.recv(peer, payload, tag), payload

    def _send(self, peer: int, payload: torch.Tensor, tag: int) -> None:
        self._sent.append(payload)
        self._sends.append(self._transport.send(peer, payload, tag))


def quantise(values: torch.Tensor) -> torch.Tensor:
    """Packs values (n,), fp32, into bytes (4 * blocks + n,): a scale for each block, then the int8 levels.

    Of each block the largest value is exact; no value is off by more than half a level, 1/254 of the largest.
    """
    count = -(-len(values) // BLOCK)
    payload = _payload(len(values))
    scales, levels = payload[: 4 * count].view(torch.float32), payload[4 * count :].view(torch.int8)
    padded = torch.nn.functional.pad(values, (0, count * BLOCK - len(values))).view(count, BLOCK)
    torch.div(padded.abs().amax(1), _LEVELS, out=scales)
    steps = padded / scales.clamp_min(torch.finfo(torch.float32).tiny).unsqueeze(1)
    levels.copy_(steps.nan_to_num_(0.0).round_().view(-1)[: len(values)])
    return payload


def dequantise(payload: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
    """Fills target (n,), fp32, with what `quantise` was given, rounded; returns it."""
    count = -(-len(target) // BLOCK)
    scales, levels = payload[: 4 * count].view(torch.float32), payload[4 * count :].view(torch.int8)
    target.copy_(levels)
    whole = len(target) // BLOCK * BLOCK
    target[:whole].view(-1, BLOCK).mul_(scales[: whole // BLOCK].unsqueeze(1))
    target[whole:].mul_(scales[-1:])
    return target


def seconds_per_value(count: int = 1 << 20) -> float:
    """Measures what it takes to pack a value or to unpack one on this rank's processor: the better of two tries."""
    values, times = torch.randn(count), []
    for _ in range(2):
        start = time.perf_counter()
        dequantise(quantise(values), values)
        times.append(time.perf_counter() - start)
    return min(times) / (2 * count)


def _payload(values: int) -> torch.Tensor:
    return torch.empty(4 * -(-values // BLOCK) + values, dtype=torch.uint8)


def _sum_in_rank_order(own: torch.Tensor, rank: int, arrived: dict[int, torch.Tensor]) -> None:
    """Adds all contributions up in `own`, which is this rank's before."""
    if not arrived:
        return
    total = torch.zeros_like(own)
    part = torch.empty_like(own)
    for i in sorted((*arrived, rank)):
        total.add_(own if i == rank else dequantise(arrived[i], part))
    own.copy_(total)
