"""Layouts with sharded weights: fully, or inside groups of hosts with a copy in each."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from typing import NamedTuple, TypedDict

from heteromesh.planner.cluster.links import Links, one_fabric
from heteromesh.planner.cost.analytic import HOST_BYTES_PER_SECOND
from heteromesh.planner.cost.overlap import RECOMPUTED_FORWARD, StepTraffic
from heteromesh.planner.ownership.memory import TokenBytes, sharded_memory, sharded_tokens
from heteromesh.planner.ownership.weights import (
    OwnedModel,
    OwnerHost,
    WeightOwnership,
    least_seconds,
    missing_bytes,
    own_weights,
)
from heteromesh.planner.participation.layout import GROUPED, SHARDED, Setting, WeightLayout

LEVELS = (1.0, 0.5, 0.25, 0.125, 0.0)
"""Of the longest sequence: tokens of a pass that a rank is left room for, the first at which the weights fit; the last:
what every rank needs for its part of it."""
MOST_FOR_PASSES = 0.8
"""Of what a rank has free before it owns anything."""
HOST_USABLE = 0.8
"""Of a host's own memory."""


class Part(NamedTuple):
    """Who works, who only holds, and which hosts own everything together."""

    ranks: tuple[int, ...]
    holders: tuple[int, ...] = ()
    grouping: str = ""
    """`fabric` or `host`; empty: one group."""


def groupings(setting: Setting, ranks: Sequence[int]) -> list[str]:
    """Returns the ways to part these ranks' hosts into several groups."""
    hosts = sorted({setting.cluster.rank_hosts[r] for r in ranks})
    found = []
    for name in ("fabric", "host"):
        groups = _groups(setting, hosts, name)
        if len(groups) > 1 and (name == "fabric" or len(groups) == len(hosts)):
            found.append(name)
    return found if len(found) < 2 or len(_groups(setting, hosts, "fabric")) < len(hosts) else ["host"]


def sharded_least(setting: Setting, part: Part, seconds: float) -> float | None:
    """Returns what a step takes, at least, whose passes take so many seconds; None where memory does not hold it."""
    hosts = _hosts(setting, part, LEVELS[-1], on_host=_can_move(setting, part))
    if hosts is None:
        return None
    return least_seconds(_model(setting, seconds), hosts, _numbered_groups(setting, part))


def sharded(setting: Setting, part: Part, seconds: float) -> WeightLayout | None:
    """Returns the layout with the best ownership for passes that take so many seconds; None where nothing fits."""
    for on_host in (False, True) if _can_move(setting, part) else (False,):
        for level in LEVELS:
            hosts = _hosts(setting, part, level, on_host=on_host)
            found = (
                None if hosts is None else own_weights(_model(setting, seconds), hosts, _numbered_groups(setting, part))
            )
            if found is not None:
                return _layout(setting, part, found, on_host)
    return None


def sharded_shortage(setting: Setting, part: Part) -> dict[int, float]:
    """Returns by rank the bytes that it lacks, with the shortest passes and nothing resident."""
    on_host, expected = _can_move(setting, part), setting.expected_tokens(part.ranks)
    free = {
        r: _free(setting, part, r, LEVELS[-1], expected.get(r, 0.0), on_host=on_host) for r in part.ranks + part.holders
    }
    short = {r: -n for r, n in free.items() if n < 0}
    if short:
        return short
    hosts = _hosts(setting, part, LEVELS[-1], on_host=on_host)
    assert hosts is not None
    missing = missing_bytes(_model(setting, 0.0), hosts, _numbered_groups(setting, part))
    numbers = {h: i for i, h in enumerate(_host_numbers(setting, part))}
    return {r: m for r in part.ranks + part.holders if (m := missing[numbers[setting.cluster.rank_hosts[r]]]) > 1}


def _can_move(setting: Setting, part: Part) -> bool:
    """Whether all hosts that work have memory for layer inputs."""
    hosts = {setting.cluster.rank_hosts[r] for r in part.ranks}
    return all(setting.host_bytes(h) for h in hosts)


def _host_numbers(setting: Setting, part: Part) -> list[int]:
    return sorted({setting.cluster.rank_hosts[r] for r in part.ranks + part.holders})


def _numbered_groups(setting: Setting, part: Part) -> list[list[int]]:
    hosts = _host_numbers(setting, part)
    numbers = {h: i for i, h in enumerate(hosts)}
    return [[numbers[h] for h in group] for group in _groups(setting, hosts, part.grouping)]


def _groups(setting: Setting, hosts: Sequence[int], grouping: str) -> list[list[int]]:
    if not grouping:
        return [list(hosts)]
    found: dict[object, list[int]] = {}
    for h in hosts:
        fabric = setting.cluster.hosts[h].fabric
        found.setdefault(fabric if grouping == "fabric" and fabric else h, []).append(h)
    return list(found.values())


def _model(setting: Setting, seconds: float) -> OwnedModel:
    model = setting.model
    return OwnedModel(
        layers=model.layers,
        layer_parameters=model.layer_parameters,
        outer_parameters=model.outer_parameters,
        forward_seconds=RECOMPUTED_FORWARD * seconds,
        backward_seconds=(1 - RECOMPUTED_FORWARD) * seconds,
    )


def _free(setting: Setting, part: Part, rank: int, level: float, expected: float, *, on_host: bool) -> float:
    """Returns the bytes of a device for layers, gradients and state; negative: it can't even work."""
    size, works = setting.device_bytes(rank), rank in part.ranks
    fixed = sharded_memory(setting.model, device_bytes=size, fraction=0.0, works=works).total
    if not works:
        return size - fixed
    tokens: TokenBytes = sharded_tokens(setting.model, inputs_on_host=on_host)
    free = size - fixed - tokens.per_step * expected
    longest = max(setting.batch)
    wanted = max(level * longest, 1.0) * tokens.per_pass
    # whatever the level, the ranks together must hold the longest sequence
    least = math.ceil(longest / len(part.ranks)) * tokens.per_pass
    if free <= 0:
        return free - least
    return free - max(min(wanted, MOST_FOR_PASSES * free), min(least, free))


def _hosts(setting: Setting, part: Part, level: float, *, on_host: bool) -> list[OwnerHost] | None:
    """Returns the hosts as the ownership program sees them; None where a device that works has no memory for that."""
    cluster = setting.cluster
    links, numbers = setting.links, _host_numbers(setting, part)
    counts = Counter(cluster.rank_hosts[r] for r in part.ranks + part.holders)
    first = {cluster.rank_hosts[r]: r for r in reversed(part.ranks + part.holders)}
    group_of = {h: group for group in _groups(setting, numbers, part.grouping) for h in group}
    expected = setting.expected_tokens(part.ranks)
    hosts = []
    for h in numbers:
        rank, works = first[h], first[h] in expected
        memory = _free(setting, part, rank, level, expected.get(rank, 0.0), on_host=on_host)
        if memory < 0 and works:
            return None
        inputs = setting.model.layer_input_bytes * setting.model.layers
        taken = sum(inputs * expected[r] for r in part.ranks if cluster.rank_hosts[r] == h) if on_host else 0.0
        hosts.append(
            OwnerHost(
                devices=counts[h],
                memory=max(0.0, memory),
                **_rates(links, h, group_of[h], numbers),
                device_rate=cluster.device_of(rank).memory_gbps * 1e9,
                host_memory=max(0.0, HOST_USABLE * setting.host_bytes(h) - taken),
                host_link=HOST_BYTES_PER_SECOND,
                works=works,
            )
        )
    return hosts


class _Rates(TypedDict):
    uplink: float
    across: float
    shares_uplink: bool
    link: float


def _rates(links: Links, host: int, group: Sequence[int], hosts: Sequence[int]) -> _Rates:
    inside, all_on_one = (one_fabric(links.fabrics[h] for h in some) for some in (group, hosts))
    return {
        "uplink": links.uplink(host, group) if len(group) > 1 else math.inf,
        "across": links.uplink(host, hosts) if len(hosts) > 1 else math.inf,
        "shares_uplink": inside == all_on_one,
        "link": links.link[host],
    }


def _layout(setting: Setting, part: Part, found: WeightOwnership, on_host: bool) -> WeightLayout:
    model, cluster = setting.model, setting.cluster
    numbers = {h: i for i, h in enumerate(_host_numbers(setting, part))}
    everyone = sorted(part.ranks + part.holders)
    counts = Counter(cluster.rank_hosts[r] for r in everyone)
    index = {r: numbers[cluster.rank_hosts[r]] for r in everyone}
    fractions = {r: found.fractions[index[r]] / counts[cluster.rank_hosts[r]] for r in everyone}
    moved = {r: found.on_host[index[r]] / counts[cluster.rank_hosts[r]] for r in everyone if found.on_host[index[r]]}
    resident = {r: found.resident[index[r]] for r in part.ranks}
    holders = tuple(r for r in sorted(part.holders) if fractions[r])
    held = sorted((*part.ranks, *holders))
    groups = _groups(setting, list(numbers), part.grouping) if part.grouping else []
    return WeightLayout(
        kind=GROUPED if part.grouping else SHARDED,
        ranks=part.ranks,
        holders=holders,
        fractions={r: fractions[r] for r in held},
        on_host=moved,
        resident=resident,
        groups=tuple(tuple(r for r in held if cluster.rank_hosts[r] in group) for group in groups),
        memory={
            r: sharded_memory(
                model,
                device_bytes=setting.device_bytes(r),
                fraction=fractions[r],
                resident=resident.get(r, 0),
                host_share=moved.get(r, 0.0) / fractions[r] if fractions[r] else 0.0,
                works=r in part.ranks,
            )
            for r in held
        },
        tokens=sharded_tokens(model, inputs_on_host=on_host),
        traffic=StepTraffic(
            gather_seconds=found.gather_seconds,
            reduce_seconds=found.reduce_seconds,
            chunks=model.layers,
            forward_share=RECOMPUTED_FORWARD,
            layer_major=True,
        ),
        update_seconds=found.update_seconds,
        checkpointing=True,
        inputs_on_host=on_host,
        value=found.value,
        bound=found.bound,
        memory_value={r: found.memory_value[index[r]] for r in held},
        link_value={h: found.link_value[i] for h, i in numbers.items()},
    )
