"""Each of the four syndromes is injected many times in the sandbox: is the right one said, of the right member or link?

    python benchmarks/diagnosis.py [--rounds 20] [--parts hang,link,slow,net,healthy,cost] [--seed 0] [--seconds 600]

Hosts with a member each (3, 4 and 5 in turn) and a coordinator on a host of its own, in network namespaces (Linux,
root): a card for the control connections and one for data, which is the one that is hurt. Each round draws a culprit
and a way to hurt it, waits for the first diagnosis, heals it and waits until all work together again. `healthy` is a
run beside processes that burn the CPU: any eviction in it is false. `cost` is what the records take of an all-reduce
of 1 MB. Prints Markdown; exit code 1 below 95 % or after a false eviction.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

from diagnosis_member import BEGIN, Order, write_order  # type: ignore[import-not-found]

from heteromesh.planner.cluster.catalog import CATALOG
from heteromesh.planner.cluster.cluster import Cluster, Host, Nic
from heteromesh.runtime.sandbox import Sandbox
from heteromesh.runtime.sandbox.network import VirtualNic

_NAMES = "abcde"
_LIMIT = 20.0
_PARTS = {
    "hang": "non-communication hang",
    "link": "communication hang",
    "slow": "non-communication slow",
    "net": "communication slow",
}
_HERE = Path(__file__).with_name("diagnosis_member.py")


@dataclass
class Job:
    """The members and the coordinator of one sandbox."""

    sandbox: Sandbox
    folder: Path
    names: Sequence[str]
    gbit: float
    orders: int = 0
    seen: int = 0
    events: list[dict[str, Any]] = field(default_factory=list)

    def read(self) -> list[dict[str, Any]]:
        """The coordinator's events since the last call."""
        path = self.folder / "run" / "events.jsonl"
        text = path.read_text() if path.exists() else ""
        lines = text[: text.rfind("\n") + 1].splitlines()
        new = [json.loads(line) for line in lines[self.seen :]]
        self.seen = len(lines)
        self.events += new
        return new

    def card(self, name: str) -> VirtualNic:
        """For data."""
        return self.sandbox[name].interfaces[1]

    def order(self, name: str, kind: str, seconds: float = 0.0) -> None:
        """What a member does from now on."""
        self.orders += 1
        write_order(self.folder, name, Order(number=self.orders, kind=kind, seconds=seconds))

    def steps(self) -> list[int]:
        """How far each member is."""
        found = []
        for name in self.names:
            path = self.folder / f"{name}.step"
            found.append(int(path.read_text() or 0) if path.exists() else 0)
        return found

    def advanced(self, marks: Sequence[int]) -> bool:
        """Whether all are farther than they were."""
        return all(b > a for a, b in zip(marks, self.steps(), strict=True))

    def together(self) -> bool:
        """Whether the newest epoch has everybody."""
        self.read()
        epochs = [e for e in self.events if e["kind"] == "epoch"]
        return bool(epochs) and sorted(epochs[-1]["names"]) == sorted(self.names)

    def settle(self) -> None:
        """All work together again, nothing is known to be slow, and some steps have gone by."""
        until(self.together, 60.0, "the members did not come together")
        for _ in range(2):
            until(partial(self.advanced, self.steps()), 60.0, "no progress")
        until(lambda: not self.troubled(), 60.0, "a slowness is not over")
        time.sleep(2.0)

    def troubled(self) -> bool:
        """Whether the last slowness that was said in this epoch is still there."""
        self.read()
        last = next((e for e in reversed(self.events) if e["kind"] in ("diagnosis", "cleared", "epoch")), None)
        return last is not None and last["kind"] == "diagnosis" and last["syndrome"].endswith("slow")


def main() -> int:
    options = _options()
    load = os.getloadavg()[0]
    print(
        f"{os.cpu_count()} cores, load {load:.1f} at start; {options.gbit:g} Gbit/s links, {options.megabytes:g} MB\n"
    )
    fine = True
    chosen = [part for part in options.parts.split(",") if part in _PARTS]
    if chosen:
        print(
            "| syndrome | rounds | right class | right rank or link | said after, s: median / max |\n"
            "|---|---|---|---|---|"
        )
    notes: list[str] = []
    for part in chosen:
        fine = _injected(options, part, notes) and fine
    print("\n" + "\n".join(notes) if notes else "")
    if "healthy" in options.parts:
        fine = _healthy(options) and fine
    if "cost" in options.parts:
        from diagnosis_cost import cost  # type: ignore[import-not-found]

        cost()
    return 0 if fine else 1


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=20)
    parser.add_argument("--parts", default="hang,link,slow,net,healthy,cost")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--seconds", type=float, default=600.0, help="of the healthy run")
    parser.add_argument("--burners", type=int, default=os.cpu_count(), help="processes that burn the CPU beside it")
    parser.add_argument("--nice", type=int, default=0, help="how much they give way to others")
    parser.add_argument("--pause", type=float, default=0.0, help="seconds between its all-reduces")
    parser.add_argument("--gbit", type=float, default=0.5)
    parser.add_argument("--megabytes", type=float, default=2.0)
    parser.add_argument("--verbose", action="store_true", help="every round's diagnosis on standard error")
    return parser.parse_args()


@contextmanager
def running(options: argparse.Namespace, size: int, *, evicts: bool = False) -> Iterator[Job]:
    """A job that has settled. `evicts`: slow members too, when that pays."""
    nics = tuple(Nic(kind=kind, gbit=options.gbit) for kind in ("ethernet", "infiniband"))
    hosts = tuple(Host(name=n, device="cpu", count=1, nics=nics, fabric="f") for n in [*_NAMES[:size], "z"])
    cluster = Cluster(name="diagnosis", hosts=hosts, devices={"cpu": CATALOG["cpu"]})
    with ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        sandbox = stack.enter_context(Sandbox(cluster, quota=False))
        job = Job(sandbox, folder, list(_NAMES[:size]), options.gbit)
        words = [sys.executable, str(_HERE), str(folder), f"{options.megabytes}"]
        sandbox["z"].start([*words, "z", "0.0.0.0", *["evicts"] * evicts])
        until(lambda: (folder / BEGIN).exists(), 60.0, "the coordinator did not start")
        for name in job.names:
            sandbox[name].start([*words, name, job.card(name).address, sandbox["z"].address])
        job.settle()
        yield job


def until(true: Callable[[], bool], seconds: float, what: str) -> None:
    """Raises TimeoutError."""
    limit = time.monotonic() + seconds
    while not true():
        if time.monotonic() > limit:
            raise TimeoutError(what)
        time.sleep(0.05)


@dataclass(frozen=True)
class Injection:
    """What is done, what must be said of it, and how it is undone."""

    what: str
    place: str
    names: tuple[str, ...]
    begin: Callable[[], None]
    end: Callable[[], None]


def _injected(options: argparse.Namespace, part: str, notes: list[str]) -> bool:
    dice = random.Random(f"{options.seed}-{part}")
    rights, places, extra = 0, 0, 0
    times: list[float] = []
    missed: list[str] = []
    for size, count in zip((3, 4, 5), _split(options.rounds), strict=True):
        if not count:
            continue
        with running(options, size) as job:
            before = sum(e["kind"] == "diagnosis" for e in job.events)
            for _ in range(count):
                told, injection, seconds = _round(job, part, dice)
                right = told is not None and bool(told["syndrome"] == _PARTS[part])
                place = told is not None and right and _same(told, injection)
                rights, places = rights + right, places + place
                times.append(seconds)
                if not place:
                    missed.append(f"- {part}, {size} members, {injection.what}: {_said(told)}")
                if options.verbose:
                    print(f"{part} {size} {injection.what}: {_said(told)} after {seconds:.1f}", file=sys.stderr)
            extra += before
    times.sort()
    print(
        f"| {_PARTS[part]} | {options.rounds} | {rights} | {places} | {times[len(times) // 2]:.1f} / {times[-1]:.1f} |",
        flush=True,
    )
    notes += missed
    if extra:
        notes.append(f"- {part}: {extra} diagnoses before anything was injected")
    return bool(min(rights, places) >= 0.95 * options.rounds)


def _split(rounds: int) -> tuple[int, int, int]:
    third = rounds // 3
    return rounds - 2 * third, third, third


def _round(job: Job, part: str, dice: random.Random) -> tuple[dict[str, Any] | None, Injection, float]:
    injection = {"hang": _hang, "link": _link, "slow": _slow, "net": _net}[part](job, dice)
    time.sleep(dice.uniform(0, 0.5))
    job.read()
    began = time.monotonic()
    told: list[dict[str, Any]] = []

    def said() -> bool:
        told.extend(e for e in job.read() if e["kind"] == "diagnosis")
        return bool(told)

    injection.begin()
    with suppress(TimeoutError):
        until(said, _LIMIT, "silence")
    seconds = time.monotonic() - began
    injection.end()
    job.settle()
    return (told[0] if told else None), injection, seconds


def _same(told: dict[str, Any], injection: Injection) -> bool:
    named: tuple[str, ...] = tuple(told["names"])
    if injection.place == "pair":
        return bool(told["place"] == "link" and sorted(named) == sorted(injection.names))
    return bool(told["place"] == injection.place and named == injection.names)


def _said(told: dict[str, Any] | None) -> str:
    if told is None:
        return "nothing was said"
    return f"{told['syndrome']}, {told['place']} {' to '.join(told['names'])} ({told['why']})"


def _hang(job: Job, dice: random.Random) -> Injection:
    """Outside of a collective the main thread sleeps or the interpreter lock is held, or the process is stopped."""
    name, way = dice.choice(job.names), dice.choice(["sleep", "hold", "stop"])
    host = job.sandbox[name]

    def begin() -> None:
        host.stop() if way == "stop" else job.order(name, way, 6.0)

    return Injection(f"{way} of {name}", "member", (name,), begin, host.resume)


def _link(job: Job, dice: random.Random) -> Injection:
    """Between two hosts every packet is lost, or one host's cable is pulled."""
    a, b = dice.sample(list(job.names), 2)
    if dice.random() < 0.25:
        host = job.sandbox[a]
        return Injection(f"cable of {a}", "card", (a,), host.cut, host.plug)
    device = job.card(a).name
    pairs = [(job.sandbox[a], job.card(b).address), (job.sandbox[b], job.card(a).address)]

    def begin() -> None:
        for host, other in pairs:
            words = f"neigh replace {other} lladdr 02:00:00:00:de:ad dev {device} nud permanent"
            call("ip", "-n", host.namespace, *words.split())

    def end() -> None:
        for host, other in pairs:
            call("ip", "-n", host.namespace, "neigh", "del", other, "dev", device)

    return Injection(f"packets between {a} and {b}", "pair", (a, b), begin, end)


def _slow(job: Job, dice: random.Random) -> Injection:
    """A member sleeps before each collective."""
    name, seconds = dice.choice(job.names), dice.uniform(0.1, 0.4)
    return Injection(
        f"{seconds:.2f} s of sleep in {name}",
        "member",
        (name,),
        lambda: job.order(name, "slow", seconds),
        lambda: job.order(name, "work"),
    )


def _net(job: Job, dice: random.Random) -> Injection:
    """One direction between two hosts, what a host sends, what it receives, or both, at a fraction of the rate."""
    a, b = dice.sample(list(job.names), 2)
    place, gbit = dice.choice(["link", "sender", "receiver", "card"]), job.gbit / dice.uniform(8, 25)
    inside, device, port = job.sandbox[a].namespace, job.card(a).name, job.card(a).port
    hub = inside.rpartition("-")[0]
    what = f"{place} {a}{' to ' + b if place == 'link' else ''} at 1/{job.gbit / gbit:.0f}"
    if place == "card":
        ends = ((inside, device), (hub, port))
        return Injection(
            what,
            place,
            (a,),
            lambda: limit_each(ends, gbit),
            lambda: limit_each(ends, job.gbit),
        )
    if place == "link":
        to = f"match ip dst {job.card(b).address}/32"
        begin = [f"qdisc del dev {device} root", f"qdisc add dev {device} root handle 1: htb default 1"]
        begin += [f"class add dev {device} parent 1: classid 1:1 htb rate {job.gbit * 1e9:.0f}bit burst 200k"]
        begin += [f"class add dev {device} parent 1: classid 1:2 htb rate {gbit * 1e9:.0f}bit burst 20k"]
        begin += [f"filter add dev {device} parent 1: protocol ip u32 {to} flowid 1:2"]
        return Injection(what, place, (a, b), lambda: tc(inside, begin), lambda: limit(inside, device, job.gbit))
    end = (inside, device) if place == "sender" else (hub, port)
    return Injection(what, place, (a,), lambda: limit(*end, gbit), lambda: limit(*end, job.gbit))


def limit_each(ends: Sequence[tuple[str, str]], gbit: float) -> None:
    """For several devices: (namespace, device)."""
    for namespace, device in ends:
        limit(namespace, device, gbit)


def limit(namespace: str, device: str, gbit: float) -> None:
    """Another rate for what a device sends. A new queue: packets in the old one would hold up all others for long."""
    tc(namespace, [f"qdisc del dev {device} root", f"qdisc add dev {device} root handle 1: {bucket(gbit)}"])


def bucket(gbit: float) -> str:
    """A token bucket as the sandbox makes them."""
    per_second = gbit * 1e9 / 8
    burst, queue = max(20_000, per_second * 0.002), max(180_000, per_second * 0.01)
    return f"tbf rate {gbit * 1e9:.0f}bit burst {burst:.0f} limit {queue:.0f}"


def tc(namespace: str, lines: Sequence[str]) -> None:
    """Each line in a namespace."""
    for line in lines:
        call("tc", "-n", namespace, *line.split())


def call(*words: str) -> None:
    """Raises CalledProcessError."""
    subprocess.run(words, check=True, capture_output=True, text=True)


def _healthy(options: argparse.Namespace) -> bool:
    """No eviction, whatever the machine does beside the job."""
    burn = f"import os; os.nice({options.nice})\nwhile True: pass"
    with ExitStack() as stack:
        job = stack.enter_context(running(options, 4, evicts=True))
        before = len(job.events)
        for name in job.names:
            job.order(name, "slow", options.pause)
        for _ in range(options.burners):
            process = subprocess.Popen([sys.executable, "-c", burn])
            stack.callback(process.wait)
            stack.callback(process.kill)
        start, first = time.monotonic(), min(job.steps())
        loads = []
        while time.monotonic() - start < options.seconds:
            time.sleep(1)
            loads.append(os.getloadavg()[0])
        job.read()
        events = job.events[before:]
        last = min(job.steps())
    lost = [e for e in events if e["kind"] == "lost"]
    said = [e for e in events if e["kind"] == "diagnosis"]
    print(
        f"\nHealthy: 4 members, {options.seconds:g} s beside {options.burners} processes that burn the CPU (nice "
        f"{options.nice}, this one {os.nice(0)}), {options.pause:g} s between all-reduces, "
        f"load {min(loads):.1f} to {max(loads):.1f}: {last - first} steps, {len(lost)} evictions, "
        f"{len(said)} diagnoses{': ' if said else ''}" + "; ".join(_said(e) for e in said)
    )
    return not lost


if __name__ == "__main__":
    sys.exit(main())
