"""Which device of the catalogue a maker's name means, and a description of those that are not in it."""

from __future__ import annotations

import re
import statistics
from collections.abc import Mapping, Sequence

from heteromesh.planner.cluster.catalog import CATALOG, Device

MEMORY_TOLERANCE = 0.15
"""Drivers report GiB where data sheets have GB, less what they keep for themselves."""


def catalogue_name(maker: str, memory_bytes: float, catalogue: Mapping[str, Device] = CATALOG) -> str | None:
    """Returns the catalogue's name of the device that its maker calls so; None: it is not there.

    All words of the catalogue's name but its memory must be in the maker's, and the memory must agree; of several the
    one with the most words is meant, then the one with the nearest memory.
    """
    words = set(re.findall(r"[a-z0-9]+", maker.lower()))
    best: tuple[int, float, str] | None = None
    for name, device in catalogue.items():
        wanted = {w for w in re.findall(r"[a-z0-9]+", name.lower()) if not re.fullmatch(r"\d+gb", w)}
        off = abs(memory_bytes / 1e9 / device.memory_gb - 1)
        if name == "cpu" or not wanted <= words or off > MEMORY_TOLERANCE:
            continue
        best = max(best or (0, 0.0, ""), (len(wanted), -off, name))
    return best[2] if best else None


def describe(tflops: Sequence[float], memory_bytes: Sequence[float], memory: Sequence[float], link: float) -> Device:
    """Makes a device of what its ranks measured (TFLOP/s, bytes, GB/s); link: GB/s between two of them, 0: unknown."""
    copied = statistics.median(memory)
    return Device(
        tflops=_round(statistics.median(tflops)),
        memory_gb=_round(min(memory_bytes) / 1e9),
        memory_gbps=_round(copied),
        link_gbps=_round(link or copied / 2),
    )


def _round(value: float) -> float:
    return float(f"{value:.3g}")
