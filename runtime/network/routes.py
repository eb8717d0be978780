"""By which interface this host sends to an address, as the kernel's routing tables and rules say (Linux)."""

from __future__ import annotations

import os
import socket
import struct

_GET, _ERROR, _REQUEST = 26, 2, 1
"""RTM_GETROUTE, NLMSG_ERROR, NLM_F_REQUEST."""
_HEADER, _ROUTE, _ATTRIBUTE = struct.Struct("=IHHII"), struct.Struct("=8BI"), struct.Struct("=HH")
_TARGET, _SOURCE, _INTERFACE = 1, 2, 4
"""RTA_DST, RTA_SRC, RTA_OIF."""


def leaves_by(source: str, target: str) -> str:
    """The name of the interface that packets from one IPv4 address to another leave by.

    `lo` for a target that is this host's own. Raises OSError where there is no way, or the source isn't this host's.
    """
    attributes = b"".join(
        _ATTRIBUTE.pack(_ATTRIBUTE.size + 4, kind) + socket.inet_aton(address)
        for kind, address in ((_TARGET, target), (_SOURCE, source))
    )
    body = _ROUTE.pack(socket.AF_INET, 32, 32, 0, 0, 0, 0, 0, 0) + attributes
    with socket.socket(socket.AF_NETLINK, socket.SOCK_RAW, socket.NETLINK_ROUTE) as asked:
        asked.send(_HEADER.pack(_HEADER.size + len(body), _GET, _REQUEST, 1, 0) + body)
        answer = asked.recv(1 << 14)
    if _HEADER.unpack_from(answer)[1] == _ERROR:
        number = -struct.unpack_from("=i", answer, _HEADER.size)[0]
        raise OSError(number, os.strerror(number))
    place = _HEADER.size + _ROUTE.size
    while place < len(answer):
        size, kind = _ATTRIBUTE.unpack_from(answer, place)
        if kind == _INTERFACE:
            return socket.if_indextoname(struct.unpack_from("=I", answer, place + _ATTRIBUTE.size)[0])
        place += -(-size // 4) * 4
    raise OSError(f"the kernel names no interface for {target}")
