"""The planner's linear picture of every method against exact traffic and schedules, and what it makes of it."""

from __future__ import annotations

import json
import random
from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from heteromesh.errors import UserError
from heteromesh.planner import plan as plans
from heteromesh.planner.cluster.links import Links
from heteromesh.planner.cost.json import costs_from_json, costs_to_json
from heteromesh.planner.cost.passes import Costs, RateByDegree
from heteromesh.planner.model.attention import AttentionShape, ModelAttention, split_methods
from heteromesh.planner.model.mask import Mask
from heteromesh.planner.report.assemble import peak_activations, peak_tokens
from heteromesh.planner.report.check import check_feasible, check_step
from heteromesh.planner.report.methods import pass_kinds
from heteromesh.planner.sequences import step as planner_step
from heteromesh.planner.sequences.step import plan_step
from heteromesh.planner.splitting.layout import METHODS, base_name, method_layout
from heteromesh.planner.splitting.routes import Kind, schedule
from heteromesh.planner.splitting.traffic import AGREEMENT_BYTES, pass_bytes

LLAMA = ModelAttention(calls=32, shape=AttentionShape(heads=32, kv_heads=8, head_dim=128, itemsize=2))


def attention(heads: int, kv_heads: int, **changes) -> ModelAttention:
    shape = AttentionShape(heads=heads, kv_heads=kv_heads, head_dim=16, itemsize=2)
    return replace(ModelAttention(calls=3, shape=shape), **changes)


def two_hosts(nic: float = 25e9, link: float = 90e9, per_host: int = 4, **changes) -> Costs:
    hosts = tuple(r // per_host for r in range(2 * per_host))
    settings = {
        "seconds_per_token2": 5e-9,
        "seconds_per_token": 1.8e-4,
        "seconds_per_pass": 0.05,
        "seconds_per_round": 3e-5,
        "seconds_per_tile": 1.5e-5,
        "speeds": (1.0,) * len(hosts),
        "capacity": (8000,) * len(hosts),
        "methods": split_methods(LLAMA, hosts, 4.5e6),
        "rate": Links(hosts=hosts, link=(link,) * 2, fabrics=("f",) * 2, fabric_nics=(nic,) * 2, ethernet=(nic,) * 2),
        "hosts": hosts,
        "attention": LLAMA,
    }
    return Costs(**(settings | changes))


def even(degree: int, each: int) -> list[tuple[int]]:
    return [(each,)] * degree


def seconds_of(costs: Costs, ranks: tuple[int, ...], each: int) -> dict[str, float]:
    shards, length = even(len(ranks), each), each * len(ranks)
    fitting = [m.name for m in costs.methods if m.fits(len(ranks))]
    return {name: costs.pass_seconds(ranks, name, [length], shards) for name in fitting}


@pytest.mark.parametrize(("heads", "kv_heads"), [(8, 8), (8, 2), (16, 4), (8, 1)])
@pytest.mark.parametrize("changes", [{}, {"forwards": 2}, {"causal": False}])
def test_linear_bytes_are_the_exact_mean_on_even_shards(heads: int, kv_heads: int, changes: dict) -> None:
    asked = attention(heads, kv_heads, **changes)
    for degree in (2, 3, 4, 5, 6, 8):
        for method in split_methods(asked, (0,) * 4 + (1,) * 4, 1e4):
            dealt = method.dealt(degree)
            if not method.fits(degree) or heads % dealt or (kv_heads % dealt and dealt % kv_heads):
                continue  # uneven heads: the linear picture is near, not equal
            if method.both_ways and not asked.causal:
                continue  # nothing is trimmed then, which share and wrap don't say for both ways at once
            sent = pass_bytes(method.name, [240 * degree], even(degree, 240), (1.0,) * degree, asked)
            mean = sum(sent) / degree - AGREEMENT_BYTES * (degree - 1)
            assert method.bytes_at(degree) * 240 == pytest.approx(mean), (method.name, degree)


@pytest.mark.parametrize("kind", ["ring", "trimmed_ring", "bidirectional_ring", "token_ring", "direct"])
@pytest.mark.parametrize("degree", [2, 3, 4, 7, 8])
def test_slowest_rank_and_rounds_are_those_of_the_schedule(kind: Kind, degree: int) -> None:
    """Seconds follow the rank that sends most in each round; every rank waits for it."""
    layout = method_layout("ring", [240 * degree], even(degree, 240))
    rounds = schedule(layout, kind).rounds
    carried = home = 0
    for messages in rounds:
        out, back = [0] * degree, [0] * degree
        for m in messages:
            out[m.source] += sum(map(len, m.segments))
            back[m.target] += sum(map(len, m.used))
        carried, home = carried + max(out), home + max(back)
    name = {"direct": "gather"}.get(kind, kind)
    method = next(m for m in split_methods(attention(8, 2), (0,) * degree, 1e4) if m.name == name)
    blocks = (degree - 1) * 240
    assert (carried, home) == (blocks, blocks)
    if kind == "direct":
        assert method.exchanged(degree) == method.bytes_per_token * (degree - 1)
        return
    assert method.hop_bytes(degree) == method.carried_bytes_per_token * (degree - 1)
    assert method.return_bytes(degree) == method.home_bytes_per_token * (degree - 1)
    assert method.exposed_return_share(degree) == 1 / len(rounds)
    exposed, hidden = method.messages(degree)
    assert hidden == 3 * 2 * len(rounds)
    assert exposed == 3 * (2 if kind == "token_ring" else 1)


def test_every_method_that_runs_is_considered() -> None:
    names = {base_name(m.name) for m in split_methods(LLAMA, (0,) * 4 + (1,) * 4, 1e6)}
    assert names | {"local"} == set(METHODS)
    assert "ulysses_ring:4" in {m.name for m in split_methods(LLAMA, (0,) * 4 + (1,) * 4, 1e6)}


@pytest.mark.parametrize("degree", [2, 3, 4, 8])
@pytest.mark.parametrize("forwards", [1, 2])
def test_layers_with_windows_pay_for_borders(degree: int, forwards: int) -> None:
    """A row of zigzag shards has two borders a rank but for its middle; what whole layers send is exact."""
    asked = attention(8, 2, forwards=forwards, local=((Mask(window=17), 2),))
    methods = {m.name: m for m in split_methods(asked, (0,) * degree, 1e4)}
    for name in ("gather", "trimmed_ring", "bidirectional_ring"):
        method = methods[name]
        sent = pass_bytes(name, [240 * degree], even(degree, 240), (1.0,) * degree, asked)
        # two kinds of calls are agreed on
        mean = sum(sent) / degree - 2 * AGREEMENT_BYTES * (degree - 1)
        over = mean - method.bytes_at(degree) * 240
        assert 0 < over <= method.over_borders(degree, 240, 1) < 3 * over, name
        if name == "gather":
            assert over == pytest.approx(method.over_borders(degree, 240, 1) * (degree - 1) / degree)
    assert methods["ring"] == next(m for m in split_methods(attention(8, 2, forwards=forwards), (0,) * degree, 1e4)
                                   if m.name == "ring")  # fmt: skip


def test_windows_make_methods_cheap_that_leave_out_what_is_not_seen() -> None:
    local = replace(LLAMA, local=((Mask(window=1024), 31),))
    slow = {"nic": 2e9, "seconds_per_token2": 1e-12}
    windowed = two_hosts(**slow, methods=split_methods(local, (0,) * 4 + (1,) * 4, 4.5e6), attention=local)
    found, whole = (seconds_of(costs, tuple(range(8)), 30_000) for costs in (windowed, two_hosts(**slow)))
    lean = {"gather", "bidirectional_ring"}
    assert min(found, key=found.__getitem__) in lean
    assert all(found[name] < whole[name] / 2 for name in lean)
    assert found["ring"] == whole["ring"]
    assert found["ulysses"] == whole["ulysses"]
    again = costs_from_json(json.loads(json.dumps(costs_to_json(windowed))), "costs")
    assert again.attention == local
    assert again.methods == windowed.methods
    step = plan_step([200_000, 500], replace(windowed, capacity=(40_000,) * 8))
    check_step(step, replace(windowed, capacity=(40_000,) * 8))
    assert {p.method for p in step.passes if len(p.ranks) > 1} <= lean


def test_links_that_rounds_cross() -> None:
    costs = two_hosts(nic=10.0, link=100.0)
    assert isinstance(costs.rate, Links)
    everyone = range(8)
    assert costs.rate.around(everyone, 1) == 10.0  # one rank of each host sends over its NICs in a round
    assert costs.rate.around(everyone, 4) == 2.5  # all four do at once
    assert costs.rate.around(range(4), 1) == 100.0
    assert costs.rate(everyone) == pytest.approx(10.0 / 4 * 7 / 4)  # all-to-all: four share, 4 of 7 peers are outside


def test_transfers_hide_under_attention() -> None:
    costs = two_hosts(seconds_per_round=0.0, seconds_per_tile=0.0)
    each = 60_000
    length = 8 * each
    compute = costs.seconds_per_token2 * length * each + costs.seconds_per_token * each + costs.seconds_per_pass
    found = seconds_of(costs, tuple(range(8)), each)
    last = 32 * 2 * 8 * 128 * 2 * each / costs.rate(range(8))  # the last block's gradients go home
    assert found["trimmed_ring"] == pytest.approx(compute + last)
    ulysses = next(m for m in costs.methods if m.name == "ulysses")
    assert found["ulysses"] == pytest.approx(compute + ulysses.exchanged(8) * each / costs.rate(range(8)))
    assert found["ring"] == found["trimmed_ring"]  # equal links: trimming saves bytes, not seconds


def test_short_sequences_pay_for_rounds_and_tiles() -> None:
    slow = two_hosts(seconds_per_round=1e-3)
    found = seconds_of(slow, tuple(range(8)), 64)
    assert found["gather"] < found["bidirectional_ring"] < found["trimmed_ring"]
    free, dear = (seconds_of(two_hosts(seconds_per_tile=s), (0, 1, 2, 3), 64)["ring"] for s in (0.0, 1e-3))
    assert dear - free == pytest.approx(32 * 2 * 3 * 1e-3)


def test_rings_wait_for_the_largest_block() -> None:
    costs = two_hosts(speeds=(1.0, 1.0, 1.0, 0.5) * 2, seconds_per_token=0.0)
    ranks, shards = (0, 1, 2, 3), [(20_000,)] * 3 + [(10_000,)]
    own = costs.seconds_per_token2 * 70_000 * 20_000
    gather, ring = (costs.pass_breakdown(ranks, name, [70_000], shards) for name in ("gather", "trimmed_ring"))
    assert gather.compute == pytest.approx(own)
    assert ring.compute == pytest.approx(own * 4 * 2 / 7)


def test_a_slow_network_takes_head_exchanges_off_it() -> None:
    costs = two_hosts(nic=2e9, capacity=(40_000,) * 8)
    names = {p.method for p in plan_step([300_000], costs).passes if len(p.ranks) == 8}
    assert names
    assert "ulysses" not in names
    fast = two_hosts(link=1e12, nic=1e12, capacity=(40_000,) * 8)
    kinds = pass_kinds([plan_step([300_000], fast)], fast)
    assert all(kind.options[0].method == kind.method for kind in kinds)


def test_methods_that_hold_others_keys_need_room_for_them() -> None:
    held = next(m for m in two_hosts().methods if m.name == "gather").held
    assert held == pytest.approx(32 * 2 * 8 * 128 * 2 / 4.5e6)
    tight = two_hosts(capacity=(1000,) * 8)
    full = tight.best_method(range(8), [8000], even(8, 1000))
    assert full is not None
    assert full.name != "gather"
    only = replace(tight, methods=tuple(m for m in tight.methods if m.name == "gather"))
    step = plan_step([6600], only)
    check_step(step, only)
    with pytest.raises(UserError, match="at most"):
        plan_step([6700], only)


@settings(max_examples=20, deadline=None, derandomize=True)
@given(st.integers(0, 10**6))
def test_planned_passes_use_the_fastest_method_that_fits(seed: int) -> None:
    rng = random.Random(seed)
    costs = two_hosts(
        nic=rng.choice([1e8, 1e9, 25e9]),
        seconds_per_round=rng.choice([0.0, 1e-4]),
        speeds=rng.choice([(1.0,) * 8, (1.0,) * 4 + (0.5,) * 4]),
        capacity=tuple(rng.choice([3000, 5000]) for _ in range(8)),
    )
    step = plan_step([rng.randint(1, rng.choice([500, 18_000])) for _ in range(12)], costs)
    check_step(step, costs)
    for kind in pass_kinds([step], costs):
        best = kind.options[0]
        chosen = next(o for o in kind.options if o.method == kind.method)
        assert best.seconds is not None
        assert chosen.seconds is not None
        assert chosen.seconds == pytest.approx(best.seconds, rel=1e-9)


def test_plans_carry_exact_bytes_and_old_files_stay_readable(tmp_path) -> None:
    costs = two_hosts()
    step = plan_step([30_000, 500], costs)
    split = next(p for p in step.passes if len(p.ranks) > 1)
    lengths = [step.batch[k] for k in split.sequences]
    assert split.sent_bytes == pass_bytes(split.method, lengths, split.shards, (1.0,) * len(split.ranks), LLAMA)
    data = json.loads(json.dumps(plans.to_json(step)))
    assert plans.step_from_json(data) == step
    for p in data["passes"]:
        del p["sent_bytes"], p["offload"]
    assert all(p.sent_bytes == () and p.offload == 0.0 for p in plans.step_from_json(data).passes)
    wrong = replace(step, passes=tuple(replace(p, sent_bytes=tuple(n + 1 for n in p.sent_bytes)) for p in step.passes))
    with pytest.raises(UserError, match="sent_bytes"):
        check_step(wrong, costs)


def offloading(rng: random.Random, **changes) -> Costs:
    moved = rng.choice([1e-6, 1e-5, 1e-4])
    room = rng.choice([1000, 4000])
    return two_hosts(capacity=(room,) * 8, offload_seconds=(moved,) * 8, offload_share=0.9, **changes)


@settings(max_examples=12, deadline=None, derandomize=True)
@given(st.integers(0, 10**6))
def test_offload_is_never_predicted_slower_and_always_fits(seed: int) -> None:
    rng = random.Random(seed)
    costs = offloading(rng)
    batch = [rng.randint(1, 5 * costs.capacity[0]) for _ in range(rng.randint(1, 12))]
    with pytest.MonkeyPatch.context() as patch:
        # no integer program, and time enough that no search is cut short
        patch.setattr(planner_step, "PROGRAM_GAP", 1e9)
        step = plan_step(batch, costs, time_limit=60)
        check_step(step, costs)
        without = plan_step(batch, replace(costs, offload_seconds=(), offload_share=0.0), time_limit=60)
    assert step.seconds <= without.seconds * (1 + 1e-12)
    assert all(p.offload == 0 for p in without.passes)


def test_offload_lowers_the_degree_where_compute_hides_it() -> None:
    costs = two_hosts(nic=1e7, capacity=(10_000,) * 8, offload_seconds=(2e-5,) * 8, offload_share=0.9)
    step = plan_step([70_000], costs)
    check_step(step, costs)
    (p,) = step.passes
    assert p.offload > 0  # four ranks of one host, instead of seven or eight on both
    assert len(p.ranks) <= 4
    kept = max(costs.memory(costs.method(p.method), [sum(row) for row in p.shards])) * (1 - p.offload * 0.9)
    assert kept == pytest.approx(10_000)
    assert max(peak_activations([step], costs)) == pytest.approx(10_000)
    assert max(peak_tokens([step], 8)) > 10_000
    with pytest.raises(UserError, match="holds 10000"):
        check_feasible(replace(step, passes=(replace(p, offload=p.offload / 2),)), costs)
    with pytest.raises(UserError, match="not between 0 and 1"):
        check_feasible(replace(step, passes=(replace(p, offload=1.5),)), costs)


def test_offload_holds_what_did_not_fit_at_all() -> None:
    costs = two_hosts(capacity=(1000,) * 8)
    with pytest.raises(UserError, match="at most 8000"):
        plan_step([9000], costs)
    more = replace(costs, offload_seconds=(1e-5,) * 8, offload_share=0.5)
    step = plan_step([9000], more)
    check_step(step, more)
    assert step.passes[0].offload > 0


def test_measured_rates_by_degree_serve_all_flows() -> None:
    costs = two_hosts(rate=RateByDegree({2: 1e9, 8: 5e8}))
    step = plan_step([50_000, 3000, 200], costs)
    check_step(step, costs)
