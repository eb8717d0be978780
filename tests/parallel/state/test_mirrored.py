"""Optimizer state dealt out to members that die and join: bit for bit that of one process."""

import threading
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from elastic_jobs import eventually
from heteromesh.comm.gradients.buckets import build_buckets
from heteromesh.comm.gradients.exchange import Summed
from heteromesh.comm.session import Attempt
from heteromesh.comm.tcp.state_transfer import pack, unpack
from heteromesh.comm.world import World
from heteromesh.errors import UserError
from heteromesh.faults.coordinator.server import Coordinator
from heteromesh.faults.member.member import JoinOptions, Member
from heteromesh.faults.member.session import Elastic
from heteromesh.faults.membership.membership import Bounds
from heteromesh.faults.membership.view import Stopped
from heteromesh.faults.wire.deadlines import Timing
from heteromesh.parallel.state.owner import Replicated
from heteromesh.parallel.state.parts import plan_moves
from heteromesh.parallel.state.sharded import Sharded
from heteromesh.planner.ownership.ownership import Ownership
from heteromesh.runtime.records.checkpoint import Checkpoints

STEPS, LIMIT, WHENEVER = 8, 2.0, -2
BIG = [(5, 3), (), (0, 2), (40,), (6, 2)]
SMALL = [(2,), (1,)]


class Dead(Exception):
    pass


class Training:
    """A model whose gradients follow from the step; two groups with rates of their own and a schedule."""

    def __init__(self, shapes: Any) -> None:
        torch.manual_seed(3)
        trained = [nn.Parameter(torch.randn(shape)) for shape in shapes]
        trained[-1] = nn.Parameter(trained[-1].detach().double())
        frozen = nn.Parameter(torch.randn(3), requires_grad=False)
        self.model = nn.Module()
        self.model.trained, self.model.frozen = nn.ParameterList(trained), frozen
        self.buckets = build_buckets(trained, 200)
        groups = [{"params": [trained[0], frozen], "lr": 0.1}, {"params": trained[1:], "lr": 0.01}]
        self.optimizer = torch.optim.AdamW(groups)
        self.schedule = torch.optim.lr_scheduler.LinearLR(self.optimizer, 0.5, total_iters=6)

    def sums(self, step: int) -> Summed:
        noise, flats, present = torch.Generator().manual_seed(step), [], {}
        for bucket in self.buckets:
            like = bucket.parameters[0]
            flats.append(torch.randn(bucket.offsets[-1], generator=noise).to(like))
            # one has none in the first steps: no state either
            present |= {p: step > 2 or p is not self.model.trained[0] for p in bucket.parameters}
        scale = 0.25 if step % 2 else 1.0
        facts = {"loss": 0.0, "valid": 0, "digest": "", "exposed_seconds": 0.0}
        return Summed(present=present, tensors=tuple(flats), scale=scale, **facts)

    def plain_step(self, step: int) -> float:
        """What torch itself does with such gradients."""
        sums, given = self.sums(step), []
        for bucket, flat in zip(self.buckets, sums.tensors, strict=True):
            for parameter, (start, stop) in zip(bucket.parameters, pairwise(bucket.offsets), strict=True):
                if sums.present[parameter]:
                    parameter.grad = (flat[start:stop] * sums.scale).view(parameter.shape)
                    given.append(parameter)
        norm = float(nn.utils.clip_grad_norm_(given, LIMIT))
        self.optimizer.step()
        self.optimizer.zero_grad()
        self.schedule.step()
        return norm


def sharded(training: Training) -> Sharded:
    return Sharded(training.optimizer, training.model, training.buckets)


class Toy:
    """What a training loop does with its state owner in a job of changing members."""

    def __init__(
        self, name: str, shapes: Any, *, speed: float = 1.0, dies_in: int = -1, where: str = "step", waits_in: int = -1
    ) -> None:
        self.name, self.shapes, self.speed = name, shapes, speed
        self.dies_in, self.where, self.waits_in, self.go = dies_in, where, waits_in, threading.Event()
        self.training = Training(shapes)
        self.held = sharded(self.training)
        self.done, self.bytes, self.norms = 0, 0, list[float]()
        self.state: Any = None

    def run(self, address: Any, begin: threading.Event) -> "Toy":
        member = Member(JoinOptions(coordinators=[address], secret=b"s", name=self.name))
        session = Elastic(member, self._capture, self._adopt)
        try:
            begin.wait(150)
            self._train(session)
        finally:
            session.close()
            self.held.close()
        return self

    def _train(self, session: Elastic) -> None:
        session.start()
        while self.done < STEPS:
            if session.commit(self._attempt, self._overlap).result:
                self.held.update()
                self.training.schedule.step()
                self.norms.append(self.norm)
                self.done += 1
                self.bytes = self.held.state_bytes
            else:
                self.held.finish_reshard()
        session.commit(self._gather)

    def _attempt(self, world: World) -> Attempt[bool]:
        if self.done == self.waits_in:
            self.go.wait(150)
        self._maybe_die("step")
        self._break_off("in refresh", world)
        digest = self.held.refresh(world)
        self._maybe_die("after refresh")
        if self.held.is_settled(world):
            return Attempt(True, digest)
        speeds = world.gather(self.speed)
        self._break_off("in reshard", world)
        digest = self.held.reshard(world, speeds)
        self._maybe_die("after reshard")
        return Attempt(False, digest)

    def _overlap(self, settled: bool) -> None:
        if settled:
            self.norm = self.held.take(self.training.sums(self.done), LIMIT, World())

    def _gather(self, world: World) -> Attempt[None]:
        with self.held.gathered(world):
            if world.rank == 0:
                self.state = self.held.state_dict()
        return Attempt(None, "")

    def _maybe_die(self, where: str) -> None:
        if where == self.where and self.dies_in in (self.done, WHENEVER):
            raise Dead

    def _break_off(self, where: str, world: Any) -> None:
        """It dies when it has sent a part of what the others need."""
        if (self.done, where) != (self.dies_in, self.where):
            return
        send, sent = world.exchange.send_bytes, []

        def send_once(*args: Any, **options: Any) -> Any:
            if sent:
                raise Dead
            sent.append(1)
            return send(*args, **options)

        world.exchange.send_bytes = send_once

    def _capture(self) -> Any:
        model = dict(self.training.model.state_dict())
        schedule = self.training.schedule.state_dict()
        return {"done": self.done, "model": model, "schedule": schedule, "held": self.held.snapshot()}

    def _adopt(self, state: Any) -> None:
        self.done = state["done"]
        self.training.model.load_state_dict(state["model"])
        self.training.schedule.load_state_dict(state["schedule"])
        self.held.adopt(state["held"])


class Late(Toy):
    """Looks at what two members have left of the optimizer only when it is told to go on."""

    def _attempt(self, world: World) -> Attempt[bool]:
        if world.size == 2:
            self.go.wait(150)
        return super()._attempt(world)


class Toys:
    """A coordinator and members in threads, which arrive in the order in which they are started, first four at once."""

    def __init__(self, coordinator: Coordinator, pool: ThreadPoolExecutor) -> None:
        self._membership, self._address = coordinator.membership, coordinator.address
        self._pool, self._started, self._begin = pool, 0, threading.Event()

    def start(self, *toys: Toy) -> list["Future[Toy]"]:
        futures = []
        for toy in toys:
            futures.append(self._pool.submit(toy.run, self._address, self._begin))
            self._started += 1
            eventually(lambda: self._membership.counts["joined"] == self._started)
        self._membership.bounds = Bounds(min=1)
        self._begin.set()
        return futures


@contextmanager
def toys(least: int = 4) -> Iterator[Toys]:
    timing = Timing(silence=10, stuck=30)
    coordinator = Coordinator(b"s", bounds=Bounds(min=least), timing=timing).start()
    with ThreadPoolExecutor(8) as pool:
        try:
            yield Toys(coordinator, pool)
        finally:
            coordinator.stop()


def check(toy: Toy, shapes: Any) -> None:
    """It ended with the same bits as one process."""
    alone = Training(shapes)
    norms = [alone.plain_step(step) for step in range(STEPS)]
    assert toy.done == STEPS
    assert toy.norms == norms[STEPS - len(toy.norms) :]
    for mine, theirs in zip(toy.training.model.parameters(), alone.model.parameters(), strict=True):
        assert torch.equal(mine.detach(), theirs.detach())
    if toy.state is not None:
        same_state(toy.state, alone)


def same_state(mine: Any, alone: Training) -> None:
    state, parameters = alone.optimizer.state_dict(), [p for g in alone.optimizer.param_groups for p in g["params"]]
    assert mine["param_groups"] == state["param_groups"]
    # a parameter without elements has no state to deal out
    whole = {number: entries for number, entries in state["state"].items() if parameters[number].numel()}
    assert mine["state"].keys() == whole.keys()
    for number, entries in whole.items():
        assert mine["state"][number].keys() == entries.keys()
        for key, value in entries.items():
            assert torch.equal(mine["state"][number][key], value), (number, key)
            assert mine["state"][number][key].dtype == value.dtype


@pytest.mark.parametrize(
    ("shapes", "where"),
    [(BIG, "after"), (BIG, "in"), (SMALL, "after")],
    ids=["big", "lost while it sends", "fewer elements than members"],
)
def test_losses_and_joins_leave_the_bits_as_they_are(shapes: Any, where: str) -> None:
    with toys() as job:
        first = Toy("a", shapes, speed=1.0, dies_in=5, where="after refresh")
        lost = Toy("b", shapes, speed=0.0, dies_in=2)
        stays = Toy("c", shapes, speed=0.5, waits_in=4)
        unlucky = Toy("d", shapes, speed=0.3, dies_in=7, where=f"{where} refresh")
        futures = job.start(first, lost, stays, unlucky)
        with pytest.raises(Dead):
            futures[1].result(20)
        # who comes before the others wait would be dealt a part at once
        eventually(lambda: stays.done == stays.waits_in)
        # the second one dies while its part is dealt out to it
        joins, brief = Toy("e", shapes), Toy("f", shapes, dies_in=WHENEVER, where="after reshard")
        late = job.start(joins, brief)
        stays.go.set()
        for future in (futures[0], futures[3], late[1]):
            with pytest.raises(Dead):
                future.result(20)
        for future in (futures[2], late[0]):
            check(future.result(20), shapes)
        assert {stays.state is None, joins.state is None} == {True, False}, "one of them gathered the state"


def test_a_source_that_is_lost_while_it_deals_out_is_replaced_by_the_mirror() -> None:
    with toys() as job:
        breaks = Toy("b", BIG, dies_in=3, where="in reshard")
        four = [Toy("a", BIG, waits_in=3), breaks, Toy("c", BIG), Toy("d", BIG, dies_in=3)]
        futures = job.start(*four)
        with pytest.raises(Dead):
            futures[3].result(20)
        four[0].go.set()
        with pytest.raises(Dead):
            futures[1].result(20)
        for future in (futures[0], futures[2]):
            check(future.result(20), BIG)


def test_one_member_alone_has_the_bits_too() -> None:
    with toys(least=1) as job:
        (future,) = job.start(Toy("a", BIG))
        check(future.result(20), BIG)


def test_two_that_are_no_neighbours_may_be_lost_at_once_and_each_holds_a_part() -> None:
    with toys() as job:
        four = [Toy(name, BIG, dies_in=STEPS - 1 if name in "bd" else -1) for name in "abcd"]
        futures = job.start(*four)
        for future in (futures[0], futures[2]):
            check(future.result(20), BIG)
    alone = Training(BIG)
    for step in range(STEPS - 1):
        alone.plain_step(step)
    whole = sum(v.nbytes for state in alone.optimizer.state.values() for v in state.values())
    assert 0 < four[1].bytes < 0.7 * whole, "with four members each held half, and some scalars"


def test_owner_and_mirror_lost_at_once_end_the_job_with_a_sentence() -> None:
    with toys() as job:
        late = Late("d", BIG)
        futures = job.start(*(Toy(name, BIG, dies_in=3 if name in "bc" else -1) for name in "abc"), late)
        with pytest.raises(Stopped, match="c and b were lost at once, and with them both copies of a part"):
            futures[0].result(20)
        # it hears of the cause although the one that found it has left meanwhile
        late.go.set()
        with pytest.raises(Stopped, match="c and b were lost at once"):
            futures[3].result(20)


@pytest.mark.parametrize("speeds", [(1.0,), (1.0, 1.0), (1.0, 0.5, 0.25, 0.0), (0.1, 0.7, 0.3)])
def test_moves_bring_everybody_what_it_wants_once_and_keep_what_is_there(speeds: tuple[float, ...]) -> None:
    sizes, members = (0, 1, 2, 57), tuple(range(3, 3 + len(speeds)))
    now = Ownership(fractions=speeds, members=members, copies=2)
    left = (*members[1:], 9, 10) if len(members) > 1 else (*members, 9)
    then = Ownership(fractions=tuple(range(1, len(left) + 1)), members=left, copies=2)
    plans = [plan_moves(now, left, rank, sizes, then.ranges_held_by) for rank in range(len(left))]
    for rank, member in enumerate(left):
        wanted = [(b, i) for b, size in enumerate(sizes) for r in then.ranges_held_by(member, size) for i in range(*r)]
        given = {
            giver: [(b, i) for b, low, high in out[rank] for i in range(low, high)]
            for giver, (out, _) in enumerate(plans)
        }
        assert sorted(e for elements in given.values() for e in elements) == sorted(wanted)
        assert [giver for giver in given if given[giver] and giver != rank] == plans[rank][1]
        here = {
            (b, i)
            for b, s in enumerate(sizes)
            if member in members
            for r in now.ranges_held_by(member, s)
            for i in range(*r)
        }
        assert set(given[rank]) == here & set(wanted), "what it holds already is not sent to it"


def test_what_everybody_holds_is_the_plain_optimizers_bits() -> None:
    plain, whole = Training(BIG), Training(BIG)
    owner = Replicated(whole.optimizer, whole.model, whole.buckets)
    norms = []
    for step in range(STEPS):
        norms.append(owner.apply(whole.sums(step), LIMIT))
        whole.schedule.step()
    assert norms == [plain.plain_step(step) for step in range(STEPS)]
    for mine, theirs in zip(whole.model.parameters(), plain.model.parameters(), strict=True):
        assert torch.equal(mine.detach(), theirs.detach())
        assert mine.grad is None
    other = Training(BIG)
    adopts = Replicated(other.optimizer, other.model, other.buckets)
    adopts.adopt(owner.snapshot())
    assert str(other.optimizer.state_dict()) == str(plain.optimizer.state_dict())


@pytest.mark.parametrize("mirrored", [False, True])
def test_sums_that_are_not_finite_change_nothing(mirrored: bool) -> None:
    training = Training(BIG)
    plain = Replicated(training.optimizer, training.model, training.buckets)
    owner = sharded(training) if mirrored else plain
    before = [p.detach().clone() for p in training.model.parameters()]
    sums = training.sums(4)
    sums.tensors[0][0] = torch.inf
    assert owner.apply(sums, LIMIT) == torch.inf
    for parameter, old in zip(training.model.parameters(), before, strict=True):
        assert torch.equal(parameter.detach(), old)


def test_what_is_not_element_wise_is_refused() -> None:
    model = nn.Linear(3, 1, bias=False)
    with pytest.raises(UserError, match="LBFGS can't be sharded"):
        Sharded(torch.optim.LBFGS(model.parameters()), model, build_buckets([model.weight]))


def test_who_joins_before_anything_is_dealt_out_gets_everything() -> None:
    source, joiner = Toy("a", BIG), Toy("b", BIG)
    for step in range(STEPS):
        source.held.apply(source.training.sums(step), LIMIT)
        source.training.schedule.step()
    source.done = STEPS
    head, tensors = pack(source._capture())
    state, rooms = unpack(head)
    for tensor, room in zip(tensors, rooms, strict=True):
        room.copy_(tensor)
    joiner._adopt(state)
    joiner.state = joiner.held.state_dict()
    check(joiner, BIG)
    for mine, theirs in zip(joiner.held.fragments, source.held.fragments, strict=True):
        assert mine.tensor is not theirs.tensor


@pytest.mark.parametrize("before", ["dealt out", "plain"])
@pytest.mark.parametrize("after", ["dealt out", "plain"])
def test_checkpoints_are_the_plain_optimizers(before: str, after: str, tmp_path: Path) -> None:
    alone, saves, loads = Training(BIG), Training(BIG), Training(BIG)
    owner: Any = sharded(saves) if before == "dealt out" else Replicated(saves.optimizer, saves.model, saves.buckets)
    for step in range(STEPS):
        alone.plain_step(step)
        owner.apply(saves.sums(step), LIMIT)
        saves.schedule.step()
    checkpoints = Checkpoints(tmp_path, World(), 2)
    checkpoints.save(STEPS, saves.model, owner, {})
    checkpoints.wait()
    taker: Any = sharded(loads) if after == "dealt out" else Replicated(loads.optimizer, loads.model, loads.buckets)
    path = checkpoints.latest()
    assert path is not None
    checkpoints.load(path, loads.model, taker)
    checkpoints.close()
    state = taker.state_dict() if after == "dealt out" else loads.optimizer.state_dict()
    if after == "plain":
        state["state"] = {n: e for n, e in state["state"].items() if e["exp_avg"].numel()}
    same_state(state, alone)


def test_closing_gives_the_parameters_back() -> None:
    training = Training(BIG)
    before = [list(group["params"]) for group in training.optimizer.param_groups]
    held = sharded(training)
    assert training.optimizer.param_groups[1]["params"][0] is not before[1][0]
    held.close()
    assert all(
        a is b
        for group, own in zip(training.optimizer.param_groups, before, strict=True)
        for a, b in zip(group["params"], own, strict=True)
    )
