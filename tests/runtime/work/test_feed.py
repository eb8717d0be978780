"""How early steps are planned: one ahead, so that a plan knows what passes lately took; more where planning is slow."""

import time
from collections.abc import Iterator
from contextlib import contextmanager
from types import SimpleNamespace
from typing import Any

import pytest

from elastic_jobs import eventually
from heteromesh.errors import UserError
from heteromesh.planner.cost.correction import Correction
from heteromesh.runtime.work.feed import LATE, PlanFeed, Planned, PlanningFailed

STEPS = 6


@contextmanager
def feed_of(
    seconds: float, *, takes: float = 0.0, ahead: int = 3, fails_at: int = -1
) -> Iterator[tuple[Any, list[int]]]:
    """A feed whose plans take `takes` seconds and predict `seconds`, and the steps that it has asked for."""
    asked: list[int] = []

    def propose(index: int) -> Planned:
        time.sleep(takes)
        asked.append(index)
        if index == fails_at:
            raise UserError("it fits nowhere")
        step: Any = SimpleNamespace(seconds=seconds)
        return Planned(SimpleNamespace(sequences=()), step, Correction())  # type: ignore[arg-type]

    recorder = SimpleNamespace(add=lambda *_: None)
    world: Any = SimpleNamespace(rank=0, broadcast=lambda value: value, sum_ahead=lambda t: t, recorder=recorder)
    reader: Any = SimpleNamespace(step_inputs=lambda *_: {})
    feed = PlanFeed(world, reader, propose, 0, STEPS, ahead)
    try:
        yield feed, asked
    finally:
        feed.close()


def test_the_next_step_is_planned_when_the_one_before_it_begins() -> None:
    with feed_of(100.0) as (feed, asked):
        for taken in range(STEPS):
            eventually(lambda: len(asked) == taken + 1)  # noqa: B023
            time.sleep(0.02)
            assert asked == list(range(taken + 1))
            feed.next()


def test_where_planning_takes_long_it_begins_earlier() -> None:
    with feed_of(0.02 * LATE / 2, takes=0.02) as (feed, asked):
        feed.next()
        eventually(lambda: len(asked) == 4)
        time.sleep(0.1)
        assert asked == [0, 1, 2, 3]


def test_it_ends_in_the_middle_and_after_the_last_step() -> None:
    with feed_of(100.0) as (feed, asked):
        feed.next()
    assert len(asked) <= 2
    with feed_of(1e-6) as (feed, _):
        for _ in range(STEPS):
            feed.next()


def test_a_step_that_cannot_be_planned_is_told_in_its_turn() -> None:
    with feed_of(1e-6, fails_at=2) as (feed, asked):
        feed.next()
        feed.next()
        with pytest.raises(PlanningFailed, match="it fits nowhere"):
            feed.next()
        assert asked == [0, 1, 2]
