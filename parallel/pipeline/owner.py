"""The state owner of a pipeline stage: the whole state of the stage's parameters on each of its replicas."""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import chain
from typing import Any

import torch
from torch import nn

from heteromesh.comm.gradients.buckets import Bucket
from heteromesh.comm.gradients.exchange import Summed
from heteromesh.comm.world import World
from heteromesh.parallel.pipeline.cut import cut
from heteromesh.parallel.pipeline.engine import StageRunner
from heteromesh.parallel.state.owner import Replicated, StoredState, hand_out, scale_in


class StageOwner(Replicated):
    """Has the user's optimizer update this rank's stage alone; until `close` it knows of no other parameters.

    Checkpoints have the names of the whole model, so that they can be resumed with other stages or none.
    """

    def __init__(
        self, optimizer: torch.optim.Optimizer, whole: nn.Module, runner: StageRunner, buckets: Sequence[Bucket]
    ) -> None:
        peers = runner.groups.peers
        super().__init__(optimizer, runner.model, buckets if peers.size > 1 else ())
        self._whole, self._runner = whole, runner
        self._groups = [list(group["params"]) for group in optimizer.param_groups]
        names = {parameter: name for name, parameter in whole.named_parameters()}
        self._names = {name: names[parameter] for name, parameter in runner.model.named_parameters()}
        """By name in the stage, in the whole model: tied weights have the head's name in a stage that has only that."""
        self._all_names = [[names[p] for p in group] for group in self._groups]
        own = set(runner.model.parameters())
        for group in optimizer.param_groups:
            group["params"][:] = [p for p in group["params"] if p in own]
        # each is counted once
        self._counted = own - set(runner.tied if runner.stage else ())
        self._stale = False

    def weights_ready(self) -> None:
        """Brings the whole model up to date on every rank: each stage's first rank sends its part."""
        if not self._stale:
            return
        for (first, last), stage in zip(self._runner.placement.points, self._runner.placement.stages, strict=True):
            part = cut(self._whole, first, last)
            self._runner.world.broadcast_tensors(chain(part.parameters(), part.buffers()), stage.ranks[0])
        self._stale = False

    def take(self, summed: Summed, limit: float, world: World) -> float:
        if summed.tensors:
            scale_in(summed)
            hand_out(summed, self._buckets)
        given = {p: p.grad for p in self._model.parameters() if p.grad is not None}
        if not summed.tensors:
            scale_in(summed, list(given.values()))
        squares = sum(float(g.double().square().sum()) for p, g in given.items() if p in self._counted)
        mean = torch.tensor([squares / self._runner.groups.peers.size], dtype=torch.float64)
        norm = math.sqrt(float(self._runner.world.sum(mean)[0]))
        nn.utils.clip_grads_with_norm_(list(given), limit, torch.tensor(norm))
        return norm

    def update(self) -> None:
        super().update()
        self._stale = True

    def checkpoint_entries(self) -> dict[str, Any]:
        entries = super().checkpoint_entries()
        groups = [g | {"params": n} for g, n in zip(entries["param_groups"], self._all_names, strict=True)]
        state = {self._names[name]: values for name, values in entries["state"].items()}
        return entries | {"state": state, "param_groups": groups}

    def load_entries(self, entries: dict[str, Any], stored: StoredState) -> None:
        here = {whole: name for name, whole in self._names.items()}
        state = {here[name]: values for name, values in entries["state"].items() if name in here}
        groups = [g | {"params": [here[n] for n in g["params"] if n in here]} for g in entries["param_groups"]]
        held = {here[name]: values for name, values in stored.items() if name in here}
        super().load_entries(entries | {"state": state, "param_groups": groups}, held)
        # torch leaves groups alone that have no parameters here
        for group, saved in zip(self._optimizer.param_groups, groups, strict=True):
            group.update({key: value for key, value in saved.items() if key != "params"})

    def close(self) -> None:
        for group, whole in zip(self._optimizer.param_groups, self._groups, strict=True):
            group["params"][:] = whole
