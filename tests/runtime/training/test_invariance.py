"""Invariant 1: the plan never changes the mathematics.

Whatever the plan, the world size, the methods and the speeds: loss, gradients and updated parameters equal a
one-process reference that knows nothing of plans.
"""

import random

import pytest
import torch

from heteromesh.errors import UserError
from heteromesh.planner.plan import Step
from heteromesh.planner.sequences.static import static_data_parallel, static_sequence_parallel
from heteromesh.planner.sequences.step import plan_step
from heteromesh.planner.splitting.layout import METHODS
from heteromesh.runtime.engine.executor import StepExecutor
from heteromesh.runtime.work.reader import Reader
from instances import random_costs, random_lengths, random_step
from llama import Llama, LlamaConfig
from ranks import World, run_ranks
from steps import TINY, reference

TOLERANCE = {torch.float64: 1e-10, torch.float32: 1e-5}
KV_HEADS = (4, 2, 1)


def steps_for(rng: random.Random, ranks: int) -> tuple[list[Step], tuple[float, ...]]:
    """A batch under the planner, the static layouts and two pass lists that no planner would make."""
    costs = random_costs(rng, ranks)
    lengths = random_lengths(rng, sum(costs.capacity) // 2)
    steps = [random_step(rng, lengths, ranks), random_step(rng, lengths, ranks)]
    for make in (plan_step, static_sequence_parallel, static_data_parallel):
        try:
            steps.append(make(lengths, costs))
        except UserError:
            assert make is not plan_step, "half of the memory must always be enough"
    return steps, costs.speeds


def check_plans(world: World, dtype: torch.dtype, cases: int, recompute: bool) -> dict[str, int]:
    """Runs every step of every case; raises AssertionError where it differs from the reference."""
    methods: dict[str, int] = {}
    for case in range(cases):
        rng = random.Random(1000 * world.size + case)
        # one plan for all: a search that a busy machine cuts short may end differently elsewhere
        steps, speeds = world.once(lambda rng=rng: steps_for(rng, world.size))
        rng = random.Random(case)
        torch.manual_seed(case)
        config = LlamaConfig(**{**vars(TINY), "kv_heads": rng.choice(KV_HEADS)})
        model = Llama(config).to(dtype)
        data = [torch.randint(TINY.vocab, (n,)) for n in steps[0].batch]
        loss, gradients = reference(model, data)
        start = [p.detach().clone() for p in model.parameters()]
        for step in steps:
            executor = StepExecutor(model, world, speeds=speeds, checkpoint_activations=recompute)
            inputs = Reader(data).step_inputs(step, range(len(data)), world.rank)
            result = executor.run(step, inputs)
            compare(result.loss, loss, model, gradients, dtype)
            check_update(model, gradients, start, dtype)
            executor.close()
            for plan in step.passes:
                methods[plan.method] = methods.get(plan.method, 0) + 1
    return methods


def compare(got: float, loss: float, model: torch.nn.Module, gradients: list[torch.Tensor], dtype: torch.dtype) -> None:
    assert got == pytest.approx(loss, rel=TOLERANCE[dtype])
    for parameter, gradient in zip(model.parameters(), gradients, strict=True):
        grad = torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
        scale = float(gradient.abs().max()) + 1e-30
        assert float((grad - gradient).abs().max()) <= 3 * TOLERANCE[dtype] * scale


def check_update(
    model: torch.nn.Module, gradients: list[torch.Tensor], start: list[torch.Tensor], dtype: torch.dtype
) -> None:
    """One SGD step with momentum lands where the reference's gradients would; then back to the start."""
    torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9).step()
    with torch.no_grad():
        for parameter, gradient, origin in zip(model.parameters(), gradients, start, strict=True):
            expected = origin - 0.1 * gradient
            assert torch.allclose(parameter, expected, rtol=TOLERANCE[dtype], atol=TOLERANCE[dtype])
            parameter.copy_(origin)


@pytest.mark.parametrize("ranks", [1, 2, 3, 4])
def test_any_plan_equals_one_process_in_double(ranks: int) -> None:
    seen = run_ranks(ranks, check_plans, torch.float64, 12, False)
    assert set(seen[0]) == ({"local"} if ranks == 1 else set(METHODS))


@pytest.mark.parametrize("ranks", [2, 3])
def test_any_plan_equals_one_process_in_single(ranks: int) -> None:
    run_ranks(ranks, check_plans, torch.float32, 6, False)


def test_recomputed_layers_change_nothing() -> None:
    run_ranks(2, check_plans, torch.float64, 4, True)
