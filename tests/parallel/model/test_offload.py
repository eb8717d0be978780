"""Activations that wait on the host: same gradients, the promised share, counted."""

from __future__ import annotations

import pytest
import torch

from heteromesh.parallel.attention.api import attention, prepare_pass
from heteromesh.parallel.model.offload import OffloadCount, offload
from llama import Llama, LlamaConfig
from packs import SPLIT, Pack, own_rows, tensors
from ranks import World, run_ranks


def model() -> Llama:
    torch.manual_seed(0)
    return Llama(LlamaConfig(vocab=50, layers=3, hidden=32, heads=4, kv_heads=2, intermediate=64))


def gradients(ratio: float | None) -> tuple[list[torch.Tensor], OffloadCount]:
    net, tokens = model(), torch.arange(200).remainder(50).view(1, -1)
    with offload(ratio or 0.0, list(net.parameters()), smallest=0) as count:
        logits = net(tokens)
    if ratio is None:
        logits = net(tokens)
    logits.square().mean().backward()
    return [p.grad for p in net.parameters()], count


@pytest.mark.parametrize("ratio", [0.0, 0.25, 0.5, 1.0])
def test_gradients_are_bit_equal_and_the_share_is_kept(ratio: float) -> None:
    expected, _ = gradients(None)
    got, count = gradients(ratio)
    assert all(map(torch.equal, got, expected))
    total = count.kept_bytes + count.moved_bytes
    assert total > 100_000
    assert ratio - 0.1 <= count.moved_bytes / total <= ratio
    assert count.returned_bytes >= count.moved_bytes


def test_weights_and_small_tensors_stay() -> None:
    weight = torch.randn(64, 64, requires_grad=True)
    x = torch.randn(64, 64, requires_grad=True)
    with offload(1.0, [weight], smallest=0) as count:
        (x @ weight).sum().backward()
    assert count.moved_bytes == x.nbytes
    with offload(1.0, [weight], smallest=x.nbytes + 1) as count:
        (x @ weight).sum().backward()
    assert count.moved_bytes == 0


def test_a_tensor_that_changes_after_it_was_saved_keeps_its_saved_value() -> None:
    x = torch.full((4,), 3.0, requires_grad=True)
    with offload(1.0, smallest=0):
        y = x * 1.0
        z = y.square().sum()
    z.backward()
    assert torch.equal(x.grad, torch.full((4,), 6.0))


def inside_a_pass(world: World, method: str) -> None:
    size = world.size
    pack = Pack(tuple(range(size)), (50, 30), ((20, 10), (30, 20)), (1.0,) * size, 4, 2, 8, True, 7)
    context = prepare_pass(pack.planned(method), pack.lengths, world, pack.speeds)
    rows = own_rows(context.layout, context.member)
    q, k, v, grad = (t[:, :, rows] for t in tensors(pack, torch.float32))
    results = []
    for ratio in (0.0, 1.0):
        leaves = [t.clone().requires_grad_() for t in (q, k, v)]
        with context.active(), offload(ratio, smallest=0) as count:
            out = attention(*leaves)
        results.append([out.detach(), *torch.autograd.grad(out, leaves, grad)])
    assert count.moved_bytes > 0
    assert count.kept_bytes == 0
    assert all(map(torch.equal, *results))


@pytest.mark.parametrize("method", SPLIT)
def test_every_method_with_its_activations_on_the_host(method: str) -> None:
    run_ranks(2, inside_a_pass, method)


@pytest.mark.parametrize("ratio", [-0.1, 1.1, float("nan")])
def test_ratios_that_mean_nothing_are_refused(ratio: float) -> None:
    with pytest.raises(ValueError, match="is not between 0"), offload(ratio):
        pass
