"""Tells the coordinator how long each member was foreseen to work: who is slow as planned is not diagnosed as slow."""

from __future__ import annotations

from heteromesh.comm.tcp.transport import TcpTransport
from heteromesh.runtime.hooks.api import Hook, StepCommitted


class PlannedWork(Hook):
    """Adds up what plans have foreseen for this rank, in the records of the epoch's transport."""

    def step_committed(self, step: StepCommitted) -> None:
        transport = step.world.exchange
        if not isinstance(transport, TcpTransport):
            return
        member = step.world.members[step.world.rank]
        for one in step.rounds:
            if member in one.members:
                rank = one.members.index(member)
                transport.records.planned += sum(p.seconds for p in one.plan.passes if rank in p.ranks)
