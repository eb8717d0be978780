"""Who reduces what: optimal and even fractions, bounds, pieces, limits, refusals."""

from __future__ import annotations

import json
from dataclasses import asdict, replace
from itertools import pairwise, product
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from heteromesh.errors import UserError
from heteromesh.planner.cluster.catalog import CATALOG
from heteromesh.planner.cluster.cluster import Cluster, Host, Nic, load_cluster
from heteromesh.planner.cluster.links import cluster_links
from heteromesh.planner.reduction.reduction import Reduction, plan_reduction, reduction_for
from heteromesh.planner.reduction.schedule import pieces, representatives
from heteromesh.planner.solver import Program
from reduction_bytes import sent_bytes

GBIT = 125e6
FAST = 1e12
"""A local rate that never decides."""


def plan(uplinks, max_fraction=None, hosts=None) -> Reduction:
    hosts = range(len(uplinks)) if hosts is None else hosts
    return plan_reduction(hosts, uplinks, [FAST] * len(uplinks), max_fraction=max_fraction)


def program_seconds(uplinks, limits, hosts) -> float:
    """The module's linear program as it stands, by HiGHS."""
    program, present = Program("reduction"), sorted(set(hosts))
    scale = min(uplinks)
    seconds = program.real(0, 1e6)
    fractions = [program.real(0, min(limit, 1)) for limit in limits]
    program.equal([(1.0, f) for f in fractions], 1.0)
    for host in present:
        mine = [(float(len(present) - 2), f) for f, its in zip(fractions, hosts, strict=True) if its == host]
        program.at_most([*mine, (-uplinks[host] / scale, seconds)], -1.0)
    values = program.minimise([(1.0, seconds)], 10)
    assert values is not None
    return values[seconds] / scale


def test_slow_hosts_own_nothing_and_the_slowest_link_decides():
    reduction = plan([GBIT, GBIT, GBIT / 5, GBIT / 5])
    assert reduction.fractions == pytest.approx((0.5, 0.5, 0, 0))
    assert reduction.fractions[2:] == (0, 0)
    assert reduction.seconds_per_byte == pytest.approx(5 / GBIT)
    assert reduction.bound_seconds_per_byte == pytest.approx(5 / GBIT)
    assert reduction.ring_seconds_per_byte == pytest.approx(1.5 * 5 / GBIT)
    assert not reduction.ring


def test_equal_hosts_own_equal_parts_and_keep_the_ring():
    reduction = plan([GBIT] * 4)
    assert reduction.fractions == pytest.approx((0.25,) * 4)
    assert reduction.seconds_per_byte == pytest.approx(reduction.ring_seconds_per_byte)
    assert reduction.ring


def test_six_fast_and_two_slow_hosts():
    reduction = plan([GBIT] * 6 + [GBIT / 5] * 2)
    assert reduction.fractions == pytest.approx((1 / 6,) * 6 + (0, 0))
    assert reduction.seconds_per_byte == pytest.approx(reduction.bound_seconds_per_byte)
    assert reduction.waves == (0, 0, 1, 1, 2, 2, 0, 0)  # two at a time keep the slow links busy; one would not


def test_equal_hosts_and_two_owners_work_all_at_once():
    assert set(plan([GBIT] * 8).waves) == {0}
    assert set(plan([GBIT] * 2 + [GBIT / 5] * 2).waves) == {0}
    assert set(plan([GBIT] * 2, hosts=(0, 0, 1, 1)).waves) == {0}


def test_owners_of_one_wave_are_on_different_hosts():
    reduction = plan([GBIT, GBIT, GBIT / 5], hosts=(0, 0, 1, 1, 2))
    assert reduction.waves == (0, 1, 0, 1, 0)


def alone(reduction: Reduction, wave: int) -> list[float]:
    mine = [f if w == wave else 0.0 for f, w in zip(reduction.fractions, reduction.waves, strict=True)]
    return [f / sum(mine) for f in mine]


@settings(max_examples=60)
@given(st.lists(st.integers(1, 40), min_size=3, max_size=12), st.floats(0.15, 1))
def test_no_wave_takes_longer_than_its_bytes_share(rates, limit):
    """By the module's formula, with one device a host: a wave alone keeps the pace of all owners at once."""
    reduction = plan([float(r) for r in rates], [max(limit, 1 / len(rates))] * len(rates))
    owners = [w for f, w in zip(reduction.fractions, reduction.waves, strict=True) if f]
    assert set(owners) == set(range(max(owners) + 1))
    for wave in range(max(owners) + 1):
        fractions = alone(reduction, wave)
        seconds = max((1 + (len(rates) - 2) * f) / r for f, r in zip(fractions, rates, strict=True))
        assert seconds <= reduction.seconds_per_byte * (1 + 1e-6)
        assert sum(w == wave for w in owners) >= 2 or len(owners) == 1


def test_several_devices_of_a_host_share_its_part_and_leave_the_ring():
    reduction = plan([GBIT, GBIT], hosts=(0, 0, 1, 1))
    assert reduction.fractions == pytest.approx((0.25,) * 4)
    assert reduction.seconds_per_byte == pytest.approx(1 / GBIT)  # each byte leaves a host once
    assert reduction.ring_seconds_per_byte == pytest.approx(1.5 / GBIT)


def test_slow_devices_inside_a_host_count():
    reduction = plan_reduction((0, 0, 0, 1), (100.0, 100.0), (1.0, 1.0))
    assert reduction.seconds_per_byte == pytest.approx(1 + 1 / 4 + 1 / 12)  # own quarter, a third of host 1's quarter


def test_one_host_and_one_rank():
    assert plan_reduction((0, 0), (), (2.0,)).seconds_per_byte == pytest.approx(0.5)
    alone = plan_reduction((0,), (), (1.0,))
    assert (alone.fractions, alone.seconds_per_byte, alone.ring) == ((1.0,), 0.0, True)


def test_a_ring_that_visits_a_host_twice_pays_twice():
    straight, crossing = (plan([1.0, 1.0], hosts=h).ring_seconds_per_byte for h in ((0, 0, 1, 1), (0, 1, 0, 1)))
    assert crossing == pytest.approx(2 * straight)


@settings(max_examples=40)
@given(
    st.lists(st.integers(1, 40), min_size=2, max_size=5),
    st.lists(st.integers(0, 4), min_size=1, max_size=7),
    st.lists(st.floats(0.05, 1), min_size=7, max_size=7),
    st.booleans(),
)
def test_fractions_solve_the_linear_program(rates, extra, limits, limited):
    hosts = [*range(len(rates)), *(h % len(rates) for h in extra)]
    limits = (limits + [1.0] * 5)[: len(hosts)] if limited else [1.0] * len(hosts)
    if sum(limits) < 1:
        limits = [m / sum(limits) for m in limits]
    reduction = plan([float(r) for r in rates], limits, hosts)
    assert sum(reduction.fractions) == pytest.approx(1)
    assert all(0 <= f <= m + 1e-9 for f, m in zip(reduction.fractions, limits, strict=True))
    assert reduction.seconds_per_byte == pytest.approx(program_seconds(rates, limits, hosts), rel=1e-6)
    assert reduction.seconds_per_byte >= reduction.bound_seconds_per_byte * (1 - 1e-9)
    if not limited:
        shares = [hosts.count(h) / len(hosts) for h in range(len(rates))]
        even = max((1 + (len(rates) - 2) * s) / r for s, r in zip(shares, rates, strict=True))
        assert reduction.seconds_per_byte <= even * (1 + 1e-9)


def test_fractions_are_the_most_even_of_the_fastest():
    """Against all fractions in steps of 1/20."""
    uplinks, limits = (9.0, 7.0, 4.0), (0.6, 0.3, 1.0)
    best = plan(uplinks, limits)
    spread = sum(f * f for f in best.fractions)
    for a, b in product(range(21), repeat=2):
        tried = (a / 20, b / 20, 1 - (a + b) / 20)
        if tried[2] < 0 or any(f > m for f, m in zip(tried, limits, strict=True)):
            continue
        seconds = max((1 + f) / r for f, r in zip(tried, uplinks, strict=True))
        assert seconds >= best.seconds_per_byte - 1e-12
        if seconds <= best.seconds_per_byte + 1e-12:
            assert sum(f * f for f in tried) >= spread - 1e-9


def test_memory_limits_are_kept():
    reduction = plan([4.0, 4.0, 1.0], max_fraction=[0.25, 0.25, 1.0])
    assert reduction.fractions == pytest.approx((0.25, 0.25, 0.5))
    assert reduction.seconds_per_byte == pytest.approx(1.5)


def test_limits_that_leave_part_of_the_tensor_alone_are_refused():
    with pytest.raises(UserError, match=r"memory for 0\.750 of the tensor"):
        plan([1.0, 1.0, 1.0], max_fraction=[0.25] * 3)
    with pytest.raises(UserError, match="none may be negative"):
        plan([1.0, 1.0], max_fraction=[-0.5, 1.0])


@pytest.mark.parametrize("rate", [0.0, -1.0, float("nan"), float("inf")])
def test_rates_must_be_positive(rate):
    with pytest.raises(UserError, match="uplink of host 1"):
        plan([1.0, rate])
    with pytest.raises(UserError, match="local rate of host 0"):
        plan_reduction((0, 0), (), (rate,))


def test_limits_must_be_as_many_as_ranks():
    with pytest.raises(ValueError, match="2 limits for 3 ranks"):
        plan([1.0] * 3, max_fraction=[1.0, 1.0])


def test_a_cluster_file_and_json(tmp_path: Path):
    text = '[[hosts]]\nnames = ["a", "b"]\ndevice = "cpu"\ncount = 1\nnics = [{kind = "ethernet", gbit = 1}]\n'
    path = tmp_path / "c.toml"
    path.write_text(text + text.replace('"a", "b"', '"c"').replace("gbit = 1", "gbit = 0.2"))
    reduction = reduction_for(load_cluster(path))
    assert reduction.hosts == (0, 1, 2)
    assert reduction.fractions == pytest.approx((0.5, 0.5, 0))
    back = json.loads(json.dumps(asdict(reduction)))
    assert Reduction(**{k: tuple(v) if isinstance(v, list) else v for k, v in back.items()}) == reduction


def test_uplinks_are_rdma_on_one_fabric_and_ethernet_across():
    nics = (Nic(kind="infiniband", gbit=100), Nic(kind="ethernet", gbit=10, count=2))
    hosts = tuple(Host(name=f"h{i}", device="cpu", count=1, fabric=f, nics=nics) for i, f in enumerate(("a", "a", "b")))
    cluster = Cluster(name="c", hosts=hosts, devices={"cpu": CATALOG["cpu"]})
    links = cluster_links(cluster)
    assert links.uplink(0, (0, 1)) == pytest.approx(5 * links.uplink(0, (0, 1, 2)))
    across = reduction_for(cluster).bound_seconds_per_byte
    within = reduction_for(replace(cluster, hosts=hosts[:2])).bound_seconds_per_byte
    assert across == pytest.approx(1 / links.uplink(0, (0, 1, 2)))
    assert within == pytest.approx(1 / links.uplink(0, (0, 1)))


fraction_lists = st.lists(st.integers(0, 5), min_size=1, max_size=6).filter(any)


def made(weights, hosts=None, waves=()) -> Reduction:
    fractions = tuple(w / sum(weights) for w in weights)
    hosts = tuple(range(len(weights))) if hosts is None else tuple(hosts)
    return Reduction(
        hosts=hosts,
        fractions=fractions,
        seconds_per_byte=1.0,
        bound_seconds_per_byte=1.0,
        ring_seconds_per_byte=9.0,
        waves=waves,
    )


@given(fraction_lists, st.integers(0, 100_000), st.sampled_from([1, 2, 4, 8]))
def test_pieces_cover_each_range_once(weights, numel, itemsize):
    reduction = made(weights)
    bounds = reduction.bounds(numel)
    assert (bounds[0], bounds[-1], len(bounds)) == (0, numel, len(weights) + 1)
    assert all(w or low == high for w, low, high in zip(weights, bounds, bounds[1:], strict=False))
    owned = sorted((p.start, p.stop, p.owner) for p in pieces(reduction, reduction.bounds(numel), itemsize))
    assert sum(stop - start for start, stop, _ in owned) == numel
    assert all(bounds[o] <= start < stop <= bounds[o + 1] for start, stop, o in owned)
    assert all(a[1] <= b[0] for a, b in pairwise(owned))


def test_owners_take_turns():
    reduction = made((2, 1))
    order = [piece.owner for piece in pieces(reduction, reduction.bounds(3_000_000), 4)]
    assert order[:6].count(0) == 4
    assert order[-6:].count(0) == 4


def test_waves_follow_each_other_and_have_larger_pieces():
    waves = (1, 0, 1, 0)
    cases = [made((1, 1, 1, 1), waves=w) for w in (waves, ())]
    cut, at_once = (pieces(reduction, reduction.bounds(32_000_000), 4) for reduction in cases)
    assert [waves[piece.owner] for piece in cut] == sorted(waves[piece.owner] for piece in cut)
    assert cut[0].owner != cut[1].owner  # owners of a wave take turns
    assert len(at_once) == 2 * len(cut)
    assert sorted((p.start, p.stop) for p in cut)[-1][1] == 32_000_000


@given(fraction_lists, st.integers(1, 50_000))
def test_bytes_are_those_of_the_formula(weights, numel):
    """Of the module: S (1 + (n - 2) f), with one device a host."""
    reduction = made(weights)
    ranks = frozenset(range(len(weights)))
    sent = sent_bytes(reduction, numel, 4, sources=ranks, spread=True)
    bounds = reduction.bounds(numel)
    for rank, count in enumerate(sent):
        owned = bounds[rank + 1] - bounds[rank]
        assert count == (4 * (numel - owned + owned * (len(weights) - 1)) if len(weights) > 1 else 0)


def test_each_byte_leaves_a_host_of_several_devices_once():
    reduction = made((1, 1, 1, 1), hosts=(0, 0, 1, 1))
    across = 0
    for piece in pieces(reduction, reduction.bounds(1_000_000), 4):
        speakers = representatives(reduction, piece)
        assert speakers[reduction.hosts[piece.owner]] == piece.owner
        across += (piece.stop - piece.start) * 4 * (1 if reduction.hosts[piece.owner] == 1 else 0)
    # host 0 sends partial sums of host 1's half; what else it sends across are results of its own half
    assert across == 2_000_000
    sent = sent_bytes(reduction, 1_000_000, 4, sources=frozenset(range(4)), spread=True)
    assert sum(sent) == 4_000_000 * (2 + 2 + 2)  # to representatives and back on both hosts; across, both ways
