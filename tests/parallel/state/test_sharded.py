"""The sharded optimizer: the same parameters as the optimizer it wraps, whoever owns how much."""

import math
import pickle
import random
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from heteromesh.comm.gradients.buckets import build_buckets
from heteromesh.comm.gradients.exchange import Summed
from heteromesh.comm.gradients.reducer import GradientReducer
from heteromesh.comm.records import Recorder
from heteromesh.errors import UserError
from heteromesh.parallel.state.flats import FlatBuckets
from heteromesh.parallel.state.fragments import Piece, boxes
from heteromesh.parallel.state.gather import ParameterGather
from heteromesh.parallel.state.offload.host_update import open_host_update
from heteromesh.parallel.state.offload.optimizer import OffloadedAdamW
from heteromesh.parallel.state.owner import Replicated, StateOwner, hand_out
from heteromesh.parallel.state.sharded import ShardedOptimizer
from heteromesh.runtime.records.checkpoint import Checkpoints
from muon import MuonAdamW
from owners import collectives_of
from ranks import World, run_ranks

OPTIMIZERS: dict[str, Callable[[Any], torch.optim.Optimizer]] = {
    "AdamW": lambda p: torch.optim.AdamW(p, lr=1e-2, weight_decay=0.1),
    "Adam": lambda p: torch.optim.Adam(p, lr=1e-2, amsgrad=True),
    "SGD": lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9, weight_decay=0.01),
    "RMSprop": lambda p: torch.optim.RMSprop(p, lr=1e-3, momentum=0.5),
    "Adagrad": lambda p: torch.optim.Adagrad(p, lr=1e-2),
    "OffloadedAdamW": lambda p: OffloadedAdamW(p, lr=1e-2, weight_decay=0.1),
    "MuonAdamW": lambda p: MuonAdamW(p, lr=1e-2),
    "Adafactor": lambda p: torch.optim.Adafactor(p, lr=1e-2, eps=(1e-30, 1e-3)),
}
FRACTIONS = {"even": (), "one owns all": (0.0, 1.0), "uneven": (0.55, 0.0, 0.3, 0.15)}


class Small(nn.Module):
    """Tied weights that are read without a call of their owner, a branch, and parameters of every kind."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(13, 6)
        self.attention = nn.MultiheadAttention(6, 2, batch_first=True)
        self.branch = nn.Linear(6, 6)
        self.scales = nn.ParameterList([nn.Parameter(torch.ones(())), nn.Parameter(torch.ones(6))])
        self.unused = nn.Parameter(torch.ones(5))
        self.frozen = nn.Parameter(torch.ones(3), requires_grad=False)
        self.low = nn.Parameter(torch.ones(6, dtype=torch.bfloat16))

    def forward(self, tokens: torch.Tensor, branch: bool) -> torch.Tensor:
        hidden = self.embed(tokens)
        hidden = hidden + self.attention(hidden, hidden, hidden, need_weights=False)[0]
        if branch:
            hidden = hidden + self.branch(hidden)
        hidden = hidden * self.scales[0] * self.scales[1] * self.low.float()
        return nn.functional.linear(hidden, self.embed.weight).square().mean()


def groups(model: nn.Module) -> list[dict[str, Any]]:
    names = dict(model.named_parameters())
    decayed = [p for n, p in names.items() if p.ndim > 1 and p.requires_grad]
    rest = [p for n, p in names.items() if p.ndim <= 1 and p.requires_grad]
    return [{"params": decayed}, {"params": rest, "lr": 3e-3, "weight_decay": 0.0}]


def batch(step: int, rank: int) -> torch.Tensor:
    return torch.randint(13, (2, 4), generator=torch.Generator().manual_seed(100 * step + rank))


def passes(model: nn.Module, exchange: GradientReducer, world: World, step: int) -> Summed:
    """Rank r runs 1 + r % 2 passes, rank 0 none in step 2; the branch is off at first, on some ranks only later."""
    exchange.begin(step, world)
    count = 0 if step == 2 and world.rank == 0 else 1 + world.rank % 2
    for number in range(count):
        with exchange.share((world.rank,), (number,)):
            if number == count - 1:
                exchange.last_backward()
            model(batch(step, world.rank + 10 * number), step > 1 and world.rank > 0).backward()
    summed = exchange.finish()
    exchange.committed()
    return summed


def both(world: World, name: str, fractions: Sequence[float], native: bool, steps: int, bucket: int) -> None:
    """Plain and sharded side by side, with a schedule: the same bits of parameters and of optimizer state."""
    with collectives_of(world, fractions, native) as collectives:
        torch.manual_seed(0)
        plain, sharded = Small(), Small()
        sharded.load_state_dict(plain.state_dict())
        world.collectives = collectives
        whole = GradientReducer(plain.parameters(), bucket_bytes=bucket)
        parts = GradientReducer(sharded.parameters(), bucket_bytes=bucket, scatter=True)
        reference, inner = (OPTIMIZERS[name](groups(model)) for model in (plain, sharded))
        optimizer = ShardedOptimizer(inner, sharded, parts, world)
        schedules = [torch.optim.lr_scheduler.LinearLR(o, 0.1, total_iters=5) for o in (reference, inner)]
        exact = not native
        for step in range(steps):
            hand_out(passes(plain, whole, world, step), whole.buckets)
            summed = passes(sharded, parts, world, step)
            norm = optimizer.clip_gradients(summed)
            squares = [p.grad.double().square().sum() for p in plain.parameters() if p.grad is not None]
            assert norm == pytest.approx(math.sqrt(sum(squares)), rel=1e-5 if exact else 1e-2)
            reference.step()
            optimizer.step(summed)
            for schedule in schedules:
                schedule.step()
        optimizer.wait()
        same(plain.state_dict(), sharded.state_dict(), exact)
        same(reference.state_dict(), optimizer.state_dict(), exact)
        everywhere(world, sharded)
        optimizer.close()
        assert [len(g["params"]) for g in inner.param_groups] == [len(g["params"]) for g in reference.param_groups]


def same(one: Any, two: Any, exact: bool) -> None:
    if isinstance(one, torch.Tensor):
        assert one.shape == two.shape
        assert one.dtype == two.dtype
        assert torch.equal(one, two) if exact else torch.allclose(one.float(), two.float(), rtol=2e-2, atol=1e-5)
    elif isinstance(one, dict):
        assert one.keys() == two.keys()
        for key, value in one.items():
            same(value, two[key], exact)
    elif isinstance(one, list):
        assert len(one) == len(two)
        for a, b in zip(one, two, strict=True):
            same(a, b, exact)
    else:
        assert one == two


def everywhere(world: World, model: nn.Module) -> None:
    """Every rank has the same bits."""
    rows = world.gather([p.detach().float().numpy().tobytes() for p in model.parameters()])
    assert all(row == rows[0] for row in rows)


def all_optimizers(world: World) -> None:
    for name in OPTIMIZERS:
        if name == "OffloadedAdamW" and open_host_update().name == "torch":
            continue  # without a compiler: torch's own update has other last bits where a rank's range begins anywhere
        both(world, name, FRACTIONS["uneven"], False, 4, 256)


def test_the_same_bits_as_the_plain_optimizer() -> None:
    run_ranks(3, all_optimizers)


def any_owners(world: World) -> None:
    for fractions in FRACTIONS.values():
        for bucket in (1, 1 << 20):
            both(world, "AdamW", fractions, False, 3, bucket)


@pytest.mark.parametrize("ranks", [2, 4])
def test_any_owners(ranks: int) -> None:
    run_ranks(ranks, any_owners)


def test_torchs_own_collectives() -> None:
    run_ranks(3, both, "SGD", FRACTIONS["uneven"], True, 3, 256)


def two_hundred_steps(world: World) -> None:
    with collectives_of(world, FRACTIONS["uneven"]) as collectives:
        torch.manual_seed(0)
        model = Small()
        world.collectives = collectives
        exchange = GradientReducer(model.parameters(), bucket_bytes=512, scatter=True)
        optimizer = ShardedOptimizer(OPTIMIZERS["AdamW"](groups(model)), model, exchange, world)
        before = [p.detach().clone() for p in model.parameters()]
        for step in range(200):
            optimizer.apply(passes(model, exchange, world, step), 0.5)
        optimizer.wait()
        everywhere(world, model)
        moved = {n for (n, p), old in zip(model.named_parameters(), before, strict=True) if not torch.equal(p, old)}
        assert moved == {n for n, _ in model.named_parameters()} - {"unused", "frozen"}


def test_the_same_bits_on_all_ranks_after_200_steps() -> None:
    run_ranks(4, two_hundred_steps)


def saved(world: World, folder: Path, name: str, fractions: Sequence[float], sharded: bool) -> bytes:
    """Three steps, then a checkpoint: parameters and whole optimizer state."""
    model, optimizer, _, stack = trained(world, name, fractions, sharded, 3)
    checkpoints = Checkpoints(folder, world, 2)
    checkpoints.save(3, model, owner_of(model, optimizer), {})
    checkpoints.close()
    return everything(model, optimizer, stack)


def resumed(world: World, folder: Path, name: str, fractions: Sequence[float], sharded: bool) -> bytes:
    model, optimizer, _, stack = trained(world, name, fractions, sharded, 1)
    checkpoints = Checkpoints(folder, world, 2)
    path = checkpoints.latest()
    assert path is not None
    checkpoints.load(path, model, owner_of(model, optimizer))
    checkpoints.close()
    return everything(model, optimizer, stack)


def owner_of(model: nn.Module, optimizer: Any) -> StateOwner:
    return optimizer if isinstance(optimizer, ShardedOptimizer) else Replicated(optimizer, model)


def trained(
    world: World, name: str, fractions: Sequence[float], sharded: bool, steps: int
) -> tuple[Any, Any, Any, ExitStack]:
    stack = ExitStack()
    torch.manual_seed(steps)
    model = Small()
    optimizer: Any = OPTIMIZERS[name](groups(model))
    if not sharded:
        for step in range(steps):
            optimizer.zero_grad()
            for rank in range(world.size):
                model(batch(step, rank), False).backward()
            optimizer.step()
        return model, optimizer, None, stack
    world.collectives = stack.enter_context(collectives_of(world, fractions))
    exchange = GradientReducer(model.parameters(), bucket_bytes=300, scatter=True)
    optimizer = ShardedOptimizer(optimizer, model, exchange, world)
    stack.callback(optimizer.close)
    for step in range(steps):
        optimizer.step(passes(model, exchange, world, step))
    return model, optimizer, exchange, stack


def everything(model: nn.Module, optimizer: Any, stack: ExitStack) -> bytes:
    """Pickled: the other process's tensors would go with it."""
    state = pickle.dumps({"model": model.state_dict(), "optimizer": optimizer.state_dict()})
    stack.close()
    return state


@pytest.mark.parametrize(
    ("name", "before", "after"),
    [
        ("AdamW", (4, True), (3, True)),
        ("AdamW", (3, True), (1, False)),
        ("AdamW", (1, False), (3, True)),
        ("MuonAdamW", (3, True), (2, True)),
        ("Adafactor", (3, True), (1, False)),
        ("Adafactor", (1, False), (2, True)),
    ],
)
def test_resume_on_another_number_of_ranks_is_exact(
    name: str, before: tuple[int, bool], after: tuple[int, bool], tmp_path: Path
) -> None:
    expected = pickle.loads(run_ranks(before[0], saved, tmp_path, name, FRACTIONS["uneven"], before[1])[0])
    assert len(expected["optimizer"]["state"]) >= 6
    for state in run_ranks(after[0], resumed, tmp_path, name, (0.2, 0.7), after[1]):
        same(expected, pickle.loads(state), True)


def exchanged(world: World) -> None:
    """The whole state goes to a plain optimizer and back."""
    model, sharded, exchange, stack = trained(world, "AdamW", FRACTIONS["uneven"], True, 3)
    state = sharded.state_dict()
    plain_model = Small()
    plain = OPTIMIZERS["AdamW"](groups(plain_model))
    plain.load_state_dict(state)
    same(state, plain.state_dict(), True)
    sharded.wait()
    plain_model.load_state_dict(model.state_dict())
    changed = plain.state_dict()
    changed["param_groups"][0]["lr"] = 0.5
    sharded.load_state_dict(changed)
    same(changed, sharded.state_dict(), True)
    plain.load_state_dict(changed)
    # one rank alone has a pass: its gradient is the sum, bit for bit
    exchange.begin(7, world)
    if world.rank == 1:
        with exchange.share((1,), (0,)):
            model(batch(7, 0), True).backward()
    plain_model(batch(7, 0), True).backward()
    plain.step()
    sharded.step(exchange.finish())
    sharded.wait()
    same(plain_model.state_dict(), model.state_dict(), True)
    same(plain.state_dict(), sharded.state_dict(), True)
    with pytest.raises(ValueError, match="parameter groups of sizes"):
        sharded.load_state_dict({"state": {}, "param_groups": [{"params": [0]}]})
    stack.close()


def test_state_is_interchangeable_with_the_plain_optimizers() -> None:
    run_ranks(2, exchanged)


@pytest.mark.parametrize(
    ("shape", "start", "stop"), [((), 0, 1), ((7,), 2, 6), ((4, 5), 3, 17), ((3, 4, 5), 7, 52), ((2, 1, 3, 2), 1, 11)]
)
def test_boxes_cover_a_range_once(shape: tuple[int, ...], start: int, stop: int) -> None:
    whole = torch.arange(math.prod(shape)).view(shape)
    piece = Piece(whole.flatten()[start:stop], shape, start)
    assert len(piece.boxes()) <= max(1, 2 * len(shape) - 1)
    seen = []
    for offsets, sizes in piece.boxes():
        part = whole[tuple(slice(o, o + s) for o, s in zip(offsets, sizes, strict=True))]
        assert torch.equal(piece.box(offsets), part)
        seen += part.flatten().tolist()
    assert sorted(seen) == list(range(start, stop))
    assert boxes(shape, 0, 0) == []


def test_any_range_of_a_tensor_is_boxes() -> None:
    rng = random.Random(0)
    for _ in range(300):
        shape = [rng.randint(1, 4) for _ in range(rng.randint(1, 4))]
        start, stop = sorted(rng.randint(0, math.prod(shape)) for _ in range(2))
        whole = torch.arange(math.prod(shape)).view(shape)
        seen = []
        for offsets, sizes in boxes(shape, start, stop):
            seen += whole[tuple(slice(o, o + s) for o, s in zip(offsets, sizes, strict=True))].flatten().tolist()
        assert sorted(seen) == list(range(start, stop))


class Logged:
    """Collectives that gather nothing and note when they are waited for."""

    sent_bytes = 0

    def __init__(self) -> None:
        self.log: list[str] = []
        self.names: dict[int, str] = {}

    def all_gather(self, flat: torch.Tensor, *, cuts: Sequence[int] = ()) -> "Logged":
        handle = Logged()
        handle.log, handle.names = self.log, {0: self.names[flat.data_ptr()]}
        self.log.append(f"gather {handle.names[0]}")
        return handle

    def wait(self) -> None:
        self.log.append(f"wait {self.names[0]}")


class Chain(nn.Module):
    """The third layer's weight is used by the whole, not by a call of the layer."""

    def __init__(self, log: list[str]) -> None:
        super().__init__()
        self.layers, self.log = nn.ModuleList(nn.Linear(3, 3, bias=False) for _ in range(3)), log

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for index in range(2):
            x = self.layers[index](x)
            self.log.append(f"ran {index}")
        x = nn.functional.linear(x, self.layers[2].weight)
        self.log.append("ran 2")
        return x


def logged_chain() -> tuple[Logged, Chain, ParameterGather]:
    collectives = Logged()
    model = Chain(collectives.log)
    flats = FlatBuckets(build_buckets(model.parameters(), 1))
    collectives.names = {layer.weight.data_ptr(): str(i) for i, layer in enumerate(model.layers)}
    return collectives, model, ParameterGather(model, flats, collectives, Recorder())  # type: ignore[arg-type]


def test_each_layer_waits_for_its_own_parameters_only() -> None:
    collectives, model, gather = logged_chain()
    gather.start()
    model(torch.ones(1, 3))
    assert collectives.log == [
        *("gather 0", "gather 1", "gather 2"),
        *("wait 0", "ran 0", "wait 1", "ran 1", "wait 2", "ran 2"),
    ]
    collectives.log.clear()
    model(torch.ones(1, 3))
    assert collectives.log == ["ran 0", "ran 1", "ran 2"]


def test_parameters_are_waited_for_before_they_are_used_otherwise() -> None:
    collectives, model, gather = logged_chain()
    gather.start()
    model.layers[1](torch.ones(1, 3))
    assert collectives.log[3:] == ["wait 1"]
    model.state_dict()
    assert sorted(collectives.log[4:]) == ["wait 0", "wait 2"]
    collectives.log.clear()
    gather.start()
    with pytest.raises(RuntimeError, match="shape"):
        model(torch.ones(1, 4))
    gather.wait_all()
    gather.close()
    collectives.log.clear()
    gather.start()
    model(torch.ones(1, 3))
    assert [line for line in collectives.log if line.startswith("wait")] == [], "the hooks are gone"


def bad_input(world: World) -> None:
    def shard(model: nn.Module, optimizer: torch.optim.Optimizer | None = None) -> ShardedOptimizer:
        exchange = GradientReducer(model.parameters(), scatter=True)
        return ShardedOptimizer(optimizer or torch.optim.SGD(model.parameters(), lr=0.1), model, exchange, world)

    with pytest.raises(UserError, match="sparse gradients"):
        shard(nn.EmbeddingBag(4, 3, sparse=True))
    with pytest.raises(UserError, match="not the model's"):
        shard(nn.Linear(2, 2), torch.optim.SGD(nn.Linear(3, 3).parameters()))
    model = nn.Linear(2, 2)
    exchange = GradientReducer(model.parameters(), scatter=True)
    inner = torch.optim.SGD(model.parameters())
    optimizer = ShardedOptimizer(inner, model, exchange, world)
    with pytest.raises(UserError, match="closure"):
        optimizer.step(lambda: 0.0)  # type: ignore[arg-type]
    inner.add_param_group({"params": [nn.Parameter(torch.ones(2))]})
    exchange.begin(0, world)
    with pytest.raises(UserError, match="added to an optimizer"):
        optimizer.step(exchange.finish())
    late = nn.Linear(2, 2)
    late.bias.requires_grad = False
    exchange = GradientReducer(late.parameters(), scatter=True)
    late.bias.requires_grad = True
    with pytest.raises(UserError, match="parameter bias was made trainable"):
        ShardedOptimizer(torch.optim.SGD(late.parameters()), late, exchange, world)
    functional = nn.Linear(4, 3, bias=False)
    exchange = GradientReducer(functional.parameters(), scatter=True)
    ShardedOptimizer(torch.optim.SGD(functional.parameters()), functional, exchange, world)
    exchange.begin(0, world)
    with pytest.raises(UserError, match="sparse gradient"), exchange.share((world.rank,), (0,)):
        nn.functional.embedding(torch.tensor([1]), functional.weight, sparse=True).sum().backward()


def test_bad_input() -> None:
    run_ranks(2, bad_input)


def test_one_rank_is_refused() -> None:
    model = nn.Linear(2, 2)
    with pytest.raises(UserError, match="one rank has nothing to shard"):
        ShardedOptimizer(torch.optim.SGD(model.parameters()), model, GradientReducer(model.parameters()), World())
