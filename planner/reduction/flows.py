"""Spreads flows over the NICs of their hosts, so that the busiest NIC has the least to do.

    minimise T   subject to, for every NIC each way,   sum of bytes * fraction <= T * rate

with the fractions of every flow over (NIC of the source, NIC of the target) adding up to 1: C4P's traffic planning
(arXiv 2406.04594) as a linear program. When a NIC degrades, solve again with its new rate; a NIC of rate 0 is down.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from heteromesh.errors import UserError
from heteromesh.planner.solver import Program

SECONDS = 10.0
"""Limit of the solver; the programs take milliseconds."""


@dataclass(frozen=True, slots=True)
class Flow:
    """Bytes from one host to another."""

    source: int
    target: int
    size: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Spread:
    """Which part of every flow takes which NICs."""

    fractions: tuple[tuple[tuple[float, ...], ...], ...]
    """[flow][NIC of the source][NIC of the target]."""
    seconds: float
    """The time of the busiest NIC, each way."""


def spread(flows: Sequence[Flow], nics: Sequence[Sequence[float]]) -> Spread:
    """Finds the fractions of all flows. nics[h][n]: bytes per second each way of host h's NIC n.

    Raises UserError for a flow within a host or of no size, a negative rate, and a host whose NICs are all down.
    """
    _check(flows, nics)
    if not flows:
        return Spread(fractions=(), seconds=0.0)
    # in units that keep the solver's numbers near 1
    unit = max(f.size for f in flows) / max(max(rates) for rates in nics)
    program = Program("flows")
    slowest = min(rate for rates in nics for rate in rates if rate)
    total = program.real(0.0, sum(f.size for f in flows) / slowest / unit)
    loads: dict[tuple[int, int, bool], list[tuple[float, int]]] = {}
    parts: list[list[list[int | None]]] = []
    for flow in flows:
        chosen: list[list[int | None]] = []
        for a, out in enumerate(nics[flow.source]):
            chosen.append([])
            for b, into in enumerate(nics[flow.target]):
                share = program.real(0.0, 1.0) if out and into else None
                chosen[a].append(share)
                if share is not None:
                    loads.setdefault((flow.source, a, True), []).append((flow.size / out / unit, share))
                    loads.setdefault((flow.target, b, False), []).append((flow.size / into / unit, share))
        program.equal([(1.0, v) for row in chosen for v in row if v is not None], 1)
        parts.append(chosen)
    for terms in loads.values():
        program.at_most([*terms, (-1.0, total)], 0)
    values = program.minimise([(1.0, total)], SECONDS)
    assert values is not None, "every flow has a card at both ends"
    fractions = tuple(
        tuple(tuple(0.0 if v is None else max(0.0, values[v]) for v in row) for row in chosen) for chosen in parts
    )
    return Spread(fractions=fractions, seconds=values[total] * unit)


def _check(flows: Sequence[Flow], nics: Sequence[Sequence[float]]) -> None:
    for host, rates in enumerate(nics):
        for nic, rate in enumerate(rates):
            if not 0 <= rate < math.inf:
                raise UserError(f"card {nic} of host {host} has {rate} bytes/s: it must be zero (down) or more")
    for flow in flows:
        if flow.source == flow.target:
            raise UserError(f"a flow goes from host {flow.source} to itself: leave it out, it uses no card")
        if not 0 < flow.size < math.inf:
            raise UserError(
                f"the flow from host {flow.source} to {flow.target} has {flow.size} bytes: give more than 0"
            )
        for host in (flow.source, flow.target):
            if not 0 <= host < len(nics) or not any(nics[host]):
                raise UserError(f"host {host} has a flow and no card that is up: repair one or leave the host out")
