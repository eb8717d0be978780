"""The test helper itself."""

import time

import pytest

from ranks import World, run_ranks


def where(world: World) -> tuple[int, int, float]:
    import torch

    return world.rank, world.size, float(world.sum(torch.tensor([float(world.rank)]))[0])


def fail_on_last(world: World) -> None:
    if world.rank == world.size - 1:
        raise RuntimeError("as told")


def hang_on_first(world: World) -> None:
    if world.rank == 0:
        time.sleep(60)


@pytest.mark.parametrize("size", [1, 2, 4])
def test_every_rank_answers(size: int) -> None:
    assert run_ranks(size, where) == [(r, size, sum(range(size))) for r in range(size)]


def test_a_failure_is_raised_here() -> None:
    with pytest.raises(AssertionError, match="as told"):
        run_ranks(2, fail_on_last)


def test_a_rank_that_hangs_is_named_and_killed() -> None:
    with pytest.raises(AssertionError, match=r"ranks \[0.*were not done"):
        run_ranks(2, hang_on_first, seconds=3)
