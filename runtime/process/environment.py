"""The environment of a worker of `heteromesh run --fault-tolerance`: written by the agent, read by `Trainer`.

| variable | value |
|---|---|
| HETEROMESH_COORDINATORS | `host:port[,host:port...]`, tried in this order; `[address]:port` for IPv6 |
| HETEROMESH_SECRET | the job's secret, as for `python -m heteromesh.faults.coordinator`; never an argument |
| HETEROMESH_MEMBER_NAME | `hostname:local rank` |
| HETEROMESH_MEMBER_HOSTS | `address[,address...]` of this host for the data plane, one for each network card |
| HETEROMESH_MEMBERS | `LEAST:MOST` members of the job |
| HETEROMESH_MEMBER_PLACE | which rank of the whole job this is, from 0 host by host; unset where that is not known |

A script started by hand joins a running job when it sets the same variables.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Mapping, Sequence

from heteromesh.errors import UserError
from heteromesh.faults.coordinator.main import SECRET, read_bounds, read_secret
from heteromesh.faults.member.member import JoinOptions
from heteromesh.faults.membership.membership import Bounds
from heteromesh.faults.wire.control import Address

COORDINATORS = "HETEROMESH_COORDINATORS"
NAME = "HETEROMESH_MEMBER_NAME"
HOSTS = "HETEROMESH_MEMBER_HOSTS"
MEMBERS = "HETEROMESH_MEMBERS"
PLACE = "HETEROMESH_MEMBER_PLACE"
_WAY_OUT = "start the script with `heteromesh run --fault-tolerance`"


def join_options(
    *, facts: Mapping[str, str], step: int = 0, state: str = "", links: int = 1, connect_seconds: float = 10.0
) -> JoinOptions:
    """Returns how this worker joins; `facts`, `step`, `state`, `links`, `connect_seconds` as in `JoinOptions`.

    Raises UserError when a variable is missing or malformed.
    """
    return JoinOptions(
        coordinators=parse_addresses(_variable(COORDINATORS), COORDINATORS),
        secret=_secret(),
        name=_variable(NAME),
        facts=dict(facts),
        place=place_from_environment(),
        hosts=_hosts(),
        links=links,
        step=step,
        state=state,
        connect_seconds=connect_seconds,
    )


def bounds_from_environment() -> Bounds:
    """Returns how many members the job needs and takes. Raises UserError when that is missing or malformed."""
    text = _variable(MEMBERS)
    try:
        return read_bounds(text)
    except UserError:
        raise UserError(f"{MEMBERS}={text} is not LEAST:MOST with 1 <= LEAST <= MOST <= 256: {_WAY_OUT}") from None


def place_from_environment() -> int | None:
    """Returns which rank of the whole job this worker is, if that is known. Raises UserError when it is malformed."""
    text = os.environ.get(PLACE, "").strip()
    if text and not text.isdecimal():
        raise UserError(f"{PLACE}={text} is no rank: give 0 for the first process of the first host, or leave it out")
    return int(text) if text else None


def job_from_environment() -> str:
    """Returns what all processes of this job have in common, and no others; it tells nothing of the secret.

    Raises UserError when a variable is missing.
    """
    told = hashlib.blake2b(_variable(COORDINATORS).encode(), key=hashlib.blake2b(_secret()).digest(), digest_size=16)
    return told.hexdigest()


def is_first() -> bool:
    """Whether this process is the one that does what is to be done once for the whole job, before it trains.

    Under torchrun and `heteromesh run` that is rank 0; with --fault-tolerance, where ranks change, the process of the
    first place; alone it is this process.
    """
    place = place_from_environment()
    if place is None and COORDINATORS not in os.environ:
        return int(os.environ.get("RANK", "0")) == 0
    return (int(os.environ.get("LOCAL_RANK", "0")) if place is None else place) == 0


def environment_of(
    *,
    coordinators: Sequence[Address],
    secret: str,
    name: str,
    hosts: Sequence[str],
    bounds: Bounds,
    place: int | None = None,
) -> dict[str, str]:
    """Returns what the functions above read."""
    known = {} if place is None else {PLACE: str(place)}
    return known | {
        COORDINATORS: ",".join(join_address(address) for address in coordinators),
        SECRET: secret,
        NAME: name,
        HOSTS: ",".join(hosts),
        MEMBERS: f"{bounds.min}:{bounds.max}",
    }


def parse_addresses(text: str, where: str) -> list[Address]:
    """Reads `host:port[,host:port...]`; `where` names the flag or variable in errors. Raises UserError."""
    return [_parse_address(one, where) for one in text.split(",")]


def join_address(address: Address) -> str:
    """Writes `host:port`; a host with colons (IPv6) in brackets."""
    host, port = address
    return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"


def _parse_address(text: str, where: str) -> Address:
    host, _, port = text.strip().rpartition(":")
    if host.startswith("[") and host.endswith("]"):
        host = host[1:-1]
    elif ":" in host:
        host = ""  # IPv6 without brackets: where the port begins can't be told
    if not host or not port.isascii() or not port.isdigit() or not 0 < int(port) < 1 << 16:
        raise UserError(
            f"{where} has {text!r}, which is not HOST:PORT with a port of 1 to 65535: write for example 10.0.0.1:29400"
        )
    return host, int(port)


def _variable(name: str) -> str:
    value = os.environ.get(name, "").strip()
    if not value:
        raise UserError(f"environment variable {name} is not set, so this process can't join a job: {_WAY_OUT}")
    return value


def _secret() -> bytes:
    _variable(SECRET)
    return read_secret(None)


def _hosts() -> list[str]:
    hosts = [host.strip() for host in _variable(HOSTS).split(",")]
    if not all(hosts):
        raise UserError(f"{HOSTS}={os.environ[HOSTS]} has an empty address: {_WAY_OUT}")
    return hosts
