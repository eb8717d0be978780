"""Parts of an optimizer's state on their way between members, and put together again."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from copy import deepcopy
from typing import Any, NamedTuple

import torch

from heteromesh.comm.tcp.collectives import wait_all
from heteromesh.comm.tcp.state_transfer import pack, receive_state, send_state
from heteromesh.comm.tcp.transport import TcpTransport
from heteromesh.comm.world import World
from heteromesh.parallel.state.elementwise import is_elementwise_state
from heteromesh.parallel.state.fragments import Fragment
from heteromesh.planner.ownership.ownership import Ownership, Range, stride_between

Slice = tuple[int, int, int]
"""(bucket, low, high): elements [low, high) of a bucket."""


class StatePart(NamedTuple):
    """The state of elements [first, last) of a bucket, which are all of one parameter."""

    bucket: int
    first: int
    last: int
    by_element: Mapping[str, torch.Tensor]
    """Values of each element, (last - first,)."""
    common: Mapping[str, Any]
    """Values of the whole parameter, such as the number of updates."""


def split_state(state: Mapping[str, Any], fragment: Fragment, low: int, high: int) -> StatePart | None:
    """Cuts out of a fragment's state what there is of elements [low, high) of its bucket; None where it has none."""
    first, last = max(low, fragment.first), min(high, fragment.last)
    if first >= last:
        return None
    cut = slice(first - fragment.first, last - fragment.first)
    by_element = {k: v[cut] for k, v in state.items() if is_elementwise_state(k, v, fragment.tensor.shape)}
    common = {k: v for k, v in state.items() if k not in by_element}
    return StatePart(fragment.bucket, first, last, by_element, common)


def concat_state(parts: Sequence[StatePart], fragment: Fragment) -> dict[str, Any]:
    """Joins copies of the parts that lie in a fragment, of which they must be all elements, to its state."""
    own = [p for p in parts if p.bucket == fragment.bucket and fragment.first <= p.first and p.last <= fragment.last]
    own.sort(key=lambda part: part.first)
    assert sum(part.last - part.first for part in own) == fragment.tensor.numel()
    state = {k: torch.cat([part.by_element[k] for part in own]) for k in own[0].by_element}
    return state | deepcopy(dict(own[0].common))


def plan_moves(
    ownership: Ownership,
    members: Sequence[int],
    rank: int,
    sizes: Sequence[int],
    wanted: Callable[[int, int], Sequence[Range]],
) -> tuple[list[list[Slice]], list[int]]:
    """Returns by rank what this rank hands to it (to itself: what it keeps), and which ranks hand something to it.

    ownership: as the state lies now; sizes: elements of each bucket; wanted: by member and size, the ranges that it
    wants. Raises LostState where nobody is left who holds a range.
    """
    sources = [members.index(m) for m in ownership.sources(members)]
    outgoing: list[list[Slice]] = [[] for _ in members]
    incoming: set[int] = set()
    for bucket, size in enumerate(sizes):
        for index, have in enumerate(ownership.ranges(size)):
            for peer, member in enumerate(members):
                source = peer if ownership.holds(member, index) else sources[index]
                for want in wanted(member, size) if rank in (source, peer) else ():
                    low, high = max(want[0], have[0]), min(want[1], have[1])
                    if low < high and source == rank:
                        outgoing[peer].append((bucket, low, high))
                    elif low < high:
                        incoming.add(source)
    return outgoing, sorted(incoming)


def dealt_out(world: World, shares: Sequence[float], copies: int, what: str) -> Ownership:
    """Returns who holds what when it is dealt out to a world's members by these shares, in so many copies.

    Copies are on different hosts where there are several. what: is dealt out, for sentences.
    """
    return Ownership(
        fractions=tuple(map(float, shares)),
        members=world.members,
        copies=copies,
        names=world.names,
        stride=stride_between([name.rpartition(":")[0] for name in world.names]),
        what=what,
    )


def collect(
    world: World,
    ownership: Ownership,
    sizes: Sequence[int],
    wanted: Callable[[int, int], Sequence[Range]],
    cut: Callable[[Sequence[Slice]], list[StatePart]],
) -> list[StatePart]:
    """Returns what this rank wants of the state, from those who hold it. Raises LostState and GroupAborted.

    ownership, sizes, wanted: as for `plan_moves`; cut: returns the parts that are held here.
    """
    outgoing, sources = plan_moves(ownership, world.members, world.rank, sizes, wanted)
    parts = [cut(slices) for slices in outgoing]
    mine, parts[world.rank] = parts[world.rank], []
    return mine + exchange_state(transport_of(world), parts, sources)


def transport_of(world: World) -> TcpTransport:
    """Returns what the members of an epoch exchange over."""
    transport = world.exchange
    assert isinstance(transport, TcpTransport), "members come and go only over the TCP data plane"
    return transport


def exchange_state(
    transport: TcpTransport, outgoing: Sequence[Sequence[StatePart]], sources: Sequence[int]
) -> list[StatePart]:
    """Sends each rank its parts and returns those that the `sources` have for this one. Raises GroupAborted."""
    works = []
    for rank, parts in enumerate(outgoing):
        if parts:
            works += send_state(transport, rank, *pack([tuple(part) for part in parts]))
    received = [StatePart(*part) for source in sources for part in receive_state(transport, source)]
    wait_all(works)
    return received
