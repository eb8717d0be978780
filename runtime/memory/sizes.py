"""A model's real sizes, and what memory the ranks of a job have."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence

import torch
from torch import nn

from heteromesh.comm.world import World
from heteromesh.errors import UserError
from heteromesh.parallel.state.separable import Separation, check_separable
from heteromesh.planner.cluster.catalog import CATALOG
from heteromesh.planner.cluster.cluster import Cluster
from heteromesh.planner.ownership.in_job import JobModel, JobRank
from heteromesh.runtime.process.memory import give_back, resident_bytes

SPARE = 0.05
"""Of a rank's memory, that is left free: allocators keep some of what is freed."""
ADAM = 2.0
"""Bytes of state for a byte of weights, where an optimizer can't be tried."""


def job_model(
    model: nn.Module,
    layers: Sequence[Sequence[nn.Parameter]],
    optimizer: torch.optim.Optimizer,
    working: Mapping[nn.Parameter, torch.dtype] | None = None,
) -> JobModel:
    """Returns the sizes of a model. layers: in the order in which they run, the parameters that are a layer's alone.
    working: the dtype in which weights are gathered where it isn't their own.
    """
    dtypes = working or {}
    inside = {p for own in layers for p in own}
    outside = [p for p in model.parameters() if p not in inside]
    every, separation = list(model.parameters()), separation_of(optimizer)
    trained = _bytes(p for p in every if p.requires_grad)
    return JobModel(
        layers=tuple(_bytes(own) for own in layers),
        trained=tuple(_bytes(p for p in own if p.requires_grad) for own in layers),
        outside=_bytes(outside),
        outside_trained=_bytes(p for p in outside if p.requires_grad),
        largest=max((float(_size(p)) for p in every if p.requires_grad), default=0.0),
        gathered=tuple(_gathered(own, dtypes) for own in layers),
        apart=tuple(_apart(own, dtypes) for own in layers),
        outside_gathered=_gathered(outside, dtypes),
        outside_apart=_apart(outside, dtypes),
        state=sum(separation.state_bytes.get(p, 0.0) for p in every) / (trained or 1.0),
        granule=max((float(_size(p)) for p in separation.whole), default=0.0),
    )


def separation_of(optimizer: torch.optim.Optimizer) -> Separation:
    """Returns what `check_separable` does, or a guess at the state where the optimizer can't be tried."""
    try:
        return check_separable(optimizer)
    except UserError:
        updated = (p for group in optimizer.param_groups for p in group["params"] if p.requires_grad)
        return Separation(frozenset(), {p: ADAM * _size(p) for p in updated})


def job_ranks(cluster: Cluster, world: World, model: nn.Module, *, described: bool) -> list[JobRank]:
    """Returns what memory each rank of the world has, and holds already beside the model; equal on every rank.

    described: whether the cluster's devices are the user's. Elsewhere only CUDA devices say what they have.
    """
    give_back(world.device)
    own = usable_bytes(cluster, world, described), _context(world.device, model)
    counts = Counter(cluster.rank_hosts)
    return [
        JobRank(
            memory=memory,
            context=context,
            device=cluster.device_name(rank),
            # contributions come from the ranks of the owner's host, and summed up from each other host
            senders=counts[cluster.rank_hosts[rank]] - 1 + len(counts) - 1,
        )
        for rank, (memory, context) in enumerate(world.gather(own))
    ]


def usable_bytes(cluster: Cluster, world: World, described: bool) -> float:
    """Returns the bytes that this rank may use; infinite where nobody has said."""
    found = math.inf
    device = cluster.device_of(world.rank)
    # the catalogue's `cpu` is a guess, which must not decide
    if described and device != CATALOG["cpu"]:
        found = device.memory_gb * 1e9
    if world.device.type == "cuda":
        found = min(found, float(torch.cuda.get_device_properties(world.device).total_memory))
    return found * (1 - SPARE)


def _context(device: torch.device, model: nn.Module) -> float:
    """Returns the bytes that the process holds beside the model: code, libraries, the device's context."""
    if device.type == "cuda":
        return resident_bytes(device) - float(torch.cuda.memory_reserved(device))
    here = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in _tensors(model) if _is_here(t)}
    return max(0.0, resident_bytes(device) - sum(here.values()))


def _tensors(model: nn.Module) -> list[torch.Tensor]:
    return [*model.parameters(), *model.buffers()]


def _is_here(tensor: torch.Tensor) -> bool:
    return tensor.device.type == "cpu" and tensor.layout is torch.strided


def _gathered(parameters: Iterable[nn.Parameter], dtypes: Mapping[nn.Parameter, torch.dtype]) -> float:
    return float(sum(p.numel() * dtypes.get(p, p.dtype).itemsize for p in parameters))


def _apart(parameters: Iterable[nn.Parameter], dtypes: Mapping[nn.Parameter, torch.dtype]) -> float:
    return _bytes(p for p in parameters if dtypes.get(p, p.dtype) != p.dtype)


def _bytes(parameters: Iterable[nn.Parameter]) -> float:
    return float(sum(map(_size, parameters)))


def _size(parameter: nn.Parameter) -> int:
    return parameter.numel() * parameter.element_size()
