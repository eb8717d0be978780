"""Random passes for the tests of sequence-parallel attention, and the one-process answer."""

from __future__ import annotations

import itertools
import math
import random
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as functional

from heteromesh.planner.model.mask import Mask
from heteromesh.planner.plan import Pass
from heteromesh.planner.splitting.layout import Layout

SHAPES = [(8, 8), (8, 4), (8, 2), (8, 1), (4, 4), (4, 1), (6, 2)]
SPLIT = ("ulysses", "gather", "ring", "trimmed_ring", "bidirectional_ring", "token_ring", "ulysses_ring")


@dataclass(frozen=True)
class Pack:
    ranks: tuple[int, ...]
    lengths: tuple[int, ...]
    shards: tuple[tuple[int, ...], ...]
    speeds: tuple[float, ...]
    heads: int
    kv_heads: int
    dim: int
    causal: bool
    seed: int
    window: int | None = None
    chunk: int | None = None
    softcap: float | None = None
    sinks: bool = False

    @property
    def mask(self) -> Mask:
        return Mask(causal=self.causal, window=self.window, chunk=self.chunk)

    def planned(self, method: str) -> Pass:
        return Pass(
            ranks=self.ranks,
            method=method,
            sequences=tuple(range(len(self.lengths))),
            shards=self.shards,
            seconds=0.0,
        )


def make_pack(seed: int, world: int, longest: int | None = None) -> Pack:
    rng = random.Random(seed)
    size = world if rng.random() < 0.8 else rng.randint(min(2, world), world)
    ranks = tuple(sorted(rng.sample(range(world), size)))
    count = rng.randint(1, 5)
    lengths = [rng.choice([1, 2, 3, rng.randint(1, 40), rng.randint(1, 200)]) for _ in range(count)]
    heads, kv_heads = rng.choice(SHAPES)
    dim = rng.choice([8, 16])
    if longest:
        lengths[rng.randrange(count)] = rng.randint(longest // 2, longest)
        heads, kv_heads, dim = 4, 2, 8
    speeds = tuple(rng.choice([1.0, 1.0, 2.0, 3.0]) for _ in range(world))
    columns = [_deal(rng, length, [speeds[r] for r in ranks]) for length in lengths]
    idle = {i for i in range(size) if rng.random() < 0.1}
    if 0 < len(idle) < size:
        columns = [_moved(column, idle) for column in columns]
    shards = tuple(zip(*columns, strict=True))
    return Pack(ranks, tuple(lengths), shards, speeds, heads, kv_heads, dim, rng.random() < 0.8, seed)


def _deal(rng: random.Random, length: int, speeds: Sequence[float]) -> list[int]:
    """Evenly, by speed, at random, or on some of the ranks only."""
    kind = rng.choice(["even", "speed", "random", "some"])
    weights = {"even": [1.0] * len(speeds), "speed": list(speeds)}.get(kind, [rng.random() + 0.01 for _ in speeds])
    if kind == "some":
        chosen = rng.sample(range(len(speeds)), rng.randint(1, len(speeds)))
        weights = [w if i in chosen else 0.0 for i, w in enumerate(weights)]
    edges = [round(length * sum(weights[:i]) / sum(weights)) for i in range(len(speeds) + 1)]
    return [b - a for a, b in itertools.pairwise(edges)]


def _moved(column: list[int], idle: set[int]) -> list[int]:
    keep = next(i for i in range(len(column)) if i not in idle)
    moved = sum(column[i] for i in idle)
    return [0 if i in idle else n + (moved if i == keep else 0) for i, n in enumerate(column)]


def tensors(pack: Pack, dtype: torch.dtype) -> list[torch.Tensor]:
    """q, k, v and the gradient of the output, (1, heads, all tokens, dim), sequences one after the other."""
    generator = torch.Generator().manual_seed(pack.seed)
    total = sum(pack.lengths)
    return [
        torch.randn(1, h, total, pack.dim, generator=generator, dtype=torch.float64).to(dtype)
        for h in (pack.heads, pack.kv_heads, pack.kv_heads, pack.heads)
    ]


def one_process(pack: Pack, inputs: Sequence[torch.Tensor]) -> list[torch.Tensor]:
    """out, dq, dk, dv by torch's own attention, sequence by sequence."""
    q, k, v, grad = (t.detach().clone() for t in inputs)
    leaves = [t.requires_grad_() for t in (q, k, v)]
    parts = [t.split(pack.lengths, 2) for t in leaves]
    outputs = [
        functional.scaled_dot_product_attention(*p, is_causal=pack.causal, enable_gqa=True)
        for p in zip(*parts, strict=True)
    ]
    out = torch.cat(outputs, 2)
    return [out.detach(), *torch.autograd.grad(out, leaves, grad)]


def make_masked_pack(seed: int, world: int, longest: int | None = None) -> Pack:
    """A pack with at least one of a window, chunks, sinks and a cap of the scores."""
    rng, pack = random.Random(seed), make_pack(seed, world, longest)
    sizes = [1, 2, 3, rng.randint(2, 12), rng.randint(5, 60), rng.randint(20, 150), rng.randint(100, 400)]
    window, chunk, sinks, softcap = (rng.random() < share for share in (0.6, 0.3, 0.4, 0.3))
    return replace(
        pack,
        causal=pack.causal or window,
        window=rng.choice(sizes) if window else None,
        chunk=rng.choice(sizes) if chunk else None,
        softcap=rng.choice([0.5, 2.0, 30.0]) if softcap else None,
        sinks=sinks or not (window or chunk or softcap),
    )


def sinks_of(pack: Pack, dtype: torch.dtype) -> torch.Tensor | None:
    generator = torch.Generator().manual_seed(pack.seed + 1)
    return torch.randn(pack.heads, generator=generator, dtype=torch.float64).to(dtype) if pack.sinks else None


def written_out(pack: Pack, inputs: Sequence[torch.Tensor]) -> list[torch.Tensor]:
    """out, dq, dk, dv and where there are sinks their gradient, by the formula with a mask of all pairs."""
    q, k, v, grad = (t.detach().clone() for t in inputs)
    sinks = sinks_of(pack, q.dtype)
    leaves = [t.requires_grad_() for t in (q, k, v, *([] if sinks is None else [sinks]))]
    parts = [t.repeat_interleave(pack.heads // t.shape[1], 1).split(pack.lengths, 2) for t in (q, k, v)]
    out = torch.cat([_masked_softmax(pack, *p, sinks) for p in zip(*parts, strict=True)], 2)
    return [out.detach(), *torch.autograd.grad(out, leaves, grad)]


def _masked_softmax(
    pack: Pack, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, sinks: torch.Tensor | None
) -> torch.Tensor:
    at = torch.arange(q.shape[2])
    query, key = at[:, None], at[None, :]
    seen = torch.ones(len(at), len(at), dtype=torch.bool)
    if pack.causal:
        seen &= key <= query
    if pack.window:
        seen &= query - key < pack.window
    if pack.chunk:
        seen &= query // pack.chunk == key // pack.chunk
    scores = q @ k.transpose(-1, -2) / math.sqrt(pack.dim)
    if pack.softcap:
        scores = pack.softcap * torch.tanh(scores / pack.softcap)
    scores = scores.masked_fill(~seen, -math.inf)
    if sinks is not None:
        scores = torch.cat([scores, sinks.view(1, -1, 1, 1).expand(1, -1, len(at), 1)], -1)
    return scores.softmax(-1)[..., : len(at)] @ v


def own_rows(layout: Layout, member: int) -> torch.Tensor:
    rows = [layout.offsets[s.sequence] + t for s in layout.segments[member] for t in range(s.start, s.end)]
    return torch.tensor(rows, dtype=torch.long)


def strange(x: torch.Tensor, seed: int) -> torch.Tensor:
    """The same values in memory of another order: tokens before heads, or every second element of a row."""
    kind = seed % 3
    if kind == 0:
        return x.contiguous()
    if kind == 1:
        return x.transpose(1, 2).contiguous().transpose(1, 2)
    wide = x.new_full((*x.shape[:-1], 2 * x.shape[-1]), float("nan"))
    wide[..., ::2] = x
    return wide[..., ::2]


def methods_for(pack: Pack) -> list[str]:
    """The methods that can split it; local for one rank."""
    if len(pack.ranks) == 1:
        return ["local"]
    return [m for m in SPLIT if m != "ulysses" or pack.heads >= len(pack.ranks)]
