"""One step's updates of subgroups as tasks on lanes, and how long they take: pure data that any kind of lane can run.

Each lane runs its tasks in the order given; a task waits for those in `after`. A buffer is given again to another
subgroup only after the task that ends its use, which is an edge here and not a race there.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal, get_args

from heteromesh.planner.ownership.offload_rates import OffloadRates, Resource, Tier

Lane = Literal["gradients_out", "state_in", "weights_in", "state_out", "device", "host", "read", "write"]
LANES: tuple[Lane, ...] = get_args(Lane)
RESOURCE_OF: dict[Lane, Resource] = {
    "gradients_out": "to_host",
    "state_out": "to_host",
    "state_in": "to_device",
    "weights_in": "to_device",
    "device": "device",
    "host": "host",
    "read": "read",
    "write": "write",
}


@dataclass(frozen=True, slots=True)
class LaneTask:
    """A piece of work of one subgroup."""

    lane: Lane
    subgroup: int
    after: tuple[int, ...] = ()
    """Numbers of earlier tasks."""
    buffer: int | None = None
    """Of the staging sets for state_in, device and state_out; of the weight buffers for weights_in and host; of the
    disk's ring for read and write, and `ring` names it for host."""
    ring: int | None = None


@dataclass(slots=True)
class _Pool:
    """Buffers of one kind, used in turn."""

    size: int
    count: int = 0
    last: dict[int, int] = field(default_factory=dict)

    def next(self) -> tuple[int, tuple[int, ...]]:
        """Returns a buffer, and the task that must have ended before it is used."""
        buffer = self.count % self.size
        self.count += 1
        return buffer, (self.last[buffer],) if buffer in self.last else ()


class StepTasks:
    """Builds the tasks of one step, subgroup by subgroup in the order of `add`."""

    def __init__(
        self, *, apart: bool, staging: int, weights: int, ring: int, held: Mapping[int, int], order: Sequence[int] = ()
    ) -> None:
        """apart: whether the device has memory of its own. staging, weights, ring: buffers of each kind.

        held: subgroups that are in the disk's ring already, by buffer. order: the disk's subgroups of this step.
        """
        self.tasks: list[LaneTask] = []
        self.held = dict(held)
        """Which subgroup is in each of the ring's buffers when the step has ended; not on disk yet."""
        self._apart, self._ring = apart, ring
        self._staging, self._weights = _Pool(staging), _Pool(weights)
        self._use = {subgroup: position for position, subgroup in enumerate(order)}
        self._updated: dict[int, int] = {}
        self._written: dict[int, int] = {}

    def add(self, subgroup: int, tier: Tier) -> None:
        """Adds the tasks of a subgroup's update."""
        if tier == "resident":
            self._put("device", subgroup)
        elif tier == "staged":
            buffer, free = self._staging.next()
            arrived = self._put("state_in", subgroup, free, buffer)
            updated = self._put("device", subgroup, (arrived,), buffer)
            self._staging.last[buffer] = self._put("state_out", subgroup, (updated,), buffer)
        else:
            self._add_host(subgroup, *(self._fetch(subgroup) if tier == "disk" else ((), None)))

    def _add_host(self, subgroup: int, ready: tuple[int, ...], ring: int | None) -> None:
        if not self._apart:
            self._updated[subgroup] = self._put("host", subgroup, ready, ring=ring)
            return
        buffer, free = self._weights.next()
        gradients = self._put("gradients_out", subgroup, free, buffer)
        updated = self._put("host", subgroup, (*ready, gradients), buffer, ring)
        self._weights.last[buffer] = self._put("weights_in", subgroup, (updated,), buffer)
        self._updated[subgroup] = updated

    def _fetch(self, subgroup: int) -> tuple[tuple[int, ...], int]:
        """Returns the tasks after which a subgroup is in the ring, and its buffer there."""
        for buffer, holder in self.held.items():
            if holder == subgroup:
                return (), buffer
        free = [b for b in range(self._ring) if b not in self.held]
        after: tuple[int, ...] = ()
        buffer = free[0] if free else max(self.held, key=self._next_use)
        if not free:
            victim = self.held[buffer]
            done = (self._updated[victim],) if victim in self._updated else ()
            after = (self._put("write", victim, done, buffer),)
            self._written[victim] = after[0]
        if subgroup in self._written:
            after = (*after, self._written[subgroup])
        self.held[buffer] = subgroup
        return (self._put("read", subgroup, after, buffer),), buffer

    def _next_use(self, buffer: int) -> tuple[float, float]:
        """Of what the buffer holds: what was updated first goes first, what this step still needs goes last."""
        subgroup = self.held[buffer]
        if subgroup in self._updated:
            return 1, -self._updated[subgroup]
        needed = self._use.get(subgroup)
        return (2, 0) if needed is None else (0, needed)

    def _put(
        self, lane: Lane, subgroup: int, after: tuple[int, ...] = (), buffer: int | None = None, ring: int | None = None
    ) -> int:
        self.tasks.append(LaneTask(lane, subgroup, after, buffer, ring))
        return len(self.tasks) - 1


def published_tasks(count: int, stride: int) -> list[LaneTask]:
    """Returns the tasks of Deep Optimizer States as published: of `stride` subgroups the last one on the device.

    When a round begins, the one staging buffer is flushed, then filled for this round; the host waits at the round's
    end until it has been filled. What is never flushed in the original is flushed here at the end.
    """
    tasks: list[LaneTask] = []

    def put(lane: Lane, subgroup: int, *after: int | None) -> int:
        tasks.append(LaneTask(lane, subgroup, tuple(a for a in after if a is not None), 0))
        return len(tasks) - 1

    device: int | None = None
    filled: int | None = None
    waited: int | None = None
    staged = -1
    for i in range(count):
        if i % stride == 0:
            flushed = put("state_out", staged, device) if device is not None else None
            staged, device = i + stride - 1, None
            # one stream a tensor: flush and fetch never overlap
            filled = put("state_in", staged, flushed) if staged < count else None
        if (i + 1) % stride == 0:
            device, waited = put("device", i, filled), filled
        else:
            put("weights_in", i, put("host", i, waited))
    if device is not None:
        put("state_out", staged, device)
    return tasks


def task_seconds(task: LaneTask, numel: int, tier: Tier, rates: OffloadRates) -> float:
    """Returns how long a task keeps its lane busy."""
    if task.lane == "weights_in":
        return numel * rates.weight_bytes / rates.to_device
    if task.lane == "gradients_out":
        return 0.0 if rates.gradients_early else numel * rates.gradient_bytes / rates.to_host
    return numel * rates.seconds(tier)[RESOURCE_OF[task.lane]]


def play(tasks: Sequence[LaneTask], seconds: Sequence[float]) -> list[tuple[float, float]]:
    """Returns when each task begins and ends; lanes of one resource take turns, never idle while one of them can go."""
    queues: dict[Lane, list[int]] = defaultdict(list)
    for number, task in enumerate(tasks):
        queues[task.lane].append(number)
    heads = dict.fromkeys(queues, 0)
    free: dict[Resource, float] = defaultdict(float)
    spans: list[tuple[float, float] | None] = [None] * len(tasks)
    for _ in tasks:
        begin, number = min(_candidates(tasks, queues, heads, free, spans))
        lane = tasks[number].lane
        spans[number] = begin, begin + seconds[number]
        free[RESOURCE_OF[lane]] = begin + seconds[number]
        heads[lane] += 1
    return [span for span in spans if span is not None]


def _candidates(
    tasks: Sequence[LaneTask],
    queues: Mapping[Lane, Sequence[int]],
    heads: Mapping[Lane, int],
    free: Mapping[Resource, float],
    spans: Sequence[tuple[float, float] | None],
) -> list[tuple[float, int]]:
    found = []
    for lane, queue in queues.items():
        if heads[lane] == len(queue):
            continue
        number = queue[heads[lane]]
        before = [spans[i] for i in tasks[number].after]
        ends = [span[1] for span in before if span is not None]
        if len(ends) == len(before):
            found.append((max([free.get(RESOURCE_OF[lane], 0.0), *ends]), number))
    return found
