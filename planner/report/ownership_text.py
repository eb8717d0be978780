"""Who takes part, who holds what, and what each host adds, as text; from a plan alone."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from heteromesh.planner.ownership.memory import KINDS
from heteromesh.planner.participation.layout import REPLICATED, SHARDED_OPTIMIZER
from heteromesh.planner.participation.told import read_ownership
from heteromesh.planner.plan import Plan
from heteromesh.planner.report.tables import rank_list, table
from heteromesh.planner.stages.json import STAGES

EFFECTS_SHOWN = 12
WORTH_TELLING = 1e-3
"""Of the step's seconds, per GB or Gbit/s."""
_OF_TOKENS = ("activations", "layer_inputs")
_HEADS = {
    "weights": "weights",
    "gradients": "gradients",
    "masters": "masters",
    "moments": "moments",
    "activations": "activations",
    "layer_inputs": "layer inputs",
    "gather_buffers": "gather",
    "collective_buffers": "collectives",
    "copies": "copies",
    "context": "unusable",
}


def ownership_sections(plan: Plan) -> list[str]:
    """Returns what a plan with participation has to say; nothing for plans without."""
    told = read_ownership(plan)
    if told is None:
        return []
    return [section for section in (_who(plan, told), _effects(told), memory_table(plan)) if section]


def _who(plan: Plan, told: Mapping[str, Any]) -> str:
    parts = [f"{len(told['working'])} of {plan.cluster.ranks} ranks work ({rank_list(told['working'])})"]
    parts += [f"{rank_list(told['holders'])} hold state only"] if told["holders"] else []
    parts += [f"{rank_list(told['idle'])} stay out"] if told["idle"] else []
    lines = [
        f"Ranks    {told['kind']}: {', '.join(parts)}; {_proof(told)}",
        f"Traffic  weights {told['gather_seconds']:.4g} s under forward, gradients {told['reduce_seconds']:.4g} s "
        f"under backward, update {told['update_seconds']:.4g} s{_ownership_proof(told)}",
    ]
    if told["kind"] not in (REPLICATED, SHARDED_OPTIMIZER):
        lines.append(_owners(told))
    if told["groups"]:
        lines.append(f"Each group has a copy of everything: {' | '.join(map(rank_list, told['groups']))}")
    staged = plan.layout.get("trains") == STAGES
    lines.append("This is for the steps; the plan trains in the stages below" if staged else _executed(told))
    return "\n".join(lines)


def _proof(told: Mapping[str, Any]) -> str:
    if told["proved"]:
        return f"every other choice of hosts and layout was planned or takes at least {told['bound_seconds']:.4g} s"
    return (
        f"gap {told['gap']:.1%} to every other choice of hosts and layout ({told['planned_candidates']} planned in the "
        "time limit)"
    )


def _ownership_proof(told: Mapping[str, Any]) -> str:
    if not told["ownership_bound_seconds"]:
        return ""
    return f"; ownership's gap {told['ownership_seconds'] / told['ownership_bound_seconds'] - 1:.1%}"


def _owners(told: Mapping[str, Any]) -> str:
    """Returns a table of owners; ranks that own and keep as much are one row."""
    found: dict[tuple[Any, ...], list[int]] = {}
    for owner in told["owners"]:
        layers = owner["resident_layers"]
        kept = str(layers[1] - layers[0]) if layers else "-"
        share = owner["fraction_in_host_memory"] / owner["fraction"] if owner["fraction"] else 0.0
        found.setdefault((f"{owner['fraction']:.3%}", kept, f"{share:.0%}"), []).append(owner["rank"])
    rows = [(rank_list(ranks), *values) for values, ranks in found.items()]
    return table(("<ranks", "each owns", "resident layers", "state in host memory"), rows)


def _executed(told: Mapping[str, Any]) -> str:
    replicated = told["kind"] in (REPLICATED, SHARDED_OPTIMIZER)
    needed = ["shard_optimizer=True"] if told["kind"] == SHARDED_OPTIMIZER else []
    needed += ["checkpoint_activations=True"] if told["recompute"] and replicated else []
    settings = f" with {', '.join(needed)}" if needed else ""
    if told["not_executed"]:
        return f"Planned, not executed by the Trainer yet: {told['not_executed']}; the rest is{settings or ' as usual'}"
    return f"The Trainer executes this layout{settings}"


def _effects(told: Mapping[str, Any]) -> str:
    lines = [
        f"  {e['what']}: " + (f"{e['seconds']:.4g} s" if e["seconds"] is not None else "does not fit")
        for e in told["effects"][:EFFECTS_SHOWN]
    ]
    lines += _duals(told["seconds_per_gb"], told["seconds"], "one more GB on each of ranks")
    lines += _duals(told["seconds_per_gbit"], told["seconds"], "one more Gbit/s on each of hosts")
    return "\n".join([f"What changes the step's {told['seconds']:.4g} s", *lines]) if lines else ""


def _duals(values: Mapping[str, float], seconds: float, what: str) -> list[str]:
    """Returns what a unit more saves where that is worth telling; ranks or hosts with the same value together."""
    found: dict[str, list[int]] = {}
    for number, value in values.items():
        if value > WORTH_TELLING * seconds:
            found.setdefault(f"{value:.2g}", []).append(int(number))
    return [f"  {what} {rank_list(numbers)} saves {value} s (while little changes)" for value, numbers in found.items()]


def memory_table(plan: Plan) -> str:
    """Returns a table of memory by kind, in GB; ranks that differ in their tokens alone are one row."""
    found: dict[tuple[float, ...], list[int]] = {}
    for rank, own in enumerate(plan.memory):
        if any(own.values()):
            states = (round(own[kind] / 1e8) for kind in KINDS if kind not in _OF_TOKENS)
            found.setdefault(tuple(states), []).append(rank)
    most = [(ranks, {k: max(plan.memory[r][k] for r in ranks) for k in KINDS}) for ranks in found.values()]
    shown = [kind for kind in KINDS if any(sizes[kind] for _, sizes in most)]
    rows = [
        (
            rank_list(ranks),
            *(f"{sizes[kind] / 1e9:.2f}" for kind in shown),
            f"{max(sum(plan.memory[r].values()) for r in ranks) / 1e9:.1f}",
        )
        for ranks, sizes in most
    ]
    heads = ("<ranks", *(_HEADS[kind] for kind in shown), "in all")
    return "\n".join(["Memory by kind, GB on each rank at most", table(heads, rows)]) if rows else ""
