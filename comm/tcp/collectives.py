"""Collectives over the TCP data plane; sums in rank order, so that every run and every member gets the same bits.

Sums are direct: every rank sends its part of shard j to rank j, which adds what it has in rank order and sends the sum
to all, chunk by chunk (reduce-scatter and all-gather, each (size - 1)/size of the bytes out and in, as in a ring, but
two messages deep instead of 2 (size - 1)). Every message of a sum carries the set of contributing ranks: a contribution
that is missing or there twice ends in GroupAborted, not in a wrong sum.
"""

from __future__ import annotations

import hashlib
from collections.abc import Collection, Sequence
from dataclasses import dataclass

import torch

from heteromesh.comm.interfaces import Work
from heteromesh.comm.tags import Tag
from heteromesh.comm.tcp.abort import GroupAborted
from heteromesh.comm.tcp.frame import bytes_of, checksum
from heteromesh.comm.tcp.records import recorded
from heteromesh.comm.tcp.transport import TcpTransport, TcpWork

_ALIGN = 16
CHUNK_BYTES = 1 << 19
SMALL_BYTES = 1 << 15
"""Up to here every rank sends its whole vector to every other: one message deep."""
WINDOW = 4
"""Chunks received ahead of their sum, from each peer."""


@dataclass(frozen=True, slots=True)
class CheckedSum:
    """What is known of a finished sum."""

    mask: int
    """Bit i: rank i's values are in it."""
    digest: str
    """Of the result's bytes as they were sent and received; empty when the sum was not checked."""


def shards(count: int, size: int) -> list[tuple[int, int]]:
    """Cuts `count` elements in a shard [start, end) for each rank, equal but for the last ones, aligned to 16."""
    each = -(-count // size)
    each = -(-each // _ALIGN) * _ALIGN
    return [(min(i * each, count), min((i + 1) * each, count)) for i in range(size)]


@recorded
def all_reduce(
    transport: TcpTransport,
    source: torch.Tensor,
    target: torch.Tensor,
    *,
    contributes: bool = True,
    checked: bool = False,
    chunk_bytes: int = CHUNK_BYTES,
) -> CheckedSum:
    """Sums `source` of all ranks into `target` (same shape and dtype, contiguous, not overlapping).

    A rank that doesn't contribute takes part with zeros. `checked`: a checksum travels with every message. `source` is
    only read. Raises GroupAborted; then `target` is undefined and `source` as it was.
    """
    flat, out = source.reshape(-1), target.view(-1)
    if not contributes:
        flat = torch.zeros_like(flat)
    run = DirectSum(transport, contributes=contributes, checked=checked, chunk_bytes=chunk_bytes)
    if transport.size == 1:
        out.copy_(flat)
        return CheckedSum(run.mine, run.digest([checksum(bytes_of(out))] if out.numel() else []))
    if flat.nbytes <= SMALL_BYTES:
        return run.whole(flat, out)
    return run.sharded(flat, out, shards(flat.numel(), transport.size), gather=True)


@recorded
def all_gather(
    transport: TcpTransport,
    parts: Sequence[torch.Tensor],
    tag: int = Tag.MOVE,
    receivers: Collection[int] | None = None,
) -> None:
    """Fills `parts[i]` with rank i's `parts[i]`, whose sizes may differ and may be zero; on all ranks, or on some."""
    others = [p for p in range(transport.size) if p != transport.rank]
    takes = receivers is None or transport.rank in receivers
    works = [transport.recv(p, parts[p], tag) for p in others if takes and parts[p].numel()]
    mine = parts[transport.rank]
    if mine.numel():
        works += [transport.send(p, mine, tag) for p in others if receivers is None or p in receivers]
    wait_all(works)


@recorded
def broadcast(transport: TcpTransport, tensor: torch.Tensor, root: int) -> None:
    """Copies rank `root`'s values to every rank.

    Large tensors go out in shards that the receivers pass on to each other, so that the root sends its bytes only once.
    """
    if transport.size == 1 or not tensor.numel():
        return
    flat = tensor.view(-1)
    if flat.nbytes <= SMALL_BYTES or transport.size == 2:
        if transport.rank == root:
            wait_all([transport.send(p, flat, Tag.MOVE) for p in range(transport.size) if p != root])
        else:
            transport.recv(root, flat, Tag.MOVE).wait()
        return
    receivers = [p for p in range(transport.size) if p != root]
    cuts = shards(flat.numel(), len(receivers))
    pieces = {p: flat[a:b] for p, (a, b) in zip(receivers, cuts, strict=True) if b > a}
    if transport.rank == root:
        wait_all([transport.send(p, piece, Tag.MOVE) for p, piece in pieces.items()])
        return
    mine = pieces.get(transport.rank)
    works = [transport.recv(p, piece, Tag.MOVE) for p, piece in pieces.items() if p != transport.rank]
    if mine is not None:
        transport.recv(root, mine, Tag.MOVE).wait()
        works += [transport.send(p, mine, Tag.MOVE) for p in receivers if p != transport.rank]
    wait_all(works)


def wait_all(works: Sequence[Work]) -> None:
    """Returns when all are done."""
    for work in works:
        work.wait()


@dataclass(slots=True)
class _Slot:
    """Room for one chunk of one peer's contribution."""

    tensor: torch.Tensor
    view: memoryview
    work: TcpWork | None = None


class DirectSum:
    """One sum under way on one rank, on three tags from `tag` on."""

    def __init__(
        self,
        transport: TcpTransport,
        *,
        contributes: bool = True,
        checked: bool = False,
        chunk_bytes: int = CHUNK_BYTES,
        tag: int = Tag.SUM,
    ) -> None:
        self._parts, self._sums, self._whole = tag, tag + 1, tag + 2
        self.transport, self.checked, self.chunk_bytes = transport, checked, chunk_bytes
        self.rank, self.size = transport.rank, transport.size
        self.mine = int(contributes) << transport.rank
        self.peers = [(self.rank + i) % self.size for i in range(1, self.size)]

    def digest(self, checks: Sequence[int]) -> str:
        """Returns one word for all chunks of the result, in the order of their bytes."""
        if not self.checked:
            return ""
        packed = b"".join(check.to_bytes(8, "big") for check in checks)
        return hashlib.blake2b(packed, digest_size=16).hexdigest()

    def whole(self, flat: torch.Tensor, out: torch.Tensor) -> CheckedSum:
        """Sends everybody's whole vector to everybody."""
        room = torch.empty((self.size, flat.numel()), dtype=flat.dtype)
        room[self.rank] = flat
        receives = {p: self.transport.recv_bytes(p, bytes_of(room[p]), self._whole) for p in self.peers}
        view = bytes_of(room[self.rank])
        sends = [
            self.transport.send_bytes(p, view, self._whole, mask=self.mine, checked=self.checked, keep=room)
            for p in self.peers
        ]
        mask = self._join({p: work.wait() for p, work in receives.items()})
        self._add([room[p] for p in range(self.size)], out)
        wait_all(sends)
        return CheckedSum(mask, self.digest([checksum(bytes_of(out))]))

    def sharded(
        self, flat: torch.Tensor, out: torch.Tensor, cuts: Sequence[tuple[int, int]], *, gather: bool
    ) -> CheckedSum:
        """Sums by chunks, each at its owner; with `gather` each summed chunk goes to everybody at once.

        cuts: by rank, [start, end) of what it sums. `out` may be `flat` itself (`gather`), or this rank's range of it.
        """
        chunk = max(_ALIGN, self.chunk_bytes // flat.element_size() // _ALIGN * _ALIGN)
        start, end = cuts[self.rank]
        slots = self._slots(flat, chunk, end - start)
        gathered = self._post_gather(out, cuts, chunk) if gather else {}
        sends = self._send_parts(flat, cuts, chunk)
        shard = out[start:end] if gather else out
        view, width = bytes_of(shard) if shard.numel() else memoryview(b""), flat.element_size()
        checks: dict[int, list[int]] = {self.rank: []}
        masks: set[int] = set()
        for index, at in enumerate(range(start, end, chunk)):
            size, low = min(chunk, end - at), at - start
            mask = self._join(self._take(slots, index, size, shard[low : low + size], flat[at : at + size]))
            masks.add(mask)
            self._post(slots, index + WINDOW, end - start, chunk)
            if gather:
                piece = view[low * width : (low + size) * width]
                check = checksum(piece) if self.checked else 0
                checks[self.rank].append(check)
                sends += [self._send_sum(p, piece, mask, check) for p in self.peers]
        for peer, works in gathered.items():
            masks.update(work.wait() for work in works)
            checks[peer] = [work.check for work in works]
        wait_all(sends)
        return CheckedSum(self._only(masks), self.digest([c for p in range(self.size) for c in checks.get(p, [])]))

    def _send_sum(self, peer: int, piece: memoryview, mask: int, check: int) -> TcpWork:
        return self.transport.send_bytes(peer, piece, self._sums, mask=mask, checked=self.checked, check=check)

    def _slots(self, flat: torch.Tensor, chunk: int, mine: int) -> dict[int, list[_Slot]]:
        width = min(chunk, mine)
        count = min(WINDOW, -(-mine // chunk))
        room = torch.empty((self.size, max(count, 1), max(width, 1)), dtype=flat.dtype)
        slots = {p: [_Slot(room[p, i], bytes_of(room[p, i])) for i in range(count)] for p in self.peers}
        for index in range(count):
            self._post(slots, index, mine, chunk)
        return slots

    def _post(self, slots: dict[int, list[_Slot]], index: int, mine: int, chunk: int) -> None:
        """Posts the receives of chunk `index`, if there is one, into the room of a chunk that has been summed."""
        size = min(chunk, mine - index * chunk)
        if size <= 0:
            return
        for peer, own in slots.items():
            slot = own[index % WINDOW]
            view = slot.view[: size * slot.tensor.element_size()]
            slot.work = self.transport.recv_bytes(peer, view, self._parts)

    def _take(
        self, slots: dict[int, list[_Slot]], index: int, size: int, part: torch.Tensor, own: torch.Tensor
    ) -> dict[int, int]:
        """Sums a chunk as soon as every contribution is there; who contributed, by peer."""
        masks, values = {}, {self.rank: own}
        for peer, room in slots.items():
            slot = room[index % WINDOW]
            assert slot.work is not None
            masks[peer] = slot.work.wait()
            values[peer] = slot.tensor[:size]
        self._add([values[p] for p in range(self.size)], part)
        return masks

    def _post_gather(self, out: torch.Tensor, cuts: Sequence[tuple[int, int]], chunk: int) -> dict[int, list[TcpWork]]:
        view, width = bytes_of(out), out.element_size()
        works: dict[int, list[TcpWork]] = {peer: [] for peer in self.peers}
        for peer in self.peers:
            start, end = cuts[peer]
            for at in range(start, end, chunk):
                stop = min(at + chunk, end)
                works[peer].append(self.transport.recv_bytes(peer, view[at * width : stop * width], self._sums))
        return works

    def _send_parts(self, flat: torch.Tensor, cuts: Sequence[tuple[int, int]], chunk: int) -> list[TcpWork]:
        view, width = bytes_of(flat), flat.element_size()
        works = []
        longest = max(end - start for start, end in cuts)
        for low in range(0, longest, chunk):
            for peer in self.peers:
                start, end = cuts[peer]
                stop = min(start + low + chunk, end)
                if start + low < stop:
                    piece = view[(start + low) * width : stop * width]
                    works.append(self._send_part(peer, piece, flat))
        return works

    def _send_part(self, peer: int, piece: memoryview, keep: torch.Tensor) -> TcpWork:
        return self.transport.send_bytes(peer, piece, self._parts, mask=self.mine, checked=self.checked, keep=keep)

    def _add(self, values: Sequence[torch.Tensor], out: torch.Tensor) -> None:
        # own values may lie in `out`, which is therefore written only when they have been added
        total = values[0] if self.rank else out
        for first, value in zip((values[0], *(total,) * (self.size - 2)), values[1:], strict=True):
            torch.add(first, value, out=total if value is not values[-1] else out)

    def _join(self, masks: dict[int, int]) -> int:
        """Returns the union of the contributors; each peer may only have contributed itself."""
        union = self.mine
        for peer, mask in masks.items():
            if mask not in (0, 1 << peer):
                self._broken(f"rank {peer} sent a contribution of ranks {mask:b} (bits)")
            union |= mask
        return union

    def _only(self, masks: set[int]) -> int:
        if len(masks) > 1:
            self._broken(f"parts of one sum have different contributors: {', '.join(f'{m:b}' for m in masks)} (bits)")
        return masks.pop() if masks else self.mine

    def _broken(self, what: str) -> None:
        error = GroupAborted(f"rank {self.rank}: {what}")
        self.transport.abort.set(error)
        raise error
