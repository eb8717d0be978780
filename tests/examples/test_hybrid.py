"""The hybrid example: linear and softmax layers under one plan."""

from __future__ import annotations

import random
from dataclasses import replace

import pytest
import torch
from hybrid import Hybrid

from heteromesh.runtime.engine.executor import StepExecutor
from heteromesh.runtime.work.reader import Reader
from packs import SPLIT
from ranks import World, run_ranks
from steps import TINY, random_lengths, random_step, reference


def check(world: World, cases: int) -> int:
    splits = 0
    for case in range(cases):
        rng = random.Random(50 * world.size + case)
        lengths = random_lengths(rng, 120)
        step = random_step(rng, lengths, world.size)
        passes = [p if len(p.ranks) == 1 else replace(p, method=rng.choice(SPLIT)) for p in step.passes]
        step = replace(step, passes=tuple(passes))
        splits += sum(len(p.ranks) > 1 for p in passes)
        torch.manual_seed(case)
        model = Hybrid(replace(TINY, layers=4)).double()
        data = [torch.randint(TINY.vocab, (n,)) for n in lengths]
        loss, gradients = reference(model, data)
        result = StepExecutor(model, world).run(step, Reader(data).step_inputs(step, range(len(data)), world.rank))
        assert result.loss == pytest.approx(loss, rel=1e-10)
        for parameter, expected in zip(model.parameters(), gradients, strict=True):
            torch.testing.assert_close(parameter.grad, expected, rtol=1e-10, atol=1e-10)
    return splits


@pytest.mark.parametrize("size", [1, 2, 4])
def test_any_plan_equals_one_process(size: int) -> None:
    splits = run_ranks(size, check, 8)
    assert size == 1 or min(splits) > 0
