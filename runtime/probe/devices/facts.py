"""What a rank can say about its machine without measuring: names, cores, memory, network interfaces."""

from __future__ import annotations

import math
import os
import platform
import re
import socket
from dataclasses import dataclass
from pathlib import Path

import torch

from heteromesh.comm.world import World, local_rank
from heteromesh.runtime.network.interfaces import Interface, interfaces
from heteromesh.runtime.probe.devices.nvidia import NvidiaFacts, nvidia_facts

PROC = Path("/proc")
CGROUPS = Path("/sys/fs/cgroup")


@dataclass(frozen=True, slots=True, kw_only=True)
class Facts:
    """One rank's machine and device."""

    host: str
    """The launcher's number of the host, equal for its ranks."""
    hostname: str
    local_rank: int
    local_ranks: int
    device: str
    """The maker's name of the device; a CPU's with the cores that a rank has: `amd-epyc-1c`."""
    memory_bytes: float
    """Of the device; of a CPU, the rank's share of what the host or its container has."""
    cores: float
    """CPU cores that a rank has: those it may run on, at most the container's quota, over the host's ranks."""
    quota: float | None
    """Cores that a CPU quota allows the host's processes together."""
    threads: int
    interfaces: tuple[Interface, ...]
    nvidia: NvidiaFacts | None


def collect_facts(world: World) -> Facts:
    """This rank's."""
    ranks = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    quota = cpu_quota()
    cores = min(float(len(os.sched_getaffinity(0))), quota or math.inf) / ranks
    cuda = world.device.type == "cuda"
    properties = torch.cuda.get_device_properties(world.device) if cuda else None
    name = properties.name if properties else f"{_slug(cpu_model())}-{cores:.3g}c"
    return Facts(
        host=os.environ.get("GROUP_RANK", "0"),
        hostname=socket.gethostname().partition(".")[0] or "host",
        local_rank=local_rank(),
        local_ranks=ranks,
        device=name,
        memory_bytes=float(properties.total_memory) if properties else host_memory() / ranks,
        cores=cores,
        quota=quota,
        threads=torch.get_num_threads(),
        interfaces=interfaces(),
        nvidia=nvidia_facts(world.device) if cuda else None,
    )


def cpu_model(proc: Path = PROC) -> str:
    """Returns the CPU's name as the kernel has it."""
    try:
        found = re.search(r"^model name\s*:\s*(.+)$", (proc / "cpuinfo").read_text(), re.MULTILINE)
    except OSError:
        found = None
    return found.group(1).strip() if found else platform.processor() or platform.machine() or "cpu"


def cpu_quota(proc: Path = PROC, cgroups: Path = CGROUPS) -> float | None:
    """Cores that the control groups of this process allow it (version 1 and 2); None: no limit.

    The least of the process's own group and those above it, as far as they are visible here.
    """
    try:
        lines = (proc / "self/cgroup").read_text().splitlines()
    except OSError:
        return None
    limits = []
    for line in lines:
        _, controllers, path = line.split(":", 2)
        if not controllers:
            limits += _walk(cgroups, path, _quota_v2) + _walk(cgroups / "unified", path, _quota_v2)
        elif "cpu" in controllers.split(","):
            for root in {cgroups / "cpu", cgroups / controllers}:
                limits += _walk(root, path, _quota_v1)
    return min(limits, default=None)


def host_memory(proc: Path = PROC, cgroups: Path = CGROUPS) -> float:
    """Bytes of memory that the processes of this host may use: the machine's, at most a container's limit."""
    total = float(os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE"))
    for limit in (cgroups / "memory.max", cgroups / "memory/memory.limit_in_bytes"):
        text = limit.read_text().strip() if limit.exists() else "max"
        total = min(total, float(text) if text.isdigit() else math.inf)
    return total


def _walk(root: Path, path: str, read: object) -> list[float]:
    """Returns what `read` finds in the group and all above it up to the root."""
    group, found = root / path.lstrip("/"), []
    assert callable(read)
    while True:
        value = read(group)
        if value is not None:
            found.append(value)
        if group == root or root not in group.parents:
            return found
        group = group.parent


def _quota_v1(group: Path) -> float | None:
    try:
        quota = int((group / "cpu.cfs_quota_us").read_text())
        period = int((group / "cpu.cfs_period_us").read_text())
    except (OSError, ValueError):
        return None
    return quota / period if quota > 0 else None


def _quota_v2(group: Path) -> float | None:
    try:
        quota, period = (group / "cpu.max").read_text().split()
        return None if quota == "max" else int(quota) / int(period)
    except (OSError, ValueError):
        return None


def _slug(text: str) -> str:
    """Returns the name in lower case, words joined by dashes, without marks and clock rates."""
    plain = re.sub(r"\((r|tm)\)|@.*|\bcpu\b|\bprocessor\b|\bwith\b.*", "", text.lower())
    return "-".join(re.findall(r"[a-z0-9.]+", plain)) or "cpu"
