"""Why a step is as it is: what its critical rank spends, and what other degrees would have cost each pass."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from heteromesh.planner.cost.passes import LOCAL, Costs
from heteromesh.planner.cost.shards import make_pass
from heteromesh.planner.plan import Pass, Step
from heteromesh.planner.sequences.timeline import starts


@dataclass(frozen=True, slots=True, kw_only=True)
class Option:
    """A pass at some degree: what it would take, or why it can't be."""

    degree: int
    method: str | None = None
    seconds: float | None = None
    obstacle: str | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class PassReason:
    """A pass and its neighbouring degrees."""

    position: int
    ranks: tuple[int, ...]
    method: str
    sequences: int
    tokens: int
    longest: int
    offload: float
    """Share of its activations that waits in host memory."""
    seconds: float
    rank_seconds: float
    """seconds * degree: what the cluster pays."""
    compute: float
    exchange: float
    fixed: float
    options: tuple[Option, ...]
    """The next smaller degree, the chosen one and the next larger one, as far as they exist."""
    reason: str


@dataclass(frozen=True, slots=True, kw_only=True)
class StepReason:
    """seconds = compute + exchange + fixed + idle + step_fixed, all of the rank that ends last."""

    seconds: float
    bound_seconds: float
    critical_rank: int
    compute: float
    exchange: float
    fixed: float
    idle: float
    """Waiting for the other ranks of its passes to be free."""
    step_fixed: float
    """The gradient sum's exposed part and the optimizer."""
    passes: tuple[PassReason, ...]


def explain_step(step: Step, costs: Costs) -> StepReason:
    """Returns the reasons of one step under the costs that it was planned with."""
    _, ends = starts(step.passes, costs.ranks)
    critical = max(range(costs.ranks), key=lambda r: (ends[r], -r))
    passes = tuple(_explain_pass(i, p, step, costs) for i, p in enumerate(step.passes))
    own = [p for p in passes if critical in p.ranks]
    return StepReason(
        seconds=step.seconds,
        bound_seconds=step.bound_seconds,
        critical_rank=critical,
        compute=sum(p.compute for p in own),
        exchange=sum(p.exchange for p in own),
        fixed=sum(p.fixed for p in own),
        idle=max(0.0, ends[critical] - sum(p.seconds for p in own)),
        step_fixed=step.seconds - ends[critical],
        passes=passes,
    )


def split_seconds(p: Pass, lengths: Sequence[int], costs: Costs) -> tuple[float, float, float]:
    """Returns (compute, exchange, fixed) of a pass: what is left without transfers, what they add, and what no token
    causes.
    """
    parts = costs.pass_breakdown(p.ranks, p.method, lengths, p.shards, p.offload)
    return parts.compute, parts.exchange + parts.latency + parts.offload, parts.fixed


def _explain_pass(position: int, p: Pass, step: Step, costs: Costs) -> PassReason:
    lengths = [step.batch[k] for k in p.sequences]
    compute, exchange, fixed = split_seconds(p, lengths, costs)
    degree = len(p.ranks)
    rank_sets = {max(1, degree // 2): p.ranks[: max(1, degree // 2)], degree: p.ranks}
    rank_sets[min(2 * degree, costs.ranks)] = _widened(p.ranks, min(2 * degree, costs.ranks), costs.ranks)
    options = tuple(
        Option(degree=degree, method=p.method, seconds=p.seconds)
        if d == degree
        else _option(rank_sets[d], p, step, costs)
        for d in sorted(rank_sets)
    )
    return PassReason(
        position=position,
        ranks=p.ranks,
        method=p.method,
        sequences=len(lengths),
        tokens=sum(lengths),
        longest=max(lengths),
        offload=p.offload,
        seconds=p.seconds,
        rank_seconds=p.seconds * degree,
        compute=compute,
        exchange=exchange,
        fixed=fixed,
        options=options,
        reason=_reason(p, step, options, costs),
    )


def _widened(ranks: Sequence[int], degree: int, world: int) -> tuple[int, ...]:
    """Returns the ranks and the ones that follow them, up to `degree`."""
    others = [(ranks[-1] + 1 + i) % world for i in range(world)]
    return tuple(sorted([*ranks, *[r for r in others if r not in ranks][: degree - len(ranks)]]))


def _option(ranks: Sequence[int], p: Pass, step: Step, costs: Costs) -> Option:
    degree, tokens = len(ranks), sum(step.batch[k] for k in p.sequences)
    capacity = sum(costs.capacity[r] for r in ranks)
    if tokens > capacity:
        return Option(degree=degree, obstacle=f"does not fit, {tokens} tokens for {capacity}")
    method = LOCAL
    if degree > 1:
        chosen = costs.method_for(ranks, max(step.batch[k] for k in p.sequences))
        if chosen is None:
            return Option(degree=degree, obstacle="no method splits over so many ranks")
        method = chosen.name
    other = make_pass(ranks, method, p.sequences, step.batch, costs)
    return Option(degree=degree, method=method, seconds=other.seconds)


def _reason(p: Pass, step: Step, options: Sequence[Option], costs: Costs) -> str:
    degree, tokens = len(p.ranks), sum(step.batch[k] for k in p.sequences)
    capacity = [costs.capacity[r] for r in p.ranks]
    if p.offload:
        return f"{p.offload:.0%} of its activations wait in host memory: its ranks hold {sum(capacity)} tokens without"
    if degree > 1 and tokens > sum(capacity) - min(capacity):
        return "the fewest ranks that hold it"
    priced = [(o.degree * o.seconds, o) for o in options if o.seconds is not None]
    least, cheapest = min(priced, key=lambda pair: pair[0])
    if cheapest.degree == degree:
        return "the cheapest of these degrees" if len(priced) > 1 else "the only degree that is possible"
    smaller = options[0].seconds if options[0].degree < degree else None
    if smaller is not None and smaller > step.seconds:
        return f"fewer ranks would take longer than the whole step ({smaller:.4g} s)"
    extra = p.seconds * degree - least
    return f"degree {cheapest.degree} alone is {extra:.3g} rank-seconds cheaper; this one evens out the ranks' ends"
