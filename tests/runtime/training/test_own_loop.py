"""The training loop of examples/own_loop.py has the Trainer's numbers."""

from pathlib import Path

import own_loop
import pytest
import torch

import heteromesh as hm
from llama import Llama
from ranks import World, run_ranks
from steps import TINY
from trainers import DATA

STEPS = 6


def model_of(seed: int) -> tuple[Llama, torch.optim.Optimizer]:
    torch.manual_seed(seed)
    model = Llama(TINY)
    return model, torch.optim.SGD(model.parameters(), lr=0.3)


def sharded(model: Llama, optimizer: torch.optim.Optimizer, data: list[torch.Tensor]) -> list[float]:
    """Losses of the same loop with the parts that docs/own-loop.md names for a sharded optimizer."""
    losses = []
    engine, exchange = hm.PassMajor(model), hm.GradientReducer(model.parameters(), scatter=True)
    with hm.join_world() as world:
        world.broadcast_tensors(model.state_dict().values())
        state = hm.Sharded(optimizer, model, exchange.buckets, world)
        with hm.planned_steps(engine, exchange, world, data, batch_tokens=220, steps=STEPS) as work:
            for step in work:
                exchange.begin(step.number, world)
                engine.run(step, world, exchange)
                summed = exchange.finish()
                state.apply(summed, limit=1.0)
                exchange.committed()
                losses.append(summed.loss / summed.valid)
        state.close()
    return losses


def layer_by_layer(model: Llama, optimizer: torch.optim.Optimizer, data: list[torch.Tensor]) -> list[float]:
    """Losses of the loop of docs/sharded-weights.md."""
    losses = []
    engine = hm.LayerMajor(model)
    layers = engine.own_parameters
    exchange = hm.GradientReducer(model.parameters(), scatter=True, groups=layers[::-1])
    with hm.join_world() as world:
        world.broadcast_tensors(model.state_dict().values())
        state = hm.ShardedWeights(optimizer, model, exchange.buckets, world, layers)
        with hm.planned_steps(engine, exchange, world, data, batch_tokens=220, steps=STEPS) as work:
            engine.attach(world.device, weights=state)
            for step in work:
                exchange.begin(step.number, world)
                engine.run(step, world, exchange)
                summed = exchange.finish()
                state.apply(summed, limit=1.0)
                exchange.committed()
                losses.append(summed.loss / summed.valid)
        state.weights_ready()
        assert all(p.numel() for p in model.parameters())
        state.close()
    return losses


def all_of_them(world: World, folder: Path) -> list[list[float]]:
    """Losses of the example, which begins with rank 0's parameters on every rank, of the other two and of `Trainer`."""
    data = [torch.tensor(s) for s in DATA]
    own = own_loop.train(*model_of(7 + world.rank), data, batch_tokens=220, steps=STEPS)
    config = hm.TrainerConfig(batch_tokens=220, max_steps=STEPS, run_dir=folder, clip_norm=1.0)
    found = [own, sharded(*model_of(7 + world.rank), data)]
    found += [layer_by_layer(*model_of(7 + world.rank), data)] if world.size > 1 else []
    return [*found, list(hm.Trainer(*model_of(7), data, config).fit().losses)]


@pytest.mark.parametrize("ranks", [1, 2])
def test_losses_are_the_trainers(ranks: int, tmp_path: Path) -> None:
    for own, *others, trained in run_ranks(ranks, all_of_them, tmp_path / "run"):
        assert len(own) == STEPS
        assert own == pytest.approx(trained, abs=1e-6)
        for losses in others:
            assert losses == pytest.approx(trained, abs=1e-6)
        assert own[-1] < own[0] - 0.1, "it learns"
