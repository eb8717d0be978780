import random
from collections import Counter
from itertools import combinations
from pathlib import Path

import pytest

from heteromesh.errors import UserError
from heteromesh.planner.cluster.catalog import CATALOG
from heteromesh.planner.cluster.cluster import load_cluster, local_cluster
from heteromesh.planner.cluster.files import cluster_toml
from heteromesh.planner.cluster.links import LINK_UTILISATION, NIC_UTILISATION, Links, cluster_links
from heteromesh.planner.cost.analytic import analytic_costs
from heteromesh.planner.cost.measured import bind
from heteromesh.planner.model.constants import Constants
from heteromesh.planner.model.spec import ModelSpec
from heteromesh.planner.reduction.nics import over_one_nic
from heteromesh.planner.reduction.reduction import reduction_for

EXAMPLES = Path(__file__).parents[3] / "examples" / "clusters"
GOOD = """
name = "lab"
[devices.own]
tflops = 50
memory_gb = 10
memory_gbps = 500
link_gbps = 20
[[hosts]]
names = ["a0", "a1"]
device = "A100-40GB"
count = 2
fabric = "ib0"
nics = [{ kind = "infiniband", gbit = 200, count = 2 }, { kind = "ethernet", gbit = 10 }]
[[hosts]]
names = ["b0"]
device = "own"
count = 1
nics = [{ kind = "ethernet", gbit = 10 }]
"""


def write(tmp_path, text):
    path = tmp_path / "cluster.toml"
    path.write_text(text)
    return path


def load(tmp_path, text):
    return load_cluster(write(tmp_path, text))


def refused(tmp_path, text):
    with pytest.raises(UserError) as error:
        load(tmp_path, text)
    message = str(error.value)
    assert "\n" not in message
    assert str(tmp_path / "cluster.toml") in message
    return message


def test_ranks_are_numbered_host_by_host_in_file_order(tmp_path):
    cluster = load(tmp_path, GOOD)
    assert cluster.name == "lab"
    assert cluster.rank_hosts == (0, 0, 1, 1, 2)
    assert [cluster.host_of(r).name for r in range(cluster.ranks)] == ["a0", "a0", "a1", "a1", "b0"]
    assert [cluster.device_name(r) for r in (0, 4)] == ["A100-40GB", "own"]
    assert cluster.device_of(0) == CATALOG["A100-40GB"]
    assert cluster.device_of(4).tflops == 50
    assert cluster.speeds() == (1.0, 1.0, 1.0, 1.0, 50 / 312)


@pytest.mark.parametrize("path", sorted(EXAMPLES.glob("*.toml")), ids=lambda p: p.stem)
def test_examples_load(path):
    assert load_cluster(path).name == path.stem


def test_a_devices_table_overrides_the_catalogue(tmp_path):
    text = GOOD.replace("[devices.own]", "[devices.A100-40GB]").replace('device = "own"', 'device = "A100-40GB"')
    assert load(tmp_path, text).device_of(0).tflops == 50


def test_name_defaults_to_the_file(tmp_path):
    assert load(tmp_path, GOOD.replace('name = "lab"', "")).name == "cluster"


def test_fingerprint_ignores_name_and_measurements_only(tmp_path):
    first = load(tmp_path, GOOD).fingerprint
    same = load(tmp_path, GOOD.replace('"lab"', '"den"') + "[measured]\nspeeds = [1, 1, 1, 1, 0.5]\n")
    assert same.fingerprint == first
    assert len(first) == 16
    for old, new in (
        ("count = 1", "count = 3"),
        ("tflops = 50", "tflops = 51"),
        ("ib0", "ib1"),
        ("gbit = 200", "gbit = 100"),
    ):
        assert load(tmp_path, GOOD.replace(old, new)).fingerprint != first


def test_host_memory_is_optional_and_survives_the_file(tmp_path):
    assert [host.memory_gb for host in load(tmp_path, GOOD).hosts] == [None] * 3
    cluster = load(tmp_path, GOOD.replace("count = 1", "count = 1\nmemory_gb = 512"))
    assert [host.memory_gb for host in cluster.hosts] == [None, None, 512]
    assert load(tmp_path, cluster_toml(cluster)).hosts == cluster.hosts
    assert cluster.fingerprint != load(tmp_path, GOOD).fingerprint
    # files that don't say it are what they were when none could
    example = load_cluster(EXAMPLES / "mixed-3-hosts.toml")
    assert example.fingerprint == "8a4be9865e61acfb"


def test_local_cluster_is_one_host_of_equal_cpus():
    cluster = local_cluster(3)
    assert (cluster.ranks, cluster.speeds(), cluster.rank_hosts) == (3, (1.0, 1.0, 1.0), (0, 0, 0))
    assert cluster.device_name(2) == "cpu"
    assert cluster.host_of(0).name == "localhost"
    assert cluster.fingerprint != local_cluster(2).fingerprint
    with pytest.raises(UserError, match="at least 1"):
        local_cluster(0)


def test_measured_speeds_are_preferred(tmp_path):
    cluster = load(tmp_path, GOOD + "[measured]\nspeeds = [1, 0.9, 1, 1, 0.5]\n")
    assert cluster.speeds() == (1.0, 0.9, 1.0, 1.0, 0.5)
    assert cluster.measured.constants is None


def test_measured_constants_have_the_keys_of_a_cost_file(tmp_path):
    costs = """[measured]
seconds_per_token2 = 1e-9
seconds_per_token = 1e-4
seconds_per_pass = 0.1
bytes_per_token = 1000
tokens_per_device = 500
[measured.bytes_per_second]
2 = 1e9
"""
    constants = load(tmp_path, GOOD + costs).measured.constants
    assert constants is not None
    assert constants.tokens_per_device == 500
    assert constants.bytes_per_second == {2: 1e9}
    assert "seconds_per_pass" in refused(tmp_path, GOOD + costs.replace("seconds_per_pass = 0.1\n", ""))


@pytest.mark.parametrize(
    ("old", "new", "words"),
    [
        ('name = "lab"', "name = lab", "line 2"),
        ("count = 1\n", "count = 1\ncolour = 3\n", "unknown key 'colour': known keys are names, device"),
        ("[devices.own]", "[devises.own]", "did you mean 'devices'"),
        ("count = 1\n", "", "lacks the key 'count'"),
        ("count = 1\n", "count = 0\n", "count is 0: it must be above zero"),
        ("count = 1\n", "count = 1.5\n", "count is 1.5: it must be a whole number"),
        ("count = 1\n", "count = true\n", "count is True: it must be a whole number"),
        ("tflops = 50", "tflops = nan", "tflops is nan: it must be above zero and finite"),
        ("tflops = 50", "tflops = -50", "tflops is -50: it must be above zero"),
        ("tflops = 50", 'tflops = "50"', "tflops is '50': it must be a number"),
        ("memory_gb = 10", "memory_gb = inf", "memory_gb is inf: it must be above zero and finite"),
        ('device = "own"', 'device = "A1000"', "'A1000', which is not built in: describe it under [devices.A1000]"),
        ('names = ["b0"]', 'names = ["a0"]', "names the host 'a0' twice"),
        ('names = ["b0"]', "names = []", "give at least one name"),
        ('names = ["b0"]', 'names = "b0"', "names is 'b0': it must be a list"),
        (
            'kind = "ethernet", gbit = 10 }]\n',
            'kind = "token ring", gbit = 10 }]\n',
            "one of infiniband, roce, ethernet",
        ),
        ('nics = [{ kind = "ethernet", gbit = 10 }]', "", "host 'b0' has no nics and there are 3 hosts"),
        ('nics = [{ kind = "ethernet"', 'nics = [{ kind = "roce"', "host 'b0' has no ethernet nic"),
        ("gbit = 10 }]\n", "gbit = 10 }]\n[measured]\nspeeds = [1, 2]\n[x]\n", "unknown key 'x'"),
    ],
)
def test_bad_files_name_value_rule_and_way_out(tmp_path, old, new, words):
    assert old in GOOD
    head, _, tail = GOOD.rpartition(old)
    assert words in refused(tmp_path, head + new + tail)


def test_measured_speeds_must_be_one_a_rank(tmp_path):
    message = refused(tmp_path, GOOD + "[measured]\nspeeds = [1, 2]\n")
    assert "speeds has 2 entries and the cluster has 5 ranks: give one a rank" in message
    assert "unknown key 'speed' (did you mean 'speeds'?)" in refused(tmp_path, GOOD + "[measured]\nspeed = [1]\n")
    assert "above zero" in refused(tmp_path, GOOD + "[measured]\nspeeds = [1, 1, 1, 1, 0]\n")


NETWORK = """[measured]
latency_seconds = 1e-4
nic_gbit = [[9.4, 9.2], [9.4, 9.4], [0.9, 0.8]]
link_gbps = [12, 12, 5]
"""


def test_measured_links_are_preferred(tmp_path):
    cluster = load(tmp_path, GOOD + NETWORK)
    assert cluster.measured.latency_seconds == 1e-4
    links = cluster_links(cluster)
    assert links((0, 1)) == pytest.approx(12e9)
    # b0 is on no fabric, so that the one communicator uses sockets; the slower way counts
    assert links((2, 4)) == pytest.approx(0.8e9 / 8)
    assert links.ring_rate() == pytest.approx(0.8e9 / 8)
    # inside the fabric nothing was measured
    assert links((0, 2)) == pytest.approx(2 * 200e9 / 8 * NIC_UTILISATION)
    assert cluster.fingerprint == load(tmp_path, GOOD).fingerprint


@pytest.mark.parametrize(
    ("old", "new", "words"),
    [
        ("[0.9, 0.8]]", "[0.9]]", "nic_gbit[2] has 1 numbers: give two, out of the host and into it"),
        (", [0.9, 0.8]]", "]", "nic_gbit has 2 entries and the cluster has 3 hosts: give one a host"),
        ("[12, 12, 5]", "[12]", "link_gbps has 1 entries and the cluster has 3 hosts"),
        ("[12, 12, 5]", "[12, 12, -5]", "link_gbps[2] is -5: it must be above zero"),
        ("latency_seconds", "latency", "unknown key 'latency' (did you mean 'latency_seconds'?)"),
        ("latency_seconds = 1e-4", 'methods = [{ name = "gather", bytes_per_token = 8 }]', "methods and no costs"),
    ],
)
def test_bad_measured_links_name_value_rule_and_way_out(tmp_path, old, new, words):
    assert words in refused(tmp_path, GOOD + NETWORK.replace(old, new))


def test_measured_methods_are_read(tmp_path):
    costs = """[measured]
seconds_per_token2 = 0.0
seconds_per_token = 1e-4
seconds_per_pass = 0.1
bytes_per_token = 0.0
tokens_per_device = 500
model = { name = "m", parameters = 9, layers = 1, heads = 2, kv_heads = 1, head_dim = 8, dtype = "bf16" }
methods = [{ name = "gather", bytes_per_token = 8, scaling = "peers", heads = 0 }, { name = "r", bytes_per_token = 0 }]
"""
    measured = load(tmp_path, GOOD + costs).measured
    assert (measured.methods[0].name, measured.methods[0].scaling) == ("gather", "peers")
    assert (measured.methods[1].name, measured.methods[1].bytes_per_token) == ("r", 0)
    assert measured.model is not None
    assert (measured.model.kv_heads, measured.model.dtype) == (1, "bf16")
    assert "scaling is 'square'" in refused(tmp_path, GOOD + costs.replace('"peers"', '"square"'))
    assert "lacks the key 'heads'" in refused(tmp_path, GOOD + costs.replace("heads = 2, kv_", "kv_"))


def test_a_fabric_is_of_one_kind(tmp_path):
    text = GOOD.replace('device = "own"\n', 'device = "own"\nfabric = "ib0"\n')
    text = text.replace('nics = [{ kind = "ethernet"', 'nics = [{ kind = "roce"')
    assert "mixes infiniband and roce" in refused(tmp_path, text)


def test_files_that_cannot_be_read(tmp_path):
    with pytest.raises(UserError, match=r"missing\.toml does not exist"):
        load_cluster(tmp_path / "missing.toml")
    with pytest.raises(UserError, match="can't be read"):
        load_cluster(tmp_path)
    path = tmp_path / "cluster.toml"
    path.write_bytes(b'name = "lab"\n# \xff\n')
    with pytest.raises(UserError, match="line 2 is not UTF-8"):
        load_cluster(path)
    assert "has no [[hosts]]" in refused(tmp_path, "hosts = []")
    assert "line 3 is not TOML" in refused(tmp_path, 'name = "lab"\n[[hosts]]\nnames = ["a"')


def test_exchange_rates_follow_links_and_nics(tmp_path):
    links = cluster_links(load(tmp_path, GOOD))
    inside = 300e9 * LINK_UTILISATION
    infiniband, ethernet = 2 * 200e9 / 8 * NIC_UTILISATION, 10e9 / 8 * NIC_UTILISATION
    assert links((0, 1)) == pytest.approx(inside)
    assert links((0, 2)) == pytest.approx(infiniband)
    # of three peers one is on the same host; two members share the NICs for the other two thirds
    assert links((0, 1, 2, 3)) == pytest.approx(infiniband / 2 * 3 / 2)
    # b0 is on no fabric: all go over ethernet, and its one card carries everything it sends
    assert links((0, 4)) == pytest.approx(ethernet)
    assert links((0, 1, 4)) == pytest.approx(ethernet)
    assert links.ring_rate() == pytest.approx(ethernet)
    assert cluster_links(local_cluster(2)).ring_rate() == pytest.approx(4e9 * LINK_UTILISATION)


def gathered_seconds(links, ranks, shares):
    """Message by message: what leaves and reaches every rank's host and every rank's own link."""
    hosts = [links.hosts[r] for r in ranks]
    out, into, sent, got = Counter(), Counter(), Counter(), Counter()
    for i, share in enumerate(shares):
        for j in range(len(ranks)):
            if hosts[i] != hosts[j]:
                out[hosts[i]] += share
                into[hosts[j]] += share
            elif i != j:
                sent[i] += share
                got[j] += share
    cards = [max(out[h], into[h]) / links.uplink(h, hosts) for h in hosts if len(set(hosts)) > 1]
    return max(*cards, *(max(sent[i], got[i]) / links.link[hosts[i]] for i in range(len(ranks))))


@pytest.mark.parametrize("seed", range(20))
def test_gathering_unequal_shares_takes_what_the_busiest_card_or_link_takes(seed):
    rng = random.Random(seed)
    hosts = sorted(rng.choices(range(rng.randint(1, 4)), k=rng.randint(2, 8)))
    hosts = tuple(sorted(set(hosts)).index(h) for h in hosts)
    link, cards = ([rng.uniform(1, 100) for _ in range(max(hosts) + 1)] for _ in range(2))
    links = Links(
        hosts=hosts, link=tuple(link), fabrics=("",) * len(link), fabric_nics=tuple(cards), ethernet=tuple(cards)
    )
    ranks = sorted(rng.sample(range(len(hosts)), rng.randint(2, len(hosts))))
    shares = [rng.random() for _ in ranks]
    shares = [share / sum(shares) for share in shares]
    assert links.gathering(ranks, shares) == pytest.approx(gathered_seconds(links, ranks, shares))
    # with equal shares each rank exchanges all but its own with everyone
    equal = [1 / len(ranks)] * len(ranks)
    assert links.gathering(ranks, equal) == pytest.approx((len(ranks) - 1) / len(ranks) / links(ranks))


def test_a_slow_host_with_a_small_share_costs_a_gathering_little():
    links = Links(
        hosts=(0, 1, 2), link=(1.0,) * 3, fabrics=("",) * 3, fabric_nics=(10.0, 10.0, 1.0), ethernet=(10.0, 10.0, 1.0)
    )
    # it receives the others' parts, and sends little; with a large part it would have to send that twice
    assert links.gathering((0, 1, 2), (0.45, 0.45, 0.1)) == pytest.approx(0.9)
    assert links.gathering((0, 1, 2), (0.1, 0.1, 0.8)) == pytest.approx(1.6)


def test_hosts_on_no_fabric_meet_over_ethernet_only(tmp_path):
    links = cluster_links(load(tmp_path, GOOD.replace('fabric = "ib0"\n', "")))
    assert links((0, 2)) == pytest.approx(10e9 / 8 * NIC_UTILISATION)


def test_exchange_rates_come_near_flexsp_profile():
    links = cluster_links(load_cluster(EXAMPLES / "flexsp-a100-64.toml"))
    # GB/s that FlexSP lists per degree, less the part that a rank sends to itself (its volume counts it)
    for degree, listed in ((8, 96.5), (16, 10.33), (32, 5.94), (64, 4.87)):
        sent = listed * 2**20 * 1e3 * (degree - 1) / degree
        assert links(range(degree)) == pytest.approx(sent, rel=0.15)


CONSTANTS = Constants(
    seconds_per_token2=1e-9,
    seconds_per_token=1e-4,
    seconds_per_pass=0.1,
    bytes_per_token=1000,
    tokens_per_device=5000,
    bytes_per_second={2: 1e9},
)


@pytest.mark.parametrize("measured", ["", NETWORK, "[measured]\nspeeds = [1, 0.9, 0.8, 0.7, 0.5]\n"])
def test_ranks_of_a_subset_are_as_fast_as_they_were_in_the_whole(tmp_path, measured):
    cluster = load(tmp_path, GOOD + measured)
    bound, links = bind(CONSTANTS, cluster), cluster_links(cluster)
    for size in range(1, 6):
        for ranks in combinations(range(5), size):
            part = cluster.subset(ranks)
            assert part.ranks == size
            assert [part.device_of(i) for i in range(size)] == [cluster.device_of(r) for r in ranks]
            assert [part.host_of(i).name for i in range(size)] == [cluster.host_of(r).name for r in ranks]
            assert part.speeds() == tuple(cluster.speeds()[r] for r in ranks)
            costs, parts = bind(CONSTANTS, part), cluster_links(part)
            assert costs.capacity == tuple(bound.capacity[r] for r in ranks)
            assert costs.pass_seconds((0,), "local", [100], [[100]]) == bound.pass_seconds(
                (ranks[0],), "local", [100], [[100]]
            )
            for pair in combinations(range(size), 2):
                assert parts(pair) == links([ranks[i] for i in pair])
                assert parts.around(pair, 1) == links.around([ranks[i] for i in pair], 1)
            for reduction in (reduction_for(part), over_one_nic(part)):
                assert len(reduction.fractions) == size
                assert sum(reduction.fractions) == pytest.approx(1)


def test_a_subset_is_a_cluster_of_its_own(tmp_path):
    cluster = load(tmp_path, GOOD + NETWORK)
    part = cluster.subset([1, 4])
    assert [(host.name, host.count, host.nics) for host in part.hosts] == [
        ("a0", 1, cluster.hosts[0].nics),
        ("b0", 1, cluster.hosts[2].nics),
    ]
    assert part.measured.nic_gbit == ((9.4, 9.2), (0.9, 0.8))
    assert part.measured.link_gbps == (12, 5)
    assert part.measured.latency_seconds == 1e-4
    fingerprints = {cluster.subset(ranks).fingerprint for ranks in ((1, 4), (0, 1, 4), (2, 3, 4), (2, 3), range(5))}
    assert len(fingerprints) == 5
    assert cluster.subset([0, 4]).fingerprint == part.fingerprint, "devices of a host are equal"
    assert cluster.subset(range(5)).fingerprint == cluster.fingerprint
    assert cluster.subset([0, 2, 4]).subset([1, 2]) == cluster.subset([2, 4])
    slow = cluster.subset([4])
    assert list(slow.devices) == ["own"]
    assert slow.fastest_device == CATALOG["A100-40GB"]
    shape = {"layers": 2, "hidden": 64, "heads": 4, "kv_heads": 4, "head_dim": 16, "intermediate": 256, "vocab": 100}
    model = ModelSpec(name="tiny", **shape)
    local = [analytic_costs(c, model).pass_seconds((r,), "local", [9], [[9]]) for c, r in ((cluster, 4), (slow, 0))]
    assert local[0] == local[1]
    for wrong in ([], [0, 0], [5], [-1]):
        with pytest.raises(ValueError, match="no subset of 5 ranks"):
            cluster.subset(wrong)
