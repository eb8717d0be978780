"""The way back of updated parameters: buckets gathered from their owners while the next forward already runs."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import ExitStack
from functools import partial
from typing import Any

from torch import nn
from torch.overrides import TorchFunctionMode
from torch.utils.hooks import RemovableHandle

from heteromesh.comm.collectives.api import Collectives
from heteromesh.comm.interfaces import Work
from heteromesh.comm.records import Recorder
from heteromesh.parallel.state.flats import FlatBuckets


class ParameterGather:
    """Waits for buckets of parameters where they are used: in hooks before each module, and before any torch function.

    A module may use parameters that are not its own (tied weights; `nn.MultiheadAttention` reads its out_proj without
    calling it), so while buckets are under way the forward runs in a mode that looks at every torch function's
    arguments. Modules' own hooks serve calls of parts of the model, and kernels that are no torch functions.
    """

    def __init__(self, model: nn.Module, flats: FlatBuckets, collectives: Collectives, recorder: Recorder) -> None:
        """flats: the parameters, of which the first bucket is used last."""
        self._flats, self._collectives, self._recorder = flats.flats, collectives, recorder
        self._cuts = [bucket.cuts for bucket in flats.buckets]
        self.exposed_seconds = 0.0
        """Waited for parameters; whoever reads it sets it to zero."""
        self._home = {p: i for i, bucket in enumerate(flats.buckets) for p in bucket.parameters}
        self._pending: dict[int, tuple[Work, int]] = {}
        self._watch = _Watch(self)
        self._watching: ExitStack | None = None
        self._hooks = self._attach(model)

    def start(self) -> None:
        """Gathers every bucket, in the order of their first use."""
        for index in reversed(range(len(self._flats))):
            work = self._collectives.all_gather(self._flats[index], cuts=self._cuts[index])
            self._pending[index] = work, time.time_ns()

    def wait_all(self) -> None:
        """Returns when every parameter is up to date."""
        self.wait(list(self._pending))

    def wait(self, indices: Iterable[int]) -> None:
        """Returns when these buckets are here."""
        collectives, recorder = self._collectives, self._recorder
        for index in indices:
            under_way = self._pending.pop(index, None)
            if under_way is None:
                continue
            handle, launched = under_way
            start, clock, sent = time.time_ns(), time.perf_counter_ns(), collectives.sent_bytes
            handle.wait()
            waited = time.perf_counter_ns() - clock
            self.exposed_seconds += waited / 1e9
            sent, now = collectives.sent_bytes - sent, time.time_ns()
            recorder.add(f"parameter gather {index}", "comm", launched, now - launched, sent)
            recorder.add("parameter gather, exposed", "wait", start, waited)

    def wait_for(self, values: Iterable[Any]) -> None:
        """Waits for those of the values that are parameters under way; looks into lists, tuples and dicts."""
        for value in values:
            if isinstance(value, nn.Parameter):
                index = self._home.get(value)
                if index is not None:
                    self.wait((index,))
            elif isinstance(value, (list, tuple)):
                self.wait_for(value)
            elif isinstance(value, dict):
                self.wait_for(value.values())

    @property
    def under_way(self) -> bool:
        return bool(self._pending)

    def close(self) -> None:
        """Takes the hooks off the model."""
        for hook in self._hooks:
            hook.remove()
        self._hooks.clear()

    def _attach(self, model: nn.Module) -> list[RemovableHandle]:
        hooks: list[RemovableHandle] = []
        for module in model.modules():
            own = sorted({self._home[p] for p in module.parameters(recurse=False) if p in self._home}, reverse=True)
            if own:
                hooks.append(module.register_forward_pre_hook(partial(self._before, own)))
        hooks.append(model.register_forward_pre_hook(self._enter, prepend=True))
        hooks.append(model.register_forward_hook(self._leave, always_call=True))
        hooks.append(model.register_state_dict_pre_hook(lambda *_: self.wait_all()))
        return hooks

    def _before(self, buckets: Sequence[int], *_: object) -> None:
        if self._pending:
            self.wait(buckets)

    def _enter(self, *_: object) -> None:
        if self._pending and self._watching is None:
            self._watching = ExitStack()
            self._watching.enter_context(self._watch)

    def _leave(self, *_: object) -> None:
        if self._watching is not None:
            self._watching.close()
            self._watching = None


class _Watch(TorchFunctionMode):
    def __init__(self, gather: ParameterGather) -> None:
        super().__init__()
        self._gather = gather

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        if self._gather.under_way:
            self._gather.wait_for(args)
            self._gather.wait_for((kwargs or {}).values())
        return func(*args, **(kwargs or {}))
