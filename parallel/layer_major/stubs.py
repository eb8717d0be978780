"""What stands in for a model's layers: in a pass's thread a call is handed to the scheduler, elsewhere it is a call."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import wraps
from typing import Any

import torch
from torch import nn

from heteromesh.errors import UserError
from heteromesh.parallel.attention.scope import never_compiled
from heteromesh.parallel.layer_major.arguments import WAY_OUT
from heteromesh.parallel.layer_major.baton import PassThread
from heteromesh.parallel.layer_major.forwards import ForwardThread
from heteromesh.parallel.layer_major.layer_call import Layer, LayerCall

_COMPILED, _CHECKPOINTED = "_compiled_call_impl", "gradient_checkpointing"


class LayerStubs:
    """Stands in for the layers of a model until `close`.

    Layers that a model itself computes again (Transformers' gradient checkpointing) no longer are: all are.
    """

    def __init__(self, model: nn.Module, layers: dict[str, nn.Module], device: torch.device) -> None:
        self._device = device
        self._inside = ""
        """The layer that runs now."""
        self._flags = [m for m in model.modules() if getattr(m, _CHECKPOINTED, False) is True]
        for module in self._flags:
            module.gradient_checkpointing = False  # type: ignore[assignment]
        self._stood_in: list[tuple[nn.Module, str, Any]] = []
        self.layers = tuple(self._stand_in(i, name, module) for i, (name, module) in enumerate(layers.items()))

    def close(self) -> None:
        """Gives the layers back what they had."""
        for module, name, before in self._stood_in:
            if before is None:
                delattr(module, name)
            else:
                setattr(module, name, before)
        for module in self._flags:
            module.gradient_checkpointing = True  # type: ignore[assignment]
        self._stood_in.clear()
        self._flags.clear()

    @contextmanager
    def inside(self, layer: Layer) -> Iterator[None]:
        """Says that this layer runs within the block, so that a call of another one comes from inside it."""
        self._inside = layer.name
        try:
            yield
        finally:
            self._inside = ""

    def _stand_in(self, index: int, name: str, module: nn.Module) -> Layer:
        # what is compiled is the call with all hooks: it is one thing
        compiled = module._compiled_call_impl
        attribute, forward = (_COMPILED, compiled) if compiled is not None else ("forward", module.forward)
        observed = [m for m in module.modules() if m is not module or compiled is not None]
        layer = Layer(index, name, module, forward, tuple(observed))
        self._stood_in.append((module, attribute, vars(module).get(attribute)))
        setattr(module, attribute, self._stub(layer))
        return layer

    def _stub(self, layer: Layer) -> Callable[..., Any]:
        @never_compiled
        @wraps(layer.forward)
        def stub(*args: Any, **kwargs: Any) -> Any:
            thread = threading.current_thread()
            if isinstance(thread, ForwardThread):
                thread.wait(layer.index)
                return layer.forward(*args, **kwargs)
            if isinstance(thread, PassThread):
                call = LayerCall(layer, args, kwargs, self._device)
                thread.wait(call)
                return call.outputs()
            if self._inside:
                raise UserError(
                    f"layer {layer.name} is called from inside layer {self._inside}: layers of the model's lists must "
                    f"be called by what is outside them, one after the other, or {WAY_OUT}"
                )
            return layer.forward(*args, **kwargs)

        return stub
