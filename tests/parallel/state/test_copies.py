"""Weights dealt out in two copies to members that die and join: bit for bit those of one process."""

import math
import threading
from dataclasses import replace
from typing import Any

import pytest
import test_mirrored
import torch
from test_mirrored import BIG, SMALL, STEPS, WHENEVER, Dead, Toy, Training, same_state, toys

from elastic_jobs import eventually
from heteromesh.comm.collectives.direct import DirectCollectives
from heteromesh.comm.gradients.buckets import build_buckets
from heteromesh.comm.gradients.exchange import Summed
from heteromesh.comm.session import Attempt
from heteromesh.comm.tcp.state_transfer import digest_of
from heteromesh.comm.world import World
from heteromesh.errors import UserError
from heteromesh.faults.member.member import JoinOptions, Member
from heteromesh.faults.member.session import Elastic
from heteromesh.faults.membership.view import Stopped
from heteromesh.parallel.state.copies import MirroredWeights


@pytest.fixture(autouse=True)
def unclipped(monkeypatch: pytest.MonkeyPatch) -> None:
    """The norm is summed rank by rank: what is clipped by it differs in its last bits from one process."""
    monkeypatch.setattr(test_mirrored, "LIMIT", math.inf)


class Layers(Training):
    """Two layers, and a parameter outside them, as is the frozen one."""

    def __init__(self, shapes: Any) -> None:
        super().__init__(shapes)
        trained = list(self.model.trained)
        half = len(trained) // 2
        self.layers = [trained[:half], trained[half:-1]]
        self.buckets = build_buckets(trained, 200, groups=self.layers[::-1])

    def sums(self, step: int) -> Summed:
        summed = super().sums(step)
        for bucket, flat in zip(self.buckets, summed.tensors, strict=True):
            for index, parameter in enumerate(bucket.parameters):
                if not summed.present[parameter]:
                    bucket.view(flat, index).zero_()
        return summed


class WeightsToy(Toy):
    """What a training loop does with sharded weights in a job of changing members."""

    held: Any
    training: Any

    def __init__(self, name: str, shapes: Any, **options: Any) -> None:
        super().__init__(name, shapes, **options)
        self.training = training = Layers(shapes)
        self.held = MirroredWeights(training.optimizer, training.model, training.buckets, training.layers)
        self.least = math.inf
        self.over = False

    def run(self, address: Any, begin: threading.Event) -> "WeightsToy":
        member = Member(JoinOptions(coordinators=[address], secret=b"s", name=self.name))
        session = Elastic(
            member,
            self._capture,
            self._adopt,
            collectives=lambda world: DirectCollectives(world.exchange, self.held.ownership.fractions),
        )
        try:
            begin.wait(150)
            session.start()
            while not self.over:
                act = session.commit(self._attempt, self._overlap).result
                act()
        finally:
            session.close()
            self.held.close()
        return self

    def _attempt(self, world: World) -> Attempt[Any]:
        if self.done == self.waits_in:
            self.go.wait(150)
        self._maybe_die("step")
        if not self.held.is_settled(world):
            speeds = world.gather(self.speed)
            self._break_off("in reshard", world)
            digest = self.held.reshard(world, speeds)
            self._maybe_die("after reshard")
            return Attempt(self.held.finish_reshard, digest)
        self._compare(world)
        if self.done == STEPS:
            self.state = self._joined(world.gather(self._share()))
            self.held.weights_ready()
            return Attempt(self._end, "ended")
        self.held.begin()
        for layer in (0, 1):
            self.held.show(layer)
            self.held.drop(layer)
        self.least = min(self.least, sum(p.numel() for p in self.training.model.parameters()))
        rank, sums = world.rank, self.training.sums(self.done)
        cuts = [self.held.ownership.ranges(flat.numel())[rank] for flat in sums.tensors]
        own = tuple(flat[low:high].clone() for flat, (low, high) in zip(sums.tensors, cuts, strict=True))
        self.summed = replace(sums, tensors=own)
        self._break_off("in copies", world)
        digest = self.held.copy_sums(self.summed, world)
        self._maybe_die("after copies")
        return Attempt(self._update, digest)

    def _overlap(self, act: Any) -> None:
        if act == self._update:
            self.norm = self.held.take(self.summed, test_mirrored.LIMIT, World())

    def _update(self) -> None:
        self.held.update()
        self.training.schedule.step()
        self.norms.append(self.norm)
        self.done += 1

    def _end(self) -> None:
        self.over = True

    def _compare(self, world: World) -> None:
        """Owner and mirror have the same bits."""

        def bits(index: int) -> str:
            held, sizes = self.held, [bucket.numel for bucket in self.held._buckets]
            slices = [(n, *held.ownership.ranges(size)[index]) for n, size in enumerate(sizes)]
            parts = [*held._optimizer.parts(slices), *(held._weights(*s) for s in slices if s[1] < s[2])]
            # names that came over the network are other objects, which a digest of the whole would tell
            values = [
                (*p[:3], k, digest_of([v])) for p in parts for k, v in sorted({**p.by_element, **p.common}.items())
            ]
            return repr(sorted(values))

        ownership = self.held.ownership
        mine = {i: bits(i) for i in ownership.held_by(world.members[world.rank])}
        self.bytes = sum(
            t.nbytes for t in (*(s.own for s in self.held._shards), *(c.memory for c in self.held._copies))
        )
        everyone = world.gather(mine)
        for index in range(world.size):
            assert len({held[index] for held in everyone if index in held}) <= 1
        assert sum(len(held) for held in everyone) == min(2, world.size) * sum(s > 0 for s in ownership.fractions)

    def _capture(self) -> Any:
        return super()._capture() | {"model": self.held.model_snapshot(self.training.model)}

    def _adopt(self, state: Any) -> None:
        self.done = state["done"]
        self.training.model.load_state_dict(state["model"], strict=False)
        self.training.schedule.load_state_dict(state["schedule"])
        self.held.adopt(state["held"])

    def _share(self) -> Any:
        """What this member would write: of tensors that are cut, where its part begins."""
        weights = self.held.model_entries(self.training.model)
        entries = self.held.checkpoint_entries()
        state = [
            (name, key, *((v.start, v.tensor) if hasattr(v, "boxes") else (-1, v)))
            for name, values in entries["state"].items()
            for key, v in values.items()
        ]
        return [(n, p.start, p.tensor.detach()) for n, p in weights.items()], state, entries["param_groups"]

    def _joined(self, shares: Any) -> Any:
        """The model's weights, and the state as a plain optimizer has it."""
        alone = Layers(self.shapes)
        groups = shares[0][2]
        names = [name for group in groups for name in group["params"]]
        shapes = {n: p.shape for n, p in alone.model.named_parameters()}
        weights = {n: torch.full((p.numel(),), torch.nan, dtype=p.dtype) for n, p in alone.model.named_parameters()}
        state: dict[int, dict[str, Any]] = {}
        for own, entries, _ in shares:
            for name, start, tensor in own:
                weights[name][start : start + tensor.numel()] = tensor
            for name, key, start, value in entries:
                values = state.setdefault(names.index(name), {})
                if start < 0:
                    values[key] = value
                    continue
                whole = values.setdefault(key, torch.full(shapes[name], torch.nan, dtype=value.dtype))
                whole.view(-1)[start : start + value.numel()] = value
        return weights, {
            "state": state,
            "param_groups": [g | {"params": [names.index(n) for n in g["params"]]} for g in groups],
        }


def check(toy: WeightsToy) -> None:
    """It ended with the same bits as one process, and what a checkpoint would have is the same too."""
    alone = Layers(toy.shapes)
    norms = [alone.plain_step(step) for step in range(STEPS)]
    assert toy.done == STEPS
    assert toy.norms == pytest.approx(norms[STEPS - len(toy.norms) :], rel=1e-6)
    for mine, theirs in zip(toy.training.model.parameters(), alone.model.parameters(), strict=True):
        assert torch.equal(mine.detach(), theirs.detach())
    whole = sum(p.numel() for p in alone.model.parameters())
    assert toy.least < whole, "layers were taken away"
    weights, state = toy.state
    for name, theirs in alone.model.named_parameters():
        assert torch.equal(weights[name], theirs.detach().view(-1)), name
    same_state(state, alone)


@pytest.mark.parametrize(
    ("shapes", "where"),
    [(BIG, "after copies"), (BIG, "in copies"), (SMALL, "after copies")],
    ids=["big", "lost while it sends", "fewer elements than members"],
)
def test_losses_and_joins_leave_the_bits_as_they_are(shapes: Any, where: str) -> None:
    with toys() as job:
        first = WeightsToy("a", shapes, speed=1.0, dies_in=5, where="after copies")
        lost = WeightsToy("b", shapes, speed=0.0, dies_in=2)
        stays = WeightsToy("c", shapes, speed=0.5, waits_in=4)
        unlucky = WeightsToy("d", shapes, speed=0.3, dies_in=7, where=where)
        futures = job.start(first, lost, stays, unlucky)
        with pytest.raises(Dead):
            futures[1].result(60)
        eventually(lambda: stays.done == stays.waits_in)
        # the second one dies while its part is dealt out to it
        joins, brief = WeightsToy("e", shapes), WeightsToy("f", shapes, dies_in=WHENEVER, where="after reshard")
        late = job.start(joins, brief)
        stays.go.set()
        for future in (futures[0], futures[3], late[1]):
            with pytest.raises(Dead):
                future.result(60)
        for future in (futures[2], late[0]):
            check(future.result(60))


def test_a_source_that_is_lost_while_it_deals_out_is_replaced_by_the_second_holder() -> None:
    with toys() as job:
        breaks = WeightsToy("b", BIG, dies_in=3, where="in reshard")
        four = [WeightsToy("a", BIG, waits_in=3), breaks, WeightsToy("c", BIG), WeightsToy("d", BIG, dies_in=3)]
        futures = job.start(*four)
        with pytest.raises(Dead):
            futures[3].result(60)
        four[0].go.set()
        with pytest.raises(Dead):
            futures[1].result(60)
        for future in (futures[0], futures[2]):
            check(future.result(60))


def test_each_of_four_holds_half_and_one_alone_everything() -> None:
    with toys() as job:
        four = [WeightsToy(name, BIG) for name in "abcd"]
        for future in job.start(*four):
            check(future.result(60))
    whole = sum(p.nbytes for p in Layers(BIG).model.parameters())
    assert sum(toy.bytes for toy in four) == 2 * whole
    with toys(least=1) as job:
        (future,) = job.start(WeightsToy("a", BIG))
        check(future.result(60))
        assert future.result().bytes == whole


@pytest.mark.parametrize("lost", ["ab", "bd"])
def test_two_lost_at_once_on_one_host_are_survived_and_both_holders_of_a_range_are_not(lost: str) -> None:
    with toys() as job:
        # neighbours are on one host, so copies are two members further
        names = {"x:a": "a", "x:b": "b", "y:c": "c", "y:d": "d"}
        members = [WeightsToy(n, BIG, dies_in=3 if short in lost else -1) for n, short in names.items()]
        futures = job.start(*members)
        if lost == "ab":
            for future in futures[2:]:
                check(future.result(60))
            return
        told = "x:b and y:d were lost at once, and with them both copies of a part of the weights and the optimizer st"
        with pytest.raises(Stopped, match=told):
            futures[0].result(60)


def test_optimizers_that_need_whole_matrices_are_refused() -> None:
    model = torch.nn.Linear(3, 3, bias=False)
    rule = "Adafactor is not element-wise, and where members come .* or turn shard_weights or fault_tolerance off"
    with pytest.raises(UserError, match=rule):
        MirroredWeights(torch.optim.Adafactor(model.parameters()), model, build_buckets(model.parameters()), [])
