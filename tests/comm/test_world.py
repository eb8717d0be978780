"""Every rank has rank 0's tensors after a broadcast, and a job's environment is read with care."""

from __future__ import annotations

import os
import socket
from datetime import timedelta

import pytest
import torch

from heteromesh.comm.world import join_world
from heteromesh.errors import UserError
from ranks import World, run_processes, run_ranks

DTYPES = (
    torch.float32,
    torch.float64,
    torch.bfloat16,
    torch.float16,
    torch.float8_e4m3fn,
    torch.float8_e5m2,
    torch.bool,
    torch.int8,
    torch.int16,
    torch.uint16,
    torch.uint32,
    torch.uint64,
    torch.int64,
    torch.complex64,
)


def tensors(seed: int) -> dict[str, torch.Tensor]:
    """Tensors of every dtype and of unusual layouts."""
    generator = torch.Generator().manual_seed(seed)

    def drawn(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=generator)

    found = {str(dtype): (drawn(3, 5).abs() * 9).to(dtype) for dtype in DTYPES}
    found["columns"] = drawn(8, 8)[:, ::2]
    found["transposed"] = drawn(4, 6).t()
    found["expanded"] = drawn(1, 4).expand(3, 4)
    found["one number expanded"] = drawn().expand(5)
    found["strided and expanded"] = drawn(6, 1)[::2].expand(3, 7)
    found["half columns"] = drawn(8, 8).to(torch.bfloat16)[1:, 3::3]
    found["no dimensions"], found["empty"] = drawn(), drawn(0, 3)
    found["conjugated"] = torch.view_as_complex(drawn(4, 2)).conj()
    return found


def broadcast(world: World) -> tuple[list[str], bool]:
    mine, first = tensors(world.rank), tensors(0)
    base = torch.arange(8.0) + world.rank
    world.broadcast_tensors([*mine.values(), base[::2]])
    kept = torch.equal(base[1::2], torch.arange(8.0)[1::2] + world.rank)
    return [n for n, t in mine.items() if t.stride() != first[n].stride() or bits(t) != bits(first[n])], kept


def bits(tensor: torch.Tensor) -> list[int]:
    whole = torch.empty(tensor.shape, dtype=tensor.dtype).copy_(tensor)
    return whole.view(-1).view(torch.uint8).tolist() if whole.numel() else []


def test_tensors_of_any_dtype_and_layout_become_rank_0s() -> None:
    assert run_ranks(3, broadcast) == [([], True)] * 3, "what lies between a slice's elements is nobody's business"


def sparse(world: World) -> str:
    try:
        world.broadcast_tensors([torch.eye(3).to_sparse()])
    except UserError as error:
        return str(error)
    return ""


def test_sparse_tensors_are_refused() -> None:
    assert all("shape (3, 3) is sparse_coo" in message for message in run_ranks(2, sparse))


@pytest.mark.parametrize(
    ("environment", "words"),
    [
        ({"WORLD_SIZE": "2"}, "RANK is not set, and WORLD_SIZE is 2: start the script with `heteromesh run`"),
        ({"WORLD_SIZE": "2", "RANK": "x"}, "RANK is 'x', which is not a whole number"),
        ({"WORLD_SIZE": "two"}, "WORLD_SIZE is 'two', which is not a whole number"),
        ({"WORLD_SIZE": "2", "RANK": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "1"}, "RANK is 2 and WORLD"),
        ({"WORLD_SIZE": "2", "RANK": "0", "MASTER_PORT": "1"}, "MASTER_ADDR is not set"),
        ({"WORLD_SIZE": "2", "RANK": "0", "MASTER_ADDR": "127.0.0.1"}, "MASTER_PORT is not set"),
        (
            {
                "WORLD_SIZE": "2",
                "RANK": "0",
                "MASTER_ADDR": "127.0.0.1",
                "MASTER_PORT": "1",
                "GLOO_SOCKET_IFNAME": "nosuch0",
            },
            "GLOO_SOCKET_IFNAME names the interface 'nosuch0' and this host has ",
        ),
    ],
)
def test_half_an_environment_is_told(environment: dict[str, str], words: str, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("WORLD_SIZE", "RANK", "MASTER_ADDR", "MASTER_PORT", "GLOO_SOCKET_IFNAME"):
        monkeypatch.delenv(name, raising=False)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(UserError) as error, join_world():
        pass
    assert words in str(error.value)


def join(rank: int, port: int) -> str:
    os.environ.update(RANK="0", WORLD_SIZE="2", MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    try:
        with join_world(timedelta(seconds=5)):
            pass
    except UserError as error:
        return str(error)
    return ""


def test_a_port_in_use_is_told() -> None:
    with socket.create_server(("", 0)) as server:
        port = server.getsockname()[1]
        assert f"port {port} of 127.0.0.1 is in use: choose another one" in run_processes(1, join, port)[0]
