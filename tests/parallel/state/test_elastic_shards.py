"""An optimizer dealt out to members that die and join: bit for bit the one that is in one piece."""

import os
import signal
import threading
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from elastic_jobs import STEPS, Job, eventually, through_losses_and_a_join
from heteromesh.comm.records import Recorder
from heteromesh.comm.tcp.state_transfer import pack, unpack
from heteromesh.errors import UserError
from heteromesh.faults.coordinator.server import Coordinator
from heteromesh.faults.member.commit import Steps
from heteromesh.faults.member.group import Group
from heteromesh.faults.member.member import Member, Terms
from heteromesh.faults.membership.deadlines import Timing
from heteromesh.faults.membership.membership import Bounds
from heteromesh.faults.membership.view import Stopped, View
from heteromesh.runtime.training.mirrored import ShardedState
from heteromesh.runtime.training.ownership import Layout
from trainers import make_trainer

TOY_STEPS = 8
BIG = [(5, 3), (), (0, 2), (40,), (6, 2)]
SMALL = [(2,), (1,)]


class Dead(Exception):
    pass


def optimizer_of(shapes: Any) -> torch.optim.Optimizer:
    """Two groups with rates of their own; among the parameters a frozen one and one in double precision."""
    torch.manual_seed(3)
    parameters = [torch.nn.Parameter(torch.randn(shape)) for shape in shapes]
    parameters[-1] = torch.nn.Parameter(parameters[-1].detach().double())
    frozen = torch.nn.Parameter(torch.randn(3), requires_grad=False)
    return torch.optim.AdamW([{"params": [parameters[0], frozen], "lr": 0.1}, {"params": parameters[1:], "lr": 0.01}])


def give_gradients(parameters: list[torch.nn.Parameter], step: int) -> None:
    noise = torch.Generator().manual_seed(step)
    for number, parameter in enumerate(parameters):
        # the first one has none in the first steps: no state either
        if number or step > 2:
            parameter.grad = torch.randn(parameter.shape, generator=noise).to(parameter)


def trained(shapes: Any, steps: int) -> tuple[list[torch.Tensor], Any]:
    """Parameters and optimizer state of one process."""
    optimizer = optimizer_of(shapes)
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    for step in range(steps):
        give_gradients([p for p in parameters if p.requires_grad], step)
        optimizer.step()
        optimizer.zero_grad()
    return [p.detach() for p in parameters], optimizer.state_dict()


class Toy:
    """What the elastic loop does with an optimizer, on gradients that follow from the step."""

    def __init__(
        self, name: str, shapes: Any, *, speed: float = 1.0, dies_in: int = -1, where: str = "step", waits_in: int = -1
    ) -> None:
        self.name, self.shapes, self.speed = name, shapes, speed
        self.dies_in, self.where, self.waits_in, self.go = dies_in, where, waits_in, threading.Event()
        self.optimizer = optimizer_of(shapes)
        self.parameters = [p for group in self.optimizer.param_groups for p in group["params"]]
        self.held = ShardedState(self.optimizer, Recorder())
        self.done, self.bytes = 0, 0
        self.state: Any = None

    def run(self, address: Any, begin: threading.Event) -> "Toy":
        member = Member(Terms(coordinators=[address], secret=b"s", name=self.name))
        try:
            begin.wait(20)
            self._train(Steps(member.group(), self._capture, self._adopt))
        finally:
            member.close()
            self.held.close()
        return self

    def _train(self, steps: Steps) -> None:
        steps.start()
        while self.done < TOY_STEPS:
            if steps.atomic(self._attempt).result:
                give_gradients([p for p in self.parameters if p.requires_grad], self.done)
                self.held.step()
                self.done += 1
                states = self.optimizer.state.values()
                self.bytes = sum(v.nbytes for state in states for v in state.values())
            else:
                self.held.settled()
        steps.atomic(self._gather)

    def _attempt(self, group: Group) -> tuple[bool, str]:
        if self.done == self.waits_in:
            self.go.wait(20)
        self._maybe_die("step")
        if not self.held.is_settled(group.view):
            own: Any = SimpleNamespace(pace=self.speed, of_members=lambda paces, *_: SimpleNamespace(speeds=paces))
            digest = self.held.settle(group, own)
            self._maybe_die("settle")
            return False, digest
        digest = self.held.refresh(group)
        self._maybe_die("refresh")
        return True, digest

    def _gather(self, group: Group) -> tuple[None, str]:
        with self.held.whole(group):
            if group.view.rank == 0:
                self.state = self.optimizer.state_dict()
        return None, ""

    def _maybe_die(self, where: str) -> None:
        if (self.done, where) == (self.dies_in, self.where):
            raise Dead

    def _capture(self) -> Any:
        return {"done": self.done, "model": [p.detach() for p in self.parameters], "held": self.held.capture()}

    def _adopt(self, state: Any) -> None:
        self.done = state["done"]
        for parameter, values in zip(self.parameters, state["model"], strict=True):
            parameter.detach().copy_(values)
        self.held.adopt(state["held"])


class Late(Toy):
    """Looks at what two members have left of the optimizer only when it is told to go on."""

    def _attempt(self, group: Group) -> tuple[bool, str]:
        if group.view.size == 2:
            self.go.wait(20)
        return super()._attempt(group)


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
        self._membership.bounds = Bounds(least=1)
        self._begin.set()
        return futures


@contextmanager
def toys() -> Iterator[Toys]:
    timing = Timing(silence=10, stuck=30)
    coordinator = Coordinator(b"s", bounds=Bounds(least=4), timing=timing).start()
    with ThreadPoolExecutor(8) as pool:
        try:
            yield Toys(coordinator, pool)
        finally:
            coordinator.stop()


def check(toy: Toy, shapes: Any) -> None:
    """It ended with the same bits as one process."""
    parameters, state = trained(shapes, TOY_STEPS)
    assert toy.done == TOY_STEPS
    for mine, theirs in zip(toy.parameters, parameters, strict=True):
        assert torch.equal(mine.detach(), theirs)
    if toy.state is not None:
        assert toy.state["param_groups"] == state["param_groups"]
        # a parameter without elements has no state to deal out
        whole = {number: entries for number, entries in state["state"].items() if parameters[number].numel()}
        assert toy.state["state"].keys() == whole.keys()
        for number, entries in whole.items():
            for key, value in entries.items():
                assert torch.equal(toy.state["state"][number][key], value), (number, key)
                assert toy.state["state"][number][key].dtype == value.dtype


def view_of(count: int) -> View:
    members = tuple(range(3, 3 + count))
    names = tuple(f"m{m}" for m in members)
    return View(group="g", epoch=1, members=members, names=names, addresses=(), stale=(), committed=0, chain="", rank=0)


@pytest.mark.parametrize("count", [0, 1, 2, 5, 1000])
@pytest.mark.parametrize("speeds", [[1.0], [1.0, 1.0], [1.0, 0.5, 0.25, 0.25], [0.1, 0.7, 0.3]])
def test_ranges_are_all_there_uneven_and_held_twice(count: int, speeds: list[float]) -> None:
    layout = Layout.of(view_of(len(speeds)), speeds, count)
    assert layout.bounds[0] == 0
    assert layout.bounds[-1] == count
    for (start, stop), speed in zip(layout.ranges, speeds, strict=True):
        assert abs(stop - start - count * speed / sum(speeds)) <= 1
    held = [r for member in layout.members for r in layout.held_by(member)]
    for r in layout.ranges:
        assert held.count(r) == (0 if r[0] == r[1] else min(2, len(speeds)))


@pytest.mark.parametrize("shapes", [BIG, SMALL], ids=["big", "fewer elements than members"])
def test_losses_and_joins_leave_the_bits_as_they_are(shapes: Any) -> None:
    with toys() as job:
        first = Toy("a", shapes, speed=1.0, dies_in=5, where="refresh")
        lost = Toy("b", shapes, speed=0.2, dies_in=2)
        stays = Toy("c", shapes, speed=0.5, waits_in=4)
        unlucky = Toy("d", shapes, speed=0.3, dies_in=7, where="refresh")
        futures = job.start(first, lost, stays, unlucky)
        with pytest.raises(Dead):
            futures[1].result(20)
        # the second one dies while its part is dealt out to it
        joins, brief = Toy("e", shapes), Toy("f", shapes, dies_in=5, where="settle")
        late = job.start(joins, brief)
        stays.go.set()
        for future in (futures[0], futures[3], late[1]):
            with pytest.raises(Dead):
                future.result(20)
        for future in (futures[2], late[0]):
            check(future.result(20), shapes)
        assert {stays.state is None, joins.state is None} == {True, False}, "one of them gathered the state"


def test_two_that_are_no_neighbours_may_be_lost_at_once_and_each_holds_a_part() -> None:
    with toys() as job:
        four = [Toy(name, BIG, dies_in=TOY_STEPS - 1 if name in "bd" else -1) for name in "abcd"]
        futures = job.start(*four)
        for future in (futures[0], futures[2]):
            check(future.result(20), BIG)
    whole = sum(v.nbytes for state in trained(BIG, 7)[1]["state"].values() for v in state.values())
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


def test_what_is_not_element_wise_is_refused() -> None:
    with pytest.raises(UserError, match="LBFGS can't be sharded"):
        ShardedState(torch.optim.LBFGS([torch.nn.Parameter(torch.zeros(3))]), Recorder())


def test_who_joins_before_anything_is_dealt_out_gets_everything() -> None:
    source, joiner = Toy("a", BIG), Toy("b", BIG)
    for step in range(TOY_STEPS):
        give_gradients([p for p in source.parameters if p.requires_grad], step)
        source.held.step()
    head, tensors = pack(source._capture())
    state, rooms = unpack(head)
    for tensor, room in zip(tensors, rooms, strict=True):
        room.copy_(tensor)
    joiner._adopt(state | {"done": TOY_STEPS})
    check(joiner, BIG)
    for mine, theirs in zip(joiner.optimizer.param_groups, source.optimizer.param_groups, strict=True):
        for a, b in zip(mine["params"], theirs["params"], strict=True):
            assert a is not b
            for key, value in source.optimizer.state[b].items():
                assert torch.equal(joiner.optimizer.state[a][key], value), key


def test_closing_gives_the_parameters_back() -> None:
    optimizer = optimizer_of(BIG)
    before = [list(group["params"]) for group in optimizer.param_groups]
    held = ShardedState(optimizer, Recorder())
    assert optimizer.param_groups[1]["params"][0] is not before[1][0]
    held.close()
    assert all(
        a is b
        for group, own in zip(optimizer.param_groups, before, strict=True)
        for a, b in zip(group["params"], own, strict=True)
    )


@pytest.mark.alone
def test_trainer_losses_stay_and_ordinary_runs_resume_either_way(tmp_path: Path) -> None:
    alone = make_trainer(tmp_path / "alone", max_steps=STEPS + 2).fit().losses
    make_trainer(tmp_path / "run", max_steps=2).fit()
    options: dict[str, Any] = {"shard_optimizer": True, "resume": True, "checkpoint_every": 5}
    (losses, digest), (late, same) = through_losses_and_a_join(tmp_path, **options)
    assert losses == pytest.approx(alone[2:STEPS][-len(losses) :], abs=1e-3)
    assert late == losses[-len(late) :]
    assert digest == same, "the same bits on all members"
    assert sorted(p.name for p in (tmp_path / "run/checkpoints").iterdir())[-1] == f"step-{STEPS:08d}"
    more = make_trainer(tmp_path / "run", max_steps=STEPS + 2, resume=True).fit().losses
    assert more == pytest.approx(alone[STEPS:], abs=1e-3)


@pytest.mark.alone
def test_trainer_tells_the_way_out_when_owner_and_mirror_are_lost(tmp_path: Path) -> None:
    with Job(tmp_path, least=3) as job:
        for index in range(3):
            job.start(index, shard_optimizer=True, checkpoint_every=2, waits_in=6)
        eventually(lambda: list((tmp_path / "run/checkpoints").glob("step-*4")))
        job.coordinator.membership.bounds = Bounds(least=1)
        for index in (1, 2):
            os.kill(job.processes[index].pid, signal.SIGKILL)
        (tmp_path / "go").touch()
        told = job.result(0)
    assert "were lost at once" in told
    assert "step-00000004" in told
