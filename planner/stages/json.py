"""The `layout.placement` of a plan: stages with their predicted effect, and what is needed to simulate them."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from typing import Any

from heteromesh.errors import UserError
from heteromesh.planner.stages.hosts import ClusterResources, HostResources
from heteromesh.planner.stages.placement import Candidate, Decision
from heteromesh.planner.stages.stages import REMAKE, Placement, check_keys, placement_from_json, placement_to_json
from heteromesh.planner.stages.workload import Workload


@dataclass(frozen=True, slots=True, kw_only=True)
class Basis:
    """A placement and what it was predicted with."""

    placement: Placement
    resources: ClusterResources
    work: Workload
    seconds: float
    """Predicted of a step."""


STAGES, STEPS = "stages", "steps"
"""What `layout.trains` may be: whether a job with this plan trains in its placement's stages or by its steps."""


def stages_of(layout: Mapping[str, Any], where: str) -> Basis | None:
    """Returns the placement that a plan's layout has the model trained in; None where its steps say how.

    Raises UserError for a layout that wants stages and has none, and for what `basis_from_json` refuses.
    """
    trains = layout.get("trains", STEPS)
    if trains == STEPS:
        return None
    if trains != STAGES or "placement" not in layout:
        raise UserError(
            f"{where}.trains is {trains!r}{' and there is no placement' if trains == STAGES else ''}: it must be "
            f"{STEPS!r}, or {STAGES!r} beside a placement; {REMAKE}"
        )
    return basis_from_json(layout["placement"], f"{where}.placement")


def decision_to_json(decision: Decision, resources: ClusterResources) -> dict[str, Any]:
    """Returns {family, stages, micro_batches, predicted {...}, candidates [{family, seconds, ...}], basis {hosts,
    work}}.
    """
    predicted = asdict(decision.prediction) | {"bound_seconds": decision.bound_seconds, "gap": decision.gap}
    work = {f.name: getattr(decision.work, f.name) for f in fields(Workload)}
    uplink = None if math.isinf(resources.uplink) else resources.uplink
    return {
        "family": decision.family,
        **placement_to_json(decision.placement),
        "predicted": predicted,
        "candidates": [_candidate(c, decision) for c in decision.candidates],
        "basis": {"hosts": [asdict(host) for host in resources.hosts], "uplink": uplink, "work": work},
    }


def _candidate(candidate: Candidate, decision: Decision) -> dict[str, Any]:
    placement, proved = candidate.placement, math.isfinite(candidate.bound_seconds)
    return {
        "family": candidate.family,
        "seconds": candidate.prediction.seconds if candidate.prediction else None,
        "bound_seconds": candidate.bound_seconds if proved else None,
        "layers": [stage.layers for stage in placement.stages] if placement else None,
        "activation_bytes": candidate.prediction.activation_bytes if candidate.prediction else None,
        "gradient_bytes": candidate.prediction.gradient_bytes if candidate.prediction else None,
        "why": why(candidate, decision),
    }


def why(candidate: Candidate, decision: Decision) -> str:
    """Returns what a candidate takes and moves, beside the chosen one; or what stands in its way."""
    own, best = candidate.prediction, decision.prediction
    if own is None or candidate.placement is None:
        return f"infeasible: {candidate.obstacle}"
    if candidate.placement == decision.placement:
        return "chosen"
    sums = own.seconds - own.pipeline_seconds, best.seconds - best.pipeline_seconds
    return (
        f"{own.seconds:.4g} s a step, {own.seconds / best.seconds:.2f}x the chosen {best.seconds:.4g} s: "
        f"{_gb(own.activation_bytes)} of activations and {_gb(own.gradient_bytes)} of gradients between fabrics "
        f"against {_gb(best.activation_bytes)} and {_gb(best.gradient_bytes)}; devices compute {own.busy_share:.0%} of "
        f"the time against {best.busy_share:.0%}; {sums[0]:.3g} s after the last backward against {sums[1]:.3g} s"
    )


def basis_from_json(data: Any, where: str) -> Basis:
    """Returns what `decision_to_json` wrote; raises UserError on missing or unknown keys and wrong values."""
    known = ("family", "stages", "micro_batches", "predicted", "candidates", "basis")
    check_keys(data, known, where)
    check_keys(data["basis"], ("hosts", "uplink", "work"), f"{where}.basis")
    basis = data["basis"]
    try:
        hosts = tuple(_host(h, f"{where}.basis.hosts[{i}]") for i, h in enumerate(basis["hosts"]))
        uplink = math.inf if basis["uplink"] is None else float(basis["uplink"])
        names = [f.name for f in fields(Workload)]
        check_keys(basis["work"], names, f"{where}.basis.work")
        work = Workload(**{name: _number(basis["work"][name], f"{where}.basis.work.{name}") for name in names})
    except (TypeError, ValueError) as error:
        if isinstance(error, UserError):
            raise
        raise UserError(f"{where}.basis is not what `heteromesh plan` writes ({error}): {REMAKE}") from None
    predicted = data["predicted"]
    if not isinstance(predicted, Mapping) or "seconds" not in predicted:
        raise UserError(f"{where}.predicted lacks the key 'seconds': {REMAKE}")
    return Basis(
        placement=placement_from_json({"stages": data["stages"], "micro_batches": data["micro_batches"]}, where),
        resources=ClusterResources(hosts=hosts, uplink=uplink),
        work=work,
        seconds=_number(predicted["seconds"], f"{where}.predicted.seconds"),
    )


def _host(data: Any, where: str) -> HostResources:
    names = [f.name for f in fields(HostResources)]
    check_keys(data, names, where)
    numbers = {n: _number(data[n], f"{where}.{n}") for n in names if n not in ("ranks", "speeds", "fabric")}
    return HostResources(
        ranks=tuple(data["ranks"]), speeds=tuple(data["speeds"]), fabric=str(data["fabric"]), **numbers
    )


def _number(value: Any, where: str) -> Any:
    if not isinstance(value, int | float) or isinstance(value, bool) or value < 0:
        raise UserError(f"{where} is {value!r}: it must be a number, at least 0; {REMAKE}")
    return value


def _gb(size: float) -> str:
    return f"{size / 1e9:.3g} GB"
