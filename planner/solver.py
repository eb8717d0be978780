"""The one place that talks to solvers: HiGHS directly for programs that are solved many times a step, PuLP for the rest."""

from __future__ import annotations

import highspy
import numpy as np
from heteromesh.planner.envelope import Floats


def maximise_first(matrix: Floats, lower: Floats, upper: Floats, columns: Floats) -> float:
    """max x[0] subject to lower <= matrix @ x <= upper, 0 <= x <= columns; 0 where nothing fulfils that."""
    program = highspy.HighsLp()
    program.num_row_, program.num_col_ = matrix.shape
    program.col_cost_ = np.concatenate(([-1.0], np.zeros(matrix.shape[1] - 1)))
    program.col_lower_, program.col_upper_ = np.zeros(matrix.shape[1]), columns
    program.row_lower_, program.row_upper_ = lower, upper
    rows, cols = np.nonzero(matrix)
    program.a_matrix_.format_ = highspy.MatrixFormat.kRowwise
    program.a_matrix_.start_ = np.concatenate(([0], np.cumsum(np.bincount(rows, minlength=len(matrix)))))
    program.a_matrix_.index_, program.a_matrix_.value_ = cols, matrix[rows, cols]
    solver = highspy.Highs()
    solver.setOptionValue("output_flag", False)
    solver.setOptionValue("threads", 1)
    solver.passModel(program)
    solver.run()
    status = solver.getModelStatus()
    if status == highspy.HighsModelStatus.kInfeasible:
        return 0.0
    if status != highspy.HighsModelStatus.kOptimal:
        raise RuntimeError(f"HiGHS ended a linear program with {solver.modelStatusToString(status)}")
    return -solver.getInfo().objective_function_value
