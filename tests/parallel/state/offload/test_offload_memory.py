"""A model whose optimizer state is larger than the memory that the process may have trains from the disk."""

from __future__ import annotations

import resource
from pathlib import Path

import pytest
import torch
from torch import nn

from heteromesh.parallel.state.offload.optimizer import OffloadedAdamW
from heteromesh.planner.ownership.offload import OffloadPlan, cut_evenly, on_host
from ranks import run_processes

NUMEL, SUBGROUP, STEPS = 20_000_003, 1 << 19, 2
STATE = 12 * NUMEL
ALLOWED = 200 << 20
"""Bytes of address space beyond what the process has: less than the state, more than the ring and the lanes' stacks."""


def from_disk(numel: int) -> OffloadPlan:
    cut = cut_evenly(numel, SUBGROUP, "disk")
    return OffloadPlan(subgroups=cut, order=tuple(range(len(cut))))


def train(index: int, folder: Path) -> None:
    torch.set_num_threads(1)
    weights = torch.linspace(-1, 1, NUMEL, dtype=torch.bfloat16)
    gradient = weights * 0.1
    master = nn.Parameter(weights.float())
    reference = torch.optim.AdamW([master], lr=1e-2, fused=True)
    for _ in range(STEPS):
        master.grad = gradient.float()
        reference.step()
    expected = master.detach().to(torch.bfloat16)
    del reference, master
    parameter = nn.Parameter(weights)
    parameter.grad = gradient
    OffloadedAdamW([nn.Parameter(torch.zeros(1))]).step()  # what is loaded at first use
    pages = int(Path("/proc/self/statm").read_text().split()[0])
    limit = pages * resource.getpagesize() + ALLOWED
    resource.setrlimit(resource.RLIMIT_AS, (limit, resource.getrlimit(resource.RLIMIT_AS)[1]))
    with pytest.raises(RuntimeError, match="allocate memory"):
        OffloadedAdamW([parameter], lr=1e-2, plan=lambda n: on_host(n, SUBGROUP)).step()
    optimizer = OffloadedAdamW([parameter], lr=1e-2, plan=from_disk, state_folder=folder, threads=1)
    for _ in range(STEPS):
        optimizer.step()
    assert torch.equal(parameter.detach(), expected)
    optimizer.close()


def test_state_that_memory_does_not_hold_trains_from_the_disk(tmp_path):
    assert STATE > ALLOWED
    run_processes(1, train, tmp_path)
