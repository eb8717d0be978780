"""What a model asks of attention, and the ways to split it over ranks that this allows."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace

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
    """The attention calls of one forward of a model, all alike."""

    calls: int
    shape: AttentionShape
    forwards: int = 1
    """2 where layers are recomputed in the backward."""
    causal: bool = True


def split_methods(attention: ModelAttention, hosts: Sequence[int], saved_bytes_per_token: float) -> tuple[Method, ...]:
    """Returns every way to split this model's sequences, the preferred ones first where two are equally fast.

    hosts: of every rank; they decide over how many neighbours `ulysses_ring` shares heads. saved_bytes_per_token: what
    a token's activations take, all layers together.
    """
    ulysses, gather, ring = _trade(attention), _gather(attention, saved_bytes_per_token), _ring(attention)
    share = gather.share
    two_levels = replace(
        ulysses,
        carried_bytes_per_token=ring.carried_bytes_per_token,
        home_bytes_per_token=ring.home_bytes_per_token,
        overlap="rounds",
        share=share,
        homeward=1,
    )
    inner = inner_degrees(hosts, attention.shape.heads)
    return (
        ulysses,
        gather,
        *(replace(two_levels, name=f"ulysses_ring:{n}", inner=n) for n in inner),
        replace(ring, name="bidirectional_ring", share=share, both_ways=True),
        replace(ring, name="trimmed_ring", share=share),
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
    # recomputed layers gather again, and hold one layer's keys at a time
    kept = keys if forwards == 1 else keys / attention.calls
    return Method(
        name="gather",
        bytes_per_token=float(keys * (forwards + 1)),
        scaling="peers",
        share=CAUSAL_SHARE if attention.causal else 1.0,
        overlap="own",
        held=kept / max(1.0, saved_bytes_per_token),
        calls=attention.calls,
        forwards=forwards,
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
