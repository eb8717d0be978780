"""Parts of an optimizer's state on their way between members, and put together again."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from copy import deepcopy
from typing import Any

import torch

from heteromesh.comm.tcp.collectives import wait_all
from heteromesh.comm.tcp.state_transfer import pack, receive_state, send_state
from heteromesh.comm.tcp.transport import TcpTransport
from heteromesh.parallel.state.elementwise import is_elementwise_state

Part = tuple[int, int, int, Mapping[str, torch.Tensor], Mapping[str, Any]]
"""State of some elements of a parameter: (its number, first, last + 1, values by element, values of the parameter)."""


def told_apart(state: Mapping[str, Any], parameter: torch.Tensor) -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
    """What has a value for each element, and the rest."""
    cut = {k: v for k, v in state.items() if is_elementwise_state(k, v, parameter)}
    return cut, {k: v for k, v in state.items() if k not in cut}


def by_parameter(parts: Sequence[Part]) -> dict[int, list[Part]]:
    """By number."""
    numbered: dict[int, list[Part]] = defaultdict(list)
    for part in parts:
        numbered[part[0]].append(part)
    return numbered


def joined(parts: Sequence[Part], parameter: torch.Tensor) -> dict[str, Any]:
    """Copies of the parts, which together are all elements of a parameter or a fragment, in one piece."""
    ordered = sorted(parts, key=lambda part: part[1])
    assert sum(stop - start for _, start, stop, _, _ in ordered) == parameter.numel()
    _, _, _, values, common = ordered[0]
    state = {k: torch.cat([part[3][k] for part in ordered]).view(parameter.shape) for k in values}
    return state | deepcopy(dict(common))


def swap(transport: TcpTransport, outgoing: Sequence[Sequence[Part]], sources: Sequence[int]) -> list[Part]:
    """Sends each rank its parts and returns those that the `sources` have for this one."""
    works = []
    for rank, parts in enumerate(outgoing):
        if parts:
            works += send_state(transport, rank, *pack(parts))
    received = [part for source in sources for part in receive_state(transport, source)]
    wait_all(works)
    return received
