"""Ownership of sharded weights in a running job, from sizes that were measured."""

from __future__ import annotations

import math
import pickle
from collections.abc import Sequence
from dataclasses import replace

import pytest

from heteromesh.planner.cost.overlap import StepTraffic
from heteromesh.planner.ownership.in_job import JobModel, JobRank, kept_layers, replicated_in_job, sharded_in_job
from heteromesh.planner.ownership.memory import TokenBytes
from heteromesh.planner.participation.in_job import JobTokens, plan_ownership
from heteromesh.planner.participation.in_job_traffic import job_bytes, job_traffic
from heteromesh.planner.participation.shortage import DoesNotFit
from heteromesh.planner.reduction.reduction import plan_reduction

MB = 1e6
LAYERS = 8
MODEL = JobModel(
    layers=(25 * MB,) * LAYERS,
    trained=(25 * MB,) * LAYERS,
    outside=60 * MB,
    outside_trained=60 * MB,
    largest=30 * MB,
    state=2.0,
)
TOKENS = JobTokens(step=4096, longest=1024, bytes=TokenBytes(per_pass=20e3, per_step=18e3))


def ranks_of(*gigabytes: float, speeds: Sequence[float] = ()) -> list[JobRank]:
    speeds = speeds or (1.0,) * len(gigabytes)
    return [
        JobRank(memory=size * 1e9, context=0.3e9, speed=v, device="small", senders=len(gigabytes) - 1)
        for size, v in zip(gigabytes, speeds, strict=True)
    ]


def by_links(limits: Sequence[float] | None) -> Sequence[float]:
    count = len(limits) if limits is not None else 2
    return plan_reduction(range(count), [1e9] * count, [1e9] * count, max_fraction=limits).fractions


def test_a_small_rank_owns_less_and_all_memory_is_used() -> None:
    ranks = ranks_of(1.2, 0.8)
    plan = plan_ownership(MODEL, ranks, TOKENS, by_links)
    assert sum(plan.fractions) == pytest.approx(1)
    assert plan.fractions[0] > plan.fractions[1]
    for number, rank in enumerate(ranks):
        at_most = {"of_pass": plan.pass_tokens[number], "of_step": plan.step_tokens[number]}
        own = plan.fractions[number], plan.resident[number]
        held = sharded_in_job(MODEL, rank, *own, TOKENS.bytes, **at_most).total
        assert held <= rank.memory
        more = sharded_in_job(MODEL, rank, own[0], own[1] + 1, TOKENS.bytes, of_pass=1024, of_step=2048)
        assert plan.resident[number] == LAYERS or more.total > rank.memory, "another layer would stay"
    assert sum(plan.step_tokens) >= TOKENS.step


def test_with_ample_memory_all_layers_stay_and_fractions_are_those_of_links() -> None:
    plan = plan_ownership(MODEL, ranks_of(9, 9), TOKENS, by_links)
    assert plan.fractions == pytest.approx((0.5, 0.5))
    assert plan.resident == (LAYERS, LAYERS)
    unknown = plan_ownership(MODEL, ranks_of(math.inf, math.inf), TOKENS, by_links)
    assert (unknown.resident, unknown.step_tokens) == ((0, 0), ()), "nothing is kept in memory that nobody has told"
    # a rank whose memory is not known beside one whose is
    mixed = plan_ownership(MODEL, ranks_of(math.inf, 0.62), TOKENS, by_links)
    assert mixed.resident[0] == LAYERS
    assert mixed.fractions[1] < 0.3


def test_activations_are_kept_where_there_is_room() -> None:
    acts = tuple(40e3 + 1e3 * layer for layer in range(LAYERS))
    tokens = replace(TOKENS, bytes=replace(TOKENS.bytes, by_layer=acts))
    plan = plan_ownership(MODEL, ranks_of(2.2, 0.8), tokens, by_links)
    assert plan.kept[0] > plan.kept[1] == 0
    (rank,), counts = ranks_of(1.2), set()
    for of_step in range(100, 20_000, 600):
        fixed = {"of_pass": 90, "of_step": of_step}
        kept = kept_layers(MODEL, rank, 0.3, 4, tokens.bytes, **fixed)
        held = sharded_in_job(MODEL, rank, 0.3, 4, tokens.bytes, **fixed)
        bare = sharded_in_job(MODEL, rank, 0.3, 4, TOKENS.bytes, **fixed)
        assert held.total <= max(rank.memory, bare.total)
        more = bare.activations + of_step * sum(acts[LAYERS - kept :])
        assert held.total >= bare.total
        assert not kept or held.activations <= more
        counts.add(kept)
    assert {0, LAYERS} < counts, "as many as there is room for"
    unknown = ranks_of(math.inf)[0]
    assert kept_layers(MODEL, unknown, 0.3, 0, tokens.bytes, of_pass=10, of_step=10) == 0


def test_a_rank_that_holds_few_tokens_leaves_them_to_the_others() -> None:
    heavy = replace(TOKENS, bytes=TokenBytes(per_pass=20e3, per_step=120e3))
    plan = plan_ownership(MODEL, ranks_of(2.5, 0.62), heavy, by_links)
    assert plan.step_tokens[1] < TOKENS.step / 2 < plan.step_tokens[0]


def test_room_is_left_for_a_matrix_more_than_a_fraction() -> None:
    """With one owner a matrix, the small rank may get the largest beyond its fraction."""
    ranks, whole = ranks_of(1.6, 0.8), replace(MODEL, granule=30 * MB)
    plan, cut = (plan_ownership(model, ranks, TOKENS, by_links) for model in (whole, MODEL))
    assert plan.fractions[1] < cut.fractions[1]
    more = plan.fractions[1] + 30 * MB / MODEL.whole_trained
    step = {"of_pass": plan.pass_tokens[1], "of_step": plan.step_tokens[1]}
    assert sharded_in_job(whole, ranks[1], more, plan.resident[1], TOKENS.bytes, **step).total <= ranks[1].memory
    tiny = plan_ownership(replace(MODEL, granule=200 * MB), ranks_of(9, 0.62), TOKENS, by_links)
    assert tiny.fractions == pytest.approx((1, 0)), "nothing, where the largest doesn't fit"


def test_who_is_short_is_told_with_what_helps() -> None:
    with pytest.raises(DoesNotFit) as caught:
        plan_ownership(MODEL, ranks_of(0.8, 0.6), TOKENS, by_links)
    lacking = caught.value.short[0].gigabytes
    assert [each.ranks for each in caught.value.short] == [(0,), (1,)]
    assert pickle.loads(pickle.dumps(caught.value)).document() == caught.value.document(), "ranks tell each other"
    enough = [replace(rank, memory=rank.memory + lacking * 1e9 + 1 * MB) for rank in ranks_of(0.8, 0.6)]
    scarce = [replace(rank, memory=rank.memory + lacking * 0.95e9) for rank in ranks_of(0.8, 0.6)]
    plan_ownership(MODEL, enough, TOKENS, by_links)
    with pytest.raises(DoesNotFit):
        plan_ownership(MODEL, scarce, TOKENS, by_links)
    with pytest.raises(DoesNotFit, match=r"lack 0.338 GB on rank 1 \(small\); what helps: .*give these ranks more"):
        plan_ownership(MODEL, ranks_of(3.0, 0.2), TOKENS, by_links)
    with pytest.raises(DoesNotFit, match=r"what helps: batch_tokens=\d+; "):
        plan_ownership(MODEL, ranks_of(1.2, 0.8), replace(TOKENS, step=65_536), by_links)
    with pytest.raises(DoesNotFit, match=r"what helps: \d+ % of the optimizer's state in host memory or on disk"):
        plan_ownership(MODEL, ranks_of(1.1, 0.8), TOKENS, by_links)


def test_everything_resident_holds_what_a_sharded_optimizer_does() -> None:
    (rank,) = ranks_of(9.0)
    whole = replicated_in_job(MODEL, rank, optimizer=0.5, pass_bytes=0.0, ranks=2)
    layered = sharded_in_job(MODEL, rank, 0.5, LAYERS, TokenBytes(per_pass=0), of_pass=0, of_step=0)
    assert (layered.weights, layered.moments, layered.masters) == (whole.weights, whole.moments, 0)
    assert layered.gradients < whole.gradients, "a layer's are summed while the next one's are made"


def test_gathers_in_16_bits_leave_masters_with_their_owners() -> None:
    halves = tuple(w / 2 for w in MODEL.layers)
    model = replace(MODEL, gathered=halves, apart=MODEL.layers)
    (rank,) = ranks_of(9.0)
    held = sharded_in_job(model, rank, 0.25, 3, TokenBytes(per_pass=0), of_pass=0, of_step=0)
    assert held.masters == pytest.approx(0.25 * sum(MODEL.layers))
    assert held.weights == pytest.approx(sum(halves[-3:]) + MODEL.outside)


def test_traffic_is_that_of_the_formula() -> None:
    count = 4
    plan = plan_ownership(MODEL, ranks_of(*(math.inf,) * count), TOKENS, lambda _: (0.25,) * count)
    inside, everything = sum(MODEL.layers), MODEL.whole
    moved = job_bytes(MODEL, plan, range(count))
    rest = (count - 1) / count
    for host in moved:
        assert host.forward_in == host.forward_out == pytest.approx(everything * rest)
        again = inside * (1 - 1 / LAYERS)
        assert host.backward_in == host.backward_out == pytest.approx((again + everything) * rest)
    kept = job_bytes(MODEL, replace(plan, resident=(LAYERS,) * count), range(count))
    assert kept[0].backward_out == pytest.approx(everything * rest)
    traffic = job_traffic(MODEL, plan, range(count), (1e9, 1e9, 1e9, 5e8))
    assert traffic.gather_seconds == pytest.approx(everything * rest / 5e8)
    assert traffic.layer_major
    assert job_traffic(MODEL, plan, (0,) * count, (1e9,)) == StepTraffic(), "nothing leaves the host"
