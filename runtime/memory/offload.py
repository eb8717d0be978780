"""The optimizer state of a job's ranks on lower tiers: decided once, equal on every rank, then carried out."""

from __future__ import annotations

import math
import os
import shutil
import socket
from collections import Counter
from collections.abc import Callable, Sequence
from contextlib import ExitStack, suppress
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import torch

from heteromesh.comm.world import World
from heteromesh.errors import UserError
from heteromesh.parallel.state.offload.optimizer import OffloadedAdamW, check_offloadable
from heteromesh.parallel.state.offload.state_file import remove_abandoned
from heteromesh.planner.cluster.catalog import Device
from heteromesh.planner.cluster.cluster import Cluster
from heteromesh.planner.cost.analytic import HOST_BYTES_PER_SECOND
from heteromesh.planner.ownership.in_job import JobRank
from heteromesh.planner.ownership.offload import RING, OffloadPlan, on_host, plan_offload
from heteromesh.planner.ownership.offload_rates import OffloadMemory, OffloadRates
from heteromesh.planner.ownership.state_tiers import (
    LowerMemory,
    Offload,
    StateTiers,
    subgroup_numel,
    tiers_of,
)
from heteromesh.planner.ownership.weights import ADAM_BYTES, HOST_PARAMETERS_PER_SECOND
from heteromesh.runtime.config import TrainerConfig
from heteromesh.runtime.memory.sizes import SPARE
from heteromesh.runtime.process.memory import available_bytes, give_back_at_once, memory_limit

T = TypeVar("T")

FOLDER = "offload"
"""Of a run directory: the scratch files of the disk tier, while the job lives."""
USABLE = 0.8
"""Of a host's memory that the cluster file tells or the kernel could give."""
_DISK_BYTES_PER_SECOND = 1e9
"""Each way; where the device's memory is the host's, it decides nothing."""


@dataclass(frozen=True, slots=True, kw_only=True)
class OptimizerOffload:
    """By rank, where the optimizer's state lies."""

    tiers: tuple[StateTiers, ...] = ()
    """Empty: all is on the devices."""
    state: tuple[float, ...] = ()
    """Bytes of it."""
    note: str = ""
    """Why it is not elsewhere, where it should be."""

    @property
    def is_used(self) -> bool:
        """Whether any rank's state is anywhere but in its device's memory."""
        return any(tiers.is_offloaded for tiers in self.tiers)

    def within(self, ranks: Sequence[JobRank]) -> tuple[JobRank, ...]:
        """Returns the ranks with what their memory then holds of their state."""
        if not self.is_used:
            return tuple(ranks)
        return tuple(replace(r, in_memory=t.in_memory) for r, t in zip(ranks, self.tiers, strict=True))

    def moments(self) -> list[dict[str, float]]:
        """Returns by rank the bytes of state on each tier; empty: all is on the devices."""
        if not self.is_used:
            return []
        return [{k: v * size for k, v in asdict(t).items()} for t, size in zip(self.tiers, self.state, strict=True)]

    def resolved(self) -> dict[str, Any]:
        """Returns what config.json has of it."""
        return {"optimizer_tiers": [asdict(tiers) for tiers in self.tiers]} if self.is_used else {}

    def told(self, run_dir: str | Path) -> str:
        """Returns a line for people; empty: there is nothing to say."""
        if not self.is_used:
            return self.note
        moments, found = self.moments(), []
        for tier, where in (("host", "in host memory"), ("disk", f"on disk ({Path(run_dir) / FOLDER})")):
            if any(each[tier] for each in moments):
                found.append(f"{' / '.join(f'{each[tier] / 1e9:.2f}' for each in moments)} GB {where}")
        return f"optimizer state by rank: {', '.join(found)} (docs/offload.md)"

    def optimizer(
        self, given: torch.optim.Optimizer, world: World, cluster: Cluster, config: TrainerConfig, stack: ExitStack
    ) -> torch.optim.Optimizer:
        """Returns the optimizer that keeps the state there: the given one where that is on no lower tier of any rank.

        Its files are removed when the stack is closed.
        """
        folder = Path(config.run_dir) / FOLDER
        if not self.is_used:
            if folder.exists():  # a run that was killed has used it
                remove_abandoned(folder)
                _remove_empty(folder)
            return given
        give_back_at_once(world.device)
        device, apart = cluster.device_of(world.rank), world.device.type != "cpu"
        plan = partial(_plan, self.tiers[world.rank], device, apart)
        taken = OffloadedAdamW.taking_over(given, plan, folder, world.device)
        stack.callback(_remove, taken, folder)
        return taken


NOTHING_OFFLOADED = OptimizerOffload()


@dataclass(frozen=True, slots=True, kw_only=True)
class TiersBelow:
    """What a job may move its optimizer state to; equal on every rank."""

    asked: Offload
    """By the user."""
    lower: tuple[LowerMemory, ...]
    """By rank."""
    obstacle: str
    """Why state can't leave the devices; empty: it can."""
    run_dir: str

    @property
    def may_be_used(self) -> bool:
        """Whether state may be moved where memory is short."""
        return self.asked == "auto" and not self.obstacle

    def placed(self, kept: Sequence[float], state: Sequence[float]) -> OptimizerOffload:
        """Returns the tiers of ranks that keep such shares of their state, of so many bytes each, on the device.

        Raises UserError where a tier has too little space.
        """
        if self.obstacle:
            kept = [1.0] * len(kept)
        asked = "none" if self.obstacle else self.asked
        tiers = map(partial(tiers_of, asked), kept, state, self.lower)
        offload = OptimizerOffload(tiers=tuple(tiers), state=tuple(state))
        _check_space(offload, self.lower, self.run_dir)
        return offload


def tiers_below(config: TrainerConfig, optimizer: torch.optim.Optimizer, world: World, cluster: Cluster) -> TiersBelow:
    """Returns what there is below the ranks' devices. Every rank must call it."""
    asked = config.offload_optimizer
    return TiersBelow(
        asked=asked,
        lower=tuple(_lower_memory(world, cluster, config.run_dir)),
        obstacle=world.once(lambda: _obstacle(asked, optimizer)),
        run_dir=str(config.run_dir),
    )


def on_all(world: World, act: Callable[[], T]) -> T:
    """Returns what `act` returns; where it raises UserError on any rank, raises one on every rank."""
    try:
        found, error = act(), ""
    except UserError as mistake:
        error = str(mistake)
    errors = world.gather(error)
    first = next((rank for rank, text in enumerate(errors) if text), None)
    if first is not None:
        raise UserError(errors[first] if world.size == 1 else f"on rank {first}, {errors[first]}")
    return found


def _lower_memory(world: World, cluster: Cluster, run_dir: str | Path) -> list[LowerMemory]:
    """Returns what each rank has below its device; equal on every rank."""
    host = 0.0
    if world.device.type != "cpu":
        told = cluster.hosts[cluster.rank_hosts[world.rank]].memory_gb
        host = USABLE * (told * 1e9 if told else available_bytes())
    machine, folder = socket.gethostname(), _existing(Path(run_dir))
    with suppress(OSError):
        disk, number = float(shutil.disk_usage(folder).free), os.stat(folder).st_dev
        return _shared(world.gather((machine, host, (machine, number), disk)))
    return _shared(world.gather((machine, host, (machine, -1), 0.0)))


def limited(world: World, ranks: Sequence[JobRank]) -> list[JobRank]:
    """Returns the ranks with no more memory than the limits of their processes' control groups allow."""
    limit, group = memory_limit()
    told = world.gather((limit, socket.gethostname(), group) if world.device.type == "cpu" else (math.inf, "", ""))
    sharing = Counter(told)
    return [
        replace(rank, memory=min(rank.memory, own[0] / sharing[own] * (1 - SPARE)))
        for rank, own in zip(ranks, told, strict=True)
    ]


def _obstacle(asked: Offload, optimizer: torch.optim.Optimizer) -> str:
    """Says why state can't leave the device; empty where it can."""
    if asked == "none":
        return "offload_optimizer is 'none'"
    try:
        check_offloadable(optimizer)
    except UserError as error:
        return str(error)
    return ""


def _check_space(offload: OptimizerOffload, lower: Sequence[LowerMemory], run_dir: str | Path) -> None:
    """Raises UserError where a rank's tiers have too little space."""
    # nothing is told of ranks where all is on the devices
    for number, (moments, below) in enumerate(zip(offload.moments(), lower, strict=False)):
        for tier, has in (("host", below.host), ("disk", below.disk)):
            if moments[tier] > has:
                where = "its host's memory" if tier == "host" else f"the disk of {run_dir}"
                raise UserError(
                    f"rank {number} has {moments[tier] / 1e9:.3f} GB of optimizer state for {where}, which has "
                    f"{has / 1e9:.3f} GB free for it: free some, name a run_dir on another disk, or shard the state "
                    "over more ranks"
                )


def _plan(tiers: StateTiers, device: Device, apart: bool, numel: int) -> OffloadPlan:
    """Returns the subgroups of so many elements. apart: whether the device has memory of its own."""
    size, moments = subgroup_numel(numel), 8.0 * numel
    rates = OffloadRates(
        host_update=HOST_PARAMETERS_PER_SECOND,
        device_update=device.memory_gbps * 1e9 / ADAM_BYTES,
        to_device=HOST_BYTES_PER_SECOND,
        to_host=HOST_BYTES_PER_SECOND,
        disk_read=_DISK_BYTES_PER_SECOND,
        disk_write=_DISK_BYTES_PER_SECOND,
        # beside a device's memory, subgroups have the weights too
        state_bytes=12.0 if apart else 8.0,
        weight_bytes=4.0,
        gradient_bytes=4.0,
    )
    if not tiers.is_offloaded:
        own = OffloadMemory(device=math.inf, staging=0.0, host=0.0)
        return plan_offload(numel, rates, own, subgroup_numel=size, apart=True) if apart else on_host(numel)
    ring = RING * size * rates.state_bytes if tiers.disk else 0.0
    disk = math.inf if tiers.disk else 0.0
    if apart:
        host = tiers.host * moments + ring if tiers.disk else math.inf
        memory = OffloadMemory(device=tiers.device * moments, host=host, disk=disk)
    else:
        memory = OffloadMemory(staging=0.0, host=tiers.device * moments + ring, disk=disk)
    return plan_offload(numel, rates, memory, subgroup_numel=size, apart=apart)


def _shared(told: Sequence[tuple[str, float, Any, float]]) -> list[LowerMemory]:
    """Deals hosts' memory and disks out evenly to the ranks that share them."""
    hosts, disks = Counter(row[0] for row in told), Counter(row[2] for row in told)
    return [LowerMemory(host=row[1] / hosts[row[0]], disk=row[3] / disks[row[2]]) for row in told]


def _existing(folder: Path) -> Path:
    """Returns the folder, or the nearest one above it that there is."""
    folder = folder.absolute()
    return next((f for f in (folder, *folder.parents) if f.exists()), folder)


def _remove(optimizer: OffloadedAdamW, folder: Path) -> None:
    optimizer.close()
    _remove_empty(folder)


def _remove_empty(folder: Path) -> None:
    with suppress(OSError):  # other ranks' files are still there, or none ever was
        folder.rmdir()
