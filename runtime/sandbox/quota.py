"""What a host may use of this machine, in control groups (v1 or v2): cores for its devices' speeds, and memory."""

from __future__ import annotations

import os
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from heteromesh.errors import UserError
from heteromesh.planner.cluster.cluster import Cluster

PERIOD_US = 20_000
"""Short, so that a throttled host is slow rather than stopped now and then."""
LEAST_US = 1_000
"""The kernel's least quota a period."""
SHARE_OF_MACHINE = 0.9
"""The rest is for the network's and the sandbox's own work."""
LAUNCHER_BYTES = 200 << 20
"""Of a host beside its devices' memory: torchrun was measured to take 156 MB."""
_WHAT = {"cpu": "device speeds can't be emulated", "memory": "memory can't be limited"}
_WAY_OUT = {"cpu": "use --no-quota", "memory": "leave --limit-memory out"}


def shares(cluster: Cluster, cores: float | None) -> tuple[float, ...]:
    """Cores of each host, in proportion to the sum of its devices' speeds.

    They add up to `cores` (default: SHARE_OF_MACHINE of this machine's) or to less where the fastest device, which
    computes on one thread, would get more than one core. Raises UserError for a share that can't be emulated.
    """
    machine = len(os.sched_getaffinity(0))
    cores = SHARE_OF_MACHINE * machine if cores is None else cores
    if not 0 < cores <= machine:
        raise UserError(f"--cores {cores:g} can't be shared out: give more than 0 and at most this machine's {machine}")
    speeds = cluster.speeds()
    scale = min(cores / sum(speeds), 1 / max(speeds))
    result = [0.0] * len(cluster.hosts)
    for rank, index in enumerate(cluster.rank_hosts):
        result[index] += speeds[rank] * scale
    least = LEAST_US / PERIOD_US
    for host, share in zip(cluster.hosts, result, strict=True):
        if share < least:
            raise UserError(
                f"host {host.name!r} would get {share:.3g} cores and the least quota is {least:g}: use a machine with "
                "more cores, fewer hosts or --no-quota"
            )
    return tuple(result)


def memory_limits(cluster: Cluster) -> tuple[int, ...]:
    """Bytes of each host: what its devices have, and what the command's launcher takes beside the ranks."""
    return tuple(
        LAUNCHER_BYTES + round(host.count * cluster.devices[host.device].memory_gb * 1e9) for host in cluster.hosts
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class Controller:
    """Where control groups of a kind ("cpu" or "memory") are made."""

    root: Path
    version: int
    kind: str = "cpu"

    def limit(self, group: Path, value: float) -> None:
        """Sets a group's limit: cores, or bytes of memory."""
        if self.kind == "memory":
            name = "memory.max" if self.version == 2 else "memory.limit_in_bytes"
            (group / name).write_text(str(int(value)))
        elif self.version == 2:
            (group / "cpu.max").write_text(f"{round(value * PERIOD_US)} {PERIOD_US}")
        else:
            (group / "cpu.cfs_period_us").write_text(str(PERIOD_US))
            (group / "cpu.cfs_quota_us").write_text(str(round(value * PERIOD_US)))


def find_controller(kind: str = "cpu", mounts: Path = Path("/proc/mounts")) -> Controller:
    """Returns the mounted controller of a kind; raises UserError if there is none."""
    for line in mounts.read_text().splitlines():
        _, where, system, options, *_ = line.split()
        if system == "cgroup" and kind in options.split(","):
            return Controller(root=Path(where), version=1, kind=kind)
        if system == "cgroup2":
            listed = Path(where) / "cgroup.controllers"
            if listed.exists() and kind in listed.read_text().split():
                return Controller(root=Path(where), version=2, kind=kind)
    raise UserError(f"{_WHAT[kind]}: no {kind} control group is mounted here; {_WAY_OUT[kind]}")


class ControlGroups:
    """One control group a host, named `{name}-{index}`, that limits its cores or its memory."""

    def __init__(self, name: str, limits: Sequence[float], controller: Controller) -> None:
        self._limits, self._controller = tuple(limits), controller
        self.groups = tuple(controller.root / f"{name}-{i}" for i in range(len(self._limits)))

    def create(self) -> None:
        """Raises UserError where the groups can't be written."""
        kind = self._controller.kind
        try:
            if self._controller.version == 2:
                control = self._controller.root / "cgroup.subtree_control"
                if kind not in control.read_text().split():
                    control.write_text(f"+{kind}")
            for group, limit in zip(self.groups, self._limits, strict=True):
                group.mkdir(exist_ok=self._controller.version == 2)  # there one group has all limits
                self._controller.limit(group, limit)
        except OSError as error:
            raise UserError(
                f"{_WHAT[kind]}: control groups can't be written here ({error.strerror}: {error.filename}); "
                f"{_WAY_OUT[kind]}"
            ) from None

    def remove(self) -> None:
        """Removes the groups, whose processes have ended."""
        for group in self.groups:
            remove_group(group)


def remove_group(group: Path) -> None:
    """Waits up to a second for the last process to be gone from it."""
    for _ in range(100):
        try:
            group.rmdir()
        except FileNotFoundError:
            return
        except OSError:
            time.sleep(0.01)
    if group.exists():
        group.rmdir()
