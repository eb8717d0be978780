import itertools
import json
import math
import random
import time
from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from heteromesh.errors import UserError
from heteromesh.planner.cluster.cluster import load_cluster
from heteromesh.planner.stages.hosts import cluster_resources, sum_seconds_per_byte
from heteromesh.planner.stages.json import basis_from_json, decision_to_json
from heteromesh.planner.stages.one_f_one_b import lower_bounds, order, run_1f1b
from heteromesh.planner.stages.placement import place
from heteromesh.planner.stages.predict import deal, predict, set_up
from heteromesh.planner.stages.stages import Placement, Stage, placement_from_json, placement_to_json
from heteromesh.planner.stages.workload import workloads
from sites import batch, hosts

PIPELINE, DATA = "pipeline across fabrics", "hierarchical data parallel across fabrics"


def stage(*ranks, layers=1, tensor=1):
    return Stage(ranks=ranks, layers=layers, tensor_parallel=tensor)


# stages


def test_a_placement_knows_its_pipelines_and_groups():
    placement = Placement(stages=(stage(0, 1, 2, 3, layers=5, tensor=2), stage(4, 5, layers=3)), micro_batches=(4, 4))
    assert placement.pipelines == (((0, 1), (4,)), ((2, 3), (5,)))
    assert (placement.layers, placement.first_layers) == (8, (0, 5))
    assert [placement.stage_of(r) for r in (0, 3, 4)] == [0, 0, 1]
    assert [placement.in_flight(s, 0) for s in (0, 1)] == [2, 1]
    with pytest.raises(UserError, match="rank 9 is in no stage"):
        placement.stage_of(9)


@pytest.mark.parametrize(
    ("stages", "micro_batches", "message"),
    [
        ((), (1,), "has no stage"),
        ((stage(0, layers=0),), (1,), "has 0 layers"),
        ((stage(0, 1), stage(2)), (1, 1), "stage 1 has 1 ranks for 2 pipelines"),
        ((stage(0), stage(0)), (1,), "must be different"),
        ((stage(-1),), (1,), "at least 0"),
        ((stage(0, 1),), (1, 0), "must be at least 1 for each pipeline"),
    ],
)
def test_stages_that_do_not_fit_each_other(stages, micro_batches, message):
    with pytest.raises(UserError, match=message):
        Placement(stages=stages, micro_batches=micro_batches)


def test_json_round_trip_and_strictness():
    placement = Placement(stages=(stage(0, 1, layers=2), stage(2, 3)), micro_batches=(3, 2))
    data = json.loads(json.dumps(placement_to_json(placement)))
    assert placement_from_json(data, "p") == placement
    for broken, message in [
        (data | {"colour": 1}, "p has the unknown key 'colour'"),
        ({"stages": []}, "p lacks the key 'micro_batches'"),
        (data | {"stages": 3}, "p.stages is 3"),
        (data | {"stages": [[]]}, r"p.stages\[0\] is \[\]"),
        (data | {"micro_batches": [1.5, 2]}, "p.micro_batches has 1.5"),
        (data | {"micro_batches": "4"}, "must be a list of whole numbers"),
        (7, "p is 7"),
    ]:
        with pytest.raises(UserError, match=message):
            placement_from_json(broken, "p")


# 1F1B


@pytest.mark.parametrize(("stages", "micro_batches"), [(1, 1), (1, 7), (2, 1), (3, 2), (4, 4), (4, 9)])
def test_equal_stages_take_the_closed_form(stages, micro_batches):
    run = run_1f1b([3.0] * stages, [0.0] * (stages - 1), micro_batches)
    assert run.ends[0] == pytest.approx((micro_batches + stages - 1) * 3.0)
    assert [len(works) for works in run.compute] == [2 * micro_batches] * stages


def test_a_stage_holds_as_many_micro_batches_as_1f1b_allows():
    for s in range(4):
        held = most = 0
        for kind, _ in order(s, 4, 9):
            held += 1 if kind == "forward" else -1
            most = max(most, held)
        assert (held, most) == (0, 4 - s)


def length(path, works, moves):
    return sum(a * b for a, b in zip((*path.stages, *path.transfers), (*works, *moves), strict=True))


seconds = st.floats(0.1, 10)


@given(st.data())
@settings(max_examples=150)
def test_no_path_is_longer_than_the_simulated_time(data):
    stages, micro_batches = data.draw(st.integers(1, 5)), data.draw(st.integers(1, 9))
    works = data.draw(st.lists(seconds, min_size=stages, max_size=stages))
    moves = data.draw(st.lists(st.floats(0, 5), min_size=stages - 1, max_size=stages - 1))
    latency = data.draw(st.sampled_from([0.0, 0.1]))
    ends = run_1f1b(works, moves, micro_batches, latency).ends
    for upto in range(stages):
        for path in lower_bounds(stages, micro_batches, upto):
            assert length(path, works, moves) + path.hops * latency <= ends[upto] * (1 + 1e-9)


def test_paths_are_tight_where_one_stage_or_one_cut_decides():
    for works, moves in [([1, 1, 1], [0, 0]), ([1, 1, 5], [0, 0]), ([1, 1], [9])]:
        end = run_1f1b(works, moves, 16).ends[0]
        best = max(length(p, works, moves) for p in lower_bounds(len(works), 16))
        assert best == pytest.approx(end, rel=0.02)


# prediction


def test_sums_follow_the_network():
    inside = hosts({"ranks": 4}, link=1e9).hosts
    assert sum_seconds_per_byte(inside, 1, math.inf) == pytest.approx(1.5e-9)
    assert sum_seconds_per_byte(inside, 2, math.inf) == pytest.approx(2 * 0.5 / 2 * 1e-9)
    four = hosts({}, {}, {}, {}).hosts
    assert sum_seconds_per_byte(four, 1, math.inf) == pytest.approx(1.5 / 20e9)
    none = hosts({}, {}, {}, {}, fabric="").hosts
    assert sum_seconds_per_byte(none, 1, math.inf) == pytest.approx(1.5 / 2e9)
    two = hosts({}, {}, {"fabric": "roce"}, {"fabric": "roce"}).hosts
    # a half over RDMA in each fabric and back, then every host's half over Ethernet
    assert sum_seconds_per_byte(two, 1, math.inf) == pytest.approx(1 / 20e9 + 1 / (2 * 2e9))
    assert sum_seconds_per_byte(two, 1, 1e8) == pytest.approx(1e-8)


def test_bytes_between_fabrics_are_those_of_the_formulas():
    """Section 1.7 of the notes on Holmes: 2 (c - 1) tokens h 2 B, or 2 (c - 1) P 2 B."""
    sites = hosts({}, {}, {"fabric": "roce"}, {"fabric": "roce"})
    work = batch(boundary_bytes=2 * 1000 * 64.0)
    pipeline = Placement(stages=(stage(0, 1, layers=3), stage(2, 3, layers=3)), micro_batches=(4, 4))
    predicted = predict(pipeline, sites, work)
    assert (predicted.activation_bytes, predicted.gradient_bytes) == (2 * work.tokens * 64 * 2, 0)
    wide = Placement(stages=(stage(0, 1, 2, 3, layers=6),), micro_batches=(2, 2, 2, 2))
    predicted = predict(wide, sites, work)
    assert (predicted.activation_bytes, predicted.gradient_bytes) == (0, 2 * work.parameters * 2)


def test_replicas_of_stages_over_both_fabrics_stay_on_rdma():
    sites = hosts({}, {"fabric": "roce"}, {}, {"fabric": "roce"})
    work = batch()
    apart = set_up(Placement(stages=(stage(0, 1, layers=3), stage(2, 3, layers=3)), micro_batches=(4, 4)), sites, work)
    crossed = set_up(
        Placement(stages=(stage(0, 1, layers=3), stage(3, 2, layers=3)), micro_batches=(4, 4)), sites, work
    )
    assert apart.transfers == pytest.approx([1e6 / 20e9])
    assert crossed.transfers == pytest.approx([1e6 / 2e9])


def test_cards_and_uplink_are_shared_by_the_pipelines():
    sites = hosts({"ranks": 4}, {"ranks": 4, "fabric": "roce"})
    placement = Placement(stages=(stage(0, 1, 2, 3, layers=3), stage(4, 5, 6, 7, layers=3)), micro_batches=(2, 2, 2, 2))
    assert set_up(placement, sites, batch()).transfers == pytest.approx([4e6 / 2e9])
    assert set_up(placement, replace(sites, uplink=1e9), batch()).transfers == pytest.approx([4e6 / 1e9])


def test_micro_batches_are_dealt_by_speed():
    assert deal(8, [[1.0], [1.0]]) == (4, 4)
    assert deal(9, [[1.0], [2.0]]) == (6, 3)
    assert deal(2, [[1.0], [100.0]]) == (1, 1)


@pytest.mark.parametrize(
    ("placement", "message"),
    [
        (Placement(stages=(stage(0, 1, layers=5),), micro_batches=(4, 4)), "5 layers and the model 6"),
        (Placement(stages=(stage(0, 1, layers=6),), micro_batches=(4, 3)), "7 micro-batches and the batch has 8"),
        (Placement(stages=(stage(0, 2, layers=6),), micro_batches=(4, 4)), "not made of whole hosts"),
        (Placement(stages=(stage(0, 1, 2, 3, layers=6, tensor=4),), micro_batches=(8,)), "spans hosts"),
    ],
)
def test_a_placement_for_other_hosts_is_refused(placement, message):
    with pytest.raises(UserError, match=message):
        predict(placement, hosts({"ranks": 2}, {"ranks": 2}), batch())


# the program


def every_placement(sites, work):
    """All placements of whole hosts, without tensor parallel, with pipelines paired by fabric and speed."""
    fabrics, n = sites.domains, len(sites.hosts)
    for stages in range(1, min(n, work.layers) + 1):
        for homes in itertools.product(range(stages), repeat=n):
            teams = [[h for h, s in zip(sites.hosts, homes, strict=True) if s == i] for i in range(stages)]
            sizes = {sum(len(h.ranks) for h in team) for team in teams}
            if len(sizes) > 1 or 0 in sizes or max(sizes) > work.micro_batches:
                continue
            rows = [
                tuple(
                    r
                    for _, _, r in sorted(
                        (fabrics.index(h.fabric), -v, r) for h in team for v, r in zip(h.speeds, h.ranks, strict=True)
                    )
                )
                for team in teams
            ]
            for cut in itertools.combinations(range(1, work.layers), stages - 1):
                layers = [b - a for a, b in itertools.pairwise((0, *cut, work.layers))]
                made = tuple(Stage(ranks=r, layers=k) for r, k in zip(rows, layers, strict=True))
                even = deal(work.micro_batches, [[1.0]] * len(rows[0]))
                pace = set_up(Placement(stages=made, micro_batches=even), sites, work).stage_seconds
                yield Placement(stages=made, micro_batches=deal(work.micro_batches, pace))


def random_instance(rng):
    described = [
        {
            "ranks": rng.choice([1, 1, 2]),
            "speed": rng.choice([1.0, 1.0, 0.5]),
            "fabric": rng.choice(["ib", "ib", "roce", ""]),
            "rdma": rng.choice([2e10, 1e10]),
            "ethernet": rng.choice([1e9, 2e9]),
            "memory": rng.choice([80e9, 1.2e9]),
        }
        for _ in range(rng.randint(2, 4))
    ]
    work = batch(
        layers=rng.randint(4, 7),
        micro_batches=rng.randint(4, 10),
        boundary_bytes=rng.choice([1e6, 1e8, 1e9]),
        layer_parameters=rng.choice([10**6, 10**8]),
        head_seconds=rng.choice([0.0, 1.0]),
    )
    return hosts(*described), work


@pytest.mark.parametrize("seed", range(12))
def test_near_the_best_of_all_placements_and_never_below_the_bound(seed):
    sites, work = random_instance(random.Random(seed))
    known = []
    for placement in every_placement(sites, work):
        try:
            known.append(predict(placement, sites, work).seconds)
        except UserError:
            continue
    if not known:
        with pytest.raises(UserError, match="memory"):
            place(sites, [work], tensor_parallel=(1,))
        return
    decision = place(sites, [work], tensor_parallel=(1,))
    assert decision.bound_seconds <= min(known) * (1 + 1e-6)
    assert decision.prediction.seconds <= min(known) * 1.03
    assert decision.gap == pytest.approx(decision.prediction.seconds / decision.bound_seconds - 1)
    assert {r for s in decision.placement.stages for r in s.ranks} == {r for h in sites.hosts for r in h.ranks}


def test_the_split_beats_the_one_that_holmes_ships():
    for layers, expected in ((30, {1.0: 17, 160 / 197: 13}), (48, {1.0: 27, 160 / 197: 21})):
        sites = hosts({}, {"fabric": "roce", "speed": 160 / 197})
        work = batch(layers=layers, micro_batches=256, boundary_bytes=0.0, layer_parameters=1)
        decision = place(sites, [work])
        chosen = next(c for c in decision.candidates if c.family == PIPELINE)
        speed = {h.ranks[0]: h.speeds[0] for h in sites.hosts}
        assert {speed[s.ranks[0]]: s.layers for s in chosen.placement.stages} == expected
        assert chosen.gap < 0.01


def test_fewer_bytes_between_fabrics_decide_and_both_ways_are_reported():
    """tokens * h > P: gradients are the smaller load; below, activations are."""
    sites = hosts({"ranks": 2}, {"ranks": 2}, {"ranks": 2, "fabric": "roce"}, {"ranks": 2, "fabric": "roce"})
    few = batch(layers=8, micro_batches=16, layer_seconds=0.05, boundary_bytes=1e5, layer_parameters=10**9)
    few = replace(few, gradient_bytes=4.0)
    roomy = replace(sites, hosts=tuple(replace(h, memory=1e12) for h in sites.hosts))
    first = place(roomy, [few], tensor_parallel=(1,))
    assert first.family == PIPELINE
    assert {c.family for c in first.candidates} == {PIPELINE, DATA}
    assert all(c.prediction for c in first.candidates)
    many = batch(layers=8, micro_batches=16, layer_seconds=0.05, boundary_bytes=1e9, layer_parameters=10**6)
    second = place(roomy, [many], tensor_parallel=(1,))
    assert second.family == DATA
    for decision in (first, second):
        moved = {c.family: c.prediction.activation_bytes + c.prediction.gradient_bytes for c in decision.candidates}
        assert moved[decision.family] == min(moved.values())


def test_tensor_parallel_stays_in_the_host_and_lets_unequal_hosts_form_stages():
    sites = hosts({"ranks": 4}, {"ranks": 4}, {"ranks": 2, "speed": 0.5})
    with pytest.raises(UserError, match="no stages of whole hosts"):
        place(sites, [batch(micro_batches=2)], tensor_parallel=(4,))
    decision = place(sites, [batch(micro_batches=4, layer_parameters=2 * 10**9)])
    assert len(decision.placement.stages) > 1, "a device can't hold all layers"
    hosts_of = {r: i for i, h in enumerate(sites.hosts) for r in h.ranks}
    for s in decision.placement.stages:
        assert all(len({hosts_of[r] for r in replica}) == 1 for replica in s.replicas)
    assert max(s.tensor_parallel for s in decision.placement.stages) > 1


def test_memory_binds_with_activations_in_flight():
    work = batch(layers=6, micro_batches=8, layer_activation_bytes=1e9, layer_parameters=1)
    sites = hosts({"memory": 4.5e9}, {"memory": 80e9, "fabric": "roce"})
    decision = place(sites, [work])
    chosen = next(c for c in decision.candidates if c.family == PIPELINE)
    small = next((i, s) for i, s in enumerate(chosen.placement.stages) if s.ranks == (0,))
    # as the first stage it would hold two micro-batches: 2 layers at most; as the last one: 4
    assert small[1].layers <= (2 if small[0] == 0 else 4)
    assert chosen.prediction.memory_bytes[0] <= 4.5e9
    with pytest.raises(UserError, match="no placement fits the devices' memory"):
        place(hosts({"memory": 1e8}, {"memory": 1e8, "fabric": "roce"}), [work])


def test_tens_of_unequal_hosts_within_the_time_limit():
    rng = random.Random(1)
    sites = hosts(
        *({"ranks": 8, "speed": 1 - rng.random() / 5, "fabric": "ib" if i < 16 else "roce"} for i in range(32))
    )
    began = time.thread_time()
    work = batch(layers=40, micro_batches=1024, layer_seconds=0.01, boundary_bytes=1e7, layer_parameters=10**8)
    decision = place(sites, [work], tensor_parallel=(1,), time_limit=2.0)
    assert time.thread_time() - began < 20, "the limit is no more than a hint to the last program, but it is one"
    assert 0 < decision.bound_seconds <= decision.prediction.seconds
    assert sorted(r for s in decision.placement.stages for r in s.ranks) == list(range(256))


def test_one_fabric_compares_pipeline_with_data_parallel():
    decision = place(hosts({}, {}, {}, {}), [batch()])
    assert {c.family for c in decision.candidates} == {"pipeline", "data parallel"}
    assert decision.family == "data parallel"


def test_the_decision_in_a_plan_can_be_read_again():
    sites = hosts({}, {"fabric": "roce"})
    decision = place(sites, [batch()])
    data = json.loads(json.dumps(decision_to_json(decision, sites)))
    basis = basis_from_json(data, "layout.placement")
    assert (basis.placement, basis.resources, basis.work) == (decision.placement, sites, decision.work)
    for broken, message in [
        (data | {"colour": 1}, "unknown key 'colour'"),
        ({k: v for k, v in data.items() if k != "basis"}, "lacks the key 'basis'"),
        (data | {"basis": data["basis"] | {"work": {}}}, "basis.work lacks the key"),
        (data | {"basis": data["basis"] | {"uplink": "fast"}}, "could not convert"),
        (data | {"basis": data["basis"] | {"hosts": [3]}}, r"basis.hosts\[0\] is 3"),
    ]:
        with pytest.raises(UserError, match=message):
            basis_from_json(broken, "layout.placement")


CLUSTER = """
[[hosts]]
names = ["a", "b"]
device = "A100-80GB"
count = 2
fabric = "ib0"
nics = [{ kind = "infiniband", gbit = 200 }, { kind = "ethernet", gbit = 25 }]
[[hosts]]
names = ["c"]
device = "A100-80GB"
count = 2
nics = [{ kind = "ethernet", gbit = 25 }]
[measured]
speeds = [0.5, 1, 1, 1, 1, 1]
"""


def test_sites_of_a_cluster(tmp_path):
    path = tmp_path / "cluster.toml"
    path.write_text(CLUSTER)
    sites = cluster_resources(load_cluster(path))
    assert [h.ranks for h in sites.hosts] == [(1, 0), (2, 3), (4, 5)]
    assert sites.hosts[0].speeds == (1, 0.5)
    assert sites.domains == ("ib0", "")
    assert sites.hosts[0].rdma == pytest.approx(8 * sites.hosts[0].ethernet)


def test_a_batch_becomes_micro_batches():
    from heteromesh.planner.model.spec import MODELS
    from instances import random_costs

    costs = random_costs(random.Random(0), 4)
    made = workloads(MODELS["gpt-7b"], costs, [100, 50, 30, 20])
    assert [w.micro_batches for w in made] == [2, 1]
    for w in made:
        assert w.tokens == 200
        whole = costs.seconds_per_token2 * (100**2 + 50**2 + 30**2 + 20**2) + costs.seconds_per_token * 200
        passes = w.micro_batches * costs.seconds_per_pass
        assert w.micro_batches * (w.layers * w.layer_seconds + w.head_seconds) == pytest.approx(whole + passes)
        assert w.parameters == pytest.approx(MODELS["gpt-7b"].parameters(), rel=1e-6)
    with pytest.raises(UserError, match="without a sequence"):
        workloads(MODELS["gpt-7b"], costs, [])
