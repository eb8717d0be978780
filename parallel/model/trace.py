"""What the modules of a model make of a few tokens, in few numbers, so that two runs can be compared layer by layer."""

from __future__ import annotations

import threading
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from heteromesh.parallel.model.call import plain_name

_NUMBERS = 4
"""By token, of each tensor: sums with random signs, in which a difference shows with near certainty."""


@dataclass(slots=True)
class Call:
    """One call of a module: by token (n, 4) what went in and what came out; None where that is not by token."""

    given: torch.Tensor | None
    made: torch.Tensor | None


@dataclass(slots=True)
class Trace:
    """The calls of one run, by module and number of the call, in the order in which they ended."""

    tokens: int
    calls: dict[tuple[str, int], Call] = field(default_factory=dict)
    begun: list[Call] = field(default_factory=list)
    counts: Counter[str] = field(default_factory=Counter)

    @staticmethod
    def joined(parts: Sequence[Trace]) -> Trace:
        """Returns the calls of a run whose tokens were dealt to several threads, in their order."""
        whole = Trace(sum(part.tokens for part in parts))
        for key in parts[0].calls:
            calls = [part.calls[key] for part in parts if key in part.calls]
            if len(calls) == len(parts):
                whole.calls[key] = Call(_cat([c.given for c in calls]), _cat([c.made for c in calls]))
        return whole


class Tracer:
    """Notes the calls of a model's modules, run by run and thread by thread."""

    def __init__(self, model: nn.Module) -> None:
        self._model = model
        self._traces: dict[int, Trace] = {}
        self._signs: dict[tuple[int, torch.device, torch.dtype], torch.Tensor] = {}
        self._lock = threading.Lock()

    @contextmanager
    def attached(self) -> Iterator[None]:
        """Has hooks on all modules within the block."""
        hooks = []
        for name, module in self._model.named_modules():
            hooks.append(module.register_forward_pre_hook(self._before, with_kwargs=True))
            hooks.append(module.register_forward_hook(self._after(plain_name(name) or "the model")))
        try:
            yield
        finally:
            for hook in hooks:
                hook.remove()

    @contextmanager
    def run(self, tokens: int) -> Iterator[Trace]:
        """Notes this thread's calls within the block, of a run of so many tokens."""
        trace = self._traces[threading.get_ident()] = Trace(tokens)
        try:
            yield trace
        finally:
            del self._traces[threading.get_ident()]

    def _before(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        trace = self._traces.get(threading.get_ident())
        if trace is not None:
            trace.begun.append(Call(self._numbers(trace, (*args, *kwargs.values())), None))

    def _after(self, name: str) -> Any:
        def hook(module: nn.Module, args: Any, output: Any) -> None:
            trace = self._traces.get(threading.get_ident())
            if trace is not None and trace.begun:
                call = trace.begun.pop()
                call.made = self._numbers(trace, output)
                trace.calls[name, trace.counts[name]] = call
                trace.counts[name] += 1

        return hook

    def _numbers(self, trace: Trace, values: Any) -> torch.Tensor | None:
        """Returns numbers (n, 4) of the first tensor (1, n, ...) among the values."""
        tensor = _first_by_token(values, trace.tokens)
        if tensor is None:
            return None
        rows = tensor.detach().reshape(trace.tokens, -1)
        rows = rows.to(torch.float64 if rows.dtype == torch.float64 else torch.float32)
        return (rows @ self._sign(rows)).cpu().double()

    def _sign(self, rows: torch.Tensor) -> torch.Tensor:
        key = rows.shape[1], rows.device, rows.dtype
        with self._lock:
            if key not in self._signs:
                drawn = torch.randint(2, (key[0], _NUMBERS), generator=torch.Generator().manual_seed(0))
                self._signs[key] = (2 * drawn - 1).to(key[1], key[2])
            return self._signs[key]


def _first_by_token(values: Any, tokens: int) -> torch.Tensor | None:
    if isinstance(values, torch.Tensor):
        fits = values.is_floating_point() and values.dim() >= 2 and tuple(values.shape[:2]) == (1, tokens)
        return values if fits else None
    if isinstance(values, dict):
        values = tuple(values.values())
    if isinstance(values, (tuple, list)):
        return next((t for v in values if (t := _first_by_token(v, tokens)) is not None), None)
    return None


def _cat(parts: Sequence[torch.Tensor | None]) -> torch.Tensor | None:
    present = [part for part in parts if part is not None]
    return torch.cat(present) if present and len(present) == len(parts) else None
