"""Schedules' states come out of a checkpoint as they went in."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch.optim import lr_scheduler

from heteromesh.runtime.records.plain import from_text, is_same, to_text


def schedules() -> dict[str, Any]:
    def optimizer() -> torch.optim.Optimizer:
        return torch.optim.SGD([torch.nn.Parameter(torch.ones(2))], lr=0.1, momentum=0.9)

    one, two = optimizer(), optimizer()
    return {
        "MultiStep": lr_scheduler.MultiStepLR(optimizer(), [2, 5]),
        "Lambda": lr_scheduler.LambdaLR(optimizer(), lambda step: 1 / (1 + step)),
        "Cosine": lr_scheduler.CosineAnnealingLR(optimizer(), 8),
        "OneCycle": lr_scheduler.OneCycleLR(optimizer(), 0.2, total_steps=8),
        "Cyclic": lr_scheduler.CyclicLR(optimizer(), 0.1, 0.2),
        "Restarts": lr_scheduler.CosineAnnealingWarmRestarts(optimizer(), 3),
        "Sequential": lr_scheduler.SequentialLR(
            one, [lr_scheduler.LinearLR(one), lr_scheduler.MultiStepLR(one, [2, 5])], [2]
        ),
        "Chained": lr_scheduler.ChainedScheduler(
            [lr_scheduler.MultiStepLR(two, [1, 3]), lr_scheduler.ExponentialLR(two, 0.9)]
        ),
    }


@pytest.mark.parametrize("name", schedules())
def test_a_schedule_goes_on_where_it_was(name: str) -> None:
    whole, before, after = (schedules()[name] for _ in range(3))

    def rates(schedule: Any, steps: int) -> list[float]:
        found = []
        for _ in range(steps):
            schedule.optimizer.step()
            schedule.step()
            found.append(float(schedule.optimizer.param_groups[0]["lr"]))
        return found

    expected = rates(whole, 7)
    assert rates(before, 4) == expected[:4]
    state = before.state_dict()
    loaded = from_text(to_text(state))
    assert is_same(loaded, state)
    after.optimizer.load_state_dict(before.optimizer.state_dict())
    after.load_state_dict(loaded)
    assert rates(after, 3) == pytest.approx(expected[4:])


def test_states_are_told_apart_by_type() -> None:
    assert not is_same((1, 2), [1, 2])
    assert not is_same({1: 2}, {"1": 2})
    assert not is_same(torch.ones(2), torch.ones(2, dtype=torch.float64))
    assert is_same({1: (torch.ones(2), None)}, {1: (torch.ones(2), None)})


def test_code_is_not_read() -> None:
    class Evil:
        def __reduce__(self) -> Any:
            return print, ("read",)

    with pytest.raises(Exception, match=r"(?i)unsupported|weights.only"):
        from_text(to_text(Evil()))
