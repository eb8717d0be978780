"""Who owns how much of sharded weights in a running job, and which layers stay gathered where.

A rank owns no larger fraction than fits beside what it needs to work; links decide within these limits
(planner/reduction). What memory is left then keeps layers gathered, the last ones first, which serve soonest after they
were gathered; the rest is room for tokens, and for activations of layers that need not be computed again then. What a
rank holds: planner/ownership/in_job.py.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple

from heteromesh.planner.ownership.in_job import JobModel, JobRank, StepMoments, kept_layers, sharded_in_job
from heteromesh.planner.ownership.memory import MemoryByKind, TokenBytes
from heteromesh.planner.ownership.state_tiers import StateTiers, least_offloaded
from heteromesh.planner.participation.layout import SHARDED
from heteromesh.planner.participation.shortage import DoesNotFit, Short

LEVELS = (1.0, 0.5, 0.25, 0.0)
"""Of the tokens that a rank's speed would give it: what it is left room for, the first at which the weights fit."""
SLACK = 1.0 + 1e-6
"""Fractions are this much smaller than what fits, so that rounding makes none too large."""
HALVINGS = 8
MANY = 1 << 40
"""Tokens where nothing limits them."""

Choose = Callable[[Sequence[float] | None], Sequence[float]]
"""Returns fractions that add up to 1, none above its limit (None: no limits), as links would have them."""


@dataclass(frozen=True, slots=True, kw_only=True)
class JobTokens:
    """What a step works on."""

    step: int
    """Tokens of all ranks."""
    longest: int
    """Of a sequence."""
    bytes: TokenBytes


@dataclass(frozen=True, slots=True, kw_only=True)
class JobOwnership:
    """Who owns what, and how many tokens each rank has room for."""

    fractions: tuple[float, ...]
    resident: tuple[int, ...]
    """By rank, how many layers stay gathered: the last ones."""
    pass_tokens: tuple[int, ...]
    """By rank, tokens that a pass may have beside those that the step gives it; empty where memory is not known."""
    step_tokens: tuple[int, ...]
    """By rank, tokens that all its passes of a step may have; empty where memory is not known."""
    memory: tuple[MemoryByKind, ...]
    """By rank, with the tokens that its speed gives it."""
    expected: tuple[tuple[float, float], ...] = ()
    """These: by rank, of its largest pass and of its step."""
    kept: tuple[int, ...] = ()
    """By rank, of how many layers, the last ones, activations are kept with these tokens; empty: of none."""


def plan_ownership(model: JobModel, ranks: Sequence[JobRank], tokens: JobTokens, choose: Choose) -> JobOwnership:
    """Returns who owns what and keeps which layers; nothing is kept where memory is not known.

    Raises DoesNotFit where the ranks together can't hold the model or a step.
    """
    found = find_ownership(model, ranks, tokens, choose)
    if found is None:
        raise _does_not_fit(model, ranks, tokens)
    return found


def keeping(ranks: Sequence[JobRank], kept: Sequence[float]) -> list[JobRank]:
    """Returns the ranks with such shares of the optimizer's state that they own on the device, the rest below it."""
    return [replace(r, in_memory=StateTiers(device=share).in_memory) for r, share in zip(ranks, kept, strict=True)]


def find_ownership(model: JobModel, ranks: Sequence[JobRank], tokens: JobTokens, choose: Choose) -> JobOwnership | None:
    """Does what `plan_ownership` does, but returns None where it raises."""
    if all(math.isinf(rank.memory) for rank in ranks):
        expected = [_expected(ranks, tokens, number, LEVELS[0]) for number in range(len(ranks))]
        held = [_Rank(model, r, f, tokens.bytes) for r, f in zip(ranks, choose(None), strict=True)]
        return JobOwnership(
            fractions=tuple(each.fraction for each in held),
            resident=(0,) * len(ranks),
            pass_tokens=(),
            step_tokens=(),
            memory=tuple(each.memory(0, *n) for each, n in zip(held, expected, strict=True)),
            expected=tuple(expected),
        )
    return _planned(model, ranks, tokens, choose)


def _planned(model: JobModel, ranks: Sequence[JobRank], tokens: JobTokens, choose: Choose) -> JobOwnership | None:
    for level in LEVELS:
        expected = [_expected(ranks, tokens, number, level) for number in range(len(ranks))]
        most = _largest_fractions(model, ranks, tokens, expected)
        most = [n if n < 1 else SLACK**2 for n in most]  # all of it, if need be
        if min(most) < 0 or sum(most) < SLACK**2:
            continue
        fractions = choose([n / SLACK for n in most])
        # with whole matrices a rank may own one more
        owned = [min(1.0, f + _spare(model, rank)) if f else 0.0 for f, rank in zip(fractions, ranks, strict=True)]
        held = [_Rank(model, r, f, tokens.bytes) for r, f in zip(ranks, owned, strict=True)]
        found = replace(_filled(held, tokens, expected), fractions=tuple(fractions))
        if min(found.pass_tokens) > 0 and sum(found.step_tokens) >= tokens.step:
            return found
    return None


def _expected(ranks: Sequence[JobRank], tokens: JobTokens, number: int, level: float) -> tuple[float, float]:
    """Returns tokens of a rank's largest pass and of its step: a tenth more than its speed gives it, times the level.

    Both are at least the rank's even part of the longest sequence.
    """
    share = ranks[number].speed / sum(rank.speed for rank in ranks)
    step, least = min(1.0, 1.1 * share) * tokens.step, math.ceil(tokens.longest / len(ranks))
    return max(level * min(step, tokens.longest), least), max(level * step, least)


class _Filled(NamedTuple):
    """What a rank's memory is used for."""

    resident: int
    of_pass: int
    of_step: int
    memory: MemoryByKind
    kept: int


@dataclass(frozen=True, slots=True)
class _Rank:
    """A rank that owns a fraction."""

    model: JobModel
    rank: JobRank
    fraction: float
    bytes: TokenBytes

    def memory(self, resident: int, of_pass: float, of_step: float) -> MemoryByKind:
        return sharded_in_job(
            self.model, self.rank, self.fraction, resident, self.bytes, of_pass=of_pass, of_step=of_step
        )

    def filled(self, tokens: JobTokens, of_pass: float, of_step: float) -> _Filled:
        """Keeps as many layers as fit beside these tokens; then makes room for longer passes, then for more tokens."""
        acts, inputs = self.bytes.per_pass * of_pass, self.bytes.per_step * of_step
        kept = max(0, self._most_kept(acts, inputs))
        moments = StepMoments(self.model, self.rank, kept)
        longest = _whole(moments.most_activations(self.fraction, inputs), self.bytes.per_pass)
        longest = min(longest, max(tokens.longest, tokens.step))
        most = _whole(moments.most_inputs(self.fraction, self.bytes.per_pass * longest), self.bytes.per_step)
        alone = kept_layers(self.model, self.rank, self.fraction, kept, self.bytes, of_pass=of_pass, of_step=of_step)
        return _Filled(kept, longest, min(most, tokens.step), self.memory(kept, of_pass, of_step), alone)

    def _most_kept(self, activations: float, inputs: float) -> int:
        """Returns how many layers fit; -1: not even none."""
        low, high = -1, len(self.model.layers)
        while low < high:
            middle = (low + high + 1) // 2
            fits = StepMoments(self.model, self.rank, middle).most_fraction(activations, inputs) >= self.fraction
            low, high = (middle, high) if fits else (low, middle - 1)
        return low


def _whole(nbytes: float, each: float) -> int:
    """Returns how many tokens of so many bytes fit; -1: memory is short without any."""
    if nbytes < 0:
        return -1
    return int(min(nbytes / each, MANY)) if each else MANY


def _largest_fractions(
    model: JobModel, ranks: Sequence[JobRank], tokens: JobTokens, expected: Sequence[tuple[float, float]]
) -> list[float]:
    """Returns by rank the largest fraction that it can own, at most 1; -1 where it can't even work.

    Where weights have one owner each, as much less as the largest one is, by which a rank may own too much.
    """
    return [
        StepMoments(model, rank, 0).most_fraction(
            tokens.bytes.per_pass * p, tokens.bytes.per_step * t, _spare(model, rank)
        )
        for rank, (p, t) in zip(ranks, expected, strict=True)
    ]


def _spare(model: JobModel, rank: JobRank) -> float:
    """Returns the fraction of the largest weight that has one owner, on a rank whose memory is known."""
    return 0.0 if math.isinf(rank.memory) else model.granule / (model.whole_trained or 1.0)


def _filled(held: Sequence[_Rank], tokens: JobTokens, expected: Sequence[tuple[float, float]]) -> JobOwnership:
    """Returns what the memory that is left beside these fractions is used for."""
    found = [rank.filled(tokens, *numbers) for rank, numbers in zip(held, expected, strict=True)]
    return JobOwnership(
        fractions=tuple(rank.fraction for rank in held),
        resident=tuple(each.resident for each in found),
        pass_tokens=tuple(each.of_pass for each in found),
        step_tokens=tuple(each.of_step for each in found),
        memory=tuple(each.memory for each in found),
        expected=tuple(expected),
        kept=tuple(each.kept for each in found),
    )


def _does_not_fit(model: JobModel, ranks: Sequence[JobRank], tokens: JobTokens) -> DoesNotFit:
    """Returns the error: who is short by how much, and what helps."""
    lacks = _missing(model, ranks, tokens)
    short = [
        Short(layout=SHARDED, ranks=(number,), device=ranks[number].device, gigabytes=round(size / 1e9, 3))
        for number, size in enumerate(lacks)
        if size > 0
    ]
    size = model.whole + model.whole_trained * (1 + model.state)
    ways = [
        *_offloaded(model, ranks, tokens),
        *_smaller(model, ranks, tokens),
        "give these ranks more memory (memory_gb of the cluster file)",
        "add ranks",
    ]
    told = "; ".join(f"{each.gigabytes:.3f} GB on rank {each.ranks[0]} ({each.device})" for each in short)
    return DoesNotFit(
        f"the model ({size / 1e9:.2f} GB with gradients and optimizer state) does not fit on these ranks even with "
        f"sharded weights, with sequences of up to {tokens.longest} tokens and {tokens.step} a step: they lack {told}; "
        f"what helps: {'; '.join(ways)}",
        short,
        (),
    )


def _missing(model: JobModel, ranks: Sequence[JobRank], tokens: JobTokens) -> list[float]:
    """Returns by rank the bytes that it lacks to work at all, or else the bytes that each would have to have more."""
    expected = [_expected(ranks, tokens, number, LEVELS[-1]) for number in range(len(ranks))]
    own = [
        _Rank(model, r, 0.0, tokens.bytes).memory(0, *n).total - r.memory for r, n in zip(ranks, expected, strict=True)
    ]
    if max(own) > 0:
        return own
    low, high = 0.0, 2 * (model.whole + model.whole_trained * (2 + model.state)) + tokens.bytes.per_step * tokens.step
    for _ in range(30):
        middle = (low + high) / 2
        more = [replace(rank, memory=rank.memory + middle) for rank in ranks]
        low, high = (low, middle) if _planned(model, more, tokens, _as_they_fit) is not None else (middle, high)
    return [high] * len(ranks)


def _offloaded(model: JobModel, ranks: Sequence[JobRank], tokens: JobTokens) -> Iterator[str]:
    """Yields how much of the optimizer's state must leave the devices for the model to fit, if that is enough."""
    if any(rank.in_memory < 1 for rank in ranks):
        return

    def works(kept: tuple[float, ...]) -> bool:
        return _planned(model, keeping(ranks, kept), tokens, _as_they_fit) is not None

    kept = least_offloaded(works, [rank.memory for rank in ranks])
    if kept is not None:
        yield (
            f"{math.ceil(100 * (1 - min(kept)))} % of the optimizer's state in host memory or on disk (AdamW with "
            "offload_optimizer='auto')"
        )


def _smaller(model: JobModel, ranks: Sequence[JobRank], tokens: JobTokens) -> Iterator[str]:
    """Yields the nearest smaller steps and shorter sequences with which the model fits."""
    for what in ("step", "longest"):
        for halved in range(1, HALVINGS):
            number = getattr(tokens, what) >> halved
            smaller = replace(tokens, **{what: number})
            if what == "step" and number < tokens.longest:
                break
            if number and _planned(model, ranks, smaller, _as_they_fit) is not None:
                yield f"batch_tokens={number}" if what == "step" else f"max_length={number}"
                break


def _as_they_fit(limits: Sequence[float] | None) -> Sequence[float]:
    """Deals out in proportion to what fits."""
    assert limits is not None
    return [n / sum(limits) for n in limits]
