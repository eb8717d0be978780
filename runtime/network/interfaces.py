"""The network interfaces of this host that other hosts may reach: name, IPv4 address, nominal rate (Linux)."""

from __future__ import annotations

import fcntl
import ipaddress
import socket
import struct
from dataclasses import dataclass
from pathlib import Path

NETWORK = Path("/sys/class/net")
_ADDRESS, _FLAGS, _MASK = 0x8915, 0x8913, 0x891B
_UP, _LOOPBACK = 0x1, 0x8
_VIRTUAL = ("docker", "br-", "virbr", "cni", "flannel", "cali", "tun", "tap", "wg")


@dataclass(frozen=True, slots=True, kw_only=True)
class Interface:
    """One interface with an IPv4 address."""

    name: str
    address: str
    prefix: int
    """Bits of the network's part of the address."""
    mbit: int | None
    """What the driver says it can do; None: it does not say."""

    @property
    def network(self) -> ipaddress.IPv4Network:
        """The network that it is on."""
        return ipaddress.IPv4Network(f"{self.address}/{self.prefix}", strict=False)


def interfaces(network: Path = NETWORK) -> tuple[Interface, ...]:
    """Those that are up and neither loopback nor a bridge or tunnel of this machine's own; none off Linux."""
    found = []
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as asked:
        for _, name in socket.if_nameindex():
            try:
                flags = struct.unpack("16xH", _ask(asked, _FLAGS, name)[:18])[0]
                address, mask = (socket.inet_ntoa(_ask(asked, call, name)[20:24]) for call in (_ADDRESS, _MASK))
            except OSError:
                continue  # no IPv4 address, or not Linux
            own = name.startswith(_VIRTUAL) or (network / name / "bridge").exists()
            if not flags & _UP or flags & _LOOPBACK or own:
                continue
            prefix = ipaddress.IPv4Network(f"0.0.0.0/{mask}").prefixlen
            found.append(Interface(name=name, address=address, prefix=prefix, mbit=_mbit(network / name)))
    return tuple(found)


def _ask(asked: socket.socket, call: int, name: str) -> bytes:
    return fcntl.ioctl(asked.fileno(), call, struct.pack("256s", name.encode()[:15]))


def _mbit(folder: Path) -> int | None:
    try:
        value = int((folder / "speed").read_text())
    except (OSError, ValueError):
        return None
    return value if value > 0 else None
