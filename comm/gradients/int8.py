"""Gradient sums with int8 on the wire: values in blocks with a scale each, and error feedback.

Each rank sends every owner its part in int8; the owner adds the contributions up in fp32, in rank order, and sends the
sum back in int8. Everybody applies what was sent, the owner too, so that all ranks have the same bits. What rounding
took away stays on the rank that rounded and is added to what it sends in the next step (error feedback: Seide et al.
2014; Karimireddy et al., arXiv 1901.09847), so that it is late but not lost.
"""

from __future__ import annotations

import time
from concurrent.futures import Future, ThreadPoolExecutor

import torch

from heteromesh.comm.collectives.torch import FlatCollectives
from heteromesh.comm.interfaces import Transport, Work

BLOCK = 256
"""Values that share a scale (fp32): 1.016 bytes a value."""
_FIRST_TAG, _TAGS = 1 << 15, 1 << 13
_LEVELS = 127


class QuantisedSum:
    """Sums fp32 tensors on the CPU over the ranks of a transport. Every rank makes the same calls in the same order.

    bounds: of the collectives, who own the same ranges. Keeps as many bytes of errors as the tensors have. Tags from
    2**15 on are its own. Close it before the transport.
    """

    def __init__(self, transport: Transport, collectives: FlatCollectives) -> None:
        self.sent_bytes = 0
        """By sums that were waited for."""
        self._transport, self._bounds = transport, collectives.bounds
        self._errors: dict[tuple[int, str], torch.Tensor] = {}
        self._count = 0
        # no stage waits for a later one: contributions are summed in one thread, results unpacked in another
        self._summing = ThreadPoolExecutor(1, thread_name_prefix="heteromesh-quantised-sum")
        self._unpacking = ThreadPoolExecutor(1, thread_name_prefix="heteromesh-quantised-result")

    def start(self, key: int, flat: torch.Tensor, *, spread: bool) -> QuantisedHandle:
        """The sum in place: of everything (`spread`), or of this rank's own range, the rest then being undefined.

        key: the same for the same tensor in every step; its errors are remembered under it. A value that is not finite
        makes its block NaN everywhere and leaves no error behind.
        """
        me, size = self._transport.rank, self._transport.size
        bounds = self._bounds(flat.numel())
        ranges = [flat[bounds[i] : bounds[i + 1]] for i in range(size)]
        tag = _FIRST_TAG + self._count % _TAGS * 2
        self._count += 1
        peers = [(me + i) % size for i in range(1, size)]
        arriving = {p: _payload(len(ranges[me])) for p in peers if len(ranges[me])}
        results = {p: _payload(len(ranges[p])) for p in peers if spread and len(ranges[p])}
        received = {p: self._transport.recv(p, buffer, tag) for p, buffer in arriving.items()}
        back = {p: self._transport.recv(p, buffer, tag + 1) for p, buffer in results.items()}
        sends, held = self._contribute(key, flat, ranges, peers, tag)
        own = ranges[me]

        def add_up() -> list[Work]:
            for rank in sorted(received):
                received[rank].wait()
            _sum_in_rank_order(own, me, arriving)
            if not spread or not len(own):
                return []
            payload = self._quantised((key, "result"), own)
            dequantise(payload, own)
            held.append(payload)
            return [self._transport.send(p, payload, tag + 1) for p in peers]

        def unpack(summed: Future[list[Work]]) -> int:
            more = summed.result()
            for rank, work in back.items():
                work.wait()
                dequantise(results[rank], ranges[rank])
            for work in (*sends, *more):
                work.wait()
            return sum(len(h) for h in held[: len(sends)]) + sum(len(held[-1]) for _ in more)

        summed = self._summing.submit(add_up)
        return QuantisedHandle(self, self._unpacking.submit(unpack, summed))

    def close(self) -> None:
        """Ends the threads, after what they are waiting for."""
        self._summing.shutdown()
        self._unpacking.shutdown()

    def _contribute(
        self, key: int, flat: torch.Tensor, ranges: list[torch.Tensor], peers: list[int], tag: int
    ) -> tuple[list[Work], list[torch.Tensor]]:
        """Sends every other owner its part."""
        held, sends = [], []
        for peer in peers:
            if len(ranges[peer]):
                payload = self._quantised((key, f"to {peer}"), ranges[peer])
                held.append(payload)
                sends.append(self._transport.send(peer, payload, tag))
        return sends, held

    def _quantised(self, name: tuple[int, str], values: torch.Tensor) -> torch.Tensor:
        """With what was left over the last time; remembers what is left over now."""
        error = self._errors.get(name)
        wanted = values if error is None else values + error
        payload = quantise(wanted)
        rest = dequantise(payload, torch.empty_like(wanted)).neg_().add_(wanted)
        self._errors[name] = rest.nan_to_num_(0.0, 0.0, 0.0)
        return payload


class QuantisedHandle:
    """A sum under way."""

    def __init__(self, owner: QuantisedSum, done: Future[int]) -> None:
        self._owner, self._done = owner, done

    def wait(self) -> None:
        """Returns when the result is here; raises what went wrong."""
        self._owner.sent_bytes += self._done.result()


def quantise(values: torch.Tensor) -> torch.Tensor:
    """values (n,), fp32, to bytes (4 * blocks + n,): a scale for each block, then the int8 levels.

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
    """To pack a value or to unpack one, on this rank's processor: measured, the better of two tries."""
    values, times = torch.randn(count), []
    for _ in range(2):
        start = time.perf_counter()
        dequantise(quantise(values), values)
        times.append(time.perf_counter() - start)
    return min(times) / (2 * count)


def _payload(values: int) -> torch.Tensor:
    return torch.empty(4 * -(-values // BLOCK) + values, dtype=torch.uint8)


def _sum_in_rank_order(own: torch.Tensor, rank: int, arrived: dict[int, torch.Tensor]) -> None:
    """own: this rank's contribution, and the sum afterwards."""
    if not arrived:
        return
    total = torch.zeros_like(own)
    part = torch.empty_like(own)
    for i in sorted((*arrived, rank)):
        total.add_(own if i == rank else dequantise(arrived[i], part))
    own.copy_(total)
