"""An integer program for small steps, with a cut-off: finds a pass list better than a known one, or none.

Ranks are halved again and again (host by host) into blocks; a block may run passes, its parts run theirs after it.
Ranks of a block have done the same passes when it starts, so nobody waits and a rank's time is the sum over its blocks:

    z[u,j] in {0,1}     block u runs a j-th pass,                           z[u,j+1] <= z[u,j]
    A[k,u,j] in {0,1}   sequence k is in it,                                sum_uj A[k,u,j] = 1
    sum_k s_k * A[k,u,j] <= room_u * z[u,j]                                 memory, which also links A to z
    sum over blocks u of rank r and j: fixed_u * z + sum_k t_u(s_k) * A <= C      every rank r;  C <= cut-off

minimise C. FlexSP's program (arXiv 2412.01523, equations 17-22) has one pass per rank and groups without place; blocks
let ranks run several passes without lock step. The cut-off removes every A whose own pass is too long.
"""

from __future__ import annotations

from dataclasses import dataclass

from heteromesh.planner.cost.ranksets import Line, Team
from heteromesh.planner.sequences.draft import Draft, LocalPass, SplitPass, Task, empty_draft
from heteromesh.planner.solver import Program

MOST_BINARIES = 1500
"""Larger programs find nothing in seconds."""
BETTER = 0.002
"""By how much a solution has to beat the known one."""


@dataclass(frozen=True, slots=True)
class _Slot:
    """A pass that a block may run."""

    ranks: tuple[int, ...]
    team: Team
    used: int
    """Variable z."""
    members: dict[int, int]
    """Place of a sequence to its variable A."""
    seconds: int | None
    """Variable: its seconds, where they are the largest of several lines."""


def refine(task: Task, known: float, bound: float, time_limit: float) -> Draft | None:
    """A draft that takes less than `known` seconds, found in `time_limit` seconds; None without one or if too large."""
    limit = known * (1 - BETTER)
    blocks = [(block, team) for block in _blocks(task) if (team := _team(task, block)) is not None]
    able = {block: _able(task, team, limit) for block, team in blocks}
    turns = {block: _turns(task, team, able[block], limit) for block, team in blocks}
    if sum(turns[b] * (1 + len(able[b])) for b in able) > MOST_BINARIES:
        return None
    program = Program("step")
    end = program.real(bound, limit)
    slots: list[_Slot] = []
    for block, team in blocks:
        for turn in range(turns[block]):
            members = {k: program.binary() for k in able[block]}
            seconds = program.real(0.0, limit) if len(team.lines) > 1 else None
            slot = _Slot(block, team, program.binary(), members, seconds)
            if seconds is not None:
                for line in team.lines:
                    program.at_most([*_line_terms(task, slot, line), (-1.0, seconds)], 0.0)
            if turn:
                program.at_most([(1.0, slot.used), (-1.0, slots[-1].used)], 0.0)
            room = float(team.even)
            program.at_most([*((task.lengths[k] / room, x) for k, x in slot.members.items()), (-1.0, slot.used)], 0.0)
            slots.append(slot)
    for k in range(len(task.lengths)):
        program.equal([(1.0, slot.members[k]) for slot in slots if k in slot.members], 1.0)
    for rank in range(task.costs.ranks):
        own = [slot for slot in slots if rank in slot.ranks]
        program.at_most([*(term for slot in own for term in _seconds(task, slot)), (-1.0, end)], 0.0)
    values = program.minimise([(1.0, end)], time_limit)
    draft = _draft(task, slots, values) if values is not None else None
    return draft if draft is not None and draft.seconds < known else None


def _blocks(task: Task) -> list[tuple[int, ...]]:
    """All ranks, and the halves of every block, larger before smaller."""
    costs = task.costs
    order = sorted(range(costs.ranks), key=lambda r: (costs.hosts[r], -costs.speeds[r], r))
    blocks, todo = [], [order]
    for block in todo:
        blocks.append(tuple(sorted(block)))
        if len(block) > 1:
            half = (len(block) + 1) // 2
            todo += [block[:half], block[half:]]
    return blocks


def _team(task: Task, block: tuple[int, ...]) -> Team | None:
    return task.fleet.team(block, task.lengths[0])


def _able(task: Task, team: Team, limit: float) -> list[int]:
    return [k for k, n in enumerate(task.lengths) if n <= team.even and team.seconds(n, n * n) <= limit]


def _turns(task: Task, team: Team, able: list[int], limit: float) -> int:
    """Passes that a block may run: enough for all that it could hold, as far as fixed costs leave time."""
    tokens, fixed = sum(task.lengths[k] for k in able), team.lines[0].fixed
    time = limit / fixed if fixed > 0 else len(able)
    return min(len(able), int(time), 1 + -(-tokens // max(team.even, 1)))


def _seconds(task: Task, slot: _Slot) -> list[tuple[float, int]]:
    return _line_terms(task, slot, slot.team.lines[0]) if slot.seconds is None else [(1.0, slot.seconds)]


def _line_terms(task: Task, slot: _Slot, line: Line) -> list[tuple[float, int]]:
    lengths = task.lengths
    terms = [(line.per_token * lengths[k] + line.per_square * lengths[k] ** 2, x) for k, x in slot.members.items()]
    return [(line.fixed, slot.used), *terms]


def _draft(task: Task, slots: list[_Slot], values: list[float]) -> Draft | None:
    """The draft of a solution; None if the values are none (PuLP gives values even where HiGHS found no solution)."""
    draft = empty_draft(task.costs.ranks)
    placed: list[int] = []
    for slot in sorted(slots, key=lambda s: -len(s.ranks)):
        places = tuple(k for k, x in slot.members.items() if values[x] > 0.5)
        if not places:
            continue
        tokens = sum(task.lengths[k] for k in places)
        if tokens > slot.team.even:
            return None
        placed += places
        start = max(draft.ends[r].free for r in slot.ranks)
        end = start + slot.team.seconds(tokens, sum(task.lengths[k] ** 2 for k in places))
        if len(slot.ranks) > 1:
            draft.add_split(SplitPass(slot.ranks, slot.team, places), start, end)
        else:
            last = draft.ends[slot.ranks[0]]
            last.free = end
            draft.local.append(LocalPass(last, slot.team.even - tokens, list(places)))
    return draft if sorted(placed) == list(range(len(task.lengths))) else None
