"""A bound cost model as JSON, so that a plan or a run can be explained where it was not made."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from heteromesh.errors import UserError
from heteromesh.planner.cluster.links import Links
from heteromesh.planner.cost.overlap import StepTraffic
from heteromesh.planner.cost.passes import Costs, Method, RateByDegree
from heteromesh.planner.model.attention import AttentionShape, ModelAttention
from heteromesh.planner.model.mask import Mask
from heteromesh.planner.plan import Plan

_SECONDS = (
    "seconds_per_token2",
    "seconds_per_token",
    "seconds_per_pass",
    "seconds_per_split_pass",
    "seconds_per_round",
    "seconds_per_tile",
    "seconds_per_step",
)


@dataclass(frozen=True, slots=True, kw_only=True)
class CappedMethod(Method):
    """A method that is kept from splitting over more than `max_degree` ranks."""

    max_degree: int

    def fits(self, degree: int) -> bool:
        """Returns whether the method can and may split over this many ranks."""
        return degree <= self.max_degree and Method.fits(self, degree)


def costs_to_json(costs: Costs) -> dict[str, Any]:
    """Returns {constants {keys of a cost file}, speeds, capacity, hosts, methods, and what is known of links (where the
    rate comes from NICs), the model's attention, offloading and limits of a step}.
    """
    constants: dict[str, Any] = {name: getattr(costs, name) for name in _SECONDS}
    constants["tokens_per_device"] = max(costs.capacity)
    data: dict[str, Any] = {
        "constants": constants,
        "speeds": list(costs.speeds),
        "capacity": list(costs.capacity),
        "hosts": list(costs.hosts),
        "methods": [asdict(method) for method in costs.methods],
    }
    if costs.attention is not None:
        data["attention"] = asdict(costs.attention)
    if costs.offload_seconds:
        data["offload"] = {"seconds": list(costs.offload_seconds), "share": costs.offload_share}
    if costs.step_capacity:
        data["step_capacity"] = list(costs.step_capacity)
    if costs.traffic != StepTraffic():
        data["traffic"] = asdict(costs.traffic)
    if isinstance(costs.rate, RateByDegree):
        constants["bytes_per_second"] = {str(d): rate for d, rate in sorted(costs.rate.table.items())}
    elif isinstance(costs.rate, Links):
        data["links"] = {key: value for key, value in asdict(costs.rate).items() if key != "_memo"}
    return data


def costs_from_json(data: Mapping[str, Any], where: str) -> Costs:
    """Returns what `costs_to_json` wrote; `hosts` may be missing (all on one), and `methods` may be names.

    Raises UserError where keys are missing or of the wrong kind.
    """
    try:
        constants = data["constants"]
        speeds = tuple(float(v) for v in data["speeds"])
        seconds: dict[str, Any] = {name: float(constants.get(name, 0.0)) for name in _SECONDS}
        return Costs(
            **seconds,
            speeds=speeds,
            capacity=tuple(int(c) for c in data["capacity"]),
            methods=tuple(_method(m, constants) for m in data["methods"]),
            rate=_rate(data),
            hosts=tuple(data.get("hosts") or [0] * len(speeds)),
            attention=_attention(data.get("attention")),
            offload_seconds=tuple(float(s) for s in data.get("offload", {}).get("seconds", ())),
            offload_share=float(data.get("offload", {}).get("share", 0.0)),
            traffic=StepTraffic(**data.get("traffic", {})),
            step_capacity=tuple(int(n) for n in data.get("step_capacity", ())),
        )
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise UserError(f"{where} is not a cost model ({error!r}): write it again with this version") from None


def costs_of_plan(plan: Plan, where: str) -> Costs:
    """Returns the cost model that a plan was made with. Raises UserError where it has no step or carries no costs."""
    if not plan.steps:
        raise UserError(f"plan {where} has no step: make it again with `heteromesh plan --steps 1`")
    if not isinstance(plan.layout.get("costs"), dict):
        raise UserError(f"plan {where} carries no cost model (layout.costs): make it again with `heteromesh plan`")
    costs = costs_from_json(plan.layout["costs"], f"plan {where}: layout.costs")
    if costs.ranks != plan.cluster.ranks:
        raise UserError(
            f"plan {where} is for {plan.cluster.ranks} ranks but its costs have {costs.ranks}: make it again"
        )
    return costs


def _method(data: str | Mapping[str, Any], constants: Mapping[str, Any]) -> Method:
    if isinstance(data, str):
        return Method(name=data, bytes_per_token=float(constants["bytes_per_token"]))
    return CappedMethod(**data) if "max_degree" in data else Method(**data)


def _attention(data: Mapping[str, Any] | None) -> ModelAttention | None:
    if data is None:
        return None
    local = tuple((Mask(**mask), int(calls)) for mask, calls in data.get("local", ()))
    return ModelAttention(**{**data, "shape": AttentionShape(**data["shape"]), "local": local})


def _rate(data: Mapping[str, Any]) -> RateByDegree | Links:
    links: Mapping[str, Sequence[Any]] | None = data.get("links")
    if links is not None:
        return Links(**{key: tuple(value) for key, value in links.items()})
    return RateByDegree({int(d): float(v) for d, v in data["constants"].get("bytes_per_second", {}).items()})
