import random
from datetime import timedelta
from itertools import product
from types import SimpleNamespace

import pytest
import torch
import torch.distributed as dist
from hypothesis import given, settings
from hypothesis import strategies as st

from heteromesh.comm import networks, replicas, world
from heteromesh.comm.collectives import torch as torch_collectives
from heteromesh.comm.networks import group_options
from heteromesh.comm.world import World, join_world
from heteromesh.errors import UserError
from heteromesh.planner.cluster.catalog import CATALOG
from heteromesh.planner.cluster.cluster import Cluster, Host, Nic
from heteromesh.planner.reduction.flows import Flow, spread
from heteromesh.planner.stages.fabric import network_of

RDMA, WIRE = Nic(kind="infiniband", gbit=200), Nic(kind="ethernet", gbit=25)


def cluster(*described):
    """(fabric, devices, nics) a host."""
    hosts = tuple(
        Host(name=f"h{i}", device="cpu", count=count, fabric=fabric, nics=nics)
        for i, (fabric, count, nics) in enumerate(described)
    )
    return Cluster(name="c", hosts=hosts, devices={"cpu": CATALOG["cpu"]})


BOTH = (RDMA, WIRE)
MIXED = cluster(("ib", 2, BOTH), ("ib", 2, BOTH), ("roce", 2, BOTH), ("roce", 2, BOTH), ("", 1, (WIRE,)))


@pytest.mark.parametrize(
    ("ranks", "network"),
    [
        (range(9), "socket"),
        (range(4), "rdma"),
        (range(4, 8), "rdma"),
        ((2, 6), "socket"),
        ((1, 3), "rdma"),
        ((0, 1), "rdma"),
        ((8,), "socket"),
    ],
)
def test_networks_of_sets_of_a_mixed_cluster(ranks, network):
    """Holmes: gradient sums on RDMA inside a fabric, what goes on to the next stage over sockets."""
    assert network_of(MIXED, ranks) == network


def test_the_world_of_one_fabric_uses_rdma_and_that_of_none_sockets():
    assert network_of(cluster(("ib", 1, BOTH), ("ib", 1, BOTH)), range(2)) == "rdma"
    assert network_of(cluster(("", 1, BOTH), ("", 1, BOTH)), range(2)) == "socket"
    # a fabric named, but no card for it
    assert network_of(cluster(("ib", 1, BOTH), ("ib", 1, (WIRE,))), range(2)) == "socket"


@given(
    st.lists(st.tuples(st.sampled_from(["", "a", "b"]), st.integers(1, 3), st.booleans()), min_size=1, max_size=6),
    st.data(),
)
@settings(max_examples=60)
def test_no_set_on_rdma_spans_fabrics(described, data):
    some = cluster(*((fabric, count, BOTH if rdma else (WIRE,)) for fabric, count, rdma in described))
    ranks = data.draw(st.sets(st.integers(0, some.ranks - 1), min_size=1))
    hosts = [some.host_of(r) for r in ranks]
    one = len({h.fabric for h in hosts}) == 1 and bool(hosts[0].fabric) and all(RDMA in h.nics for h in hosts)
    assert network_of(some, ranks) == ("rdma" if one else "socket")


# flows over cards


def loads(flows, cards, result):
    """(host, card, way) -> seconds."""
    busy = {}
    for flow, rows in zip(flows, result.fractions, strict=True):
        assert sum(map(sum, rows)) == pytest.approx(1)
        for a, b in product(range(len(cards[flow.source])), range(len(cards[flow.target]))):
            for host, card, way in ((flow.source, a, "out"), (flow.target, b, "in")):
                if rows[a][b]:
                    key = host, card, way
                    busy[key] = busy.get(key, 0.0) + flow.size * rows[a][b] / cards[host][card]
    return busy


def test_a_flow_uses_cards_in_proportion_to_their_rates():
    flows, cards = [Flow(0, 1, 30.0)], [[1.0, 2.0], [3.0]]
    result = spread(flows, cards)
    assert result.seconds == pytest.approx(10.0)
    assert [sum(row) for row in result.fractions[0]] == pytest.approx([1 / 3, 2 / 3])


def test_a_degraded_card_gets_less_and_one_that_is_down_nothing():
    flows, cards = [Flow(0, 1, 10.0), Flow(1, 0, 10.0)], [[1.0, 1.0], [1.0, 1.0]]
    assert spread(flows, cards).seconds == pytest.approx(5.0)
    slow = spread(flows, [[1.0, 0.25], [1.0, 1.0]])
    assert slow.seconds == pytest.approx(8.0)
    assert sum(row[1] for row in slow.fractions[1]) == pytest.approx(0.2)
    down = spread(flows, [[1.0, 0.0], [1.0, 1.0]])
    assert down.seconds == pytest.approx(10.0)
    assert sum(down.fractions[0][1]) == 0


@pytest.mark.parametrize("seed", range(8))
def test_the_busiest_card_decides_and_nothing_beats_the_hosts_totals(seed):
    """With fractions free over pairs of cards, a host's cards act as one: the optimum is the busiest host's."""
    rng = random.Random(seed)
    cards = [[rng.choice([1e9, 5e9, 2.5e10]) for _ in range(rng.randint(1, 3))] for _ in range(4)]
    pairs = [(a, b) for a in range(4) for b in range(4) if a != b]
    flows = [Flow(a, b, rng.uniform(1e6, 1e9)) for a, b in rng.sample(pairs, 5)]
    result = spread(flows, cards)
    assert max(loads(flows, cards, result).values()) == pytest.approx(result.seconds, rel=1e-6)
    out = [sum(f.size for f in flows if f.source == h) / sum(cards[h]) for h in range(4)]
    into = [sum(f.size for f in flows if f.target == h) / sum(cards[h]) for h in range(4)]
    assert result.seconds == pytest.approx(max(out + into), rel=1e-6)


def test_no_flow_takes_no_time():
    assert spread([], [[1.0]]).seconds == 0


@pytest.mark.parametrize(
    ("flow", "cards", "message"),
    [
        (Flow(0, 0, 1.0), [[1.0], [1.0]], "from host 0 to itself"),
        (Flow(0, 1, 0.0), [[1.0], [1.0]], "has 0.0 bytes"),
        (Flow(0, 1, float("nan")), [[1.0], [1.0]], "has nan bytes"),
        (Flow(0, 1, 1.0), [[1.0], [-1.0]], "card 0 of host 1 has -1.0"),
        (Flow(0, 1, 1.0), [[1.0], [0.0]], "host 1 has a flow and no card that is up"),
        (Flow(0, 7, 1.0), [[1.0], [1.0]], "host 7 has a flow"),
    ],
)
def test_impossible_flows(flow, cards, message):
    with pytest.raises(UserError, match=message):
        spread([flow], cards)


# options of process groups


def test_gloo_needs_no_options():
    assert group_options("socket", "gloo") is None


def test_another_backend_is_refused():
    with pytest.raises(UserError, match="backend 'mpi' has no choice of network"):
        group_options("rdma", "mpi")


@pytest.mark.skipif(dist.is_nccl_available(), reason="this torch has NCCL")
def test_nccl_is_refused_where_torch_lacks_it():
    with pytest.raises(UserError, match="without NCCL"):
        group_options("rdma", "nccl")


@pytest.mark.skipif(not dist.is_nccl_available(), reason="this torch was built without NCCL")
@pytest.mark.parametrize(("network", "name"), [("rdma", "IB"), ("socket", "Socket")])
def test_nccl_gets_the_name_of_its_network(network, name):
    assert group_options(network, "nccl").config.net_name == name


# which groups get which options, with a torch that is said to have NCCL and a device


class Nccl:
    """In place of torch.distributed: remembers what groups were asked for."""

    def __init__(self, size, networks=None):
        self.size, self.networks, self.asked = size, networks, []
        self.group = SimpleNamespace(WORLD="world")
        self.ProcessGroupNCCL = SimpleNamespace(Options=lambda: SimpleNamespace(config=SimpleNamespace()))
        self.is_initialized = lambda: bool(self.asked)
        self.is_nccl_available = lambda: True
        self.get_rank, self.get_world_size = lambda *_: 0, lambda *_: size
        self.all_reduce = self.barrier = self.destroy_process_group = lambda *args, **options: None

    def init_process_group(self, backend, **options):
        self.asked.append((backend, tuple(range(self.size)), options))

    def new_group(self, ranks=None, **options):
        self.asked.append((options.pop("backend", None), tuple(ranks or range(self.size)), options))
        return self.asked[-1][1]

    def gather(self, value):
        """What `World.gather` returns."""
        return [value] * self.size if self.networks is None else self.networks

    @property
    def names(self):
        """By ranks, the network of the groups that may have device tensors."""
        return [
            (ranks, options["pg_options"] and options["pg_options"].config.net_name)
            for _, ranks, options in self.asked
            if "pg_options" in options
        ]


@pytest.fixture
def nccl(monkeypatch):
    def pretend(size, device="cuda", told=None):
        fake = Nccl(size, told)
        for module in (world, networks, replicas, torch_collectives):
            monkeypatch.setattr(module, "dist", fake)
        monkeypatch.setattr(world, "pick_device", lambda: torch.device(device))
        monkeypatch.setattr(torch.cuda, "set_device", lambda device: None)
        monkeypatch.setattr(torch, "zeros", lambda *args, **options: None)
        monkeypatch.setattr(world, "_own_store", lambda *_: None)
        monkeypatch.setattr(world.World, "gather", lambda _, value: fake.gather(value))
        monkeypatch.setenv("WORLD_SIZE", str(size))
        monkeypatch.setenv("RANK", "0")
        monkeypatch.setenv("MASTER_ADDR", "127.0.0.1")
        monkeypatch.setenv("MASTER_PORT", "1")
        return fake

    return pretend


IB = cluster(("ib", 2, BOTH), ("ib", 2, BOTH))


@pytest.mark.parametrize(
    ("described", "device", "size", "name"),
    [
        (MIXED, "cuda", 9, "Socket"),
        (IB, "cuda", 4, "IB"),
        (cluster(("ib", 4, BOTH)), "cuda", 4, None),
        (None, "cuda", 4, None),
        (MIXED, "cpu", 9, None),
    ],
)
def test_the_world_is_on_the_network_that_reaches_all(nccl, described, device, size, name):
    fake = nccl(size, device)
    with join_world(timedelta(seconds=7), described):
        assert fake.names == [(tuple(range(size)), name)] * 2, "exchanges and gradients"
    assert all(o["pg_options"] is None or o["pg_options"]._timeout == o["timeout"] for _, _, o in fake.asked[:2])
    assert [backend for backend, _, options in fake.asked if "pg_options" not in options] == ["gloo"] * 3


def test_a_pipelines_groups_are_each_on_their_own_network(nccl):
    fake = nccl(9)
    replicas.join_pipeline(World(0, 9, torch.device("cuda"), cluster=MIXED), [(0, 1, 2, 3), (4, 5, 6, 7), (8, 8, 8, 8)])
    chains = [((j, 4 + j, 8), "Socket") for j in range(4)]
    assert fake.names[:4] == chains
    assert fake.names[4:6] == [((0, 1, 2, 3), "IB"), ((4, 5, 6, 7), "IB")]


def test_ranks_that_were_told_other_networks_are_refused_before_they_hang(nccl):
    fake = nccl(4, told=["rdma", "rdma", None, "rdma"])
    refused = pytest.raises(UserError, match="rank 2 would use the network NCCL chooses and rank 0 rdma: give every")
    with refused, join_world(timedelta(seconds=7), IB):
        pass
    assert fake.names[0] == ((0, 1, 2, 3), "IB")
