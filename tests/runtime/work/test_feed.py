"""How early steps are planned: one ahead, so that a plan knows what passes lately took; more where planning is slow."""

import time
from collections.abc import Iterator
from contextlib import contextmanager
from types import SimpleNamespace
from typing import Any

import pytest

from elastic_jobs import eventually
from heteromesh.errors import UserError
from heteromesh.runtime.work.feed import LATE_FACTOR, PlanFeed
from heteromesh.runtime.work.source import PlanningFailed

STEPS = 6


@contextmanager
def feed_of(
    seconds: float, *, takes: float = 0.0, ahead: int = 3, fails_at: int = -1
) -> Iterator[tuple[Any, list[int]]]:
    """A feed whose plans take `takes` seconds and predict `seconds`, and the steps that it has asked for."""
    asked: list[int] = []

    def plan(question: Any, costs: Any, correction: Any) -> Any:
        time.sleep(takes)
        asked.append(question.number)
        if question.number == fails_at:
            raise UserError("it fits nowhere")
        return SimpleNamespace(seconds=seconds)

    recorder = SimpleNamespace(add=lambda *_: None)
    world: Any = SimpleNamespace(
        rank=0, members=(0,), broadcast=lambda value: value, sum_ahead=lambda t: t, recorder=recorder
    )
    batch = SimpleNamespace(sequences=(), lengths=())
    sampler: Any = SimpleNamespace(next_batch=lambda: batch)
    reader: Any = SimpleNamespace(step_inputs=lambda *_: {})
    service: Any = SimpleNamespace(plan=plan)
    corrected = SimpleNamespace(applied=lambda costs: SimpleNamespace(speeds=(1.0,)))
    costs: Any = SimpleNamespace(of=lambda members: None, correction=lambda members: corrected)
    feed = PlanFeed(world, sampler, reader, service, costs, first=0, last=STEPS, ahead=ahead)
    try:
        yield feed, asked
    finally:
        feed.close()


def test_the_next_step_is_planned_when_the_one_before_it_begins() -> None:
    with feed_of(100.0) as (feed, asked):
        for taken in range(1, STEPS + 1):
            eventually(lambda: len(asked) == taken)  # noqa: B023
            time.sleep(0.02)
            assert asked == list(range(1, taken + 1))
            feed.next(taken)


def test_where_planning_takes_long_it_begins_earlier() -> None:
    with feed_of(0.02 * LATE_FACTOR / 2, takes=0.02) as (feed, asked):
        feed.next(1)
        eventually(lambda: len(asked) == 4)
        time.sleep(0.1)
        assert asked == [1, 2, 3, 4]


def test_it_ends_in_the_middle_and_after_the_last_step() -> None:
    with feed_of(100.0) as (feed, asked):
        feed.next(1)
    assert len(asked) <= 2
    with feed_of(1e-6) as (feed, _):
        for number in range(1, STEPS + 1):
            feed.next(number)


def test_a_step_that_cannot_be_planned_is_told_in_its_turn() -> None:
    with feed_of(1e-6, fails_at=3) as (feed, asked):
        feed.next(1)
        feed.next(2)
        with pytest.raises(PlanningFailed, match="it fits nowhere"):
            feed.next(3)
        assert asked == [1, 2, 3]
