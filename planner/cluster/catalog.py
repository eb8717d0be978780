"""The usual devices, from their makers' data sheets: dense bf16 peak (fp16 where there is no bf16), no sparsity.

Links are each way, per device: NVLink or Infinity Fabric where the usual board has it, else the PCIe slot.
`cpu` is one process on one core of a server; only ratios between ranks matter there, so it is a round guess.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType


@dataclass(frozen=True, slots=True, kw_only=True)
class Device:
    """What one device can do at most."""

    tflops: float
    """Dense bf16 peak, TFLOP/s."""
    memory_gb: float
    memory_gbps: float
    """Device memory bandwidth, GB/s."""
    link_gbps: float
    """Device to device inside a host, GB/s each way."""


def _device(tflops: float, memory_gb: float, memory_gbps: float, link_gbps: float) -> Device:
    return Device(tflops=tflops, memory_gb=memory_gb, memory_gbps=memory_gbps, link_gbps=link_gbps)


CATALOG: Mapping[str, Device] = MappingProxyType(
    {
        "A10-24GB": _device(125, 24, 600, 32),
        "A30-24GB": _device(165, 24, 933, 100),
        "A40-48GB": _device(150, 48, 696, 56),
        "A100-40GB": _device(312, 40, 1555, 300),
        "A100-80GB": _device(312, 80, 2039, 300),
        "A800-80GB": _device(312, 80, 2039, 200),
        "B200-180GB": _device(2250, 180, 8000, 900),
        "H20-96GB": _device(148, 96, 4000, 450),
        "H100-80GB": _device(989, 80, 3350, 450),
        "H100-PCIe-80GB": _device(756, 80, 2000, 64),
        "H200-141GB": _device(989, 141, 4800, 450),
        "H800-80GB": _device(989, 80, 3350, 200),
        "L4": _device(121, 24, 300, 32),
        "L40S": _device(362, 48, 864, 32),
        "MI300X-192GB": _device(1307, 192, 5300, 448),
        "RTX-3090": _device(71, 24, 936, 32),
        "RTX-4090": _device(165, 24, 1008, 32),
        "RTX-5090": _device(209, 32, 1792, 64),
        "RTX-A6000": _device(155, 48, 768, 56),
        "T4": _device(65, 16, 320, 16),
        "V100-16GB": _device(125, 16, 900, 150),
        "V100-32GB": _device(125, 32, 900, 150),
        "cpu": _device(0.05, 4, 10, 4),
    }
)
