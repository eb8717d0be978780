"""Linear attention over ranks against the sum that defines it."""

from __future__ import annotations

import itertools
import random
from collections.abc import Sequence
from unittest.mock import patch

import pytest
import torch

from heteromesh.comm.exchange import Transfer
from heteromesh.parallel.attention import linear
from heteromesh.parallel.attention.api import PassContext, linear_attention, prepare_pass
from heteromesh.planner.splitting.layout import METHODS, method_layout
from heteromesh.planner.splitting.states import state_routes
from packs import Pack, make_pack, own_rows, strange
from ranks import World, run_ranks

LAYOUTS = ("ulysses", "trimmed_ring", "ulysses_ring")


def draw(pack: Pack, dtype: torch.dtype = torch.float64) -> list[torch.Tensor]:
    """q, k, v and the gradient of the output; values have another dimension than keys."""
    generator = torch.Generator().manual_seed(pack.seed)
    shapes = [(1, pack.heads, sum(pack.lengths), d) for d in (6, 6, 10, 10)]
    return [torch.randn(*shape, generator=generator, dtype=torch.float64).to(dtype) for shape in shapes]


def decay_of(pack: Pack) -> tuple[float, ...] | None:
    rng = random.Random(pack.seed)
    return (
        tuple(rng.choice([0.5, 0.9, 0.99, 1.0]) for _ in range(pack.heads)) if pack.causal and pack.seed % 3 else None
    )


def defined(q, k, v, decay, causal):
    """The definition, quadratic in the length."""
    rates = torch.tensor(decay or [1.0] * q.shape[1], dtype=torch.float64).log().view(-1, 1, 1)
    place = torch.arange(q.shape[2], dtype=torch.float64)
    age = place.unsqueeze(1) - place
    weight = (rates * age.clamp_min(0)).exp()
    if causal:
        weight = weight * (age >= 0)
    return ((q @ k.transpose(-1, -2)) * weight) @ v


def expected(pack: Pack, inputs: Sequence[torch.Tensor]) -> list[torch.Tensor]:
    leaves = [t.double().requires_grad_() for t in inputs[:3]]
    parts = zip(*(t.split(pack.lengths, 2) for t in leaves), strict=True)
    out = torch.cat([defined(*p, decay_of(pack), pack.causal) for p in parts], 2)
    return [out.detach(), *torch.autograd.grad(out, leaves, inputs[3].double())]


@pytest.mark.parametrize("tokens", [1, 63, 64, 65, 200])
@pytest.mark.parametrize("decay", [None, (0.5, 0.97)])
@pytest.mark.parametrize("causal", [True, False])
def test_outside_a_pass_every_row_is_a_sequence(tokens: int, decay: tuple[float, ...] | None, causal: bool) -> None:
    generator = torch.Generator().manual_seed(tokens)
    q, k, v = (torch.randn(3, 2, tokens, d, generator=generator, dtype=torch.float64) for d in (4, 4, 5))
    decay = decay if causal else None
    got = linear_attention(q, k, v, decay=decay, causal=causal)
    torch.testing.assert_close(got, defined(q, k, v, decay, causal), rtol=1e-12, atol=1e-12)


def run_linear(context: PassContext, pack: Pack, inputs: Sequence[torch.Tensor]) -> list[torch.Tensor]:
    rows = own_rows(context.layout, context.member)
    *leaves, grad = (strange(t[:, :, rows], pack.seed + i) for i, t in enumerate(inputs))
    leaves = [t.requires_grad_() for t in leaves]
    with context.active():
        out = linear_attention(*leaves, decay=decay_of(pack), causal=pack.causal)
    return [out.detach(), *torch.autograd.grad(out, leaves, grad), rows]


def fuzz(world: World, packs: Sequence[Pack], dtype: torch.dtype) -> float:
    """The largest error, relative to the largest entry."""
    torch.use_deterministic_algorithms(True)
    worst = 0.0
    for pack in packs:
        if world.rank not in pack.ranks:
            continue
        inputs = draw(pack, dtype)
        exact = expected(pack, inputs)
        for method in LAYOUTS if len(pack.ranks) > 1 else ["local"]:
            context = prepare_pass(pack.planned(method), pack.lengths, world, pack.speeds)
            *got, rows = run_linear(context, pack, inputs)
            *again, _ = run_linear(context, pack, inputs)
            assert all(map(torch.equal, got, again)), f"not repeatable for {pack}"
            for a, b in zip(got, exact, strict=True):
                if a.numel():
                    error = float((a - b[:, :, rows]).abs().max() / b.abs().max().clamp_min(1.0))
                    worst = error if not error <= worst else worst
    return worst


@pytest.mark.parametrize("size", [1, 2, 3, 4])
def test_equals_the_definition_in_double(size: int) -> None:
    packs = [make_pack(70 * size + i, size) for i in range(10)]
    assert max(run_ranks(size, fuzz, packs, torch.float64)) <= 1e-12


@pytest.mark.parametrize(("dtype", "limit"), [(torch.float32, 1e-5), (torch.bfloat16, 1e-2)])
def test_equals_the_definition_in_single_and_half(dtype: torch.dtype, limit: float) -> None:
    packs = [make_pack(90 + i, 2) for i in range(6)]
    assert max(run_ranks(2, fuzz, packs, dtype)) <= limit


def count(world: World, packs: Sequence[Pack], dtype: torch.dtype) -> list[tuple[int, int]]:
    sent = []
    for pack in packs:
        if world.rank not in pack.ranks or len(pack.ranks) == 1:
            continue
        for method in (m for m in METHODS if m != "local"):
            context = prepare_pass(pack.planned(method), pack.lengths, world, pack.speeds)
            rows = own_rows(context.layout, context.member)
            q, k, v, grad = (t[:, :, rows] for t in draw(pack, dtype))
            leaves = [t.requires_grad_() for t in (q, k, v)]
            with context.active():
                linear_attention(*leaves, decay=decay_of(pack), causal=pack.causal)
                counts = [world.recorder.sent_bytes]
                out = linear_attention(*leaves, decay=decay_of(pack), causal=pack.causal)
                counts.append(world.recorder.sent_bytes)
            out.backward(grad)
            forward, backward = (b - a for a, b in itertools.pairwise([*counts, world.recorder.sent_bytes]))
            routes = state_routes(method_layout(method, pack.lengths, pack.shards), causal=pack.causal)[context.member]
            # states of 6 by 10 elements a head, in at least single precision
            state = pack.heads * 6 * 10 * max(4, dtype.itemsize)
            assert forward == state * sum(map(len, routes.sends.values())), f"{method} {pack}"
            assert backward == state * sum(map(len, routes.gradient_sends.values())), f"{method} {pack}"
            sent.append((forward, backward))
    return sent


@pytest.mark.parametrize("size", [2, 4])
def test_counted_bytes_equal_the_plans(size: int) -> None:
    run_ranks(size, count, [make_pack(30 * size + i, size) for i in range(4)], torch.bfloat16)


def test_traffic_does_not_grow_with_the_length() -> None:
    packs = [
        Pack((0, 1), (n,), ((n // 2,), (n // 2,)), (1.0, 1.0), 1, 1, 8, True, 1) for n in (1024, 8192, 65536)
    ]  # fmt: skip
    for sent in run_ranks(2, count, packs, torch.float32):
        lengths = [sent[i : i + len(sent) // 3] for i in range(0, len(sent), len(sent) // 3)]
        assert lengths[0] == lengths[1] == lengths[2]


def events(world: World) -> list[str]:
    pack, log = make_pack(3, 2), []
    pack = Pack((0, 1), (40, 40), ((20, 20), (20, 20)), (1.0, 1.0), 2, 2, 8, True, 1)
    context = prepare_pass(pack.planned("ulysses"), pack.lengths, world, pack.speeds)
    run_linear(context, pack, draw(pack))
    original = Transfer.__init__

    def posted(self, *args):
        log.append("post")
        original(self, *args)

    def wait(self, original=Transfer.wait):
        log.append("wait")
        original(self)

    def compute(*args, original=linear.chunked):
        log.append("compute")
        return original(*args)

    with patch.object(Transfer, "__init__", posted), patch.object(Transfer, "wait", wait):  # noqa: SIM117
        with patch.object(linear, "chunked", compute):
            run_linear(context, pack, draw(pack))
    return log


def test_states_travel_while_a_rank_works_on_its_own_and_once_each_way() -> None:
    for log in run_ranks(2, events):
        assert log == ["post", "compute", "compute", "wait"] * 2


def test_gradients_by_finite_differences() -> None:
    generator = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(1, 2, 7, d, generator=generator, dtype=torch.float64) for d in (2, 2, 3))
    layout = prepare_pass(
        Pack((0,), (4, 3), ((4, 3),), (1.0,), 2, 2, 2, True, 0).planned("local"), (4, 3), World(), (1.0,)
    )

    def act(*args: torch.Tensor) -> torch.Tensor:
        with layout.active():
            return linear_attention(*args, decay=(0.5, 1.0))

    assert torch.autograd.gradcheck(act, [t.requires_grad_() for t in (q, k, v)])


X = torch.zeros(1, 2, 4, 8)


@pytest.mark.parametrize(
    ("tensors", "options", "rule"),
    [
        ([X, X[:, :1], X], {}, "takes q, k"),
        ([X, X, X[:, :, :3]], {}, "takes q, k"),
        ([X[0]] * 3, {}, "takes q, k"),
        ([X] * 3, {"decay": (0.5,)}, "one number in .0, 1. for each of 2 heads"),
        ([X] * 3, {"decay": (0.5, 0.0)}, "one number in"),
        ([X] * 3, {"decay": (0.5, float("nan"))}, "one number in"),
        ([X] * 3, {"decay": (0.5, 1.0), "causal": False}, "decay is for causal"),
    ],
)
def test_bad_input(tensors: list, options: dict, rule: str) -> None:
    with pytest.raises(ValueError, match=rule):
        linear_attention(*tensors, **options)


def differ(world: World) -> None:
    pack = Pack((0, 1), (8,), ((4,), (4,)), (1.0, 1.0), 2, 2, 8, True, 1)
    context = prepare_pass(pack.planned("ring"), pack.lengths, world, pack.speeds)
    with context.active(), pytest.raises(ValueError, match="must call attention alike"):
        linear_attention(X, X, X, decay=(0.5, 0.9 - 0.1 * world.rank))


def test_ranks_with_another_decay_are_an_error_on_every_rank() -> None:
    run_ranks(2, differ)
