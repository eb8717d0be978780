"""Ownership of sharded weights: counted traffic, bounds against enumeration, memory, duals, groups, host memory."""

import itertools
import random
from dataclasses import replace

import pytest

from heteromesh.planner.ownership.memory import MIXED, Precision
from heteromesh.planner.ownership.offload_rates import OffloadRates
from heteromesh.planner.ownership.offload_split import fraction_seconds, staged_fraction
from heteromesh.planner.ownership.weights import (
    ADAM_BYTES,
    HOST_PARAMETERS_PER_SECOND,
    OwnedModel,
    OwnerHost,
    _Search,
    least_seconds,
    missing_bytes,
    own_weights,
)

RATE = 1e9
EVEN = Precision(weights=2, gradients=2, masters=4)
"""Gradients as large as weights: the counted traffic is of one size S then."""


def model(layers=8, forward=0.0, backward=0.0, precision=EVEN, outer=0):
    return OwnedModel(
        layers=layers,
        layer_parameters=500_000_000,
        outer_parameters=outer,
        forward_seconds=forward,
        backward_seconds=backward,
        precision=precision,
    )


def host(**changes):
    usual = OwnerHost(devices=1, memory=1e12, uplink=RATE, across=RATE, shares_uplink=True, link=90e9, device_rate=1e15)
    return replace(usual, **changes)


@pytest.mark.parametrize("ranks", [2, 3, 5])
def test_everything_gathered_costs_three_minus_one_layer(ranks):
    owned = model()
    hosts = [host()] * ranks
    search = _Search(owned, hosts, [range(ranks)])
    assert search._try((0,) * ranks)
    size = 2 * owned.all
    per_rank = (3 - 1 / 8) * size * (ranks - 1) / ranks
    gathered = search.best
    assert (gathered.gather_seconds + gathered.reduce_seconds) * RATE == pytest.approx(per_rank)
    assert gathered.fractions == pytest.approx((1 / ranks,) * ranks)


@pytest.mark.parametrize("ranks", [2, 3, 5])
def test_with_room_everything_is_resident_and_costs_two(ranks):
    owned = model()
    found = own_weights(owned, [host()] * ranks)
    assert found.resident == (8,) * ranks
    size = 2 * owned.all
    assert (found.gather_seconds + found.reduce_seconds) * RATE == pytest.approx(2 * size * (ranks - 1) / ranks)
    assert found.gap < 1e-3


def test_a_small_card_gathers_what_a_large_one_keeps():
    owned = model(precision=MIXED)
    found = own_weights(owned, [host(memory=90e9), host(memory=12e9)])
    assert found.resident[0] == 8
    assert found.resident[1] < 8
    assert found.fractions[0] > 0.8
    assert sum(found.fractions) == pytest.approx(1)


def memory_used(owned, one, fraction, on_host, resident):
    whole, p = resident / owned.layers, owned.precision
    weights = p.weights * owned.inside * (whole + (1 - whole) * fraction / one.devices)
    kept = (fraction - on_host) / one.devices
    return weights + p.gradients * owned.inside * fraction / one.devices + p.state * owned.all * kept


def random_case(rng, layers):
    hosts = []
    for _ in range(rng.choice([2, 3])):
        rate = 10 ** rng.uniform(8, 10)
        hosts.append(
            host(
                devices=rng.choice([1, 2, 4]),
                memory=rng.uniform(8, 60) * 1e9,
                uplink=rate,
                across=rate,
                link=rng.choice([10e9, 90e9]),
                device_rate=1e12,
                host_memory=rng.choice([0, 60e9]),
                host_link=20e9,
            )
        )
    return model(layers, rng.uniform(0, 2), rng.uniform(0, 4), MIXED, outer=200_000_000), hosts


def test_bounds_and_memory_hold_against_every_residency():
    rng, worst, feasible = random.Random(1), 0.0, 0
    for _ in range(12):
        owned, hosts = random_case(rng, layers=4)
        every = _Search(owned, hosts, [range(len(hosts))])
        for resident in itertools.product(range(5), repeat=len(hosts)):
            every._try(resident)
        found = own_weights(owned, hosts)
        assert (found is None) == (every.best is None)
        if found is None:
            assert max(missing_bytes(owned, hosts)) > 0
            continue
        feasible += 1
        assert max(missing_bytes(owned, hosts)) < 1e3
        assert found.bound <= every.best.value * (1 + 1e-6)
        assert least_seconds(owned, hosts) <= found.bound * (1 + 1e-9)
        worst = max(worst, found.value / every.best.value - 1)
        for h, one in enumerate(hosts):
            used = memory_used(owned, one, found.fractions[h], found.on_host[h], found.resident[h])
            assert used <= one.memory * (1 + 1e-6)
            assert found.on_host[h] * owned.precision.state * owned.all <= one.host_memory * (1 + 1e-6)
    assert feasible > 6
    assert worst < 0.01


def test_duals_say_what_memory_and_links_save():
    owned = model(precision=MIXED)
    hosts = [host(memory=60e9), host(memory=60e9, uplink=RATE / 3), host(memory=14e9)]
    search = _Search(owned, hosts, [range(3)])
    assert search._try((3, 3, 3))
    value, base = search.best, search.best.value
    for h in range(3):
        changes = {"memory": hosts[h].memory + 1e7}
        again = _Search(owned, [replace(o, **changes) if i == h else o for i, o in enumerate(hosts)], [range(3)])
        assert again._try((3, 3, 3))
        assert base - again.best.value == pytest.approx(value.memory_value[h] * 1e-2, rel=0.02, abs=1e-6)
        changes = {"uplink": hosts[h].uplink + 125e3}
        again = _Search(owned, [replace(o, **changes) if i == h else o for i, o in enumerate(hosts)], [range(3)])
        assert again._try((3, 3, 3))
        assert base - again.best.value == pytest.approx(value.link_value[h] * 1e-3, rel=0.02, abs=1e-6)
    assert max(value.memory_value) > 0
    assert max(value.link_value) > 0


def test_groups_replicate_across_a_slow_link_where_that_is_cheaper():
    owned = model(precision=MIXED)
    fast = [host(uplink=50e9, across=RATE, shares_uplink=False, memory=80e9) for _ in range(4)]
    grouped = own_weights(owned, fast, [(0, 1), (2, 3)])
    one = own_weights(owned, [replace(h, uplink=RATE) for h in fast])
    assert sum(grouped.fractions[:2]) == pytest.approx(1)
    assert sum(grouped.fractions[2:]) == pytest.approx(1)
    # across: each host sums what it owns with the other group, 2 * (1 / 2) * D / 2 each way
    assert grouped.reduce_seconds == pytest.approx(4 * owned.all / 2 / RATE)
    assert grouped.value < 0.5 * one.value
    assert own_weights(owned, [replace(h, memory=30e9) for h in fast], [(0, 1), (2, 3)]) is None, "a copy in each"


def test_host_memory_takes_what_devices_lack():
    owned = model(precision=MIXED)
    small = [host(memory=25e9)] * 2
    assert own_weights(owned, small) is None
    found = own_weights(owned, [replace(h, host_memory=40e9, host_link=20e9) for h in small])
    assert sum(found.on_host) > 0
    assert found.update_seconds > 0.1
    roomy = own_weights(owned, [replace(h, memory=1e12, host_memory=40e9, host_link=20e9) for h in small])
    assert sum(roomy.on_host) == 0, "a device updates faster"


@pytest.mark.parametrize("link", [5e9, 20e9, 200e9])
def test_the_update_of_state_in_host_memory_is_the_closed_form_of_offload(link):
    owned = model(precision=MIXED)
    rate = 1e12
    one = host(memory=0.0, host_memory=1e12, host_link=link, device_rate=rate)
    owned = replace(owned, layers=1)
    rates = OffloadRates(
        host_update=HOST_PARAMETERS_PER_SECOND, device_update=rate / ADAM_BYTES, to_device=link, to_host=link,
        gradient_bytes=4.0, gradients_early=False,
    )  # fmt: skip
    best = fraction_seconds(rates, staged_fraction(rates)) * owned.all
    found = own_weights(owned, [replace(one, memory=(MIXED.weights + MIXED.gradients) * owned.all * 1.001)])
    assert found.on_host[0] == pytest.approx(1, abs=0.01)
    assert found.update_seconds == pytest.approx(best, rel=0.02)
    assert (best < 0.9 * owned.all / HOST_PARAMETERS_PER_SECOND) == (link > 5e9), "faster than the host by itself"


def test_a_holder_needs_no_weights():
    owned = model(precision=MIXED)
    hosts = [host(memory=30e9), host(memory=1e12, works=False)]
    found = own_weights(owned, hosts)
    assert found.fractions[1] > 0.5
    assert found.resident[1] == 0
    assert own_weights(owned, hosts[:1]) is None
