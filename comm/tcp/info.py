"""What Linux knows of a TCP connection: struct tcp_info of linux/tcp.h, as far as diagnosis needs it."""

from __future__ import annotations

import socket
import struct
from collections.abc import Iterable
from dataclasses import dataclass

_INFO = struct.Struct("=8B24I4Q6I4Q")
_TIMEOUTS, _UNACKED, _SENT_AGO, _HEARD_AGO, _RTT, _RETRANSMITS = 2, 12, 17, 20, 23, 31
_RATE, _BUSY, _RECEIVER, _BUFFER = 42, 43, 44, 45
"""Positions of the fields."""
_SILENT_MS = 100


@dataclass(frozen=True, kw_only=True, slots=True)
class TcpInfo:
    """Of one connection, or of all connections with one peer."""

    rtt: float = 0.0
    """Smoothed round trip, seconds."""
    retrying: int = 0
    """Timeouts in a row that the peer's kernel answered with nothing. One with a full buffer answers."""
    retransmits: int = 0
    """Segments sent again, ever."""
    unacked: int = 0
    """Segments in flight."""
    busy: float = 0.0
    """Seconds in which there was something to send or to be acknowledged."""
    receiver_limited: float = 0.0
    """Of these, seconds in which the peer's process had not read what its kernel holds."""
    buffer_limited: float = 0.0
    """Of these, seconds in which the send buffer was the limit."""
    rate: int = 0
    """The newest delivery rate, bytes per second."""


def tcp_info(sock: socket.socket) -> TcpInfo:
    """Raises OSError when the socket is closed."""
    data = _INFO.unpack(sock.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, _INFO.size))
    silent = data[_UNACKED] > 0 and data[_HEARD_AGO] - data[_SENT_AGO] > _SILENT_MS
    return TcpInfo(
        rtt=data[_RTT] / 1e6,
        retrying=data[_TIMEOUTS] if silent else 0,
        retransmits=data[_RETRANSMITS],
        unacked=data[_UNACKED],
        busy=data[_BUSY] / 1e6,
        receiver_limited=data[_RECEIVER] / 1e6,
        buffer_limited=data[_BUFFER] / 1e6,
        rate=data[_RATE],
    )


def together(infos: Iterable[TcpInfo]) -> TcpInfo:
    """Combines parallel connections: counts added, times of the busiest one."""
    every = list(infos)
    busiest = max(every, key=lambda info: info.busy, default=TcpInfo())
    return TcpInfo(
        rtt=max((info.rtt for info in every), default=0.0),
        retrying=max((info.retrying for info in every), default=0),
        retransmits=sum(info.retransmits for info in every),
        unacked=sum(info.unacked for info in every),
        busy=busiest.busy,
        receiver_limited=busiest.receiver_limited,
        buffer_limited=busiest.buffer_limited,
        rate=sum(info.rate for info in every),
    )
