"""torchrun's rendezvous for a job of one host: a store that only this host reaches.

torchrun's own store listens on all interfaces without a secret, and its launcher unpickles what is in there: whoever
reaches the port runs code. This one listens on the loopback interface, and every start of the workers gets a new store,
so that those that are started again don't read what the last ones have written.
"""

from __future__ import annotations

import argparse
import os
import socket
from pathlib import Path

from torch._C._distributed_c10d import PrefixStore, TCPStore
from torch.distributed.elastic.rendezvous import (
    RendezvousHandler,
    RendezvousInfo,
    RendezvousParameters,
    rendezvous_handler_registry,
)
from torch.distributed.elastic.rendezvous.api import RendezvousStoreInfo
from torch.distributed.run import parse_min_max_nnodes

from heteromesh.errors import UserError
from heteromesh.runtime.process.environment import parse_addresses

BACKEND = "heteromesh-loopback"
_HOST = "127.0.0.1"
_GLOO_INTERFACE = "GLOO_SOCKET_IFNAME"


class LoopbackRendezvous(RendezvousHandler):
    """Makes a store for each start of the workers: at the port that was asked for first, then at any free one."""

    def __init__(self, run_id: str, port: int) -> None:
        self._run_id, self._port = run_id, port

    @property
    def use_agent_store(self) -> bool:
        return True

    def get_backend(self) -> str:
        return BACKEND

    def next_rendezvous(self) -> RendezvousInfo:
        """Raises UserError when the port is taken."""
        port, self._port = self._port, 0
        try:
            listening = socket.create_server((_HOST, port), backlog=256)
        except OSError as error:
            raise UserError(
                f"port {port} can't be listened on ({error.strerror}): give another one, or none for any that is free"
            ) from None
        port = listening.getsockname()[1]
        # the store closes the descriptor
        store = TCPStore(_HOST, port, is_master=True, wait_for_workers=False, master_listen_fd=listening.detach())
        return RendezvousInfo(PrefixStore(self._run_id, store), 0, 1, RendezvousStoreInfo(_HOST, port))

    def is_closed(self) -> bool:
        return False

    def set_closed(self) -> None:
        """Does nothing: nobody else takes part."""

    def num_nodes_waiting(self) -> int:
        return 0

    def get_run_id(self) -> str:
        return self._run_id

    def shutdown(self) -> bool:
        return True


def stay_on_loopback(options: argparse.Namespace) -> bool:
    """Changes torchrun's options for a job of one host; returns whether it is one.

    Other rendezvous than torchrun's two usual ones were chosen by the user, and stay. Raises UserError.
    """
    alone = parse_min_max_nnodes(options.nnodes)[1] == 1 and options.rdzv_backend in ("static", "c10d")
    if not alone:
        return False
    port = 0
    if options.rdzv_endpoint and not options.standalone:
        where = options.rdzv_endpoint
        port = parse_addresses(where, "--rdzv-endpoint")[0][1] if ":" in where and not where.endswith(":0") else 0
    elif options.master_port is not None and not options.standalone:
        port = int(options.master_port)
    rendezvous_handler_registry.register(BACKEND, _create)
    options.standalone, options.rdzv_backend, options.rdzv_endpoint = False, BACKEND, f"{_HOST}:{port}"
    if Path("/sys/class/net/lo").exists():
        os.environ.setdefault(_GLOO_INTERFACE, "lo")
    return True


def _create(parameters: RendezvousParameters) -> RendezvousHandler:
    return LoopbackRendezvous(parameters.run_id, int(parameters.endpoint.rpartition(":")[2]))
