"""A decision as `layout.ownership` of plan.json: what a runtime would need to execute it, and why it was chosen."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, replace
from typing import Any

from heteromesh.errors import UserError
from heteromesh.planner.cluster.links import cluster_links
from heteromesh.planner.cost.passes import Costs
from heteromesh.planner.files import unknown_key
from heteromesh.planner.ownership.memory import FP32, KINDS, MIXED, MemoryByKind
from heteromesh.planner.participation.effects import Effect
from heteromesh.planner.participation.layout import GROUPED, Setting, WeightLayout
from heteromesh.planner.participation.search import Participation, PlannedLayout, step_tokens
from heteromesh.planner.plan import Pass, Plan, Step

WORKING = "working"
"""In the layout of a plan that a dry run has made: the ranks that work."""
OWNERSHIP_KEYS = (
    "kind",
    "working",
    "holders",
    "idle",
    "owners",
    "groups",
    "bytes_per_parameter",
    "recompute",
    "layer_inputs",
    "gather_seconds",
    "reduce_seconds",
    "update_seconds",
    "ownership_seconds",
    "ownership_bound_seconds",
    "seconds",
    "bound_seconds",
    "gap",
    "proved",
    "planned_candidates",
    "seconds_per_gb",
    "seconds_per_gbit",
    "effects",
    "not_executed",
)
OWNER_KEYS = ("rank", "works", "fraction", "fraction_in_host_memory", "resident_layers")


def read_ownership(plan: Plan) -> Mapping[str, Any] | None:
    """Returns `layout.ownership`, None where there is none; raises UserError on missing or unknown keys."""
    told = plan.layout.get("ownership")
    if told is None:
        return None
    _check_keys(told, OWNERSHIP_KEYS, "plan.layout.ownership")
    for i, owner in enumerate(told["owners"]):
        _check_keys(owner, OWNER_KEYS, f"plan.layout.ownership.owners[{i}]")
    for rank, kinds in enumerate(plan.memory):
        _check_keys(kinds, KINDS, f"plan.memory[{rank}]")
    return dict(told)


def _check_keys(table: Mapping[str, Any], known: Sequence[str], where: str) -> None:
    for key in table:
        if key not in known:
            raise unknown_key(key, known, where)
    missing = [key for key in known if key not in table]
    if missing:
        raise UserError(f"{where} lacks the key {missing[0]!r}: make the plan again with `heteromesh plan`")


def ownership_json(setting: Setting, decision: Participation, effects: Sequence[Effect]) -> dict[str, Any]:
    """Returns the JSON object."""
    layout, layers = decision.best.layout, setting.model.layers
    idle = sorted(set(range(setting.cluster.ranks)) - set(layout.ranks) - set(layout.holders))
    owners = [
        {
            "rank": rank,
            "works": rank in layout.ranks,
            "fraction": fraction,
            "fraction_in_host_memory": layout.on_host.get(rank, 0.0),
            "resident_layers": [layers - layout.resident.get(rank, layers), layers] if rank in layout.ranks else [],
        }
        for rank, fraction in sorted(layout.fractions.items())
    ]
    precision = MIXED if layout.sharded else FP32
    return {
        "kind": layout.kind,
        "working": list(layout.ranks),
        "holders": list(layout.holders),
        "idle": idle,
        "owners": owners,
        "groups": [list(group) for group in layout.groups],
        "bytes_per_parameter": asdict(precision),
        "recompute": layout.checkpointing,
        "layer_inputs": "host" if layout.inputs_on_host else "device",
        "gather_seconds": layout.traffic.gather_seconds,
        "reduce_seconds": layout.traffic.reduce_seconds,
        "update_seconds": layout.update_seconds,
        "ownership_seconds": layout.value,
        "ownership_bound_seconds": layout.bound,
        "seconds": decision.best.seconds,
        "bound_seconds": decision.bound,
        "gap": decision.gap,
        "proved": decision.proved,
        "planned_candidates": decision.tried,
        "seconds_per_gb": {str(r): v for r, v in layout.memory_value.items() if v},
        "seconds_per_gbit": {str(h): v for h, v in layout.link_value.items() if v},
        "effects": [asdict(effect) for effect in effects],
        "not_executed": not_executed(setting, layout),
    }


def not_executed(setting: Setting, layout: WeightLayout) -> str:
    """Returns what of a layout today's Trainer doesn't do; empty where it does all of it."""
    words = []
    if layout.sharded:
        words.append(
            "these fractions and resident layers (it shards weights by a plan of its own, from measured sizes and "
            "memory; gathers are in 16 bits with precision='bf16')"
        )
    if layout.kind == GROUPED:
        words.append("a copy of the weights in each group of hosts")
    if layout.on_host or layout.inputs_on_host:
        words.append("state or layer inputs in host memory")
    if layout.holders:
        words.append("ranks that hold state only")
    if 0 not in layout.ranks and len(layout.ranks) + len(layout.holders) < setting.cluster.ranks:
        words.append("idle ranks (rank 0 plans and writes: name a working host first in the cluster file)")
    return ", ".join(words)


def working_in(plan: Plan) -> tuple[int, ...] | None:
    """Returns the ranks that work in a job that follows the plan, the others being idle; None: all of them work.

    Rank 0 plans and writes: where it is idle, or where ranks hold state only, nobody is left out.
    """
    told = read_ownership(plan)
    ranks = plan.layout.get(WORKING) if told is None else told["working"]
    if ranks is None or len(ranks) == plan.cluster.ranks or 0 not in ranks or (told is not None and told["holders"]):
        return None
    return tuple(ranks)


def numbered(plan: Plan, ranks: Sequence[int]) -> Plan:
    """Returns the plan whose steps number these ranks, the only ones that they name, from 0."""
    place = {rank: number for number, rank in enumerate(ranks)}

    def own(step: Step) -> Step:
        return replace(step, passes=tuple(replace(p, ranks=tuple(place[r] for r in p.ranks)) for p in step.passes))

    return replace(plan, steps=tuple(map(own, plan.steps)))


def world_step(step: Step, ranks: Sequence[int]) -> Step:
    """Returns the step of working ranks numbered from 0 with the cluster's ranks."""

    def named(p: Pass) -> Pass:
        return replace(p, ranks=tuple(ranks[number] for number in p.ranks))

    return replace(step, passes=tuple(named(p) for p in step.passes))


def world_costs(setting: Setting, planned: PlannedLayout) -> Costs:
    """Returns the costs of all of the cluster's ranks: those that don't work have no room for a token."""
    cluster, own, ranks = setting.cluster, planned.costs, planned.layout.ranks
    capacity, seconds = [0] * cluster.ranks, [0.0] * cluster.ranks
    for number, rank in enumerate(ranks):
        capacity[rank] = own.capacity[number]
        seconds[rank] = own.offload_seconds[number] if own.offload_seconds else 0.0
    return replace(
        own,
        speeds=cluster.speeds(),
        capacity=tuple(capacity),
        hosts=cluster.rank_hosts,
        rate=cluster_links(cluster),
        offload_seconds=tuple(seconds) if own.offload_seconds else (),
    )


def rank_memory(
    setting: Setting, layout: WeightLayout, peaks: Sequence[float], steps: Sequence[Step]
) -> tuple[MemoryByKind, ...]:
    """Returns by rank of the cluster what it holds.

    peaks: by rank, tokens of its largest pass; steps: with the cluster's ranks.
    """
    found = []
    everyone = range(setting.cluster.ranks)
    dealt = [step_tokens(step, everyone) for step in steps]
    for rank in everyone:
        memory = layout.memory.get(rank, MemoryByKind())
        if rank in layout.ranks:
            most = max(tokens[rank] for tokens in dealt)
            memory = layout.tokens.added(memory, of_pass=peaks[rank], of_step=most)
        found.append(memory)
    return tuple(found)
