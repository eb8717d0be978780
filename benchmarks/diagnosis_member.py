"""The processes of benchmarks/diagnosis.py: the coordinator (name z) and the members, who do as their orders say."""

from __future__ import annotations

import json
import sys
import time
from dataclasses import asdict, dataclass
from pathlib import Path

import torch

from heteromesh.faults.coordinator.server import Coordinator
from heteromesh.faults.diagnosis.monitor import Monitor
from heteromesh.faults.member.commit import Steps
from heteromesh.faults.member.member import JoinOptions, Member
from heteromesh.faults.membership.membership import Bounds
from heteromesh.faults.membership.view import Fenced
from heteromesh.faults.testing import inject
from heteromesh.faults.wire.deadlines import Timing

PORT = 29400
BEGIN = "listening"
_SECRET = b"diagnosis"


@dataclass(frozen=True)
class Order:
    """`work`; `slow`: sleep so long before each collective; `sleep`, `hold`: once, for so long."""

    number: int = 0
    kind: str = "work"
    seconds: float = 0.0


def write_order(folder: Path, name: str, order: Order) -> None:
    """Whole or not at all."""
    part = folder / f"{name}.part"
    part.write_text(json.dumps(asdict(order)))
    part.replace(folder / f"{name}.order")


def _coordinate(folder: Path, host: str, evicts: bool) -> None:
    """With 2 s instead of 5 for a main thread that does nothing, so that rounds are short."""
    timing = Timing(stuck=2.0)
    monitor = Monitor(directory=folder / "run", evicts=evicts)
    Coordinator(_SECRET, host=host, port=PORT, bounds=Bounds(min=2), timing=timing, monitor=monitor).start()
    (folder / BEGIN).touch()
    while True:
        time.sleep(60)


class _Worker:
    def __init__(self, folder: Path, megabytes: float, name: str) -> None:
        self.folder, self.name = folder, name
        self.source = torch.ones(int(megabytes * (1 << 18)))
        self.done = 0

    def work(self, member: Member) -> None:
        """Until the member is put out."""
        tally = torch.zeros(1, dtype=torch.int64)
        steps = Steps(member.group(), lambda: [tally])
        steps.start()
        while True:
            self._obey()
            commit = steps.reduce([self.source])
            tally += 1
            assert int(commit.sums[0][0]) == len(commit.names)
            (self.folder / f"{self.name}.step").write_text(str(commit.step))

    def _obey(self) -> None:
        path = self.folder / f"{self.name}.order"
        order = Order(**json.loads(path.read_text())) if path.exists() else Order()
        new = order.number > self.done
        if order.kind == "slow" or (new and order.kind == "sleep"):
            time.sleep(order.seconds)
        elif new and order.kind == "hold":
            inject.hold_interpreter(order.seconds)
        self.done = order.number


def main() -> None:
    folder, megabytes, name, host, *server = sys.argv[1:]
    torch.set_num_threads(1)
    if name == "z":
        _coordinate(Path(folder), host, "evicts" in server)
    worker = _Worker(Path(folder), float(megabytes), name)
    while True:
        try:
            member = Member(
                JoinOptions(
                    coordinators=[(server[0], PORT)], secret=_SECRET, name=name, hosts=(host,), connect_seconds=2.0
                )
            )
        except OSError:
            time.sleep(0.2)
            continue
        try:
            worker.work(member)
        except Fenced:
            pass
        finally:
            member.close()


if __name__ == "__main__":
    main()
