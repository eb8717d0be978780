"""What went over each NIC of a host, as the kernel counts it."""

from __future__ import annotations

import socket
import struct
from collections import Counter
from collections.abc import Sequence

from heteromesh.comm.tcp.transport import TcpTransport

_ACKNOWLEDGED = 120
"""Offset of tcpi_bytes_acked in linux/tcp.h's struct tcp_info."""


def nic_bytes(transport: TcpTransport, hosts: Sequence[int]) -> tuple[int, ...]:
    """Returns the bytes that this rank has sent to ranks on other hosts, by address of its host, in order."""
    sent: Counter[str] = Counter()
    for peer, host in enumerate(hosts):
        for link in transport.links_to(peer) if host != hosts[transport.rank] else ():
            info = link.sock.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, 256)
            sent[link.sock.getsockname()[0]] += struct.unpack_from("=Q", info, _ACKNOWLEDGED)[0]
    return tuple(count for _, count in sorted(sent.items()))
