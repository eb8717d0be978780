"""A training loop of one's own: planned steps, an engine, a gradient exchange and a state owner.

heteromesh run --nproc-per-node 2 examples/own_loop.py
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

import heteromesh as hm
from llama import Llama, LlamaConfig


def train(
    model: torch.nn.Module,
    optimizer: torch.optim.Optimizer,
    data: Sequence[torch.Tensor],
    batch_tokens: int,
    steps: int,
) -> list[float]:
    """Returns the loss of every step; `hm.Trainer` with these settings has the same."""
    losses = []
    engine, exchange = hm.PassMajor(model), hm.GradientReducer(model.parameters())
    with hm.join_world() as world:
        world.broadcast_tensors(model.to(world.device).state_dict().values())
        state = hm.Replicated(optimizer, model, exchange.buckets)
        with hm.planned_steps(engine, exchange, world, data, batch_tokens=batch_tokens, steps=steps) as work:
            for step in work:
                exchange.begin(step.number, world)
                engine.run(step, world, exchange)  # forward and backward of this rank's passes
                summed = exchange.finish()  # over all ranks
                state.apply(summed, limit=1.0)  # clips the gradients' norm, steps the optimizer
                exchange.committed()
                losses.append(summed.loss / summed.valid)
    return losses


def main() -> None:
    torch.manual_seed(0)
    data = [torch.arange(2 + 31 * i % 700) % 61 for i in range(200)]
    model = Llama(LlamaConfig(vocab=61, layers=2, hidden=64, heads=4, kv_heads=2, intermediate=96))
    losses = train(model, torch.optim.AdamW(model.parameters(), lr=3e-3), data, batch_tokens=4096, steps=10)
    print(f"loss {losses[0]:.4f} -> {losses[-1]:.4f}")


if __name__ == "__main__":
    main()
