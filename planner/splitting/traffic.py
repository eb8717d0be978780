"""Bytes that each rank of a pass sends, exactly: what the runtime then counts, message by message.

Per call of attention (one layer); the head counts and the size of an element are the model's. `planner.cost` has the
linear approximation that planning is fast with.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from heteromesh.planner.model.attention import AttentionShape as AttentionShape
from heteromesh.planner.model.attention import ModelAttention
from heteromesh.planner.model.mask import CAUSAL, Mask
from heteromesh.planner.splitting.heads import head_shares
from heteromesh.planner.splitting.layout import Layout, Segment, base_name, group_layout, inner_degree, method_layout
from heteromesh.planner.splitting.routes import RINGS, Kind, schedule

AGREEMENT_BYTES = 64
"""Sent to each peer before the first call of a shape in a pass (parallel.agreement)."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Traffic:
    """Bytes one rank sends."""

    forward: int = 0
    backward: int = 0

    def __add__(self, other: Traffic) -> Traffic:
        return Traffic(forward=self.forward + other.forward, backward=self.backward + other.backward)


def traffic(
    method: str,
    lengths: Sequence[int],
    shards: Sequence[Sequence[int]],
    shape: AttentionShape,
    *,
    speeds: Sequence[float] = (),
    mask: Mask = CAUSAL,
) -> tuple[Traffic, ...]:
    """Returns what each rank of the pass sends in one call of attention. shards[i][j]: tokens of sequence j on rank i.

    speeds[i]: of the i-th rank (they decide who works on how many heads; default: all equal). Raises UserError for an
    unknown method, ValueError for more ranks than heads where the method deals heads.
    """
    name, size = base_name(method), len(shards)
    speeds = tuple(speeds) or (1.0,) * size
    if size == 1 or name == "local":
        return (Traffic(),) * size
    if name == "ulysses":
        return _trade([sum(row) for row in shards], shape, speeds)
    if name == "ulysses_ring":
        return _two_levels(lengths, shards, shape, speeds, inner_degree(method, size), mask)
    layout = method_layout(method, lengths, shards)
    if name == "token_ring":
        row = shape.heads * shape.head_dim * shape.itemsize
        statistics = shape.heads * shape.wide
        return _circulate(layout, "token_ring", mask, (row, row + statistics), (2 * row + 2 * statistics, row))
    keys = 2 * shape.kv_heads * shape.head_dim * shape.itemsize
    if name == "gather":
        return _circulate(layout, "direct", mask, (keys, 0), (0, keys))
    kind = next(k for k in RINGS if k == name)
    return _circulate(layout, kind, mask, (keys, 0), (keys, keys))


def pass_bytes(
    method: str,
    lengths: Sequence[int],
    shards: Sequence[Sequence[int]],
    speeds: Sequence[float],
    attention: ModelAttention,
) -> tuple[int, ...]:
    """Returns what each rank of the pass sends in one forward and backward of the model, its agreement with its peers
    included.

    Raises as `traffic`.
    """
    if len(shards) == 1:
        return (0,)
    kinds = attention.by_mask()
    sent = [len(kinds) * AGREEMENT_BYTES * (len(shards) - 1)] * len(shards)
    for mask, calls in kinds.items():
        layer = traffic(method, lengths, shards, attention.shape, speeds=speeds, mask=mask)
        sent = [n + calls * (attention.forwards * t.forward + t.backward) for n, t in zip(sent, layer, strict=True)]
    return tuple(sent)


def _circulate(
    layout: Layout, kind: Kind, mask: Mask, forward: tuple[int, int], backward: tuple[int, int]
) -> tuple[Traffic, ...]:
    """forward, backward: bytes per row (on the way round, of a partial result on its way home)."""
    sent = [Traffic() for _ in layout.segments]
    for message in (m for r in schedule(layout, kind, mask).rounds for m in r):
        carried, home = _tokens(message.segments), _tokens(message.used)
        sent[message.source] += Traffic(forward=carried * forward[0], backward=carried * backward[0])
        sent[message.target] += Traffic(forward=home * forward[1], backward=home * backward[1])
    return tuple(sent)


def _trade(tokens: Sequence[int], shape: AttentionShape, speeds: Sequence[float]) -> tuple[Traffic, ...]:
    """Trades tokens for heads and back, among members with so many tokens."""
    shares = head_shares(shape.heads, shape.kv_heads, speeds)
    element = shape.head_dim * shape.itemsize
    sent = []
    for i, own in enumerate(tokens):
        peers = [p for p in range(len(tokens)) if p != i]
        # what is sent in one direction comes back in the other
        there = sum((shares[p].queries + 2 * shares[p].keys) * own + shares[i].queries * tokens[p] for p in peers)
        back = sum((shares[i].queries + 2 * shares[i].keys) * tokens[p] + shares[p].queries * own for p in peers)
        sent.append(Traffic(forward=there * element, backward=back * element))
    return tuple(sent)


def _two_levels(
    lengths: Sequence[int],
    shards: Sequence[Sequence[int]],
    shape: AttentionShape,
    speeds: Sequence[float],
    inner: int,
    mask: Mask,
) -> tuple[Traffic, ...]:
    by_place = [sum(speeds[p::inner]) for p in range(inner)]
    shares = head_shares(shape.heads, shape.kv_heads, by_place)
    groups = group_layout(lengths, shards, inner)
    sent: list[Traffic] = []
    for first in range(0, len(shards), inner):
        sent.extend(_trade([sum(row) for row in shards[first : first + inner]], shape, by_place))
    for place, share in enumerate(shares):
        keys = 2 * share.keys_at_work * shape.head_dim * shape.itemsize
        for group, ring in enumerate(_circulate(groups, "trimmed_ring", mask, (keys, 0), (keys, keys))):
            sent[group * inner + place] += ring
    return tuple(sent)


def _tokens(segments: Sequence[Segment]) -> int:
    return sum(map(len, segments))
