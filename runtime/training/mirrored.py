"""The optimizer's state in a job of changing members: whole on every member, or in ranges that two members hold each.

A sharded member updates its own range of the parameters and a neighbour's; owner and mirror do the same arithmetic on
the same sums. So when a member is lost its range lives on in the mirror, and nothing is recomputed.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, Protocol

import torch

from heteromesh.comm.records import Recorder
from heteromesh.faults.member.group import Group
from heteromesh.faults.member.world import EpochWorld
from heteromesh.faults.membership.view import Stopped, View
from heteromesh.parallel.state.elementwise import check_elementwise
from heteromesh.parallel.state.fragments import Fragment
from heteromesh.runtime.engine.local_costs import OwnCosts
from heteromesh.runtime.training.flat import FlatParameters, Held
from heteromesh.runtime.training.ownership import Layout, Range
from heteromesh.runtime.training.parts import Part, by_parameter, joined, swap, told_apart


class OptimizerState(Protocol):
    """What the elastic loop asks of an optimizer's state, wherever it is.

    What it does depends on nothing but what was committed and on the epoch's members: all of them do the same.
    """

    fresh: bool
    """Whether all parameters are up to date on all members."""

    def is_settled(self, view: View) -> bool:
        """Whether it lies as it should for these members."""
        ...

    def refresh(self, group: Group) -> str:
        """In a body of `Steps.atomic`: brings all parameters up to date; a digest of them."""
        ...

    def settle(self, group: Group, own: OwnCosts) -> str:
        """In a body of `Steps.atomic`: prepares what `settled` completes once it is committed; a digest of it."""
        ...

    def settled(self) -> None: ...

    def step(self) -> None:
        """Updates with the gradients of the model's parameters, and drops these."""
        ...

    def whole(self, group: Group) -> Any:
        """In a body of `Steps.atomic`: a context in which rank 0's parameters are up to date and its optimizer has
        the whole state."""
        ...

    def capture(self) -> Any:
        """For a joining member."""
        ...

    def adopt(self, state: Any) -> None: ...

    def close(self) -> None: ...


class WholeState:
    """Every member holds and updates everything."""

    fresh = True

    def __init__(self, optimizer: torch.optim.Optimizer) -> None:
        self._optimizer = optimizer

    def is_settled(self, view: View) -> bool:
        return True

    def refresh(self, group: Group) -> str:
        return ""

    def settle(self, group: Group, own: OwnCosts) -> str:
        return ""

    def settled(self) -> None:
        pass

    def step(self) -> None:
        self._optimizer.step()
        self._optimizer.zero_grad()

    @contextmanager
    def whole(self, group: Group) -> Iterator[None]:
        yield

    def capture(self) -> Any:
        return self._optimizer.state_dict()

    def adopt(self, state: Any) -> None:
        self._optimizer.load_state_dict(state)

    def close(self) -> None:
        pass


class ShardedState:
    """Every member holds and updates its range and its neighbour's (runtime/training/ownership.py).

    Until `close` the optimizer's groups hold this member's fragments; their hyperparameters, and schedules over them,
    work as before. Raises UserError for optimizers that are not element-wise.
    """

    def __init__(self, optimizer: torch.optim.Optimizer, recorder: Recorder) -> None:
        check_elementwise(optimizer)
        self._optimizer, self._recorder = optimizer, recorder
        self._original = [list(group["params"]) for group in optimizer.param_groups]
        self._flat = FlatParameters(self._original)
        self._held: list[Held] = []
        self.layout, self.fresh = Layout(bounds=(0, self._flat.count)), True
        self._arrived_in = -1
        """The epoch in which all parameters have come here, since the last step."""
        self._next: tuple[Layout, list[Range], list[Part]] | None = None
        self._hold(self.layout.ranges, [self._part_of_whole(i) for i in range(len(self._flat.parameters))])

    def is_settled(self, view: View) -> bool:
        return self.layout.members == view.members

    def refresh(self, group: Group) -> str:
        view = group.view
        if not self.fresh and self._arrived_in != view.epoch:
            sources = [view.members.index(m) for m in self._sources(group)]
            kept = self.layout.held_by(view.members[view.rank])
            with self._recorder.span("parameters gathered, exposed", "wait"):
                parts = list(zip(self.layout.ranges, sources, strict=True))
                group.run(lambda transport: self._flat.exchange(transport, parts, kept))
            self._arrived_in = view.epoch
        return f"{self._flat.check:x}"

    def settle(self, group: Group, own: OwnCosts) -> str:
        view = group.view
        parameters = self.refresh(group)
        paces = EpochWorld(group, self._recorder).gather(own.pace)
        layout = Layout.of(view, own.of_members(paces, None, 0.0).speeds, self._flat.count)
        wanted = [layout.held_by(member) for member in view.members]
        parts = self._travel(group, wanted)
        # the old ranges stay until the new ones are whole everywhere
        self._next = layout, wanted[view.rank], parts
        return f"{layout.members}:{layout.bounds}:{parameters}"

    def settled(self) -> None:
        assert self._next
        (self.layout, ranges, parts), self._next, self.fresh = self._next, None, True
        self._hold(ranges, parts)

    def step(self) -> None:
        for _, _, fragment in self._held:
            whole = fragment.parameter.grad
            fragment.tensor.grad = None if whole is None else fragment.slice_of(whole)
        self._optimizer.step()
        self._optimizer.zero_grad()
        for parameter in self._flat.parameters:
            parameter.grad = None
        self.fresh, self._arrived_in = False, -1

    @contextmanager
    def whole(self, group: Group) -> Iterator[None]:
        self.refresh(group)
        everything = (0, self._flat.count)
        parts = self._travel(group, [[everything] if rank == 0 else [] for rank in range(group.view.size)])
        if group.view.rank != 0:
            yield
            return
        optimizer = self._optimizer
        kept, owned = optimizer.state, [group["params"] for group in optimizer.param_groups]
        optimizer.state = defaultdict(dict)
        numbered = by_parameter(parts)
        for number, parameter in enumerate(self._flat.parameters):
            if state := joined(numbered[number], parameter):
                optimizer.state[parameter] = state
        self._own(self._original)
        try:
            yield
        finally:
            optimizer.state = kept
            self._own(owned)

    def capture(self) -> Any:
        """Without what the others hold, unless nothing is dealt out yet."""
        groups = [{k: v for k, v in group.items() if k != "params"} for group in self._optimizer.param_groups]
        layout = self.layout.bounds, self.layout.members, self.layout.names
        parts = [] if self.layout.members else self._parts((0, self._flat.count))
        return {"groups": groups, "layout": layout, "parts": parts, "fresh": self.fresh}

    def adopt(self, state: Any) -> None:
        bounds, members, names = state["layout"]
        self.layout, self.fresh = Layout(bounds=bounds, members=members, names=names), state["fresh"]
        self._arrived_in = -1
        for group, values in zip(self._optimizer.param_groups, state["groups"], strict=True):
            group.update(values)
        self._hold([] if members else self.layout.ranges, state["parts"])

    def close(self) -> None:
        """Gives the optimizer the whole parameters back, but no state."""
        self._optimizer.state.clear()
        self._own(self._original)

    def _own(self, parameters: Sequence[list[torch.nn.Parameter]]) -> None:
        for group, own in zip(self._optimizer.param_groups, parameters, strict=True):
            group["params"] = own

    def _hold(self, ranges: Sequence[Range], parts: Sequence[Part]) -> None:
        """From now on these ranges, with the state that the parts have of them."""
        self._held = [held for range_ in ranges for held in self._flat.fragments(range_)]
        states, numbered = [], by_parameter(parts)
        for _, number, fragment in self._held:
            stop = fragment.start + fragment.tensor.numel()
            own = [part for part in numbered[number] if fragment.start <= part[1] and part[2] <= stop]
            states.append(joined(own, fragment.tensor))
        self._optimizer.state.clear()
        self._own([[f.tensor for group, _, f in self._held if group == i] for i in range(len(self._original))])
        for (_, _, fragment), state in zip(self._held, states, strict=True):
            if state:
                self._optimizer.state[fragment.tensor] = state

    def _sources(self, group: Group) -> list[int]:
        try:
            return self.layout.sources(group.view.members)
        except Stopped as error:
            # all are to hear of the first cause, not of who then gave up
            group.tell({"kind": "over", "reason": str(error)})
            raise

    def _travel(self, group: Group, wanted: Sequence[Sequence[Range]]) -> list[Part]:
        """What this rank wants (by rank, the ranges that it wants), from those who hold it."""
        view = group.view
        sources = self._sources(group)
        mine: list[Part] = []
        outgoing: list[list[Part]] = [[] for _ in view.members]
        incoming: set[int] = set()
        for rank, member in enumerate(view.members):
            for index, have in enumerate(self.layout.ranges):
                for want in wanted[rank]:
                    both = max(want[0], have[0]), min(want[1], have[1])
                    if both[0] >= both[1]:
                        continue
                    local = self.layout.holds(member, index)
                    source = rank if local else view.members.index(sources[index])
                    if source == view.rank:
                        (mine if local else outgoing[rank]).extend(self._parts(both))
                    elif rank == view.rank:
                        incoming.add(source)
        return mine + group.run(lambda transport: swap(transport, outgoing, sorted(incoming)))

    def _parts(self, range_: Range) -> list[Part]:
        """The state of elements that are held here."""
        found: list[Part] = []
        own: dict[int, list[Fragment]] = defaultdict(list)
        for _, number, fragment in self._held:
            own[number].append(fragment)
        for _, number, wanted in self._flat.fragments(range_):
            for fragment in own[number]:
                start, stop = fragment.start, fragment.start + fragment.tensor.numel()
                low, high = max(wanted.start, start), min(wanted.start + wanted.tensor.numel(), stop)
                if low < high:
                    cut, common = told_apart(self._optimizer.state.get(fragment.tensor, {}), fragment.tensor)
                    values = {k: v[low - start : high - start] for k, v in cut.items()}
                    found.append((number, low, high, values, common))
        return found

    def _part_of_whole(self, number: int) -> Part:
        parameter = self._flat.parameters[number]
        cut, common = told_apart(self._optimizer.state.get(parameter, {}), parameter)
        return number, 0, parameter.numel(), {k: v.reshape(-1) for k, v in cut.items()}, common
