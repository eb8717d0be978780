"""The next block travels while this one is worked on: shown by the order of events and over a slow link."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from unittest.mock import patch

import pytest
import torch
from slow_link import slow_link

from heteromesh.comm.exchange import Exchange, Transfer
from heteromesh.parallel.attention.api import attention, prepare_pass
from heteromesh.parallel.attention.kernels import tiled
from heteromesh.parallel.attention.ring_exchange import Block, Circulation
from heteromesh.planner.splitting.layout import zigzag
from heteromesh.planner.splitting.routes import schedule
from packs import Pack, own_rows, tensors
from ranks import World, run_ranks

OVERLAPPED = ("gather", "ring", "trimmed_ring", "bidirectional_ring", "token_ring")


def pack_of(size: int) -> Pack:
    return Pack(tuple(range(size)), (96,), tuple((96 // size,) for _ in range(size)), (1.0,) * size, 4, 2, 8, True, 1)


def logged(log: list[str], event: str, act: Callable) -> Callable:
    def wrapper(*args, **kwargs):
        log.append(event)
        return act(*args, **kwargs)

    return wrapper


def events(world: World, method: str) -> tuple[list[str], list[str]]:
    pack, log = pack_of(world.size), []
    context = prepare_pass(pack.planned(method), pack.lengths, world, pack.speeds)
    rows = own_rows(context.layout, context.member)
    q, k, v, grad = (t[:, :, rows] for t in tensors(pack, torch.float32))
    with context.active():
        attention(q, k, v)  # agrees on shapes
    original = torch.distributed.batch_isend_irecv

    def post(operations):
        log.extend("receive" if o.op is torch.distributed.irecv else "send" for o in operations)
        return original(operations)

    with (
        patch("torch.distributed.batch_isend_irecv", post),
        patch.object(Transfer, "wait", logged(log, "wait", Transfer.wait)),
        patch.object(tiled, "forward_block", logged(log, "compute", tiled.forward_block)),
        patch.object(tiled, "backward_block", logged(log, "compute", tiled.backward_block)),
        context.active(),
    ):
        leaves = [t.requires_grad_() for t in (q, k, v)]
        out = attention(*leaves)
        forward = list(log)
        log.clear()
        out.backward(grad)
    return forward, log


def steps(log: Sequence[str]) -> list[list[str]]:
    """The events up to each wait, repeats dropped."""
    parts: list[list[str]] = [[]]
    for event in log:
        if not parts[-1] or parts[-1][-1] != event:
            parts[-1].append(event)
        if event == "wait":
            parts.append([])
    return parts


@pytest.mark.parametrize("method", OVERLAPPED)
def test_receives_then_sends_then_work_then_wait(method: str) -> None:
    for forward, backward in run_ranks(3, events, method):
        *travelling, last = steps(forward)
        # the last partial outputs of token_ring go home with nothing left to work on
        busy, late = (travelling[:-1], travelling[-1:]) if method == "token_ring" else (travelling, [])
        assert busy
        assert all(step in (["receive", "send", "compute", "wait"], ["send", "compute", "wait"],
                            ["receive", "compute", "wait"]) for step in busy)  # fmt: skip
        assert all("compute" not in step for step in late)
        assert last == ([] if method == "token_ring" else ["compute"])
        # at the end of a backward the gradients of the last blocks go home with nothing left to work on
        assert steps(backward)[0][-4:] in (["receive", "send", "compute", "wait"], ["receive", "compute", "wait"])


def seconds(world: World, overlap: bool) -> float:
    """Of a ring whose blocks take 50 ms to send and 50 ms to work on."""
    layout = zigzag([40], [[10]] * 4)
    exchange = Exchange(world, range(4))
    start = Exchange.start

    def start_and_wait(self, sends, receives, name):
        transfer = start(self, sends, receives, name)
        transfer.wait()
        return Done()

    def visit(block: Block) -> list[torch.Tensor]:
        time.sleep(0.05)
        return []

    own = torch.zeros(10, 100)
    with slow_link(own.nbytes / 0.05), patch.object(Exchange, "start", start if overlap else start_and_wait):
        world.barrier()
        clock = time.perf_counter()
        Circulation(exchange, layout, schedule(layout, "ring")).run([own], visit, "test")
        return time.perf_counter() - clock


class Done:
    def wait(self) -> None:
        pass


@pytest.mark.alone
def test_sending_hides_behind_work_on_a_slow_link() -> None:
    # four visits and three messages of 50 ms each: 200 ms overlapped, 350 ms one after the other
    overlapped, serial = (max(run_ranks(4, seconds, overlap)) for overlap in (True, False))
    assert overlapped < 0.75 * serial


def spans_of(world: World) -> list[tuple[str, int, int]]:
    pack = pack_of(2)
    context = prepare_pass(pack.planned("trimmed_ring"), pack.lengths, world, pack.speeds)
    rows = own_rows(context.layout, context.member)
    q, k, v, _ = (t[:, :, rows] for t in tensors(pack, torch.float32))
    with context.active(), patch.object(tiled, "forward_block", slowly):
        attention(q, k, v)
    return [(s.name, s.duration_ns, world.recorder.comm_ns) for s in world.recorder.spans]


def slowly(*args):
    time.sleep(0.05)
    from heteromesh.parallel.attention.kernels import block

    return block.forward_block(*args)


@pytest.mark.alone
def test_the_trace_shows_transfers_as_long_as_they_travel_and_counts_only_the_wait() -> None:
    for spans in run_ranks(2, spans_of):
        assert [name for name, _, _ in spans] == ["agree on shapes", "ring k, v"]
        travelled, waited = spans[1][1:]
        assert travelled >= 50e6
        assert waited <= travelled + spans[0][1] - 45e6
