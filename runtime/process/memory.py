"""How much memory this process has now, and has had at the most since it was last asked to forget."""

from __future__ import annotations

import ctypes
import gc
import math
import os
import resource
from contextlib import suppress
from pathlib import Path

import torch

_STATUS, _FORGET = Path("/proc/self/status"), Path("/proc/self/clear_refs")
_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3
"""Of malloc.h."""
LARGE_BLOCK = 1 << 20
_PEAK_ONLY = "5"
"""To clear_refs: VmHWM begins anew at what is resident now."""


def resident_bytes(device: torch.device) -> float:
    """Returns what is held now: of a CUDA device's memory what is not free, else what is resident of the process."""
    if device.type == "cuda":
        free, total = torch.cuda.mem_get_info(device)
        return float(total - free)
    return _status("VmRSS") or peak_bytes(device)


def peak_bytes(device: torch.device) -> float:
    """Returns the most that was held since `forget_peak`; where the kernel can't tell, since the process began."""
    if device.type == "cuda":
        beside = resident_bytes(device) - torch.cuda.memory_reserved(device)
        return float(torch.cuda.max_memory_reserved(device)) + beside
    return _status("VmHWM") or float(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss) * 1024


def forget_peak(device: torch.device) -> None:
    """Counts the most from here on; memory that was freed is given back first."""
    give_back(device)
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        return
    with suppress(OSError):
        _FORGET.write_text(_PEAK_ONLY)


def give_back(device: torch.device) -> None:
    """Gives the memory of what is no longer used back: allocators keep it for what comes."""
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()
        return
    with suppress(OSError, AttributeError):  # other C libraries have no such call
        ctypes.CDLL(None).malloc_trim(0)


def give_back_at_once(device: torch.device) -> None:
    """Has the C library give large blocks back as they are freed, from here on.

    glibc raises the size from which it does so to that of what was freed last, up to 32 MB, and keeps what is smaller:
    of gathered layers that come and go, a rank of 0.71 GB kept 75 MB.
    """
    if device.type == "cpu":
        with suppress(OSError, AttributeError):
            library = ctypes.CDLL(None)
            library.mallopt(_M_MMAP_THRESHOLD, LARGE_BLOCK)
            library.mallopt(_M_TRIM_THRESHOLD, LARGE_BLOCK)


def memory_limit(groups: Path = Path("/proc/self/cgroup"), mounts: Path = Path("/sys/fs/cgroup")) -> tuple[float, str]:
    """Returns the least memory in bytes that a control group of this process may use, and which one; infinite: none
    has a limit.
    """
    found = math.inf, ""
    with suppress(OSError):
        for line in groups.read_text().splitlines():
            number, controllers, path = line.split(":", 2)
            if number != "0" and "memory" not in controllers.split(","):
                continue
            roots = (mounts, mounts / "unified") if number == "0" else (mounts / "memory", mounts / controllers)
            name = "memory.max" if number == "0" else "memory.limit_in_bytes"
            for root in roots:
                # a container may see its own group as the root
                group = root / path.lstrip("/")
                above = [g for g in (group, *group.parents) if g.is_relative_to(root)]
                found = min([found, *(_limit_of(g / name) for g in above)])
    physical = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    return found if found[0] < physical else (math.inf, "")


def available_bytes() -> float:
    """Returns what memory the kernel could give to processes now, on this host."""
    with suppress(OSError):
        for line in Path("/proc/meminfo").read_text().splitlines():
            if line.startswith("MemAvailable:"):
                return float(line.split()[1]) * 1024
    return float(os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE"))


def _limit_of(file: Path) -> tuple[float, str]:
    with suppress(OSError, ValueError):
        return float(int(file.read_text())), str(file)
    return math.inf, ""


def _status(key: str) -> float:
    """Returns a size of the process in bytes, 0 where the kernel has no such file."""
    with suppress(OSError):
        for line in _STATUS.read_text().splitlines():
            if line.startswith(f"{key}:"):
                return float(line.split()[1]) * 1024
    return 0.0
