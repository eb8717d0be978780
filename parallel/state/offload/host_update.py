"""AdamW on host memory: our one pass where it gives the bits of torch's fused AdamW, torch's own otherwise.

The update reads a gradient (fp32 or bf16) once, updates fp32 state in place and writes the weight (fp32 or bf16) in the
same pass, where torch needs three. torch's fused kernel treats the last few elements of a tensor in another way than
the rest, by its vectors' width. Ours is told where those are, and does the same wherever a tensor is cut.
"""

from __future__ import annotations

import ctypes
import logging
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cache
from itertools import product
from typing import Protocol

import torch

from heteromesh.parallel.state.offload.build import NotBuiltError, load_library

logger = logging.getLogger(__name__)

WIDTHS = (8, 16, 4)
"""Elements of a vector of fp32 that torch may use."""
_PIECE = 1 << 21
"""Elements that torch's update takes at once, so that what it needs beside them is small."""
_KINDS = {torch.float32: 1, torch.bfloat16: 2}


@dataclass(frozen=True, slots=True)
class AdamOptions:
    """Hyperparameters of a parameter in one step."""

    lr: float
    beta1: float
    beta2: float
    eps: float
    weight_decay: float
    step: int
    """Number of this update, from 1 on."""
    maximize: bool = False


State = tuple[torch.Tensor, torch.Tensor, torch.Tensor]
"""Parameter and first and second moment, each (n,) fp32."""


@dataclass(slots=True)
class SegmentUpdate:
    """The update of consecutive elements of one parameter."""

    state: State
    gradient: torch.Tensor
    """(n,)"""
    options: AdamOptions
    first: int
    """Of the parameter's elements the first one here."""
    of: int
    """Elements of the parameter."""
    weight: torch.Tensor | None = None
    """(n,): receives the updated parameter in its own dtype."""
    out: State | None = None
    """Receives the new state, which otherwise replaces the old."""

    @property
    def target(self) -> State:
        """Returns where the new state goes."""
        return self.state if self.out is None else self.out


class HostUpdate(Protocol):
    """Updates segments."""

    name: str

    def __call__(self, segments: Sequence[SegmentUpdate], threads: int) -> None:
        """Returns when all have been updated."""


class TorchUpdate(HostUpdate):
    """torch's fused AdamW, slice by slice; on any device that has it.

    Exact where slices begin at multiples of WIDTHS, which those of subgroups do and fragments of others may not.
    """

    name = "torch"

    def __call__(self, segments: Sequence[SegmentUpdate], threads: int = 1) -> None:
        del threads  # torch's own
        for segment in segments:
            numel, device = segment.gradient.numel(), segment.state[0].device
            piece = min(numel, _PIECE) if device.type == "cpu" else numel
            wide = torch.empty(0 if segment.gradient.dtype == torch.float32 else piece, device=device)
            for start in range(0, numel, max(1, piece)):
                self._update(segment, slice(start, start + piece), wide)

    def _update(self, segment: SegmentUpdate, cut: slice, wide: torch.Tensor) -> None:
        p, m, v = (t[cut] for t in segment.target)
        if segment.out is not None:
            for new, old in zip((p, m, v), segment.state, strict=True):
                new.copy_(old[cut])
        gradient, options = segment.gradient[cut], segment.options
        if gradient.dtype != torch.float32:
            gradient = wide[: gradient.numel()].copy_(gradient)
        step = torch.tensor(float(options.step), device=p.device)
        torch._fused_adamw_(
            [p], [gradient], [m], [v], [], [step],
            lr=options.lr, beta1=options.beta1, beta2=options.beta2, weight_decay=options.weight_decay,
            eps=options.eps, amsgrad=False, maximize=options.maximize,
        )  # fmt: skip
        if segment.weight is not None:
            segment.weight[cut].copy_(p)


class _Segment(ctypes.Structure):
    _fields_ = [
        *((name, ctypes.c_void_p) for name in ("p", "m", "v", "p_out", "m_out", "v_out", "gradient", "weight")),
        *((name, ctypes.c_int64) for name in ("numel", "tail")),
        *((name, ctypes.c_double) for name in ("lr", "beta1", "beta2", "eps", "decay", "step")),
        *((name, ctypes.c_int32) for name in ("gradient_is_bf16", "weight_kind", "maximize", "unused")),
    ]


class _Rounding(ctypes.Structure):
    _fields_ = [("body", ctypes.c_int32), ("tail", ctypes.c_int32)]


class CompiledUpdate(HostUpdate):
    """Our one pass."""

    name = "one pass"

    def __init__(self, library: ctypes.CDLL, width: int, body: int, tail: int) -> None:
        """width: elements of torch's vectors. body, tail: which products of the second moment are fused there."""
        self._call = library.heteromesh_adamw
        self._call.restype = None
        self._call.argtypes = [ctypes.c_void_p, ctypes.c_int64, ctypes.c_void_p, ctypes.c_int32]
        self._width, self._rounding = width, _Rounding(body, tail)

    def __call__(self, segments: Sequence[SegmentUpdate], threads: int) -> None:
        alive: list[torch.Tensor] = []
        records = (_Segment * len(segments))(*(self._record(s, alive) for s in segments))
        # ctypes lets go of the interpreter meanwhile
        self._call(ctypes.addressof(records), len(segments), ctypes.addressof(self._rounding), threads)
        for segment in segments:
            if segment.weight is not None and segment.weight.dtype not in _KINDS:
                segment.weight.copy_(segment.target[0])

    def _record(self, segment: SegmentUpdate, alive: list[torch.Tensor]) -> _Segment:
        gradient, weight, options = segment.gradient, segment.weight, segment.options
        if gradient.dtype not in _KINDS or not gradient.is_contiguous():
            gradient = gradient.to(torch.float32).contiguous()
            alive.append(gradient)
        kind = 0 if weight is None else _KINDS.get(weight.dtype, 0)
        numel = gradient.numel()
        return _Segment(
            *(t.data_ptr() for t in segment.state),
            *(t.data_ptr() for t in segment.target),
            gradient.data_ptr(),
            weight.data_ptr() if kind and weight is not None else 0,
            numel,
            min(numel, max(0, segment.of // self._width * self._width - segment.first)),
            *(options.lr, options.beta1, options.beta2, options.eps, options.weight_decay, float(options.step)),
            *(gradient.dtype == torch.bfloat16, kind, options.maximize, 0),
        )


@cache
def open_host_update() -> HostUpdate:
    """Returns the fastest update that is exact here; logs why where that is torch's own."""
    try:
        library = load_library()
    except NotBuiltError as error:
        logger.warning("optimizer offload updates with torch's fused AdamW, in three passes: %s", error)
        return TorchUpdate()
    for body in range(3):
        if _equals_torch(CompiledUpdate(library, 16, body, body), (64, 4096)):
            for width, tail in product(WIDTHS, range(3)):
                update = CompiledUpdate(library, width, body, tail)
                if _equals_torch(update, (*range(1, 34), 1007)):
                    return update
    logger.warning(
        "optimizer offload updates with torch's fused AdamW, in three passes: ours rounds otherwise on this processor"
    )
    return TorchUpdate()


def _equals_torch(update: HostUpdate, sizes: Sequence[int]) -> bool:
    """Tries three steps of tensors of these sizes, with several hyperparameters, and compares all bits."""
    noise = torch.Generator().manual_seed(0)
    several = [AdamOptions(1e-2, 0.9, 0.95, 1e-8, 0.1, 0), AdamOptions(0.1, 0.3, 0.999, 1e-3, 0.0, 0, maximize=True)]
    for size, options in product(sizes, several):
        ours: State = (torch.randn(size, generator=noise), torch.zeros(size), torch.zeros(size))
        theirs: State = (ours[0].clone(), ours[1].clone(), ours[2].clone())
        for step in range(1, 4):
            gradient, now = torch.randn(size, generator=noise), replace(options, step=step)
            update([SegmentUpdate(ours, gradient, now, 0, size)], 1)
            TorchUpdate()([SegmentUpdate(theirs, gradient, now, 0, size)])
        if not all(torch.equal(a, b) for a, b in zip(ours, theirs, strict=True)):
            return False
    return True
