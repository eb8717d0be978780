"""Device speeds by CPU quota: a host may use a share of this machine's cores, in a control group (v1 or v2)."""

from __future__ import annotations

import os
import time
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


@dataclass(frozen=True, slots=True, kw_only=True)
class Controller:
    """Where control groups with a CPU quota are made."""

    root: Path
    version: int


def find_controller(mounts: Path = Path("/proc/mounts")) -> Controller:
    """Returns the mounted CPU controller; raises UserError if there is none."""
    for line in mounts.read_text().splitlines():
        _, where, kind, options, *_ = line.split()
        if kind == "cgroup" and "cpu" in options.split(","):
            return Controller(root=Path(where), version=1)
        if kind == "cgroup2":
            listed = Path(where) / "cgroup.controllers"
            if listed.exists() and "cpu" in listed.read_text().split():
                return Controller(root=Path(where), version=2)
    raise UserError("device speeds can't be emulated: no CPU control group is mounted here; use --no-quota")


class Quotas:
    """One control group a host, named `{name}-{index}`."""

    def __init__(self, name: str, shares: tuple[float, ...], controller: Controller) -> None:
        self._shares, self._controller = shares, controller
        self.groups = tuple(controller.root / f"{name}-{i}" for i in range(len(shares)))

    def create(self) -> None:
        """Raises UserError where the groups can't be written."""
        try:
            if self._controller.version == 2:
                control = self._controller.root / "cgroup.subtree_control"
                if "cpu" not in control.read_text().split():
                    control.write_text("+cpu")
            for group, share in zip(self.groups, self._shares, strict=True):
                group.mkdir()
                quota = round(share * PERIOD_US)
                if self._controller.version == 2:
                    (group / "cpu.max").write_text(f"{quota} {PERIOD_US}")
                else:
                    (group / "cpu.cfs_period_us").write_text(str(PERIOD_US))
                    (group / "cpu.cfs_quota_us").write_text(str(quota))
        except OSError as error:
            raise UserError(
                f"device speeds can't be emulated: control groups can't be written here ({error.strerror}: "
                f"{error.filename}); use --no-quota"
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
