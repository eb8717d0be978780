"""One pipeline under 1F1B (PipeDream-Flush, arXiv 2006.09503): when every forward, backward and transfer runs.

Stage s of p first runs k - 1 forwards, k = min(M, p - s), then one forward and one backward in turns, then the
backwards that are left. Transfers overlap with compute; those of a stage share its NICs, one after the other each way.
`lower_bounds` are paths through the same graph of events, linear in the seconds of stages and transfers: no schedule
of this kind is faster, which is what the integer program of `placement` minimises.
"""

from __future__ import annotations

import heapq
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from itertools import count
from typing import Literal

from heteromesh.planner.stages.workload import FORWARD_SHARE

Kind = Literal["forward", "backward"]


@dataclass(frozen=True, slots=True)
class StageWork:
    """A forward or backward of one micro-batch in one stage, or its transfer out of it."""

    stage: int
    kind: Kind
    micro_batch: int
    start: float
    """Seconds from the start of the step."""
    end: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Timeline:
    """What happened: compute in each stage's order, transfers by their start."""

    compute: tuple[tuple[StageWork, ...], ...]
    """What every stage computed."""
    transfers: tuple[StageWork, ...]
    """`stage` is the sender; forward goes to the next stage, backward to the one before."""

    @property
    def ends(self) -> tuple[float, ...]:
        """Per stage, the end of its last backward."""
        return tuple(works[-1].end for works in self.compute)


def order(stage: int, stages: int, micro_batches: int) -> list[tuple[Kind, int]]:
    """Returns (kind, micro-batch) in the order in which the stage runs them."""
    ahead = min(micro_batches, stages - stage) - 1
    listed: list[tuple[Kind, int]] = [("forward", m) for m in range(ahead)]
    for m in range(micro_batches):
        if m + ahead < micro_batches:
            listed.append(("forward", m + ahead))
        listed.append(("backward", m))
    return listed


def run_1f1b(stages: Sequence[float], transfers: Sequence[float], micro_batches: int, latency: float = 0.0) -> Timeline:
    """stages: seconds of forward and backward of a micro-batch; transfers: between stages i and i + 1, one way."""
    return _Run(stages, transfers, micro_batches, latency).finish()


@dataclass(slots=True)
class _Run:
    stages: Sequence[float]
    transfers: Sequence[float]
    micro_batches: int
    latency: float
    events: list[tuple[float, int, str, StageWork]] = field(default_factory=list)
    numbers: Iterator[int] = field(default_factory=count)

    def finish(self) -> Timeline:
        places = len(self.stages)
        todo = [order(s, places, self.micro_batches)[::-1] for s in range(places)]
        here: list[set[tuple[Kind, int]]] = [set() for _ in range(places)]
        here[0] = {("forward", m) for m in range(self.micro_batches)}
        busy, sends, receives = [False] * places, [0.0] * places, [0.0] * places
        done: list[list[StageWork]] = [[] for _ in range(places)]
        moved: list[StageWork] = []

        def start(s: int, now: float) -> None:
            if not busy[s] and todo[s] and todo[s][-1] in here[s]:
                kind, m = todo[s].pop()
                share = FORWARD_SHARE if kind == "forward" else 1 - FORWARD_SHARE
                busy[s] = True
                self._at(
                    now + share * self.stages[s], "computed", StageWork(s, kind, m, now, now + share * self.stages[s])
                )

        start(0, 0.0)
        while self.events:
            now, _, what, work = heapq.heappop(self.events)
            s = work.stage
            target = s + 1 if work.kind == "forward" else s - 1
            if what == "arrived":
                here[target].add((work.kind, work.micro_batch))
                start(target, now)
                continue
            done[s].append(work)
            busy[s] = False
            if work.kind == "forward" and s == places - 1:
                here[s].add(("backward", work.micro_batch))
            elif 0 <= target < places:
                begin = max(now, sends[s], receives[target])
                end = begin + self.transfers[min(s, target)]
                sends[s] = receives[target] = end
                move = StageWork(s, work.kind, work.micro_batch, begin, end)
                moved.append(move)
                self._at(end + self.latency, "arrived", move)
            start(s, now)
        assert not any(todo), "1F1B came to a halt"
        return Timeline(compute=tuple(map(tuple, done)), transfers=tuple(sorted(moved, key=lambda w: w.start)))

    def _at(self, when: float, what: str, work: StageWork) -> None:
        heapq.heappush(self.events, (when, next(self.numbers), what, work))


@dataclass(frozen=True, slots=True, kw_only=True)
class Path:
    """seconds >= sum of stages[i] * (seconds of stage i) + transfers[i] * (of transfer i) + hops * latency."""

    stages: tuple[float, ...]
    transfers: tuple[float, ...]
    hops: float
    """Messages that the path waits for: each adds the latency."""


def lower_bounds(stages: int, micro_batches: int, upto: int = 0) -> list[Path]:
    """Paths from the start to the end of stage `upto`'s last backward (0: to the end of the pipeline).

    One for each interval s..j of stages: micro-batches go from s to j and back as often as the batch allows, because
    a stage holds no more than k of them.
    """
    paths = [_until_last_forward(s, stages, micro_batches, upto) for s in range(upto)]
    for s in range(upto, stages):
        paths.append(_through_end(s, stages, micro_batches, upto))
        paths += [_interval(s, j, stages, micro_batches, upto) for j in range(s, stages)]
        if not upto:
            intervals = ((j, cut) for j in range(s, stages) for cut in range(s, j))
            paths += [_interval(s, j, stages, micro_batches, upto, cut) for j, cut in intervals]
    paths += [_cut(i, stages, micro_batches, upto) for i in range(stages - 1)]
    return list(dict.fromkeys(paths))


def _interval(s: int, j: int, stages: int, micro_batches: int, upto: int, cut: int | None = None) -> Path:
    """Round and round between stages s and j, from the first micro-batch that j has to wait for.

    That one queues behind those before it in stage s, or (`cut`) on the way out of a stage between s and j.
    """
    forward, backward = FORWARD_SHARE, 1 - FORWARD_SHARE
    ahead, deeper = (min(micro_batches, stages - i) for i in (s, j))
    width = ahead - deeper + 1
    # the micro-batch that goes round first; where the cut decides, one with which the last round is a whole one
    first = deeper - 1 if cut is None else deeper - 1 + (micro_batches - deeper) % width
    rounds = (micro_batches - 1 - first) // width + 1
    back = first - deeper + 1 + (rounds - 1) * width
    works, moves = _fill(s, stages, upto)
    for i in range(s, j + 1):
        works[i] += rounds
    for i in range(s, j):
        moves[i] += 2 * rounds
    hops = sum(moves)
    if cut is None:
        works[s] += forward * first
    else:
        moves[cut] += first
    works[s] += forward * max(0, micro_batches - (back + ahead)) + backward * (micro_batches - 1 - back)
    return Path(stages=tuple(works), transfers=tuple(moves), hops=hops)


def _through_end(s: int, stages: int, micro_batches: int, upto: int) -> Path:
    """Returns the path of the first micro-batch through all stages and back, then what is left of stage s."""
    ahead = min(micro_batches, stages - s)
    works, moves = _fill(s, stages, upto)
    for i in range(s, stages):
        works[i] += 1
    for i in range(s, stages - 1):
        moves[i] += 2
    works[s] += (micro_batches - ahead) * FORWARD_SHARE + (micro_batches - 1) * (1 - FORWARD_SHARE)
    return Path(stages=tuple(works), transfers=tuple(moves), hops=sum(moves))


def _cut(i: int, stages: int, micro_batches: int, upto: int) -> Path:
    """Returns the path of all micro-batches over the cut behind stage i; the last goes on to the end and back."""
    works, moves = _fill(stages - 1, stages, upto)
    works[stages - 1] += 1
    hops = sum(moves)
    moves[i] += micro_batches - 1
    return Path(stages=tuple(works), transfers=tuple(moves), hops=hops)


def _until_last_forward(s: int, stages: int, micro_batches: int, upto: int) -> Path:
    """Stage s up to its last forward, then on to the last stage and back to `upto`, which is behind s."""
    works, moves = _fill(stages - 1, stages, upto)
    works[stages - 1] += 1
    works[s] += (micro_batches - 1) * FORWARD_SHARE
    works[s] += max(0, micro_batches - (stages - s)) * (1 - FORWARD_SHARE)
    return Path(stages=tuple(works), transfers=tuple(moves), hops=sum(moves))


def _fill(s: int, stages: int, upto: int) -> tuple[list[float], list[float]]:
    """From the start to stage s, and from there back to stage `upto`."""
    forward, backward = FORWARD_SHARE, 1 - FORWARD_SHARE
    works = [forward * (i < s) + backward * (upto <= i < s) for i in range(stages)]
    moves = [1.0 * (i < s) + 1.0 * (upto <= i < s) for i in range(stages - 1)]
    return works, moves
