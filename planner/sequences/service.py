"""The planning process: `python -m heteromesh.planner.sequences.service`, requests on standard input, steps on standard
output.

Pickled objects: one Request a step, answered by a Step or by the UserError that it raised. Ends with its standard
input, so it never outlives the rank that started it.
"""

from __future__ import annotations

import pickle
import signal
import sys
from dataclasses import dataclass

from heteromesh.errors import UserError
from heteromesh.planner.cost.correction import Correction
from heteromesh.planner.cost.passes import Costs
from heteromesh.planner.plan import Step
from heteromesh.planner.sequences.step import plan_step


@dataclass(frozen=True, slots=True)
class Request:
    """A batch to plan."""

    lengths: tuple[int, ...]
    correction: Correction
    """What steps have shown of the costs."""
    time_limit: float
    costs: Costs | None = None
    """None: those of the request before."""


def answer(request: Request, costs: Costs) -> Step | UserError:
    """Returns the planned step, or why there is none."""
    try:
        return plan_step(request.lengths, request.correction.applied(costs), time_limit=request.time_limit)
    except UserError as error:
        return error


def main() -> None:
    # Ctrl-C and torchrun's SIGTERM reach the whole process group; the rank that owns this process ends it
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)
    source, sink = sys.stdin.buffer, sys.stdout.buffer
    try:
        costs: Costs | None = None
        while True:
            request: Request = pickle.load(source)
            costs = request.costs or costs
            assert costs is not None
            pickle.dump(answer(request, costs), sink)
            sink.flush()
    except (EOFError, BrokenPipeError):
        return


if __name__ == "__main__":
    main()
