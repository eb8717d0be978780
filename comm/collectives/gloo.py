"""Messages through gloo: the transport of the collectives inside a process group."""

from __future__ import annotations

import torch
import torch.distributed as dist

from heteromesh.comm.interfaces import Work


class GlooTransport:
    """Point-to-point messages of a gloo group, which stays the caller's; the time limit is the group's.

    gloo sends nothing before it has heard that the peer has posted the receive, and that word queues behind the data
    on its way to the sender: post receives early.
    """

    def __init__(self, group: dist.ProcessGroup) -> None:
        self._group = group
        self.rank, self.size = group.rank(), group.size()

    def send(self, peer: int, tensor: torch.Tensor, tag: int) -> Work:
        return self._group.send([tensor], peer, tag)

    def recv(self, peer: int, tensor: torch.Tensor, tag: int) -> Work:
        return self._group.recv([tensor], peer, tag)

    def close(self) -> None:
        """Nothing to do: the group is the caller's."""
