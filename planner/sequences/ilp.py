"""An integer program for small steps, with a cut-off: finds a pass list better than a known one, or none.

Ranks are halved again and again (host by host) into blocks; a block may run passes, its parts run theirs after it.
Ranks of a block have done the same passes when it starts, so nobody waits and a rank's time is the sum over its blocks:

    z[u,j] in {0,1}     block u runs a j-th pass,                           z[u,j+1] <= z[u,j]
    A[k,u,j] in {0,1}   sequence k is in it,                                sum_uj A[k,u,j] = 1
    sum_k s_k * A[k,u,j] <= room_u * z[u,j]                                 memory, which also links A to z
    sum over blocks u of rank r and j: fixed_u * z + sum_k t_u(s_k) * A <= C      every rank r;  C <= cut-off

minimise C. FlexSP's program (arXiv 2412.01523, equations 17-22) has one pass per rank and groups without order; blocks
let ranks run several passes without lock step. The cut-off removes every A whose own pass is too long.
"""

from __future__ import annotations

from dataclasses import dataclass

from heteromesh.planner.cost.ranksets import Line, RankSetCost
from heteromesh.planner.sequences.partial import LocalPass, PartialStep, SplitPass, StepProblem, empty_step
from heteromesh.planner.solver import Program

MOST_BINARIES = 1500
"""Larger programs find nothing in seconds."""
BETTER = 0.002
"""By how much a solution has to beat the known one."""


@dataclass(frozen=True, slots=True)
class _Slot:
    """A pass that a block may run."""

    ranks: tuple[int, ...]
    rank_set: RankSetCost
    used: int
    """Variable z."""
    members: dict[int, int]
    """Sorted index of a sequence to its variable A."""
    seconds: int | None
    """Variable: its seconds, where they are the largest of several lines."""


def refine(problem: StepProblem, known: float, bound: float, time_limit: float) -> PartialStep | None:
    """Returns a step of less than `known` seconds, or None; `time_limit`: of this thread's processor."""
    limit = known * (1 - BETTER)
    blocks = [(block, rank_set) for block in _blocks(problem) if (rank_set := _rank_set(problem, block)) is not None]
    able = {block: _able(problem, rank_set, limit) for block, rank_set in blocks}
    turns = {block: _turns(problem, rank_set, able[block], limit) for block, rank_set in blocks}
    if sum(turns[b] * (1 + len(able[b])) for b in able) > MOST_BINARIES:
        return None
    program = Program("step")
    end = program.real(bound, limit)
    slots: list[_Slot] = []
    for block, rank_set in blocks:
        for turn in range(turns[block]):
            members = {k: program.binary() for k in able[block]}
            seconds = program.real(0.0, limit) if len(rank_set.lines) > 1 else None
            slot = _Slot(block, rank_set, program.binary(), members, seconds)
            if seconds is not None:
                for line in rank_set.lines:
                    program.at_most([*_line_terms(problem, slot, line), (-1.0, seconds)], 0.0)
            if turn:
                program.at_most([(1.0, slot.used), (-1.0, slots[-1].used)], 0.0)
            capacity = float(rank_set.even)
            program.at_most(
                [*((problem.lengths[k] / capacity, x) for k, x in slot.members.items()), (-1.0, slot.used)], 0.0
            )
            slots.append(slot)
    for k in range(len(problem.lengths)):
        program.equal([(1.0, slot.members[k]) for slot in slots if k in slot.members], 1.0)
    for rank in range(problem.costs.ranks):
        own = [slot for slot in slots if rank in slot.ranks]
        program.at_most([*(term for slot in own for term in _seconds(problem, slot)), (-1.0, end)], 0.0)
    values = program.minimise([(1.0, end)], time_limit)
    partial = _partial(problem, slots, values) if values is not None else None
    return partial if partial is not None and partial.seconds < known else None


def _blocks(problem: StepProblem) -> list[tuple[int, ...]]:
    """Returns all ranks, and the halves of every block, larger before smaller."""
    costs = problem.costs
    order = sorted(range(costs.ranks), key=lambda r: (costs.hosts[r], -costs.speeds[r], r))
    blocks, todo = [], [order]
    for block in todo:
        blocks.append(tuple(sorted(block)))
        if len(block) > 1:
            half = (len(block) + 1) // 2
            todo += [block[:half], block[half:]]
    return blocks


def _rank_set(problem: StepProblem, block: tuple[int, ...]) -> RankSetCost | None:
    return problem.rank_sets.find(block, problem.lengths[0])


def _able(problem: StepProblem, rank_set: RankSetCost, limit: float) -> list[int]:
    return [k for k, n in enumerate(problem.lengths) if n <= rank_set.even and rank_set.seconds(n, n * n) <= limit]


def _turns(problem: StepProblem, rank_set: RankSetCost, able: list[int], limit: float) -> int:
    """Returns passes that a block may run: enough for all that it could hold, as far as fixed costs leave time."""
    tokens, fixed = sum(problem.lengths[k] for k in able), rank_set.lines[0].fixed
    time = limit / fixed if fixed > 0 else len(able)
    return min(len(able), int(time), 1 + -(-tokens // max(rank_set.even, 1)))


def _seconds(problem: StepProblem, slot: _Slot) -> list[tuple[float, int]]:
    return _line_terms(problem, slot, slot.rank_set.lines[0]) if slot.seconds is None else [(1.0, slot.seconds)]


def _line_terms(problem: StepProblem, slot: _Slot, line: Line) -> list[tuple[float, int]]:
    lengths = problem.lengths
    terms = [(line.per_token * lengths[k] + line.per_square * lengths[k] ** 2, x) for k, x in slot.members.items()]
    return [(line.fixed, slot.used), *terms]


def _partial(problem: StepProblem, slots: list[_Slot], values: list[float]) -> PartialStep | None:
    """Returns the step of a solution; None if the values are none (PuLP gives values even where HiGHS found none)."""
    partial = empty_step(problem.costs.ranks)
    placed: list[int] = []
    for slot in sorted(slots, key=lambda s: -len(s.ranks)):
        indices = tuple(k for k, x in slot.members.items() if values[x] > 0.5)
        if not indices:
            continue
        tokens = sum(problem.lengths[k] for k in indices)
        if tokens > slot.rank_set.even:
            return None
        placed += indices
        start = max(partial.ends[r].free for r in slot.ranks)
        end = start + slot.rank_set.seconds(tokens, sum(problem.lengths[k] ** 2 for k in indices))
        if len(slot.ranks) > 1:
            partial.add_split(SplitPass(slot.ranks, slot.rank_set, indices), start, end)
        else:
            last = partial.ends[slot.ranks[0]]
            last.free = end
            partial.local.append(LocalPass(last, slot.rank_set.even - tokens, list(indices)))
    return partial if sorted(placed) == list(range(len(problem.lengths))) else None
