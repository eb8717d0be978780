"""What NVIDIA's management library says of a rank's device: clocks, PCIe, NVLink, and whether it is held back."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

_REASONS = {
    0x4: "its power limit",
    0x8: "a hardware slowdown",
    0x20: "heat",
    0x40: "heat",
    0x80: "a power brake",
}
"""Bits of nvmlClocksEventReasons that mean less than the device could do."""


@dataclass(frozen=True, slots=True, kw_only=True)
class NvidiaFacts:
    """One device, as it was when asked."""

    name: str
    memory_bytes: int
    sm_mhz: int
    sm_mhz_most: int
    pcie: str
    """Generation and lanes in use, of what the device could: `gen4 x8 of gen4 x16`."""
    nvlinks: int
    """NVLink lanes that are up."""
    held_back_by: tuple[str, ...]


def nvidia_facts(device: torch.device) -> NvidiaFacts | None:
    """Asks about a CUDA device, best while it works; None without nvidia-ml-py or where the driver does not answer."""
    try:
        library = importlib.import_module("pynvml")
        library.nvmlInit()
    except Exception:  # a missing package, or NVMLError, whose class is in that package
        return None
    try:
        # CUDA_VISIBLE_DEVICES renumbers devices for torch and not for the library
        uuid = str(torch.cuda.get_device_properties(device).uuid)
        handle = library.nvmlDeviceGetHandleByUUID(uuid if uuid.startswith("GPU-") else f"GPU-{uuid}")
        return _read(library, handle)
    except library.NVMLError:
        return None
    finally:
        library.nvmlShutdown()


def _read(library: Any, handle: Any) -> NvidiaFacts:
    def ask(call: str, *words: object, default: Any = 0) -> Any:
        """Devices differ in what they can tell."""
        try:
            function: Callable[..., Any] = getattr(library, call)
            return function(handle, *words)
        except (AttributeError, library.NVMLError):
            return default

    name = library.nvmlDeviceGetName(handle)
    now = (ask("nvmlDeviceGetCurrPcieLinkGeneration"), ask("nvmlDeviceGetCurrPcieLinkWidth"))
    most = (ask("nvmlDeviceGetMaxPcieLinkGeneration"), ask("nvmlDeviceGetMaxPcieLinkWidth"))
    reasons = ask("nvmlDeviceGetCurrentClocksEventReasons", default=None)
    if reasons is None:
        reasons = ask("nvmlDeviceGetCurrentClocksThrottleReasons")
    return NvidiaFacts(
        name=name.decode() if isinstance(name, bytes) else str(name),
        memory_bytes=int(library.nvmlDeviceGetMemoryInfo(handle).total),
        sm_mhz=ask("nvmlDeviceGetClockInfo", library.NVML_CLOCK_SM),
        sm_mhz_most=ask("nvmlDeviceGetMaxClockInfo", library.NVML_CLOCK_SM),
        pcie=f"gen{now[0]} x{now[1]} of gen{most[0]} x{most[1]}",
        nvlinks=sum(bool(ask("nvmlDeviceGetNvLinkState", i)) for i in range(library.NVML_NVLINK_MAX_LINKS)),
        held_back_by=tuple(sorted({text for bit, text in _REASONS.items() if reasons & bit})),
    )
