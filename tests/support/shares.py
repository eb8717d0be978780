"""A model of branches, passes through it in shares, and what their sums should be."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest
import torch
from torch import nn

from heteromesh.comm.gradients.exchange import Members, Summed
from heteromesh.comm.gradients.reducer import GradientReducer


class Branches(nn.Module):
    """Which parameters get a gradient depends on the pass; the embedding's are sparse."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(3)
        self.words = nn.Embedding(7, 3, sparse=True)
        self.a, self.b = nn.Linear(3, 5), nn.Linear(5, 2)
        self.unused = nn.Parameter(torch.ones(4))
        self.low = nn.Parameter(torch.ones(2, dtype=torch.bfloat16))
        self.frozen = nn.Parameter(torch.ones(2), requires_grad=False)

    def forward(self, number: int) -> torch.Tensor:
        hidden = self.a(self.words(torch.tensor([number % 7, 3 * number % 7])))
        return (self.b(hidden) * self.low.float()).square().sum() if number % 2 == 0 else hidden.square().sum()


class Reducer(GradientReducer):
    """Knows its parameters in the model's order."""

    def __init__(self, model: nn.Module, **options: Any) -> None:
        self.parameters = [p for p in model.parameters() if p.requires_grad]
        super().__init__(model.parameters(), **options)


def work(
    reducer: GradientReducer, model: nn.Module, passes: Sequence[tuple[Members, int]], *, last: bool = True
) -> None:
    """Passes of (members, number), which is the place of its sequence too."""
    for i, (members, number) in enumerate(passes):
        with reducer.share(members, [number]) as share:
            if last and i == len(passes) - 1:
                reducer.last_backward()
            loss = model(number)
            loss.backward()
            share.loss += loss.detach().double()
            share.valid += 2


def check(summed: Summed, reducer: Reducer, numbers: Sequence[int], ranges: Sequence[slice] | None = None) -> None:
    """Compares sums with one process that runs all passes."""
    expected, loss = Branches(), 0.0
    for number in numbers:
        value = expected(number)
        value.backward()
        loss += float(value.detach())
    assert summed.loss == pytest.approx(loss, rel=1e-6)
    assert summed.valid == 2 * len(numbers)
    true = dict(zip(reducer.parameters, (p for p in expected.parameters() if p.requires_grad), strict=True))
    for i, (bucket, tensor) in enumerate(zip(reducer.buckets, summed.tensors, strict=True)):
        whole = bucket.empty().zero_()
        for k, parameter in enumerate(bucket.parameters):
            gradient = true[parameter].grad
            assert summed.present[parameter] == (gradient is not None)
            if gradient is not None:
                bucket.view(whole, k).copy_(gradient.to_dense())
        tolerance = 5e-2 if whole.dtype == torch.bfloat16 else 1e-5
        assert torch.allclose(tensor, whole[ranges[i]] if ranges else whole, rtol=tolerance, atol=1e-5)
    assert all(p.grad is None for p in reducer.parameters)
