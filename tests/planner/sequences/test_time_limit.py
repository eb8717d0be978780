"""Limits count the planner's own work: a busy machine makes no plan worse, and a search that has had its time ends."""

from __future__ import annotations

import itertools
import random
import time

import pytest
from test_plan_step import flexsp, lognormal

from heteromesh.planner.sequences import greedy as greedy_module
from heteromesh.planner.sequences import step as step_module
from heteromesh.planner.sequences.step import plan_step
from heteromesh.planner.solver import Program
from heteromesh.planner.stages.placement import place
from sites import batch, hosts


def busy_machine(patch: pytest.MonkeyPatch) -> None:
    """Between any two looks at a clock on the wall an hour goes by."""
    hours = itertools.count(step=3600.0)
    for clock in ("perf_counter", "monotonic", "time"):
        patch.setattr(time, clock, lambda: next(hours))


def slow_thread(patch: pytest.MonkeyPatch, seconds: float) -> None:
    """Between any two looks at its own clock the thread has worked so long."""
    looks = itertools.count()
    patch.setattr(time, "thread_time", lambda: next(looks) * seconds)


def hard_program() -> tuple[Program, int]:
    """Jobs of unequal length on machines of unequal speed: first solutions come at once, the proof takes minutes."""
    rng, program = random.Random(1), Program("machines")
    end = program.real(0.0, 1e6)
    jobs = [(rng.randint(10, 1000), [program.binary() for _ in range(8)]) for _ in range(60)]
    for _, machines in jobs:
        program.equal([(1.0, x) for x in machines], 1.0)
    for machine in range(8):
        load = [(length / rng.uniform(0.3, 1.0), machines[machine]) for length, machines in jobs]
        program.at_most([*load, (-1.0, end)], 0.0)
    return program, end


def test_a_busy_machine_makes_no_step_worse(monkeypatch):
    monkeypatch.setattr(step_module, "PROGRAM_SECONDS", 1e9)
    lengths, costs = lognormal(5, 200, 30_000), flexsp(8)
    quiet = plan_step(lengths, costs, time_limit=60)
    busy_machine(monkeypatch)
    assert plan_step(lengths, costs, time_limit=60).passes == quiet.passes


def test_the_greedy_ends_when_it_has_had_its_time(monkeypatch):
    builds = []
    build = greedy_module.build
    monkeypatch.setattr(greedy_module, "build", lambda *args: builds.append(args) or build(*args))
    lengths, costs = lognormal(5, 200, 30_000), flexsp(8)
    plan_step(lengths, costs, time_limit=1e6)
    many = len(builds)
    builds.clear()
    slow_thread(monkeypatch, 1.0)
    step = plan_step(lengths, costs, time_limit=6)
    assert len(builds) <= 8 < many
    assert sorted(k for p in step.passes for k in p.sequences) == list(range(200))


def test_the_integer_program_is_not_started_when_its_time_is_used_up(monkeypatch):
    monkeypatch.setattr(step_module, "refine", lambda *_: pytest.fail("started"))
    slow_thread(monkeypatch, 10.0)
    plan_step([2891, 3119, 4555, 5707, 305, 950, 4955, 5697], flexsp(4), time_limit=20)


def test_a_program_ends_when_it_has_had_its_time(monkeypatch):
    program, end = hard_program()
    slow_thread(monkeypatch, 0.1)
    values = program.minimise([(1.0, end)], 1.0)
    assert time.thread_time() < 5.0, "asked at most a few times more"
    assert values is None or program.bound < values[end] * (1 - 1e-6), "nothing is proved yet"


def test_a_busy_machine_makes_no_placement_worse(monkeypatch):
    resources, work = hosts({}, {"speed": 0.7}, {"fabric": "roce"}), [batch()]
    quiet = place(resources, work, time_limit=30)
    busy_machine(monkeypatch)
    busy = place(resources, work, time_limit=30)
    assert (busy.placement, busy.bound_seconds) == (quiet.placement, quiet.bound_seconds)
