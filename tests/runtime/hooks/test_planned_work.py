"""What a plan foresees for a member reaches the coordinator with its reports."""

from types import SimpleNamespace
from typing import Any

from mesh import mesh

from heteromesh.comm.world import World
from heteromesh.faults.diagnosis.reports import report
from heteromesh.planner.plan import Pass, Step
from heteromesh.runtime.hooks.api import Round
from heteromesh.runtime.hooks.planned_work import PlannedWork


def test_the_seconds_of_this_members_passes_are_added_up_and_told() -> None:
    passes = tuple(
        Pass(ranks=ranks, method="local", sequences=(0,), shards=((1,),) * len(ranks), seconds=seconds)
        for ranks, seconds in (((0,), 2.0), ((0, 1), 1.0), ((1,), 4.0))
    )
    plan = Step(passes=passes, seconds=5.0, bound_seconds=0.0, gap=0.0, solve_seconds=0.0, batch=(1,))
    # a repair after the loss of member 5 was the second round; member 9 had another rank before
    rounds = (Round(members=(5, 9, 7), places=(0,), plan=plan), Round(members=(9, 7), places=(0,), plan=plan))
    with mesh(2) as (transports, _):
        records = transports[1].records
        step: Any = SimpleNamespace(world=World(rank=1, size=2, exchange=transports[1], members=(7, 9)), rounds=rounds)
        hook = PlannedWork()
        hook.step_committed(step)
        assert records.planned == (1.0 + 4.0) + (2.0 + 1.0)
        view: Any = SimpleNamespace(epoch=1, members=(7, 9), rank=1, size=2)
        assert report(view, records, ()).planned == 8.0
    hook.step_committed(SimpleNamespace(world=World(), rounds=rounds))  # type: ignore[arg-type]
