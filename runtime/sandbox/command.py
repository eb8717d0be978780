"""The command of one host: rendezvous flags for torchrun and its like, environment variables for everything."""

from __future__ import annotations

import re
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from heteromesh.runtime.process.variables import CLUSTER_VARIABLE

LAUNCHERS = ("run", "probe")
"""Commands of `heteromesh` that take torchrun's flags."""
PORT = 29500
"""Hosts have ports of their own, so any does."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Seat:
    """A host's place in the job."""

    index: int
    devices: int
    names: tuple[str, ...]
    """Of all hosts."""
    interface: str
    """The one by which all hosts reach each other; empty: none."""
    master: str
    """Address of the first host."""
    cluster_file: str = ""

    def environment(self, base: Mapping[str, str]) -> dict[str, str]:
        """Returns `base` and what tells a process where it is."""
        own = {
            "HETEROMESH_HOST": self.names[self.index],
            "HETEROMESH_HOSTS": ",".join(self.names),
            "MASTER_ADDR": self.master,
            "MASTER_PORT": str(PORT),
            "NNODES": str(len(self.names)),
            "NODE_RANK": str(self.index),
            "NPROC": str(self.devices),
            "OMP_NUM_THREADS": base.get("OMP_NUM_THREADS", "1"),
        }
        if self.interface:
            own |= {"GLOO_SOCKET_IFNAME": self.interface}
        if self.cluster_file:
            own |= {CLUSTER_VARIABLE: self.cluster_file}
        return dict(base) | own

    def command(self, words: Sequence[str]) -> list[str]:
        """Returns `words`, with torchrun's flags where it begins with torchrun or with what has its flags.

        Flags of the user's own come later and so win.
        """
        launcher = _launcher(words)
        if not launcher:
            return list(words)
        first = [sys.executable, "-m", "heteromesh"] if words[0] == "heteromesh" else [words[0]]
        return [
            *first,
            *words[1:launcher],
            f"--nnodes={len(self.names)}",
            f"--nproc-per-node={self.devices}",
            f"--node-rank={self.index}",
            f"--rdzv-endpoint={self.master}:{PORT}",
            *words[launcher:],
        ]


def _launcher(words: Sequence[str]) -> int:
    """Returns how many words the launcher's name has; 0: it is none."""
    name = words[0].rpartition("/")[2]
    if name == "torchrun":
        return 1
    if name == "heteromesh" and words[1:] and words[1] in LAUNCHERS:
        return 2
    if re.fullmatch(r"python[\d.]*", name):
        if list(words[1:3]) == ["-m", "torch.distributed.run"]:
            return 3
        if list(words[1:3]) == ["-m", "heteromesh"] and words[3:] and words[3] in LAUNCHERS:
            return 4
    return 0
