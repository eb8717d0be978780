"""What a model asks of attention, and the ways to split it over ranks that this allows."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace

from heteromesh.planner.model.mask import Mask
from heteromesh.planner.model.method import Method

CAUSAL_SHARE = 0.75
"""Of the keys, those that causal zigzag members need of each other, on average."""


@dataclass(frozen=True, slots=True, kw_only=True)
class AttentionShape:
    """One attention layer."""

    heads: int
    kv_heads: int
    head_dim: int
    itemsize: int
    """Bytes of an element of q, k and v."""

    @property
    def wide(self) -> int:
        """Bytes of an element of what is kept in float32 at least."""
        return max(4, self.itemsize)


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelAttention:
    """The attention calls of one forward of a model, all of one shape."""

    calls: int
    shape: AttentionShape
    forwards: int = 1
    """2 where layers are recomputed in the backward."""
    causal: bool = True
    local: tuple[tuple[Mask, int], ...] = ()
    """(mask, calls): those of the calls that see only part of the keys before a query."""

    @property
    def whole(self) -> int:
        """Calls that see all keys before a query."""
        return self.calls - sum(calls for _, calls in self.local)

    def by_mask(self) -> dict[Mask, int]:
        """Returns calls by what their queries see."""
        whole = {Mask(causal=self.causal): self.whole} if self.whole else {}
        return whole | dict(self.local)


def split_methods(attention: ModelAttention, hosts: Sequence[int], saved_bytes_per_token: float) -> tuple[Method, ...]:
    """Returns every way to split this model's sequences, the preferred ones first where two are equally fast.

    hosts: of every rank; they decide over how many neighbours `ulysses_ring` shares heads. saved_bytes_per_token: what
    a token's activations take, all layers together.
    """
    ulysses, gather, ring = _trade(attention), _gather(attention, saved_bytes_per_token), _ring(attention)
    share = gather.share
    trimmed = _trimmed(attention, replace(ring, name="trimmed_ring", share=share))
    two_levels = replace(
        ulysses,
        carried_bytes_per_token=trimmed.carried_bytes_per_token,
        home_bytes_per_token=trimmed.home_bytes_per_token,
        border_bytes=trimmed.border_bytes,
        border_tokens=trimmed.border_tokens,
        overlap="rounds",
        share=share,
        homeward=1,
    )
    inner = inner_degrees(hosts, attention.shape.heads)
    return (
        ulysses,
        gather,
        *(replace(two_levels, name=f"ulysses_ring:{n}", inner=n) for n in inner),
        replace(trimmed, name="bidirectional_ring", both_ways=True),
        trimmed,
        _token_ring(attention, replace(ring, share=share)),
        ring,
    )


def _trade(attention: ModelAttention) -> Method:
    """Returns Ulysses, which trades q, k, v and the output once a forward and once in the backward."""
    shape, runs = attention.shape, attention.forwards + 1
    return Method(
        name="ulysses",
        bytes_per_token=2.0 * (shape.heads + shape.kv_heads) * _head_bytes(attention) * runs,
        scaling="fraction",
        heads=shape.heads,
        kv_heads=shape.kv_heads,
        calls=attention.calls,
        forwards=attention.forwards,
    )


def _gather(attention: ModelAttention, saved_bytes_per_token: float) -> Method:
    """Returns the method that gathers keys and values, and sends their gradients home."""
    keys, forwards = 2 * attention.shape.kv_heads * _head_bytes(attention), attention.forwards
    whole = keys * attention.whole / attention.calls
    # recomputed layers gather again, and hold one layer's keys at a time
    kept = whole if forwards == 1 else keys / attention.calls
    border_bytes, border_tokens = _border(attention)
    return Method(
        name="gather",
        bytes_per_token=float(whole * (forwards + 1)),
        scaling="peers",
        share=CAUSAL_SHARE if attention.causal else 1.0,
        overlap="own",
        held=kept / max(1.0, saved_bytes_per_token),
        calls=attention.calls,
        forwards=forwards,
        border_bytes=border_bytes * (forwards + 1),
        border_tokens=border_tokens,
    )


def _ring(attention: ModelAttention) -> Method:
    """Returns the ring of keys and values, in every forward and in the backward; their gradients go home."""
    keys, forwards = 2 * attention.shape.kv_heads * _head_bytes(attention), attention.forwards
    return Method(
        name="ring",
        bytes_per_token=0.0,
        carried_bytes_per_token=float(keys * (forwards + 1)),
        home_bytes_per_token=float(keys),
        overlap="rounds",
        homeward=1,
        calls=attention.calls,
        forwards=forwards,
    )


def _trimmed(attention: ModelAttention, ring: Method) -> Method:
    """Returns the ring whose layers with windows carry only what lies before a border between two shards."""
    whole, (border_bytes, border_tokens) = attention.whole / attention.calls, _border(attention)
    return replace(
        ring,
        carried_bytes_per_token=ring.carried_bytes_per_token * whole,
        home_bytes_per_token=ring.home_bytes_per_token * whole,
        border_bytes=border_bytes * (attention.forwards + 2),
        border_tokens=border_tokens,
    )


def _border(attention: ModelAttention) -> tuple[float, float]:
    """Returns (bytes of the keys and values before a border that all layers with windows see behind it, their tokens in
    the layer that sees furthest).
    """
    shape = attention.shape
    row = 2 * shape.kv_heads * shape.head_dim * shape.itemsize
    reaches = [(mask.reach or 0.0, calls) for mask, calls in attention.local]
    return row * sum(reach * calls for reach, calls in reaches), max((reach for reach, _ in reaches), default=0.0)


def _token_ring(attention: ModelAttention, ring: Method) -> Method:
    """Queries round and outputs with their logsumexp home; then queries, gradients and statistics round and dq home."""
    shape, forwards = attention.shape, attention.forwards
    queries, statistics = shape.heads * _head_bytes(attention), attention.calls * shape.heads * shape.wide
    return replace(
        ring,
        name="token_ring",
        carried_bytes_per_token=float(queries * forwards + 2 * (queries + statistics)),
        home_bytes_per_token=float((queries + statistics) * forwards + queries),
        homeward=forwards + 1,
    )


def _head_bytes(attention: ModelAttention) -> int:
    """Returns the bytes of a token in one head, all layers together."""
    return attention.calls * attention.shape.head_dim * attention.shape.itemsize


def inner_degrees(hosts: Sequence[int], heads: int) -> tuple[int, ...]:
    """Returns groups worth trying for `ulysses_ring`: the ranks of a host and half of them, where heads and ranks
    allow.
    """
    most = max(Counter(hosts).values())
    sizes = {most, most // 2, 2}
    return tuple(n for n in sorted(sizes, reverse=True) if 2 <= n <= min(heads, len(hosts) // 2))
