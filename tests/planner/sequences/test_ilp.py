"""The integer program beats the greedy on some small steps, never spoils one, and is skipped where it can't help."""

from __future__ import annotations

import random
import warnings

import pytest
from test_bound import fitting_batch, random_costs
from test_plan_step import flexsp, lognormal

from heteromesh.planner.report.check import check_step
from heteromesh.planner.sequences import step as step_module
from heteromesh.planner.sequences.bound import bound_seconds
from heteromesh.planner.sequences.ilp import refine
from heteromesh.planner.sequences.partial import StepProblem
from heteromesh.planner.sequences.step import plan_step
from heteromesh.planner.solver import Program

EIGHT_ON_FOUR = [2891, 3119, 4555, 5707, 305, 950, 4955, 5697]


def test_beats_the_greedy_where_the_gap_is_large():
    costs = flexsp(4)
    quick, thorough = plan_step(EIGHT_ON_FOUR, costs), plan_step(EIGHT_ON_FOUR, costs, time_limit=10)
    check_step(thorough, costs)
    assert quick.gap > 0.04
    assert thorough.gap < 0.02


def test_never_worse_and_always_feasible():
    for seed in range(12):
        rng = random.Random(seed)
        costs = random_costs(rng, rng.randint(1, 4))
        batch = fitting_batch(rng, costs, rng.randint(1, 6))
        quick, thorough = plan_step(batch, costs), plan_step(batch, costs, time_limit=0.9)
        check_step(thorough, costs)
        assert thorough.seconds <= quick.seconds * (1 + 1e-9), seed


def test_nothing_below_the_cut_off_gives_none():
    costs = flexsp(2)
    task = StepProblem([6000, 6000], costs)
    least = bound_seconds([6000, 6000], costs)
    assert refine(task, least * 1.0001, least, 5.0) is None


def test_a_large_step_is_left_to_the_greedy():
    batch, costs = lognormal(1, 200, 20_000), flexsp(8)
    assert refine(StepProblem(batch, costs), 1e9, 0.0, 5.0) is None


def test_a_short_time_limit_starts_no_program(monkeypatch):
    def refuse(*_):
        raise AssertionError("started")

    monkeypatch.setattr(step_module, "refine", refuse)
    plan_step(EIGHT_ON_FOUR, flexsp(4), time_limit=0.4)
    with pytest.raises(AssertionError, match="started"):
        plan_step(EIGHT_ON_FOUR, flexsp(4), time_limit=5)


def test_program_minimises_without_deprecated_calls():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        program = Program("knapsack")
        items = [program.binary() for _ in range(3)]
        rest = program.real(0.0, 10.0)
        program.at_most([(3.0, items[0]), (4.0, items[1]), (2.0, items[2])], 6.0)
        program.equal([(1.0, rest), (5.0, items[0]), (6.0, items[1]), (3.0, items[2])], 10.0)
        values = program.minimise([(1.0, rest)], 5.0)
    assert values is not None
    assert [round(v) for v in values] == [0, 1, 1, 1]


def test_program_without_a_solution_in_bounds():
    program = Program("impossible")
    x = program.binary()
    program.equal([(2.0, x)], 1.0)
    values = program.minimise([(1.0, x)], 5.0)
    assert values is None or abs(2 * values[0] - 1.0) > 1e-6
