"""How much of a rank's optimizer state leaves its device's memory, and where it goes."""

import pytest

from heteromesh.planner.ownership.state_tiers import (
    ON_THE_WAY,
    LowerMemory,
    StateTiers,
    kept_share,
    least_offloaded,
    subgroup_numel,
    tiers_of,
)

GB = 1e9


def test_host_memory_takes_what_the_device_lacks_and_the_disk_the_rest():
    lower = LowerMemory(host=3 * GB, disk=100 * GB)
    assert tiers_of("auto", 1.0, 10 * GB, lower) == StateTiers()
    assert tiers_of("auto", 0.8, 10 * GB, lower) == StateTiers(device=0.8, host=pytest.approx(0.2))
    tiers = tiers_of("auto", 0.5, 10 * GB, lower)
    assert (tiers.device, tiers.host, tiers.disk) == pytest.approx((0.5, 0.3, 0.2))


def test_what_the_user_says_counts_but_where_host_memory_is_the_devices():
    both, only_disk = LowerMemory(host=GB, disk=GB), LowerMemory(disk=GB)
    assert tiers_of("host", 1.0, GB, both) == StateTiers(device=0.0, host=1.0)
    assert tiers_of("host", 1.0, GB, only_disk) == StateTiers()
    assert tiers_of("disk", 1.0, GB, both) == StateTiers(device=0.0, disk=1.0)
    assert tiers_of("none", 0.1, GB, both) == StateTiers()


def test_what_is_on_its_way_needs_memory_too():
    assert kept_share(free=2 * GB, state=2 * GB) == 1.0
    assert kept_share(free=GB, state=2 * GB) == pytest.approx(0.5 - ON_THE_WAY)
    assert kept_share(free=ON_THE_WAY * GB, state=GB) == pytest.approx(0.0, abs=1e-9)
    assert kept_share(free=0.5 * ON_THE_WAY * GB, state=GB) < 0
    assert StateTiers(device=0.25, disk=0.75).in_memory == 0.25 + ON_THE_WAY
    assert StateTiers().in_memory == 1.0


def test_ranks_keep_as_much_as_they_can_and_large_ones_all_of_it():
    room = (10.0, 3.0, 2.5)

    def works(kept):
        return all(4.0 * share <= own for share, own in zip(kept, room, strict=True))

    kept = least_offloaded(works, room)
    assert kept[0] == 1.0
    assert 0.5 < kept[1] == kept[2] <= 2.5 / 4
    assert least_offloaded(works, (10.0,) * 3) == (kept[1],) * 3, "of equal ranks none is preferred"
    assert least_offloaded(lambda kept: True, room) == (1.0,) * 3
    assert least_offloaded(lambda kept: False, room) is None


@pytest.mark.parametrize("numel", [1, 500, 10_000, 3_000_000, 10**11])
def test_subgroups_are_small_beside_the_state(numel):
    size = subgroup_numel(numel)
    assert size % 16 == 0
    assert size == 16 or size <= numel / 64
