"""How many bytes of tensors live at once while a model runs: counted, as the process's own size tells nothing so small.

On CUDA devices torch's allocator counts. Elsewhere every operation's results are followed from here until their memory
is freed; what a kernel uses inside is not seen.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Mapping, Sequence
from types import TracebackType
from typing import Any, Protocol

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


class LiveBytes(Protocol):
    """Counts within a `with` block, which may be entered again."""

    @property
    def now(self) -> int:
        """Returns the bytes that were made in the block and live."""

    def peak_since(self) -> int:
        """Returns the most since the last call, and begins anew with what lives now."""

    def __enter__(self) -> object: ...

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None: ...


def live_bytes(device: torch.device) -> LiveBytes:
    """Returns a counter for the device."""
    return _OnDevice(device) if device.type == "cuda" else _Followed()


class _Followed(TorchDispatchMode):
    """Of this thread's operations; enter it on each thread that works."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.now = self._peak = 0
        self._known: set[int] = set()

    def peak_since(self) -> int:
        peak, self._peak = self._peak, self.now
        return peak

    def __torch_dispatch__(
        self,
        func: Callable[..., Any],
        types: Sequence[type],
        args: Sequence[Any] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        for leaf in tree_leaves((args, kwargs)):
            if isinstance(leaf, torch.Tensor):
                # what comes from before is not the operation's
                self._seen(leaf, 0)
        made = func(*args, **(kwargs or {}))
        for leaf in tree_leaves(made):
            if isinstance(leaf, torch.Tensor):
                storage = leaf.untyped_storage()
                self._seen(leaf, storage.nbytes())
        self._peak = max(self._peak, self.now)
        return made

    def _seen(self, tensor: torch.Tensor, nbytes: int) -> None:
        storage = tensor.untyped_storage()
        key = storage._cdata
        if key in self._known:
            return
        self._known.add(key)
        self.now += nbytes
        weakref.finalize(storage, self._freed, key, nbytes)

    def _freed(self, key: int, nbytes: int) -> None:
        self._known.discard(key)
        self.now -= nbytes


class _OnDevice:
    def __init__(self, device: torch.device) -> None:
        self._device, self._before = device, 0

    @property
    def now(self) -> int:
        return int(torch.cuda.memory_allocated(self._device)) - self._before

    def peak_since(self) -> int:
        peak = int(torch.cuda.max_memory_allocated(self._device)) - self._before
        torch.cuda.reset_peak_memory_stats(self._device)
        return peak

    def __enter__(self) -> object:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        return
