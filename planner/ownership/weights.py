"""Who owns which fraction of sharded weights, what stays resident where, and which state waits in host memory.

Per host h (its c devices are equal): f_h, the fraction of every layer and of all optimizer state that it owns, of which
o_h has its optimizer state in host memory, s_h of that updated on the devices (planner/ownership/offload.py); r_h, the
share of layers that are resident on its devices. Hosts stand in groups: each group owns everything once (one group:
fully sharded; several: sharded inside, replicated across). A step moves, with W the weights of all parameters, L those
of layers that are gathered again for backward (all but the last), D gradients, n_h the hosts that gather again, each
way over the uplink of host h inside its group

    under forward   in   W (1 - f_h)                             out   W f_h (hosts that work - 1)
    under backward  in   L (1 - r_h) (1 - f_h) + D f_h (hosts that work - 1)
                    out  L f_h n_h + D (1 - f_h)

so that everything gathered costs (3 - 1/L) S (n-1)/n in the mean, everything resident 2 S (n-1)/n. A host that only
holds receives neither weights nor sends gradients. Inside a host each device takes the same through its own link.
Between groups D f_h is summed by owners: 2 D f_h (groups - 1) / groups each way. The program

    minimise X + Y + U   subject to   forward seconds, every link's forward bytes / rate <= X,
                                      backward seconds, every link's backward bytes / rate <= Y,
                                      every owner's update <= U,  memory of devices and hosts,  sum of f_h per group = 1

is linear once all r_h are known. Products of r_h and f_h are bounded from below for a relaxation; the one that links
hosts, f_h n_h, by the interval in which the sum R of all r_h lies: branch and bound halves that interval. A whole
number of layers is resident: relaxed values are rounded down and the linear program is solved again, which gives
the plan; the best relaxation left gives the bound.
"""

from __future__ import annotations

import heapq
import math
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from itertools import count

import numpy as np

from heteromesh.planner.ownership.memory import MIXED, Precision
from heteromesh.planner.solver import Floats, LinearSolution, minimise_linear

ADAM_BYTES = 28
"""Per parameter, read and written by an Adam update in fp32."""
HOST_PARAMETERS_PER_SECOND = 3e9
"""That a host's processors update in its memory: 28 bytes each at some 85 GB/s."""
TIE = 1e-4
"""Weight of bytes that hide: of ownerships that are equally fast the one that moves less."""
GAP = 0.005
NODES = 12
IMPROVED_HOSTS = 8
"""With more hosts, what branch and bound found stands."""
GB, GBIT = 1e9, 125e6


@dataclass(frozen=True, slots=True, kw_only=True)
class OwnerHost:
    """A host as the program sees it."""

    devices: int
    memory: float
    """Bytes of a device for layers, gradients and state; what is outside layers, buffers and tokens are off already."""
    uplink: float
    """Bytes per second each way to the hosts of its group."""
    across: float
    """The same to hosts of other groups."""
    shares_uplink: bool
    """Whether both go through the same NICs."""
    link: float
    """Of a device to the others of its host."""
    device_rate: float
    """Bytes per second of a device's memory."""
    host_memory: float = 0.0
    """Bytes of host memory for optimizer state; 0: none, or not known."""
    host_link: float = math.inf
    """Bytes per second each way between a device and host memory."""
    works: bool = True
    """False: it may hold state and computes nothing."""


@dataclass(frozen=True, slots=True, kw_only=True)
class OwnedModel:
    """The parameters that are dealt out, and the compute that hides their traffic."""

    layers: int
    layer_parameters: int
    """Of one layer."""
    outer_parameters: int
    forward_seconds: float
    backward_seconds: float
    precision: Precision = MIXED

    @property
    def inside(self) -> float:
        """Parameters of all layers."""
        return float(self.layers * self.layer_parameters)

    @property
    def all(self) -> float:
        """All parameters."""
        return self.inside + self.outer_parameters


@dataclass(frozen=True, slots=True, kw_only=True)
class WeightOwnership:
    """A solution: per host what it owns and keeps, and what a step's transfers then take."""

    fractions: tuple[float, ...]
    on_host: tuple[float, ...]
    """Of those, the part whose optimizer state is in host memory."""
    resident: tuple[int, ...]
    """Layers that stay whole on each device."""
    gather_seconds: float
    reduce_seconds: float
    update_seconds: float
    value: float
    """Seconds that the program minimises."""
    bound: float
    """No ownership is better."""
    memory_value: tuple[float, ...]
    """Per host, seconds of a step that one more GB on each of its devices saves."""
    link_value: tuple[float, ...]
    """Per host, seconds of a step that one more Gbit/s of its uplink saves."""

    @property
    def gap(self) -> float:
        return self.value / self.bound - 1 if self.bound else 0.0


@dataclass(slots=True)
class _Rows:
    """A linear program as it grows.

    Columns: f - o and o of every host, then r, then w >= 1 - r - f, then s, then X, Y, U and the busiest link's seconds
    under forward and backward.
    """

    hosts: int
    rows: list[Floats] = field(default_factory=list)
    lower: list[float] = field(default_factory=list)
    upper: list[float] = field(default_factory=list)
    memory: dict[int, int] = field(default_factory=dict)
    """By host, the row of a device's memory."""
    uplinks: dict[int, list[int]] = field(default_factory=dict)
    """By host, the rows of its uplink."""

    @property
    def width(self) -> int:
        return 5 * self.hosts + 5

    def add(self, terms: dict[int, float], *, least: float = -math.inf, most: float = math.inf) -> int:
        """Adds a row; returns its number."""
        row = np.zeros(self.width)
        for column, value in terms.items():
            row[column] += value
        self.rows.append(row)
        self.lower.append(least)
        self.upper.append(most)
        return len(self.rows) - 1

    def f(self, host: int) -> int:
        return host

    def o(self, host: int) -> int:
        return self.hosts + host

    def r(self, host: int) -> int:
        return 2 * self.hosts + host

    def w(self, host: int) -> int:
        return 3 * self.hosts + host

    def s(self, host: int) -> int:
        return 4 * self.hosts + host

    @property
    def x(self) -> int:
        """X; Y and U follow."""
        return 5 * self.hosts

    @property
    def links(self) -> int:
        """The busiest link's seconds under forward; those under backward follow."""
        return 5 * self.hosts + 3


def own_weights(
    model: OwnedModel, hosts: Sequence[OwnerHost], groups: Sequence[Sequence[int]] = ()
) -> WeightOwnership | None:
    """Returns the ownership that makes a step shortest, up to a gap of 0.5 % where a few programs reach it; None where
    memory does not hold the model.

    groups: host numbers; none: all hosts are one.
    """
    return _Search(model, hosts, groups or [range(len(hosts))]).run()


def least_seconds(model: OwnedModel, hosts: Sequence[OwnerHost], groups: Sequence[Sequence[int]] = ()) -> float | None:
    """Returns X + Y + U that no ownership is below, without any branching; None where nothing fits."""
    search = _Search(model, hosts, groups or [range(len(hosts))])
    solution = search.relaxed(0.0, search.working)
    # bytes that hide count for TIE of at most X + Y
    return None if solution is None else solution.value / (1 + TIE)


def missing_bytes(model: OwnedModel, hosts: Sequence[OwnerHost], groups: Sequence[Sequence[int]] = ()) -> list[float]:
    """Returns by host the bytes that each of its devices lacks, where nothing is resident and no device need lack more
    than it must.
    """
    search = _Search(model, hosts, groups or [range(len(hosts))])
    return search.missing()


class _Search:
    def __init__(self, model: OwnedModel, hosts: Sequence[OwnerHost], groups: Sequence[Sequence[int]]) -> None:
        self.model, self.hosts, self.groups = model, hosts, groups
        self.working = float(sum(host.works for host in hosts))
        self.group_of = {h: g for g in groups for h in g}
        p = model.precision
        self.all_weights = p.weights * model.all
        self.again = p.weights * (model.layers - 1) * float(model.layer_parameters)
        self.gradients = p.gradients * model.all
        self.best: WeightOwnership | None = None

    def run(self) -> WeightOwnership | None:
        everything = tuple(self.model.layers if host.works else 0 for host in self.hosts)
        self._try(everything)
        root = self.relaxed(0.0, self.working)
        if root is None:
            return self.best
        ticket = count()
        heap = [(root.value, next(ticket), 0.0, self.working, root)]
        bound, nodes = root.value, 1
        while heap:
            bound, _, low, high, solution = heapq.heappop(heap)
            self._round(solution)
            close = self.best is not None and self.best.value <= bound * (1 + GAP)
            if close or nodes >= NODES or high - low < 1 / self.model.layers:
                break
            n = len(self.hosts)
            at = min(
                max(float(solution.columns[2 * n : 3 * n].sum()), low + 0.1 * (high - low)), high - 0.1 * (high - low)
            )
            for part in ((low, at), (at, high)):
                child = self.relaxed(*part)
                nodes += 1
                if child is not None:
                    heapq.heappush(heap, (max(child.value, bound), next(ticket), *part, child))
        else:
            bound = self.best.value if self.best else bound
        if self.best is None:
            return None
        if self.best.value > bound * (1 + GAP) and len(self.hosts) <= IMPROVED_HOSTS:
            self._improve()
        return replace(self.best, bound=min(bound, self.best.value))

    def relaxed(self, low: float, high: float) -> LinearSolution | None:
        """Returns an optimum that no ownership is below whose r_h add up to something from low to high."""
        rows = self._rows(None, high)
        rows.add({rows.r(h): 1.0 for h in range(len(self.hosts))}, least=low, most=high)
        return self._solve(rows)

    def missing(self) -> list[float]:
        rows = self._rows((0,) * len(self.hosts), 0.0, short=True)
        costs = np.zeros(rows.width)
        costs[rows.x] = 1.0
        for h, host in enumerate(self.hosts):
            costs[rows.w(h)] = TIE * host.devices
            rows.add({rows.w(h): 1.0, rows.x: -1.0}, most=0.0)
        limits = np.full(len(costs), math.inf)
        limits[2 * len(self.hosts) : 3 * len(self.hosts)] = 0.0
        solution = minimise_linear(costs, np.array(rows.rows), np.array(rows.lower), np.array(rows.upper), limits)
        assert solution is not None, "memory may be added without limit"
        return [float(solution.columns[rows.w(h)]) * GB for h in range(len(self.hosts))]

    def _solve(self, rows: _Rows) -> LinearSolution | None:
        n = len(self.hosts)
        costs = np.zeros(rows.width)
        costs[rows.x : rows.x + 3], costs[rows.links :] = 1.0, TIE
        limits = np.full(len(costs), math.inf)
        limits[2 * n : 3 * n] = [1.0 if host.works else 0.0 for host in self.hosts]
        limits[n : 2 * n] = limits[4 * n : 5 * n] = [math.inf if host.host_memory else 0.0 for host in self.hosts]
        return minimise_linear(costs, np.array(rows.rows), np.array(rows.lower), np.array(rows.upper), limits)

    def _rows(self, resident: Sequence[int] | None, most_resident: float, *, short: bool = False) -> _Rows:
        """Returns the program for these resident layers; None: relaxed, with at most so many hosts' worth of them."""
        rows = _Rows(len(self.hosts))
        for group in self.groups:
            rows.add({i: 1.0 for h in group for i in (rows.f(h), rows.o(h))}, least=1.0, most=1.0)
        for h in range(len(self.hosts)):
            self._memory(rows, h, resident, short)
        if short:
            return rows
        for i, seconds in enumerate((self.model.forward_seconds, self.model.backward_seconds)):
            rows.add({rows.x + i: 1.0}, least=seconds)
            rows.add({rows.x + i: 1.0, rows.links + i: -1.0}, least=0.0)
        for h in range(len(self.hosts)):
            if resident is None:
                rows.add({rows.w(h): 1.0, rows.r(h): 1.0, rows.f(h): 1.0, rows.o(h): 1.0}, least=1.0)
            self._links(rows, h, resident, most_resident)
            self._update(rows, h)
        return rows

    def _memory(self, rows: _Rows, h: int, resident: Sequence[int] | None, short: bool) -> None:
        """Adds what a device and its host's memory hold."""
        host, model, p = self.hosts[h], self.model, self.model.precision
        whole = 0.0 if resident is None or not host.works else resident[h] / model.layers
        # beside resident layers the owned range is part of the whole; where r is not known it counts as if it were
        shard = 0.0 if resident is None else p.weights * (1 - whole)
        own = (shard + p.gradients) * model.inside
        if not host.works:
            own = (p.weights + p.gradients) * model.all
        terms = {
            rows.f(h): (own + p.state * model.all) / host.devices / GB,
            rows.o(h): own / host.devices / GB,
            rows.r(h): p.weights * model.inside / GB if resident is None else 0.0,
        }
        if short:
            terms[rows.w(h)] = -1.0
        rows.memory[h] = rows.add(terms, most=(host.memory - whole * p.weights * model.inside) / GB)
        rows.add({rows.o(h): p.state * model.all / GB}, most=host.host_memory / GB)

    def _links(self, rows: _Rows, h: int, resident: Sequence[int] | None, most_resident: float) -> None:
        host, group = self.hosts[h], self.group_of[h]
        works, others = float(host.works), [g for g in group if g != h and self.hosts[g].works]
        layers, owned = self.model.layers, (rows.f(h), rows.o(h))
        if resident is None:
            gathering = max(0.0, len(others) + works - most_resident - works)
            whole = 0.0
        else:
            gathering = sum(1 - resident[g] / layers for g in others)
            whole = resident[h] / layers

        def link(rate: float, column: int, constant: float, per_owned: float, waits: float = 0.0) -> None:
            """Demands (constant + per_owned * f + waits * w) / rate <= column."""
            terms = dict.fromkeys(owned, per_owned / rate) | {column: -1.0}
            terms[rows.w(h)] = waits / rate
            number = rows.add(terms, most=-constant / rate)
            if rate != host.link:
                rows.uplinks.setdefault(h, []).append(number)

        again, x, y = self.again * works, rows.links, rows.links + 1
        if len(group) > 1:
            cross = 2 * (len(self.groups) - 1) / len(self.groups) * self.gradients * host.shares_uplink
            cross *= host.uplink / host.across if host.shares_uplink else 0.0
            link(host.uplink, x, self.all_weights * works, -self.all_weights * works)
            link(host.uplink, x, 0.0, self.all_weights * len(others))
            reduced = self.gradients * len(others) + cross
            if resident is None:
                link(host.uplink, y, 0.0, reduced, again)
            else:
                link(host.uplink, y, again * (1 - whole), reduced - again * (1 - whole))
            sent = self.gradients * works
            link(host.uplink, y, sent, self.again * gathering - sent + cross)
        if len(self.groups) > 1:
            across = 2 * (len(self.groups) - 1) / len(self.groups) * self.gradients
            link(host.across, y, 0.0, across)
        if host.devices > 1 and host.works:
            part = 1 / host.devices
            link(host.link, x, self.all_weights, -self.all_weights * part)
            if resident is None:
                link(host.link, y, self.gradients, -self.gradients * part, again)
            else:
                kept = again * (1 - whole)
                link(host.link, y, self.gradients + kept, -(self.gradients + kept) * part)

    def _update(self, rows: _Rows, h: int) -> None:
        """Demands that what is on the devices, and then the rest, with devices, the host's processors and the links
        between them at work at once, is updated in U. Plans of whole subgroups take a few per cent more.

        A job does the first at the same time too, but moves state for want of memory alone, not to gain that.
        """
        host, everything, p = self.hosts[h], self.model.all, self.model.precision
        f, o, s, update = rows.f(h), rows.o(h), rows.s(h), {rows.x + 2: -1.0}
        on_device = ADAM_BYTES * everything / host.devices / host.device_rate
        on_host = everything / HOST_PARAMETERS_PER_SECOND
        byte = everything / host.devices / host.host_link
        rows.add({f: on_device, s: on_device} | update, most=0.0)
        if host.host_memory:
            rows.add({s: 1.0, o: -1.0}, most=0.0)
            rows.add({f: on_device, o: on_host, s: -on_host} | update, most=0.0)
            for moved in (p.weights, p.gradients):  # to the devices, and from them
                rows.add({f: on_device, o: moved * byte, s: (p.state - moved) * byte} | update, most=0.0)

    def _round(self, solution: LinearSolution) -> None:
        """Tries the relaxed residency in whole layers, and less of it where that does not fit."""
        n, layers = len(self.hosts), self.model.layers
        shares = solution.columns[2 * n : 3 * n]
        for scale in (1.0, 0.9, 0.75, 0.5, 0.0):
            whole = tuple(int(scale * r * layers + 1e-6) for r in shares)
            if self._try(whole):
                return

    def _improve(self) -> None:
        """Tries more and fewer resident layers, host by host."""
        layers = self.model.layers
        for step in (max(1, layers // 8), 1):
            for h in range(len(self.hosts)):
                for change in (step, -step):
                    assert self.best is not None
                    whole = list(self.best.resident)
                    whole[h] += change
                    if 0 <= whole[h] <= layers * self.hosts[h].works:
                        self._try(tuple(whole))

    def _try(self, resident: tuple[int, ...]) -> bool:
        """Solves for these resident layers; keeps what is best. Returns whether they fit."""
        rows = self._rows(resident, 0.0)
        solution = self._solve(rows)
        if solution is None:
            return False
        if self.best is None or solution.value < self.best.value:
            self.best = self._ownership(rows, solution, resident)
        return True

    def _ownership(self, rows: _Rows, solution: LinearSolution, resident: tuple[int, ...]) -> WeightOwnership:
        n, columns = len(self.hosts), solution.columns
        f, o = (np.where(part < 1e-9, 0.0, part) for part in (columns[:n], columns[n : 2 * n]))
        return WeightOwnership(
            fractions=tuple(float(a + b) for a, b in zip(f, o, strict=True)),
            on_host=tuple(float(b) for b in o),
            resident=resident,
            gather_seconds=float(columns[rows.links]),
            reduce_seconds=float(columns[rows.links + 1]),
            update_seconds=float(columns[rows.x + 2]),
            value=solution.value,
            bound=solution.value,
            memory_value=tuple(max(0.0, -float(solution.duals[rows.memory[h]])) for h in range(n)),
            link_value=tuple(self._link_value(rows, solution, h) for h in range(n)),
        )

    def _link_value(self, rows: _Rows, solution: LinearSolution, h: int) -> float:
        """Returns what 1 Gbit/s saves: the seconds of a busy link fall in proportion to 1 / rate."""
        host = self.hosts[h]
        saved = 0.0
        for number in rows.uplinks.get(h, ()):
            column = rows.links if rows.rows[number][rows.links] else rows.links + 1
            saved += max(0.0, -float(solution.duals[number])) * float(solution.columns[column])
        rate = host.uplink if len(self.group_of[h]) > 1 else host.across
        return saved * GBIT / rate if math.isfinite(rate) else 0.0
