"""Forward hooks of modules inside a layer: held back while it runs, called when its outputs are in the pass's graph.

Such hooks look on (Transformers collects routers' logits so). Inside a layer that runs without a graph they would see
tensors that lead nowhere, and see them twice.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

from torch import nn

from heteromesh.errors import UserError
from heteromesh.parallel.layer_major.arguments import WAY_OUT


class HookCall(NamedTuple):
    """A call of a module that hooks are to be told of."""

    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    output: Any


class HeldHooks:
    """The hooks of a layer's modules that are held back, and the calls that they miss."""

    def __init__(self) -> None:
        self.calls: list[HookCall] = []
        self.missed: list[tuple[nn.Module, list[tuple[Callable[..., Any], bool]]]] = []
        """Of each call, the module and its hooks; whether a hook takes keywords."""

    @contextmanager
    def of(self, modules: Sequence[nn.Module]) -> Iterator[None]:
        """Holds the hooks of these modules back within the block."""
        held = [(module, module._forward_hooks) for module in modules if _foreign(module)]
        for module, hooks in held:
            kept = OrderedDict((number, hook) for number, hook in hooks.items() if _is_ours(hook))
            module._forward_hooks = kept
            module._forward_hooks[-1] = self._noting(_foreign_of(module, hooks))
            module._forward_hooks_with_kwargs[-1] = True
        try:
            yield
        finally:
            for module, hooks in held:
                module._forward_hooks = hooks
                del module._forward_hooks_with_kwargs[-1]

    def _noting(self, hooks: list[tuple[Callable[..., Any], bool]]) -> Callable[..., None]:
        def note(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
            self.calls.append(HookCall(args, kwargs, output))
            self.missed.append((module, hooks))

        return note

    def replay(self, calls: Sequence[HookCall], layer: str) -> None:
        """Calls the hooks with the calls' values as they are in the pass's graph. Raises UserError where one returns
        something."""
        for (module, hooks), call in zip(self.missed, calls, strict=True):
            for hook, takes_keywords in hooks:
                given = (call.args, call.kwargs) if takes_keywords else (call.args,)
                if hook(module, *given, call.output) is not None:
                    raise UserError(
                        f"a forward hook of {type(module).__name__} in layer {layer} returns something: all passes go "
                        f"through a layer before hooks inside it are called; have it return None, or {WAY_OUT}"
                    )


def _foreign(module: nn.Module) -> bool:
    return any(not _is_ours(hook) for hook in module._forward_hooks.values())


def _foreign_of(module: nn.Module, hooks: Mapping[int, Any]) -> list[tuple[Callable[..., Any], bool]]:
    takes = module._forward_hooks_with_kwargs
    return [(hook, number in takes) for number, hook in hooks.items() if not _is_ours(hook)]


def _is_ours(hook: Any) -> bool:
    """Says whether a hook is part of what the layer computes: those that have rotary embeddings follow lengths."""
    return str(getattr(hook, "__module__", "")).startswith("heteromesh.")
