"""The world: this rank, its device, and the few fixed process groups. Passed in, never global."""

from __future__ import annotations

import os
import socket
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import timedelta
from functools import cache
from typing import Any, TypeVar, cast

import torch
import torch.distributed as dist
from torch.distributed.distributed_c10d import PrefixStore, Store
from torch.distributed.rendezvous import rendezvous

from heteromesh.comm.codec import from_tensor, to_tensor
from heteromesh.comm.collectives.api import Collectives
from heteromesh.comm.collectives.torch import TorchCollectives
from heteromesh.comm.interfaces import Transport
from heteromesh.comm.networks import device_options
from heteromesh.comm.records import Recorder
from heteromesh.errors import UserError
from heteromesh.planner.cluster.cluster import Cluster
from heteromesh.planner.stages.fabric import network_of

T = TypeVar("T")
PATIENT = timedelta(days=365)
"""A plan, a checkpoint or the end of a job may be long in coming: only passes and gradients have the short limit."""
_LAUNCH = "start the script with `heteromesh run` or torchrun, which set RANK, WORLD_SIZE, MASTER_ADDR and MASTER_PORT"


@dataclass(slots=True)
class World:
    """One rank's view of one epoch of the job. With `size` 1 there may be no process group at all.

    Passes exchange point to point inside `exchange` (no group per pass); `gradients` and `control` are separate
    communicators so that gradient sums, plan broadcasts and passes never queue behind each other.
    """

    rank: int = 0
    size: int = 1
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))
    exchange: dist.ProcessGroup | Transport | None = None
    gradients: dist.ProcessGroup | None = None
    control: dist.ProcessGroup | None = None
    """Small messages on CPU tensors (gloo), used from the plan thread."""
    checkpoint: dist.ProcessGroup | None = None
    """Used by the checkpoint writer only (gloo)."""
    statistics: dist.ProcessGroup | None = None
    """Step statistics on CPU tensors (gloo)."""
    recorder: Recorder = field(default_factory=Recorder)
    cluster: Cluster | None = None
    """The hosts of the ranks, where they are described."""
    members: tuple[int, ...] = ()
    """Ids by rank; in a job whose members stay, the ranks themselves."""
    names: tuple[str, ...] = ()
    """By rank, what people call them."""
    collectives: Collectives | None = None
    """What gradients are summed with; set by whoever builds the world."""
    fresh: bool = True
    """Whether the last commit, if there was any, was made in this same epoch."""

    def __post_init__(self) -> None:
        self.members = self.members or tuple(range(self.size))
        self.names = self.names or tuple(f"rank {rank}" for rank in range(self.size))

    @property
    def writes(self) -> bool:
        """Whether this rank is the one that writes files and to the terminal: it has been in the job for longest."""
        return self.members[self.rank] == min(self.members)

    def new_group(self, ranks: Sequence[int], timeout: timedelta) -> dist.ProcessGroup:
        """Makes a communicator of these ranks for device tensors, on the network that reaches them all.

        Every rank of the world must make the same calls.
        """
        options = device_options(self.cluster, ranks, self.device, timeout)
        group: dist.ProcessGroup = dist.new_group(sorted(ranks), timeout=timeout, pg_options=options)
        return group

    def broadcast(self, value: Any) -> Any:
        """Returns rank 0's `value` (see comm/codec.py) on every rank; blocks.

        It uses the control group, so it is for the plan thread alone.
        """
        if self.size == 1:
            return value
        data = to_tensor(value) if self.rank == 0 else torch.empty(0, dtype=torch.uint8)
        size = torch.tensor([data.numel()])
        dist.broadcast(size, group_src=0, group=self.control)
        if self.rank != 0:
            data = torch.empty(int(size), dtype=torch.uint8)
        dist.broadcast(data, group_src=0, group=self.control)
        return value if self.rank == 0 else from_tensor(data)

    def once(self, act: Callable[[], T]) -> T:
        """Returns on every rank the result of `act` on the one that writes; its exception is raised on every rank."""
        outcome: T | Exception | None = None
        if self.writes:
            try:
                outcome = act()
            except Exception as error:
                outcome = error
        outcome = self.gather(outcome)[self.members.index(min(self.members))]
        if isinstance(outcome, Exception):
            raise outcome
        return cast(T, outcome)

    def broadcast_tensors(self, tensors: Iterable[torch.Tensor], source: int = 0) -> None:
        """Copies a rank's values of these tensors to every rank, in place, bit by bit.

        They may be on any device, of any dtype, slices of larger tensors and expanded ones. Raises UserError for
        tensors without strides (sparse ones).
        """
        if self.size > 1:
            for tensor in map(_memory_of, tensors):
                # bytes in a block of their own: gloo knows few dtypes, and takes what is strided for contiguous
                here = tensor.to(self.device).resolve_conj().resolve_neg().contiguous()
                if here.numel():
                    row = here.as_strided((here.numel(),), (1,))
                    dist.broadcast(row.view(torch.uint8), group_src=source, group=self.gradients)
                    tensor.copy_(here)

    def gather(self, value: Any) -> list[Any]:
        """Returns every rank's `value` (see comm/codec.py), in rank order, on every rank (statistics group; blocks)."""
        return gather_over(self.statistics, value) if self.size > 1 else [value]

    def sum(self, vector: torch.Tensor) -> torch.Tensor:
        """Sums a CPU vector over the ranks element by element, in place (statistics group; blocks)."""
        if self.size > 1:
            dist.all_reduce(vector, group=self.statistics)
        return vector

    def sum_ahead(self, vector: torch.Tensor) -> torch.Tensor:
        """Does what `sum` does in the control group, so for the plan thread alone."""
        if self.size > 1:
            dist.all_reduce(vector, group=self.control)
        return vector

    def synchronise(self) -> None:
        """Returns when this rank's device has done what it was given."""
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)

    def barrier(self) -> None:
        """Returns when every rank is here."""
        if self.size > 1:
            dist.barrier(group=self.statistics)


def gather_over(group: dist.ProcessGroup | None, value: Any) -> list[Any]:
    """Returns the `value` (see comm/codec.py) of every rank of a gloo group, in rank order, on every rank; blocks."""
    size, mine = dist.get_world_size(group), to_tensor(value)
    sizes = [torch.empty(1, dtype=torch.int64) for _ in range(size)]
    dist.all_gather(sizes, torch.tensor([mine.numel()]), group=group)
    padded = torch.zeros(max(int(size) for size in sizes), dtype=torch.uint8)
    padded[: mine.numel()] = mine
    parts = [torch.empty_like(padded) for _ in range(size)]
    dist.all_gather(parts, padded, group=group)
    return [from_tensor(part[: int(size)]) for part, size in zip(parts, sizes, strict=True)]


def _memory_of(tensor: torch.Tensor) -> torch.Tensor:
    """Returns the tensor without its repetitions: each element once that an expanded dimension shows many times."""
    if tensor.layout is not torch.strided:
        raise UserError(
            f"a parameter or buffer of shape {tuple(tensor.shape)} is {str(tensor.layout).removeprefix('torch.')}: "
            "ranks can be given dense tensors only, so make it dense"
        )
    tensor = tensor.detach()
    for dim, (size, stride) in enumerate(zip(tensor.shape, tensor.stride(), strict=True)):
        if size > 1 and stride == 0:
            tensor = tensor.narrow(dim, 0, 1)
    return tensor


def local_rank() -> int:
    """Returns this process's index on its host, as torchrun gives it (0 without torchrun)."""
    return int(os.environ.get("LOCAL_RANK", "0"))


def pick_device() -> torch.device:
    """Returns the CUDA device of this local rank where there is one, else the CPU.

    Raises UserError when a host starts more ranks than it has CUDA devices.
    """
    if not torch.cuda.is_available():
        return torch.device("cpu")
    if local_rank() >= torch.cuda.device_count():
        raise UserError(
            f"local rank {local_rank()} has no CUDA device ({torch.cuda.device_count()} here): "
            "start one rank per device with --nproc-per-node, or hide them with CUDA_VISIBLE_DEVICES= to use the CPU"
        )
    return torch.device("cuda", local_rank())


@contextmanager
def join_world(timeout: timedelta = timedelta(minutes=10), cluster: Cluster | None = None) -> Iterator[World]:
    """Joins the job that torchrun's environment describes, and leaves it at the end.

    May be called again when the world before was left. Without that environment: a world of this one process. A
    default process group that the caller has initialised is used and left alone. cluster: the job's hosts, where they
    are described; NCCL then uses RDMA among ranks of one fabric and sockets elsewhere. Raises UserError where that is
    not the same on every rank.
    """
    device = pick_device()
    if device.type == "cuda":
        torch.cuda.set_device(device)
    owned = not dist.is_initialized() and _variable("WORLD_SIZE", "1") > 1
    if owned:
        backend = "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo"
        rank, size = _place_in_job()
        _check_interfaces()
        options = device_options(cluster, range(size), device, timeout)
        store = _own_store(rank, size, timeout)
        dist.init_process_group(backend, timeout=timeout, pg_options=options, store=store, rank=rank, world_size=size)
    if not dist.is_initialized() or dist.get_world_size() == 1:
        yield World(device=device)
        return
    world = _world(device, timeout, cluster)
    if device.type == "cuda":
        _check_networks(world)
        # NCCL builds a communicator at its first use, and that first use must include every rank
        dist.all_reduce(torch.zeros(1, device=device), group=world.exchange)
    try:
        yield world
        # gloo aborts when a peer destroys its pairs while another still uses them
        world.barrier()
    finally:
        for group in (world.gradients, world.control, world.checkpoint, world.statistics):
            dist.destroy_process_group(group)
        if owned:
            dist.destroy_process_group()


def _place_in_job() -> tuple[int, int]:
    """Returns this process's rank and the number of ranks, as torchrun gives them. Raises UserError where one lacks."""
    rank, size = _variable("RANK"), _variable("WORLD_SIZE")
    _variable("MASTER_PORT")
    if not os.environ.get("MASTER_ADDR"):
        raise UserError(f"WORLD_SIZE is {size} and MASTER_ADDR is not set: {_LAUNCH}")
    if not 0 <= rank < size:
        raise UserError(f"RANK is {rank} and WORLD_SIZE {size}, ranks are 0 to {size - 1}: {_LAUNCH}")
    return rank, size


def _variable(name: str, default: str = "") -> int:
    text = os.environ.get(name, default)
    if not text.strip().isdecimal():
        is_given = f"is {text!r}, which is not a whole number" if text else "is not set"
        raise UserError(f"{name} {is_given}, and WORLD_SIZE is {os.environ['WORLD_SIZE']}: {_LAUNCH}")
    return int(text)


def _check_interfaces() -> None:
    """Raises UserError for an interface of GLOO_SOCKET_IFNAME that this host does not have."""
    here = sorted(name for _, name in socket.if_nameindex())
    for name in filter(None, os.environ.get("GLOO_SOCKET_IFNAME", "").split(",")):
        if name not in here:
            raise UserError(
                f"GLOO_SOCKET_IFNAME names the interface {name!r} and this host has {', '.join(here)}: "
                "name one of these, or unset it"
            )


def _own_store(rank: int, size: int, timeout: timedelta) -> Store:
    """Returns a part of the job's store that is this world's own, however many the process joins one after the other.

    Torch's groups are found by equal keys each time: those of a world that was left would lead into nothing.
    """
    address = os.environ["MASTER_ADDR"], os.environ["MASTER_PORT"]
    store = _job_store(rank, size, timeout, address)
    # ranks that are started again, all together, may find the store of the last ones
    start = f"heteromesh/start/{os.environ.get('TORCHELASTIC_RESTART_COUNT', '0')}"
    return PrefixStore(f"{start}/world/{store.add(f'{start}/joined/{rank}', 1)}", store)


@cache
def _job_store(rank: int, size: int, timeout: timedelta, address: tuple[str, str]) -> Store:
    """Returns the store of the job at `address`; it lives as long as the process, for others may still read it."""
    try:
        store: Store = next(iter(rendezvous("env://", rank, size, timeout=timeout)))[0]
    except dist.DistNetworkError as error:
        if "EADDRINUSE" not in str(error):
            raise
        raise UserError(
            f"port {address[1]} of {address[0]} is in use: choose another one (--master-port or MASTER_PORT), or end "
            "the process that has it"
        ) from None
    return store


def _check_networks(world: World) -> None:
    """Raises UserError where ranks are on different networks: their communicator would hang."""
    networks = world.gather(world.cluster and network_of(world.cluster, range(world.size)))
    other = next((rank for rank, network in enumerate(networks) if network != networks[0]), None)
    if other is not None:
        raise UserError(
            f"rank {other} would use the network {networks[other] or 'NCCL chooses'} and rank 0 "
            f"{networks[0] or 'NCCL chooses'}: give every rank the same cluster file"
        )


def _world(device: torch.device, timeout: timedelta, cluster: Cluster | None) -> World:
    everyone = range(dist.get_world_size())
    gradients = dist.new_group(timeout=timeout, pg_options=device_options(cluster, everyone, device, timeout))
    return World(
        rank=dist.get_rank(),
        size=dist.get_world_size(),
        device=device,
        exchange=dist.group.WORLD,
        gradients=gradients,
        collectives=TorchCollectives(gradients),
        control=dist.new_group(backend="gloo", timeout=PATIENT),
        checkpoint=dist.new_group(backend="gloo", timeout=PATIENT),
        statistics=dist.new_group(backend="gloo", timeout=timeout),
        cluster=cluster,
    )
