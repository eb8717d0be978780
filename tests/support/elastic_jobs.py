"""A coordinator and members that train, die and join, as processes."""

from __future__ import annotations

import json
import os
import signal
import sys
import time
import traceback
from pathlib import Path
from typing import Any

import torch

from forks import context
from heteromesh.comm.tcp.state_transfer import digest_of
from heteromesh.errors import UserError
from heteromesh.faults.coordinator.server import Coordinator
from heteromesh.faults.membership.membership import Bounds
from heteromesh.faults.wire.deadlines import Timing
from heteromesh.planner.cost.devices import DeviceCosts
from heteromesh.runtime.engine.member_costs import MemberCosts
from heteromesh.runtime.process.environment import NAME, environment_of
from heteromesh.runtime.process.failure import RESTARTS, PeerLost
from heteromesh.runtime.work.sampler import Sampler
from trainers import DATA, make_trainer

STEPS = 12
SECRET = "0123456789abcdef" * 2


class Job:
    """A coordinator here, members as processes; what each returned is in `results`."""

    def __init__(self, folder: Path, *, least: int = 1, gather: float = 0.0, patience: float = 20.0) -> None:
        self.folder = folder
        # nobody is silent for so long, however busy the machine; who dies is noticed by the end of a connection
        timing = Timing(stuck=150.0, gather=gather, patience=patience, silence=60.0, hang=60.0)
        self.coordinator = Coordinator(SECRET.encode(), bounds=Bounds(min=least), timing=timing).start()
        self.pipes: dict[int, Any] = {}
        self.processes: dict[int, Any] = {}

    def __enter__(self) -> Job:
        return self

    def __exit__(self, *_: object) -> None:
        for process in self.processes.values():
            process.kill()
            process.join()
        self.coordinator.stop()

    def start(
        self,
        index: int,
        *,
        dies_in: int = 0,
        waits_in: int = 0,
        place: int | None = None,
        restarts: int = 0,
        **changes: Any,
    ) -> None:
        """`place`: which rank of the job it is; it has two addresses then. `restarts`: as an agent counts them."""
        source, sink = context.Pipe(duplex=False)
        environment = environment_of(
            coordinators=[self.coordinator.address],
            secret=SECRET,
            name=f"host:{index}",
            hosts=["127.0.0.1"] if place is None else [f"127.0.{place}.1", f"127.0.{place}.2"],
            bounds=Bounds(),
            place=place,
        ) | {RESTARTS: str(restarts)}
        arguments = (environment, self.folder, dies_in, waits_in, sink, changes)
        self.processes[index] = context.Process(target=member, args=arguments)
        self.processes[index].start()
        sink.close()
        self.pipes[index] = source

    def result(self, index: int, seconds: float = 150.0) -> Any:
        """(losses, digest of the parameters), or the text of what was raised, or None for a process that was killed."""
        assert self.pipes[index].poll(seconds), f"member {index} is not done"
        try:
            return self.pipes[index].recv()
        except EOFError:
            return None


def member(environment: dict[str, str], folder: Path, dies_in: int, waits_in: int, sink: Any, changes: Any) -> None:
    torch.set_num_threads(1)
    os.environ.update(environment)
    # a process of the fork server has the output of the test that started the server
    sys.stdout = (folder / f"{environment[NAME]}.txt").open("w", buffering=1)
    # equal devices, however busy this machine is: every member has work
    pace = DeviceCosts(0.0, 1e-3, 1e-4, changes.get("tokens_per_device") or 1_000_000)
    MemberCosts.device = property(lambda _: pace, lambda _, measured: None)  # type: ignore[assignment]
    hooks, back = changes.pop("hooks", ()), changes.pop("in_backward", False)
    trainer = make_trainer(folder / "run", **({"fault_tolerance": True, "max_steps": STEPS} | changes))
    trainer.hooks = hooks

    def hook(*_: object) -> None:
        step = trainer.sampler.state_dict()["index"]
        if dies_in and step >= dies_in:
            os.kill(os.getpid(), signal.SIGKILL)
        while waits_in and step >= waits_in and not (folder / "go").exists():
            time.sleep(0.01)

    first = trainer.model.layers[0]
    if back:  # the gradients of the layers behind it are summed already
        first.down.weight.register_post_accumulate_grad_hook(hook)
    else:
        first.register_forward_pre_hook(hook)
    try:
        losses = trainer.fit().losses
        sink.send((losses, digest_of(list(trainer.model.parameters()))))
    except (UserError, PeerLost) as error:
        sink.send(f"{type(error).__name__}: {error}")
    except BaseException:
        sink.send(traceback.format_exc())


def eventually(true: Any, seconds: float = 150.0) -> None:
    end = time.monotonic() + seconds
    while not true():
        assert time.monotonic() < end
        time.sleep(0.01)


def rows(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def check_ledger(folder: Path) -> list[dict[str, Any]]:
    """Every sequence of every batch was trained once."""
    ledger = rows(folder / "run/ledger.jsonl")
    assert [row["step"] for row in ledger] == list(range(1, STEPS + 1))
    sampler = Sampler([len(s) for s in DATA], batch_tokens=220, seed=0)
    for row in ledger:
        batch = sampler.next_batch()
        trained = sorted(place for places in row["trained"].values() for place in places)
        assert trained == list(range(len(batch.lengths))), row
    return ledger


def through_losses_and_a_join(folder: Path, *, placed: bool = False, **options: Any) -> Any:
    """Three members, of whom two die, and one that joins: what the other two returned.

    options: settings, and `in_backward`: whether they die there. placed: they know which ranks they are; the one that
    joins takes the place of the first that died.
    """
    places = (0, 1, 2, 1) if placed else (None,) * 4
    with Job(folder, least=2, gather=5.0) as job:
        membership = job.coordinator.membership
        # the writer too, in its turn: ranks are given in the order of arrival
        job.start(0, dies_in=9, waits_in=6, place=places[0], **options)
        eventually(lambda: len(membership.people) == 1)
        job.start(1, dies_in=4, place=places[1], **options)
        job.start(2, waits_in=6, place=places[2], **options)
        assert job.result(1) is None
        job.start(3, place=places[3], **options)
        eventually(lambda: membership.counts["joined"] == 4)
        (folder / "go").touch()
        assert job.result(0) is None
        results = job.result(2), job.result(3)
        assert all(isinstance(result, tuple) for result in results), results
        assert membership.counts["died"] == 2
    return results
