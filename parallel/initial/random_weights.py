"""Random first weights, module by module: the same on every rank, whatever the number of ranks.

As torch's convention has it (FSDP's too), `reset_parameters()` of a module fills the parameters that are its own;
models of Transformers have `_init_weights(module)`, which may also change what is below a module (GPT-2's projections),
and PEFT's LoRA layers `reset_lora_parameters`. These are called for a copy of the module whose parameters have memory,
in a copy of the model in which all others are on the meta device: that costs one module's weights at a time.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from typing import Any

import torch
from torch import nn

from heteromesh.errors import UserError
from heteromesh.parallel.model.call import plain_name
from heteromesh.parallel.state.weight_source import WeightSource

_LORA = "reset_lora_parameters"
_LORA_INITS = (True, "gaussian")
"""Of PEFT's ways to initialise adapters those that need no weights of the base."""


class RandomWeights(WeightSource):
    """The first weights of a model that no file has."""

    def __init__(self, model: nn.Module, seed: int) -> None:
        """model: as it is now; its parameters may have other memory later, or none."""
        self._seed = seed
        self._root, copies = _copied(model)
        self._owners: dict[nn.Parameter, str] = {}
        self._places: dict[nn.Parameter, str] = {}
        for name, module in model.named_modules():
            for own, parameter in module.named_parameters(recurse=False):
                self._owners.setdefault(parameter, name)
                self._places.setdefault(parameter, own)
        self._copies = {name: copies[id(module)] for name, module in model.named_modules()}
        self._last: tuple[str, dict[str, nn.Parameter]] = ("", {})

    def read(self, parameter: nn.Parameter, start: int, stop: int) -> torch.Tensor:
        """See WeightSource. Raises UserError where nothing initialises the parameter."""
        owner = self._owners[parameter]
        if not self._last[1] or self._last[0] != owner:
            self._last = "", {}  # before the next one is made
            self._last = owner, self._made(owner)
        return self._last[1][self._places[parameter]].detach().view(-1)[start:stop]

    def forget(self) -> None:
        """Gives the memory of the last module back."""
        self._last = "", {}

    def check(self, parameters: Sequence[nn.Parameter]) -> None:
        """Raises UserError where a module that owns one of these has nothing that would initialise it."""
        for parameter in parameters:
            path = self._path(self._owners[parameter])
            if hasattr(path[-1], "reset_parameters") or any(_is_transformers(m) for m in path):
                continue
            raise UserError(self._sentence(self._owners[parameter], self._places[parameter]))

    def adapters(self, parameters: Sequence[nn.Parameter]) -> set[nn.Parameter]:
        """Returns those that are of adapters, which files of the base model don't have."""
        return {
            p
            for p in parameters
            if "lora_" in f"{self._owners[p]}.{self._places[p]}"
            and any(hasattr(m, _LORA) for m in self._path(self._owners[p]))
        }

    def _path(self, name: str) -> list[nn.Module]:
        """Returns the copies from the model down to a module."""
        parts = name.split(".") if name else []
        return [self._copies[".".join(parts[:depth])] for depth in range(len(parts) + 1)]

    def _made(self, name: str) -> dict[str, nn.Parameter]:
        """Returns a module's own parameters, initialised."""
        path = self._path(name)
        module = path[-1]
        before, buffers = dict(module._parameters), dict(module._buffers)
        fresh = {
            own: nn.Parameter(torch.full(p.shape, torch.nan, dtype=p.dtype), requires_grad=False)
            for own, p in before.items()
            if p is not None
        }
        try:
            module._parameters.update(fresh)
            # the model's own: what resets a module resets running statistics too
            module._buffers = {k: b.clone() if b is not None else None for k, b in buffers.items()}
            with torch.random.fork_rng(devices=[]), torch.no_grad():
                # not torch.manual_seed, which would seed devices too
                torch.default_generator.manual_seed(_seed(self._seed, plain_name(name)))
                self._initialise(path)
                reset: Any = getattr(module, "reset_parameters", None)
                if reset is not None and _unfilled(fresh):
                    reset()
        finally:
            module._parameters.update(before)
            module._buffers = buffers
        for own in _unfilled(fresh):
            raise UserError(self._sentence(name, own))
        return fresh

    def _initialise(self, path: Sequence[nn.Module]) -> None:
        """Calls what fills the last module's parameters; what is above it comes after it."""
        for depth in reversed(range(len(path))):
            module: Any = path[depth]
            model: Any = next((m for m in reversed(path[: depth + 1]) if _is_transformers(m)), None)
            if model is not None:
                model._init_weights(module)
            if hasattr(module, _LORA):
                for adapter in module.active_adapters:
                    module.reset_lora_parameters(adapter, self._lora_init(adapter))

    def _lora_init(self, adapter: str) -> Any:
        config = getattr(self._root, "peft_config", {}).get(adapter)
        init = getattr(config, "init_lora_weights", True)
        if init not in _LORA_INITS:
            raise UserError(
                f"the adapter {adapter!r} is to be initialised by init_lora_weights={init!r}, which needs the weights "
                "of the model, and these are on the meta device: use init_lora_weights=True or 'gaussian'"
            )
        return init

    def _sentence(self, name: str, own: str) -> str:
        kind = type(self._copies[name]).__name__
        return (
            f"{plain_name(name) or 'the model'} ({kind}) has the parameter {own} on the meta device and nothing that "
            "initialises it: give the module a reset_parameters() that fills the parameters of its own, or give the "
            "Trainer weights=, a folder of safetensors"
        )


def _copied(model: nn.Module) -> tuple[nn.Module, dict[int, nn.Module]]:
    """Returns a model of the same modules with parameters on the meta device, and by id of a module its copy."""
    copies: dict[int, nn.Module] = {}
    metas: dict[nn.Parameter, nn.Parameter] = {}
    for module in model.modules():
        copy = module.__new__(type(module))
        copy.__dict__ = module.__dict__.copy()
        copies[id(module)] = copy
    for module in model.modules():
        copy = copies[id(module)]
        copy._buffers = dict(module._buffers)
        copy._modules = {k: copies[id(m)] if m is not None else None for k, m in module._modules.items()}
        copy._parameters = {}
        for name, parameter in module._parameters.items():
            if parameter is not None and parameter not in metas:
                metas[parameter] = nn.Parameter(torch.empty_like(parameter, device="meta"), requires_grad=False)
            copy._parameters[name] = None if parameter is None else metas[parameter]
    return copies[id(model)], copies


def _is_transformers(module: nn.Module) -> bool:
    # not imported: it takes seconds, and need not be there
    return any(kind.__name__ == "PreTrainedModel" for kind in type(module).__mro__)


def _unfilled(parameters: dict[str, nn.Parameter]) -> list[str]:
    return [name for name, p in parameters.items() if bool(p.isnan().any())]


def _seed(seed: int, name: str) -> int:
    return int.from_bytes(hashlib.blake2b(f"{seed} {name}".encode(), digest_size=7).digest(), "big")
