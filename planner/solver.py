"""The one place that talks to solvers: HiGHS directly where a program is solved many times a step, PuLP elsewhere."""

from __future__ import annotations

import math
import time
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import highspy
import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float64]


def maximise_first(matrix: Floats, lower: Floats, upper: Floats, columns: Floats) -> float:
    """Maximises x[0] subject to lower <= matrix @ x <= upper, 0 <= x <= columns; 0 where nothing fulfils that.

    Infinity where the solver can't tell.
    """
    first = np.concatenate(([-1.0], np.zeros(matrix.shape[1] - 1)))
    solver: Any = highspy.Highs()  # type: ignore[no-untyped-call]
    solver.setOptionValue("output_flag", False)
    solver.setOptionValue("threads", 1)
    solver.passModel(_program(first, matrix, lower, upper, columns))
    solver.run()
    status = solver.getModelStatus()
    if status == highspy.HighsModelStatus.kInfeasible:
        return 0.0
    if status != highspy.HighsModelStatus.kOptimal:
        return math.inf  # numbers too far apart for the solver: nothing is proved
    return -float(solver.getInfo().objective_function_value)


@dataclass(frozen=True, slots=True)
class LinearSolution:
    """The optimum of a linear program."""

    value: float
    columns: Floats
    duals: Floats
    """Per row, what the optimum gains per unit of its bound."""


def minimise_linear(
    costs: Floats, matrix: Floats, lower: Floats, upper: Floats, columns: Floats
) -> LinearSolution | None:
    """Minimises costs @ x subject to lower <= matrix @ x <= upper, 0 <= x <= columns; None where nothing fulfils that
    or numbers are too far apart for the solver.
    """
    solver: Any = highspy.Highs()  # type: ignore[no-untyped-call]
    solver.setOptionValue("output_flag", False)
    solver.setOptionValue("threads", 1)
    solver.passModel(_program(costs, matrix, lower, upper, columns))
    solver.run()
    if solver.getModelStatus() != highspy.HighsModelStatus.kOptimal:
        return None
    solution = solver.getSolution()
    value = float(solver.getInfo().objective_function_value)
    return LinearSolution(value, np.array(solution.col_value), np.array(solution.row_dual))


def _program(costs: Floats, matrix: Floats, lower: Floats, upper: Floats, columns: Floats) -> Any:
    program = highspy.HighsLp()
    program.num_row_, program.num_col_ = matrix.shape
    program.col_cost_ = costs
    program.col_lower_, program.col_upper_ = np.zeros(matrix.shape[1]), columns
    program.row_lower_, program.row_upper_ = lower, upper
    rows, cols = np.nonzero(matrix)
    program.a_matrix_.format_ = highspy.MatrixFormat.kRowwise
    program.a_matrix_.start_ = np.concatenate(([0], np.cumsum(np.bincount(rows, minlength=len(matrix)))))
    program.a_matrix_.index_, program.a_matrix_.value_ = cols, matrix[rows, cols]
    return program


WALL_SECONDS = 20.0
"""At most, for a second of processor time: the machine is busy then, or HiGHS doesn't ask whether to go on."""


class Program:
    """A mixed-integer program to minimise, through PuLP and HiGHS; runs on PuLP 3.3 and on PuLP 4."""

    def __init__(self, name: str) -> None:
        import pulp

        self._pulp = pulp
        self._problem = pulp.LpProblem(name, pulp.LpMinimize)
        self._variables: list[Any] = []
        self.bound = -math.inf
        """After `minimise`: no solution is less; infinite where there is none at all."""

    def binary(self) -> int:
        """Adds a variable that is 0 or 1; returns its number."""
        return self._add(0, 1, "Binary")

    def integer(self, low: int, high: int) -> int:
        """Adds a whole number within bounds; returns its number."""
        return self._add(low, high, "Integer")

    def real(self, low: float, high: float) -> int:
        """Adds a variable within bounds; returns its number."""
        return self._add(low, high, "Continuous")

    def at_most(self, terms: Iterable[tuple[float, int]], constant: float) -> None:
        """Demands: sum of coefficient * variable <= constant."""
        self._problem += self._sum(terms) <= constant

    def equal(self, terms: Iterable[tuple[float, int]], constant: float) -> None:
        """Demands: sum of coefficient * variable == constant."""
        self._problem += self._sum(terms) == constant

    def minimise(self, terms: Iterable[tuple[float, int]], seconds: float, gap: float = 0.0) -> list[float] | None:
        """Returns the values of all variables of the best solution found in that time, None if there is none.

        seconds: of this thread's processor time, so that a busy machine makes no solution worse. gap: stop when the
        solution is this close to the bound (relative).

        What `solve()` returns differs between PuLP 3 and 4, so nothing is concluded from it: check the values.
        """
        self._problem += self._sum(terms)
        deadline = time.thread_time() + seconds

        def stop_in_time(_kind: Any, _message: str, _out: Any, into: Any, _data: Any) -> None:
            # with one thread HiGHS works, and asks this, in the thread that called it
            into.user_interrupt = time.thread_time() > deadline

        asks = highspy.cb.HighsCallbackType
        solver = self._pulp.HiGHS(
            msg=False,
            timeLimit=WALL_SECONDS * seconds,
            threads=1,
            gapRel=gap or None,
            callbackTuple=(stop_in_time, None),
            callbacksToActivate=[asks.kCallbackMipInterrupt, asks.kCallbackSimplexInterrupt],
        )
        self._problem.solve(solver)
        solved = self._problem.solverModel
        self.bound = float(solved.getInfo().mip_dual_bound)
        if solved.getModelStatus() == highspy.HighsModelStatus.kInfeasible:
            self.bound = math.inf
            return None
        values = [variable.value() for variable in self._variables]
        return None if None in values else [float(v) for v in values]

    def _add(self, low: float, high: float, kind: str) -> int:
        number = len(self._variables)
        self._variables.append(self._problem.add_variable(f"x{number}", lowBound=low, upBound=high, cat=kind))
        return number

    def _sum(self, terms: Iterable[tuple[float, int]]) -> Any:
        return self._pulp.lpSum(coefficient * self._variables[i] for coefficient, i in terms)
