"""A cable is pulled in the sandbox: how long until the hosts that are left have committed the next sum (Linux, root).

    python benchmarks/faults_cable.py [--rounds 5] [--gbit 1] [--megabytes 1]

Three hosts with a member each and a stand-alone coordinator on the first. The third host's cable is pulled (its process
lives), time runs until both others have committed a sum without it. Then the same with the first host's cable, which
takes the coordinator away too, so that the others elect another one. Prints Markdown; exit code 1 when nobody went on.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from heteromesh.faults.coordinator.main import SECRET
from heteromesh.faults.member.commit import Steps
from heteromesh.faults.member.member import JoinOptions, Member
from heteromesh.faults.membership.view import Fenced
from heteromesh.planner.cluster.catalog import CATALOG
from heteromesh.planner.cluster.cluster import Cluster, Host, Nic
from heteromesh.runtime.sandbox import Sandbox

_PORT = 29400
_NAMES = ("a", "b", "c")
_LIMIT = 20.0


def main() -> int:
    options = _options()
    if options.name:
        return _work(options)
    print(f"{os.cpu_count()} cores, load {os.getloadavg()[0]:.1f} at start; links of {options.gbit:g} Gbit/s\n")
    print("| cable pulled | rounds | pulled to all others committed, ms | sums wrong |\n|---|---|---|---|")
    failed = False
    for lost, what in (("c", "a member's"), ("a", "a member's and the coordinator's")):
        rounds = [_round(options, lost) for _ in range(options.rounds)]
        failed = failed or any(seconds is None for seconds, _ in rounds)
        times = " / ".join("never" if s is None else f"{s * 1e3:.0f}" for s, _ in rounds)
        print(f"| {what} | {options.rounds} | {times} | {sum(wrong for _, wrong in rounds)} |", flush=True)
    return 1 if failed else 0


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--gbit", type=float, default=1.0)
    parser.add_argument("--megabytes", type=float, default=1.0)
    for own in ("--name", "--hosts", "--output"):
        parser.add_argument(own, default="", help=argparse.SUPPRESS)
    return parser.parse_args()


def _round(options: argparse.Namespace, lost: str) -> tuple[float | None, int]:
    """Seconds from the pull to the last survivor's commit, None when there is none; wrong sums."""
    nics = (Nic(kind="ethernet", gbit=options.gbit),)
    hosts = tuple(Host(name=n, device="cpu", count=1, nics=nics) for n in _NAMES)
    cluster = Cluster(name="cable", hosts=hosts, devices={"cpu": CATALOG["cpu"]})
    secret = {SECRET: os.urandom(16).hex()}
    with tempfile.TemporaryDirectory() as folder, Sandbox(cluster, quota=False) as sandbox:
        words = [
            sys.executable,
            "-m",
            "heteromesh.faults.coordinator",
            "--host",
            "0.0.0.0",
            "--port",
            str(_PORT),
            "--members",
            "2:3",
        ]
        sandbox["a"].start(words, environment=secret, piped=True).streams[0].readline()  # type: ignore[index]
        addresses = ",".join(host.address for host in sandbox.hosts)
        files = {name: Path(folder) / name for name in _NAMES}
        for name in _NAMES:
            words = [sys.executable, __file__, "--name", name, "--hosts", addresses, "--output", str(files[name])]
            sandbox[name].start([*words, "--megabytes", str(options.megabytes)], environment=secret)
        if not _until(lambda: all(any(len(e["names"]) == 3 for e in _events(f)) for f in files.values())):
            return None, 0
        time.sleep(0.5)
        pulled = time.monotonic()
        sandbox[lost].cut()
        left = [files[name] for name in _NAMES if name != lost]
        _until(lambda: all(_after(file, lost, pulled) > 0 for file in left))
        ends = [_after(file, lost, pulled) for file in left]
        wrong = sum(not event["right"] for file in files.values() for event in _events(file))
        return (max(ends) - pulled if all(ends) else None), wrong


def _until(true: Callable[[], bool]) -> bool:
    limit = time.monotonic() + _LIMIT
    while not true():
        if time.monotonic() > limit:
            return False
        time.sleep(0.05)
    return True


def _events(file: Path) -> list[dict[str, Any]]:
    lines = file.read_text().split("\n")[:-1] if file.exists() else []
    return [json.loads(line) for line in lines]


def _after(file: Path, lost: str, since: float) -> float:
    """When the first commit without the lost host was; 0 when there is none."""
    times: list[float] = [e["time"] for e in _events(file) if lost not in e["names"]]
    return next((t for t in times if t > since), 0.0)


def _work(options: argparse.Namespace) -> int:
    torch.set_num_threads(1)
    hosts = options.hosts.split(",")
    mine = hosts[_NAMES.index(options.name)]
    member = Member(
        JoinOptions(
            coordinators=[(host, _PORT) for host in hosts],
            secret=os.environ[SECRET].encode(),
            name=options.name,
            hosts=(mine,),
        )
    )
    count = int(options.megabytes * (1 << 18))
    values = {name: float(10**i) for i, name in enumerate(_NAMES)}
    source = torch.full((count,), values[options.name])
    steps = Steps(member.group())
    with open(options.output, "w", buffering=1) as out:
        try:
            steps.start()
            while True:
                commit = steps.reduce([source])
                right = bool((commit.sums[0] == sum(values[name] for name in commit.names)).all())
                event = {"time": time.monotonic(), "names": "".join(commit.names), "right": right}
                out.write(json.dumps(event) + "\n")
        except Fenced:
            return 3


if __name__ == "__main__":
    sys.exit(main())
