"""Sharded weights: the same numbers as one process, whatever the plan; what travels, what is freed, what is kept."""

from __future__ import annotations

import math
import random
import weakref
from collections.abc import Sequence
from itertools import pairwise
from typing import Any

import pytest
import torch
from torch import nn

from heteromesh.comm.gradients.buckets import Bucket
from heteromesh.parallel.state.weight_shard import WeightShard
from heteromesh.planner.plan import Step
from heteromesh.runtime.engine.layer_major import LayerMajor
from heteromesh.runtime.training.layer_trial import try_layers
from heteromesh.runtime.work.reader import Reader
from instances import random_costs, random_lengths, random_step
from layer_steps import Copies, ShardedSteps, local_step
from llama import Llama, LlamaConfig
from muon import MuonAdamW, muon_groups
from owners import collectives_of
from ranks import World, run_ranks
from steps import TINY, reference

TOLERANCE = {torch.float64: 1e-10, torch.float32: 1e-5}
SHARES = ((), (0.7,), (0.0, 1.0), (0.2, 0.5))
"""Of the first ranks; what is left over is the last one's."""


def tiny(seed: int, dtype: torch.dtype, **changes: Any) -> Llama:
    torch.manual_seed(seed)
    return Llama(LlamaConfig(**{**vars(TINY), **changes})).to(dtype)


def adam(model: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2, eps=1e-4)


def batch_of(lengths: Sequence[int]) -> list[torch.Tensor]:
    return [torch.randint(TINY.vocab, (n,), generator=torch.Generator().manual_seed(n)) for n in lengths]


def any_steps(rng: random.Random, ranks: int) -> tuple[list[Step], tuple[float, ...]]:
    """Pass lists that no planner would make; the last one leaves all ranks but one without any pass."""
    costs = random_costs(rng, ranks)
    lengths = random_lengths(rng, sum(costs.capacity) // 2)
    alone = local_step(lengths, (rng.randrange(ranks),) * len(lengths))
    return [random_step(rng, lengths, ranks), random_step(rng, lengths, ranks), alone], costs.speeds


def check_worlds(world: World, dtype: torch.dtype, cases: int) -> dict[str, int]:
    """Gradients of any pass list under any shares, and where AdamW goes with them."""
    methods: dict[str, int] = {}
    for case in range(cases):
        rng = random.Random(1000 * world.size + case)
        steps, speeds = any_steps(rng, world.size)
        changes = {"kv_heads": rng.choice((4, 2, 1)), "layers": rng.choice((1, 2, 3))}
        model, plain = tiny(case, dtype, **changes), tiny(case, dtype, **changes)
        if case % 3 == 0:
            model.head.weight, plain.head.weight = model.embed.weight, plain.embed.weight
        data, updates = batch_of(steps[0].batch), adam(plain)
        with collectives_of(world, SHARES[case % len(SHARES)], native=case % 2 == 1) as collectives:
            world.collectives = collectives
            resident = [[i for i in range(3) if rng.random() < 0.5] for _ in range(world.size)] if case % 3 else ()
            source = Copies(model) if case % 4 > 1 else None
            kept = [rng.randrange(4) for _ in range(world.size)]
            sharded = ShardedSteps(
                model, world, adam(model), bucket_bytes=9000, speeds=speeds, resident=resident, source=source, kept=kept
            )
            for number, step in enumerate(steps):
                loss, gradients = reference(plain, data)
                result = sharded.run(step, data)
                assert result.loss == pytest.approx(loss, rel=TOLERANCE[dtype])
                pairs = list(zip(model.parameters(), gradients, strict=True))
                assert sharded.gradients(result, pairs) <= 3 * TOLERANCE[dtype], (case, number)
                nn.utils.clip_grad_norm_(plain.parameters(), 0.5, error_if_nonfinite=True)
                sharded.state.apply(result.summed, 0.5)
                updates.step()
                for plan in step.passes:
                    methods[plan.method] = methods.get(plan.method, 0) + 1
            sharded.close()
            world.barrier()
        for mine, other in zip(model.parameters(), plain.parameters(), strict=True):
            assert torch.allclose(mine, other, rtol=1e-4, atol=100 * TOLERANCE[dtype])
    return methods


@pytest.mark.parametrize(
    ("ranks", "dtype", "cases"), [(2, torch.float64, 8), (3, torch.float64, 8), (2, torch.float32, 4)]
)
def test_any_plan_equals_one_process(ranks: int, dtype: torch.dtype, cases: int) -> None:
    seen = run_ranks(ranks, check_worlds, dtype, cases)
    assert len(seen[0]) > 2, "split passes too"


def whole_matrices(world: World, name: str, working: bool) -> list[float]:
    """Steps beside a plain optimizer's on the same sums: the same bits. Returns what each rank owns."""
    model, plain = tiny(3, torch.float32, layers=2), tiny(3, torch.float32, layers=2)
    for each in (model, plain):
        each.head.weight = each.embed.weight
        each.layers[0].down.weight.requires_grad = False
    mine, other = (
        torch.optim.Adafactor([p for p in each.parameters() if p.requires_grad])
        if name == "Adafactor"
        else MuonAdamW(muon_groups(each))
        for each in (model, plain)
    )
    matrices = [p for layer in model.layers for p in layer.parameters() if p.ndim == 2]
    places = dict(zip(model.parameters(), plain.parameters(), strict=True))
    dtype = torch.bfloat16 if working else None
    with collectives_of(world, (0.0, 0.3)) as collectives:
        world.collectives = collectives
        sharded = ShardedSteps(
            model, world, mine, bucket_bytes=9000, resident=[{1}, set(), {0}][: world.size], source=Copies(model),
            autocast=dtype, working=dict.fromkeys(matrices, torch.bfloat16) if working else None,
        )  # fmt: skip
        for fragment in sharded.state.fragments:
            assert fragment.tensor.shape == fragment.shape or len(fragment.shape) == 1
        owned = world.gather(float(sum(f.shape.numel() for f in sharded.state.fragments)))
        data = batch_of((20, 7, 13))
        for _ in range(3):
            summed = sharded.run(local_step((20, 7, 13), (0, 1, world.size - 1)), data).summed
            ranges = world.gather([tensor * summed.scale for tensor in summed.tensors])
            for bucket, parts in zip(sharded.exchange.buckets, zip(*ranges, strict=True), strict=True):
                flat = torch.cat(parts)
                for index, parameter in enumerate(bucket.parameters):
                    places[parameter].grad = bucket.view(flat, index)
            sharded.state.apply(summed, math.inf)
            other.step()
        sharded.close()
        world.barrier()
    assert all(torch.equal(p, q) for p, q in places.items())
    return owned


@pytest.mark.parametrize("ranks", [2, 3])
@pytest.mark.parametrize(("name", "working"), [("Adafactor", False), ("MuonAdamW", True)])
def test_matrices_have_one_owner_where_the_optimizer_needs_them(ranks: int, name: str, working: bool) -> None:
    """Tied and frozen weights, 16-bit gathers, a rank that owns nothing."""
    owned = run_ranks(ranks, whole_matrices, name, working)[0]
    assert owned[0] == 0
    assert min(owned[1:]) > 0


def nbytes(parameters: Sequence[nn.Parameter]) -> int:
    return sum(p.numel() * p.element_size() for p in parameters)


def table_of(name: str, layers: int) -> tuple[tuple[int, ...], ...]:
    """What ranks keep: all of them everything, or one everything, one nothing, and the others some."""
    return {
        "none": (),
        "all": (tuple(range(layers)),) * 4,
        "mixed": (tuple(range(layers)), (), (layers - 1,), (0,)),
    }[name]


def count_traffic(world: World, layers: int) -> dict[tuple[str, int], tuple[int, int]]:
    """By what is kept and passes a rank, what this rank sent in a step, and the most that was in gathered buffers."""
    found = {}
    for kind, passes in (("none", 1), ("none", 4), ("none", 16), ("all", 4), ("mixed", 1), ("mixed", 4)):
        resident = table_of(kind, layers)[: world.size]
        model = tiny(0, torch.float32, layers=layers)
        sharded = ShardedSteps(model, world, adam(model), resident=resident)
        lengths = [3 + i % 4 for i in range(passes * world.size)]
        step, data = local_step(lengths, [i % world.size for i in range(len(lengths))]), batch_of(lengths)
        assert world.collectives is not None
        for number in range(2):
            before = world.collectives.sent_bytes
            result = sharded.run(step, data, number)
            sharded.state.apply(result.summed, 1.0)
            sharded.state.begin()  # what is outside layers is here again
        found[kind, passes] = world.collectives.sent_bytes - before, sharded.state.most_bytes
        sharded.close()
        world.barrier()
    return found


def traffic_of(
    world: World, layers: int, fractions: Sequence[float]
) -> tuple[dict[tuple[str, int], tuple[int, int]], tuple[int, ...]]:
    with collectives_of(world, fractions) as collectives:
        world.collectives = collectives
        numel = sum(p.numel() for p in tiny(0, torch.float32).layers[0].parameters())
        return count_traffic(world, layers), tuple(collectives.bounds(numel))


@pytest.mark.parametrize(("ranks", "layers", "fractions"), [(2, 4, ()), (3, 2, (0.5, 0.1))])
def test_what_travels_does_not_depend_on_the_number_of_passes(
    ranks: int, layers: int, fractions: Sequence[float]
) -> None:
    results = run_ranks(ranks, traffic_of, layers, fractions)
    model = tiny(0, torch.float32, layers=layers)
    inside = nbytes(list(model.layers.parameters()))
    outside = nbytes(list(model.parameters())) - inside
    facts = 8 * (2 + len(list(model.parameters())))
    layer, n = inside // layers, ranks - 1
    bounds = results[0][1]
    lacks = [layer - layer // bounds[-1] * (high - low) for low, high in pairwise(bounds)]
    for kind, passes in results[0][0]:
        kept = table_of(kind, layers)[:ranks] or ((),) * ranks
        # each layer is gathered, is there for the backward if it is the last, is sent else to the ranks that haven't
        # kept it, and is reduced once; all else once each; facts both ways
        again = sum(lacks[rank] for i in range(layers - 1) for rank in range(ranks) if i not in kept[rank])
        expected = (2 * inside + 2 * outside + 2 * facts) * n + again
        assert sum(found[kind, passes][0] for found, _ in results) == expected, (kind, passes)
        for (found, _), own in zip(results, kept, strict=True):
            most = max(len({*own, i, i + 1}) for i in range(layers - 1))
            assert found[kind, passes][1] == outside + most * layer, (kind, passes)


class Counted:
    """The flat tensors for gradients that are alive."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.alive: list[Any] = []
        self.most, original = 0, Bucket.empty

        def empty(bucket: Bucket) -> torch.Tensor:
            flat = original(bucket)
            self.alive.append((weakref.ref(flat), flat.nbytes))
            self.most = max(self.most, sum(size for ref, size in self.alive if ref() is not None))
            return flat

        monkeypatch.setattr(Bucket, "empty", empty)


def poison(monkeypatch: pytest.MonkeyPatch) -> None:
    """What is freed is overwritten first, and so is what is kept when it is no longer what the owners have."""
    free, outdate = WeightShard.free, WeightShard.outdate

    def freed(shard: Any) -> None:
        if shard.flat is not None:
            shard.flat.fill_(float("nan"))
        free(shard)

    def outdated(shard: Any) -> None:
        if shard.flat is not None:
            shard.flat[: shard.low] = float("nan")
            shard.flat[shard.high :] = float("nan")
        outdate(shard)

    monkeypatch.setattr(WeightShard, "free", freed)
    monkeypatch.setattr(WeightShard, "outdate", outdated)


def freed(world: World, resident: Sequence[Sequence[int]]) -> tuple[int, int, int]:
    with pytest.MonkeyPatch.context() as patch, collectives_of(world, ()) as collectives:
        world.collectives = collectives
        poison(patch)
        counted = Counted(patch)
        model, plain = tiny(0, torch.float64, layers=4), tiny(0, torch.float64, layers=4)
        lengths = [9, 14, 3, 8]
        data, step = batch_of(lengths), local_step(lengths, (0, 0, 1, 1))
        sharded = ShardedSteps(model, world, adam(model), resident=resident)
        updates = adam(plain)
        for number in range(4):
            if number == 2:  # as for an evaluation
                sharded.state.weights_ready()
                assert torch.allclose(model(data[0][None]), plain(data[0][None]))
            loss, _ = reference(plain, data)
            result = sharded.run(step, data)
            assert result.loss == pytest.approx(loss, rel=1e-10)
            sums = [weakref.ref(tensor) for tensor in result.summed.tensors]
            sharded.state.apply(result.summed, float("inf"))
            del result
            assert not any(tensor() is not None for tensor in sums), "nothing keeps the sums"
            updates.step()
        assert all(p.numel() == 0 and p.grad is None for p in model.layers.parameters())
        with pytest.raises(RuntimeError):
            model(data[0][None])
        layer = nbytes(list(plain.layers[0].parameters()))
        outside = nbytes(list(plain.parameters())) - 4 * layer
        sharded.close()
        assert torch.allclose(model(data[0][None]), plain(data[0][None]))
        world.barrier()
    return counted.most, layer, outside


@pytest.mark.parametrize("resident", [(), ((0, 2, 3), ())])
def test_freed_weights_are_not_used_and_gradients_are_given_back(resident: Sequence[Sequence[int]]) -> None:
    for most, layer, outside in run_ranks(2, freed, resident):
        # of one layer under way to its owners and of the next one
        assert most <= 2 * layer + outside


def frozen_are_dealt_out(world: World) -> tuple[float, int, int]:
    with collectives_of(world, (0.3,)) as collectives:
        world.collectives = collectives
        torch.manual_seed(0)
        model = tiny(0, torch.float64, layers=3)
        for parameter in (
            *model.embed.parameters(),
            *model.layers[0].parameters(),
            *model.layers[2].gate_up.parameters(),
        ):
            parameter.requires_grad_(False)
        plain = tiny(0, torch.float64, layers=3)
        lengths = [9, 14, 3]
        data, step = batch_of(lengths), local_step(lengths, (0, 1, 1))
        loss, gradients = reference(plain, data)
        engine = LayerMajor(model)
        order = try_layers(engine, Reader(data), world.device)
        engine.close()
        assert order.first_backward == 1
        sharded = ShardedSteps(model, world, adam(model), order=order, resident=[(1,), (0,)], source=Copies(model))
        result = sharded.run(step, data)
        assert result.loss == pytest.approx(loss, rel=1e-10)
        pairs = list(zip(model.parameters(), gradients, strict=True))
        off = sharded.gradients(result, pairs)
        held = sum(shard.own.numel() for shard in sharded.state._shards)
        sharded.close()
        world.barrier()
    return off, held, sum(p.numel() for p in model.parameters())


def test_frozen_weights_are_dealt_out_too() -> None:
    results = run_ranks(2, frozen_are_dealt_out)
    assert all(off < 1e-10 for off, _, _ in results)
    assert sum(held for _, held, _ in results) == results[0][2], "each element has one owner"
