"""Steps in layer-major order without a trainer: engine, exchange and owner of the weights put together."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import replace

import torch
from torch import nn

from heteromesh.comm.gradients.reducer import GradientReducer
from heteromesh.comm.world import World
from heteromesh.parallel.layer_major.schedule import LayerOrder
from heteromesh.parallel.layer_major.weights import StashedWeights
from heteromesh.parallel.state.sharded_weights import ShardedWeights
from heteromesh.parallel.state.weight_source import WeightSource
from heteromesh.planner.plan import Pass, Step
from heteromesh.runtime.engine.executor import StepExecutor, StepResult
from heteromesh.runtime.engine.layer_major import LayerMajor
from heteromesh.runtime.engine.passes import PassMajor
from heteromesh.runtime.training.layer_trial import try_layers
from heteromesh.runtime.work.reader import Reader

CPU = torch.device("cpu")
Gradients = dict[str, torch.Tensor]


class Copies(WeightSource):
    """A model's weights as they are now."""

    def __init__(self, model: nn.Module) -> None:
        self._weights = {p: p.detach().clone().view(-1) for p in model.parameters()}

    def read(self, parameter: nn.Parameter, start: int, stop: int) -> torch.Tensor:
        return self._weights[parameter][start:stop]


class MovedWeights(StashedWeights):
    """Weights that are in new memory at each `show`; what they were in has no numbers any more afterwards."""

    def show(self, layer: int) -> None:
        for parameter, data in self._layers[layer]:
            parameter.data = data.clone()

    def hide(self, layer: int) -> None:
        for parameter, data in self._layers[layer]:
            if parameter.numel() and parameter.data_ptr() != data.data_ptr():
                parameter.data.fill_(torch.nan)
        super().hide(layer)

    def close(self) -> None:
        for index in range(len(self._layers)):
            super().show(index)


class ShardedSteps:
    """Runs steps of one model whose weights are dealt out as the world's collectives say."""

    def __init__(
        self, model: nn.Module, world: World, optimizer: torch.optim.Optimizer, *, order: LayerOrder | None = None,
        resident: Sequence[Collection[int]] = (), bucket_bytes: int = 8 << 20, seed: int = 0,
        speeds: Sequence[float] = (), autocast: torch.dtype | None = None,
        working: Mapping[nn.Parameter, torch.dtype] | None = None, cast: bool = True,
        source: WeightSource | None = None, kept: Sequence[int] = (),
    ) -> None:  # fmt: skip
        """cast: whether weights of `working` are gathered so, or only have buckets of their own. kept: by rank,
        how many layers keep their activations; empty: none."""
        self.world, self.engine = world, LayerMajor(model, seed=seed, autocast=autocast)
        own = self.engine.own_parameters
        groups = [own[i] for i in reversed(range(len(own)))]
        self.exchange = GradientReducer(
            model.parameters(), scatter=True, groups=groups, bucket_bytes=bucket_bytes, working=working
        )
        gathered = working if cast and working else {}
        self.state = ShardedWeights(
            optimizer, model, self.exchange.buckets, world, own, resident=resident, working=gathered, source=source
        )
        here = kept[world.rank] if kept else 0
        self.engine.attach(world.device, order, self.state, lambda of_pass, of_step: here)
        self._executor = StepExecutor.of(self.engine, self.exchange, world, scatter=True)
        self._executor.speeds = tuple(speeds) or self._executor.speeds

    def run(self, step: Step, data: Sequence[torch.Tensor], number: int | None = None) -> StepResult:
        inputs = Reader(data).step_inputs(step, range(len(data)), self.world.rank)
        return self._executor.run(step, inputs, number=number)

    def gradients(self, result: StepResult, reference: Sequence[tuple[nn.Parameter, torch.Tensor]]) -> float:
        """How far this rank's ranges are from a reference's gradients, relative to each bucket's largest."""
        by_parameter, worst = dict(reference), 0.0
        for bucket, mine in zip(self.exchange.buckets, result.summed.tensors, strict=True):
            whole = torch.cat([by_parameter[p].reshape(-1) for p in bucket.parameters])
            assert self.world.collectives is not None
            low, high = bucket.bounds(self.world.collectives)[self.world.rank :][:2]
            if low < high:
                scale = float(whole.abs().max()) or 1.0
                worst = max(worst, float((mine - whole[low:high]).abs().max()) / scale)
        return worst

    def close(self) -> None:
        """Leaves whole weights."""
        self.state.weights_ready()
        self._executor.close()
        self.state.close()


def local_step(lengths: Sequence[int], ranks: Sequence[int]) -> Step:
    """A pass for each sequence, on this rank."""
    passes = tuple(
        Pass(ranks=(rank,), method="local", sequences=(i,), shards=((n,),), seconds=0.0)
        for i, (n, rank) in enumerate(zip(lengths, ranks, strict=True))
    )
    return Step(passes=passes, seconds=0, bound_seconds=0, gap=0, solve_seconds=0, batch=tuple(lengths))


def both_orders(
    model: nn.Module, vocab: int, *, lengths: Sequence[int] = (20, 7, 13), autocast: torch.dtype | None = None,
    offload: float = 0.0, kept: int = 0,
) -> tuple[tuple[float, Gradients], tuple[float, Gradients]]:  # fmt: skip
    """(loss, gradients) of a step in pass-major and in layer-major order, on one rank; the model was tried first.

    kept: of how many layers activations are kept, weights moving about meanwhile."""
    data = [torch.randint(vocab, (n,), generator=torch.Generator().manual_seed(n)) for n in lengths]
    plain = local_step(lengths, (0,) * len(lengths))
    step = replace(plain, passes=tuple(replace(p, offload=offload) for p in plain.passes))
    inputs = Reader(data).step_inputs(step, range(len(data)), 0)
    found = []
    for engine in (PassMajor(model, seed=3, autocast=autocast), LayerMajor(model, seed=3, autocast=autocast)):
        if isinstance(engine, LayerMajor):
            weights = MovedWeights(engine.own_parameters) if kept else None
            engine.attach(CPU, try_layers(engine, Reader(data), CPU), weights, lambda of_pass, of_step: kept)
        executor = StepExecutor.of(engine, GradientReducer(model.parameters()), World(), scatter=False)
        result = executor.run(step, inputs, number=5)
        found.append((result.loss, {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}))
        executor.close()
        if isinstance(engine, LayerMajor) and weights is not None:
            weights.close()
        model.zero_grad()
    return found[0], found[1]
