"""The comparison of plan and static layouts: same losses, and a layout that is the plan's is not timed twice."""

import random

import torch

from heteromesh.planner.sequences.static import static_data_parallel
from heteromesh.planner.sequences.step import plan_step
from heteromesh.runtime.engine.baselines import EvenSplit, compare
from heteromesh.runtime.engine.executor import StepExecutor
from heteromesh.runtime.work.reader import Reader
from heteromesh.runtime.work.sampler import Sampler
from instances import random_costs
from llama import Llama
from ranks import World, run_ranks
from steps import TINY


def compared(world: World) -> tuple[EvenSplit, ...]:
    torch.manual_seed(0)
    reader = Reader([torch.arange(5 + 17 * i % 60) % 61 for i in range(12)])
    costs = random_costs(random.Random(4), world.size, roomy=True)
    sampler = Sampler(reader.lengths, batch_tokens=120, seed=0)
    first, second = sampler.next_batch(), sampler.next_batch()
    batches = [
        (first, plan_step(first.lengths, costs, time_limit=9)),
        (second, static_data_parallel(second.lengths, costs)),
    ]
    return compare(StepExecutor(Llama(TINY), world), reader, world.once(lambda: batches), costs)


def test_losses_are_equal_and_the_plan_itself_has_ratio_one() -> None:
    results = run_ranks(2, compared)
    assert results[0] == results[1]
    by_name = {result.layout: result for result in results[0]}
    data_parallel = by_name["static data parallel"]
    assert data_parallel.same >= 1
    assert data_parallel.ratios[1] == 1.0
    assert "for " in data_parallel.line()
    for result in results[0]:
        assert len(result.ratios) == 2
        assert result.largest_loss_difference < 1e-6
