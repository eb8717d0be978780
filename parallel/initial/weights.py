"""The weights that training begins with: the model's own, those in files, or random ones for a model without memory."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import torch
from torch import nn

from heteromesh.errors import UserError
from heteromesh.parallel.initial.files import FileWeights
from heteromesh.parallel.initial.memory import check_parameter, give_memory
from heteromesh.parallel.initial.random_weights import RandomWeights
from heteromesh.parallel.initial.stand_ins import GradientSketches, stand_in
from heteromesh.parallel.model.call import plain_name, uncompiled
from heteromesh.parallel.model.layers import outermost_layers, own_parameters
from heteromesh.parallel.state.weight_source import WeightSource


class InitialWeights(WeightSource):
    """Gives one model its first weights, once: whole by `fill`, or by parts to whoever reads.

    A model with parameters on the meta device has memory only from `fill` or `stand_in` on. Parameters that are not
    there keep what they have, but for those in the files.
    """

    def __init__(self, model: nn.Module, files: Path | None, seed: int) -> None:
        """files: a folder or file of safetensors; None: the model's own weights, or random ones by this seed."""
        self._model, self._path = model, files
        self._names = {p: plain_name(name) for name, p in model.named_parameters()}
        self._shapes = {p: p.shape for p in self._names}
        self._meta = [p for p in self._names if p.is_meta]
        self.on_meta = bool(self._meta)
        """Whether the model had parameters without memory at the start."""
        self._files: FileWeights | None = None
        self._random = RandomWeights(model, seed) if self.on_meta else None
        self._source_of: dict[nn.Parameter, FileWeights | RandomWeights] = {}
        self._kept: dict[nn.Parameter, torch.Tensor] = {}
        self._fingerprint: str | None = None
        self.tried = False
        """Whether the model has had stand-ins for its weights."""
        self._whole = False

    @property
    def own(self) -> list[nn.Parameter]:
        """Returns the parameters whose first weights are those that they have."""
        return [p for p in self._names if p not in self._source_of]

    def check(self) -> str:
        """Returns a digest of the files, "" for none. Raises UserError where not all that has no memory gets weights,
        and where the files are not this model's."""
        if self._fingerprint is None:
            if self._path is not None:
                self._files = FileWeights(self._model, self._path)
            absent = dict(self._files.absent) if self._files is not None else {}
            drawn = [p for p in self._meta if self._files is None]
            if self._random is not None and absent:
                adapters = self._random.adapters([p for p in self._names if p in absent])
                drawn += [p for p in adapters if p.is_meta]
                absent = {t: name for t, name in absent.items() if t not in adapters}
            if self._files is not None:
                self._files.refuse(absent)
            for parameter in self._meta:
                check_parameter(parameter, self._names[parameter])
            self._check_buffers()
            self._check_ties()
            if self._files is not None:
                self._source_of |= {p: self._files for p in self._names if self._files.has(p)}
            if self._random is not None:
                self._random.check(drawn)
                self._source_of |= dict.fromkeys(drawn, self._random)
            self._fingerprint = self._files.fingerprint() if self._files is not None else ""
        return self._fingerprint

    def read(self, parameter: nn.Parameter, start: int, stop: int) -> torch.Tensor:
        """See WeightSource."""
        if parameter in self._kept:
            return self._kept[parameter].view(-1)[start:stop]
        return self._source_of[parameter].read(parameter, start, stop)

    @torch.no_grad()
    def fill(self, device: torch.device) -> None:
        """Gives the model all its weights; what had no memory has it on the device from here on."""
        self.check()
        if self._whole:
            return
        self._whole, self.tried = True, False
        self._fill_buffers(device)
        for parameter in self._source_of:
            name, shape = self._names[parameter], self._shapes[parameter]
            if parameter.is_meta or parameter.shape != shape:
                give_memory(parameter, torch.empty(shape, dtype=parameter.dtype, device=device), name)
            parameter.copy_(self.read(parameter, 0, shape.numel()).view(shape))
        for parameter, kept in self._kept.items():
            parameter.data = kept
        self.forget()

    def stand_in(self, device: torch.device) -> GradientSketches:
        """Gives what has no memory values to be tried with, and what is in layers little memory; returns what takes
        the gradients of trials, to be closed after these."""
        self.check()
        self._fill_buffers(device)
        self._kept = self._kept or {p: p.detach().to(device) for p in self.own}
        inner = uncompiled(self._model)
        layers = own_parameters(inner, outermost_layers(inner))
        stand_in({p: (self._names[p], self._shapes[p]) for p in self._source_of}, layers, device)
        for parameter, kept in self._kept.items():
            parameter.data = kept
        self._whole, self.tried = False, True
        return GradientSketches(self._names)

    def forget(self) -> None:
        """Gives the memory of what was read last back."""
        for source in (self._files, self._random):
            if source is not None:
                source.forget()

    def _fill_buffers(self, device: torch.device) -> None:
        """Gives buffers that the files have their values."""
        if self._files is None:
            return
        made: dict[torch.Tensor, torch.Tensor] = {}
        for module in self._model.modules():
            for name, buffer in module.named_buffers(recurse=False):
                if not self._files.has(buffer):
                    continue
                if buffer not in made:
                    value = self._files.read(buffer, 0, buffer.numel()).view(buffer.shape)
                    made[buffer] = torch.empty_like(buffer, device=device if buffer.is_meta else None).copy_(value)
                module._buffers[name] = made[buffer]

    def _check_buffers(self) -> None:
        for name, buffer in self._model.named_buffers():
            if buffer.is_meta and not (self._files is not None and self._files.has(buffer)):
                raise UserError(
                    f"buffer {plain_name(name)} is on the meta device and nothing gives it values: build the model "
                    "under accelerate.init_empty_weights(), which leaves buffers real, in place of "
                    'torch.device("meta")'
                )

    def _check_ties(self) -> None:
        """Raises UserError where weights that a model of Transformers ties no longer are (accelerate unties them)."""
        if not self.on_meta:
            return
        for module in self._model.modules():
            ties = getattr(module, "all_tied_weights_keys", None)
            if not isinstance(ties, Mapping):
                continue
            found = dict(module.named_parameters(remove_duplicate=False))
            for one, other in ties.items():
                if one in found and other in found and found[one] is not found[other]:
                    raise UserError(
                        f"{one} and {other} are tied in {type(module).__name__} and are two parameters on the meta "
                        "device: call model.tie_weights() after accelerate.init_empty_weights(), before the optimizer "
                        "is made"
                    )
