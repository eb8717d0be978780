"""The state of all subgroups, each on its tier: slabs of fp32 rows one after the other, (p,) m and v.

A subgroup travels as one copy. Masters (row p) are kept where the weights are not fp32 on the host themselves.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from heteromesh.errors import UserError
from heteromesh.parallel.state.fragments import place_of
from heteromesh.parallel.state.offload.lanes import Lanes
from heteromesh.parallel.state.offload.layout import ParameterSlice, cut_segments
from heteromesh.parallel.state.offload.state_file import StateFile, aligned_buffer
from heteromesh.planner.ownership.offload import OffloadPlan

MASTER = "master_param"
"""The key of fp32 masters in a parameter's state."""


class Subgroups:
    """State of parameters (contiguous, on one device) by a plan; zeros and the weights to begin with."""

    def __init__(
        self, parameters: Sequence[torch.Tensor], plan: OffloadPlan, folder: Path | None, lanes: Lanes
    ) -> None:
        """folder: for the disk tier. Raises UserError where a tier can't be had."""
        self.parameters, self.plan, self._lanes = tuple(parameters), plan, lanes
        self.device = self.parameters[0].device if self.parameters else torch.device("cpu")
        self.segments = cut_segments([p.numel() for p in parameters], plan, [place_of(p) for p in parameters])
        self._by_parameter: list[list[tuple[int, ParameterSlice]]] = [[] for _ in parameters]
        for number, segments in enumerate(self.segments):
            for segment in segments:
                self._by_parameter[segment.parameter].append((number, segment))
        in_place = not plan.apart and plan.numel_on("host", "disk") == plan.numel
        self.has_masters = not in_place or any(p.dtype != torch.float32 for p in parameters)
        self.rows = 3 if self.has_masters else 2
        self.steps = [0] * len(self.parameters)
        """Of each parameter, how often it was updated."""
        self.views = [ParameterState(self, index) for index in range(len(self.parameters))]
        self._spares: dict[int, tuple[torch.Tensor, torch.Tensor | None]] = {}
        self.held: dict[int, int] = {}
        """By buffer of the disk's ring, the subgroup that is in it and newer there than on disk."""
        self._records = {n: i for i, n in enumerate(n for n, s in enumerate(plan.subgroups) if s.tier == "disk")}
        self.file = self._make_file(folder)
        ring = min(plan.ring, len(self._records))
        self.ring = [aligned_buffer(self.rows * self._largest_record) for _ in range(ring)]
        self._record = aligned_buffer(self.rows * self._largest_record if ring else 0)
        """Where this thread reads records, outside steps."""
        self._recorded: int | None = None
        """The subgroup that has been read there."""
        self._is_changed = False
        """Whether it is newer there than on disk."""
        self.failed = False
        """Whether an update has ended half-way."""
        self.slabs: list[torch.Tensor | None] = [self._make_slab(number) for number in range(len(plan.subgroups))]
        self._from_weights: set[int] = set()
        self.load([{} for _ in parameters])

    def weights(self, index: int) -> torch.Tensor:
        """Returns a parameter's elements (n,), as memory of its own."""
        return self.parameters[index].detach().view(-1)

    def slab(self, number: int, buffer: torch.Tensor | None = None) -> torch.Tensor:
        """Returns a subgroup's rows (rows, n): in its own slab, or as they lie in a buffer."""
        numel = self.plan.subgroups[number].numel
        flat = self.slabs[number] if buffer is None else buffer
        assert flat is not None, "the subgroup is on disk"
        return flat[: self.rows * numel].view(self.rows, numel)

    def places(self, index: int) -> list[tuple[int, ParameterSlice]]:
        """Returns the subgroups that hold something of a parameter, and what."""
        return self._by_parameter[index]

    def send(self, target: torch.Tensor, source: torch.Tensor) -> None:
        """Starts a copy to host memory between steps."""
        self._lanes.send(target, source)

    def host_memory(self, numel: int) -> torch.Tensor:
        """Returns fp32 memory (n,) on the host for transfers."""
        return self._lanes.memory(numel)

    def spares(self, limit: float) -> dict[int, tuple[torch.Tensor, torch.Tensor | None]]:
        """Returns memory like that of the first subgroups in host memory, up to so many bytes: rows, and the weights
        of subgroups without masters.
        """
        for number in (n for n, s in enumerate(self.plan.subgroups) if s.tier == "host" and n not in self._spares):
            numel = self.plan.subgroups[number].numel
            if sum(t.nbytes for pair in self._spares.values() for t in pair if t is not None) + 12 * numel > limit:
                break
            weights = None if self.has_masters else torch.zeros(numel)
            self._spares[number] = torch.zeros(self.rows, numel), weights
        return self._spares

    def exchange(self, number: int) -> None:
        """Makes a subgroup's spare rows its state, and the other way round."""
        old, (new, weights) = self.slab(number), self._spares[number]
        self.slabs[number], self._spares[number] = new.view(-1), (old, weights)

    def read_record(self, number: int, buffer: torch.Tensor) -> None:
        """Fills a buffer with a subgroup from disk."""
        assert self.file is not None
        self.file.read(self._records[number], buffer)

    def write_record(self, number: int, buffer: torch.Tensor) -> None:
        """Writes a subgroup to disk."""
        assert self.file is not None
        self.file.write(self._records[number], buffer)

    def read(self, index: int, row: int, start: int, numel: int) -> torch.Tensor:
        """Returns a copy of elements [start, start + numel) of a row of a parameter's state, (numel,) in host memory.

        Between steps, as `write`.
        """
        self._settle()
        found = torch.empty(numel)
        for number, of_subgroup, of_range in self._covering(index, start, numel):
            found[of_range] = self._rows_now(number)[row, of_subgroup]
        return found

    def write(self, index: int, row: int, start: int, values: torch.Tensor) -> None:
        """Makes values (n,) the elements from `start` on of a row of a parameter's state."""
        self._settle()
        for number, of_subgroup, of_range in self._covering(index, start, values.numel()):
            self._rows_now(number)[row, of_subgroup] = values[of_range]  # wherever those are
            self._changed(number)

    def flush(self) -> None:
        """Brings what `write` has changed to the disk: a step reads it there."""
        if self._is_changed and self._recorded is not None:
            self.write_record(self._recorded, self._record)
        self._recorded, self._is_changed = None, False

    def gather(self, index: int, row: int) -> torch.Tensor:
        """Returns a row of a parameter's state in the parameter's shape; a view where it lies in one piece."""
        self._settle()
        parameter, pieces = self.parameters[index], self._by_parameter[index]
        if len(pieces) == 1 and (slab := self.slabs[pieces[0][0]]) is not None:
            return self.slab(pieces[0][0], slab)[row, pieces[0][1].of_subgroup].view(parameter.shape)
        return self.read(index, row, 0, parameter.numel()).view(parameter.shape)

    def load(self, states: Sequence[Mapping[str, Any]]) -> None:
        """Takes each parameter's state over, as AdamW has it; masters that it doesn't have come from the weights."""
        self._lanes.settle()
        self._recorded, self._is_changed = None, False
        self.steps = [int(state.get("step", 0)) for state in states]
        # a plain optimizer keeps masters that it was given, in its own dtype, and never updates them
        masters = [_master(state, p) for state, p in zip(states, self.parameters, strict=True)]
        self._from_weights = {i for i, master in enumerate(masters) if master is None} if self.has_masters else set()
        keys = [MASTER, "exp_avg", "exp_avg_sq"][3 - self.rows :]
        for number, segments in enumerate(self.segments):
            rows = self._new_rows(number)
            rows.zero_()  # also between the parameters
            for segment in segments:
                state, master = states[segment.parameter], masters[segment.parameter]
                for row, key in zip(rows, keys, strict=True):
                    value = state.get(key) if key != MASTER else master
                    if value is None and key == MASTER:
                        value = self.parameters[segment.parameter]
                    if value is not None:
                        row[segment.of_subgroup] = value.detach().reshape(-1)[segment.of_parameter].to(rows.device)
            if self.slabs[number] is None:
                self.write_record(number, self._record)
        self.held = {}

    def take_weights(self) -> None:
        """Makes masters of the weights that there are now, where the state that was loaded has none. For a first step.

        A model's weights may be loaded after its optimizer's state.
        """
        fresh, self._from_weights = self._from_weights, set()
        for number, segments in enumerate(self.segments if fresh else []):
            stale = [s for s in segments if s.parameter in fresh]
            if not stale:
                continue
            row = self._rows_now(number)[0]
            for segment in stale:
                row[segment.of_subgroup] = self.weights(segment.parameter)[segment.of_parameter].to(row.device)
            self._changed(number)

    def restored(self, steps: Sequence[int], masters: Collection[int]) -> None:
        """Takes note that `write` has been given the whole state of parameters that were updated so often, with the
        masters of these; the others' come from the weights.
        """
        self.steps = list(steps)
        self._from_weights = {i for i in range(len(steps)) if i not in masters} if self.has_masters else set()

    def _settle(self) -> None:
        """Returns when state may be read here. Raises UserError where it is no state any more."""
        if self.failed:
            raise UserError("an update of offloaded state has failed half-way: resume from the last checkpoint")
        self._lanes.settle()

    def _covering(self, index: int, start: int, numel: int) -> Iterator[tuple[int, slice, slice]]:
        """Yields the subgroups that hold something of a range of a parameter: which of theirs is which of the range."""
        for number, segment in self._by_parameter[index]:
            low, high = max(start, segment.start), min(start + numel, segment.start + segment.numel)
            if low < high:
                place = segment.place + low - segment.start
                yield number, slice(place, place + high - low), slice(low - start, high - start)

    def _changed(self, number: int) -> None:
        """Takes note that a subgroup's rows, as `_rows_now` has given them, have been changed."""
        if self.slabs[number] is None and number not in self.held.values():
            self._is_changed = True

    def _new_rows(self, number: int) -> torch.Tensor:
        slab = self.slabs[number]
        return self.slab(number, self._record if slab is None else slab)

    def _rows_now(self, number: int) -> torch.Tensor:
        """Returns a subgroup's rows wherever they are; from disk as a copy until the next call."""
        if (slab := self.slabs[number]) is not None:
            return self.slab(number, slab)
        for buffer, held in self.held.items():
            if held == number:
                return self.slab(number, self.ring[buffer])
        if self._recorded != number:
            self.flush()
            self.read_record(number, self._record)
            self._recorded = number
        return self.slab(number, self._record)

    @property
    def _largest_record(self) -> int:
        return max((self.plan.subgroups[n].numel for n in self._records), default=0)

    def _make_file(self, folder: Path | None) -> StateFile | None:
        if not self._records:
            return None
        if folder is None:
            raise UserError(
                "the plan keeps optimizer state on disk: give state_folder, on a local disk with space for it"
            )
        return StateFile(folder, len(self._records), self.rows * self._largest_record)

    def _make_slab(self, number: int) -> torch.Tensor | None:
        subgroup = self.plan.subgroups[number]
        if subgroup.tier == "disk":
            return None
        if subgroup.tier == "resident":
            return torch.zeros(self.rows * subgroup.numel, device=self.device)
        return self._lanes.memory(self.rows * subgroup.numel)


def _master(state: Mapping[str, Any], parameter: torch.Tensor) -> torch.Tensor | None:
    master: torch.Tensor | None = state.get(MASTER)
    usable = master is not None and master.dtype == torch.float32 != parameter.dtype
    return master if usable else None


class ParameterState(Mapping[str, Any]):
    """What AdamW keeps of a parameter, read from wherever it is: step, exp_avg, exp_avg_sq (and fp32 masters)."""

    def __init__(self, subgroups: Subgroups, index: int) -> None:
        self._subgroups, self._index = subgroups, index
        self.rows = {"exp_avg": subgroups.rows - 2, "exp_avg_sq": subgroups.rows - 1}
        """By key of what each element has a value of, which row of the subgroups has it."""
        if subgroups.parameters[index].dtype != torch.float32:
            self.rows[MASTER] = 0

    def __getitem__(self, key: str) -> torch.Tensor:
        if key == "step":
            return torch.tensor(float(self._subgroups.steps[self._index]))
        return self._subgroups.gather(self._index, self.rows[key])

    def __iter__(self) -> Iterator[str]:
        return iter(["step", *self.rows])

    def __len__(self) -> int:
        return 1 + len(self.rows)
