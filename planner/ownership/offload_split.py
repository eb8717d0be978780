"""How much of a rank's optimizer state each tier gets: in closed form for two tiers, by a linear program in general.

The closed form: with a fraction x staged to the device and the rest updated on the host, lanes that work less with x
(the host) and those that work more (the links, the device) all have a line in x; the best x is where the two sides
meet. Deep Optimizer States (arXiv 2410.21316) takes a whole number k instead, one subgroup in k on the device.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from heteromesh.errors import UserError
from heteromesh.planner.ownership.offload_rates import (
    RESOURCES,
    TIERS,
    OffloadRank,
    OffloadRates,
    Resource,
    SharedMemory,
    SharedResource,
    Tier,
)
from heteromesh.planner.solver import Program

_SOLVE_SECONDS = 5.0
_LONGEST = 1e9
"""As a multiple of the time that the host would take for everything."""
_BYTES_OF: dict[Resource, str] = {
    "to_device": "to_device",
    "to_host": "to_host",
    "read": "disk_read",
    "write": "disk_write",
    "disk": "disk",
    "host_memory": "host_memory",
}
"""The rate that turns seconds of a resource into bytes."""


@dataclass(frozen=True, slots=True)
class TierSplit:
    """Of each rank the parameters on each tier, and a bound: no schedule of any split takes less."""

    parameters: tuple[dict[Tier, float], ...]
    bound_seconds: float


def staged_fraction(rates: OffloadRates) -> float:
    """Returns the x of 0..1 that is best staged where the rest is updated on the host."""
    staged, host = rates.seconds("staged"), rates.seconds("host")
    lines = [(host[r], staged[r] - host[r]) for r in RESOURCES]
    falling = [(at, slope) for at, slope in lines if slope <= 0 and at > 0]
    rising = [(at, slope) for at, slope in lines if slope > 0]
    crossings = [min(((a - b) / (s - f) for b, s in rising), default=math.inf) for a, f in falling]
    return min(1.0, max(0.0, *crossings)) if crossings else 0.0


def fraction_seconds(rates: OffloadRates, x: float) -> float:
    """Returns the seconds of a parameter, on average, with a fraction x staged and all lanes at work at once."""
    staged, host = rates.seconds("staged"), rates.seconds("host")
    return max(x * staged[r] + (1 - x) * host[r] for r in RESOURCES)


def published_stride(rates: OffloadRates) -> int:
    """Returns the k of Deep Optimizer States: k - 1 subgroups on the host while one is flushed, fetched and updated.

    Flush and fetch share one buffer, so that the link works in one direction at a time.
    """
    there_and_back = rates.state_bytes / rates.to_device + rates.state_bytes / rates.to_host
    host = rates.host_seconds - rates.weight_bytes / rates.to_device
    if host <= 0:
        return 2
    return 1 + max(1, math.ceil((there_and_back + 1 / rates.device_update) / host))


def split_tiers(
    ranks: Sequence[OffloadRank],
    shared: Sequence[SharedResource] = (),
    shared_memory: Sequence[SharedMemory] = (),
) -> TierSplit:
    """Returns the split that lets the last rank end first. Raises UserError where the tiers don't hold the state."""
    program = Program("offload")
    ends = program.real(0, _LONGEST)
    scale = max((r.parameters for r in ranks), default=0) or 1
    # in units of the largest rank's parameters and of seconds on its host: numbers near 1 for the solver
    unit = max(r.rates.host_seconds for r in ranks) * scale
    parts = [{tier: program.real(0, 1.0) for tier in TIERS} for _ in ranks]
    for rank, part in zip(ranks, parts, strict=True):
        program.equal([(1.0, part[tier]) for tier in TIERS], rank.parameters / scale)
        for resource in RESOURCES:
            busy = [(rank.rates.seconds(tier)[resource] * scale / unit, part[tier]) for tier in TIERS]
            if any(seconds for seconds, _ in busy):
                program.at_most([*busy, (-1.0, ends)], 0)
        for limit, tiers in _limits(rank):
            if limit < math.inf:
                program.at_most([(1.0, part[tier]) for tier in tiers], limit / scale)
    for each in shared:
        terms = [
            (
                ranks[i].rates.seconds(tier)[each.resource] * _rate(ranks[i].rates, each.resource) / each.per_second,
                i,
                tier,
            )
            for i in each.ranks
            for tier in TIERS
        ]
        program.at_most([*((s * scale / unit, parts[i][tier]) for s, i, tier in terms), (-1.0, ends)], 0)
    for memory in shared_memory:
        held: tuple[Tier, ...] = ("staged", "host") if memory.tier == "host" else ("disk",)
        terms_held = [(ranks[i].rates.state_bytes, parts[i][tier]) for i in memory.ranks for tier in held]
        program.at_most(terms_held, memory.bytes / scale)
    values = program.minimise([(1.0, ends)], _SOLVE_SECONDS)
    if values is None:
        raise UserError(_too_little(ranks, shared_memory))
    found = tuple({tier: max(0.0, values[part[tier]] * scale) for tier in TIERS} for part in parts)
    return TierSplit(found, values[ends] * unit)


def _rate(rates: OffloadRates, resource: Resource) -> float:
    """Returns by what seconds of a resource are bytes. Raises UserError for one that is no rank's to share."""
    if resource not in _BYTES_OF:
        raise UserError(f"{resource} can't be shared between ranks: share one of {', '.join(_BYTES_OF)}")
    rate: float = getattr(rates, _BYTES_OF[resource])
    if rate == math.inf:
        raise UserError(f"{resource} is shared, but a rank's own rate of it is infinite: give each rank's rate")
    return rate


def _limits(rank: OffloadRank) -> list[tuple[float, tuple[Tier, ...]]]:
    """Returns how many parameters fit on tiers together."""
    state, memory = rank.rates.state_bytes, rank.memory
    found: list[tuple[float, tuple[Tier, ...]]] = [
        (memory.device / state, ("resident",)),
        (memory.host / state, ("staged", "host")),
        (memory.disk / state, ("disk",)),
    ]
    return [*found, (0.0, ("staged",))] if memory.staging == 0 else found


def _too_little(ranks: Sequence[OffloadRank], shared: Sequence[SharedMemory]) -> str:
    def holds(rank: OffloadRank) -> float:
        return rank.memory.device + rank.memory.host + rank.memory.disk

    short = [
        f"rank {i} needs {rank.parameters * rank.rates.state_bytes / 1e9:.3f} GB and has "
        f"{rank.memory.device / 1e9:.3f} on the device, {rank.memory.host / 1e9:.3f} in host memory, "
        f"{rank.memory.disk / 1e9:.3f} on disk"
        for i, rank in enumerate(ranks)
        if rank.parameters * rank.rates.state_bytes > holds(rank)
    ]
    rest = ", ".join(f"{m.bytes / 1e9:.3f} GB of {m.tier} for ranks {m.ranks}" for m in shared)
    what = "; ".join(short) or f"the ranks share {rest}"
    return f"no set of tiers holds the optimizer state ({what}): give a disk with space, or shard over more ranks"
