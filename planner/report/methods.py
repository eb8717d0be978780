"""Why the passes of a plan split their sequences as they do: every method's seconds for each kind of split pass."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from heteromesh.planner.cost.passes import Costs, load_of
from heteromesh.planner.model.method import Method
from heteromesh.planner.plan import Pass, Step
from heteromesh.planner.splitting.traffic import pass_bytes


@dataclass(frozen=True, slots=True, kw_only=True)
class MethodOption:
    """A split pass under some method, with the same ranks and shards: what it would take, or why it can't be."""

    method: str
    seconds: float | None = None
    compute: float = 0.0
    exchange: float = 0.0
    """Transfers that nothing hides."""
    latency: float = 0.0
    """Rounds of messages that nothing hides."""
    sent_bytes: int | None = None
    """Bytes of the rank that sends most; None where the model's attention is not known."""
    obstacle: str | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class PassKind:
    """Split passes of one degree and method whose longest sequences are within a factor of two of each other."""

    degree: int
    method: str
    passes: int
    longest: int
    """The seconds of the pass that stands for all: the one that takes longest."""
    tokens: int
    options: tuple[MethodOption, ...]
    """Fastest first."""


def pass_kinds(steps: Iterable[Step], costs: Costs) -> tuple[PassKind, ...]:
    """Returns the kinds of split passes of these steps, those that take most rank-seconds first."""
    found: dict[tuple[int, str, int], list[tuple[Pass, list[int]]]] = {}
    for step in steps:
        for p in step.passes:
            if len(p.ranks) > 1:
                lengths = [step.batch[k] for k in p.sequences]
                found.setdefault((len(p.ranks), p.method, max(lengths).bit_length()), []).append((p, lengths))
    costly = sorted(found.items(), key=lambda item: (-sum(p.seconds for p, _ in item[1]) * item[0][0], item[0]))
    return tuple(_kind(degree, method, members, costs) for (degree, method, _), members in costly)


def _kind(degree: int, method: str, members: Sequence[tuple[Pass, list[int]]], costs: Costs) -> PassKind:
    p, lengths = max(members, key=lambda member: member[0].seconds)
    options = [_option(m, p, lengths, costs) for m in costs.methods]
    never = float("inf")
    return PassKind(
        degree=degree,
        method=method,
        passes=len(members),
        longest=max(lengths),
        tokens=sum(lengths),
        options=tuple(sorted(options, key=lambda o: (never if o.seconds is None else o.seconds, o.method != method))),
    )


def _option(method: Method, p: Pass, lengths: Sequence[int], costs: Costs) -> MethodOption:
    degree, load = len(p.ranks), load_of(lengths, p.shards)
    if not method.fits(degree):
        return MethodOption(method=method.name, obstacle=f"does not split over {degree} ranks")
    capacity = [costs.capacity[r] / (1 - p.offload * costs.offload_share) for r in p.ranks]
    if any(m > n * (1 + 1e-9) for m, n in zip(costs.memory(method, load.tokens), capacity, strict=True)):
        return MethodOption(method=method.name, obstacle="holds more than fits")
    parts = costs.priced(p.ranks, method, load, p.offload)
    sent = None
    if costs.attention is not None:
        speeds = [costs.speeds[r] for r in p.ranks]
        sent = max(pass_bytes(method.name, lengths, p.shards, speeds, costs.attention))
    return MethodOption(
        method=method.name,
        seconds=parts.seconds,
        compute=parts.compute,
        exchange=parts.exchange,
        latency=parts.latency,
        sent_bytes=sent,
    )
