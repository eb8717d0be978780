"""Lanes: order, waiting, what happens when a task fails, and the virtual clock."""

from __future__ import annotations

import threading

import pytest
import torch

from heteromesh.parallel.state.offload.lanes import SimulatedLanes, ThreadLanes
from heteromesh.planner.ownership.offload import OffloadPlan, Subgroup
from heteromesh.planner.ownership.offload_rates import OffloadRates
from heteromesh.planner.ownership.offload_tasks import LaneTask

TIERS = ("staged", "host", "disk", "host", "staged", "disk")
PLAN = OffloadPlan(
    subgroups=tuple(Subgroup(16 * i, 16 * i + 16, tier) for i, tier in enumerate(TIERS)),
    order=tuple(range(6)),
    apart=True,
    staging=1,
    weights=1,
    ring=1,
)
TASKS = PLAN.step_tasks().tasks


def test_each_lane_has_a_thread_and_tasks_wait_for_those_before_them():
    done: list[int] = []
    threads: dict[str, set[int]] = {}
    lock = threading.Lock()

    def work(task: LaneTask) -> None:
        number = next(i for i, t in enumerate(TASKS) if t is task)
        with lock:
            assert set(task.after) <= set(done)
            done.append(number)
            threads.setdefault(task.lane, set()).add(threading.get_ident())
        assert not torch.is_grad_enabled()

    before = threading.active_count()
    ThreadLanes().run(PLAN, TASKS, work)
    assert sorted(done) == list(range(len(TASKS)))
    assert all(len(of) == 1 for of in threads.values())
    assert len({next(iter(of)) for of in threads.values()}) == len(threads)
    assert threading.active_count() == before
    for lane in threads:
        numbers = [n for n in done if TASKS[n].lane == lane]
        assert numbers == sorted(numbers)


@pytest.mark.parametrize("failing", range(0, len(TASKS), 3))
def test_failed_task_ends_the_step_with_its_error_and_no_thread_stays(failing):
    done: list[LaneTask] = []

    def work(task: LaneTask) -> None:
        if task is TASKS[failing]:
            raise OSError("gone")
        done.append(task)

    before = threading.active_count()
    with pytest.raises(OSError, match="gone"):
        ThreadLanes().run(PLAN, TASKS, work)
    assert threading.active_count() == before
    after = {failing}
    for number, task in enumerate(TASKS):
        if after & set(task.after):
            after.add(number)
    assert not [t for n, t in enumerate(TASKS) if n in after and any(t is d for d in done)]


def test_without_threads_to_be_had_the_step_ends_with_that_error(monkeypatch):
    real, started = threading.Thread.start, []

    def start(self) -> None:
        started.append(self)
        if len(started) == 2:
            raise RuntimeError("can't start new thread")
        real(self)

    before = threading.active_count()
    monkeypatch.setattr(threading.Thread, "start", start)
    with pytest.raises(RuntimeError, match="can't start new thread"):
        ThreadLanes().run(PLAN, TASKS, lambda _: None)
    assert threading.active_count() == before


def test_step_without_tasks():
    for lanes in (ThreadLanes(), SimulatedLanes(OffloadRates(host_update=1))):
        lanes.run(PLAN, [], lambda _: None)


def test_virtual_clock_by_hand():
    """Two subgroups staged through one set, 16 elements of 12 bytes each: nothing overlaps but the two directions."""
    rates = OffloadRates(host_update=1, device_update=16, to_device=192, to_host=96)
    two = OffloadPlan(
        subgroups=(Subgroup(0, 16, "staged"), Subgroup(16, 32, "staged")), order=(0, 1), apart=True, staging=1
    )
    lanes = SimulatedLanes(rates)
    lanes.run(two, two.step_tasks().tasks, lambda _: None)
    assert lanes.spans == [(0, 1), (1, 2), (2, 4), (4, 5), (5, 6), (6, 8)]
    assert lanes.seconds == 8
