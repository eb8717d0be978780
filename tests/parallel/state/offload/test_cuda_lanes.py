"""CUDA's lanes without a GPU: streams and events that note what each may take for done, and memory that is unpinned."""

from __future__ import annotations

import contextlib
import gc
import threading
from types import SimpleNamespace

import pytest
import torch
from torch import nn

from heteromesh.errors import UserError
from heteromesh.parallel.state.offload import cuda_lanes
from heteromesh.parallel.state.offload.cuda_lanes import CudaLanes
from heteromesh.parallel.state.offload.optimizer import OffloadedAdamW
from offload_plans import random_plan

CPU = torch.device("cpu")


class Stream:
    """What work given to it from now on comes after."""

    def __init__(self, *_: object) -> None:
        self.known: set = set()

    def wait_event(self, event) -> None:
        self.known |= event.known

    def wait_stream(self, stream) -> None:
        self.known |= stream.known

    def synchronize(self) -> None:
        here.known |= self.known


class Event:
    def record(self, stream) -> None:
        self.known = set(stream.known)

    def synchronize(self) -> None:
        here.known |= self.known


main: set = set()
"""What the main thread has waited for: whatever threads it starts come after."""


class Here(threading.local):
    """This thread: the stream that it gives work to, and what it has waited for."""

    def __init__(self) -> None:
        self.stream = None
        self.known = main if threading.current_thread() is threading.main_thread() else set(main)


here = Here()


@contextlib.contextmanager
def giving_to(stream):
    before, here.stream = here.stream, stream
    try:
        yield
    finally:
        here.stream = before


@pytest.fixture
def cuda(monkeypatch):
    """A CUDA that is not there; pinned addresses."""
    caller, pinned = Stream(), {}
    main.clear()
    monkeypatch.setattr(torch.Tensor, "record_stream", lambda *_: None)
    runtime = SimpleNamespace(
        cudaHostRegister=lambda address, size, _: pinned.update({address: size}) or 0, cudaHostUnregister=pinned.pop
    )
    for name, value in {
        "Stream": Stream,
        "Event": Event,
        "stream": giving_to,
        "device": contextlib.nullcontext,
        "current_stream": lambda *_: here.stream or caller,
        "cudart": lambda: runtime,
    }.items():
        monkeypatch.setattr(torch.cuda, name, value)
    return SimpleNamespace(caller=caller, pinned=pinned)


@pytest.mark.parametrize("seed", range(6))
def test_every_task_comes_after_those_that_it_waits_for_and_after_the_last_step(cuda, seed):
    plan = random_plan(seed)(1500)
    lanes = CudaLanes(CPU)
    held: dict[int, int] = {}
    before: set = set()
    for step in range(4):
        cuda.caller.known.add(("backward", step))
        built = plan.step_tasks(held=held, flipped=step % 2 == 1)
        numbers = {id(task): number for number, task in enumerate(built.tasks)}

        def work(task, step=step, numbers=numbers, tasks=built.tasks, before=frozenset(before)) -> None:
            on_device = {n for n in task.after if tasks[n].lane in cuda_lanes._STREAMS}
            known = here.known if here.stream is None else here.stream.known
            assert {(step, n) for n in on_device} <= known
            assert before <= known
            if here.stream is not None:
                assert ("backward", step) in known
                known.add((step, numbers[id(task)]))

        lanes.run(plan, built.tasks, work)
        streamed = {(step, n): task.lane for n, task in enumerate(built.tasks) if task.lane in cuda_lanes._STREAMS}
        assert {key for key, lane in streamed.items() if lane != "state_out" and lane != "state_in"} <= (
            cuda.caller.known
        )
        before |= set(streamed)
        held = built.held
    lanes.settle()
    assert before <= here.known


def test_bits_are_the_same_and_all_memory_is_unpinned_in_the_end(cuda, tmp_path):
    ours, theirs = nn.Parameter(torch.randn(777)), nn.Parameter(torch.zeros(777))
    theirs.data.copy_(ours.data)
    optimizer = OffloadedAdamW([ours], plan=random_plan(3), lanes=CudaLanes(CPU), state_folder=tmp_path)
    reference = torch.optim.AdamW([theirs], fused=True)
    for step in range(4):
        ours.grad = torch.randn(777)
        theirs.grad = ours.grad.clone()
        if step % 2:
            optimizer.gradient_ready(ours)
        optimizer.step()
        reference.step()
        assert torch.equal(ours, theirs)
    assert cuda.pinned
    del optimizer
    gc.collect()
    assert not cuda.pinned


def test_memory_that_can_not_be_pinned_is_told(cuda, monkeypatch):
    refusing = SimpleNamespace(cudaHostRegister=lambda *_: 2, cudaHostUnregister=lambda _: None)
    monkeypatch.setattr(torch.cuda, "cudart", lambda: refusing)
    with pytest.raises(UserError, match="can't be pinned for cpu: raise the limit of locked memory"):
        CudaLanes(CPU).memory(100)
